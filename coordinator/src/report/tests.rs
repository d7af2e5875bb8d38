//! The page and its figures from results that look like real ones.

use protocol::experiment::{Condition, ShardSpec};
use protocol::ids::{RunId, ShardId};
use protocol::results::ShardResult;

use super::fixture::{cluster, detail, results, transfer};
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
