//! The product that a pass with gradients spends its time in: C = A B or C += A B for some rows of A and panels of B.
//!
//! A's numbers are broadcast, so A is read as it lies, whatever its strides, and nothing is packed; sums stay in registers over
//! all of the inner dimension. Every number of C is one sum in the order of the inner dimension, wherever its token stands.
//! Single-threaded; who calls shares tasks out.

use pulp::{Arch, Simd, WithSimd};

use super::Line;
use crate::model::matrix::View;

/// Writes `a · b` to `out`, or adds it to what is there: for each panel of `b`, `[inner]` lines, one of `out`, `[a.rows]` lines.
///
/// # Panics
/// If the shapes do not match.
pub(super) fn multiply(a: View<'_>, b: &[&[Line]], out: &mut [&mut [Line]], add: bool) {
    assert!(b.len() == out.len(), "a panel goes in for each that comes out");
    assert!(b.iter().all(|b| b.len() == a.cols) && out.iter().all(|out| out.len() == a.rows), "panels have A's shape");
    if a.cols == 0 {
        out.iter_mut().filter(|_| !add).for_each(|out| out.as_flattened_mut().fill(0.0));
        return;
    }
    Arch::new().dispatch(Job { a, b, out, add });
}

struct Job<'a, 'b, 'c> {
    a: View<'a>,
    b: &'a [&'a [Line]],
    out: &'b mut [&'c mut [Line]],
    add: bool,
}

impl WithSimd for Job<'_, '_, '_> {
    type Output = ();

    /// As many rows and panels at once as registers hold sums of, beside a line of each panel.
    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let mut panel = 0;
        while panel < self.b.len() {
            panel += match (S::F32_LANES, self.b.len() - panel) {
                // 24 sums of 32 registers. Four panels are two and two, not three and one.
                (16, 3 | 5..) => self.panels::<S, 8, 3, 1>(simd, panel),
                (16, 2 | 4) => self.panels::<S, 8, 2, 1>(simd, panel),
                (16, _) => self.panels::<S, 8, 1, 1>(simd, panel),
                // 12 sums of 16 registers.
                (8, _) => self.panels::<S, 6, 1, 2>(simd, panel),
                (4, _) => self.panels::<S, 2, 1, 4>(simd, panel),
                _ => self.plain(panel),
            };
        }
    }
}

impl Job<'_, '_, '_> {
    /// `P` panels from `panel` on, `R` rows at a time, lines in `W` registers each. The number of panels done.
    #[inline(always)]
    fn panels<S: Simd, const R: usize, const P: usize, const W: usize>(&mut self, simd: S, panel: usize) -> usize {
        let row = self.rows::<S, R, P, W>(simd, panel, 0);
        let row = self.rows::<S, 4, P, W>(simd, panel, row);
        let row = self.rows::<S, 2, P, W>(simd, panel, row);
        self.rows::<S, 1, P, W>(simd, panel, row);
        P
    }

    /// Rows from `row` on while there are `R` of them. The first row not done.
    #[inline(always)]
    #[expect(clippy::needless_range_loop, reason = "one number is a place in several arrays")]
    fn rows<S: Simd, const R: usize, const P: usize, const W: usize>(
        &mut self,
        simd: S,
        panel: usize,
        mut row: usize,
    ) -> usize {
        let View { values, rows, cols, row_stride, col_stride } = self.a;
        let b: [&[Line]; P] = std::array::from_fn(|p| &self.b[panel + p][..cols]);
        while row + R <= rows {
            let values = &values[row * row_stride..];
            assert!((R - 1) * row_stride + (cols - 1) * col_stride < values.len(), "a view lies inside its slice");
            let mut sums = [[[simd.splat_f32s(0.0); W]; P]; R];
            for k in 0..cols {
                let mut lines = [[simd.splat_f32s(0.0); W]; P];
                for p in 0..P {
                    lines[p].copy_from_slice(S::as_simd_f32s(&b[p][k]).0);
                }
                for r in 0..R {
                    // SAFETY: r < R and k < cols, so it is at most the place that was asserted to be inside.
                    #[expect(unsafe_code, reason = "a check for each number would be as much work as its products")]
                    let factor = simd.splat_f32s(unsafe { *values.get_unchecked(r * row_stride + k * col_stride) });
                    for p in 0..P {
                        for w in 0..W {
                            sums[r][p][w] = simd.mul_add_e_f32s(factor, lines[p][w], sums[r][p][w]);
                        }
                    }
                }
            }
            for r in 0..R {
                for p in 0..P {
                    let out = S::as_mut_simd_f32s(&mut self.out[panel + p][row + r]).0;
                    for w in 0..W {
                        out[w] = if self.add { simd.add_f32s(out[w], sums[r][p][w]) } else { sums[r][p][w] };
                    }
                }
            }
            row += R;
        }
        row
    }

    /// One panel, for processors without vector instructions.
    fn plain(&mut self, panel: usize) -> usize {
        let View { values, row_stride, col_stride, .. } = self.a;
        for (row, out) in self.out[panel].iter_mut().enumerate() {
            let mut sum = Line::default();
            for (k, line) in self.b[panel].iter().enumerate() {
                let factor = values[row * row_stride + k * col_stride];
                sum.iter_mut().zip(line).for_each(|(sum, x)| *sum += factor * x);
            }
            out.iter_mut().zip(sum).for_each(|(out, sum)| *out = if self.add { *out + sum } else { sum });
        }
        1
    }
}
