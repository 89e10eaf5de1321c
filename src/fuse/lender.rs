//! Session threads that wait for a disk.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

/// Microseconds. What a write into the page cache takes, also if its bytes are in another processor's cache: by waiting
/// for that of the write before, the next one needs no queue and no copy of its bytes. Others wait no longer for their
/// answers than for such a write.
const SOON_BACK: u64 = 300;

/// No thread is lent.
const NONE: u64 = 0;

/// Lets one session thread at a time wait for a disk: the rest answer meanwhile.
pub struct Lender {
    start: Instant,
    /// Since when one is lent, in microseconds from 1 on; or [`NONE`].
    since: AtomicU64,
}

/// Held while a session thread is lent to a disk.
pub struct Lent<'a>(&'a AtomicU64);

impl Lender {
    /// All threads are here.
    pub fn new() -> Lender {
        Lender { start: Instant::now(), since: AtomicU64::new(NONE) }
    }

    /// Lends the calling thread; `None` if another one is lent, which is waited for only if it has just gone.
    pub fn lend(&self) -> Option<Lent<'_>> {
        let asked = self.now();
        loop {
            let now = self.now();
            match self.since.compare_exchange(NONE, now, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(Lent(&self.since)),
                Err(since) if now >= since.min(asked) + SOON_BACK => return None,
                Err(_) => thread::yield_now(),
            }
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX / 2) + 1
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.0.store(NONE, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thread_at_a_time_is_lent() {
        let lender = Lender::new();
        let lent = lender.lend();
        assert!(lent.is_some());
        assert!(lender.lend().is_none());
        drop(lent);
        assert!(lender.lend().is_some());
    }
}
