//! Keeping little, and giving back what was needed for a moment.

/// From so many bytes on a piece is large.
const LARGE: libc::c_int = 8 << 20;

/// Has the allocator keep as little as it can of what is not used any more; before there are threads.
///
/// By itself it would keep large pieces once one was freed, and later give them to the buffers of requests, of which the
/// most is never used. And each thread would have a heap of its own, with what others need between what nobody does.
pub fn keep_little() {
    for (parameter, value) in [(libc::M_MMAP_THRESHOLD, LARGE), (libc::M_ARENA_MAX, 1)] {
        // SAFETY: it takes no pointer; glibc locks its parameters (mallopt(3)).
        let _whether_it_was_taken = unsafe { libc::mallopt(parameter, value) };
    }
}

/// Returns to the host what the allocator holds and nobody uses: after thousands of definitions were read, that is as much
/// as everything that stays.
pub fn give_back() {
    // SAFETY: it takes no pointer, and may be called by any thread at any time (MT-Safe, malloc_trim(3)).
    let _whether_there_was_any = unsafe { libc::malloc_trim(0) };
}
