//! Trainings: rounds that follow on each other, shares by speed, the ledger of samples, what faults cost.

use protocol::control::{FailureKind, StartSeat};
use protocol::experiment::projector::{EvalSpec, Method, Projected, ProjectorRef, START, Stage, Tier, TrainSpec};
use protocol::experiment::{ShardSpec, Spread};
use protocol::group::Group;
use protocol::ids::{AttemptId, Role, RunId, ShardId, WorkerId};

use super::lab::{GB, Lab, fuser, new_run, new_trainings, recovered, ridge, shard, training};
use crate::scheduler::{Event, Input, NewRun, RunState, ShardState};

fn stage(lab: &Lab, id: ShardId) -> Stage {
    match &lab.state().shard(id).unwrap().spec {
        ShardSpec::ProjectorTrain(spec) => spec.stage.clone(),
        other => panic!("no training: {other:?}"),
    }
}

/// Shards of a run in a state.
fn in_state(lab: &Lab, run: RunId, state: ShardState) -> Vec<ShardId> {
    let shards = (0u32..).zip(&lab.state().runs[&run].shards);
    shards.filter(|(_, body)| body.state == state).map(|(index, _)| shard(run, index)).collect()
}

/// Finishes every seat of a shard's open attempt.
fn finish(lab: &mut Lab, id: ShardId) {
    let (attempt, _) = lab.open(id);
    let seats = lab.state().attempt(attempt).unwrap().seats.clone();
    for seat in seats {
        assert!(lab.finish(seat.device.worker, attempt, seat.role));
    }
}

/// Finishes what runs, the newest shard first, until nothing runs; gives the starts that were sent, oldest first.
fn play(lab: &mut Lab, run: RunId) -> Vec<StartSeat> {
    let mut starts: Vec<StartSeat> = lab.starts().into_iter().map(|(_, start)| start).collect();
    for _ in 0..1_000 {
        let Some(id) = in_state(lab, run, ShardState::Running).last().copied() else { break };
        let (attempt, _) = lab.open(id);
        for seat in lab.state().attempt(attempt).unwrap().seats.clone() {
            assert!(lab.finish(seat.device.worker, attempt, seat.role));
            starts.extend(lab.starts().into_iter().map(|(_, start)| start));
        }
    }
    starts
}

fn evaluation(projector: ProjectorRef) -> ShardSpec {
    ShardSpec::ProjectorEval(Box::new(EvalSpec {
        source: super::lab::SMOL.to_owned(),
        target: super::lab::GEMMA.to_owned(),
        projector,
        shuffled: None,
        tier: Tier::Seen,
        first_fact: 0,
        facts: 8,
        conditions: Projected::ALL.to_vec(),
        answer_tokens: 4,
        spread: Spread::Any,
        seed: 1,
    }))
}

/// Workers with a device model each, and what a unit of `spec`'s local steps takes there, milliseconds.
fn unequal(lab: &mut Lab, spec: &TrainSpec, unit_ms: &[u64]) -> Vec<WorkerId> {
    let steps = spec.at(Stage::Steps {
        round: 0,
        replica: 0,
        samples: protocol::experiment::projector::Samples { first: 0, count: 1 },
        start: None,
    });
    let class = ShardSpec::ProjectorTrain(Box::new(steps)).work_class();
    let rows = |device: &str, ms: u64| {
        ["source", "target"].map(|role| (format!("{class}/{role}"), device.to_owned(), ms * 1000, 9))
    };
    let mut workers = Vec::new();
    for (number, ms) in unit_ms.iter().enumerate() {
        let worker = lab.join();
        let device = format!("processor {number}");
        lab.boxes.get_mut(&worker).unwrap().device.clone_from(&device);
        lab.connect(worker).unwrap();
        lab.beat(worker);
        lab.give(Input::TeachThroughput(rows(&device, *ms).to_vec())).unwrap();
        workers.push(worker);
    }
    workers
}

#[test]
fn ridge_is_statistics_in_any_order_and_one_solution() {
    let mut lab = Lab::new();
    let _ = [lab.online(), lab.online(), lab.online()];
    let train = Group { trainings: vec![training(ridge(), 100, 3)], ..Group::default() };
    let test = Group { count: 1, after: vec![0], ..Group::default() };
    let run = NewRun { groups: vec![train, test], ..new_run(0, vec![evaluation(ProjectorRef::Trained(0))]) };
    let run = lab.submit_run(run);
    assert_eq!(lab.shard_state(shard(run, 0)), ShardState::Waiting);
    assert!(
        lab.sentence(shard(run, 0)).contains("of which a training has not ended"),
        "{}",
        lab.sentence(shard(run, 0))
    );
    let ranges: Vec<_> = (1..4).map(|index| stage(&lab, shard(run, index)).samples().unwrap()).collect();
    assert_eq!(
        ranges.iter().map(|range| (range.first, range.count)).collect::<Vec<_>>(),
        [(0, 33), (33, 33), (66, 34)]
    );

    let starts = play(&mut lab, run);
    let Stage::Solve { parts } = stage(&lab, shard(run, 4)) else { panic!("a solution") };
    let made = |index| {
        let attempt = lab.state().shard(shard(run, index)).unwrap().committed_attempt().unwrap();
        attempt.seat(Role::Target).unwrap().outcome.as_ref().unwrap().outputs[1].clone()
    };
    assert_eq!(parts, [made(1), made(2), made(3)]);
    let inputs = |index: u32| {
        let start =
            starts.iter().find(|start| start.attempt.shard == shard(run, index) && start.role != Role::Source).unwrap();
        start.inputs.iter().map(|input| (input.name.as_str(), input.hash)).collect::<Vec<_>>()
    };
    let solved = &lab.state().runs[&run].trainings[0].outputs;
    assert_eq!(inputs(4)[2], ("2-statistics.safetensors", parts[2].hash));
    assert_eq!(inputs(0), [("projector.safetensors", solved[1].hash), ("shuffled.safetensors", solved[2].hash)]);
    assert_eq!(lab.state().runs[&run].state, RunState::Complete);
}

#[test]
fn a_fuser_steps_and_meets_until_every_sample_is_counted() {
    let mut lab = Lab::new();
    let _ = [lab.online(), lab.online()];
    let run = lab.submit_run(new_trainings(vec![
        training(ridge(), 10, 1),
        training(fuser(64, Some(ProjectorRef::Trained(0))), 300, 2),
    ]));
    assert_eq!(lab.state().runs[&run].shards_to_come(0), 1);
    // As if one replica did 300 samples in rounds of 64.
    assert_eq!(lab.state().runs[&run].shards_to_come(1), 10);
    let starts = play(&mut lab, run);
    assert_eq!((0..2).map(|number| lab.state().runs[&run].shards_to_come(number)).sum::<u32>(), 0);
    assert_eq!(lab.state().runs[&run].samples_counted(1), 300);
    let of = |index| stage(&lab, shard(run, index));
    // Statistics, solution, then rounds of two replicas: 16 steps of 4 samples each.
    let Stage::Steps { samples, start: None, .. } = of(2) else { panic!("local steps from the recipe's weights") };
    assert_eq!((samples.first, samples.count), (0, 64));
    let Stage::Outer { counted: 128, rounds: 3, start: None, deltas, .. } = of(4) else { panic!("{:?}", of(4)) };
    assert_eq!(deltas.iter().map(|(_, samples)| *samples).collect::<Vec<_>>(), [64, 64]);
    let Stage::Steps { round: 1, start: Some(start), .. } = of(5) else { panic!("{:?}", of(5)) };
    assert_eq!(start.name, START);
    // 300 - 256 are left: both do less.
    let last: Vec<_> = (8..10).map(|index| of(index).samples().unwrap()).collect();
    assert_eq!((last[0].first, last[0].count, last[1].count, last[1].end()), (256, 24, 20, 300));
    let Stage::Outer { counted: 300, rounds: 3, .. } = of(10) else { panic!("{:?}", of(10)) };
    let of_role =
        |role| starts.iter().find(|start| start.attempt.shard == shard(run, 2) && start.role == role).unwrap();
    assert!(of_role(Role::Source).inputs.is_empty(), "a source reads no weights");
    let first = of_role(Role::Target);
    assert_eq!(first.inputs[0].name, "base.safetensors");
    assert_eq!(first.inputs[0].hash, lab.state().runs[&run].trainings[0].outputs[1].hash);
    assert_eq!(lab.state().runs[&run].state, RunState::Complete);
    assert_eq!(recovered(&lab.journal, lab.now).state(), lab.state());
}

#[test]
fn unequal_replicas_end_together() {
    let mut lab = Lab::new();
    let spec = training(fuser(64, None), 4_000, 4);
    // In the order of joining neither fastest nor slowest first.
    let unit_ms = [400, 100, 400, 200];
    let workers = unequal(&mut lab, &spec, &unit_ms);
    let run = lab.submit_run(new_trainings(vec![spec]));
    for round in 0..3 {
        let running = in_state(&lab, run, ShardState::Running);
        assert_eq!(running.len(), 4, "round {round}");
        let ends: Vec<u64> = running
            .iter()
            .map(|id| {
                let (_, seats) = lab.open(*id);
                let at = workers.iter().position(|worker| *worker == seats[0]).unwrap();
                u64::from(stage(&lab, *id).samples().unwrap().count) * unit_ms[at]
            })
            .collect();
        let (first, last) = (ends.iter().min().unwrap(), ends.iter().max().unwrap());
        assert!(last * 100 <= first * 115, "round {round}: {ends:?}");
        for (id, ms) in running.into_iter().zip(ends) {
            lab.wall_ms = ms;
            finish(&mut lab, id);
        }
        let outer = in_state(&lab, run, ShardState::Running)[0];
        finish(&mut lab, outer);
    }
}

#[test]
fn boxes_of_one_kind_are_told_apart_once_they_have_stepped() {
    let mut lab = Lab::new();
    let workers = [lab.online(), lab.online(), lab.online()];
    let unit_ms = [400, 100, 200];
    let run = lab.submit_run(new_trainings(vec![training(fuser(64, None), 8_000, 3)]));
    let mut spreads = Vec::new();
    for _ in 0..4 {
        let mut ends = Vec::new();
        for id in in_state(&lab, run, ShardState::Running) {
            let at = workers.iter().position(|worker| *worker == lab.open(id).1[0]).unwrap();
            let ms = u64::from(stage(&lab, id).samples().unwrap().count) * unit_ms[at];
            ends.push((id, ms));
        }
        let all = || ends.iter().map(|(_, ms)| *ms);
        spreads.push((ends.len(), all().max().unwrap() * 100 / all().min().unwrap()));
        for (id, ms) in ends {
            lab.wall_ms = ms;
            finish(&mut lab, id);
        }
        let outer = in_state(&lab, run, ShardState::Running)[0];
        finish(&mut lab, outer);
    }
    // Equal shares at first, for nothing is known of them: four times as long.
    assert_eq!(spreads[0], (3, 400));
    assert!(spreads[1..].iter().all(|(replicas, percent)| *replicas == 3 && *percent <= 115), "{spreads:?}");
}

/// Pairs of a training whose seats must sit apart, round by round, as (source, target); finishes what runs. `waited_ms` of a
/// minute says how long each role waits.
fn pairs_of_rounds(waiting: Role, waited_ms: u64, rounds: u32) -> (Vec<WorkerId>, Vec<Vec<(WorkerId, WorkerId)>>) {
    let mut lab = Lab::new();
    let join = |_| {
        let worker = lab.join();
        let body = lab.boxes.get_mut(&worker).unwrap();
        (body.budget, body.free) = (16 * GB, 16 * GB);
        lab.connect(worker).unwrap();
        lab.beat(worker);
        worker
    };
    let workers: Vec<_> = (0..4).map(join).collect();
    let spec = TrainSpec { spread: Spread::Workers, ..training(fuser(64, None), 8_000, 4) };
    let run = lab.submit_run(new_trainings(vec![spec]));
    lab.waited_ms.insert(waiting, waited_ms);
    let mut all = Vec::new();
    for _ in 0..rounds {
        let mut pairs = Vec::new();
        for id in in_state(&lab, run, ShardState::Running) {
            let attempt = lab.state().attempt(lab.open(id).0).unwrap();
            let at = |role| attempt.seat(role).unwrap().device.worker;
            pairs.push((at(Role::Source), at(Role::Target)));
        }
        all.push(pairs);
        lab.wall_ms = 60_000;
        for id in in_state(&lab, run, ShardState::Running) {
            finish(&mut lab, id);
        }
        lab.wall_ms = 5;
        let outer = in_state(&lab, run, ShardState::Running)[0];
        finish(&mut lab, outer);
    }
    (workers, all)
}

#[test]
fn a_source_serves_as_many_targets_as_it_is_faster() {
    let (_, rounds) = pairs_of_rounds(Role::Source, 45_000, 3);
    // Nothing is known at first: a source each.
    assert_eq!(rounds[0].len(), 2);
    for pairs in &rounds[1..] {
        assert_eq!(pairs.len(), 3, "{pairs:?}");
        assert!(pairs.iter().all(|(source, _)| *source == pairs[0].0), "{pairs:?}");
        let mut targets: Vec<_> = pairs.iter().map(|(_, target)| target).collect();
        targets.dedup();
        assert_eq!(targets.len(), 3, "{pairs:?}");
    }
}

#[test]
fn a_target_has_as_many_sources_as_it_is_faster() {
    let (_, rounds) = pairs_of_rounds(Role::Target, 45_000, 3);
    for pairs in &rounds[1..] {
        assert_eq!(pairs.len(), 3, "{pairs:?}");
        assert!(pairs.iter().all(|(_, target)| *target == pairs[0].1), "{pairs:?}");
    }
}

#[test]
fn seats_that_are_about_as_fast_have_their_devices_for_themselves() {
    let (workers, rounds) = pairs_of_rounds(Role::Source, 20_000, 3);
    for pairs in rounds {
        let mut seats: Vec<_> = pairs.iter().flat_map(|(source, target)| [*source, *target]).collect();
        seats.sort_unstable();
        assert_eq!(seats, workers, "{pairs:?}");
    }
}

#[test]
fn who_joins_or_leaves_matters_in_the_next_round() {
    let mut lab = Lab::new();
    let first = lab.online();
    let run = lab.submit_run(new_trainings(vec![training(fuser(64, None), 1_000, 4)]));
    assert_eq!(in_state(&lab, run, ShardState::Running).len(), 1);
    let second = lab.online();
    assert_eq!(lab.state().runs[&run].shards.len(), 1, "the round is what it was");
    finish(&mut lab, shard(run, 0));
    finish(&mut lab, shard(run, 1));
    let running = in_state(&lab, run, ShardState::Running);
    assert_eq!(running, [shard(run, 2), shard(run, 3)]);

    // One is lost: its share is stepped over once more elsewhere, once the other is done.
    let lost = running.iter().copied().find(|id| lab.open(*id).1[0] == second).unwrap();
    let kept = running.iter().copied().find(|id| *id != lost).unwrap();
    let (attempt, _) = lab.open(lost);
    lab.disconnect(second);
    for _ in 0..40 {
        lab.pass_ms(1_000);
        lab.hold_all(first);
        lab.beat(first);
    }
    assert_eq!(lab.shard_state(lost), ShardState::Waiting);
    finish(&mut lab, kept);
    lab.beat(first);
    assert_eq!(lab.open(lost).1[0], first);
    let samples = stage(&lab, lost).samples();
    finish(&mut lab, lost);
    assert_eq!(stage(&lab, lost).samples(), samples);
    assert!(matches!(stage(&lab, shard(run, 4)), Stage::Outer { round: 1, .. }));
    assert!(lab.state().attempt(attempt).is_some());
    finish(&mut lab, shard(run, 4));
    assert_eq!(in_state(&lab, run, ShardState::Running).len(), 1, "alone again");
}

#[test]
fn a_replica_that_stalls_is_overtaken_by_one_that_is_done() {
    let mut lab = Lab::new();
    let workers = [lab.online(), lab.online()];
    let run = lab.submit_run(new_trainings(vec![training(fuser(64, None), 1_000, 2)]));
    let play_round = |lab: &mut Lab| {
        lab.wall_ms = 60_000;
        for id in in_state(lab, run, ShardState::Running) {
            finish(lab, id);
        }
        lab.wall_ms = 5;
        let outer = in_state(lab, run, ShardState::Running)[0];
        finish(lab, outer);
    };
    play_round(&mut lab);
    let [done, stalled] = in_state(&lab, run, ShardState::Running)[..] else { panic!("two replicas") };
    let (first, _) = lab.open(stalled);
    finish(&mut lab, done);
    for _ in 0..180 {
        lab.pass_ms(1_000);
        for worker in workers {
            lab.hold_all(worker);
            lab.beat(worker);
        }
    }
    let attempts: Vec<_> = lab.state().shard(stalled).unwrap().open_attempts().collect();
    assert_eq!(attempts.len(), 2, "{}", lab.sentence(stalled));
    let second = AttemptId { shard: stalled, fence: attempts[1].fence };
    let seats = attempts[1].seats.clone();
    let was = lab.state().attempt(first).unwrap().seats[0].device.clone();
    assert!(seats.iter().all(|seat| seat.device != was));
    for seat in seats {
        assert!(lab.finish(seat.device.worker, second, seat.role));
    }
    assert_eq!(lab.shard_state(stalled), ShardState::Committed);
    let outer = in_state(&lab, run, ShardState::Running)[0];
    assert!(matches!(stage(&lab, outer), Stage::Outer { round: 1, counted: 256, .. }));
    assert_eq!(lab.state().runs[&run].samples_counted(0), 256);
    assert!(!lab.finish(was.worker, first, Role::Target), "what comes late changes nothing");
    finish(&mut lab, outer);
    play_round(&mut lab);
}

#[test]
fn a_coordinator_killed_in_a_round_goes_on_with_it() {
    let mut lab = Lab::new();
    let worker = lab.online();
    let run = lab.submit_run(new_trainings(vec![training(ridge(), 100, 2)]));
    let before = serde_json::to_string(lab.state()).unwrap();
    lab.kill_coordinator();
    assert_eq!(serde_json::to_string(lab.state()).unwrap(), before);
    lab.hold_all(worker);
    lab.connect(worker).unwrap();
    lab.beat(worker);
    play(&mut lab, run);
    assert_eq!(lab.state().runs[&run].state, RunState::Complete);
    let opened = lab.journal.iter().filter(|record| matches!(record.event, Event::RoundOpened { .. })).count();
    assert_eq!(opened, 2);
}

#[test]
fn a_part_that_fails_for_good_fails_the_run_and_retry_goes_on_from_there() {
    let mut lab = Lab::new();
    let worker = lab.online();
    let trainings = vec![training(ridge(), 100, 1), training(fuser(64, None), 10, 1)];
    let run = lab.submit_run(new_trainings(trainings));
    finish(&mut lab, shard(run, 0));
    let (attempt, _) = lab.open(shard(run, 1));
    assert!(lab.fail(worker, attempt, Role::Main, FailureKind::BadSpec));
    assert_eq!(lab.state().runs[&run].state, RunState::Failed);
    lab.give(Input::RetryRun(run)).unwrap();
    play(&mut lab, run);
    assert_eq!(lab.state().runs[&run].state, RunState::Complete);
    assert!(lab.state().runs[&run].trainings.iter().all(|training| training.ended));
}

#[test]
fn a_width_that_is_left_open_is_the_widest_that_fits() {
    let width = |budget: u64| {
        let mut lab = Lab::new();
        let worker = lab.join();
        lab.boxes.get_mut(&worker).unwrap().budget = budget;
        lab.connect(worker).unwrap();
        lab.beat(worker);
        let run = lab.submit_run(new_trainings(vec![training(fuser(0, None), 100, 1)]));
        let Method::Fuser(recipe) = lab.state().runs[&run].trainings[0].spec.method.clone() else { panic!("a fuser") };
        let ShardSpec::ProjectorTrain(spec) = &lab.state().shard(shard(run, 0)).unwrap().spec else { panic!() };
        assert_eq!(spec.method, Method::Fuser(recipe.clone()), "what was chosen stands in the shard");
        recipe.hidden
    };
    assert_eq!((width(16 * GB), width(GB)), (128, 64));
}

#[test]
fn nothing_follows_a_cancelled_training() {
    let mut lab = Lab::new();
    let worker = lab.online();
    let run = lab.submit_run(new_trainings(vec![training(ridge(), 100, 1)]));
    let (attempt, _): (AttemptId, _) = lab.open(shard(run, 0));
    lab.give(Input::CancelRun { run, reason: "enough".to_owned() }).unwrap();
    assert!(!lab.finish(worker, attempt, Role::Target));
    assert_eq!((lab.state().runs[&run].shards.len(), lab.state().runs[&run].state), (1, RunState::Cancelled));
}

#[test]
fn a_plan_goes_through_every_round_and_says_what_widths_cost() {
    let mut lab = Lab::new();
    lab.online();
    let trainings = vec![training(ridge(), 50, 2), training(fuser(0, Some(ProjectorRef::Trained(0))), 200, 2)];
    let plan = crate::forecast::plan::plan(&lab.scheduler, Some(&new_trainings(trainings)));
    assert!(plan.makespan_ms.is_some());
    // Two of statistics, a solution, four rounds of one replica and an outer step each.
    assert_eq!(plan.shards.len(), 11);
    assert!(plan.shards[10].summary.ends_with("round 3 outer step of 1"), "{}", plan.shards[10].summary);
    let fuser = &plan.fusers[0];
    assert_eq!(
        (fuser.hidden, fuser.widths.iter().map(|width| width.hidden).collect::<Vec<_>>()),
        (128, vec![1024, 512, 256, 128, 64])
    );
    assert!(fuser.widths.windows(2).all(|pair| pair[0].memory_bytes > pair[1].memory_bytes));
    // 18 layers, keys and values, from 192 and into 256 numbers.
    let h = 128;
    let each = (192 + 256 + 1) * h + 2 * (h + 2 * h * h) + (h + 2 * h * h) + (h + 1) + (h + 1) * 256 + 1;
    assert_eq!(fuser.widths[3].parameters, 2 * 18 * each);
}
