//! Whether a draft's file is as we left it.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// How often the kernel's clock is looked at, a millisecond apart, until it has moved on.
const MOST_TICKS: u32 = 100;

/// What changes when somebody writes the file past us.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Fingerprint {
    pub(super) length: u64,
    modified: (i64, i64),
}

impl Fingerprint {
    pub(super) fn of(file: &File) -> io::Result<Fingerprint> {
        let metadata = file.metadata()?;
        Ok(Fingerprint { length: metadata.len(), modified: (metadata.mtime(), metadata.mtime_nsec()) })
    }

    /// One that every later change differs from: file times stand still for a tick of the kernel's clock (1 to 10 ms),
    /// so this waits until that clock has left the time of the last change. A time in the future is not waited for.
    pub(super) fn settled(file: &File) -> io::Result<Fingerprint> {
        for _ in 0..MOST_TICKS {
            let clock = clock_gettime(ClockId::CLOCK_REALTIME_COARSE)?;
            let now = Fingerprint::of(file)?;
            if (clock.tv_sec(), clock.tv_nsec()) > now.modified {
                return Ok(now);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Fingerprint::of(file)
    }
}
