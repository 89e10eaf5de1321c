//! Session threads that wait for a disk.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// What a write into the page cache takes, and more: by waiting for that of the write before, the next one needs no queue
/// and no copy of its bytes. Others wait no longer for their answers than for such a write.
const COMES_BACK_WITHIN: Duration = Duration::from_micros(150);

/// Lets one session thread at a time wait for a disk: the rest answer meanwhile.
#[derive(Default)]
pub struct Lender(AtomicBool);

/// Held while a session thread is lent to a disk.
pub struct Lent<'a>(&'a AtomicBool);

impl Lender {
    /// Lends the calling thread; `None` if another one is lent and does not come back in a moment.
    pub fn lend(&self) -> Option<Lent<'_>> {
        let start = Instant::now();
        while self.0.swap(true, Ordering::Acquire) {
            if start.elapsed() >= COMES_BACK_WITHIN {
                return None;
            }
            thread::yield_now();
        }
        Some(Lent(&self.0))
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thread_at_a_time_is_lent() {
        let lender = Lender::default();
        let lent = lender.lend();
        assert!(lent.is_some());
        assert!(lender.lend().is_none());
        drop(lent);
        assert!(lender.lend().is_some());
    }
}
