//! Items for spreadsheets. Texts are quoted, quotes doubled.

use std::fmt::Write;

use protocol::limits::clean_text;
use protocol::results::ShardResult;

use crate::api::RunResults;

/// Every item of every transfer.
pub(super) fn transfers(results: &RunResults) -> String {
    let mut csv = String::from(
        "shard,model,fact,condition,answer,packet_answer,choice,p_answer,exact,kl_nats,logit_max_abs,stalled,generated\n",
    );
    for shard in &results.shards {
        for seat in &shard.seats {
            let Some(ShardResult::Transfer(result)) = &seat.result else { continue };
            for item in &result.items {
                writeln!(
                    csv,
                    "{},{},{},{},{},{},{},{},{},{},{},{},{}",
                    shard.id,
                    quoted(&result.model.name),
                    item.fact,
                    item.condition,
                    quoted(&item.answer),
                    quoted(&item.packet_answer),
                    quoted(&item.choice),
                    item.p_answer,
                    item.exact,
                    item.kl,
                    item.logit_max_abs,
                    item.stalled,
                    quoted(&item.generated),
                )
                .expect("writing to a String cannot fail");
            }
        }
    }
    csv
}

/// Every item of every evaluation of a projector.
pub(super) fn evaluations(results: &RunResults) -> String {
    let mut csv = String::from(
        "shard,source,target,method,tier,fact,condition,answer,packet_answer,choice,p_answer,kl_nats,injected,stalled,bytes,\
         latency_ms,generated\n",
    );
    for shard in &results.shards {
        for seat in &shard.seats {
            let Some(ShardResult::ProjectorEval(result)) = &seat.result else { continue };
            for item in &result.items {
                writeln!(
                    csv,
                    "{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{}",
                    shard.id,
                    quoted(&result.source.name),
                    quoted(&result.target.name),
                    quoted(&result.method),
                    result.tier,
                    item.fact,
                    item.condition,
                    quoted(&item.answer),
                    quoted(&item.packet_answer),
                    quoted(&item.choice),
                    item.p_answer,
                    item.kl,
                    item.injected,
                    item.stalled,
                    item.bytes,
                    item.latency_ms,
                    quoted(&item.generated),
                )
                .expect("writing to a String cannot fail");
            }
        }
    }
    csv
}

/// A spreadsheet takes a cell that starts so for a formula: a quote in front makes it text again.
fn quoted(text: &str) -> String {
    let text = clean_text(text);
    let guard = if text.starts_with(['=', '+', '-', '@']) { "'" } else { "" };
    format!("\"{guard}{}\"", text.replace('"', "\"\""))
}
