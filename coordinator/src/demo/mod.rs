//! `bonepile demo`: a whole cluster on this machine, real sweeps, tables and reports.
//!
//! Nothing here is special: the same programs, commands and files as by hand, two worker processes instead of two boxes. The
//! processes are always ended, whatever happens; what failed keeps its directory.

mod children;

use std::fs;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use protocol::catalogue;
use protocol::models::{ModelsDir, Presence};
use protocol::sweep::Sweep;
use protocol::time::UnixMillis;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use self::children::{Children, Programs, Share};
use crate::api::{ClusterInfo, RunDetail, TokenCreated, TokenRequest, WorkerRow, WorkerState, route};
use crate::cli::args::{Demo, Init};
use crate::cli::client::Client;
use crate::cli::context::{Context, Outcome};
use crate::cli::failure::Failure;
use crate::cli::output::Document;
use crate::cli::table::Style;
use crate::cli::text::duration_ms;
use crate::cli::{init, research, results, watch};
use crate::clock::now;
use crate::report::summary::Summary;

/// The sweeps, one after the other: the same files that one submits by hand.
const SWEEPS: [(&str, &str); 2] = [
    ("first-look.toml", include_str!("../../../examples/first-look.toml")),
    ("projector.toml", include_str!("../../../examples/projector.toml")),
];
/// Workers: as many as the sweeps' seats on different workers need.
const WORKERS: usize = 2;
/// Longest wait for the coordinator to answer and for the workers to be online.
const START_MAX: Duration = Duration::from_secs(60);
/// Time between looks while something starts.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// Longest path of a unix socket, bytes; the system allows 107.
const SOCKET_PATH_MAX: usize = 107;

/// Runs the demo.
///
/// # Errors
/// Says what is missing before anything starts; later failures keep the directory and show the end of the logs.
pub async fn run(context: &mut Context, args: &Demo) -> Outcome {
    let programs = Programs::beside_this_one()?;
    check_models()?;
    let started = now();
    let place = Place::make(args.keep.as_deref())?;
    let mut children = Children::new(place.directory.join("logs"))?;
    let outcome = tokio::select! {
        outcome = story(context, &programs, &place, &mut children) => outcome,
        () = interrupted() => Err(Failure::failed("interrupted", "interrupted")),
    };
    children.end().await;
    match outcome {
        Ok((document, code)) => {
            place.tidy()?;
            context.show(&document)?;
            context.output.note(&format!("done in {}", duration_ms(now().since_ms(started))));
            Ok(code)
        }
        Err(failure) => {
            if failure.code != "interrupted" {
                context.output.note(&children.tails());
            }
            let hint = failure.hint.clone().map_or(String::new(), |hint| format!("{hint}; "));
            Err(failure.hint(format!("{hint}logs and cluster are kept in {}", place.directory.display())))
        }
    }
}

/// From an empty directory to the answer.
async fn story(
    context: &mut Context,
    programs: &Programs,
    place: &Place,
    children: &mut Children,
) -> Result<(Document, u8), Failure> {
    let made = init::make(&Init {
        directory: place.directory.clone(),
        name: "demo".to_owned(),
        store: None,
        listen: Some(format!("127.0.0.1:{}", free_udp_port()?)),
        advertise: Vec::new(),
    })?;
    context.output.note(&format!("cluster in {}", place.directory.display()));
    check_socket_path(&made.config.api_socket)?;
    let client = Client::new(&made.config.api_socket);

    children.serve(programs, &made.config_path)?;
    let cluster: ClusterInfo = until_answered(&client, children).await?;
    context.output.note(&format!("coordinator {} on {}", cluster.build, cluster.listen));
    let request = TokenRequest { ttl_ms: 600_000, uses: WORKERS as u32 };
    let token: TokenCreated = client.post(route::TOKENS, &request).await?;
    for index in 1..=WORKERS {
        children.join(programs, &place.directory.join(format!("worker-{index}")), &token.token).await?;
    }
    let share = Share::of(WORKERS);
    for index in 1..=WORKERS {
        children.work(programs, &place.directory.join(format!("worker-{index}")), index, share)?;
    }
    until_online(&client, children).await?;
    context.output.note(&format!("{WORKERS} workers online, {} compute threads each", share.threads));

    let (mut acts, mut text, mut code) = (Vec::new(), String::new(), crate::cli::exit::OK);
    for (name, sweep) in SWEEPS {
        let answer = research::submit_text(&client, name, sweep).await?;
        context.output.note(&format!("{name} submitted as {}", answer.run));
        let detail = tokio::select! {
            detail = watch::follow_quietly(context, &client, answer.run) => detail?,
            failure = children.first_to_end() => return Err(failure),
        };
        let results::Written { page: path, results, .. } = results::write_report(&client, answer.run).await?;
        let summary = Summary::of(&results);
        text.push_str(&ending(&detail, &summary, context.output.style(), &path));
        acts.push(json!({ "run": detail.summary, "summary": summary, "report": path }));
        code = watch::exit_code(&detail.summary);
        if code != crate::cli::exit::OK {
            context.output.note(&children.tails());
            break;
        }
        text.push('\n');
    }
    let data = json!({ "acts": acts, "store": made.config.store_path });
    Ok((Document::new(&data, text), code))
}

fn ending(detail: &RunDetail, summary: &Summary, style: Style, path: &Path) -> String {
    let run = &detail.summary;
    let took = run.finished_at_ms.unwrap_or(UnixMillis(0)).since_ms(run.submitted_at_ms);
    format!(
        "{}{}\n{} {}: {} of {} shards committed in {}\nreport: {}\n",
        results::overview(summary, style),
        results::problems(summary),
        run.id,
        run.state,
        run.shards.committed,
        run.shards.total(),
        duration_ms(took),
        path.display(),
    )
}

/// The models that the sweeps name must be here: the demo downloads nothing.
fn check_models() -> Result<(), Failure> {
    let parse = |(name, text)| Sweep::parse(name, text).map_err(|error| Failure::in_source("bad-sweep", &error, text));
    let sweeps = SWEEPS.into_iter().map(parse).collect::<Result<Vec<_>, _>>()?;
    let mut names: Vec<&str> = sweeps.iter().flat_map(Sweep::models).collect();
    names.sort_unstable();
    names.dedup();
    let models = ModelsDir::from_env()?;
    let missing: Vec<&str> = names
        .into_iter()
        .filter(|name| catalogue::model(name).is_none_or(|model| models.presence(model) != Presence::Present))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let message = format!("missing in {}: {}", models.root().display(), missing.join(", "));
    Err(Failure::failed("model", message).hint(format!("bring them with `bonepile models pull {}`", missing.join(" "))))
}

/// Where the demo's cluster lives.
struct Place {
    directory: PathBuf,
    kept: bool,
}

impl Place {
    fn make(keep: Option<&Path>) -> Result<Self, Failure> {
        let (directory, kept) = match keep {
            Some(directory) => {
                let path =
                    std::path::absolute(directory).map_err(|error| Failure::file("resolve", directory, &error))?;
                (path, true)
            }
            None => {
                let made = tempfile::Builder::new().prefix("bonepile-demo-").tempdir();
                let made = made.map_err(|error| Failure::file("create", &std::env::temp_dir(), &error))?;
                (made.keep(), false)
            }
        };
        Ok(Self { directory, kept })
    }

    /// Without `--keep` only the results store stays: the report is in it.
    fn tidy(&self) -> Result<(), Failure> {
        if self.kept {
            return Ok(());
        }
        let list = || fs::read_dir(&self.directory)?.collect::<Result<Vec<_>, _>>();
        for entry in list().map_err(|error| Failure::file("list", &self.directory, &error))? {
            let path = entry.path();
            if entry.file_name() == "store" {
                continue;
            }
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(|error| Failure::file("remove", &path, &error))?;
        }
        Ok(())
    }
}

/// A port that is free now. Another process may take it first; then `serve` says so.
fn free_udp_port() -> Result<u16, Failure> {
    let port = || UdpSocket::bind("127.0.0.1:0")?.local_addr();
    let address = port().map_err(|error| Failure::failed("io", format!("failed to find a free UDP port: {error}")))?;
    Ok(address.port())
}

fn check_socket_path(socket: &Path) -> Result<(), Failure> {
    let length = socket.as_os_str().len();
    if length <= SOCKET_PATH_MAX {
        return Ok(());
    }
    let message = format!("{} has {length} bytes; a unix socket's path may have {SOCKET_PATH_MAX}", socket.display());
    Err(Failure::usage("path-too-long", message).hint("name a directory with a shorter path"))
}

async fn until_answered(client: &Client, children: &mut Children) -> Result<ClusterInfo, Failure> {
    let start = Instant::now();
    loop {
        match client.get(route::CLUSTER).await {
            Ok(cluster) => return Ok(cluster),
            Err(failure) if start.elapsed() > START_MAX => return Err(failure),
            Err(_) => children.check()?,
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

async fn until_online(client: &Client, children: &mut Children) -> Result<(), Failure> {
    let start = Instant::now();
    loop {
        let workers: Vec<WorkerRow> = client.get(route::WORKERS).await?;
        let online = workers.iter().filter(|worker| worker.state == WorkerState::Online).count();
        if online >= WORKERS {
            return Ok(());
        }
        children.check()?;
        if start.elapsed() > START_MAX {
            return Err(Failure::failed("workers", format!("{online} of {WORKERS} workers came online")));
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Ctrl-C, or a polite end by someone else.
async fn interrupted() {
    // Without a handler the signal ends us at once, as it would any program.
    let Ok(mut terminate) = signal(SignalKind::terminate()) else { return std::future::pending().await };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}
