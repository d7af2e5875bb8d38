//! Scenarios of what people order and ask: tokens, priorities, draining, revoking, cancelling, explaining.

use protocol::control::FailureKind;
use protocol::experiment::Spread;
use protocol::ids::{Role, TokenId, WorkerId};
use protocol::memory::ModelShape;

use super::lab::{GB, GEMMA, Lab, SMOL, inspect, new_run, shard, transfer};
use crate::scheduler::{Answer, Effect, Input, Rejection, RunState, ShardState, Verdict, WorkerState};

#[test]
fn a_token_works_once_but_its_key_may_ask_again() {
    let mut lab = Lab::new();
    let made = lab.give(Input::CreateToken { secret_hash: [1; 32], ttl_ms: 1_000, uses: 1 });
    assert_eq!(made, Ok(Answer::Token(TokenId(1))));
    let redeem = |lab: &mut Lab, key: u8| {
        lab.give(Input::RedeemToken { token: TokenId(1), spki_sha256: [key; 32], hostname: "box".to_owned() })
    };
    assert_eq!(redeem(&mut lab, 1), Ok(Answer::Worker(WorkerId(1))));
    let events = lab.journal.len();
    assert_eq!(redeem(&mut lab, 1), Ok(Answer::Worker(WorkerId(1))), "the answer was lost on the way");
    assert_eq!(lab.journal.len(), events);
    assert_eq!(redeem(&mut lab, 2), Err(Rejection::TokenUsed(TokenId(1))));
    lab.pass_ms(1_000);
    assert_eq!(redeem(&mut lab, 1), Err(Rejection::TokenExpired(TokenId(1))));
    lab.give(Input::RevokeToken(TokenId(1))).unwrap();
    assert_eq!(redeem(&mut lab, 1), Err(Rejection::TokenRevoked(TokenId(1))));
}

#[test]
fn a_higher_priority_goes_first_then_the_older_run_then_the_lower_index() {
    let mut lab = Lab::new();
    let worker = lab.online();
    let low = lab.submit(vec![inspect(SMOL), inspect(SMOL), inspect(GEMMA)]);
    let Ok(Answer::Run(high)) = lab.give(Input::Submit(new_run(5, vec![inspect(SMOL)]))) else { panic!("refused") };
    let mut order = Vec::new();
    for _ in 0..4 {
        let (attempt, _, _) = lab.state().open_attempts().next().unwrap();
        order.push(attempt.shard);
        lab.finish(worker, attempt, Role::Main);
    }
    assert_eq!(order, [shard(low, 0), shard(high, 0), shard(low, 1), shard(low, 2)]);
}

#[test]
fn a_shard_that_does_not_fit_does_not_hold_back_those_behind_it() {
    let mut lab = Lab::new();
    let worker = lab.online();
    lab.boxes.get_mut(&worker).unwrap().free = GB + GB / 4;
    lab.beat(worker);
    let run = lab.submit(vec![inspect(GEMMA), inspect(SMOL)]);
    assert_eq!(lab.shard_state(shard(run, 0)), ShardState::Waiting);
    assert_eq!(lab.shard_state(shard(run, 1)), ShardState::Running);
}

#[test]
fn a_foreign_process_on_the_box_counts_as_used() {
    let mut lab = Lab::new();
    let worker = lab.online();
    lab.boxes.get_mut(&worker).unwrap().free = GB / 2;
    lab.beat(worker);
    let run = lab.submit(vec![inspect(SMOL)]);
    assert_eq!(
        lab.sentence(shard(run, 0)),
        "waits: needs 1.0 GB on a device with smollm2-135m-instruct; no device qualifies (w1/cpu: 500 MB free, 1.0 GB \
         needed); starts when memory gets free"
    );
}

#[test]
fn a_draining_worker_finishes_and_gets_nothing_new() {
    let mut lab = Lab::new();
    let worker = lab.online();
    let run = lab.submit(vec![inspect(SMOL), inspect(SMOL)]);
    let (attempt, _) = lab.open(shard(run, 0));
    lab.give(Input::SetDrain { worker, on: true }).unwrap();
    assert!(lab.finish(worker, attempt, Role::Main));
    assert_eq!(lab.shard_state(shard(run, 1)), ShardState::Waiting);
    assert!(lab.sentence(shard(run, 1)).ends_with("starts when a worker is undrained"));
    lab.give(Input::SetDrain { worker, on: false }).unwrap();
    assert_eq!(lab.shard_state(shard(run, 1)), ShardState::Running);
}

#[test]
fn a_revoked_worker_is_closed_and_its_work_placed_elsewhere() {
    let mut lab = Lab::new();
    let one = lab.online();
    let run = lab.submit(vec![inspect(SMOL)]);
    let (attempt, _) = lab.open(shard(run, 0));
    let two = lab.online();
    lab.give(Input::RevokeWorker(one)).unwrap();
    assert!(lab.effects.contains(&Effect::Close { worker: one, session: 1 }));
    lab.pass_ms(1_000);
    assert_eq!(lab.open(shard(run, 0)).1, [two]);
    assert_eq!(lab.connect(one), Err(Rejection::WorkerRevoked(one)));
    let session = lab.boxes[&one].session;
    let finished = super::lab::finished(attempt, Role::Main);
    lab.give(Input::SeatFinished { worker: one, session, finished }).unwrap();
    assert!(lab.effects.is_empty());
    let state = lab.scheduler.live().worker_state(lab.state(), one, lab.now);
    assert_eq!(state, WorkerState::Revoked);
}

#[test]
fn a_cancelled_run_keeps_what_had_committed() {
    let mut lab = Lab::new();
    let worker = lab.online();
    let run = lab.submit(vec![inspect(SMOL), inspect(SMOL), inspect(SMOL)]);
    let (first, _) = lab.open(shard(run, 0));
    lab.finish(worker, first, Role::Main);
    let (second, _) = lab.open(shard(run, 1));
    lab.give(Input::CancelRun { run, reason: "wrong seed".to_owned() }).unwrap();
    assert!(lab.cancelled(worker, second));
    let states: Vec<_> = lab.state().runs[&run].shards.iter().map(|shard| shard.state).collect();
    assert_eq!(states, [ShardState::Committed, ShardState::Cancelled, ShardState::Cancelled]);
    assert!(!lab.finish(worker, second, Role::Main));
    let again = lab.give(Input::CancelRun { run, reason: String::new() });
    assert_eq!(again, Err(Rejection::RunOver { run, state: RunState::Cancelled }));
    assert_eq!(lab.sentence(shard(run, 2)), "cancelled with its run: wrong seed");
}

#[test]
fn a_retry_reopens_only_what_failed() {
    let mut lab = Lab::new();
    let worker = lab.online();
    let run = lab.submit(vec![inspect(SMOL), inspect(SMOL)]);
    let (first, _) = lab.open(shard(run, 0));
    lab.finish(worker, first, Role::Main);
    let (second, _) = lab.open(shard(run, 1));
    lab.fail(worker, second, Role::Main, FailureKind::Unsupported);
    assert_eq!(lab.state().runs[&run].state, RunState::Failed);
    assert_eq!(lab.give(Input::RetryRun(run)), Ok(Answer::Reopened(1)));
    let (third, _) = lab.open(shard(run, 1));
    lab.finish(worker, third, Role::Main);
    assert_eq!(lab.state().runs[&run].state, RunState::Complete);
    assert_eq!(lab.give(Input::RetryRun(run)), Err(Rejection::NothingFailed(run)));
}

#[test]
fn explain_tells_what_would_have_to_change() {
    let mut lab = Lab::new();
    let run = lab.submit(vec![transfer(Spread::Workers)]);
    assert!(lab.sentence(shard(run, 0)).contains("no worker has connected yet"));
    lab.online();
    let two = lab.join();
    lab.boxes.get_mut(&two).unwrap().models = vec![GEMMA.to_owned()];
    lab.connect(two).unwrap();
    lab.beat(two);
    assert_eq!(
        lab.sentence(shard(run, 0)),
        "cannot run as things are: needs 1.0 GB each on 2 workers at once with smollm2-135m-instruct; only w1/cpu \
         qualifies (w2/cpu: its worker lacks the model smollm2-135m-instruct); it can if you bring \
         smollm2-135m-instruct to one more worker (`bonepile-worker models pull smollm2-135m-instruct`, then restart it) \
         or join another worker or submit with spread = \"devices\""
    );
    let explained = lab.scheduler.explain(shard(run, 0)).unwrap();
    let verdicts: Vec<_> = explained.devices.iter().map(|rated| rated.reason.verdict()).collect();
    assert_eq!(verdicts, [Verdict::Fits, Verdict::Never]);
}

#[test]
fn sizes_that_no_model_has_are_not_kept() {
    let mut lab = Lab::new();
    let worker = lab.join();
    let shape = ModelShape::new([2, 32, 4, 2, 8, 64], 400, true, 4096);
    let body = lab.boxes.get_mut(&worker).unwrap();
    body.models.push("own.gguf".to_owned());
    body.shapes = vec![
        ("own.gguf".to_owned(), shape.clone()),
        ("own.gguf".to_owned(), shape.clone()),
        ("not-reported.gguf".to_owned(), shape.clone()),
        (GEMMA.to_owned(), ModelShape { layers: u32::MAX, ..shape.clone() }),
    ];
    lab.connect(worker).unwrap();
    let report = lab.state().workers[&worker].report.as_ref().unwrap();
    assert_eq!(report.shapes, [("own.gguf".to_owned(), shape)]);
}

#[test]
fn explain_of_a_running_shard_says_where_and_why() {
    let mut lab = Lab::new();
    let (one, _) = (lab.online(), lab.online());
    let run = lab.submit(vec![transfer(Spread::Workers), inspect(SMOL)]);
    assert_eq!(lab.sentence(shard(run, 0)), "runs as r1.0#f1: source on w1/cpu, target on w2/cpu");
    let devices = lab.scheduler.explain(shard(run, 0)).unwrap().devices;
    let reason = devices[0].reason.to_string();
    assert!(reason.starts_with("chosen, had 4.0 GB free, ") && reason.ends_with(" expected (catalogue)"), "{reason}");
    assert!(lab.sentence(shard(run, 1)).contains("w1/cpu: busy with r1.0#f1"));
    lab.disconnect(one);
    assert!(lab.sentence(shard(run, 0)).ends_with("w1 not connected, its lease still runs"));
}
