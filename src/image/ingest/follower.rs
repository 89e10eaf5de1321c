//! The hash that follows the writers of a draft.
//!
//! It reads behind them, from the page cache: no writer waits for it, and no bytes are kept for it in memory. Who hashes
//! a part claims it before, and never one that is being changed. A change of a claimed byte begins a new generation, and a
//! hash of another generation than the present one counts for nothing.
//!
//! It takes only what the processors have left (`SCHED_IDLE`), so it holds no lock that a writer waits for but for a few
//! instructions: a writer would wait until there is nothing else to do. The kernel's count as well: lseek(2) takes the
//! file's lock that write(2) takes, so no holes are looked for where the writers are known to have left none; and a read
//! that is to change the file's access time begins a transaction of the file system, so it must not.
//!
//! Writers that are faster than any hash (a copy from memory, or between two files of a fast disk) are left alone until
//! they are slower or pause: the hash would gain little on them, and they need the processors' caches and the memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use openssl::sha::Sha512;

use crate::image::extent::{Find, find};

/// What is read and hashed at a time; small enough for a processor's cache.
pub const PART: usize = 256 << 10;
/// How far behind the furthest write: several writers, and qemu-img with its coroutines, come a little out of order.
const BEHIND: u64 = 8 << 20;
/// What must be there for following to begin: a thread is not started for less.
const WORTHWHILE: u64 = 8 << 20;
/// A draft that was rewritten so often is a disk in use, which only the commit hashes.
const MOST_RESTARTS: u32 = 4;

/// Bytes in a second from which on writers are left alone: more than one processor hashes.
const FAST: u64 = 1 << 30;
/// How long the writers' speed is measured.
pub const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Lets every other thread of the machine go first. If that is not possible it only costs speed.
pub fn give_way() {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: 0 is the calling thread, and the parameters are read during the call only.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &parameters) } != 0 {
        log::debug!("drafts are hashed at full priority: {}", io::Error::last_os_error());
    }
}

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// What the hash knows of the writers; its lock is held for a moment only.
#[derive(Default)]
pub struct Arrived {
    generation: u64,
    /// In this generation `[0, claimed)` is, or is being, hashed.
    claimed: u64,
    /// Where the furthest write ended, since the last restart.
    frontier: u64,
    /// `[0, gapless)` was written since the file was opened: there are no holes to look for.
    gapless: u64,
    restarts: u32,
    /// Somebody follows.
    followed: bool,
    /// Where the change begins that is being made; there is one at a time.
    changing: Option<u64>,
    /// A commit hashes the rest itself.
    paused: bool,
}

impl Arrived {
    /// Bytes from `start` on are about to change; until [`Arrived::has_changed`] none of them is claimed.
    pub fn changes(&mut self, start: u64) {
        self.forget(start);
        self.changing = Some(start);
    }

    /// The change was made, or has failed.
    pub fn has_changed(&mut self) {
        self.changing = None;
    }

    /// What was hashed from `start` on counts no more.
    pub fn forget(&mut self, start: u64) {
        if start < self.claimed {
            self.generation += 1;
            self.claimed = 0;
            // The writer goes on from here, and what lies beyond is old.
            self.frontier = 0;
            self.restarts = self.restarts.saturating_add(1);
        }
    }

    /// `[start, end)` was written.
    pub fn wrote(&mut self, start: u64, end: u64) {
        self.frontier = self.frontier.max(end);
        if start <= self.gapless {
            self.gapless = self.gapless.max(end);
        }
    }

    /// From `start` on there may be holes.
    pub fn has_holes(&mut self, start: u64) {
        self.gapless = self.gapless.min(start);
    }

    /// The file was cut or extended to `length`.
    pub fn has_length(&mut self, length: u64) {
        self.frontier = self.frontier.min(length);
        self.has_holes(length);
        if length == 0 {
            self.restarts = 0;
        }
    }

    /// Whether somebody should begin to follow now; if so, the caller does.
    pub fn begin_following(&mut self) -> bool {
        let is_due = !self.followed
            && self.restarts <= MOST_RESTARTS
            && self.frontier.saturating_sub(self.claimed) >= BEHIND + WORTHWHILE;
        self.followed |= is_due;
        is_due
    }

    /// Where the furthest write ended.
    pub fn frontier(&self) -> u64 {
        self.frontier
    }

    /// The follower has ended.
    pub fn end_following(&mut self) {
        self.followed = false;
    }

    /// Whether nothing is to be followed for now.
    pub fn pause(&mut self, paused: bool) {
        self.paused = paused;
    }

    /// Claims the next part that the writers have left behind; `None`: it has caught up.
    pub fn claim(&mut self, running: &mut Running) -> Option<Part> {
        running.be_of(self.generation);
        let end = running.hashed + PART as u64;
        let is_changing = self.changing.is_some_and(|start| start < end);
        if self.paused || is_changing || self.restarts > MOST_RESTARTS || end + BEHIND > self.frontier {
            return None;
        }
        self.claimed = self.claimed.max(end);
        Some(Part { end, holes: if end <= self.gapless { Holes::None } else { Holes::Unknown } })
    }

    /// Claims everything up to `length`.
    pub fn claim_all(&mut self, running: &mut Running, length: u64) {
        running.be_of(self.generation);
        self.claimed = self.claimed.max(length);
    }
}

/// How fast the writers are, from one look at where they are to the next.
pub struct Pace {
    looked: Instant,
    frontier: u64,
    is_fast: bool,
}

impl Pace {
    /// They count as fast until they were looked at for [`LOOK_EVERY`].
    pub fn from(now: Instant, frontier: u64) -> Pace {
        Pace { looked: now, frontier, is_fast: true }
    }

    /// Whether they are too fast to be followed, now that they are at `frontier`.
    pub fn is_fast(&mut self, now: Instant, frontier: u64) -> bool {
        let passed = now.saturating_duration_since(self.looked);
        if passed >= LOOK_EVERY {
            let written = u128::from(frontier.saturating_sub(self.frontier));
            self.is_fast = written * 1_000_000 >= u128::from(FAST) * passed.as_micros();
            (self.looked, self.frontier) = (now, frontier);
        }
        self.is_fast
    }
}

/// What is to be hashed next.
pub struct Part {
    /// Up to where.
    pub end: u64,
    /// Whether it is worth looking for holes.
    pub holes: Holes,
}

/// Whether there may be holes, which are hashed without reading them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Holes {
    /// There are none.
    None,
    /// They are looked for.
    Unknown,
}

/// What was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bytes {
    /// So many bytes are in the buffer.
    Data(usize),
    /// So many bytes are a hole.
    Zeros(u64),
}

/// Reads what lies at `at`, before the end of a part: some data, or a hole as far as it reaches. `UnexpectedEof` if the file
/// ends before.
pub fn read(file: &File, at: u64, part: &Part, buffer: &mut [u8]) -> io::Result<Bytes> {
    let rest = part.end.saturating_sub(at);
    let data = match part.holes {
        Holes::None => at,
        // A disk that knows no holes has none; what lies after the last data is a hole.
        Holes::Unknown => find(file, at, Find::Data).unwrap_or(Some(at)).unwrap_or(u64::MAX),
    };
    let hole = data.saturating_sub(at).min(rest);
    if hole > 0 {
        return Ok(Bytes::Zeros(hole));
    }
    let wanted = buffer.len().min(usize::try_from(rest).unwrap_or(usize::MAX));
    loop {
        match file.read_at(&mut buffer[..wanted], at) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => return Ok(Bytes::Data(count)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Covers the bytes `[0, hashed)`, as they were in its generation.
#[derive(Default)]
pub struct Running {
    hash: Sha512,
    hashed: u64,
    generation: u64,
}

impl Running {
    /// How many bytes it covers.
    pub fn hashed(&self) -> u64 {
        self.hashed
    }

    /// Starts anew.
    pub fn restart(&mut self) {
        *self = Running { generation: self.generation, ..Running::default() };
    }

    fn be_of(&mut self, generation: u64) {
        if self.generation != generation {
            *self = Running { generation, ..Running::default() };
        }
    }

    /// Reads and hashes a part; `UnexpectedEof` if the file ends before. After an error it covers what `hashed` says.
    pub fn advance(&mut self, file: &File, part: &Part, buffer: &mut [u8]) -> io::Result<()> {
        while self.hashed < part.end {
            match read(file, self.hashed, part, buffer)? {
                Bytes::Zeros(count) => self.take_zeros(count),
                Bytes::Data(count) => self.take(&buffer[..count]),
            }
        }
        Ok(())
    }

    /// Hashes the bytes that follow.
    pub fn take(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.hashed += bytes.len() as u64;
    }

    /// Hashes zeros that follow.
    pub fn take_zeros(&mut self, count: u64) {
        let mut rest = count;
        while rest > 0 {
            let part = rest.min(ZEROS.len() as u64);
            self.hash.update(&ZEROS[..part as usize]);
            rest -= part;
        }
        self.hashed += count;
    }

    /// 128 lower-case hexadecimal digits.
    pub fn digest(&self) -> String {
        self.hash.clone().finish().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fast_writer_is_left_alone_until_he_is_slow_or_pauses() {
        let start = Instant::now();
        let after = |looks: u32| start + LOOK_EVERY * looks;
        let mut pace = Pace::from(start, 0);
        assert!(pace.is_fast(start, 0), "nobody knows yet");
        assert!(pace.is_fast(after(1), 20 << 20));
        assert!(!pace.is_fast(after(2), 25 << 20));
        assert!(!pace.is_fast(after(2) + LOOK_EVERY / 2, 100 << 20), "too short to say");
        assert!(pace.is_fast(after(3), 100 << 20));
        assert!(!pace.is_fast(after(4), 100 << 20), "he pauses");
        assert!(!pace.is_fast(after(5), 0), "he began anew");
    }
}
