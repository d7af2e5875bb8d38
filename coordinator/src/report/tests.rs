//! The page and its figures from results that look like real ones.

use protocol::experiment::projector::{Projected, Tier};
use protocol::experiment::{Condition, ShardSpec};
use protocol::ids::{RunId, ShardId};
use protocol::results::ShardResult;

use super::fixture::{cluster, detail, projectors, results, transfer};
use super::summary::Summary;
use super::*;
use crate::api::{RunResults, ShardResults};

fn page(results: &RunResults) -> String {
    render(&ReportInput { results, run: &detail(results), cluster: &cluster() }).unwrap()
}

#[test]
fn conditions_are_counted_over_the_items_of_all_shards() {
    let summary = Summary::of(&results());
    let [transfer] = summary.transfers.as_slice() else { panic!("one group: the shards ask the same") };
    assert_eq!((transfer.facts, transfer.shards, transfer.across_workers, transfer.packets), (16, 2, 2, 16));
    let row = |condition| transfer.row(condition).unwrap();
    assert_eq!((row(Condition::Text).exact.hits, row(Condition::Injected).exact.hits), (16, 16));
    assert_eq!(row(Condition::NoContext).choice.hits, 2);
    assert_eq!(row(Condition::Naive).stalled, 8);
    assert_eq!(row(Condition::OtherSubject).packet_choice.unwrap().hits, 16);
    assert!(row(Condition::Injected).packet_choice.is_none());
    assert_eq!(transfer.injected_equals_text(), Some(true));
    assert_eq!(summary.profiles()["gemma-3-270m"].len(), 18, "full and sliding layers complete each other");
    let order: Vec<_> = transfer.conditions.iter().map(|row| row.condition.as_str()).collect();
    assert_eq!(order[..3], ["text", "no-context", "injected"]);
}

#[test]
fn the_same_fact_under_the_same_condition_counts_once() {
    let mut results = results();
    let id = ShardId { run: RunId(7), index: 5 };
    results.shards.push(transfer(id, 0, 16));
    let summary = Summary::of(&results);
    assert_eq!(summary.transfers[0].conditions[0].exact.items, 16);
}

#[test]
fn a_cache_that_does_not_compute_what_the_text_computes_is_called_out() {
    let mut results = results();
    let Some(ShardResult::Transfer(target)) = &mut results.shards[3].seats[1].result else { panic!() };
    let injected = target.items.iter_mut().find(|item| item.condition == Condition::Injected).unwrap();
    injected.logit_max_abs = 0.5;
    assert_eq!(Summary::of(&results).transfers[0].injected_equals_text(), Some(false));
    let page = page(&results);
    assert!(page.contains("does not compute what the text computes") && !page.contains("Caches travel whole"));
}

#[test]
fn the_page_stands_alone_and_keeps_hostile_texts_as_texts() {
    let page = page(&results());
    assert!(!page.contains("<script") && !page.contains('\u{1b}'));
    assert!(page.contains("&lt;script&gt;"));
    assert!(!page.contains("</pre>\n\""), "the sweep ends where the page says");
    for outside in ["src=", "http:", "@import", "url("] {
        let own = page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "");
        assert!(!own.contains(outside), "{outside}");
    }
    assert_eq!(page.matches("<svg").count(), 6, "two for each profile, two for the transfer");
    assert!(page.contains("currentColor") && !page.contains("#010203"));
    assert!(page.contains("The injected cache computes what the text computes."));
    assert!(page.contains("Layers 5, 11, 17 have full attention"));
    // For eyes: BONEPILE_REPORT_TO=page.html cargo test -p coordinator report
    if let Some(path) = std::env::var_os("BONEPILE_REPORT_TO") {
        std::fs::write(path, page).unwrap();
    }
}

#[test]
fn a_run_of_one_kind_or_of_nothing_has_a_page_too() {
    let all = results();
    let with = |keep: fn(&ShardResults) -> bool| {
        let shards = all.shards.iter().filter(|shard| keep(shard)).cloned().collect();
        page(&RunResults { shards, ..all.clone() })
    };
    let inspections = with(|shard| matches!(shard.spec, ShardSpec::Inspect(_)));
    assert!(inspections.contains("Cache inspection") && !inspections.contains("Cache transfer"));
    let transfers = with(|shard| matches!(shard.spec, ShardSpec::Transfer(_)));
    assert!(!transfers.contains("Cache inspection") && transfers.contains("Cache transfer"));
    let nothing = with(|_| false);
    assert_eq!(nothing.matches("<svg").count(), 0);
}

#[test]
fn an_unreadable_result_is_named() {
    let mut results = results();
    let seat = &mut results.shards[0].seats[0];
    seat.result = None;
    seat.unreadable = Some("blob is corrupt".to_owned());
    assert!(page(&results).contains("A result could not be read: r7.0 main: blob is corrupt"));
}

#[test]
fn trainings_are_taken_together_over_rounds_and_replicas() {
    let summary = Summary::of(&projectors());
    let [ridge, fuser] = summary.trainings.as_slice() else { panic!("two trainings") };
    assert_eq!((ridge.method.as_str(), ridge.counted, ridge.samples), ("ridge", 64, 64));
    assert_eq!(ridge.ridge.as_ref().unwrap().layers.len(), 18);
    assert_eq!((fuser.method.as_str(), fuser.counted, fuser.rounds.len()), ("fuser of width 64", 96, 2));
    let samples: Vec<u64> = fuser.steps().iter().map(|row| row.sample).collect();
    assert!(samples.len() == 24 && samples.is_sorted());
    assert_eq!(
        fuser.validations().iter().map(|(at, row)| (*at, row.matched)).collect::<Vec<_>>(),
        [(0, 3.0), (48, 2.0)]
    );
    // 18 of values, and of keys those of layers 0 to 9.
    assert_eq!(fuser.gates_open(), (28, 36));
    // Four deltas up and four times the weights down, against 8 bytes a number in each of 24 steps.
    assert_eq!(fuser.bytes_sent(), (4 * 1_015_625 + 16_000_000, 8 * 24 * 1_000_000));
    assert!((fuser.newest_loss().unwrap() - 1.32).abs() < 1e-9);
}

#[test]
fn tiers_stay_apart_and_controls_decide() {
    let summary = Summary::of(&projectors());
    let [evaluation] = summary.evaluations.as_slice() else { panic!("one evaluation") };
    let [seen, binding] = evaluation.tiers.as_slice() else { panic!("two tiers") };
    assert_eq!((seen.tier, seen.facts, binding.facts), (Tier::Seen, 32, 16));
    let row = |tier: &super::projector::TierSummary, condition| tier.row(condition).unwrap().clone();
    assert_eq!(row(seen, Projected::Projected).choice.hits, 32);
    assert_eq!(row(seen, Projected::Shuffled).choice.hits, 4);
    assert_eq!(row(seen, Projected::Mismatched).packet_choice.unwrap().hits, 32);
    assert_eq!((seen.beats(Projected::Shuffled), binding.beats(Projected::Shuffled)), (Some(true), Some(false)));
    assert!((seen.layers[0].r2_key - 0.8).abs() < 1e-12, "the mean over two shards");
    assert!((row(seen, Projected::TextRelay).bytes - 60.0).abs() < 1e-9);
}

#[test]
fn projectors_have_a_page_and_event_files() {
    let results = projectors();
    let page = page(&results);
    assert!(!page.contains("<script") && page.contains("Training: fuser of width 64"));
    assert!(page.contains("The projected cache carries the answer:") && page.contains("Not shown:"));
    // Ridge's fits; loss, validation and gates; two plots and the fits of each tier.
    assert_eq!(page.matches("<svg").count(), 1 + 3 + 2 * 3);
    assert!(page.contains("60 B and 12.00 ms by text relay"), "what sending text would take");

    let csv = super::csv::evaluations(&results);
    assert_eq!(csv.lines().count(), 1 + 3 * 16 * 7);
    assert!(csv.lines().all(|line| line.matches(',').count() >= 16) && csv.contains("r7.10,"));

    let files = super::tensorboard::event_files(&results, &detail(&results));
    let names: Vec<_> = files.iter().map(|(name, _)| name.split('/').collect::<Vec<_>>()).collect();
    let folders: Vec<_> = names.iter().map(|parts| parts[..parts.len() - 1].join("/")).collect();
    assert_eq!(folders, ["training-0", "training-1", "training-1/replica-0", "training-1/replica-1"]);
    assert!(names.iter().all(|parts| parts.last().unwrap().starts_with("events.out.tfevents.")));
    let scalars = super::tensorboard::tests::read_back(&files[2].1);
    let losses: Vec<_> =
        scalars.iter().filter(|(tag, ..)| tag == "loss").map(|(_, step, loss)| (*step, *loss)).collect();
    assert_eq!((losses.len(), losses[0], losses[11].0), (12, (0, 2.92), 11));
    let outer = super::tensorboard::tests::read_back(&files[1].1);
    let tags = |name: &str| outer.iter().filter(|(tag, ..)| tag == name).count();
    assert_eq!((tags("validation/matched"), tags("outer/delta_norm")), (2, 2));
    if let Some(path) = std::env::var_os("BONEPILE_REPORT_TO") {
        std::fs::write(path, page).unwrap();
    }
}
