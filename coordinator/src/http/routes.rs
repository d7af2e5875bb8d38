//! A handler a route: reads the request, asks the driver, answers.
//!
//! Bodies and ids are read by hand, so that what is wrong with them is an [`ApiError`] like everything else.

use std::str::FromStr;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Path, RawQuery, State};
use axum::http::Uri;
use axum::routing::{get, post};
use axum::{Json, Router};
use protocol::identity::{JoinToken, Secret};
use protocol::ids::ParseIdError;
use protocol::limits::TOKEN_TTL_MS;
use protocol::sweep::Sweep;
use serde::de::DeserializeOwned;

use super::{BODY_BYTES_MAX, Failed, HttpParts, logs, planning, results};
use crate::api::{
    ApiError, CancelRequest, ClusterInfo, ErrorCode, Explanation, RetryAnswer, RunDetail, RunResults, RunSummary,
    ShardLog, SubmitAnswer, SubmitRequest, TokenCreated, TokenRequest, TokenRow, WorkerRow,
};
use crate::driver::NewRun;

pub(super) type Parts = State<Arc<HttpParts>>;
pub(super) type Body = Result<Bytes, BytesRejection>;
pub(super) type Answer<T> = Result<Json<T>, Failed>;

pub(super) fn router(parts: Arc<HttpParts>) -> Router {
    Router::new()
        .route("/v1/cluster", get(cluster))
        .route("/v1/runs", get(runs).post(submit))
        .route("/v1/runs/{run}", get(run))
        .route("/v1/runs/{run}/results", get(run_results))
        .route("/v1/runs/{run}/cancel", post(cancel))
        .route("/v1/runs/{run}/retry", post(retry))
        .route("/v1/shards/{shard}/explain", get(explain))
        .route("/v1/plan", post(planning::plan_route))
        .route("/v1/throughput", get(planning::throughput))
        .route("/v1/devices/{worker}/{device}/release", post(planning::release))
        .route("/v1/shards/{shard}/log", get(log))
        .route("/v1/workers", get(workers))
        .route("/v1/workers/{worker}/drain", post(drain))
        .route("/v1/workers/{worker}/undrain", post(undrain))
        .route("/v1/workers/{worker}/revoke", post(revoke_worker))
        .route("/v1/tokens", get(tokens).post(create_token))
        .route("/v1/tokens/{token}/revoke", post(revoke_token))
        .fallback(async |uri: Uri| not_here(&uri))
        .method_not_allowed_fallback(async |uri: Uri| not_here(&uri))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(parts)
}

fn not_here(uri: &Uri) -> Failed {
    Failed(ApiError::new(ErrorCode::NotFound, format!("nothing answers this method at {}", uri.path())))
}

async fn cluster(State(parts): Parts) -> Answer<ClusterInfo> {
    let info = parts.driver.cluster().await?;
    Ok(Json(ClusterInfo { listen: parts.listen.clone(), ..info }))
}

async fn submit(State(parts): Parts, body: Body) -> Answer<SubmitAnswer> {
    let request: SubmitRequest = read(body)?;
    // A large matrix takes a while to expand: not on a thread that others wait for.
    let read = tokio::task::spawn_blocking(move || {
        let sweep = Sweep::parse(&request.file, &request.text)?;
        Ok::<_, protocol::error::SourceError>(new_run(sweep, request))
    });
    let run = read.await.map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))?;
    Ok(Json(parts.driver.submit(run.map_err(ApiError::from)?).await?))
}

/// A sweep as it is handed to the scheduler.
pub(super) fn new_run(sweep: Sweep, request: SubmitRequest) -> NewRun {
    let Sweep { name, seed, priority, account, running_max, shards: specs, groups } = sweep;
    let SubmitRequest { file, text } = request;
    NewRun { name, priority, seed, account, running_max, file, text, groups, specs }
}

async fn runs(State(parts): Parts) -> Answer<Vec<RunSummary>> {
    Ok(Json(parts.driver.runs().await?))
}

async fn run(State(parts): Parts, Path(id): Path<String>) -> Answer<RunDetail> {
    let mut run = parts.driver.run(parse(&id)?).await?;
    results::fill_trainings(&mut run.trainings, &parts.store, &parts.store_threads).await?;
    Ok(Json(run))
}

async fn run_results(State(parts): Parts, Path(id): Path<String>) -> Answer<RunResults> {
    let mut answer = parts.driver.results(parse(&id)?).await?;
    results::fill(&mut answer, &parts.store, &parts.store_threads).await?;
    Ok(Json(answer))
}

async fn cancel(State(parts): Parts, Path(id): Path<String>, body: Body) -> Answer<RunSummary> {
    let request: CancelRequest = read(body)?;
    Ok(Json(parts.driver.cancel(parse(&id)?, request.reason).await?))
}

async fn retry(State(parts): Parts, Path(id): Path<String>) -> Answer<RetryAnswer> {
    Ok(Json(parts.driver.retry(parse(&id)?).await?))
}

async fn explain(State(parts): Parts, Path(id): Path<String>) -> Answer<Explanation> {
    Ok(Json(parts.driver.explain(parse(&id)?).await?))
}

async fn log(State(parts): Parts, Path(id): Path<String>, RawQuery(query): RawQuery) -> Answer<ShardLog> {
    let offset = match query.as_deref() {
        None | Some("") => Some(0),
        Some(query) => query.strip_prefix("offset=").and_then(|text| text.parse().ok()),
    };
    let offset =
        offset.ok_or_else(|| ApiError::new(ErrorCode::BadRequest, "the only question is offset=BYTES".to_owned()))?;
    let mut answer = parts.driver.log(parse(&id)?, offset).await?;
    logs::fill(&mut answer, &parts.store, &parts.store_threads).await?;
    Ok(Json(answer))
}

async fn workers(State(parts): Parts) -> Answer<Vec<WorkerRow>> {
    Ok(Json(parts.driver.workers().await?))
}

async fn drain(State(parts): Parts, Path(id): Path<String>) -> Answer<WorkerRow> {
    Ok(Json(parts.driver.drain(parse(&id)?).await?))
}

async fn undrain(State(parts): Parts, Path(id): Path<String>) -> Answer<WorkerRow> {
    Ok(Json(parts.driver.undrain(parse(&id)?).await?))
}

async fn revoke_worker(State(parts): Parts, Path(id): Path<String>) -> Answer<WorkerRow> {
    Ok(Json(parts.driver.revoke_worker(parse(&id)?).await?))
}

async fn tokens(State(parts): Parts) -> Answer<Vec<TokenRow>> {
    Ok(Json(parts.driver.tokens().await?))
}

async fn create_token(State(parts): Parts, body: Body) -> Answer<TokenCreated> {
    let request: TokenRequest = read(body)?;
    let ttl_ms = if request.ttl_ms == 0 { TOKEN_TTL_MS } else { request.ttl_ms };
    let random = crate::authority::random::<32>();
    let secret = Secret(random.map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))?);
    // Durable before it is shown; the journal never sees the secret.
    let row = parts.driver.create_token(secret.hash().0, ttl_ms, request.uses).await?;
    let facts = parts.tokens.clone();
    let token = JoinToken {
        coordinators: facts.coordinators,
        cluster: facts.cluster,
        authority_spki_sha256: facts.authority_spki_sha256,
        token: row.id,
        secret,
    };
    Ok(Json(TokenCreated { token: token.to_string(), id: row.id, expires_at_ms: row.expires_at_ms }))
}

async fn revoke_token(State(parts): Parts, Path(id): Path<String>) -> Answer<TokenRow> {
    Ok(Json(parts.driver.revoke_token(parse(&id)?).await?))
}

/// Reads a body. An empty one is an empty object: an order with nothing to add needs no body.
pub(super) fn read<T: DeserializeOwned>(body: Body) -> Result<T, Failed> {
    let bytes = body.map_err(|rejection| match rejection.status() {
        axum::http::StatusCode::PAYLOAD_TOO_LARGE => {
            ApiError::new(ErrorCode::TooLarge, format!("the request is over the limit of {BODY_BYTES_MAX} bytes"))
        }
        _ => ApiError::new(ErrorCode::BadRequest, rejection.body_text()),
    })?;
    let text: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
    let read = serde_json::from_slice(text);
    read.map_err(|error| Failed(ApiError::new(ErrorCode::BadRequest, format!("the body does not read: {error}"))))
}

pub(super) fn parse<T: FromStr<Err = ParseIdError>>(id: &str) -> Result<T, Failed> {
    id.parse().map_err(|error: ParseIdError| Failed(ApiError::new(ErrorCode::BadRequest, error.to_string())))
}
