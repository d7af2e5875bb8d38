//! Arithmetic on rows of f32: norms, nonlinearities, softmax, rotation, sums.
//!
//! Plain loops, compiled for each level of vector instructions and chosen at run time (`pulp`); the results do not depend on
//! the number of threads. Sums have a fixed order, so the same processor gives the same bits. Does not know layers.

use half::f16;
use pulp::Arch;

/// Running sums of a reduction: as many as two of the widest registers hold, so that additions overlap.
const LANES: usize = 32;

/// x / rms(x) · weight, into `out`.
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let factor = 1.0 / (dot(x, x) / x.len() as f32 + epsilon).sqrt();
    Arch::new().dispatch(|| {
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * factor * weight;
        }
    });
}

/// The same in place.
pub(crate) fn rms_norm_in_place(x: &mut [f32], weight: &[f32], epsilon: f32) {
    let factor = 1.0 / (dot(x, x) / x.len() as f32 + epsilon).sqrt();
    Arch::new().dispatch(|| {
        for (x, weight) in x.iter_mut().zip(weight) {
            *x = *x * factor * weight;
        }
    });
}

/// What `dy`, the gradient of a normed row, means for the row `x`; in its place. y = x r w with r = (mean x² + ε)^-½:
/// dx = r w dy - x r³ mean(x w dy).
pub(crate) fn rms_norm_backward(x: &[f32], weight: &[f32], epsilon: f32, dy: &mut [f32]) {
    let factor = 1.0 / (dot(x, x) / x.len() as f32 + epsilon).sqrt();
    Arch::new().dispatch(|| dy.iter_mut().zip(weight).for_each(|(dy, weight)| *dy *= weight));
    let common = dot(x, dy) * factor * factor * factor / x.len() as f32;
    Arch::new().dispatch(|| dy.iter_mut().zip(x).for_each(|(dy, x)| *dy = *dy * factor - x * common));
}

/// a += b.
pub(crate) fn add(a: &mut [f32], b: &[f32]) {
    Arch::new().dispatch(|| a.iter_mut().zip(b).for_each(|(a, b)| *a += b));
}

/// gate = silu(gate) · up.
pub(crate) fn silu_times(gate: &mut [f32], up: &[f32]) {
    Arch::new().dispatch(|| {
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate = *gate * sigmoid(*gate) * up;
        }
    });
}

/// gate = gelu(gate) · up, GELU in its tanh form: x (1 + tanh u) / 2 = x σ(2u) with u = √(2/π) (x + 0.044715 x³).
pub(crate) fn gelu_times(gate: &mut [f32], up: &[f32]) {
    Arch::new().dispatch(|| {
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate = *gate * sigmoid(gelu_argument(*gate).0) * up;
        }
    });
}

/// What `dy`, the gradient of silu(gate) · up, means for the two; in their place.
pub(crate) fn silu_times_backward(gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
    Arch::new().dispatch(|| gated_backward(gate, up, dy, |x| (x, 1.0)));
}

/// The same for gelu(gate) · up.
pub(crate) fn gelu_times_backward(gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
    Arch::new().dispatch(|| gated_backward(gate, up, dy, gelu_argument));
}

/// For y = x σ(z) u: dx = σ (1 + x (1 - σ) z') u dy and du = x σ dy. `argument` gives z and z'.
#[inline(always)]
fn gated_backward(gate: &mut [f32], up: &mut [f32], dy: &[f32], argument: impl Fn(f32) -> (f32, f32)) {
    for ((gate, up), dy) in gate.iter_mut().zip(up).zip(dy) {
        let (x, u) = (*gate, *up);
        let (z, slope) = argument(x);
        let share = sigmoid(z);
        *gate = share * (1.0 + x * (1.0 - share) * slope) * u * dy;
        *up = x * share * dy;
    }
}

/// 2u of GELU's tanh form, and its slope.
#[inline(always)]
fn gelu_argument(x: f32) -> (f32, f32) {
    const TWICE_ROOT: f32 = 1.595_769_2;
    const CUBIC: f32 = 0.044_715;
    (TWICE_ROOT * (x + CUBIC * x * x * x), TWICE_ROOT * (1.0 + 3.0 * CUBIC * x * x))
}

/// softmax in place.
pub(crate) fn softmax(x: &mut [f32]) {
    let largest = maximum(x);
    let sum = Arch::new().dispatch(|| {
        x.iter_mut().for_each(|x| *x = exp(*x - largest));
        sum_of(x)
    });
    let inverse = 1.0 / sum;
    Arch::new().dispatch(|| x.iter_mut().for_each(|x| *x *= inverse));
}

/// What `dy`, the gradient of `y` = softmax(scale · x), means for x; in its place: dx = scale · y (dy - Σ y dy).
pub(crate) fn softmax_backward(dy: &mut [f32], y: &[f32], scale: f32) {
    let common = dot(dy, y);
    Arch::new().dispatch(|| dy.iter_mut().zip(y).for_each(|(dy, y)| *dy = scale * y * (*dy - common)));
}

/// ln Σ e^x.
pub(crate) fn log_sum_exp(x: &[f32]) -> f32 {
    let largest = maximum(x);
    let sum = Arch::new().dispatch(|| {
        let mut sums = [0.0_f32; LANES];
        let (chunks, tail) = x.as_chunks::<LANES>();
        for chunk in chunks {
            for lane in 0..LANES {
                sums[lane] += exp(chunk[lane] - largest);
            }
        }
        fold(&sums) + tail.iter().map(|x| exp(*x - largest)).sum::<f32>()
    });
    largest + sum.ln()
}

/// x *= factor.
pub(crate) fn scale(x: &mut [f32], factor: f32) {
    Arch::new().dispatch(|| x.iter_mut().for_each(|x| *x *= factor));
}

/// Inner product.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    Arch::new().dispatch(|| {
        let mut sums = [0.0_f32; LANES];
        let (a_chunks, a_tail) = a.as_chunks::<LANES>();
        let (b_chunks, b_tail) = b.as_chunks::<LANES>();
        for (a, b) in a_chunks.iter().zip(b_chunks) {
            for lane in 0..LANES {
                sums[lane] += a[lane] * b[lane];
            }
        }
        let tail: f32 = a_tail.iter().zip(b_tail).map(|(a, b)| a * b).sum();
        fold(&sums) + tail
    })
}

/// sum += factor · x.
pub(crate) fn add_scaled(sum: &mut [f32], factor: f32, x: &[f32]) {
    Arch::new().dispatch(|| sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += factor * x));
}

/// Turns the pairs (i, i + D/2) of one head by the angles whose cosines and sines are given, `[D/2]` each.
pub(crate) fn rotate(head: &mut [f32], cosines: &[f32], sines: &[f32]) {
    Arch::new().dispatch(|| {
        let (low, high) = head.split_at_mut(cosines.len());
        for (((low, high), cosine), sine) in low.iter_mut().zip(high).zip(cosines).zip(sines) {
            let (x, y) = (*low, *high);
            *low = x * cosine - y * sine;
            *high = y * cosine + x * sine;
        }
    });
}

/// Halves to f32, exactly.
pub(crate) fn widen(x: &[f16], out: &mut [f32]) {
    use half::slice::HalfFloatSliceExt;
    x.convert_to_f32_slice(out);
}

/// f32 to the nearest halves.
pub(crate) fn narrow(x: &[f32], out: &mut [f16]) {
    use half::slice::HalfFloatSliceExt;
    out.convert_from_f32_slice(x);
}

/// The largest number, -inf of none. NaN are skipped.
pub(crate) fn maximum(x: &[f32]) -> f32 {
    Arch::new().dispatch(|| {
        let mut largest = [f32::NEG_INFINITY; LANES];
        let (chunks, tail) = x.as_chunks::<LANES>();
        for chunk in chunks {
            for lane in 0..LANES {
                largest[lane] = if chunk[lane] > largest[lane] { chunk[lane] } else { largest[lane] };
            }
        }
        largest.iter().chain(tail).fold(f32::NEG_INFINITY, |largest, x| if *x > largest { *x } else { largest })
    })
}

#[inline(always)]
fn sum_of(x: &[f32]) -> f32 {
    let mut sums = [0.0_f32; LANES];
    let (chunks, tail) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            sums[lane] += chunk[lane];
        }
    }
    fold(&sums) + tail.iter().sum::<f32>()
}

/// Running sums to one, halving.
#[inline(always)]
fn fold(sums: &[f32; LANES]) -> f32 {
    let mut sums = *sums;
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// e^x within 2 units in the last place: 2^n · e^r with |r| ≤ ln 2 / 2, and Cephes' polynomial for e^r (`expf.c`).
/// 0 below about -87, +inf above 88.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // Adding and taking away 1.5 · 2^23 rounds to a whole number, without a call.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // NaN goes through both comparisons and stays.
    let clamped = if x > 89.0 { 89.0 } else { x };
    let clamped = if clamped < -104.0 { -104.0 } else { clamped };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let whole = shifted - ROUND;
    let rest = clamped - whole * LN_2_HIGH - whole * LN_2_LOW;
    let mut polynomial = 1.987_569_1e-4_f32;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        polynomial = polynomial * rest + coefficient;
    }
    let fraction = polynomial * rest * rest + rest + 1.0;
    // The exponent in two halves, so that neither leaves the range of f32 before the product does.
    let power = shifted.to_bits().wrapping_sub(ROUND.to_bits()).cast_signed();
    let half = power >> 1;
    fraction * two_to(half) * two_to(power - half)
}

#[inline(always)]
fn two_to(power: i32) -> f32 {
    f32::from_bits(((power + 127) << 23).cast_unsigned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: f32, want: f64, relative: f64) -> bool {
        (f64::from(got) - want).abs() <= relative * want.abs().max(1e-30)
    }

    #[test]
    fn exp_is_exact_to_rounding() {
        for step in -860..=880 {
            let x = step as f32 * 0.1 + 0.013;
            assert!(close(exp(x), f64::from(x).exp(), 3e-7), "exp({x}) = {}", exp(x));
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-200.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(200.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn nonlinearities_are_their_formulas() {
        for step in -200..=200 {
            let x = step as f32 * 0.1;
            let wide = f64::from(x);
            let (mut silu, mut gelu) = ([x; 3], [x; 3]);
            silu_times(&mut silu, &[2.0; 3]);
            gelu_times(&mut gelu, &[2.0; 3]);
            assert!(close(silu[1], 2.0 * wide / (1.0 + (-wide).exp()), 2e-6), "silu({x})");
            let u = (2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044715 * wide.powi(3));
            let want = wide * (1.0 + u.tanh());
            assert!(close(gelu[1], want, 2e-5) || (f64::from(gelu[1]) - want).abs() < 1e-7, "gelu({x})");
        }
    }

    #[test]
    fn rows_are_normed_summed_and_turned() {
        for count in [1, 31, 32, 33, 100] {
            let x: Vec<f32> = (0..count).map(|i| (i as f32 * 0.7 + 0.5).sin()).collect();
            let want: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
            assert!(close(dot(&x, &x), want, 1e-5));
            assert_eq!(maximum(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let mut normed = x.clone();
            rms_norm(&x, &vec![1.0; count], 0.0, &mut normed);
            assert!(close(dot(&normed, &normed), count as f64, 1e-5));
            let mut again = x.clone();
            rms_norm_in_place(&mut again, &vec![1.0; count], 0.0);
            assert_eq!(again, normed);
            let mut shares = x.clone();
            shares[0] = f32::NEG_INFINITY;
            if count > 1 {
                softmax(&mut shares);
                assert!(close(shares.iter().sum(), 1.0, 1e-6) && shares[0] == 0.0);
            }
        }
        let mut head = [1.0, 2.0, 3.0, 4.0];
        rotate(&mut head, &[0.0, 1.0], &[1.0, 0.0]);
        assert_eq!(head, [-3.0, 2.0, 1.0, 4.0]);
    }
}
