//! The operator's questions and orders: tokens, workers.
//!
//! Only words: the coordinator decides.

use protocol::time::UnixMillis;

use super::args::{OneWorker, TokenCommand};
use super::context::{Context, Outcome};
use super::exit;
use super::output::Document;
use super::table::{Style, Table, Tone};
use super::text::{bytes, relative};
use crate::api::{DeviceRow, TokenCreated, TokenRequest, TokenRow, TokenState, WorkerRow, WorkerState, route};
use crate::clock::now;

/// `token …`.
///
/// # Errors
/// As [`super::client::Client`]'s.
pub async fn token(context: &mut Context, command: &TokenCommand) -> Outcome {
    let client = context.client()?;
    match command {
        TokenCommand::Create { uses, ttl } => {
            let ttl_ms = u64::try_from(ttl.as_millis()).expect("a year at most");
            let request = TokenRequest { ttl_ms, uses: *uses };
            let token: TokenCreated = client.post(route::TOKENS, &request).await?;
            context.show(&Document::new(&token, format!("{}\n", token.token)))?;
            let boxes = if *uses == 1 { "one box".to_owned() } else { format!("{uses} boxes") };
            context.output.note(&format!(
                "{} for {boxes}, ends {}; on a box: bonepile-worker join TOKEN",
                token.id,
                relative(token.expires_at_ms, now()),
            ));
        }
        TokenCommand::List => {
            let tokens: Vec<TokenRow> = client.get(route::TOKENS).await?;
            let text = token_table(&tokens, context.output.style(), now());
            context.show(&Document::new(&tokens, text))?;
            if tokens.is_empty() {
                context.output.note("no tokens; make one with `bonepile token create`");
            }
        }
        TokenCommand::Revoke { token } => {
            let token: TokenRow = client.order(&route::revoke_token(*token)).await?;
            let text = token_table(std::slice::from_ref(&token), context.output.style(), now());
            context.show(&Document::new(&token, text))?;
        }
    }
    Ok(exit::OK)
}

fn token_table(tokens: &[TokenRow], style: Style, now: UnixMillis) -> String {
    let mut table = Table::new(style, &["token", "state", ">uses", "workers", "expires"]);
    for token in tokens {
        let tone = match token.state {
            TokenState::Open => Tone::Good,
            TokenState::Used | TokenState::Expired | TokenState::Revoked => Tone::Soft,
        };
        table.row([
            (token.id.to_string(), None),
            (token.state.to_string(), Some(tone)),
            (format!("{}/{}", token.workers.len(), token.uses), None),
            (token.workers.join(" "), None),
            (relative(token.expires_at_ms, now), None),
        ]);
    }
    table.render()
}

/// `workers`.
///
/// # Errors
/// As [`super::client::Client`]'s.
pub async fn workers(context: &mut Context) -> Outcome {
    let workers: Vec<WorkerRow> = context.client()?.get(route::WORKERS).await?;
    let text = worker_table(&workers, context.output.style(), now());
    context.show(&Document::new(&workers, text))?;
    if workers.is_empty() {
        context.output.note("no workers; `bonepile token create`, then on a box `bonepile-worker join TOKEN`");
    }
    Ok(exit::OK)
}

/// `drain`, `undrain`, `revoke`: `route` is the order's.
///
/// # Errors
/// As [`super::client::Client`]'s.
pub async fn order_worker(
    context: &mut Context,
    args: &OneWorker,
    route: fn(protocol::ids::WorkerId) -> String,
) -> Outcome {
    let worker: WorkerRow = context.client()?.order(&route(args.worker)).await?;
    let text = worker_table(std::slice::from_ref(&worker), context.output.style(), now());
    context.show(&Document::new(&worker, text))?;
    Ok(exit::OK)
}

fn worker_table(workers: &[WorkerRow], style: Style, now: UnixMillis) -> String {
    const COLUMNS: [&str; 9] =
        ["worker", "host", "state", "device", "model", ">reserved", ">budget", ">seats", "heard"];
    let mut table = Table::new(style, &COLUMNS);
    for worker in workers {
        let heard = worker.last_heard_at_ms.map_or("never".to_owned(), |at| relative(at, now));
        let head = [
            (worker.id.to_string(), None),
            (worker.hostname.clone(), None),
            (worker.state.to_string(), Some(worker_tone(worker.state))),
        ];
        let empty = || (String::new(), None);
        if worker.devices.is_empty() {
            let none =
                [("no devices known".to_owned(), Some(Tone::Soft)), empty(), empty(), empty(), empty(), (heard, None)];
            table.row(head.into_iter().chain(none));
            continue;
        }
        for (index, device) in worker.devices.iter().enumerate() {
            let seats = worker.seats.iter().filter(|seat| seat.device == device.id).count();
            let head = if index == 0 { head.clone() } else { [empty(), empty(), empty()] };
            let heard = if index == 0 { heard.clone() } else { String::new() };
            table.row(head.into_iter().chain([
                (device.id.to_string(), device.unhealthy.as_ref().map(|_| Tone::Bad)),
                (device_model(device), None),
                (bytes(device.memory_reserved_bytes), None),
                (bytes(device.memory_budget_bytes), None),
                (seats.to_string(), None),
                (heard, None),
            ]));
        }
    }
    let mut text = table.render();
    for worker in workers {
        for device in &worker.devices {
            if let Some(why) = &device.unhealthy {
                let line = format!("{}/{} is not used: {why}", worker.id, device.id);
                text.push_str(&protocol::limits::clean_text(&line).replace('\n', " "));
                text.push('\n');
            }
        }
    }
    text
}

fn worker_tone(state: WorkerState) -> Tone {
    match state {
        WorkerState::Online => Tone::Good,
        WorkerState::Suspect | WorkerState::Draining => Tone::Busy,
        WorkerState::Lost => Tone::Bad,
        WorkerState::Revoked => Tone::Soft,
    }
}

fn device_model(device: &DeviceRow) -> String {
    match &device.compute_capability {
        Some(capability) => format!("{} (sm {capability})", device.model),
        None => device.model.clone(),
    }
}

#[cfg(test)]
mod tests {
    use protocol::ids::{DeviceId, Role, TokenId, WorkerId};

    use super::*;
    use crate::api::{Progress, WorkerSeat};

    const NOW: UnixMillis = UnixMillis(1_000_000);

    fn device(id: &str, model: &str, unhealthy: Option<&str>) -> DeviceRow {
        DeviceRow {
            id: DeviceId(id.to_owned()),
            model: model.to_owned(),
            compute_capability: id.starts_with("GPU").then(|| "6.1".to_owned()),
            memory_total_bytes: 8_000_000_000,
            memory_budget_bytes: 7_000_000_000,
            memory_reserved_bytes: 1_000_000_000,
            memory_free_bytes: None,
            utilisation_percent: None,
            temperature_celsius: None,
            power_milliwatts: None,
            unhealthy: unhealthy.map(str::to_owned),
        }
    }

    #[test]
    fn workers_in_a_table() {
        let seat = WorkerSeat {
            shard: "r1.0".parse().unwrap(),
            role: Role::Main,
            device: DeviceId("cpu".to_owned()),
            progress: Progress::default(),
        };
        let worker = |id, state, devices, heard| WorkerRow {
            id: WorkerId(id),
            hostname: format!("box-{id}\u{1b}[31m"),
            state,
            build: "0.1.0".to_owned(),
            devices,
            models: Vec::new(),
            seats: vec![seat.clone()],
            last_heard_at_ms: heard,
        };
        let devices = vec![
            device("GPU-1f", "GeForce GTX 1080", Some("no executor build\nfor sm 6.1")),
            device("cpu", "Xeon", None),
        ];
        let rows = [
            worker(1, WorkerState::Online, devices, Some(UnixMillis(998_500))),
            worker(2, WorkerState::Lost, Vec::new(), None),
        ];
        insta::assert_snapshot!(worker_table(&rows, Style::default(), NOW), @r"
        worker  host        state   device            model                      reserved  budget  seats  heard
        w1      box-1 [31m  online  GPU-1f            GeForce GTX 1080 (sm 6.1)    1.0 GB  7.0 GB      0  1.5 s ago
                                    cpu               Xeon                         1.0 GB  7.0 GB      1
        w2      box-2 [31m  lost    no devices known                                                      never
        w1/GPU-1f is not used: no executor build for sm 6.1
        ");
    }

    #[test]
    fn tokens_in_a_table() {
        let token = |id, state, workers: &[&str]| TokenRow {
            id: TokenId(id),
            state,
            created_at_ms: UnixMillis(0),
            expires_at_ms: UnixMillis(1_600_000),
            uses: 2,
            workers: workers.iter().map(|worker| (*worker).to_owned()).collect(),
        };
        let rows = [token(1, TokenState::Used, &["w1", "w2"]), token(2, TokenState::Open, &[])];
        insta::assert_snapshot!(token_table(&rows, Style::default(), NOW), @r"
        token  state  uses  workers  expires
        t1     used    2/2  w1 w2    in 10m 00s
        t2     open    0/2           in 10m 00s
        ");
    }
}
