//! A draft's data as it arrives, until it is an image.
//!
//! What arrives in order is hashed while it arrives, a little behind the writers: see `ingest/follower.rs`. A commit
//! hashes what is left. The hash says nothing if the file is not as the last write left it: then somebody has written past
//! us, and the commit reads everything.

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
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use nix::sys::stat::Mode;
use nix::time::{ClockId, clock_gettime};
use parking_lot::Mutex;

use self::follower::{Arrived, Holes, PART, Part, Running, give_way};
pub use self::publish::{publish, unpublish};
use self::reservation::Reservation;
use super::extent::{self, Find};
use super::inspect::{Refusal, inspect};
use super::{Format, Inspected, qemu_img};

const DRAFT_MODE: Mode = Mode::S_IRUSR.union(Mode::S_IWUSR);

/// What a commit hashes between two looks at whether it is still wanted.
const STEP: u64 = 4 << 20;

/// As long as less is reserved, [`Draft::reserve`] reserves more.
pub const RESERVED_AT_LEAST: u64 = reservation::STEP;

/// How often the kernel's clock is looked at, a millisecond apart, until it has moved on.
const MOST_TICKS: u32 = 100;

/// What a commit found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Format and virtual size.
    pub inspected: Inspected,
    /// The file's length in bytes.
    pub size_bytes: u64,
    /// SHA-512 of the whole file, 128 lower-case hexadecimal digits.
    pub sha512: String,
}

/// Why a draft was not committed. It stays a draft and can be written again.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// Our inspector refuses it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// qemu-img refuses it, or sees something else than we do.
    #[error("qemu-img does not agree that this is a sound image: {0}; convert it with qemu-img convert -O qcow2")]
    Disagrees(String),
    /// Somebody wrote the file past us.
    #[error("the image's file was changed while it was being checked; write it again and repeat")]
    Changed,
    /// Asked to stop.
    #[error("cancelled; the draft is as it was")]
    Cancelled,
    /// Another commit is under way, or has succeeded.
    #[error("the draft is being committed already; wait for that")]
    Busy,
    /// Reading or syncing failed.
    #[error("the draft's data cannot be read or made durable: {0}")]
    Io(#[from] io::Error),
}

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

    /// Where the data lies.
    pub fn path(&self) -> &Path {
        &self.path
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
        if !self.arrived.lock().begin_following() {
            return;
        }
        // Nobody wants the hash of a draft that is gone.
        let draft = Arc::downgrade(self);
        let follow = move || {
            give_way();
            let mut buffer = vec![0; PART];
            while draft.upgrade().is_some_and(|draft| draft.follow_once(&mut buffer)) {}
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

    /// The length in bytes.
    pub fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// Whether the length is zero.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Whether anything was written or a length was set.
    pub fn has_data(&self) -> io::Result<bool> {
        Ok(!self.is_empty()?)
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

    /// Lets a draft be written again whose commit succeeded but whose publication did not happen.
    pub fn thaw(&self) {
        self.arrival.lock().frozen = false;
        self.arrived.lock().pause(false);
    }

    /// Checks and hashes the data. Writes are refused from here on; after an error they are allowed again, after
    /// success not until [`Draft::thaw`]. The file keeps its name and mode: see [`publish`].
    ///
    /// `progress` is called with 0 to 100, `cancelled` is asked before each part.
    pub fn commit(
        &self,
        claimed: Option<Format>,
        progress: &dyn Fn(u8),
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Committed, CommitError> {
        {
            let mut arrival = self.arrival.lock();
            if arrival.frozen {
                return Err(CommitError::Busy);
            }
            arrival.frozen = true;
            self.arrived.lock().pause(true);
        }
        let result = self.check(claimed, progress, cancelled);
        if result.is_err() {
            self.thaw();
        }
        result
    }

    /// Whether the file is still the one that the last successful commit has checked.
    pub fn is_as_checked(&self) -> io::Result<bool> {
        Ok(self.arrival.lock().checked == Some(Fingerprint::of(&self.file)?))
    }

    fn check(
        &self,
        claimed: Option<Format>,
        progress: &dyn Fn(u8),
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Committed, CommitError> {
        progress(0);
        let before = Fingerprint::settled(&self.file)?;
        {
            let mut arrival = self.arrival.lock();
            arrival.checked = None;
            if arrival.left != Some(before) {
                self.arrived.lock().forget(0);
            }
        }
        let (outcome, synced) = thread::scope(|scope| {
            // The disk writes while the processor hashes.
            let syncing = thread::Builder::new().name("draft-sync".to_owned()).spawn_scoped(scope, || self.sync())?;
            let outcome = self.judge_and_hash(claimed, before.length, progress, cancelled);
            let synced = syncing.join().unwrap_or_else(|_| Err(io::Error::other("the thread that syncs has died")));
            io::Result::Ok((outcome, synced))
        })?;
        // Whatever was found is not about the file that is there now.
        if Fingerprint::of(&self.file)? != before {
            self.arrived.lock().forget(0);
            return Err(CommitError::Changed);
        }
        let committed = outcome?;
        synced?;
        self.arrival.lock().checked = Some(before);
        progress(100);
        Ok(committed)
    }

    fn judge_and_hash(
        &self,
        claimed: Option<Format>,
        length: u64,
        progress: &dyn Fn(u8),
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Committed, CommitError> {
        let inspected = inspect(&self.file, claimed)?;
        if cancelled() {
            return Err(CommitError::Cancelled);
        }
        let theirs = qemu_img::info_of(&self.file, inspected.format).map_err(CommitError::Disagrees)?;
        agree(&inspected, &theirs)?;
        let sha512 = self.hash_rest(length, progress, cancelled)?;
        Ok(Committed { inspected, size_bytes: length, sha512 })
    }

    fn hash_rest(
        &self,
        length: u64,
        progress: &dyn Fn(u8),
        cancelled: &dyn Fn() -> bool,
    ) -> Result<String, CommitError> {
        let mut running = self.running.lock();
        self.arrived.lock().claim_all(&mut running, length);
        if running.hashed() > length {
            // Somebody else has cut the file, which says that the hash is of other bytes.
            running.restart();
        }
        let mut buffer = vec![0; PART];
        while running.hashed() < length {
            if cancelled() {
                return Err(CommitError::Cancelled);
            }
            let part = Part { end: length.min(running.hashed() + STEP), holes: Holes::Unknown };
            running.advance(&self.file, &part, &mut buffer).map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => CommitError::Changed,
                _ => CommitError::Io(error),
            })?;
            // At most 100: the quotient is at most 1.
            progress((u128::from(running.hashed()) * 100 / u128::from(length)) as u8);
        }
        Ok(running.digest())
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

/// What changes when somebody writes the file past us.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Fingerprint {
    length: u64,
    modified: (i64, i64),
}

impl Fingerprint {
    fn of(file: &File) -> io::Result<Fingerprint> {
        let metadata = file.metadata()?;
        Ok(Fingerprint { length: metadata.len(), modified: (metadata.mtime(), metadata.mtime_nsec()) })
    }

    /// One that every later change differs from: file times stand still for a tick of the kernel's clock (1 to 10 ms),
    /// so this waits until that clock has left the time of the last change. A time in the future is not waited for.
    fn settled(file: &File) -> io::Result<Fingerprint> {
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

fn agree(ours: &Inspected, theirs: &qemu_img::QemuInfo) -> Result<(), CommitError> {
    let complaint = if theirs.format != ours.format.word() {
        format!("its format is {} for us and {} for it", ours.format.word(), theirs.format)
    } else if theirs.virtual_size_bytes != ours.virtual_size_bytes {
        format!("its virtual size is {} bytes for us and {} for it", ours.virtual_size_bytes, theirs.virtual_size_bytes)
    } else if let Some(name) = theirs.backing_file.as_deref().or(theirs.data_file()) {
        format!("it depends on another file, {name}")
    } else if theirs.encrypted {
        "it is encrypted".to_owned()
    } else {
        return Ok(());
    };
    Err(CommitError::Disagrees(complaint))
}
