//! Sizes of a fuser, and where each of its parameters lies in one flat vector.
//!
//! All *maps* (keys and values of each target layer, each with weights of its own) have the same sizes, so parameters of one kind
//! are stacked over maps: one batched product does what the published code does layer by layer. Does not compute.

use std::ops::Range;

/// Layers m of the published fuser.
pub const DEPTH: usize = 3;

/// Sizes of a fuser: h, m and the widths of both models' caches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FuserShape {
    /// Layers of the target, L. Maps are 2 L: keys of layer 0, values of layer 0, keys of layer 1, ...
    pub layers: usize,
    /// Numbers of a column of the source that enter a map, d_s: one layer's heads times head dimension, times as many layers as
    /// are mapped to a target layer.
    pub source: usize,
    /// Key/value heads of the target, H_r.
    pub heads: usize,
    /// Its head dimension, D_r.
    pub head_dim: usize,
    /// Width of hidden layers, h; the published inner width i equals it.
    pub hidden: usize,
    /// Layers m, [`DEPTH`] or more.
    pub depth: usize,
}

/// One kind of parameter, stacked over maps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// Name in files.
    pub name: String,
    /// `[maps, inputs, outputs]`; vectors have one input.
    pub shape: [usize; 3],
    /// Its place in the flat vector.
    pub range: Range<usize>,
    /// How it starts.
    pub start: Start,
}

/// What a parameter is before training.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Uniform in ±1/√inputs, as PyTorch's linear layers.
    Uniform {
        /// Width of the product that it belongs to.
        inputs: usize,
    },
    /// Ones: gains of norms.
    Ones,
    /// Zeros if the output layer starts from zero, else as [`Start::Uniform`].
    Output {
        /// Width of the product that it belongs to.
        inputs: usize,
    },
    /// The gates' first logit.
    Gate,
}

impl FuserShape {
    /// Numbers of a column of the target in one map, d_r.
    pub fn target(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Maps: two a layer.
    pub fn maps(&self) -> usize {
        2 * self.layers
    }

    /// Trained numbers of one map, by SCIENCE's formula: (d_s+d_r+1)h + (h+2hi) + (h+2h²) + (h+1)H_r + (m-2)(h+2hi) + (h+1)d_r + 1.
    pub fn parameters_of_map(&self) -> usize {
        let h = self.hidden;
        let block = h + 2 * h * h;
        (self.source + self.target() + 1) * h + self.depth * block + (h + 1) * self.heads + (h + 1) * self.target() + 1
    }

    /// Trained numbers in all.
    pub fn parameters(&self) -> usize {
        self.maps() * self.parameters_of_map()
    }

    /// Every parameter in the order of the flat vector.
    pub fn parameters_in_order(&self) -> Vec<Parameter> {
        let (h, d) = (self.hidden, self.target());
        let mut list = Vec::new();
        let mut next = 0;
        let mut add = |name: String, inputs: usize, outputs: usize, start: Start| {
            let count = self.maps() * inputs * outputs;
            list.push(Parameter { name, shape: [self.maps(), inputs, outputs], range: next..next + count, start });
            next += count;
        };
        let inputs = self.source + d;
        add("in.weight".to_owned(), inputs, h, Start::Uniform { inputs });
        add("in.bias".to_owned(), 1, h, Start::Uniform { inputs });
        for block in 0..self.depth {
            add(format!("block.{block}.norm"), 1, h, Start::Ones);
            add(format!("block.{block}.up"), h, h, Start::Uniform { inputs: h });
            add(format!("block.{block}.down"), h, h, Start::Uniform { inputs: h });
        }
        add("weight.weight".to_owned(), h, self.heads, Start::Uniform { inputs: h });
        add("weight.bias".to_owned(), 1, self.heads, Start::Uniform { inputs: h });
        add("out.weight".to_owned(), h, d, Start::Output { inputs: h });
        add("out.bias".to_owned(), 1, d, Start::Output { inputs: h });
        add("gate".to_owned(), 1, 1, Start::Gate);
        list
    }
}

impl Parameter {
    /// True for what weight decay shrinks: matrices, not biases, gains and gates.
    pub fn is_matrix(&self) -> bool {
        self.shape[1] > 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_pair_has_the_published_size() {
        let shape = FuserShape { layers: 28, source: 2 * 64, heads: 8, head_dim: 128, hidden: 1024, depth: DEPTH };
        assert_eq!(shape.parameters_of_map(), 8_533_001);
        assert_eq!(shape.parameters(), 477_848_056);
        let small = FuserShape { layers: 30, source: 256, heads: 3, head_dim: 64, hidden: 128, depth: DEPTH };
        assert_eq!(small.parameters_of_map(), 181_316);
    }

    #[test]
    fn parameters_fill_the_vector() {
        for depth in [3, 5] {
            let shape = FuserShape { layers: 2, source: 6, heads: 2, head_dim: 4, hidden: 5, depth };
            let list = shape.parameters_in_order();
            let mut end = 0;
            for parameter in &list {
                assert_eq!(parameter.range.start, end);
                assert_eq!(parameter.range.len(), parameter.shape.iter().product::<usize>());
                end = parameter.range.end;
            }
            assert_eq!(end, shape.parameters());
            assert_eq!(list.iter().filter(|parameter| parameter.is_matrix()).count(), 1 + 2 * depth + 2);
        }
    }
}
