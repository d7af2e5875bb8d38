//! How a connection ended, in words that a person can act on.

use quinn::ConnectionError;

use super::pin::{CLOCK, PIN_MISMATCH};
use crate::control::close;

/// QUIC carries a TLS alert as this plus the alert's number.
const CRYPTO_BASE: u64 = 0x100;
const ALERT_BAD_CERTIFICATE: u64 = 42;
const ALERT_CERTIFICATE_EXPIRED: u64 = 45;
const ALERT_UNKNOWN_CA: u64 = 48;
const ALERT_DECRYPT_ERROR: u64 = 51;
const ALERT_NO_APPLICATION_PROTOCOL: u64 = 120;

/// One sentence about why a connection ended, and a hint if there is something to do.
pub fn explain(error: &ConnectionError) -> (String, Option<&'static str>) {
    match error {
        ConnectionError::ApplicationClosed(closed) => {
            let code = closed.error_code.into_inner();
            let reason = crate::limits::clean_text(&String::from_utf8_lossy(&closed.reason));
            let name = close::name(code);
            let text = if reason.is_empty() { name.to_owned() } else { format!("{name}: {reason}") };
            (text, application_hint(code))
        }
        ConnectionError::ConnectionClosed(closed) => {
            alert(u64::from(closed.error_code), &String::from_utf8_lossy(&closed.reason), "the other side")
        }
        ConnectionError::TransportError(error) => alert(u64::from(error.code), &error.reason, "this side"),
        ConnectionError::TimedOut => {
            ("no answer".to_owned(), Some("is the other side running, and does a firewall let its UDP port through?"))
        }
        ConnectionError::Reset => ("the other side has restarted".to_owned(), None),
        ConnectionError::LocallyClosed => ("closed by this side".to_owned(), None),
        other => (other.to_string(), None),
    }
}

fn application_hint(code: u64) -> Option<&'static str> {
    match u32::try_from(code) {
        Ok(close::ROLE | close::EXPIRED) => {
            Some("join again: `bonepile token create` there, `bonepile-worker join TOKEN` here")
        }
        Ok(close::REVOKED) => Some("the operator has taken this box out of the cluster"),
        Ok(close::PROTOCOL) => Some("use the same version of bonepile on both sides"),
        _ => None,
    }
}

fn alert(code: u64, reason: &str, refuser: &str) -> (String, Option<&'static str>) {
    let reason = crate::limits::clean_text(reason);
    match code.checked_sub(CRYPTO_BASE) {
        _ if reason.contains(PIN_MISMATCH) => {
            (reason, Some("use a token of the cluster that listens there; nothing was sent to it"))
        }
        _ if reason.contains(CLOCK) => (reason, Some("compare the clocks of both sides: `date -u`")),
        Some(ALERT_NO_APPLICATION_PROTOCOL) => (
            format!("{refuser} speaks no protocol version of ours"),
            Some("use the same version of bonepile on both sides"),
        ),
        Some(ALERT_CERTIFICATE_EXPIRED) => (
            format!("{refuser} finds a certificate outside its time: {reason}"),
            Some("compare the clocks of both sides: `date -u`"),
        ),
        Some(ALERT_UNKNOWN_CA | ALERT_BAD_CERTIFICATE | ALERT_DECRYPT_ERROR) => (
            format!("{refuser} does not believe the certificate: it is not of this cluster's authority ({reason})"),
            Some("join this cluster with a token of its own"),
        ),
        Some(_) => (format!("TLS failed at {refuser}: {reason}"), None),
        None => (format!("QUIC failed at {refuser}: {reason} (code {code:#x})"), None),
    }
}
