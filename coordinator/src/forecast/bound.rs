//! What no schedule can beat: the linear relaxation of the makespan, from below.

/// Rounds of improving the prices.
const ROUNDS: u32 = 4_000;

/// A lower bound for the makespan of jobs on unequal devices, milliseconds.
///
/// Jobs may be cut at will in the relaxation: `min T` with `sum over k of x[j][k] = 1`, `sum over j of t[j][k] x[j][k] <= n[k] T`.
/// By duality every price vector `l >= 0` with `sum of n[k] l[k] = 1` gives the bound `sum over j of min over k of l[k] t[j][k]`; the
/// best found by exponentiated gradient steps is returned, and no job is shorter than its time on its fastest model.
/// `times[j][k]`: time of job j on device model k, infinite where it cannot run. `devices[k]`: how many there are.
pub fn makespan_ms(times: &[Vec<f64>], devices: &[u32]) -> f64 {
    let counts: Vec<f64> = devices.iter().map(|count| f64::from(*count)).collect();
    let usable: Vec<usize> = (0..counts.len()).filter(|k| counts[*k] > 0.0).collect();
    let longest =
        times.iter().map(|job| usable.iter().map(|k| job[*k]).fold(f64::INFINITY, f64::min)).fold(0.0, f64::max);
    let mut prices: Vec<f64> =
        counts.iter().map(|count| if *count > 0.0 { 1.0 / (count * usable.len() as f64) } else { 0.0 }).collect();
    let mut best = 0.0f64;
    for round in 0..ROUNDS {
        let mut asked = vec![0.0; counts.len()];
        let mut bound = 0.0;
        for job in times {
            let cost = |k: &usize| prices[*k] * job[*k];
            let Some(k) = usable.iter().copied().min_by(|a, b| cost(a).total_cmp(&cost(b))) else { continue };
            bound += cost(&k);
            asked[k] += job[k] / counts[k];
        }
        best = best.max(bound);
        let mean = usable.iter().map(|k| asked[*k]).sum::<f64>() / usable.len().max(1) as f64;
        if mean <= 0.0 {
            break;
        }
        let step = 0.5 / (1.0 + f64::from(round) / 20.0);
        for k in &usable {
            prices[*k] *= (step * (asked[*k] / mean - 1.0).clamp(-2.0, 2.0)).exp();
        }
        let total: f64 = usable.iter().map(|k| prices[*k] * counts[*k]).sum();
        usable.iter().for_each(|k| prices[*k] /= total);
    }
    best.max(longest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_relaxation_where_that_is_known_by_hand() {
        // Two devices alike, three jobs of 10: cut at will they take 15.
        let times = vec![vec![10.0]; 3];
        assert!((makespan_ms(&times, &[2]) - 15.0).abs() < 0.01);
        // A thousand jobs 100 or 10, a thousand 20 or 10, four slow and one fast: 8571 when 143 of the first kind go slow.
        let mut times = vec![vec![100.0, 10.0]; 1000];
        times.extend(vec![vec![20.0, 10.0]; 1000]);
        let bound = makespan_ms(&times, &[4, 1]);
        assert!((8_500.0..=8_572.0).contains(&bound), "{bound}");
    }

    #[test]
    fn a_job_is_never_shorter_than_on_its_fastest_device() {
        assert!((makespan_ms(&[vec![100.0, 50.0]], &[10, 10]) - 50.0).abs() < 1e-9);
    }
}
