//! How often a token may be guessed at. Pure: time comes in.

use std::collections::BTreeMap;
use std::net::IpAddr;

use protocol::ids::TokenId;
use protocol::time::UnixMillis;

/// Wrong proofs after which a token is burnt.
pub(super) const WRONG_PROOFS_MAX: u32 = 5;
/// Tries to join that one address has in a minute.
pub(super) const TRIES_PER_MINUTE: u32 = 20;
/// Addresses remembered; beyond them the oldest minute is forgotten, so memory is bounded whoever knocks.
const ADDRESSES_MAX: usize = 4096;
const MINUTE_MS: u64 = 60_000;

/// Counts tries.
#[derive(Debug, Default)]
pub(super) struct JoinLimits {
    /// Start of the minute counted, and tries in it.
    tries: BTreeMap<IpAddr, (UnixMillis, u32)>,
    wrong: BTreeMap<TokenId, u32>,
}

impl JoinLimits {
    /// Counts a try from `address`; `false` if it had too many.
    pub(super) fn may_try(&mut self, address: IpAddr, now: UnixMillis) -> bool {
        if self.tries.len() >= ADDRESSES_MAX && !self.tries.contains_key(&address) {
            let oldest = self.tries.iter().min_by_key(|(address, (since, _))| (*since, **address));
            if let Some(oldest) = oldest.map(|(address, _)| *address) {
                self.tries.remove(&oldest);
            }
        }
        let (since, count) = self.tries.entry(address).or_insert((now, 0));
        if now.since_ms(*since) >= MINUTE_MS {
            (*since, *count) = (now, 0);
        }
        *count = count.saturating_add(1);
        *count <= TRIES_PER_MINUTE
    }

    /// Counts a wrong proof for a token that exists; `true` if this one burns it.
    pub(super) fn wrong_proof(&mut self, token: TokenId) -> bool {
        let count = self.wrong.entry(token).or_insert(0);
        *count = count.saturating_add(1);
        *count == WRONG_PROOFS_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_twenty_tries_a_minute() {
        let mut limits = JoinLimits::default();
        let address = IpAddr::from([192, 0, 2, 1]);
        for _ in 0..TRIES_PER_MINUTE {
            assert!(limits.may_try(address, UnixMillis(0)));
        }
        assert!(!limits.may_try(address, UnixMillis(59_999)));
        assert!(limits.may_try(IpAddr::from([192, 0, 2, 2]), UnixMillis(59_999)));
        assert!(limits.may_try(address, UnixMillis(60_000)));
    }

    #[test]
    fn the_fifth_wrong_proof_burns_a_token_once() {
        let mut limits = JoinLimits::default();
        let burnt: Vec<bool> = (0..7).map(|_| limits.wrong_proof(TokenId(1))).collect();
        assert_eq!(burnt, [false, false, false, false, true, false, false]);
        assert!(!limits.wrong_proof(TokenId(2)));
    }

    #[test]
    fn memory_is_bounded_whoever_knocks() {
        let mut limits = JoinLimits::default();
        for number in 0..10_000u32 {
            assert!(limits.may_try(IpAddr::from(number.to_be_bytes()), UnixMillis(u64::from(number))));
        }
        assert_eq!(limits.tries.len(), ADDRESSES_MAX);
    }
}
