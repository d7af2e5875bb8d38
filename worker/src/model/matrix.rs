//! f32 matrix products on slices: the one place that calls `gemm`, and outputs that several tasks write.
//!
//! Single-threaded each; who calls shares tasks out. Does not know weights or layers.

#![expect(
    unsafe_code,
    reason = "gemm takes pointers and strides, and parts of a row-major matrix are not disjoint slices"
)]

use std::ops::Range;

/// A matrix to be read: `[rows, cols]` in a slice.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    pub(super) values: &'a [f32],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

impl<'a> View<'a> {
    /// Row-major, rows `stride` apart.
    ///
    /// # Panics
    /// If the slice is too short.
    pub(crate) fn new(values: &'a [f32], [rows, cols]: [usize; 2], stride: usize) -> Self {
        assert!(rows == 0 || cols == 0 || (rows - 1) * stride + cols <= values.len(), "a view lies inside its slice");
        Self { values, rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// Some of the rows.
    ///
    /// # Panics
    /// If there are not so many.
    pub(crate) fn part(self, rows: Range<usize>) -> Self {
        assert!(rows.end <= self.rows && !rows.is_empty(), "rows of a view lie inside it");
        Self { values: &self.values[rows.start * self.row_stride..], rows: rows.len(), ..self }
    }

    /// Some of the columns.
    ///
    /// # Panics
    /// If there are not so many.
    pub(crate) fn columns(self, columns: Range<usize>) -> Self {
        assert!(columns.end <= self.cols && !columns.is_empty(), "columns of a view lie inside it");
        Self { values: &self.values[columns.start * self.col_stride..], cols: columns.len(), ..self }
    }

    /// The same numbers as `[cols, rows]`.
    pub(crate) fn transposed(self) -> Self {
        let Self { values, rows, cols, row_stride, col_stride } = self;
        Self { values, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
    }
}

/// A row-major matrix `[rows, width]` whose parts are written by several tasks, each its own.
pub(crate) struct Output<'a> {
    start: *mut f32,
    rows: usize,
    width: usize,
    borrowed: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: every way to write asks its caller for parts that no other task touches; the borrow keeps all others out.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    /// # Panics
    /// If `values` is not a whole number of rows.
    pub(crate) fn new(values: &'a mut [f32], width: usize) -> Self {
        assert!(values.len().is_multiple_of(width), "an output has whole rows");
        let rows = values.len() / width;
        Self { start: values.as_mut_ptr(), rows, width, borrowed: std::marker::PhantomData }
    }

    /// Columns `cols` of row `row`.
    ///
    /// # Safety
    /// No other task reads or writes these numbers meanwhile.
    ///
    /// # Panics
    /// If they lie outside.
    #[expect(clippy::mut_from_ref, reason = "callers promise that parts do not overlap")]
    pub(crate) unsafe fn part(&self, row: usize, cols: Range<usize>) -> &mut [f32] {
        assert!(row < self.rows && cols.end <= self.width, "a part lies inside its output");
        // SAFETY: inside, and nobody else's.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.width + cols.start), cols.len()) }
    }

    /// Whole rows.
    ///
    /// # Safety
    /// No other task reads or writes these numbers meanwhile.
    ///
    /// # Panics
    /// If they lie outside.
    #[expect(clippy::mut_from_ref, reason = "callers promise that parts do not overlap")]
    pub(crate) unsafe fn rows(&self, rows: Range<usize>) -> &mut [f32] {
        assert!(rows.end <= self.rows, "rows lie inside their output");
        // SAFETY: inside, and nobody else's.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(rows.start * self.width), rows.len() * self.width) }
    }

    /// Writes `factor · a · b` to the rows and columns from `row` and `col` on; adds it to what is there if `accumulate`.
    ///
    /// # Safety
    /// No other task reads or writes these numbers meanwhile.
    ///
    /// # Panics
    /// If the shapes do not match or the result lies outside.
    pub(crate) unsafe fn multiply(
        &self,
        (row, col): (usize, usize),
        accumulate: bool,
        factor: f32,
        a: View<'_>,
        b: View<'_>,
    ) {
        assert_eq!(a.cols, b.rows, "inner dimensions match");
        assert!(row + a.rows <= self.rows && col + b.cols <= self.width, "a product lies inside its output");
        let stride = |n: usize| isize::try_from(n).expect("a matrix fits the address space");
        // SAFETY: views hold their shapes inside their slices; the output's part is inside, and nobody else's.
        unsafe {
            gemm::gemm(
                a.rows,
                b.cols,
                a.cols,
                self.start.add(row * self.width + col),
                1,
                stride(self.width),
                accumulate,
                a.values.as_ptr(),
                stride(a.col_stride),
                stride(a.row_stride),
                b.values.as_ptr(),
                stride(b.col_stride),
                stride(b.row_stride),
                1.0,
                factor,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }
}

/// `out = factor · a · b`, all of it.
///
/// # Panics
/// If the shapes do not match.
pub(crate) fn multiply(out: &mut [f32], factor: f32, a: View<'_>, b: View<'_>) {
    assert_eq!(out.len(), a.rows * b.cols, "the output has the product's shape");
    if out.is_empty() {
        return;
    }
    let output = Output::new(out, b.cols);
    // SAFETY: `output` is this function's alone.
    unsafe { output.multiply((0, 0), false, factor, a, b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_sums_of_products() {
        let a: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let b: Vec<f32> = (0..12).map(|i| (i * i) as f32 - 20.0).collect();
        let (rows, cols, inner) = (3, 3, 4);
        let want = |i: usize, j: usize| (0..inner).map(|k| a[i * inner + k] * b[k * cols + j]).sum::<f32>();
        let mut out = [0.0; 9];
        multiply(&mut out, 2.0, View::new(&a, [3, 4], 4), View::new(&b, [4, 3], 3));
        for i in 0..rows {
            for j in 0..cols {
                assert_eq!(out[i * cols + j], 2.0 * want(i, j));
            }
        }
        // The middle of a wider output, from transposed views, added to what is there.
        let turned: Vec<f32> = (0..12).map(|place| a[place % 3 * 4 + place / 3]).collect();
        let mut wide = [1.0; 5 * 4];
        let output = Output::new(&mut wide, 5);
        // SAFETY: one task.
        unsafe {
            output.multiply((1, 1), true, 1.0, View::new(&turned, [4, 3], 3).transposed(), View::new(&b, [4, 3], 3));
        }
        for row in 0..4 {
            for col in 0..5 {
                let inside = row >= 1 && (1..4).contains(&col);
                assert_eq!(wide[row * 5 + col], if inside { 1.0 + want(row - 1, col - 1) } else { 1.0 });
            }
        }
    }
}
