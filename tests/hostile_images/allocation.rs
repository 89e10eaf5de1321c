//! How much memory a thread has asked for: this test program's allocator counts.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    /// Bytes held now, and the most since the last [`peak_of`].
    static HELD: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

fn count(bytes: isize) {
    // While a thread ends its counter is gone already.
    let _ended = HELD.try_with(|held| {
        let now = held.get().0 + bytes;
        held.set((now, now.max(held.get().1)));
    });
}

// SAFETY: every call is handed on to the system's allocator as it is; counting neither allocates nor panics.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are those that the system's allocator wants.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

/// The most bytes that this thread held at once, beyond what it held before, while it did something.
pub fn peak_of<T>(what: impl FnOnce() -> T) -> (T, usize) {
    let before = HELD.with(|held| {
        held.set((held.get().0, held.get().0));
        held.get().0
    });
    let result = what();
    let peak = HELD.with(|held| held.get().1);
    (result, usize::try_from(peak - before).unwrap_or_default())
}

#[test]
fn the_allocator_counts() {
    let (_, peak) = peak_of(|| drop(std::hint::black_box(vec![1u8; 5 << 20])));
    assert!((5 << 20..6 << 20).contains(&peak), "{peak}");
}
