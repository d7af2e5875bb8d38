//! Scenarios of failure and recovery, one each: what the tables of `docs/architecture.md` promise.

use protocol::control::{FailureKind, ToWorker};
use protocol::experiment::Spread;
use protocol::ids::Role;
use protocol::limits::{ATTEMPTS_PER_SHARD_MAX, LEASE_TTL_MS};

use super::lab::{GB, GEMMA, Lab, SMOL, held, inspect, shard, transfer};
use crate::scheduler::{RunState, ShardState};

#[test]
fn a_shard_is_placed_finished_and_committed_once() {
    let mut lab = Lab::new();
    let worker = lab.online();
    let run = lab.submit(vec![inspect(SMOL)]);
    let starts = lab.starts();
    assert_eq!(starts.len(), 1);
    let (to, start) = &starts[0];
    assert_eq!((*to, start.role, start.device.0.as_str()), (worker, Role::Main, "cpu"));
    assert_eq!(start.seats[0].addresses, ["192.168.0.1:7000", "10.0.0.7:7000"]);

    assert!(lab.finish(worker, start.attempt, Role::Main));
    assert!(lab.wrote_manifest());
    assert_eq!(lab.state().runs[&run].state, RunState::Complete);
    assert!(lab.finish(worker, start.attempt, Role::Main), "a repeat gets the same answer");
    assert!(!lab.wrote_manifest(), "and changes nothing");
    assert_eq!(lab.commits(), 1);
}

#[test]
fn nothing_is_placed_before_free_memory_is_known() {
    let mut lab = Lab::new();
    let worker = lab.join();
    lab.connect(worker).unwrap();
    let run = lab.submit(vec![inspect(SMOL)]);
    assert!(lab.starts().is_empty());
    assert!(lab.sentence(shard(run, 0)).contains("has not yet told how much memory is free"));
    lab.beat(worker);
    assert_eq!(lab.starts().len(), 1);
}

#[test]
fn a_gang_gets_two_workers_and_commits_when_both_are_done() {
    let mut lab = Lab::new();
    let (one, two) = (lab.online(), lab.online());
    let run = lab.submit(vec![transfer(Spread::Workers)]);
    let starts = lab.starts();
    assert_eq!(starts.len(), 2);
    assert_eq!(starts[0].1.seats, starts[1].1.seats, "both know each other");
    let (attempt, workers) = lab.open(shard(run, 0));
    assert_eq!(workers, [one, two]);
    assert!(lab.finish(one, attempt, Role::Source));
    assert_eq!(lab.commits(), 0);
    assert!(lab.finish(two, attempt, Role::Target));
    assert_eq!(lab.commits(), 1);
}

#[test]
fn a_gang_asked_onto_one_box_shares_it_only_if_allowed() {
    let mut lab = Lab::new();
    let worker = lab.online();
    let run = lab.submit(vec![transfer(Spread::Devices), transfer(Spread::Workers), transfer(Spread::Any)]);
    assert_eq!(lab.shard_state(shard(run, 0)), ShardState::Waiting);
    assert_eq!(lab.shard_state(shard(run, 1)), ShardState::Waiting);
    assert_eq!(lab.open(shard(run, 2)).1, [worker, worker]);
}

#[test]
fn when_one_seat_of_a_gang_fails_the_other_is_cancelled() {
    let mut lab = Lab::new();
    let (one, two) = (lab.online(), lab.online());
    let run = lab.submit(vec![transfer(Spread::Workers)]);
    let (attempt, _) = lab.open(shard(run, 0));
    assert!(lab.fail(one, attempt, Role::Source, FailureKind::OutOfMemory));
    assert!(lab.cancelled(two, attempt));
    assert_eq!(lab.shard_state(shard(run, 0)), ShardState::Waiting);
    assert!(!lab.finish(two, attempt, Role::Target), "its work is fenced");
    lab.pass_ms(5_000);
    lab.beat(one);
    lab.beat(two);
    let (again, _) = lab.open(shard(run, 0));
    assert!(again.fence > attempt.fence);
}

#[test]
fn a_lost_seat_that_had_finished_does_not_fail_the_gang() {
    let mut lab = Lab::new();
    let (one, two) = (lab.online(), lab.online());
    let run = lab.submit(vec![transfer(Spread::Workers)]);
    let (attempt, _) = lab.open(shard(run, 0));
    lab.hold(two, attempt, Role::Target);
    assert!(lab.finish(one, attempt, Role::Source));
    lab.disconnect(one);
    for _ in 0..20 {
        lab.pass_ms(2_000);
        lab.beat(two);
    }
    assert!(lab.finish(two, attempt, Role::Target));
    assert_eq!(lab.state().runs[&run].state, RunState::Complete);
}

#[test]
fn a_failed_shard_goes_elsewhere_first() {
    let mut lab = Lab::new();
    let (one, two) = (lab.online(), lab.online());
    lab.boxes.get_mut(&one).unwrap().free = 9 * GB;
    lab.boxes.get_mut(&two).unwrap().budget = 3 * GB;
    lab.connect(two).unwrap();
    lab.beat(one);
    lab.beat(two);
    let run = lab.submit(vec![inspect(SMOL)]);
    let (attempt, workers) = lab.open(shard(run, 0));
    assert_eq!(workers, [one], "most free first");
    lab.fail(one, attempt, Role::Main, FailureKind::ExecutorLost);
    lab.pass_ms(1_000);
    assert_eq!(lab.open(shard(run, 0)).1, [two]);
}

#[test]
fn on_the_only_worker_it_is_tried_again_until_the_tries_are_used_up() {
    let mut lab = Lab::new();
    let worker = lab.online();
    let run = lab.submit(vec![inspect(SMOL)]);
    for _ in 0..ATTEMPTS_PER_SHARD_MAX {
        let (attempt, _) = lab.open(shard(run, 0));
        lab.fail(worker, attempt, Role::Main, FailureKind::ExecutorLost);
        lab.pass_ms(40_000);
        lab.beat(worker);
    }
    assert_eq!(lab.shard_state(shard(run, 0)), ShardState::Failed);
    assert_eq!(lab.state().runs[&run].state, RunState::Failed);
    assert!(lab.sentence(shard(run, 0)).starts_with("failed after 4 tries: executor lost: as the test wants"));
}

#[test]
fn what_fails_everywhere_is_not_tried_again() {
    let mut lab = Lab::new();
    let worker = lab.online();
    let run = lab.submit(vec![inspect(SMOL)]);
    let (attempt, _) = lab.open(shard(run, 0));
    lab.fail(worker, attempt, Role::Main, FailureKind::BadSpec);
    assert_eq!(lab.shard_state(shard(run, 0)), ShardState::Failed);
}

#[test]
fn a_model_that_turns_out_missing_is_not_looked_for_there_until_the_next_greeting() {
    let mut lab = Lab::new();
    let worker = lab.online();
    let run = lab.submit(vec![inspect(SMOL)]);
    let (attempt, _) = lab.open(shard(run, 0));
    lab.fail(worker, attempt, Role::Main, FailureKind::ModelMissing);
    lab.pass_ms(60_000);
    lab.beat(worker);
    assert_eq!(lab.shard_state(shard(run, 0)), ShardState::Waiting);
    assert!(lab.sentence(shard(run, 0)).starts_with("cannot run as things are"), "{}", lab.sentence(shard(run, 0)));
    lab.connect(worker).unwrap();
    lab.beat(worker);
    assert_eq!(lab.shard_state(shard(run, 0)), ShardState::Running);
}

#[test]
fn a_path_is_looked_for_box_by_box_and_no_box_without_it_counts_as_a_try() {
    let mut lab = Lab::new();
    let mut workers = Vec::new();
    for _ in 0..6 {
        let worker = lab.join();
        lab.boxes.get_mut(&worker).unwrap().budget = 8 * GB;
        lab.connect(worker).unwrap();
        lab.beat(worker);
        workers.push(worker);
    }
    let run = lab.submit(vec![inspect("/data/x.gguf")]);
    let has_it = workers[5];
    let mut asked = std::collections::BTreeSet::new();
    loop {
        let (attempt, seats) = lab.open(shard(run, 0));
        assert!(asked.insert(seats[0]), "{} was asked twice", seats[0]);
        if seats[0] == has_it {
            assert!(lab.finish(has_it, attempt, Role::Main));
            break;
        }
        lab.fail(seats[0], attempt, Role::Main, FailureKind::ModelMissing);
    }
    assert_eq!(asked.len(), 6, "it was on the last of them");
    assert_eq!(lab.shard_state(shard(run, 0)), ShardState::Committed);
    assert_eq!(lab.state().shard(shard(run, 0)).unwrap().tries, 0);

    // Where nobody has it, the shard waits and says what would help.
    let run = lab.submit(vec![inspect("/data/y.gguf")]);
    for _ in &workers {
        let (attempt, seats) = lab.open(shard(run, 0));
        lab.fail(seats[0], attempt, Role::Main, FailureKind::ModelMissing);
    }
    assert_eq!(lab.shard_state(shard(run, 0)), ShardState::Waiting);
    let sentence = lab.sentence(shard(run, 0));
    assert!(sentence.starts_with("cannot run as things are"), "{sentence}");
    assert!(sentence.contains("copy /data/y.gguf to one more worker and restart it"), "{sentence}");
}

#[test]
fn a_silent_workers_shard_goes_elsewhere_and_its_late_result_is_fenced() {
    let mut lab = Lab::new();
    let one = lab.online();
    let run = lab.submit(vec![inspect(SMOL)]);
    let (first, _) = lab.open(shard(run, 0));
    lab.hold(one, first, Role::Main);
    lab.beat(one);
    lab.disconnect(one);
    let two = lab.online();
    lab.pass_ms(LEASE_TTL_MS - 1);
    assert_eq!(lab.open(shard(run, 0)).0, first, "not a moment too early");
    lab.beat(two);
    lab.pass_ms(1);
    let (second, workers) = lab.open(shard(run, 0));
    assert_eq!(workers, [two]);

    lab.connect(one).unwrap();
    assert!(lab.cancelled(one, first), "the box is told to stop");
    assert!(!lab.finish(one, first, Role::Main));
    assert!(lab.finish(two, second, Role::Main));
    assert_eq!(lab.commits(), 1);
    assert_eq!(lab.state().shard(shard(run, 0)).unwrap().committed_attempt().unwrap().fence, second.fence);
}

#[test]
fn a_silent_worker_that_returns_before_its_shard_was_placed_again_keeps_it() {
    let mut lab = Lab::new();
    let worker = lab.online();
    let run = lab.submit(vec![inspect(SMOL), inspect(SMOL)]);
    let (attempt, _) = lab.open(shard(run, 0));
    lab.hold(worker, attempt, Role::Main);
    lab.beat(worker);
    lab.disconnect(worker);
    lab.pass_ms(LEASE_TTL_MS);
    assert_eq!(lab.shard_state(shard(run, 0)), ShardState::Waiting);
    lab.connect(worker).unwrap();
    assert_eq!(lab.open(shard(run, 0)).0, attempt, "the same attempt goes on");
    assert_eq!(lab.state().shard(shard(run, 0)).unwrap().tries, 0);
    assert!(lab.finish(worker, attempt, Role::Main));
    assert_eq!(lab.commits(), 1);
}

#[test]
fn a_result_finished_while_given_up_still_counts_if_nothing_was_placed_since() {
    let mut lab = Lab::new();
    let worker = lab.online();
    let run = lab.submit(vec![inspect(SMOL)]);
    let (attempt, _) = lab.open(shard(run, 0));
    lab.hold(worker, attempt, Role::Main);
    lab.pass_ms(LEASE_TTL_MS);
    assert_eq!(lab.shard_state(shard(run, 0)), ShardState::Waiting);
    assert!(lab.finish(worker, attempt, Role::Main));
    assert_eq!(lab.state().runs[&run].state, RunState::Complete);
}

#[test]
fn a_start_that_was_lost_with_the_session_is_sent_again() {
    let mut lab = Lab::new();
    let worker = lab.online();
    let run = lab.submit(vec![inspect(SMOL)]);
    let (attempt, _) = lab.open(shard(run, 0));
    lab.connect(worker).unwrap();
    assert_eq!(lab.starts().len(), 1, "the worker did not say that it holds it");
    lab.beat(worker);
    assert!(lab.starts().is_empty(), "it may be on its way");
    lab.pass_ms(4_000);
    lab.beat(worker);
    assert_eq!(lab.starts().len(), 1);
    lab.hold(worker, attempt, Role::Main);
    lab.pass_ms(4_000);
    lab.beat(worker);
    assert!(lab.starts().is_empty());
}

#[test]
fn a_restarted_worker_loses_what_ran_and_hands_in_what_it_finished() {
    let mut lab = Lab::new();
    let worker = lab.online();
    let run = lab.submit(vec![inspect(SMOL), inspect(GEMMA)]);
    let (first, _) = lab.open(shard(run, 0));
    lab.hold(worker, first, Role::Main);
    lab.beat(worker);

    // It finished, could not say so, and was killed: the result is in its outbox, the device is free.
    lab.restart(worker, vec![held(first, Role::Main)]);
    lab.connect(worker).unwrap();
    lab.beat(worker);
    let (second, _) = lab.open(shard(run, 1));
    assert!(lab.finish(worker, first, Role::Main));
    lab.drop_held(worker, first);

    // Killed in the middle of the second: it runs again.
    lab.restart(worker, Vec::new());
    lab.connect(worker).unwrap();
    assert_eq!(lab.shard_state(shard(run, 1)), ShardState::Waiting);
    lab.pass_ms(1_000);
    lab.beat(worker);
    let (third, _) = lab.open(shard(run, 1));
    assert!(third.fence > second.fence);
    assert!(!lab.finish(worker, second, Role::Main));
    assert!(lab.finish(worker, third, Role::Main));
    assert_eq!(lab.commits(), 2);
}

#[test]
fn after_a_restart_of_the_coordinator_running_attempts_are_adopted_again() {
    let mut lab = Lab::new();
    let (one, two) = (lab.online(), lab.online());
    let run = lab.submit(vec![transfer(Spread::Workers), inspect(SMOL)]);
    let (gang, _) = lab.open(shard(run, 0));
    lab.hold(one, gang, Role::Source);
    lab.hold(two, gang, Role::Target);
    assert!(lab.finish(one, gang, Role::Source));
    lab.drop_held(one, gang);
    lab.kill_coordinator();
    let before = serde_json::to_string(lab.state()).unwrap();

    lab.pass_ms(LEASE_TTL_MS - 1);
    lab.boxes.get_mut(&two).unwrap().session = 0;
    lab.connect(two).unwrap();
    assert!(lab.starts().is_empty(), "it runs there already");
    assert_eq!(serde_json::to_string(lab.state()).unwrap(), before, "adopting needs no event");
    lab.pass_ms(LEASE_TTL_MS - 1);
    assert!(lab.finish(two, gang, Role::Target));
    assert_eq!(lab.shard_state(shard(run, 0)), ShardState::Committed);
}

#[test]
fn an_attempt_that_nobody_claims_after_a_restart_is_given_up() {
    let mut lab = Lab::new();
    lab.online();
    let run = lab.submit(vec![inspect(SMOL)]);
    lab.kill_coordinator();
    assert_eq!(lab.scheduler.next_deadline(), Some(lab.now.plus_ms(LEASE_TTL_MS)));
    lab.pass_ms(LEASE_TTL_MS);
    assert_eq!(lab.shard_state(shard(run, 0)), ShardState::Waiting);
}

#[test]
fn a_message_of_an_older_session_changes_nothing() {
    let mut lab = Lab::new();
    let worker = lab.online();
    let run = lab.submit(vec![inspect(SMOL)]);
    let (attempt, _) = lab.open(shard(run, 0));
    lab.connect(worker).unwrap();
    lab.boxes.get_mut(&worker).unwrap().session = 1;
    let finished = super::lab::finished(attempt, Role::Main);
    lab.give(crate::scheduler::Input::SeatFinished { worker, session: 1, finished }).unwrap();
    assert!(lab.effects.is_empty());
    assert_eq!(lab.commits(), 0);
    assert!(lab.connect(worker).is_err(), "session 2 was there already");
}

#[test]
fn another_workers_seat_cannot_be_finished() {
    let mut lab = Lab::new();
    let one = lab.online();
    let run = lab.submit(vec![inspect(SMOL)]);
    let two = lab.online();
    let (attempt, workers) = lab.open(shard(run, 0));
    assert_eq!(workers, [one]);
    assert!(!lab.finish(two, attempt, Role::Main));
    assert!(!lab.fail(two, attempt, Role::Main, FailureKind::BadSpec));
    assert_eq!(lab.open(shard(run, 0)).0, attempt);
}

#[test]
fn two_workers_that_never_reach_each_other_do_not_go_round_for_ever() {
    let mut lab = Lab::new();
    let (one, two) = (lab.online(), lab.online());
    let run = lab.submit(vec![transfer(Spread::Workers)]);
    let mut rounds = 0;
    while lab.shard_state(shard(run, 0)) != ShardState::Failed {
        let (attempt, workers) = lab.open(shard(run, 0));
        lab.fail(workers[0], attempt, Role::Source, FailureKind::PeerLost);
        lab.pass_ms(40_000);
        lab.beat(one);
        lab.beat(two);
        rounds += 1;
        assert!(rounds < 100);
    }
    assert_eq!(rounds, super::super::FREE_RETRIES_MAX + 1);
}

#[test]
fn a_smaller_budget_than_what_is_reserved_ends_what_no_longer_fits() {
    let mut lab = Lab::new();
    let worker = lab.online();
    let run = lab.submit(vec![inspect(GEMMA)]);
    let (attempt, _) = lab.open(shard(run, 0));
    lab.hold(worker, attempt, Role::Main);
    lab.boxes.get_mut(&worker).unwrap().budget = GB;
    lab.connect(worker).unwrap();
    assert_eq!(lab.shard_state(shard(run, 0)), ShardState::Waiting);
    assert!(lab.said(worker).iter().any(|said| matches!(said, ToWorker::CancelSeat(_))));
}
