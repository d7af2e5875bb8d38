//! Joining, from the box's side: dial with nothing but a token, prove it, take a certificate.
//!
//! Makes no key and stores nothing: the caller brings a certificate request and keeps the answer.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, VarInt};

use super::pin::PIN_MISMATCH;
use super::settings::SettingsError;
use super::{FrameReader, Received, explain, join_client_config, write_frame};
use crate::control::{FromAuthority, Join, Joined, Refused, ToAuthority, close, refusal};
use crate::identity::{EXPORTER_BYTES, JoinToken, PROOF_LABEL, coordinator_dns_name};
use crate::limits::clean_text;
use crate::time::{Human, UnixMillis};

/// One address gets this long to answer.
pub const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// Clocks further apart than this are worth a word.
const CLOCK_SKEW_WORTH_SAYING: Duration = Duration::from_secs(60);

/// A box could not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// TLS settings could not be made.
    #[error("could not set up TLS")]
    Settings(#[from] SettingsError),
    /// No address of the token answered.
    #[error("no coordinator answered: {}", tried.join("; "))]
    Unreachable {
        /// Each address and what happened there.
        tried: Vec<String>,
    },
    /// The coordinator there is of another cluster, or its certificate does not check.
    #[error("{address} is not to be trusted: {text}")]
    Untrusted {
        /// Where.
        address: String,
        /// Why.
        text: String,
        /// What to do.
        hint: Option<&'static str>,
    },
    /// The coordinator said no.
    #[error("the coordinator refused: {}", .0.text)]
    Refused(Refused),
    /// The conversation broke off.
    #[error("the conversation with {address} broke off: {text}")]
    Broken {
        /// Where.
        address: String,
        /// Why.
        text: String,
        /// What to do.
        hint: Option<&'static str>,
    },
}

impl JoinError {
    /// What a person could do.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Settings(_) => None,
            Self::Unreachable { .. } => {
                Some("is `bonepile serve` running there, and does a firewall let its UDP port through?")
            }
            Self::Untrusted { hint, .. } | Self::Broken { hint, .. } => *hint,
            Self::Refused(refused) => match refused.code {
                refusal::TOKEN_UNKNOWN | refusal::TOKEN_EXPIRED | refusal::TOKEN_USED | refusal::TOKEN_REVOKED => {
                    Some("make a new token there with `bonepile token create`")
                }
                refusal::RATE => Some("wait a minute, then try once"),
                refusal::UNAVAILABLE => Some("try again once the coordinator is back"),
                _ => Some("use the same version of bonepile on both sides"),
            },
        }
    }
}

/// Joins at the first address of the token that answers. `csr` is a certificate request (DER) of the box's new key.
///
/// # Errors
/// [`JoinError`]. Trying again with the same key is safe: it gets the same worker id.
pub async fn join(endpoint: &Endpoint, token: &JoinToken, csr: Vec<u8>, hostname: String) -> Result<Joined, JoinError> {
    let config = join_client_config(token.authority_spki_sha256)?;
    let server_name = coordinator_dns_name(&token.cluster);
    let mut tried = Vec::new();
    for address in &token.coordinators {
        match dial(endpoint, &config, address, &server_name).await {
            Ok(connection) => return converse(&connection, address, token, csr, hostname).await,
            Err(DialError::Failed(error)) if !is_silence(&error) => {
                let (text, hint) = explain(&error);
                return Err(JoinError::Untrusted { address: address.clone(), text, hint });
            }
            Err(error) => tried.push(format!("{address}: {error}")),
        }
    }
    Err(JoinError::Unreachable { tried })
}

/// An address could not be dialled.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Its name does not resolve.
    #[error("name does not resolve: {0}")]
    Name(std::io::Error),
    /// It is not an address that this endpoint can dial.
    #[error("cannot be dialled: {0}")]
    Address(#[from] quinn::ConnectError),
    /// The handshake failed.
    #[error("{}", explain(.0).0)]
    Failed(ConnectionError),
    /// Nobody answered in time.
    #[error("no answer within {} s", DIAL_TIMEOUT.as_secs())]
    Silent,
}

/// Resolves `address` (`host:port`) anew and dials each of its socket addresses until one answers.
///
/// # Errors
/// Of the last address tried; a refusal by whoever answers ends the search.
pub async fn dial(
    endpoint: &Endpoint,
    config: &ClientConfig,
    address: &str,
    server_name: &str,
) -> Result<Connection, DialError> {
    let resolved: Vec<SocketAddr> = tokio::net::lookup_host(address).await.map_err(DialError::Name)?.collect();
    let mut last = DialError::Name(std::io::Error::other("no address"));
    for address in resolved {
        let connecting = match endpoint.connect_with(config.clone(), address, server_name) {
            Ok(connecting) => connecting,
            Err(error) => {
                last = error.into();
                continue;
            }
        };
        last = match tokio::time::timeout(DIAL_TIMEOUT, connecting).await {
            Ok(Ok(connection)) => return Ok(connection),
            Ok(Err(error)) if is_silence(&error) => DialError::Failed(error),
            Ok(Err(error)) => return Err(DialError::Failed(error)),
            Err(_) => DialError::Silent,
        };
    }
    Err(last)
}

fn is_silence(error: &ConnectionError) -> bool {
    matches!(error, ConnectionError::TimedOut | ConnectionError::Reset)
}

async fn converse(
    connection: &Connection,
    address: &str,
    token: &JoinToken,
    csr: Vec<u8>,
    hostname: String,
) -> Result<Joined, JoinError> {
    let broken = |text: String, hint| JoinError::Broken { address: address.to_owned(), text, hint };
    let gone = |cause: &dyn std::error::Error| match connection.close_reason() {
        Some(reason) => {
            let (text, hint) = explain(&reason);
            broken(text, hint)
        }
        None => broken(cause.to_string(), None),
    };
    let mut exporter = [0; EXPORTER_BYTES];
    connection
        .export_keying_material(&mut exporter, PROOF_LABEL, &token.token.0.to_le_bytes())
        .map_err(|_| broken("no keying material".to_owned(), None))?;
    let request = Join {
        token: token.token,
        proof: token.secret.hash().proof(&exporter),
        csr,
        hostname,
        build: crate::BUILD.to_owned(),
    };
    let (mut send, receive) = connection.open_bi().await.map_err(|error| gone(&error))?;
    write_frame(&mut send, &ToAuthority::from(request)).await.map_err(|error| gone(&error))?;
    // Finished or not, the answer decides.
    let _ = send.finish();
    let answer = FrameReader::<FromAuthority>::new(receive).next().await.map_err(|error| gone(&error))?;
    connection.close(VarInt::from_u32(close::DONE), b"");
    match answer {
        Some(Received::Message(FromAuthority::Joined(joined))) => Ok(joined),
        Some(Received::Message(FromAuthority::JoinRefused(refused))) => {
            Err(JoinError::Refused(Refused { code: refused.code, text: clean_text(&refused.text) }))
        }
        Some(Received::Unknown { kind }) => Err(broken(format!("it answered with message type {kind:#06x}"), None)),
        None => Err(broken("it ended without an answer".to_owned(), None)),
    }
}

/// Whether a handshake failed because the coordinator is of another cluster than the token.
pub fn is_pin_mismatch(error: &JoinError) -> bool {
    matches!(error, JoinError::Untrusted { text, .. } if text.contains(PIN_MISMATCH))
}

/// What to tell the operator about clocks, if they differ by more than a minute: `this box's clock is 2h 10m behind …`.
pub fn clock_note(server_time: UnixMillis, here: SystemTime) -> Option<String> {
    let here = UnixMillis::from(here);
    let (apart_ms, word) = match here < server_time {
        true => (server_time.since_ms(here), "behind"),
        false => (here.since_ms(server_time), "ahead of"),
    };
    let apart = Duration::from_millis(apart_ms);
    (apart > CLOCK_SKEW_WORTH_SAYING).then(|| {
        format!("this box's clock is {} {word} the coordinator's; set it, certificates depend on it", Human(apart))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_are_compared_in_both_directions() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(clock_note(UnixMillis(100_000), at(90)), None);
        let behind = clock_note(UnixMillis(7_900_000), at(100)).unwrap();
        assert!(behind.starts_with("this box's clock is 2h 10m behind the coordinator's"), "{behind}");
        assert!(clock_note(UnixMillis(0), at(200)).unwrap().contains("3m 20s ahead of"));
    }
}
