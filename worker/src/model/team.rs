//! The threads that compute together: one small loop after another, without a system call in between.
//!
//! A decode step is a few hundred loops of some microseconds each, more than a work-stealing pool hands over in that time:
//! its threads go to sleep between two of them. Here they spin a little before they sleep, and give their core away while
//! they wait for a member that has none. One team a process ([`team`]); a loop that is started while another runs, by another
//! thread or from inside, runs on the thread that started it. Does not know what is computed.

#![expect(
    unsafe_code,
    reason = "a loop's closure is lent to threads that outlive it, and its output is split among them"
)]

use std::any::Any;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{JoinHandle, Thread};

/// Turns of waiting before a member sleeps: about 0.2 ms, longer than the serial work between two loops of a pass.
const SPINS_BEFORE_SLEEP: u32 = 20_000;
/// Turns of waiting before the starter gives its core away each turn: a member may be waiting for it.
const SPINS_BEFORE_YIELD: u32 = 2_000;

/// This process's team: as many threads as rayon was told to use, the starter of a loop among them.
pub fn team() -> &'static Team {
    static TEAM: OnceLock<Team> = OnceLock::new();
    TEAM.get_or_init(|| Team::new(rayon::current_num_threads()))
}

/// Threads that wait for loops.
#[derive(Debug)]
pub struct Team {
    shared: Arc<Shared>,
    members: Vec<JoinHandle<()>>,
    handles: Vec<Thread>,
    /// Held by who runs a loop.
    turn: Mutex<()>,
}

/// A loop's body as members see it: called once by each.
type Body = dyn Fn() + Sync;

#[derive(Debug, Default)]
struct Shared {
    /// Counts loops; a member that sees a new number takes part.
    round: AtomicUsize,
    /// Written by the starter before the round, read by members within it.
    body: Slot,
    /// Members that have not finished this round.
    busy: AtomicUsize,
    stop: AtomicBool,
    /// The first panic of a member in this round.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

#[derive(Default)]
struct Slot(std::cell::UnsafeCell<Option<*const Body>>);

// SAFETY: written only by the holder of the turn while no member is busy; the release of `round` orders it before every read.
unsafe impl Sync for Slot {}
// SAFETY: the pointer is to a `Sync` closure, and is followed only while its owner waits.
unsafe impl Send for Slot {}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Slot")
    }
}

impl Team {
    /// A team of `size` threads, at least 1: the starter of a loop and `size` - 1 of its own.
    pub fn new(size: usize) -> Self {
        let shared = Arc::new(Shared::default());
        // A machine that gives no more threads still computes, with those that came.
        let members: Vec<_> = (1..size)
            .map_while(|index| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new().name(format!("team-{index}")).spawn(move || member(&shared)).ok()
            })
            .collect();
        let handles = members.iter().map(|member| member.thread().clone()).collect();
        Self { shared, members, handles, turn: Mutex::new(()) }
    }

    /// Number of threads.
    pub fn size(&self) -> usize {
        self.members.len() + 1
    }

    /// Calls `task` with every number below `count`, in no order, and returns when all calls have.
    ///
    /// # Panics
    /// If a task does.
    pub fn each(&self, count: usize, task: impl Fn(usize) + Sync) {
        let turn = (count > 1 && !self.members.is_empty()).then(|| self.turn.try_lock());
        let Some(Ok(_turn)) = turn else {
            (0..count).for_each(task);
            return;
        };
        let next = AtomicUsize::new(0);
        self.run(&|| {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= count {
                    break;
                }
                task(index);
            }
        });
    }

    /// Splits `data` into chunks of `size` (the last may be shorter) and calls `task` with each and its number.
    ///
    /// # Panics
    /// If `size` is 0, or a task panics.
    pub fn chunks<T: Send>(&self, data: &mut [T], size: usize, task: impl Fn(usize, &mut [T]) + Sync) {
        assert!(size > 0, "chunks have a size");
        let (length, start) = (data.len(), Lent(data.as_mut_ptr()));
        self.each(length.div_ceil(size), |index| {
            let first = index * size;
            // SAFETY: chunks of different numbers do not overlap, each number is used once, and `data` is borrowed throughout.
            let chunk = unsafe { std::slice::from_raw_parts_mut(start.at(first), size.min(length - first)) };
            task(index, chunk);
        });
    }

    /// One round: the starter and all members call `body`.
    fn run(&self, body: &(dyn Fn() + Sync)) {
        // SAFETY: only the lifetime is erased; `Round` waits for all members before `body` can go, on a panic too.
        let body_forever = unsafe { std::mem::transmute::<*const (dyn Fn() + Sync + '_), *const Body>(body) };
        // SAFETY: the caller holds the turn and the last round has ended, so nobody reads the slot.
        unsafe { *self.shared.body.0.get() = Some(body_forever) };
        self.shared.busy.store(self.members.len(), Ordering::Relaxed);
        self.shared.round.fetch_add(1, Ordering::Release);
        // Costs no system call for a member that is awake.
        self.handles.iter().for_each(Thread::unpark);
        let round = Round(&self.shared);
        body();
        drop(round);
        let panic = self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.handles.iter().for_each(Thread::unpark);
        for member in self.members.drain(..) {
            // A member catches every panic of a task.
            let _ = member.join();
        }
    }
}

/// Ends when all members have.
struct Round<'a>(&'a Shared);

impl Drop for Round<'_> {
    fn drop(&mut self) {
        let mut turns = 0;
        while self.0.busy.load(Ordering::Acquire) > 0 {
            turns += 1;
            if turns < SPINS_BEFORE_YIELD { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }
}

/// The start of an output that tasks split among themselves.
struct Lent<T>(*mut T);

// SAFETY: whoever uses the pointer says why its parts do not overlap; `T: Send` lets them be written elsewhere.
unsafe impl<T: Send> Sync for Lent<T> {}

impl<T> Lent<T> {
    /// # Safety
    /// `offset` lies inside the slice that the pointer came from.
    unsafe fn at(&self, offset: usize) -> *mut T {
        // SAFETY: the caller's.
        unsafe { self.0.add(offset) }
    }
}

/// A member's life: wait for a round, take part, say so.
fn member(shared: &Shared) {
    let mut seen = 0;
    let mut turns = 0;
    loop {
        let round = shared.round.load(Ordering::Acquire);
        if round == seen {
            if shared.stop.load(Ordering::Acquire) {
                return;
            }
            turns += 1;
            if turns < SPINS_BEFORE_SLEEP {
                std::hint::spin_loop();
            } else {
                std::thread::park();
            }
            continue;
        }
        (seen, turns) = (round, 0);
        // SAFETY: the starter wrote it before this round, and waits for `busy` before it goes.
        let body = unsafe { (*shared.body.0.get()).map(|body| &*body) };
        let done = catch_unwind(AssertUnwindSafe(|| body.into_iter().for_each(|body| body())));
        if let Err(panic) = done {
            shared.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
        shared.busy.fetch_sub(1, Ordering::Release);
    }
}

/// Lends this thread's scratch memory, of at least `length` numbers with any content; grows once and stays. Inside itself
/// it lends fresh memory.
pub fn with_scratch<R>(length: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    thread_local! {
        static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    let mut scratch = SCRATCH.take();
    if scratch.len() < length {
        scratch.resize(length, 0.0);
    }
    let result = work(&mut scratch[..length]);
    SCRATCH.replace(scratch);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_used_once() {
        for size in [1, 2, 5] {
            let team = Team::new(size);
            for count in [0, 1, 2, 7, 1000] {
                let mut seen = vec![0_u32; count];
                team.chunks(&mut seen, 3, |index, chunk| {
                    chunk.iter_mut().for_each(|value| *value += 1 + u32::try_from(index).unwrap());
                });
                let expected: Vec<u32> = (0..count).map(|place| 1 + u32::try_from(place / 3).unwrap()).collect();
                assert_eq!(seen, expected, "{size} threads");
            }
        }
    }

    #[test]
    fn loops_inside_loops_and_beside_them_run() {
        let team = Team::new(3);
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        team.each(5, |_| {
                            team.each(3, |_| {
                                total.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 200 * 15);
    }

    #[test]
    fn a_panic_reaches_the_starter_and_the_team_goes_on() {
        let team = Team::new(2);
        for bad in [0, 99] {
            let failed = catch_unwind(AssertUnwindSafe(|| team.each(100, |index| assert_ne!(index, bad, "boom"))));
            assert!(failed.is_err());
        }
        let count = AtomicUsize::new(0);
        team.each(100, |_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 100);
    }

    #[test]
    fn sleeping_members_wake() {
        let team = Team::new(2);
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(20));
            let threads = Mutex::new(std::collections::BTreeSet::new());
            team.each(2, |_| {
                threads.lock().unwrap().insert(format!("{:?}", std::thread::current().id()));
                // The other number is left to the other thread.
                let mut turns = 0_u64;
                while threads.lock().unwrap().len() < 2 && turns < 50_000_000 {
                    turns += 1;
                    std::thread::yield_now();
                }
            });
            assert_eq!(threads.into_inner().unwrap().len(), 2);
        }
    }
}
