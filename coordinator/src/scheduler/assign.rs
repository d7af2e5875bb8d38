//! Which of many jobs goes to which of several unequal devices so that the last one ends early: sufferage, then bounded
//! improvement.
//!
//! Minimising the makespan on unrelated machines is NP-hard; sufferage (who loses most if its best device is taken goes first)
//! and local moves come within a few percent of the linear relaxation where it was measured (`make bench-placement`). Only
//! numbers here: times are milliseconds, [`NEVER`] where a job must not go.

/// A time that is none: the job cannot run there.
pub const NEVER: u64 = u64::MAX;

/// Jobs of one kind, all alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// How many.
    pub count: usize,
    /// Time on each device, milliseconds.
    pub times: Vec<u64>,
}

/// For each device the kinds of job that it is to run; their order is nobody's business here.
pub type Plan = Vec<Vec<usize>>;

/// Plans `jobs` on devices that are free from `ready` on, better than `before` or the same: jobs of `before` that are no
/// longer there are dropped, new ones put in. Without a plan from before a good one would be thrown away each time a device
/// gets free, for one that greed finds. Jobs that fit nowhere are left out.
pub fn plan(jobs: &[Job], ready: &[u64], before: Plan, moves_max: usize) -> Plan {
    let fresh = complete(jobs, ready, vec![Vec::new(); ready.len()], moves_max);
    if before.iter().all(Vec::is_empty) {
        return fresh.0;
    }
    let kept = complete(jobs, ready, prune(jobs, before), moves_max);
    let last = |ends: &[u64]| ends.iter().copied().max();
    if last(&fresh.1) < last(&kept.1) { fresh.0 } else { kept.0 }
}

fn complete(jobs: &[Job], ready: &[u64], mut plan: Plan, moves_max: usize) -> (Plan, Vec<u64>) {
    plan.resize(ready.len(), Vec::new());
    let mut ends = ends(jobs, ready, &plan);
    sufferage(jobs, &mut plan, &mut ends);
    improve(jobs, &mut plan, &mut ends, moves_max);
    (plan, ends)
}

/// `plan` without what is not to be run any more, or not there.
fn prune(jobs: &[Job], mut plan: Plan) -> Plan {
    let mut left: Vec<usize> = jobs.iter().map(|job| job.count).collect();
    for (at, kinds) in plan.iter_mut().enumerate() {
        kinds.retain(|kind| {
            let keep = left.get(*kind).is_some_and(|left| *left > 0) && jobs[*kind].times[at] != NEVER;
            if keep {
                left[*kind] -= 1;
            }
            keep
        });
    }
    plan
}

/// When each device ends under a plan.
pub fn ends(jobs: &[Job], ready: &[u64], plan: &Plan) -> Vec<u64> {
    let load = |at: usize| plan[at].iter().map(|job| jobs[*job].times[at]).fold(0, u64::saturating_add);
    (0..ready.len()).map(|at| ready[at].saturating_add(load(at))).collect()
}

/// Puts in what `plan` does not have yet: again and again the job that loses most if its best device is taken.
fn sufferage(jobs: &[Job], plan: &mut Plan, ends: &mut [u64]) {
    let mut left: Vec<usize> = jobs.iter().map(|job| job.count).collect();
    plan.iter().flatten().for_each(|kind| left[*kind] -= 1);
    loop {
        let mut chosen: Option<(u64, u64, usize, usize)> = None;
        for (index, job) in jobs.iter().enumerate().filter(|(index, _)| left[*index] > 0) {
            let Some((best_end, at, second_end)) = two_best(job, ends) else { continue };
            let loss = second_end.saturating_sub(best_end);
            // Among equals the longer one: short ones fill gaps later.
            if chosen.is_none_or(|(worst, length, _, _)| (loss, job.times[at]) > (worst, length)) {
                chosen = Some((loss, job.times[at], index, at));
            }
        }
        let Some((_, length, index, at)) = chosen else { return };
        left[index] -= 1;
        plan[at].push(index);
        ends[at] = ends[at].saturating_add(length);
    }
}

/// Earliest end of a job, where, and the earliest elsewhere.
fn two_best(job: &Job, ends: &[u64]) -> Option<(u64, usize, u64)> {
    let (mut best, mut second) = (None, NEVER);
    for (at, (time, end)) in job.times.iter().zip(ends).enumerate() {
        if *time == NEVER {
            continue;
        }
        let end = end.saturating_add(*time);
        match best {
            Some((first, _)) if end >= first => second = second.min(end),
            Some((first, _)) => {
                second = first;
                best = Some((end, at));
            }
            None => best = Some((end, at)),
        }
    }
    // Only one device will do: nothing to lose by waiting, all to lose by giving it away.
    best.map(|(end, at)| (end, at, second))
}

/// Moves and swaps jobs of the device that ends last while that makes the end earlier.
fn improve(jobs: &[Job], plan: &mut Plan, ends: &mut [u64], moves_max: usize) {
    for _ in 0..moves_max {
        let Some(last) = (0..ends.len()).filter(|at| !plan[*at].is_empty()).max_by_key(|at| ends[*at]) else { return };
        let Some(change) = best_change(jobs, plan, ends, last) else { return };
        let job = plan[last].swap_remove(change.mine);
        ends[last] -= jobs[job].times[last];
        if let Some(theirs) = change.theirs {
            let other = plan[change.to].swap_remove(theirs);
            ends[change.to] -= jobs[other].times[change.to];
            ends[last] += jobs[other].times[last];
            plan[last].push(other);
        }
        ends[change.to] += jobs[job].times[change.to];
        plan[change.to].push(job);
    }
}

/// One job of the last device goes to another, perhaps against one of its own.
struct Change {
    mine: usize,
    to: usize,
    theirs: Option<usize>,
}

fn best_change(jobs: &[Job], plan: &Plan, ends: &[u64], last: usize) -> Option<Change> {
    let mut best = (ends[last], u64::MAX);
    let mut change = None;
    for (mine, job) in plan[last].iter().enumerate() {
        let freed = ends[last] - jobs[*job].times[last];
        for to in (0..ends.len()).filter(|to| *to != last) {
            let time = jobs[*job].times[to];
            if time == NEVER {
                continue;
            }
            let landed = ends[to].saturating_add(time);
            // Of equal ends the one that costs less machine time.
            let mut consider = |end: u64, cost: u64, theirs: Option<usize>| {
                if end < ends[last] && (end, cost) < best {
                    best = (end, cost);
                    change = Some(Change { mine, to, theirs });
                }
            };
            consider(freed.max(landed), freed.saturating_add(landed), None);
            for (theirs, other) in plan[to].iter().enumerate() {
                let back = jobs[*other].times[last];
                if back == NEVER || other == job {
                    continue;
                }
                let (mine_end, their_end) = (freed.saturating_add(back), landed - jobs[*other].times[to]);
                consider(mine_end.max(their_end), mine_end.saturating_add(their_end), Some(theirs));
            }
        }
    }
    change
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(count: usize, times: &[u64]) -> Job {
        Job { count, times: times.to_vec() }
    }

    fn makespan(jobs: &[Job], ready: &[u64]) -> u64 {
        let plan = plan(jobs, ready, Plan::new(), 100);
        ends(jobs, ready, &plan).into_iter().max().unwrap()
    }

    #[test]
    fn each_goes_where_it_is_fast() {
        let jobs = [job(3, &[10, 100]), job(3, &[100, 10])];
        assert_eq!(makespan(&jobs, &[0, 0]), 30);
    }

    #[test]
    fn it_waits_for_a_fast_device_rather_than_start_on_a_slow_one() {
        let plan = plan(&[job(1, &[100, 10])], &[0, 20], Plan::new(), 10);
        assert_eq!(plan, [vec![], vec![0]]);
    }

    #[test]
    fn what_fits_nowhere_is_left_out_and_what_fits_one_place_gets_it() {
        let jobs = [job(1, &[NEVER, NEVER]), job(2, &[5, NEVER]), job(2, &[6, 5])];
        assert_eq!(plan(&jobs, &[0, 0], Plan::new(), 10), [vec![1, 1], vec![2, 2]]);
    }

    #[test]
    fn improvement_finds_what_greed_missed() {
        // Sufferage alone ends at 9 or later; 3+3, 2+2+2 is 6.
        let jobs = [job(2, &[3, 3]), job(3, &[2, 2])];
        assert_eq!(makespan(&jobs, &[0, 0]), 6);
    }
}
