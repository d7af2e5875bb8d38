//! Every storage type against candle's own dequantisation, every kernel against the scalar one.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use super::*;
use crate::model::frozen::Frozen;
use crate::model::panel::{rows_times, rows_times_transposed};

const KINDS: [(QuantKind, GgmlDType); 13] = [
    (QuantKind::F32, GgmlDType::F32),
    (QuantKind::F16, GgmlDType::F16),
    (QuantKind::Bf16, GgmlDType::BF16),
    (QuantKind::Q4_0, GgmlDType::Q4_0),
    (QuantKind::Q4_1, GgmlDType::Q4_1),
    (QuantKind::Q5_0, GgmlDType::Q5_0),
    (QuantKind::Q5_1, GgmlDType::Q5_1),
    (QuantKind::Q8_0, GgmlDType::Q8_0),
    (QuantKind::Q2K, GgmlDType::Q2K),
    (QuantKind::Q3K, GgmlDType::Q3K),
    (QuantKind::Q4K, GgmlDType::Q4K),
    (QuantKind::Q5K, GgmlDType::Q5K),
    (QuantKind::Q6K, GgmlDType::Q6K),
];

/// Numbers without a pattern, in -1..1, the same on every machine.
fn noise(count: usize, salt: u64) -> Vec<f32> {
    let mut state = salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// A quantised matrix, and its values as candle reads them.
fn matrix(kind: QuantKind, dtype: GgmlDType, rows: usize, cols: usize) -> (QuantMatrix, Vec<f32>) {
    let values = Tensor::from_vec(noise(rows * cols, 7), (rows, cols), &Device::Cpu).unwrap();
    let stored = QTensor::quantize(&values, dtype).unwrap();
    let bytes = stored.data().unwrap().into_owned();
    let range = 0..bytes.len();
    let back = stored.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    (QuantMatrix::new(kind, rows, cols, Arc::new(bytes), range).unwrap(), back)
}

fn product(weights: &[f32], x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut y = Vec::new();
    for x in x.chunks(cols) {
        for row in 0..rows {
            let sum: f64 = weights[row * cols..][..cols].iter().zip(x).map(|(w, x)| f64::from(w * x)).sum();
            y.push(sum as f32);
        }
    }
    y
}

fn relative(got: &[f32], want: &[f32]) -> f32 {
    let error: f32 = got.iter().zip(want).map(|(got, want)| (got - want).powi(2)).sum();
    (error / want.iter().map(|want| want * want).sum::<f32>()).sqrt()
}

#[test]
fn every_type_is_read_as_candle_reads_it() {
    for (kind, dtype) in KINDS {
        let (matrix, want) = matrix(kind, dtype, 3, 512);
        let mut got = vec![0.0; 3 * 512];
        matrix.dequantize_rows(0..3, &mut got);
        assert!(relative(&got, &want) < 1e-6, "{kind}: {}", relative(&got, &want));
    }
}

#[test]
fn the_exact_product_is_the_f32_product() {
    for (kind, dtype) in KINDS {
        let (matrix, weights) = matrix(kind, dtype, 70, 256);
        for tokens in [1, 3, 9] {
            let x = noise(tokens * 256, 11);
            let mut y = vec![0.0; tokens * 70];
            matrix.matmul(&x, &mut y, Kernel::Exact);
            let error = relative(&y, &product(&weights, &x, 70, 256));
            assert!(error < 1e-6, "{kind}, {tokens} tokens: {error}");
        }
    }
}

#[test]
fn eight_bit_products_lose_no_more_than_rounding_of_activations() {
    for (kind, dtype) in KINDS {
        let (matrix, weights) = matrix(kind, dtype, 70, 512);
        for tokens in [1, 3] {
            let x = noise(tokens * 512, 13);
            let mut y = vec![0.0; tokens * 70];
            matrix.matmul(&x, &mut y, Kernel::best());
            let error = relative(&y, &product(&weights, &x, 70, 512));
            assert!(error < 8e-3, "{kind}, {tokens} tokens: {error}");
        }
    }
}

#[test]
fn simd_kernels_agree_with_the_scalar_one() {
    for (kind, dtype) in KINDS {
        let (matrix, _) = matrix(kind, dtype, 33, 768);
        let x = noise(768, 17);
        let run = |kernel| {
            let mut y = vec![0.0; 33];
            matrix.matmul(&x, &mut y, kernel);
            y
        };
        let scalar = run(Kernel::Scalar);
        let kernels = match Kernel::best() {
            #[cfg(target_arch = "x86_64")]
            Kernel::Vnni => vec![Kernel::Vnni, Kernel::Avx2],
            other => vec![other],
        };
        for kernel in kernels {
            assert!(relative(&run(kernel), &scalar) < 2e-6, "{kind} {kernel:?}: {}", relative(&run(kernel), &scalar));
        }
    }
}

#[test]
fn a_shape_that_does_not_fit_is_refused() {
    let bytes = Arc::new(vec![0u8; 40]);
    let columns = QuantMatrix::new(QuantKind::Q4_1, 1, 33, bytes.clone(), 0..40).unwrap_err();
    assert!(matches!(columns, QuantError::Columns { block: 32, .. }));
    let length = QuantMatrix::new(QuantKind::Q4_1, 3, 32, bytes, 0..40).unwrap_err();
    assert_eq!(length.to_string(), "a 3 x 32 matrix of Q4_1 has 60 bytes, not 40");
}

#[test]
fn rows_are_moved_whole() {
    let (matrix, values) = matrix(QuantKind::Q5_0, GgmlDType::Q5_0, 4, 64);
    let moved = matrix.with_row_order(&[2, 0, 3, 1]);
    let mut row = vec![0.0; 64];
    moved.dequantize_rows(0..1, &mut row);
    assert!(relative(&row, &values[128..192]) < 1e-6);
}

#[test]
fn rows_that_are_no_whole_blocks_of_activations_are_multiplied_exactly() {
    let (matrix, weights) = matrix(QuantKind::F16, GgmlDType::F16, 70, 16);
    let x = noise(16, 3);
    let mut y = vec![0f32; 70];
    matrix.matmul(&x, &mut y, Kernel::best());
    assert!(relative(&y, &product(&weights, &x, 70, 16)) < 1e-6);
}

#[test]
fn products_with_gradients_are_those_of_the_values() {
    for (kind, dtype) in KINDS {
        let (matrix, weights) = matrix(kind, dtype, 150, 512);
        let weight = Frozen::Stored { matrix: &matrix, first: 0, rows: 150 };
        // One token, a few, more than one panel of 16, and more than the kernel takes at once.
        for tokens in [1, 3, 33, 100] {
            let x = noise(tokens * 512, 3);
            let error = relative(&rows_times(&x, weight), &product(&weights, &x, 150, 512));
            assert!(error < 1e-5, "{kind}, {tokens} tokens: {error}");
            let y = noise(tokens * 150, 9);
            let turned: Vec<f32> = (0..512)
                .flat_map(|col| (0..150).map(move |row| (row, col)))
                .map(|(row, col)| weights[row * 512 + col])
                .collect();
            let error = relative(&rows_times_transposed(&y, weight), &product(&turned, &y, 512, 150));
            assert!(error < 1e-5, "{kind}, {tokens} tokens, transposed: {error}");
        }
    }
}
