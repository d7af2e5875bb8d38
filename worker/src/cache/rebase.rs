//! Moving a cache to other positions, by rotating its keys.
//!
//! R(a) R(b) = R(a + b), so a key rotated for position p becomes the key for p + delta by R(delta), with the layer's own
//! frequencies; values carry no position. Exact up to one f32 rounding. What it cannot mend: the columns were computed
//! without seeing what may now stand before them.

use std::borrow::Cow;

use super::value::{KvCache, LayerKv};

impl KvCache {
    /// The cache as if its text had stood `delta` positions later (earlier, if negative).
    #[must_use]
    pub fn rebase(&self, delta: i64) -> Self {
        let mut moved = self.clone();
        if self.rotated {
            moved.turn(&vec![delta; self.len()]);
        }
        for position in &mut moved.positions {
            *position += delta;
        }
        moved
    }

    /// The cache with keys as they are before RoPE; itself if they already are.
    #[must_use]
    pub fn unrotated(&self) -> Self {
        let mut plain = self.clone();
        if self.rotated {
            plain.turn(&self.positions.iter().map(|position| -position).collect::<Vec<_>>());
            plain.rotated = false;
        }
        plain
    }

    /// The cache with keys rotated to their positions; itself if they already are.
    #[must_use]
    pub fn rotated(&self) -> Self {
        let mut rotated = self.clone();
        if !self.rotated {
            rotated.turn(&self.positions);
            rotated.rotated = true;
        }
        rotated
    }

    /// One layer, if it is held, with keys rotated to their positions: a copy only if they are not.
    pub(crate) fn rotated_layer(&self, index: usize) -> Option<Cow<'_, LayerKv>> {
        let mut layer = Cow::Borrowed(self.layers.get(&index)?);
        if !self.rotated {
            self.layout.layers[index].rope.rotate(&mut layer.to_mut().k, &self.positions);
        }
        Some(layer)
    }

    /// The keys of one layer that is held, as they are before RoPE.
    pub(super) fn plain_keys(&self, layer: usize) -> Vec<f32> {
        let mut keys = self.layers[&layer].k.clone();
        if self.rotated {
            let back: Vec<i64> = self.positions.iter().map(|position| -position).collect();
            self.layout.layers[layer].rope.rotate(&mut keys, &back);
        }
        keys
    }

    /// Turns the keys of column t by `angles[t]` positions.
    fn turn(&mut self, angles: &[i64]) {
        for (index, layer) in &mut self.layers {
            self.layout.layers[*index].rope.rotate(&mut layer.k, angles);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::cache::value::tests::sample;

    #[test]
    fn moves_add_up_and_leave_values_alone() {
        let cache = sample(5);
        let moved = cache.rebase(1024).rebase(-1000);
        let direct = cache.rebase(24);
        assert_eq!(moved.positions(), direct.positions());
        for ((_, a), (_, b)) in moved.layers().zip(direct.layers()) {
            assert_eq!(a.v, b.v);
            assert!(a.k.iter().zip(&b.k).all(|(x, y)| (x - y).abs() < 1e-6));
        }
    }

    #[test]
    fn rotation_can_be_taken_off_and_put_on_elsewhere() {
        let cache = sample(5);
        let elsewhere = cache.unrotated().rebase(16).rotated();
        let direct = cache.rebase(16);
        for ((_, a), (_, b)) in elsewhere.layers().zip(direct.layers()) {
            assert!(a.k.iter().zip(&b.k).all(|(x, y)| (x - y).abs() < 1e-6));
        }
        assert_eq!(cache.unrotated().unrotated(), cache.unrotated());
        assert_eq!(cache.rotated(), cache);
        assert!(
            matches!(cache.rotated_layer(1), Some(std::borrow::Cow::Borrowed(layer)) if Some(layer) == cache.layer(1))
        );
        let plain = cache.unrotated();
        assert_eq!(plain.rotated_layer(1).as_deref(), plain.rotated().layer(1));
    }
}
