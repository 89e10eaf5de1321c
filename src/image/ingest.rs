//! A draft's data as it arrives, until it is an image.
//!
//! Bytes are hashed on the way in. The running hash covers the bytes `[0, hashed)` of the file, always: a write that
//! continues it extends it, a write beyond it leaves it true, a write within it starts it anew. A commit therefore
//! reads again only what it does not cover. It says nothing if the file is not as the last write left it: then somebody
//! has written past us, and the commit reads everything.

#[cfg(test)]
mod tests;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::stat::{Mode, fchmod};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{Gid, fchown};
use parking_lot::Mutex;
use sha2::{Digest, Sha512};

use super::inspect::{Refusal, inspect};
use super::{Format, Inspected, durable, qemu_img};

/// The mode of an image that never changes any more.
const PUBLISHED_MODE: Mode = Mode::S_IRUSR.union(Mode::S_IRGRP);
const DRAFT_MODE: Mode = Mode::S_IRUSR.union(Mode::S_IWUSR);

const READ_BYTES: usize = 1 << 20;

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
struct Arrival {
    /// Covers the bytes `[0, hashed)`.
    running: Sha512,
    hashed: u64,
    /// The file as our last change left it.
    left: Option<Fingerprint>,
    /// The file as it was checked, after a commit that succeeded.
    checked: Option<Fingerprint>,
    /// While set, nothing may change: a commit reads, or has succeeded.
    frozen: bool,
}

impl Arrival {
    fn restart(&mut self) {
        self.running = Sha512::new();
        self.hashed = 0;
    }
}

/// The data of one draft, for any number of threads. One process has one `Draft` per file.
pub struct Draft {
    file: File,
    path: PathBuf,
    /// Held over each change of the file, so that bytes are hashed in the order in which they land.
    arrival: Mutex<Arrival>,
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
        let arrival = Arrival { running: Sha512::new(), hashed: 0, left: None, checked: None, frozen: false };
        Ok(Draft { file, path: path.to_owned(), arrival: Mutex::new(arrival) })
    }

    /// Where the data lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes all of `bytes`; on an error some of them may have been written. `EBUSY` while a commit is under way and
    /// after it succeeded, `EFBIG` past the largest offset.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut arrival = self.arrival_to_change()?;
        let written = self.write_and_hash(&mut arrival, offset, bytes);
        arrival.left = Some(Fingerprint::of(&self.file)?);
        written
    }

    fn write_and_hash(&self, arrival: &mut Arrival, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            if at.checked_add(rest.len() as u64).is_none_or(|end| end > i64::MAX as u64) {
                return Err(Errno::EFBIG.into());
            }
            if at < arrival.hashed {
                arrival.restart();
            }
            let count = match self.file.write_at(rest, at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let (written, unwritten) = rest.split_at(count);
            if at == arrival.hashed {
                arrival.running.update(written);
                arrival.hashed += count as u64;
            }
            at += count as u64;
            rest = unwritten;
        }
        Ok(())
    }

    /// Cuts or extends (with zeros) the data to `length` bytes. `EBUSY` as for [`Draft::write_at`].
    pub fn truncate(&self, length: u64) -> io::Result<()> {
        let mut arrival = self.arrival_to_change()?;
        if length < arrival.hashed {
            arrival.restart();
        }
        self.file.set_len(length)?;
        arrival.left = Some(Fingerprint::of(&self.file)?);
        Ok(())
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

    /// Lets a draft be written again whose commit succeeded but whose publication did not happen.
    pub fn thaw(&self) {
        self.arrival.lock().frozen = false;
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
        self.file.sync_all()?;
        let before = Fingerprint::settled(&self.file)?;
        let arrived = {
            let mut arrival = self.arrival.lock();
            arrival.checked = None;
            if arrival.left != Some(before) {
                arrival.restart();
            }
            (arrival.running.clone(), arrival.hashed)
        };
        let outcome = self.judge_and_hash(claimed, arrived, before.length, progress, cancelled);
        // Whatever was found is not about the file that is there now.
        if Fingerprint::of(&self.file)? != before {
            return Err(CommitError::Changed);
        }
        let committed = outcome?;
        self.arrival.lock().checked = Some(before);
        progress(100);
        Ok(committed)
    }

    fn judge_and_hash(
        &self,
        claimed: Option<Format>,
        arrived: (Sha512, u64),
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
        let (running, hashed) = arrived;
        let sha512 = self.hash_rest(running, hashed, length, progress, cancelled)?;
        Ok(Committed { inspected, size_bytes: length, sha512 })
    }

    fn hash_rest(
        &self,
        mut running: Sha512,
        hashed: u64,
        length: u64,
        progress: &dyn Fn(u8),
        cancelled: &dyn Fn() -> bool,
    ) -> Result<String, CommitError> {
        let mut buffer = vec![0u8; READ_BYTES];
        let mut at = hashed;
        while at < length {
            if cancelled() {
                return Err(CommitError::Cancelled);
            }
            let count = match self.file.read_at(&mut buffer, at) {
                Ok(0) => return Err(CommitError::Changed),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            running.update(buffer.get(..count).unwrap_or_default());
            at += count as u64;
            // At most 100, also where the file grew meanwhile.
            progress((u128::from(at) * 100 / u128::from(length)).min(100) as u8);
        }
        if at != length {
            return Err(CommitError::Changed);
        }
        Ok(running.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    fn arrival_to_change(&self) -> io::Result<parking_lot::MutexGuard<'_, Arrival>> {
        let arrival = self.arrival.lock();
        if arrival.frozen { Err(Errno::EBUSY.into()) } else { Ok(arrival) }
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

/// Gives a committed draft its final name and freezes it: mode 0440, and the group `group` if there is one.
///
/// Both names are on one file system. Durable on success. Idempotent: if `from` is gone and `to` is there, a former
/// call has done it. An existing `to` beside `from` is `EEXIST`, and nothing is touched.
pub fn publish(from: &Path, to: &Path, group: Option<u32>) -> io::Result<()> {
    let file = match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(from) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound && std::fs::symlink_metadata(to)?.is_file() => {
            return sync_names(from, to);
        }
        Err(error) => return Err(error),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} is not a regular file", from.display())));
    }
    if std::fs::symlink_metadata(to).is_ok() {
        return Err(Errno::EEXIST.into());
    }
    if let Some(group) = group {
        fchown(&file, None, Some(Gid::from_raw(group)))?;
    }
    fchmod(&file, PUBLISHED_MODE)?;
    file.sync_all()?;
    durable::rename_new(from, to)?;
    sync_names(from, to)
}

/// Takes back [`publish`]: `to` becomes the draft `from` again, with its mode. Durable on success.
pub fn unpublish(from: &Path, to: &Path) -> io::Result<()> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(to)?;
    durable::rename_new(to, from)?;
    fchmod(&file, DRAFT_MODE)?;
    file.sync_all()?;
    sync_names(to, from)
}

fn sync_names(from: &Path, to: &Path) -> io::Result<()> {
    durable::sync_name(to)?;
    if from.parent() == to.parent() {
        return Ok(());
    }
    match durable::sync_name(from) {
        // A draft's directory may have been discarded since.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
