//! A draft's data as it arrives, until it is an image.
//!
//! What arrives in order is hashed while it arrives, a little behind the writers: see `ingest/follower.rs`. A commit
//! hashes what is left. The hash says nothing if the file is not as the last write left it: then somebody has written past
//! us, and the commit reads everything.

mod commit;
mod fingerprint;
mod follower;
mod publish;
mod reservation;
#[cfg(test)]
mod tests;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use nix::sys::stat::Mode;
use parking_lot::Mutex;

pub use self::commit::{CommitError, Committed};
use self::fingerprint::Fingerprint;
use self::follower::{Arrived, LOOK_EVERY, PART, Pace, Running, give_way};
pub use self::publish::{publish, unpublish};
use self::reservation::Reservation;
use super::extent::{self, Find};

const DRAFT_MODE: Mode = Mode::S_IRUSR.union(Mode::S_IWUSR);

/// As long as less is reserved, [`Draft::reserve`] reserves more.
pub const RESERVED_AT_LEAST: u64 = reservation::STEP;

/// What writers share.
#[derive(Default)]
struct Arrival {
    reservation: Reservation,
    /// The file as our last change left it.
    left: Option<Fingerprint>,
    /// The file as it was checked, after a commit that succeeded.
    checked: Option<Fingerprint>,
    /// While set, nothing may change: a commit reads, or has succeeded.
    frozen: bool,
}

/// The data of one draft, for any number of threads. One process has one `Draft` per file.
pub struct Draft {
    file: File,
    path: PathBuf,
    /// Held over each change of the file.
    arrival: Mutex<Arrival>,
    /// The last to be taken of the three, and held for a moment only.
    arrived: Mutex<Arrived>,
    /// Never taken by a writer, nor together with `arrival`.
    running: Mutex<Running>,
}

impl Draft {
    /// Opens the file at `path`, made with mode 0600 if absent; what it holds already is hashed at the commit.
    /// A symlink, or anything else but a regular file, is an error.
    pub fn open(path: &Path) -> io::Result<Draft> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(DRAFT_MODE.bits())
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} is not a regular file", path.display()),
            ));
        }
        reservation::release_left_over(&file)?;
        read_without_a_trace(&file);
        Ok(Draft {
            file,
            path: path.to_owned(),
            arrival: Mutex::default(),
            arrived: Mutex::default(),
            running: Mutex::default(),
        })
    }

    /// Writes all of `bytes`; on an error some of them may have been written. `EBUSY` while a commit is under way and
    /// after it succeeded, `EFBIG` past the largest offset.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut arrival = self.arrival_to_change()?;
        self.write_locked(&mut arrival, offset, bytes)
    }

    /// The next to change the data, if nobody is doing so; never waits.
    pub fn try_turn(&self) -> Option<Turn<'_>> {
        let arrival = self.arrival.try_lock().filter(|arrival| !arrival.frozen)?;
        Some(Turn { draft: self, arrival })
    }

    fn write_locked(&self, arrival: &mut Arrival, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if offset.checked_add(bytes.len() as u64).is_none_or(|end| end > i64::MAX as u64) {
            return Err(Errno::EFBIG.into());
        }
        arrival.reservation.before_write(&self.file, offset)?;
        self.arrived.lock().changes(offset);
        let written = self.write_all(offset, bytes);
        self.arrived.lock().has_changed();
        arrival.left = Some(Fingerprint::of(&self.file)?);
        written
    }

    fn write_all(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.file.write_at(rest, at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    let start = at;
                    at += count as u64;
                    rest = &rest[count..];
                    self.arrived.lock().wrote(start, at);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Hashes what the writers have left behind, in a thread of its own if there is enough. Returns at once.
    pub fn follow(self: &Arc<Draft>) {
        let frontier = {
            let mut arrived = self.arrived.lock();
            if !arrived.begin_following() {
                return;
            }
            arrived.frontier()
        };
        // Nobody wants the hash of a draft that is gone.
        let draft = Arc::downgrade(self);
        let follow = move || {
            give_way();
            let mut buffer = vec![0; PART];
            let mut pace = Pace::from(Instant::now(), frontier);
            while let Some(draft) = draft.upgrade() {
                let frontier = draft.arrived.lock().frontier();
                if pace.is_fast(Instant::now(), frontier) {
                    drop(draft);
                    thread::sleep(LOOK_EVERY);
                } else if !draft.follow_once(&mut buffer) {
                    break;
                }
            }
        };
        if let Err(error) = thread::Builder::new().name("draft-hash".to_owned()).spawn(follow) {
            self.arrived.lock().end_following();
            log::debug!("{} is hashed at the commit: {error}", self.path.display());
        }
    }

    /// Hashes one part; whether it should be called again.
    fn follow_once(&self, buffer: &mut [u8]) -> bool {
        let mut running = self.running.lock();
        let claimed = {
            let mut arrived = self.arrived.lock();
            let claimed = arrived.claim(&mut running);
            if claimed.is_none() {
                arrived.end_following();
            }
            claimed
        };
        let Some(part) = claimed else { return false };
        // A file that was cut meanwhile: the next claim starts anew. Whatever else it is, the commit meets it again.
        if running.advance(&self.file, &part, buffer).is_err() {
            running.restart();
            self.arrived.lock().end_following();
            return false;
        }
        true
    }

    /// Cuts or extends (with zeros) the data to `length` bytes. `EBUSY` as for [`Draft::write_at`].
    pub fn truncate(&self, length: u64) -> io::Result<()> {
        let mut arrival = self.arrival_to_change()?;
        arrival.reservation.release(&self.file)?;
        self.arrived.lock().changes(length);
        let cut = self.file.set_len(length);
        let mut arrived = self.arrived.lock();
        arrived.has_changed();
        cut?;
        arrived.has_length(length);
        drop(arrived);
        arrival.left = Some(Fingerprint::of(&self.file)?);
        Ok(())
    }

    /// fallocate(2), of which reserving, punching holes and zeroing are possible where the disk can; else
    /// `EOPNOTSUPP`. `EBUSY` as for [`Draft::write_at`].
    pub fn allocate(&self, offset: u64, length: u64, mode: i32) -> io::Result<()> {
        let zeroing = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_ZERO_RANGE;
        let possible = zeroing | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let mode = FallocateFlags::from_bits(mode).filter(|mode| possible.contains(*mode)).ok_or(Errno::EOPNOTSUPP)?;
        let (Ok(start), Ok(length)) = (i64::try_from(offset), i64::try_from(length)) else {
            return Err(Errno::EFBIG.into());
        };
        let mut arrival = self.arrival_to_change()?;
        arrival.reservation.release(&self.file)?;
        if mode.intersects(zeroing) {
            let mut arrived = self.arrived.lock();
            arrived.changes(offset);
            arrived.has_holes(offset);
        }
        if mode.contains(FallocateFlags::FALLOC_FL_KEEP_SIZE) {
            arrival.reservation.leave_to_writer();
        }
        let allocated = fallocate(&self.file, mode, start, length);
        self.arrived.lock().has_changed();
        allocated?;
        arrival.left = Some(Fingerprint::of(&self.file)?);
        Ok(())
    }

    /// Reserves space behind the end of the data, and returns up to where: writes that go on from the end up to there do
    /// not fail for want of space, unless something else than such writes comes in between. `None`: nothing is reserved,
    /// and the disk may not be able to.
    pub fn reserve(&self) -> io::Result<Option<u64>> {
        let mut arrival = self.arrival_to_change()?;
        let before = Fingerprint::of(&self.file)?;
        let reserved = arrival.reservation.extend(&self.file, before.length);
        self.still_as_left(&mut arrival, before)?;
        reserved
    }

    /// Gives back what was reserved and not written.
    pub fn release(&self) -> io::Result<()> {
        let mut arrival = self.arrival_to_change()?;
        let before = Fingerprint::of(&self.file)?;
        arrival.reservation.release(&self.file)?;
        self.still_as_left(&mut arrival, before)
    }

    /// The file has another time since `before`, and the same bytes: what somebody has changed past us stays known.
    fn still_as_left(&self, arrival: &mut Arrival, before: Fingerprint) -> io::Result<()> {
        if arrival.left == Some(before) {
            arrival.left = Some(Fingerprint::of(&self.file)?);
        }
        Ok(())
    }

    /// Where the next data or hole begins.
    pub fn find(&self, offset: u64, what: Find) -> io::Result<Option<u64>> {
        extent::find(&self.file, offset, what)
    }

    /// Reads into `buffer` from `offset`; returns how many bytes, 0 at the end.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }

    /// Makes what was written durable.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    /// Frees the space of a file that has no name any more, and that nobody can need therefore; else does nothing.
    pub fn free_removed(&self) -> io::Result<()> {
        if self.file.metadata()?.nlink() == 0 { self.file.set_len(0) } else { Ok(()) }
    }

    fn arrival_to_change(&self) -> io::Result<parking_lot::MutexGuard<'_, Arrival>> {
        let arrival = self.arrival.lock();
        if arrival.frozen { Err(Errno::EBUSY.into()) } else { Ok(arrival) }
    }
}

/// Keeps everybody else from changing the data until it is dropped.
pub struct Turn<'a> {
    draft: &'a Draft,
    arrival: parking_lot::MutexGuard<'a, Arrival>,
}

impl Turn<'_> {
    /// As [`Draft::write_at`].
    pub fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.draft.write_locked(&mut self.arrival, offset, bytes)
    }
}

/// Reading it does not change its access time from here on, if it is ours.
fn read_without_a_trace(file: &File) {
    let flags = fcntl(file, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
    if let Err(errno) = flags.and_then(|flags| fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_NOATIME))) {
        log::debug!("reading drafts changes their access times: {errno}");
    }
}
