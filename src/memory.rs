//! Giving back what was needed for a moment.

/// Returns to the host what the allocator holds and nobody uses: after thousands of definitions were read, that is as much
/// as everything that stays.
pub fn give_back() {
    // SAFETY: it takes no pointer, and may be called by any thread at any time (MT-Safe, malloc_trim(3)).
    let _whether_there_was_any = unsafe { libc::malloc_trim(0) };
}
