//! Asks the coordinator: HTTP over its unix socket, one connection a request.
//!
//! Does not retry: whoever follows a run does.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::failure::Failure;
use crate::api::ApiError;

/// Longest wait for an answer: results are read from the store while we wait, and a hanging mount should be told.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// Where the coordinator answers.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client of the coordinator behind `socket`. Connects at each request.
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// `GET route`.
    ///
    /// # Errors
    /// Exit code 3 without an answer, else what the answer says.
    pub async fn get<T: DeserializeOwned>(&self, route: &str) -> Result<T, Failure> {
        self.ask(Method::GET, route, Bytes::new(), None).await
    }

    /// `POST route` with a JSON body.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn post<T: DeserializeOwned>(&self, route: &str, body: &impl Serialize) -> Result<T, Failure> {
        self.ask(Method::POST, route, json(body), None).await
    }

    /// `POST route` with nothing to add.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn order<T: DeserializeOwned>(&self, route: &str) -> Result<T, Failure> {
        self.ask(Method::POST, route, Bytes::new(), None).await
    }

    /// `POST route` with a body made from `file`'s text, of which a complaint shows the line.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn submit<T: DeserializeOwned>(
        &self,
        route: &str,
        body: &impl Serialize,
        file: &str,
    ) -> Result<T, Failure> {
        self.ask(Method::POST, route, json(body), Some(file)).await
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        route: &str,
        body: Bytes,
        file: Option<&str>,
    ) -> Result<T, Failure> {
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, self.exchange(method, route, body)).await;
        let (status, body) = match answer {
            Ok(answer) => answer?,
            Err(_) => {
                return Err(Failure::unreachable(format!(
                    "the coordinator did not answer within {} s",
                    ANSWER_TIMEOUT.as_secs()
                ))
                .hint("its log says what it waits for; a hanging results store is the usual cause"));
            }
        };
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|error| {
                Failure::failed("protocol", format!("the coordinator's answer does not read: {error}"))
                    .hint("use the same version of bonepile here and for `serve`")
            });
        }
        match serde_json::from_slice::<ApiError>(&body) {
            Ok(error) => Err(Failure::from_api(error, file)),
            Err(_) => Err(Failure::failed("protocol", format!("the coordinator answered {status} to {route}"))
                .hint("use the same version of bonepile here and for `serve`")),
        }
    }

    async fn exchange(&self, method: Method, route: &str, body: Bytes) -> Result<(StatusCode, Bytes), Failure> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| self.cannot_connect(&error))?;
        let lost = |error: hyper::Error| Failure::unreachable(format!("the coordinator hung up: {error}"));
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(lost)?;
        let connection = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(route)
            .header(header::HOST, "bonepile")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .expect("the routes are valid paths");
        let response = sender.send_request(request).await.map_err(lost)?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(lost)?.to_bytes();
        connection.abort();
        Ok((status, body))
    }

    fn cannot_connect(&self, error: &io::Error) -> Failure {
        let socket = self.socket.display();
        let failure = Failure::unreachable(format!("the coordinator does not answer at {socket}: {error}"));
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                failure.hint("start it with `bonepile serve`, or name its cluster.toml with --config")
            }
            io::ErrorKind::PermissionDenied => failure.hint("run this as the user that runs the coordinator"),
            _ => failure,
        }
    }
}

fn json(body: &impl Serialize) -> Bytes {
    Bytes::from(serde_json::to_vec(body).expect("requests are plain data"))
}
