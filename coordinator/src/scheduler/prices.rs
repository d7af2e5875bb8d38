//! What an hour of each device model is worth while much work waits: the prices under which every class goes where it is cheap
//! and every device stays busy.
//!
//! The dual of `min T, sum over c of t[c][k] x[c][k] <= T n[k]`: any prices `l[k] >= 0` with `sum of n[k] l[k] = 1` bound the
//! makespan from below by the sum over work of `min over k of l[k] t[c][k]`, and the best prices say which class belongs on
//! which model. Found by raising the price of what is asked for too much, in whole numbers. Used where shards are too many to
//! be planned one by one: classes and device models are compared, never shards or devices.

use super::assign::NEVER;

/// Rounds of adjusting: each moves prices by less than the one before.
const ROUNDS: u64 = 96;
/// Scale of prices.
const ONE: u64 = 1 << 20;

/// Work of one class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Load {
    /// Number of shards.
    pub count: u64,
    /// Time of one on each device model, milliseconds; [`NEVER`] where it cannot run.
    pub times: Vec<u64>,
}

/// A price for a millisecond of each device model, for `devices` of each.
pub fn prices(loads: &[Load], devices: &[u64]) -> Vec<u64> {
    let mut prices = vec![ONE; devices.len()];
    let mut sums = vec![0u128; devices.len()];
    for round in 0..ROUNDS {
        let asked = asked(loads, &prices, devices);
        let used: Vec<u128> =
            asked.iter().zip(devices).filter(|(_, count)| **count > 0).map(|(load, _)| *load).collect();
        let mean = used.iter().sum::<u128>() / u128::try_from(used.len().max(1)).unwrap_or(1);
        if mean == 0 {
            break;
        }
        for (price, load) in prices.iter_mut().zip(&asked) {
            // By at most a fifth, less in each round.
            let step = 200 * 16 / (16 + round);
            let over = i128::try_from(load.min(&(2 * mean)) * 1000 / mean).unwrap_or(1000) - 1000;
            let factor = 1000 + over * i128::from(step) / 1000;
            let moved = i128::from(*price) * factor / 1000;
            *price = u64::try_from(moved.clamp(1, i128::from(ONE) << 24)).unwrap_or(ONE);
        }
        // What swings around the answer is right on average.
        if round >= ROUNDS / 2 {
            sums.iter_mut().zip(&prices).for_each(|(sum, price)| *sum += u128::from(*price));
        }
    }
    let averaged = |sum: &u128| u64::try_from(sum / u128::from(ROUNDS / 2)).unwrap_or(ONE).max(1);
    if sums.iter().all(|sum| *sum == 0) { prices } else { sums.iter().map(averaged).collect() }
}

/// How much dearer a load is on model `at` than where it is cheapest, in thousandths; `None` where it cannot run.
pub fn dearness(load: &Load, prices: &[u64], at: usize) -> Option<u64> {
    let cost =
        |at: usize| (load.times[at] != NEVER).then(|| u128::from(load.times[at].max(1)) * u128::from(prices[at]));
    let here = cost(at)?;
    let least = (0..prices.len()).filter_map(cost).min()?;
    u64::try_from(here * 1000 / least.max(1)).ok()
}

/// Milliseconds asked of one device of each model when every load goes where it is cheapest.
fn asked(loads: &[Load], prices: &[u64], devices: &[u64]) -> Vec<u128> {
    let mut asked = vec![0u128; prices.len()];
    for load in loads {
        let cost = |at: &usize| u128::from(load.times[*at].max(1)) * u128::from(prices[*at]);
        let usable = (0..prices.len()).filter(|at| devices[*at] > 0 && load.times[*at] != NEVER);
        if let Some(at) = usable.min_by_key(cost) {
            asked[at] += u128::from(load.count) * u128::from(load.times[at].max(1)) / u128::from(devices[at].max(1));
        }
    }
    asked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_class_is_cheapest_where_it_belongs() {
        // One class is ten times faster on the second model, the other only twice; the second model is scarce.
        let loads = [Load { count: 500, times: vec![100, 10] }, Load { count: 1000, times: vec![20, 10] }];
        let prices = prices(&loads, &[4, 1]);
        assert_eq!(dearness(&loads[0], &prices, 1), Some(1000));
        assert_eq!(dearness(&loads[1], &prices, 0), Some(1000));
        assert!(dearness(&loads[0], &prices, 0).unwrap() > 1500);
    }

    #[test]
    fn one_class_alone_uses_every_device() {
        let loads = [Load { count: 1000, times: vec![100, 10] }];
        let prices = prices(&loads, &[1, 1]);
        for at in [0, 1] {
            assert!(dearness(&loads[0], &prices, at).unwrap() < 1300, "{prices:?}");
        }
    }

    #[test]
    fn where_a_class_cannot_run_it_has_no_price() {
        let loads = [Load { count: 5, times: vec![NEVER, 10] }];
        assert_eq!(dearness(&loads[0], &prices(&loads, &[1, 1]), 0), None);
    }
}
