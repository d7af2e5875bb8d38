//! `bonepile-worker doctor`: looks at everything that has to be right on a box, and says what is not.
//!
//! Changes nothing but for a probe in the store: one small artifact, the same at every visit.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use protocol::control::{ALPN_CONTROL, Terms};
use protocol::models::ModelsDir;
use protocol::quic::settings::any_address;
use protocol::quic::{bind, client_config, dial};
use protocol::store::Store;
use protocol::store::threads::StoreThreads;
use protocol::time::{Human, UnixMillis};
use serde::Serialize;

use super::inventory::{self, InventoryConfig};
use super::nvml::Gpus;
use super::output::{Exit, Printer};
use super::state_dir::{BoxIdentity, StateDir};
use super::way::chain;

/// How a finding weighs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Right.
    Ok,
    /// Works, but not as well as it could.
    Warning,
    /// Does not work.
    Wrong,
}

/// One thing looked at.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub what: &'static str,
    /// How it is.
    pub verdict: Verdict,
    /// In words.
    pub text: String,
    /// What to do.
    pub hint: Option<String>,
}

impl Finding {
    fn ok(what: &'static str, text: impl Into<String>) -> Self {
        Self { what, verdict: Verdict::Ok, text: text.into(), hint: None }
    }

    fn not(what: &'static str, verdict: Verdict, text: impl Into<String>, hint: Option<String>) -> Self {
        Self { what, verdict, text: text.into(), hint }
    }
}

/// What the doctor looks at.
#[derive(Debug)]
pub struct DoctorConfig {
    /// The state directory.
    pub state: StateDir,
    /// The store's mount, if the operator set one.
    pub store: Option<PathBuf>,
    /// Devices and budgets.
    pub inventory: InventoryConfig,
    /// The models directory.
    pub models: ModelsDir,
    /// On what terms the box is lent.
    pub terms: Terms,
}

/// Looks at everything and prints it. Fails if something is wrong.
pub async fn examine(config: DoctorConfig, printer: Printer) -> Exit {
    let mut findings = Vec::new();
    match config.state.identity() {
        Ok(identity) => {
            findings.push(certificate(&identity));
            findings.extend(network(&config.state, &identity).await);
        }
        Err(error) => {
            let hint = error.hint().map(str::to_owned);
            findings.push(Finding::not("identity", Verdict::Wrong, chain(&error), hint));
        }
    }
    findings.extend(devices(&config.inventory));
    findings.push(Finding::ok("terms", super::terms::describe(&config.terms)));
    findings.push(models(&config.models));
    findings.push(store(config.store).await);
    let worst = findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok);
    let printed = printer.result(&serde_json::json!({ "findings": findings }), &text(&findings));
    match worst {
        Verdict::Wrong => Exit::Failed,
        Verdict::Ok | Verdict::Warning => printed,
    }
}

fn text(findings: &[Finding]) -> String {
    let mut lines = Vec::new();
    for finding in findings {
        let mark = match finding.verdict {
            Verdict::Ok => "ok     ",
            Verdict::Warning => "warning",
            Verdict::Wrong => "WRONG  ",
        };
        lines.push(format!("{mark}  {:<12} {}", finding.what, finding.text));
        lines.extend(finding.hint.iter().map(|hint| format!("{:23}hint: {hint}", "")));
    }
    lines.join("\n")
}

fn certificate(identity: &BoxIdentity) -> Finding {
    let now = UnixMillis::from(SystemTime::now());
    let left = Duration::from_millis(identity.facts.not_after.since_ms(now));
    let who = format!("{} of cluster {}", identity.worker, identity.cluster);
    let hint = || Some("join again with a new token: `bonepile-worker join --force TOKEN`".to_owned());
    if now < identity.facts.not_before {
        let behind = Human(Duration::from_millis(identity.facts.not_before.since_ms(now)));
        let text = format!("{who}: this clock is {behind} before the certificate's beginning");
        return Finding::not("identity", Verdict::Wrong, text, Some("set the clock: `date -u`".to_owned()));
    }
    match left {
        Duration::ZERO => Finding::not("identity", Verdict::Wrong, format!("{who}: certificate has ended"), hint()),
        left if left < Duration::from_secs(24 * 3600) => {
            Finding::not("identity", Verdict::Warning, format!("{who}: certificate ends in {}", Human(left)), hint())
        }
        left => Finding::ok("identity", format!("{who}, certificate good for {}", Human(left))),
    }
}

async fn network(state: &StateDir, identity: &BoxIdentity) -> Vec<Finding> {
    let secret = match state.endpoint_secret() {
        Ok(secret) => secret,
        Err(error) => return vec![Finding::not("network", Verdict::Wrong, chain(&error), None)],
    };
    let (endpoint, small) = match bind(any_address(), &secret, None) {
        Ok(bound) => bound,
        Err(error) => {
            return vec![Finding::not("network", Verdict::Wrong, format!("no UDP socket: {error}"), None)];
        }
    };
    let mut findings = vec![match small {
        None => Finding::ok("sockets", "UDP buffers are as large as wished"),
        Some(small) => Finding::not("sockets", Verdict::Warning, small.to_string(), None),
    }];
    let config = match client_config(&identity.credentials, ALPN_CONTROL) {
        Ok(config) => config,
        Err(error) => {
            findings.push(Finding::not("coordinator", Verdict::Wrong, chain(&error), None));
            return findings;
        }
    };
    for address in &identity.coordinators {
        findings.push(match dial(&endpoint, &config, address, &identity.server_name).await {
            // The handshake alone proves both certificates' authority; a session would take the place of a running agent's.
            Ok(connection) => {
                let rtt = connection.rtt();
                Finding::ok("coordinator", format!("{address} answers, {:.1} ms", rtt.as_secs_f64() * 1e3))
            }
            Err(error) => {
                let hint = "is `bonepile serve` running there, and does a firewall let its UDP port through?";
                let text = format!("{address}: {error}");
                Finding::not("coordinator", Verdict::Wrong, text, Some(hint.to_owned()))
            }
        });
    }
    findings
}

fn devices(config: &InventoryConfig) -> Vec<Finding> {
    let driver = match Gpus::load() {
        Ok(gpus) => {
            let version = gpus.driver().unwrap_or_else(|| "of unknown version".to_owned());
            Finding::ok("driver", format!("NVIDIA driver {version}"))
        }
        Err(error) => Finding::ok("driver", format!("no NVIDIA driver ({error}); the processor computes")),
    };
    let found = inventory::take(config).devices.into_iter().map(|device| {
        let measured = device.speed.map_or(String::new(), |speed| {
            let (products, bytes) = (speed.f32_mflops as f64 / 1e3, gigabytes(speed.memory_bytes_per_second));
            format!(", {products:.0} GFLOP/s in f32, {bytes:.0} GB/s of memory")
        });
        let text = format!(
            "{}: {}, {:.1} of {:.1} GB lent, {} threads{measured}",
            device.id,
            device.model,
            gigabytes(device.memory_budget_bytes),
            gigabytes(device.memory_total_bytes),
            device.threads
        );
        match device.unusable {
            None => Finding::ok("device", text),
            Some(why) => Finding::not("device", Verdict::Warning, format!("{text}; unusable: {why}"), None),
        }
    });
    std::iter::once(driver).chain(found).collect()
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn gigabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

fn models(directory: &ModelsDir) -> Finding {
    let present = directory.present();
    match present.is_empty() {
        true => {
            let text = format!("none in {}", directory.root().display());
            Finding::not(
                "models",
                Verdict::Warning,
                text,
                Some("bring them with `bonepile-worker models pull`".to_owned()),
            )
        }
        false => Finding::ok("models", format!("{} in {}", present.join(", "), directory.root().display())),
    }
}

/// Writes, and with it links and reads, a probe.
async fn store(path: Option<PathBuf>) -> Finding {
    let Some(path) = path else {
        return Finding::ok("store", "no --store: the coordinator's path is tried, else artifacts are uploaded to it");
    };
    let probe = move || -> Result<Duration, protocol::store::StoreError> {
        let begun = std::time::Instant::now();
        let store = Store::open(&path, None)?.with_writer("doctor");
        let (hash, _) = store.publish_bytes(b"bonepile-worker doctor was here\n")?;
        store.read_verified(&hash)?;
        Ok(begun.elapsed())
    };
    let threads = match StoreThreads::start() {
        Ok(threads) => threads,
        Err(error) => return Finding::not("store", Verdict::Wrong, error.to_string(), None),
    };
    match threads.run(probe).await {
        Ok(Ok(took)) => Finding::ok("store", format!("writes, links and reads a file in {} ms", took.as_millis())),
        Ok(Err(error)) => Finding::not("store", Verdict::Wrong, chain(&error), error.hint()),
        Err(stalled) => Finding::not("store", Verdict::Wrong, stalled.to_string(), None),
    }
}
