//! `logs`: what a shard's program writes, to stdout as it is; everything said about it goes to stderr.
//!
//! Follows a shard over failed attempts and the coordinator's restarts until it is over.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use protocol::limits::clean_text;

use super::args::Logs;
use super::client::Client;
use super::context::{Context, Outcome};
use super::exit;
use super::failure::Failure;
use super::output::Document;
use crate::api::{ShardLog, ShardState, route};

/// Time between looks at a program that writes nothing.
const LOOK_INTERVAL: Duration = Duration::from_millis(300);
/// A coordinator that is away this long is not restarting.
const AWAY_MAX: Duration = Duration::from_secs(60);

/// `logs`.
///
/// # Errors
/// As [`super::client::Client`]'s; exit code 1 if the shard failed or was cancelled.
pub async fn run(context: &mut Context, args: &Logs) -> Outcome {
    let client = context.client()?;
    let mut reader = Reader { attempt: String::new(), offset: 0, note: String::new() };
    loop {
        let log = look(&client, args, &reader).await?;
        if reader.is_elsewhere(&log) {
            reader.begin_anew(context, &log);
            continue;
        }
        let silent = log.text.is_empty();
        reader.show(context, &log)?;
        if log.ended {
            return finish(context, &log);
        }
        if silent && !args.follow {
            return Ok(exit::OK);
        }
        if silent {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }
}

/// One look; who follows waits for a coordinator that restarts.
async fn look(client: &Client, args: &Logs, reader: &Reader) -> Result<ShardLog, Failure> {
    let begun = Instant::now();
    loop {
        match client.get(&route::log(args.shard, reader.offset)).await {
            Err(failure)
                if args.follow
                    && failure.exit == exit::UNREACHABLE
                    && !reader.attempt.is_empty()
                    && begun.elapsed() < AWAY_MAX =>
            {
                tokio::time::sleep(LOOK_INTERVAL).await;
            }
            answer => return answer,
        }
    }
}

/// How far someone has read.
struct Reader {
    attempt: String,
    offset: u64,
    note: String,
}

impl Reader {
    /// The shard has another attempt by now, whose output begins at 0.
    fn is_elsewhere(&self, log: &ShardLog) -> bool {
        !self.attempt.is_empty() && self.attempt != log.attempt
    }

    fn begin_anew(&mut self, context: &mut Context, log: &ShardLog) {
        let why = log.failure.as_ref().filter(|failure| failure.attempt == self.attempt);
        let why = why.map_or(String::new(), |failure| format!(": {}", first_line(&failure.message)));
        context.output.note(&clean_text(&format!("{} is over{why}; {} begins", self.attempt, log.attempt)));
        (self.attempt, self.offset) = (log.attempt.clone(), 0);
    }

    fn show(&mut self, context: &mut Context, log: &ShardLog) -> Result<(), Failure> {
        self.attempt.clone_from(&log.attempt);
        if log.offset > self.offset {
            let missing = log.offset - self.offset;
            context.output.note(&format!("[{missing} bytes before this are at hand once the shard is over]"));
        }
        self.offset = log.next;
        if log.text.is_empty() && self.note != log.note && !log.note.is_empty() {
            self.note.clone_from(&log.note);
            context.output.note(&clean_text(&log.note));
        }
        if log.text.is_empty() { Ok(()) } else { context.show_element(&Document::new(log, printable(&log.text))) }
    }
}

/// How the shard ended.
fn finish(context: &mut Context, log: &ShardLog) -> Outcome {
    if log.state == ShardState::Committed {
        return Ok(exit::OK);
    }
    if let Some(failure) = &log.failure {
        let hint = if failure.hint.is_empty() { String::new() } else { format!("\nhint: {}", failure.hint) };
        let text = format!("{} failed: {}: {}{hint}\n", failure.attempt, failure.kind, failure.message);
        context.show_element(&Document::new(log, printable(&text)))?;
    }
    Ok(exit::FAILED)
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// On a terminal a program's output may not move the cursor; into a file it goes as it is.
fn printable(text: &str) -> String {
    if !std::io::stdout().is_terminal() {
        return text.to_owned();
    }
    text.chars().map(|c| if c.is_control() && !matches!(c, '\n' | '\t' | '\r') { ' ' } else { c }).collect()
}
