//! The system's allocator, counting what is held, the most that was held at once, and the largest single request.
//!
//! Counts are of the whole process, so measurements take turns.
#![allow(unsafe_code, reason = "an allocator is unsafe by its trait; every call goes to the system's, unchanged")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Mutex, PoisonError};

#[global_allocator]
static COUNTING: Counting = Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);
static TURN: Mutex<()> = Mutex::new(());

struct Counting;

// SAFETY: every call is the system allocator's, with the caller's arguments; counting touches no memory of theirs.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        taken(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        taken(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), SeqCst);
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // A block that moves is there twice for a moment.
        taken(size);
        HELD.fetch_sub(layout.size(), SeqCst);
        unsafe { System.realloc(pointer, layout, size) }
    }
}

fn taken(size: usize) {
    let held = HELD.fetch_add(size, SeqCst) + size;
    PEAK.fetch_max(held, SeqCst);
    LARGEST.fetch_max(size, SeqCst);
}

/// What a piece of work took, in bytes beyond what was held before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Usage {
    /// The most at any moment.
    pub(crate) peak: usize,
    /// The largest single request.
    pub(crate) largest: usize,
    /// What is still held, in the result.
    pub(crate) kept: usize,
}

/// Runs `work` and counts. Waits for its turn: what other threads of the process take in between would be counted too.
pub(crate) fn measure<R>(work: impl FnOnce() -> R) -> (R, Usage) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let before = HELD.load(SeqCst);
    PEAK.store(before, SeqCst);
    LARGEST.store(0, SeqCst);
    let result = work();
    let usage = Usage {
        peak: PEAK.load(SeqCst) - before,
        largest: LARGEST.load(SeqCst),
        kept: HELD.load(SeqCst).saturating_sub(before),
    };
    (result, usage)
}

#[test]
fn counts_what_is_taken() {
    let (kept, usage) = measure(|| {
        drop(vec![1_u8; 1 << 20]);
        vec![2_u8; 1 << 16]
    });
    assert_eq!(kept.len(), 1 << 16);
    assert!(usage.largest >= 1 << 20 && usage.peak >= 1 << 20 && usage.peak < 3 << 20, "{usage:?}");
    assert!(usage.kept >= 1 << 16 && usage.kept < 1 << 20, "{usage:?}");
}
