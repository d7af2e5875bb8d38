//! Generated histories: connects, crashes, losses, duplicates, late messages, jumps of time, orders, restarts at any point.
//!
//! The invariants of one state are asserted inside every `handle`; here are those of histories, and liveness.

use proptest::prelude::*;

use super::lab::recovered;
use super::world::{World, run_again};
use crate::scheduler::State;

/// Rounds of two seconds within which a healed cluster must be done with everything: 4 tries of the few shards of a
/// history, each after at most 32 s of pause, one after the other on two workers.
const HEAL_ROUNDS: usize = 2_000;

fn bytes(state: &State) -> String {
    serde_json::to_string(state).expect("a state is plain data")
}

fn history() -> impl Strategy<Value = Vec<(u8, u8)>> {
    prop::collection::vec((any::<u8>(), any::<u8>()), 0..400)
}

fn played(steps: &[(u8, u8)]) -> World {
    let mut world = World::new();
    for (kind, pick) in steps {
        world.step(*kind, *pick);
    }
    world
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Invariant 5: a replay gives the live state, byte for byte, wherever the coordinator is killed.
    #[test]
    fn replay_equals_live(steps in history()) {
        let mut world = World::new();
        for (number, (kind, pick)) in steps.iter().enumerate() {
            world.step(*kind, *pick);
            if number % 16 == 0 {
                let replayed = recovered(&world.journal, world.now);
                prop_assert_eq!(bytes(replayed.state()), bytes(world.scheduler.state()));
            }
        }
        let replayed = recovered(&world.journal, world.now);
        prop_assert_eq!(bytes(replayed.state()), bytes(world.scheduler.state()));
    }

    /// Invariant 9: the same inputs give the same events.
    #[test]
    fn the_same_inputs_give_the_same_events(steps in history()) {
        let world = played(&steps);
        prop_assert_eq!(run_again(&world.script), world.journal);
    }

    /// Invariant 1 and liveness: once faults stop, every shard ends, and what had committed stays.
    #[test]
    fn when_faults_stop_every_shard_ends(steps in history()) {
        let mut world = played(&steps);
        let committed = world.committed();
        prop_assert!(world.heal(HEAL_ROUNDS), "shards are left: {}", bytes(world.scheduler.state()));
        prop_assert!(world.committed() >= committed);
        let replayed = recovered(&world.journal, world.now);
        prop_assert_eq!(bytes(replayed.state()), bytes(world.scheduler.state()));
    }

    /// A record left out, doubled or out of order is refused by name, never applied.
    #[test]
    fn a_journal_with_a_gap_is_refused(steps in history(), at in any::<prop::sample::Index>()) {
        let journal = played(&steps).journal;
        let missing = at.index(journal.len() - 1);
        let mut state = State::default();
        for record in &journal[..missing] {
            state.apply(record).unwrap();
        }
        let before = bytes(&state);
        let error = state.apply(&journal[missing + 1]).unwrap_err();
        prop_assert_eq!(error.seq, journal[missing + 1].seq);
        prop_assert_eq!(bytes(&state), before);
    }
}

/// The generator reaches what it is for: over fixed histories, shards commit, fail, lapse and resume.
#[test]
fn histories_reach_the_corners() {
    let mut kinds = std::collections::BTreeMap::<&str, usize>::new();
    let mut number = 1u32;
    for _ in 0..120 {
        let steps: Vec<_> = (0..300)
            .map(|_| {
                number = number.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let [_, _, kind, pick] = number.to_le_bytes();
                (kind, pick)
            })
            .collect();
        for record in played(&steps).journal {
            *kinds.entry(record.event.kind()).or_default() += 1;
        }
    }
    for kind in [
        "ShardCommitted",
        "RoundOpened",
        "TrainingEnded",
        "SeatFreed",
        "AttemptFailed",
        "AttemptResumed",
        "ShardRequeued",
        "ShardFailed",
        "ShardReopened",
        "RunFinished",
        "RunCancelled",
        "ModelFoundMissing",
        "WorkerRevoked",
        "DrainStarted",
    ] {
        assert!(kinds.get(kind).is_some_and(|count| *count >= 5), "{kind} is hardly ever reached: {kinds:?}");
    }
}
