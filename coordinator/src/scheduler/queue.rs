//! Shards that may be placed now, by who shares the cluster and by what they ask for.
//!
//! Follows the journal, is not in it. A shard that waits for a pause, for another experiment of its run or for its run to
//! have fewer shards running is not here, or is passed over. Placement compares requests, not shards: its cost does not grow
//! with their number.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use protocol::ids::{RunId, ShardId};

use super::request::Request;

/// Number of an interned request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RequestId(pub u32);

/// Those who share: shards of one priority and one account. Higher priority first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PoolKey {
    /// Higher goes first.
    pub priority: Reverse<i32>,
    /// Whose share.
    pub account: String,
}

/// Ready shards of one pool.
#[derive(Debug, Clone, Default)]
pub struct Pool {
    /// By request, oldest first; no empty sets.
    pub requests: BTreeMap<RequestId, BTreeSet<ShardId>>,
    /// Number of shards.
    pub shards: usize,
    /// Reference milliseconds taken, over the account's weight: the pool with the least goes first.
    pub virtual_ms: u64,
}

/// All ready shards.
#[derive(Debug, Clone, Default)]
pub struct Queue {
    requests: Vec<Request>,
    ids: BTreeMap<Request, RequestId>,
    pools: BTreeMap<PoolKey, Pool>,
    placed_in: BTreeMap<ShardId, (PoolKeyId, RequestId)>,
    keys: Vec<PoolKey>,
    /// Something came in that no placement pass has looked at.
    fresh: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct PoolKeyId(u32);

impl Queue {
    /// Puts a shard in; one that is there stays.
    pub fn insert(&mut self, key: PoolKey, shard: ShardId, request: Request) {
        if self.placed_in.contains_key(&shard) {
            return;
        }
        let request = self.intern(request);
        let number = match self.keys.iter().position(|known| *known == key) {
            Some(number) => number,
            None => {
                self.keys.push(key.clone());
                self.keys.len() - 1
            }
        };
        // Who comes back after a while does not get all that the others took meanwhile.
        let least = self.pools.values().filter(|pool| pool.shards > 0).map(|pool| pool.virtual_ms).min();
        let pool = self.pools.entry(key).or_default();
        if pool.shards == 0 {
            pool.virtual_ms = pool.virtual_ms.max(least.unwrap_or(0));
        }
        pool.shards += 1;
        pool.requests.entry(request).or_default().insert(shard);
        self.placed_in.insert(shard, (PoolKeyId(u32::try_from(number).unwrap_or(u32::MAX)), request));
        self.fresh = true;
    }

    /// Takes a shard out; one that is not there is no error.
    pub fn remove(&mut self, shard: ShardId) {
        let Some((key, request)) = self.placed_in.remove(&shard) else { return };
        let Some(pool) = self.keys.get(key.0 as usize).and_then(|key| self.pools.get_mut(key)) else { return };
        pool.shards -= 1;
        if let Some(shards) = pool.requests.get_mut(&request) {
            shards.remove(&shard);
            if shards.is_empty() {
                pool.requests.remove(&request);
            }
        }
    }

    /// Takes a run's shards out.
    pub fn remove_run(&mut self, run: RunId) {
        let range = ShardId { run, index: 0 }..=ShardId { run, index: u32::MAX };
        let shards: Vec<_> = self.placed_in.range(range).map(|(shard, _)| *shard).collect();
        shards.into_iter().for_each(|shard| self.remove(shard));
    }

    /// The request of this number.
    pub fn request(&self, id: RequestId) -> &Request {
        &self.requests[id.0 as usize]
    }

    /// Whether a shard is in.
    pub fn contains(&self, shard: ShardId) -> bool {
        self.placed_in.contains_key(&shard)
    }

    /// Number of shards.
    pub fn len(&self) -> usize {
        self.placed_in.len()
    }

    /// Whether nothing is ready.
    pub fn is_empty(&self) -> bool {
        self.placed_in.is_empty()
    }

    /// Pools with shards in the order in which they get devices: by priority, then by what they had.
    pub fn order(&self) -> Vec<PoolKey> {
        let mut order: Vec<_> = self.pools.iter().filter(|(_, pool)| pool.shards > 0).collect();
        order.sort_by_key(|(key, pool)| (key.priority, pool.virtual_ms, key.account.clone()));
        order.into_iter().map(|(key, _)| key.clone()).collect()
    }

    /// A pool.
    pub fn pool(&self, key: &PoolKey) -> Option<&Pool> {
        self.pools.get(key)
    }

    /// Every pool.
    pub fn pools(&self) -> impl Iterator<Item = (&PoolKey, &Pool)> {
        self.pools.iter()
    }

    /// Charges a pool for work that it got.
    pub fn charge(&mut self, key: &PoolKey, reference_ms: u64, weight: u32) {
        if let Some(pool) = self.pools.get_mut(key) {
            pool.virtual_ms = pool.virtual_ms.saturating_add(reference_ms.max(1) * 1000 / u64::from(weight.max(1)));
        }
    }

    /// Whether something came in since the last call.
    pub fn take_fresh(&mut self) -> bool {
        std::mem::take(&mut self.fresh)
    }

    fn intern(&mut self, request: Request) -> RequestId {
        if let Some(id) = self.ids.get(&request) {
            return *id;
        }
        let id = RequestId(u32::try_from(self.requests.len()).expect("fewer requests than shards"));
        self.requests.push(request.clone());
        self.ids.insert(request, id);
        id
    }
}
