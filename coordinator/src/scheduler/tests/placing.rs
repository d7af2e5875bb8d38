//! Where shards go and why, on small heaps: speed, memory, sharing, order, limits, failures. Five lines each.

use protocol::control::{FailureKind, Terms};
use protocol::experiment::Spread;
use protocol::group::{Dtype, Require};
use protocol::hardware::ComputeCapability;

use super::heap::{Heap, card, groups, job, run};
use super::lab::{SMOL, inspect, transfer};
use crate::scheduler::{Input, NewRun, RunState, Settings, ShardState};

const OLD: &str = "old";
const NEW: &str = "new";

/// An old card and a new one, ten times faster by its benchmark.
fn two_cards() -> Heap {
    Heap::new().with(&[card(OLD, 6, 1_000_000)]).with(&[card(NEW, 24, 10_000_000)])
}

#[test]
fn a_shard_goes_where_it_ends_first() {
    let mut heap = two_cards();
    let r = heap.submit(run(vec![job("a", 10, 1)]));
    assert_eq!(heap.on(r, 0), NEW);
}

#[test]
fn it_waits_for_a_fast_card_rather_than_start_on_a_slow_one() {
    let mut heap = two_cards();
    let r = heap.submit(run(vec![job("a", 10, 20), job("a", 10, 4)]));
    assert_eq!((heap.on(r, 0).as_str(), heap.on(r, 1).as_str()), (NEW, ""));
    assert!(
        heap.sentence(r, 1).contains("waits for w2/GPU-new, where it is expected to end earlier"),
        "{}",
        heap.sentence(r, 1)
    );
}

#[test]
fn one_class_may_be_fast_where_another_is_slow() {
    let mut heap = two_cards();
    heap.teach("a", OLD, 5);
    heap.teach("a", NEW, 1);
    heap.teach("b", OLD, 5);
    heap.teach("b", NEW, 10);
    let r = heap.submit(run(vec![job("a", 10, 1), job("b", 10, 1)]));
    assert_eq!((heap.on(r, 0).as_str(), heap.on(r, 1).as_str()), (NEW, OLD));
}

#[test]
fn finished_shards_teach_the_table() {
    let mut heap = two_cards();
    let r = heap.submit(run(vec![job("a", 10, 1), job("a", 10, 1)]));
    let (attempt, _) = heap.place(r, 0).unwrap();
    heap.pass_s(10);
    // The benchmark promised a second; it took a hundred.
    heap.finish(attempt, 100_000);
    let cell = heap.scheduler.state().table.cell("command/a", NEW).unwrap();
    assert_eq!(cell.samples, 1);
    assert!(cell.mean.value().abs_diff(10_000_000) < 50_000);
}

#[test]
fn memory_decides_before_speed_and_foreign_processes_count() {
    let mut heap = two_cards();
    heap.foreign(2, 20_000_000_000);
    let r = heap.submit(run(vec![job("a", 10, 5), job("a", 10, 8)]));
    assert_eq!((heap.on(r, 0).as_str(), heap.on(r, 1).as_str()), (OLD, ""));
    assert!(heap.sentence(r, 1).contains("4.0 GB free, 8.0 GB needed"), "{}", heap.sentence(r, 1));
    heap.foreign(2, 0);
    assert_eq!(heap.on(r, 1), NEW);
}

#[test]
fn several_shards_share_a_card_that_has_time_and_room() {
    let mut heap = Heap::new().with(&[card(NEW, 24, 10_000_000)]);
    let r = heap.submit(run(vec![job("a", 100, 10), job("a", 100, 10), job("a", 100, 10)]));
    assert_eq!(heap.running(r), 1);
    heap.pass_s(12);
    assert_eq!(heap.running(r), 2, "the third has no room");
}

#[test]
fn short_shards_are_sent_ahead_into_one_lane() {
    let mut heap = Heap::new().with(&[card(NEW, 6, 10_000_000)]);
    heap.teach("a", NEW, 0);
    let r = heap.submit(run((0..10).map(|_| job("a", 1, 5)).collect()));
    assert_eq!(heap.running(r), 10);
    let lanes: Vec<u32> = heap.told.values().flatten().map(|start| start.lane).collect();
    assert_eq!(lanes, [0; 10], "they hold the memory of one");
}

#[test]
fn out_of_memory_is_learned_and_the_next_try_goes_to_a_larger_card() {
    let mut heap = Heap::new().with(&[card(OLD, 6, 10_000_000)]).with(&[card(NEW, 24, 1_000_000)]);
    let r = heap.submit(run(vec![job("a", 10, 5)]));
    assert_eq!(heap.on(r, 0), OLD);
    heap.fail_shard(r, 0, FailureKind::OutOfMemory);
    assert_eq!(heap.on(r, 0), NEW);
    let again = heap.submit(run(vec![job("a", 10, 5)]));
    assert_ne!(heap.on(again, 0), OLD, "nobody tries that again");
}

#[test]
fn a_missing_kernel_keeps_the_class_off_that_card() {
    let mut heap = Heap::new().with(&[card(OLD, 6, 10_000_000)]).with(&[card(NEW, 6, 1_000_000)]);
    let r = heap.submit(run(vec![job("a", 10, 1)]));
    heap.fail_shard(r, 0, FailureKind::NoKernel);
    assert_eq!(heap.on(r, 0), NEW);
    let (attempt, _) = heap.place(r, 0).unwrap();
    heap.finish(attempt, 10);
    let next = heap.submit(run(vec![job("a", 10, 1), job("b", 10, 1)]));
    assert_eq!(heap.on(next, 0), NEW);
    assert_eq!(heap.on(next, 1), OLD, "another class may have one");
}

#[test]
fn a_device_on_which_everything_fails_is_quarantined_and_can_be_released() {
    let mut heap = Heap::new().with(&[card(OLD, 6, 10_000_000)]);
    let r = heap.submit(run((0..3).map(|_| job("a", 10, 6)).collect()));
    for index in 0..3 {
        let (attempt, _) = heap.place(r, index).expect("the next one");
        heap.fail(attempt, FailureKind::ExecutorLost);
    }
    heap.pass_s(4);
    assert_eq!(heap.running(r), 0);
    assert!(heap.sentence(r, 0).contains("in quarantine"), "{}", heap.sentence(r, 0));
    let device = heap.scheduler.live().board.rows().next().unwrap().1.device.clone();
    heap.give(Input::ReleaseDevice(device.clone())).unwrap();
    heap.pass_s(40);
    assert_eq!(heap.running(r), 1);
    assert!(heap.give(Input::ReleaseDevice(device)).is_err());
}

#[test]
fn a_sick_device_is_quarantined_at_once() {
    let mut heap = two_cards();
    let r = heap.submit(run(vec![job("a", 10, 1)]));
    heap.fail_shard(r, 0, FailureKind::DeviceSick);
    assert!(heap.happened("DeviceQuarantined"));
    assert_eq!(heap.on(r, 0), OLD);
}

#[test]
fn a_spot_notice_costs_no_try() {
    let mut heap = two_cards();
    let r = heap.submit(run(vec![job("a", 10, 1)]));
    for _ in 0..8 {
        heap.fail_shard(r, 0, FailureKind::Preempted);
    }
    assert_eq!(heap.state(r, 0), ShardState::Running);
}

#[test]
fn a_program_that_says_no_is_tried_as_often_as_its_sweep_says() {
    let mut heap = two_cards();
    let r = heap.submit(run(vec![job("a", 10, 1)]));
    for _ in 0..3 {
        heap.fail_shard(r, 0, FailureKind::CommandFailed);
        assert_eq!(heap.state(r, 0), ShardState::Running);
    }
    heap.fail_shard(r, 0, FailureKind::CommandFailed);
    assert_eq!(heap.state(r, 0), ShardState::Failed);
}

#[test]
fn programs_run_only_where_the_operator_allows_them() {
    let mut heap = Heap::new().with_terms(&[card(OLD, 6, 1_000_000)], Terms::default());
    let r = heap.submit(run(vec![job("a", 10, 1)]));
    assert!(heap.sentence(r, 0).starts_with("cannot run as things are"), "{}", heap.sentence(r, 0));
    assert!(heap.sentence(r, 0).contains("--allow-commands"));
    let mut heap = heap.with(&[card(NEW, 6, 1_000_000)]);
    heap.pass_s(2);
    assert_eq!(heap.on(r, 0), NEW);
}

#[test]
fn labels_capability_dtype_and_price_are_constraints() {
    let terms = Terms { commands: true, labels: vec!["site=attic".into()], price_microusd_per_hour: 500_000, ahead: 0 };
    let mut heap = Heap::new().with(&[card(OLD, 6, 9_000_000)]).with_terms(&[card(NEW, 6, 1_000_000)], terms);
    let wants = |require: Require| NewRun {
        groups: vec![protocol::group::Group { count: 1, require, ..Default::default() }],
        ..run(vec![job("a", 10, 1)])
    };
    let r = heap.submit(wants(Require { labels: vec!["site=attic".into()], ..Require::default() }));
    assert_eq!(heap.on(r, 0), NEW);
    let r = heap
        .submit(wants(Require { capability: Some(ComputeCapability { major: 7, minor: 0 }), ..Require::default() }));
    assert!(heap.sentence(r, 0).contains("its compute capability is below 7.0"));
    let r = heap.submit(wants(Require { dtype: Some(Dtype::Bf16), ..Require::default() }));
    assert!(heap.sentence(r, 0).contains("bf16"));
    let r = heap.submit(wants(Require {
        model: Some("new".into()),
        price_max_microusd_per_hour: Some(400_000),
        ..Require::default()
    }));
    assert!(
        heap.sentence(r, 0).contains("an hour of it costs $0.50, the experiment pays $0.40"),
        "{}",
        heap.sentence(r, 0)
    );
}

#[test]
fn priority_goes_first() {
    let mut heap = Heap::new().with(&[card(OLD, 6, 1_000_000)]);
    let first = heap.submit(run(vec![job("a", 10, 6), job("a", 10, 6)]));
    let urgent = heap.submit(NewRun { priority: 5, ..run(vec![job("a", 10, 6)]) });
    let (attempt, _) = heap.place(first, 0).unwrap();
    heap.finish(attempt, 10_000);
    assert_eq!((heap.on(urgent, 0).as_str(), heap.on(first, 1).as_str()), (OLD, ""));
}

/// Reference seconds that an account has got after a while on one card.
fn shares(heap: &mut Heap, rounds: usize) -> (usize, usize) {
    let many = |account: &str| NewRun { account: account.into(), ..run((0..40).map(|_| job("a", 10, 6)).collect()) };
    let (alice, bob) = (heap.submit(many("alice")), heap.submit(many("bob")));
    let mut got = (0, 0);
    for _ in 0..rounds {
        let (attempt, _, _) = heap.scheduler.state().open_attempts().next().unwrap();
        if attempt.shard.run == alice {
            got.0 += 1;
        } else {
            got.1 += 1;
        }
        heap.finish(attempt, 10_000);
    }
    assert!(heap.running(alice) + heap.running(bob) == 1);
    got
}

#[test]
fn accounts_share_evenly_and_by_weight() {
    let one = || Heap::new().with(&[card(OLD, 6, 1_000_000)]);
    let (alice, bob) = shares(&mut one(), 20);
    assert!(alice.abs_diff(bob) <= 2, "{alice} to {bob}");
    let weights = [("alice".to_owned(), 3)].into();
    let mut weighted = one().settings(Settings { weights, ..Settings::default() });
    let (alice, bob) = shares(&mut weighted, 20);
    assert!((14..=16).contains(&alice), "{alice} to {bob}");
}

#[test]
fn an_account_that_comes_late_does_not_get_all_that_others_took() {
    let mut heap = Heap::new().with(&[card(OLD, 6, 1_000_000)]);
    let many = |account: &str| NewRun { account: account.into(), ..run((0..40).map(|_| job("a", 10, 6)).collect()) };
    let alice = heap.submit(many("alice"));
    for _ in 0..20 {
        let (attempt, _, _) = heap.scheduler.state().open_attempts().next().unwrap();
        heap.finish(attempt, 10_000);
    }
    let bob = heap.submit(many("bob"));
    for _ in 0..10 {
        let (attempt, _, _) = heap.scheduler.state().open_attempts().next().unwrap();
        heap.finish(attempt, 10_000);
    }
    let committed = |r| heap.scheduler.state().runs[&r].count(ShardState::Committed);
    assert!(committed(alice) >= 24, "{} and {}", committed(alice), committed(bob));
}

#[test]
fn a_run_never_has_more_running_than_it_may() {
    let mut heap = two_cards().with(&[card("third", 6, 1_000_000)]);
    let r = heap.submit(NewRun { running_max: 2, ..run((0..5).map(|_| job("a", 100, 5)).collect()) });
    assert!(heap.running(r) <= 2);
    heap.pass_s(20);
    assert_eq!(heap.running(r), 2);
    let waiting = (0..5).find(|index| heap.on(r, *index).is_empty()).unwrap();
    assert!(heap.sentence(r, waiting).contains("running_max"));
}

#[test]
fn an_experiment_waits_for_the_one_before() {
    let mut heap = two_cards();
    let chain = groups(&[("collect", 1, &[]), ("train", 1, &[0])]);
    let r = heap.submit(NewRun { groups: chain, ..run(vec![job("a", 10, 1), job("b", 10, 1)]) });
    assert_eq!(heap.on(r, 1), "");
    assert_eq!(heap.sentence(r, 1), "waits for experiment `collect`, of which 1 shards have not committed");
    let (attempt, _) = heap.place(r, 0).unwrap();
    heap.finish(attempt, 1_000);
    assert_ne!(heap.on(r, 1), "");
}

#[test]
fn what_waits_for_a_failed_experiment_fails_with_it_and_is_retried_with_it() {
    let mut heap = two_cards();
    let chain = groups(&[("collect", 1, &[]), ("train", 1, &[0]), ("look", 1, &[1])]);
    let r = heap.submit(NewRun { groups: chain, ..run(vec![job("a", 10, 1), job("b", 10, 1), job("c", 10, 1)]) });
    heap.fail_shard(r, 0, FailureKind::BadSpec);
    assert_eq!(heap.scheduler.state().runs[&r].state, RunState::Failed);
    assert!(heap.sentence(r, 2).contains("an experiment that it waits for has failed"));
    heap.give(Input::RetryRun(r)).unwrap();
    assert_ne!(heap.on(r, 0), "");
    assert_eq!(heap.state(r, 1), ShardState::Waiting);
}

#[test]
fn a_gang_gets_both_seats_on_one_card_if_they_fit_else_on_two() {
    let mut heap = Heap::new().with(&[card(OLD, 24, 1_000_000)]).with(&[card(NEW, 24, 1_000_000)]);
    let r = heap.submit(run(vec![transfer(Spread::Any)]));
    let seats = |heap: &Heap| heap.scheduler.state().open_attempts().next().unwrap().2.seats.clone();
    assert_eq!(seats(&heap)[0].device, seats(&heap)[1].device);
    assert_ne!(heap.on(r, 0), "");
    let small = 2;
    let mut heap = Heap::new().with(&[card(OLD, small, 1_000_000)]).with(&[card(NEW, small, 1_000_000)]);
    heap.submit(run(vec![transfer(Spread::Any)]));
    assert_ne!(seats(&heap)[0].device, seats(&heap)[1].device);
}

#[test]
fn single_seats_do_not_starve_a_gang() {
    let mut heap = Heap::new().with(&[card(OLD, 6, 1_000_000)]).with(&[card(NEW, 6, 1_000_000)]);
    let r = heap.submit(run((0..6).map(|_| job("a", 1000, 6)).collect()));
    let gang = heap.submit(run(vec![transfer(Spread::Workers)]));
    for _ in 0..2 {
        let (attempt, _, _) = heap.scheduler.state().open_attempts().find(|(id, _, _)| id.shard.run == r).unwrap();
        heap.finish(attempt, 1_000_000);
    }
    assert_ne!(heap.on(gang, 0), "", "{}", heap.sentence(gang, 0));
}

#[test]
fn a_straggler_at_the_tail_is_tried_again_elsewhere_and_the_first_to_finish_counts() {
    let mut heap = Heap::new().with(&[card(OLD, 6, 9_000_000)]).with(&[card(NEW, 6, 9_000_000)]);
    for model in [OLD, NEW] {
        let row = (format!("inspect/{SMOL}"), model.to_owned(), 5_000_000, 9);
        heap.give(Input::TeachThroughput(vec![row])).unwrap();
    }
    let r = heap.submit(run(vec![inspect(SMOL)]));
    let (first, model) = heap.place(r, 0).unwrap();
    heap.pass_s(60);
    let attempts = heap.scheduler.state().runs[&r].shards[0].attempts.clone();
    assert_eq!(attempts.len(), 2, "{}", heap.sentence(r, 0));
    assert_ne!(attempts[1].seats[0].device_model, model);
    let second = protocol::ids::AttemptId { shard: first.shard, fence: attempts[1].fence };
    heap.finish(second, 20_000);
    assert_eq!(heap.state(r, 0), ShardState::Committed);
    assert_eq!(heap.cancelled, [first]);
    let worker = heap.scheduler.state().attempt(first).unwrap().seats[0].device.worker;
    heap.finish(first, 90_000);
    let _ = worker;
    assert_eq!(heap.scheduler.state().runs[&r].state, RunState::Complete);
}

#[test]
fn if_the_second_attempt_fails_the_first_goes_on() {
    let mut heap = Heap::new().with(&[card(OLD, 6, 9_000_000)]).with(&[card(NEW, 6, 9_000_000)]);
    for model in [OLD, NEW] {
        let row = (format!("inspect/{SMOL}"), model.to_owned(), 5_000_000, 9);
        heap.give(Input::TeachThroughput(vec![row])).unwrap();
    }
    let r = heap.submit(run(vec![inspect(SMOL)]));
    let (first, _) = heap.place(r, 0).unwrap();
    heap.pass_s(60);
    let fence = heap.scheduler.state().runs[&r].shards[0].attempts[1].fence;
    heap.fail(protocol::ids::AttemptId { shard: first.shard, fence }, FailureKind::ExecutorLost);
    assert_eq!(heap.state(r, 0), ShardState::Running);
    heap.finish(first, 90_000);
    assert_eq!(heap.state(r, 0), ShardState::Committed);
}

#[test]
fn brief_work_that_waited_for_its_first_worker_starts_with_it() {
    let mut heap = Heap::new();
    heap.teach("a", NEW, 0);
    let r = heap.submit(run((0..600).map(|_| job("a", 1, 1)).collect()));
    heap.give(Input::Tick).unwrap();
    let mut heap = heap.with(&[card(NEW, 6, 1_000_000)]);
    heap.pass_s(2);
    assert!(heap.running(r) > 0, "{}", heap.sentence(r, 0));
}

#[test]
fn many_shards_are_taken_up_by_a_worker_that_comes_back() {
    let mut heap = Heap::new().with(&[card(NEW, 6, 1_000_000)]);
    let worker = protocol::ids::WorkerId(1);
    heap.give(Input::Disconnected { worker, session: 1 }).unwrap();
    heap.now = heap.now.plus_ms(60_000);
    let r = heap.submit(run((0..600).map(|_| job("a", 30, 1)).collect()));
    assert_eq!(heap.running(r), 0);
    heap.greet_again(worker);
    assert!(heap.running(r) > 0, "{}", heap.sentence(r, 0));
}

#[test]
fn a_gang_that_is_split_goes_over_the_faster_link() {
    let small = |model: &str| card(model, 2, 1_000_000);
    let mut heap = Heap::new().with(&[small("a")]).with(&[small("b")]).with(&[small("c")]);
    let class = transfer(Spread::Workers).work_class();
    let first = heap.submit(run(vec![transfer(Spread::Workers)]));
    let (attempt, _) = heap.place(first, 0).unwrap();
    // A gigabyte a fact, and the link that was tried carries ten megabytes a second.
    heap.finish_sending(attempt, 4_000_000_000, 10_000_000);
    assert_eq!(heap.scheduler.state().packets[&class], 1_000_000_000);
    let link = ("link/w1".to_owned(), "w3".to_owned(), 8_000, 1);
    heap.give(Input::TeachThroughput(vec![link])).unwrap();
    let second = heap.submit(run(vec![transfer(Spread::Workers)]));
    let workers = |heap: &Heap, r| -> Vec<u64> {
        let id = protocol::ids::ShardId { run: r, index: 0 };
        let shard = heap.scheduler.state().shard(id).unwrap();
        shard.attempts[0].seats.iter().map(|seat| seat.device.worker.0).collect()
    };
    assert_eq!((workers(&heap, first), workers(&heap, second)), (vec![1, 2], vec![1, 3]));
}
