//! Commands to inputs, answers to replies. A reply waits here until what it depends on is durable.
//!
//! Decides nothing: every command is one input or one look at the state.

use protocol::control::{Refused, ToCoordinator, Welcome, close, refusal};
use protocol::ids::WorkerId;
use protocol::limits::HEARTBEAT_INTERVAL_MS;
use tokio::sync::oneshot;

use super::{Command, Driver, JournalDown, TokenRecord, view};
use crate::api::{ApiError, ErrorCode, RetryAnswer, SubmitAnswer};
use crate::clock;
use crate::scheduler::input::Connected;
use crate::scheduler::{Answer, Input, Rejection};

/// Answers someone, with an error if the journal could not be written.
type Reply = Box<dyn FnOnce(Option<&JournalDown>) + Send>;

/// Replies that wait for the journal.
#[derive(Default)]
pub(super) struct Replies {
    waiting: Vec<Reply>,
}

/// Tells someone that nothing was accepted.
trait FromDown {
    fn from_down(down: &JournalDown) -> Self;
}

impl FromDown for ApiError {
    fn from_down(down: &JournalDown) -> Self {
        down.clone().into()
    }
}

impl FromDown for Refused {
    fn from_down(down: &JournalDown) -> Self {
        // The worker's operator is told what helps him; where the coordinator's disk is does not.
        let _ = down;
        Self {
            code: refusal::UNAVAILABLE,
            text: "the coordinator cannot write its journal; try again later".to_owned(),
        }
    }
}

/// The code to close a connection with.
impl FromDown for u32 {
    fn from_down(_: &JournalDown) -> Self {
        close::RESTARTING
    }
}

impl Replies {
    /// Answers `reply` once the turn is durable; if it does not get so, with an error.
    fn later<T: Send + 'static, E: FromDown + Send + 'static>(
        &mut self,
        reply: oneshot::Sender<Result<T, E>>,
        answer: Result<T, E>,
    ) {
        self.waiting.push(Box::new(move |down| {
            // Who asked may have left.
            let _ = reply.send(down.map_or(answer, |down| Err(E::from_down(down))));
        }));
    }

    /// The turn is durable.
    pub(super) fn release(&mut self) {
        self.waiting.drain(..).for_each(|reply| reply(None));
    }

    /// Nothing of the turn happened.
    pub(super) fn refuse(&mut self, down: &JournalDown) {
        self.waiting.drain(..).for_each(|reply| reply(Some(down)));
    }
}

/// A rejection as the API says it.
impl From<Rejection> for ApiError {
    fn from(rejection: Rejection) -> Self {
        let code = match &rejection {
            Rejection::TokenUnknown(_) | Rejection::WorkerUnknown(_) | Rejection::RunUnknown(_) => ErrorCode::NotFound,
            Rejection::TokenUseless | Rejection::ShardCount { .. } | Rejection::Devices { .. } => ErrorCode::BadRequest,
            Rejection::TokenExpired(_)
            | Rejection::TokenUsed(_)
            | Rejection::TokenRevoked(_)
            | Rejection::WorkerRevoked(_)
            | Rejection::SessionOld { .. }
            | Rejection::NotQuarantined(_)
            | Rejection::RunOver { .. }
            | Rejection::NothingFailed(_) => ErrorCode::Conflict,
        };
        Self::new(code, rejection.to_string())
    }
}

/// A rejection as a worker is told.
fn refused(rejection: &Rejection) -> Refused {
    let code = match rejection {
        Rejection::TokenUnknown(_) => refusal::TOKEN_UNKNOWN,
        Rejection::TokenExpired(_) => refusal::TOKEN_EXPIRED,
        Rejection::TokenUsed(_) => refusal::TOKEN_USED,
        Rejection::TokenRevoked(_) => refusal::TOKEN_REVOKED,
        Rejection::WorkerUnknown(_) => refusal::WORKER_UNKNOWN,
        Rejection::WorkerRevoked(_) => refusal::WORKER_REVOKED,
        Rejection::Devices { .. } => refusal::TOO_MUCH,
        _ => refusal::BAD_REQUEST,
    };
    Refused { code, text: rejection.to_string() }
}

impl Driver {
    pub(super) fn take(&mut self, command: Command) {
        if self.down.is_some() {
            return self.turn_away(command);
        }
        match command {
            Command::Connected { worker, session, hello, observed, spki_sha256, outbox, reply } => {
                let observed = observed.ip();
                let connected = Connected { worker, session, spki_sha256, hello, observed };
                let answer = self.ask(Input::Connected(Box::new(connected)));
                if answer.is_ok() {
                    self.outboxes.open(worker, session, outbox);
                }
                let answer = answer.map(|_| self.welcome()).map_err(|rejection| refused(&rejection));
                self.replies.later(reply, answer);
            }
            Command::Message { worker, session, message } => self.message(worker, session, message),
            Command::Disconnected { worker, session } => {
                self.outboxes.close(worker, session);
                self.ask(Input::Disconnected { worker, session }).expect("the end of a session is never refused");
            }
            Command::Redeem { id, spki_sha256, hostname, reply } => {
                let answer = match self.ask(Input::RedeemToken { token: id, spki_sha256, hostname }) {
                    Ok(Answer::Worker(worker)) => Ok(worker),
                    Ok(other) => unreachable!("a redeemed token names a worker, not {other:?}"),
                    Err(rejection) => Err(refused(&rejection)),
                };
                self.replies.later(reply, answer);
            }
            Command::Submit { run, reply } => {
                let answer = match self.ask(Input::Submit(run)) {
                    Ok(Answer::Run(run)) => {
                        let body = self.scheduler.state().runs.get(&run);
                        let shards = body.map_or(0, |body| u32::try_from(body.shards.len()).unwrap_or(u32::MAX));
                        Ok(SubmitAnswer { run, shards })
                    }
                    Ok(other) => unreachable!("an accepted sweep names a run, not {other:?}"),
                    Err(rejection) => Err(rejection.into()),
                };
                self.replies.later(reply, answer);
            }
            Command::Cancel { run, reason, reply } => {
                let answer = self.ask(Input::CancelRun { run, reason }).map_err(ApiError::from);
                let answer = answer.and_then(|_| self.view().run_summary(run));
                self.replies.later(reply, answer);
            }
            Command::Retry { run, reply } => {
                let answer = match self.ask(Input::RetryRun(run)) {
                    Ok(Answer::Reopened(shards)) => Ok(RetryAnswer { run, shards }),
                    Ok(other) => unreachable!("a retry counts shards, not {other:?}"),
                    Err(rejection) => Err(rejection.into()),
                };
                self.replies.later(reply, answer);
            }
            Command::Drain { worker, on, reply } => {
                let answer = self.ask(Input::SetDrain { worker, on }).map_err(ApiError::from);
                let answer = answer.and_then(|_| self.view().worker(worker));
                self.replies.later(reply, answer);
            }
            Command::RevokeWorker { worker, reply } => {
                let answer = self.ask(Input::RevokeWorker(worker)).map_err(ApiError::from);
                let answer = answer.and_then(|_| self.view().worker(worker));
                self.replies.later(reply, answer);
            }
            Command::CreateToken { secret_hash, ttl_ms, uses, reply } => {
                let answer = match self.ask(Input::CreateToken { secret_hash, ttl_ms, uses }) {
                    Ok(Answer::Token(token)) => self.view().token(token),
                    Ok(other) => unreachable!("a made token has an id, not {other:?}"),
                    Err(rejection) => Err(rejection.into()),
                };
                self.replies.later(reply, answer);
            }
            Command::RevokeToken { id, reply } => {
                let answer = self.ask(Input::RevokeToken(id)).map_err(ApiError::from);
                let answer = answer.and_then(|_| self.view().token(id));
                self.replies.later(reply, answer);
            }
            Command::Release { device, reply } => {
                let answer = self.ask(Input::ReleaseDevice(device)).map(|_| ()).map_err(ApiError::from);
                self.replies.later(reply, answer);
            }
            Command::Stop { reply } => self.stopping = Some(reply),
            question => self.answer(question),
        }
    }

    /// Commands that only look. Their answers wait for the turn, too: what they saw may not be durable yet.
    fn answer(&mut self, question: Command) {
        let state = self.scheduler.state();
        match question {
            Command::Token { id, reply } => {
                let record = state.tokens.get(&id).map(|token| TokenRecord {
                    secret_hash: token.secret_hash,
                    state: token.state(clock::now()),
                    expires_at: token.expires_at,
                });
                self.replies.later(reply, Ok(record));
            }
            Command::Admissible { worker, spki_sha256, reply } => {
                let answer = match state.workers.get(&worker) {
                    Some(known) if known.spki_sha256 != spki_sha256 => Err(close::ROLE),
                    Some(known) if known.revoked => Err(close::REVOKED),
                    Some(_) => Ok(()),
                    None => Err(close::ROLE),
                };
                self.replies.later(reply, answer);
            }
            Command::Runs { reply } => {
                let runs = Ok(self.view().runs());
                self.replies.later(reply, runs);
            }
            Command::Run { run, reply } => {
                let detail = self.view().run_detail(run);
                self.replies.later(reply, detail);
            }
            Command::Results { run, reply } => {
                let results = self.view().results(run);
                self.replies.later(reply, results);
            }
            Command::Manifest { attempt, reply } => {
                let manifest = Ok(self.view().manifest(attempt));
                self.replies.later(reply, manifest);
            }
            Command::Input { worker, download, reply } => {
                let input = Ok(self.view().input(worker, &download));
                self.replies.later(reply, input);
            }
            Command::Explain { shard, reply } => {
                let explanation = self.view().explanation(shard);
                self.replies.later(reply, explanation);
            }
            Command::Log { shard, offset, reply } => {
                let log = self.view().log(shard, offset);
                self.replies.later(reply, log);
            }
            Command::Workers { reply } => {
                let workers = Ok(self.view().workers());
                self.replies.later(reply, workers);
            }
            Command::Tokens { reply } => {
                let tokens = Ok(self.view().tokens());
                self.replies.later(reply, tokens);
            }
            Command::Snapshot { reply } => {
                let copy = Ok(Box::new(self.scheduler.clone()));
                self.replies.later(reply, copy);
            }
            Command::Cluster { reply } => {
                let cluster = Ok(self.view().cluster(&self.parts));
                self.replies.later(reply, cluster);
            }
            order => unreachable!("{order:?} is an order"),
        }
    }

    /// While the journal cannot be written.
    fn turn_away(&mut self, command: Command) {
        let Some(down) = self.down.clone() else { return };
        macro_rules! refuse {
            ($($variant:ident),*) => {
                match command {
                    $(Command::$variant { reply, .. } => {
                        // Who asked may have left.
                        let _ = reply.send(Err(FromDown::from_down(&down)));
                    })*
                    Command::Stop { reply } => self.stopping = Some(reply),
                    // Its session has ended; the worker says it again on the next one.
                    Command::Message { .. } | Command::Disconnected { .. } => {}
                }
            };
        }
        refuse!(
            Connected,
            Token,
            Redeem,
            Admissible,
            Submit,
            Runs,
            Run,
            Results,
            Manifest,
            Input,
            Explain,
            Log,
            Cancel,
            Retry,
            Workers,
            Drain,
            RevokeWorker,
            CreateToken,
            Tokens,
            RevokeToken,
            Snapshot,
            Release,
            Cluster
        );
    }

    fn message(&mut self, worker: WorkerId, session: u64, message: ToCoordinator) {
        let input = match message {
            ToCoordinator::Heartbeat(heartbeat) => Input::Heartbeat { worker, session, heartbeat },
            ToCoordinator::SeatFinished(finished) => {
                self.tails.forget(finished.attempt, finished.role);
                Input::SeatFinished { worker, session, finished }
            }
            ToCoordinator::SeatFailed(failed) => {
                self.tails.forget(failed.attempt, failed.role);
                Input::SeatFailed { worker, session, failed }
            }
            ToCoordinator::SeatWrote(wrote) => {
                if self.view().sits(worker, wrote.attempt, wrote.role) {
                    self.tails.take(&wrote);
                }
                return;
            }
            // Net lets none of these through on a session that began.
            ToCoordinator::Hello(_) | ToCoordinator::Upload(_) | ToCoordinator::Download(_) => return,
        };
        self.ask(input).expect("what a worker says is never refused, only ignored");
    }

    fn ask(&mut self, input: Input) -> Result<Answer, Rejection> {
        self.scheduler.handle(clock::now(), input)
    }

    fn view(&self) -> view::View<'_> {
        view::View { scheduler: &self.scheduler, manifests: self.manifests.status(), tails: &self.tails }
    }

    fn welcome(&self) -> Welcome {
        let header = self.parts.journal.header();
        Welcome {
            build: protocol::BUILD.to_owned(),
            cluster: header.cluster.clone(),
            server_time: clock::now(),
            heartbeat_interval_ms: HEARTBEAT_INTERVAL_MS,
            store_uuid: self.parts.store.uuid().to_owned(),
            store_path: self.parts.store.root().display().to_string(),
        }
    }
}
