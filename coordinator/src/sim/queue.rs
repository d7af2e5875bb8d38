//! What will happen, by virtual time; what falls on the same millisecond happens in the order in which it was put in.

use std::collections::BTreeMap;

/// A queue of things to come.
#[derive(Debug, Clone)]
pub struct Queue<T> {
    waiting: BTreeMap<(u64, u64), T>,
    pushed: u64,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { waiting: BTreeMap::new(), pushed: 0 }
    }
}

impl<T> Queue<T> {
    /// Lets `what` happen at `at_ms`.
    pub fn push(&mut self, at_ms: u64, what: T) {
        self.pushed += 1;
        self.waiting.insert((at_ms, self.pushed), what);
    }

    /// The next thing, with its time.
    pub fn pop(&mut self) -> Option<(u64, T)> {
        self.waiting.pop_first().map(|((at_ms, _), what)| (at_ms, what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn earlier_first_then_as_put_in() {
        let mut queue = Queue::default();
        for (at, what) in [(5, 'a'), (3, 'b'), (5, 'c'), (3, 'd')] {
            queue.push(at, what);
        }
        let order: String = std::iter::from_fn(|| queue.pop()).map(|(_, what)| what).collect();
        assert_eq!(order, "bdac");
    }
}
