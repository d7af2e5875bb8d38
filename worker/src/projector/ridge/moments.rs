//! Sums over rows: counts, means, and products of what is left when means are taken away. They merge.
//!
//! Parts are merged as Chan, Golub and LeVeque (1979) do it: the products of two parts add up, and with them the outer product
//! of the difference of their means, weighted n_a n_b / (n_a + n_b). Nothing large is ever subtracted from something large, as
//! happens with raw sums of squares of numbers whose mean is far from 0, such as keys. That outer product is one more row of
//! the matrix product, so a block of rows costs one product.

use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, Mat, MatRef, Par};

/// Moments of y, and of x with y. Column-major `[P, Q]`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Cross {
    pub(super) rows: u64,
    pub(super) mean_x: Vec<f64>,
    pub(super) mean_y: Vec<f64>,
    /// Σ (x - mean)(y - mean)ᵀ, `[P, Q]`.
    pub(super) xy: Mat<f64>,
    /// Σ (y - mean)², `[Q]`.
    pub(super) yy: Vec<f64>,
}

/// The same with the products of x.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Moments {
    pub(super) cross: Cross,
    /// Σ (x - mean)(x - mean)ᵀ, `[P, P]`; only the lower triangle counts.
    pub(super) xx: Mat<f64>,
}

/// Rows of one part, centred, with the row that joins it to another behind them.
struct Joined {
    x: Mat<f64>,
    y: Mat<f64>,
}

impl Cross {
    pub(super) fn new(p: usize, q: usize) -> Self {
        Self { rows: 0, mean_x: vec![0.0; p], mean_y: vec![0.0; q], xy: Mat::zeros(p, q), yy: vec![0.0; q] }
    }

    /// Adds rows `x` `[R, P]` and `y` `[R, Q]`, both row-major.
    pub(super) fn add(&mut self, x: &[f32], y: &[f32]) {
        if let Some(joined) = self.take(x, y) {
            add_product(&mut self.xy, joined.x.as_ref(), joined.y.as_ref());
        }
    }

    /// Counts, means and sums of squares with these rows; what is to be multiplied yet. `None` without rows.
    fn take(&mut self, x: &[f32], y: &[f32]) -> Option<Joined> {
        let (p, q) = (self.mean_x.len(), self.mean_y.len());
        let rows = x.len() / p;
        debug_assert_eq!(rows, y.len() / q, "as many rows of x as of y");
        if rows == 0 {
            return None;
        }
        let (mean_x, mean_y) = (means(x, p), means(y, q));
        let joined = Joined {
            x: centred(x, &mean_x, &self.step(rows as u64, &mean_x, &self.mean_x)),
            y: centred(y, &mean_y, &self.step(rows as u64, &mean_y, &self.mean_y)),
        };
        for (column, sum) in self.yy.iter_mut().enumerate() {
            *sum += joined.y.col(column).iter().map(|value| value * value).sum::<f64>();
        }
        self.count(rows as u64, &mean_x, &mean_y);
        Some(joined)
    }

    /// The row that stands for the difference of two parts' means.
    fn step(&self, rows: u64, theirs: &[f64], mine: &[f64]) -> Vec<f64> {
        let (a, b) = (self.rows as f64, rows as f64);
        let weight = (a * b / (a + b)).sqrt();
        theirs.iter().zip(mine).map(|(theirs, mine)| weight * (theirs - mine)).collect()
    }

    fn count(&mut self, rows: u64, mean_x: &[f64], mean_y: &[f64]) {
        let share = rows as f64 / (self.rows + rows) as f64;
        let towards = |mine: &mut [f64], theirs: &[f64]| {
            mine.iter_mut().zip(theirs).for_each(|(mine, theirs)| *mine += share * (theirs - *mine));
        };
        towards(&mut self.mean_x, mean_x);
        towards(&mut self.mean_y, mean_y);
        self.rows += rows;
    }

    /// Adds another part's sums; returns the row of x that joins them.
    pub(super) fn merge(&mut self, other: &Self) -> Option<Vec<f64>> {
        if other.rows == 0 {
            return None;
        }
        let x = self.step(other.rows, &other.mean_x, &self.mean_x);
        let y = self.step(other.rows, &other.mean_y, &self.mean_y);
        self.xy += &other.xy;
        add_product(&mut self.xy, row(&x), row(&y));
        for ((mine, theirs), step) in self.yy.iter_mut().zip(&other.yy).zip(&y) {
            *mine += theirs + step * step;
        }
        self.count(other.rows, &other.mean_x, &other.mean_y);
        Some(x)
    }
}

impl Moments {
    pub(super) fn new(p: usize, q: usize) -> Self {
        Self { cross: Cross::new(p, q), xx: Mat::zeros(p, p) }
    }

    /// As [`Cross::add`].
    pub(super) fn add(&mut self, x: &[f32], y: &[f32]) {
        if let Some(joined) = self.cross.take(x, y) {
            add_product(&mut self.cross.xy, joined.x.as_ref(), joined.y.as_ref());
            add_square(&mut self.xx, joined.x.as_ref());
        }
    }

    /// As [`Cross::merge`].
    pub(super) fn merge(&mut self, other: &Self) {
        if let Some(step) = self.cross.merge(&other.cross) {
            self.xx += &other.xx;
            add_square(&mut self.xx, row(&step));
        }
    }
}

fn row(values: &[f64]) -> MatRef<'_, f64> {
    MatRef::from_row_major_slice(values, 1, values.len())
}

/// `sum += xᵀ y`.
fn add_product(sum: &mut Mat<f64>, x: MatRef<'_, f64>, y: MatRef<'_, f64>) {
    matmul(sum.as_mut(), Accum::Add, x.transpose(), y, 1.0, Par::Seq);
}

/// The lower triangle of `sum += xᵀ x`.
fn add_square(sum: &mut Mat<f64>, x: MatRef<'_, f64>) {
    let (lower, whole) = (BlockStructure::TriangularLower, BlockStructure::Rectangular);
    triangular::matmul(sum.as_mut(), lower, Accum::Add, x.transpose(), whole, x, whole, 1.0, Par::Seq);
}

fn means(rows: &[f32], width: usize) -> Vec<f64> {
    let mut sums = vec![0.0; width];
    for row in rows.chunks_exact(width) {
        sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += f64::from(*value));
    }
    let count = (rows.len() / width) as f64;
    sums.iter_mut().for_each(|sum| *sum /= count);
    sums
}

/// Rows without their means, and `last` behind them.
fn centred(rows: &[f32], means: &[f64], last: &[f64]) -> Mat<f64> {
    let (width, count) = (means.len(), rows.len() / means.len());
    Mat::from_fn(count + 1, width, |row, column| match row {
        row if row == count => last[column],
        row => f64::from(rows[row * width + column]) - means[column],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    fn numbers(rows: usize, width: usize, purpose: &str) -> Vec<f32> {
        let mut random = Random::new(1, purpose);
        // Far from 0, as keys are.
        (0..rows * width).map(|at| (100.0 * (at % width) as f64 + random.normal()) as f32).collect()
    }

    fn lower(moments: &Moments) -> Vec<f64> {
        let size = moments.xx.nrows();
        (0..size).flat_map(|i| (0..=i).map(move |j| (i, j))).map(|(i, j)| moments.xx[(i, j)]).collect()
    }

    #[test]
    fn sums_are_those_of_the_definition_however_rows_are_cut() {
        let (p, q, rows) = (3, 2, 17);
        let (x, y) = (numbers(rows, p, "x"), numbers(rows, q, "y"));
        let mut at_once = Moments::new(p, q);
        at_once.add(&x, &y);
        let mean = |values: &[f32], width: usize, column: usize| {
            values.iter().skip(column).step_by(width).map(|value| f64::from(*value)).sum::<f64>() / rows as f64
        };
        for i in 0..p {
            for j in 0..q {
                let (mean_x, mean_y) = (mean(&x, p, i), mean(&y, q, j));
                let products =
                    (0..rows).map(|row| (f64::from(x[row * p + i]) - mean_x) * (f64::from(y[row * q + j]) - mean_y));
                assert!((products.sum::<f64>() - at_once.cross.xy[(i, j)]).abs() < 1e-9);
            }
        }
        for cut in [1, 5, 16] {
            let (mut a, mut b, mut c) = (Moments::new(p, q), Moments::new(p, q), Moments::new(p, q));
            a.add(&x[..cut * p], &y[..cut * q]);
            b.add(&x[cut * p..], &y[cut * q..]);
            c.add(&x[..cut * p], &y[..cut * q]);
            c.add(&x[cut * p..], &y[cut * q..]);
            // Either order.
            let mut both = b.clone();
            both.merge(&a);
            a.merge(&b);
            for parts in [a, both, c] {
                assert_eq!(parts.cross.rows, rows as u64);
                let close = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-9);
                assert!(close(&lower(&parts), &lower(&at_once)));
                assert!(close(&parts.cross.yy, &at_once.cross.yy) && close(&parts.cross.mean_x, &at_once.cross.mean_x));
                assert!((&parts.cross.xy - &at_once.cross.xy).norm_max() < 1e-9);
            }
        }
        let mut same = at_once.clone();
        same.merge(&Moments::new(p, q));
        same.add(&[], &[]);
        assert_eq!(same, at_once);
    }
}
