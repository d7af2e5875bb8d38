//! Activations with a token a lane, and their products with frozen weights in both directions.
//!
//! 16 tokens stand beside each other in a line, a line a feature, `[features]` lines a panel: one instruction takes a number of
//! a weight to 16 tokens, weights are read as they lie in either direction, and a product's result is laid out as the next one's
//! operand. Short sequences share panels with others. Tokens beyond the last are zeros. Does not know layers.

mod kernel;

use std::ops::Range;

use super::frozen::Frozen;
use super::matrix::Output;
use super::team::team;

/// Tokens a line.
const LANES: usize = 16;
/// One feature of the tokens of a panel.
type Line = [f32; LANES];
/// Rows of a weight that a task takes: a tile of 32 x 2048 f32 is a quarter of a small core's second-level cache.
const ROWS_PER_TASK: usize = 32;
/// Rows of a weight that are added up at a time on the way back.
const ROWS_PER_SUM: usize = 64;
/// Tasks a thread on the way back, so that a thread that is late gets fewer.
const TASKS_PER_THREAD: usize = 4;
/// Rows of a weight whose results are panels at a time, where rows go in and out: 8192 x 128 f32 are 4 MiB.
const ROWS_AT_ONCE: usize = 8192;

/// Numbers `[T, features]`, held as `[T / 16, features, 16]`.
#[derive(Debug, Clone)]
pub(crate) struct Panels {
    features: usize,
    tokens: usize,
    lines: Vec<Line>,
}

impl Panels {
    fn zeros(features: usize, tokens: usize) -> Self {
        Self { features, tokens, lines: vec![Line::default(); tokens.div_ceil(LANES) * features] }
    }

    /// From rows, `[T, features]`.
    ///
    /// # Panics
    /// If there are no whole rows.
    pub(crate) fn from_rows(rows: &[f32], features: usize) -> Self {
        Self::from_columns(rows, features, 0..features)
    }

    /// From some columns of rows of `width` numbers.
    fn from_columns(rows: &[f32], width: usize, columns: Range<usize>) -> Self {
        assert!(rows.len().is_multiple_of(width), "there are whole rows");
        let mut panels = Self::zeros(columns.len(), rows.len() / width);
        if columns.is_empty() {
            return panels;
        }
        team().chunks(&mut panels.lines, columns.len(), |panel, lines| {
            let rows = &rows[panel * LANES * width..];
            let rows: Vec<_> = rows.chunks(width).take(LANES).map(|row| &row[columns.clone()]).collect();
            for (feature, line) in lines.iter_mut().enumerate() {
                line.iter_mut().zip(&rows).for_each(|(x, row)| *x = row[feature]);
            }
        });
        panels
    }

    /// As rows, `[T, features]`.
    pub(crate) fn to_rows(&self) -> Vec<f32> {
        let mut rows = vec![0.0; self.tokens * self.features];
        self.write_columns(&mut rows, self.features, 0);
        rows
    }

    /// Writes itself into rows of `width` numbers, from column `first` on.
    fn write_columns(&self, rows: &mut [f32], width: usize, first: usize) {
        team().chunks(rows, LANES * width, |panel, rows| {
            let lines = self.panel(panel);
            for (lane, row) in rows.chunks_mut(width).enumerate() {
                row[first..first + self.features].iter_mut().zip(lines).for_each(|(x, line)| *x = line[lane]);
            }
        });
    }

    /// The lines of 16 tokens, `[features]`.
    fn panel(&self, panel: usize) -> &[Line] {
        &self.lines[panel * self.features..(panel + 1) * self.features]
    }

    /// Some lines of every panel.
    fn lines(&self, features: Range<usize>) -> Vec<&[Line]> {
        (0..self.tokens.div_ceil(LANES)).map(|panel| &self.panel(panel)[features.clone()]).collect()
    }

    /// The numbers in the order in which they are held, the same for all of the same shape.
    pub(crate) fn numbers_mut(&mut self) -> &mut [f32] {
        self.lines.as_flattened_mut()
    }

    /// The same to be read.
    pub(crate) fn numbers(&self) -> &[f32] {
        self.lines.as_flattened()
    }
}

/// `x Wᵀ`, `[T, outputs]`, for weights that meet the same tokens.
///
/// # Panics
/// If a weight has other inputs than `x` has features.
pub(crate) fn apply<const N: usize>(x: &Panels, weights: [Frozen<'_>; N]) -> [Panels; N] {
    let mut results = weights.map(|weight| {
        assert_eq!(weight.inputs(), x.features, "a weight meets its inputs");
        Panels::zeros(weight.outputs(), x.tokens)
    });
    let outputs = results.each_mut().map(Lines::new);
    let pieces = weights.map(|weight| weight.outputs().div_ceil(ROWS_PER_TASK));
    let operand = x.lines(0..x.features);
    team().each(pieces.iter().sum(), |mut piece| {
        for ((weight, output), pieces) in weights.iter().zip(&outputs).zip(pieces) {
            if piece < pieces {
                let rows = piece * ROWS_PER_TASK..((piece + 1) * ROWS_PER_TASK).min(weight.outputs());
                weight.tile(rows.clone(), 0..x.features, |tile| {
                    // SAFETY: pieces do not overlap, and each is one task's.
                    #[expect(unsafe_code, reason = "tasks write lines of their own")]
                    let mut output = unsafe { output.some(&rows) };
                    kernel::multiply(tile, &operand, &mut output, false);
                });
                return;
            }
            piece -= pieces;
        }
    });
    results
}

/// `Σ y W`, `[T, inputs]`: the gradient of what met these weights, from those of its products, `[T, outputs]` each.
///
/// # Panics
/// If the shapes do not match.
pub(crate) fn apply_transposed<const N: usize>(parts: [(Frozen<'_>, &Panels); N]) -> Panels {
    let (weight, y) = parts[0];
    let mut result = Panels::zeros(weight.inputs(), y.tokens);
    add_transposed(&mut result, parts);
    result
}

/// Adds the same to `sum`.
fn add_transposed<const N: usize>(sum: &mut Panels, parts: [(Frozen<'_>, &Panels); N]) {
    for (weight, y) in &parts {
        assert!(weight.inputs() == sum.features && weight.outputs() == y.features, "a weight meets its outputs");
        assert_eq!(y.tokens, sum.tokens, "tokens are the same");
    }
    let block = parts.iter().map(|(weight, _)| weight.block()).max().unwrap_or(1);
    let blocks = sum.features.div_ceil(block);
    let tasks = blocks.min(TASKS_PER_THREAD * team().size());
    let inputs = sum.features;
    let output = Lines::new(sum);
    team().each(tasks, |task| {
        let cols = blocks * task / tasks * block..(blocks * (task + 1) / tasks * block).min(inputs);
        // SAFETY: these columns are this task's alone.
        #[expect(unsafe_code, reason = "tasks write lines of their own")]
        let mut output = unsafe { output.some(&cols) };
        for (weight, y) in &parts {
            for first in (0..y.features).step_by(ROWS_PER_SUM) {
                let rows = first..(first + ROWS_PER_SUM).min(y.features);
                let operand = y.lines(rows.clone());
                weight.tile(rows, cols.clone(), |tile| {
                    kernel::multiply(tile.transposed(), &operand, &mut output, true);
                });
            }
        }
    });
}

/// `x Wᵀ` with rows in and out: `[T, inputs]` to `[T, outputs]`.
pub(crate) fn rows_times(x: &[f32], weight: Frozen<'_>) -> Vec<f32> {
    let (inputs, outputs) = (weight.inputs(), weight.outputs());
    let x = Panels::from_rows(x, inputs);
    let mut y = vec![0.0; x.tokens * outputs];
    for first in (0..outputs).step_by(ROWS_AT_ONCE) {
        let [part] = apply(&x, [weight.part(first..(first + ROWS_AT_ONCE).min(outputs))]);
        part.write_columns(&mut y, outputs, first);
    }
    y
}

/// `y W` with rows in and out: `[T, outputs]` to `[T, inputs]`.
pub(crate) fn rows_times_transposed(y: &[f32], weight: Frozen<'_>) -> Vec<f32> {
    let (inputs, outputs) = (weight.inputs(), weight.outputs());
    let mut sum = Panels::zeros(inputs, y.len() / outputs);
    for first in (0..outputs).step_by(ROWS_AT_ONCE) {
        let rows = first..(first + ROWS_AT_ONCE).min(outputs);
        let part = Panels::from_columns(y, outputs, rows.clone());
        add_transposed(&mut sum, [(weight.part(rows), &part)]);
    }
    sum.to_rows()
}

/// Panels whose lines are written by several tasks, each its own.
struct Lines<'a> {
    /// A line a row.
    output: Output<'a>,
    features: usize,
    panels: usize,
}

impl<'a> Lines<'a> {
    fn new(panels: &'a mut Panels) -> Self {
        let (features, count) = (panels.features, panels.tokens.div_ceil(LANES));
        Self { output: Output::new(panels.numbers_mut(), LANES), features, panels: count }
    }

    /// These lines of every panel.
    ///
    /// # Safety
    /// No other task reads or writes them meanwhile.
    #[expect(unsafe_code, reason = "lines of all panels are not one slice")]
    #[expect(clippy::mut_from_ref, reason = "callers promise that parts do not overlap")]
    unsafe fn some(&self, features: &Range<usize>) -> Vec<&mut [Line]> {
        let rows = |panel: usize| panel * self.features + features.start..panel * self.features + features.end;
        // SAFETY: the caller's.
        (0..self.panels).map(|panel| unsafe { self.output.rows(rows(panel)) }.as_chunks_mut().0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::matrix::View;

    fn numbers(count: usize, step: f32) -> Vec<f32> {
        (0..count).map(|index| (index as f32 * step + 0.5).sin()).collect()
    }

    #[test]
    fn rows_come_out_as_they_went_in() {
        for tokens in [0, 1, 15, 16, 17, 40] {
            let rows = numbers(tokens * 7, 0.3);
            let panels = Panels::from_rows(&rows, 7);
            assert_eq!(panels.to_rows(), rows);
            assert_eq!(panels.numbers().len(), tokens.next_multiple_of(LANES) * 7);
        }
    }

    /// Every count of rows and tokens that a kernel treats apart, in both directions, and several weights at once.
    #[test]
    fn products_are_sums_of_products() {
        let inputs = 37;
        for (tokens, outputs) in [(1, 1), (16, 8), (17, 15), (33, 64), (48, 70), (64, 33), (85, 129)] {
            let (w, v) = (numbers(outputs * inputs, 0.37), numbers(outputs * inputs, 0.53));
            let weights = [&w, &v].map(|w| Frozen::Dense(View::new(w, [outputs, inputs], inputs)));
            let (x, y) = (numbers(tokens * inputs, 0.21), numbers(tokens * outputs, 0.11));
            let results = apply(&Panels::from_rows(&x, inputs), weights).map(|result| result.to_rows());
            let y_panels = Panels::from_rows(&y, outputs);
            let back = apply_transposed([(weights[0], &y_panels), (weights[1], &y_panels)]).to_rows();
            for token in 0..tokens {
                for output in 0..outputs {
                    for (result, w) in results.iter().zip([&w, &v]) {
                        let want: f32 = (0..inputs).map(|i| w[output * inputs + i] * x[token * inputs + i]).sum();
                        assert!((result[token * outputs + output] - want).abs() < 1e-4);
                    }
                }
                for input in 0..inputs {
                    let each = |o: usize| y[token * outputs + o] * (w[o * inputs + input] + v[o * inputs + input]);
                    let want: f32 = (0..outputs).map(each).sum();
                    assert!((back[token * inputs + input] - want).abs() < 1e-4);
                }
            }
            assert_eq!(rows_times(&x, weights[0]), results[0]);
        }
    }

    #[test]
    fn a_token_gets_the_same_bits_wherever_it_stands() {
        let w = numbers(50 * 30, 0.37);
        let weight = Frozen::Dense(View::new(&w, [50, 30], 30));
        let x = numbers(70 * 30, 0.21);
        let together = rows_times(&x, weight);
        for token in [0, 20, 69] {
            assert_eq!(rows_times(&x[token * 30..][..30], weight), together[token * 50..][..50]);
        }
    }
}
