//! Copies of disk files, byte for byte and proven.
//!
//! Three things go on, as far as possible at the same time: the bytes are copied (holes stay holes), the copy is hashed
//! behind that, and written out. At last the copy, read from the disk again, is compared with the original. So the hash is
//! that of bytes which are on the disk and equal to the original's.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::time::{ClockId, clock_gettime};
use openssl::sha::Sha512;

use super::BlockError;
use crate::image::extent::{Find, find};
use crate::model::record::Fingerprint;

/// What is read at a time: small enough for a processor's cache.
const PART: usize = 256 << 10;
/// What is written out between two looks at whether that is still wanted.
const SYNCED_PART: u64 = 16 << 20;
/// How long whoever waits for the other thread does not look.
const SLICE: Duration = Duration::from_millis(20);
/// How often the kernel's clock is looked at, a millisecond apart, until it has moved on.
const MOST_TICKS: u32 = 100;

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Who looks on.
#[derive(Clone, Copy)]
pub struct Watch<'a> {
    /// Whether to give up; asked every few milliseconds, from several threads.
    pub cancelled: &'a (dyn Fn() -> bool + Sync),
    /// Told how far it is, in percent.
    pub progress: &'a dyn Fn(u8),
}

/// What a file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    /// Length in bytes.
    pub size_bytes: u64,
    /// Of its bytes; lower-case hexadecimal.
    pub sha512: String,
}

/// Why there is no copy.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// Asked to stop.
    #[error("given up")]
    Cancelled,
    /// The original cannot be read.
    #[error("it cannot be read: {0}")]
    Read(io::Error),
    /// The copy cannot be written, or read back.
    #[error("its copy cannot be written: {0}")]
    Write(io::Error),
    /// The copy is not what was read, or the original has changed.
    #[error("its copy differs from it at byte {0}")]
    Differs(u64),
}

impl CopyError {
    /// With the names of what was read and written.
    pub fn named(self, from: &str, to: &str) -> BlockError {
        match self {
            CopyError::Cancelled => BlockError::Cancelled,
            CopyError::Read(error) => BlockError::Failed(format!("{from} cannot be read: {error}")),
            CopyError::Write(error) => BlockError::of_write(to, &error),
            CopyError::Differs(at) => BlockError::Damaged(format!(
                "the copy {to} is not what was read from {from} (byte {at}): the disk is failing, or somebody wrote to it \
                 meanwhile; nothing was changed"
            )),
        }
    }
}

/// Where bytes are written; a file, or one that fails in a test.
pub trait Target: Sync {
    /// The file, to read it back.
    fn file(&self) -> &File;
    /// Writes all of it.
    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file().write_all_at(bytes, offset)
    }
    /// Makes it as long as this.
    fn set_len(&self, length: u64) -> io::Result<()> {
        self.file().set_len(length)
    }
    /// Makes all of it durable.
    fn sync(&self) -> io::Result<()> {
        self.file().sync_all()
    }
}

impl Target for File {
    fn file(&self) -> &File {
        self
    }
}

/// The file as it is now.
pub fn fingerprint(file: &File) -> io::Result<Fingerprint> {
    let metadata = file.metadata()?;
    Ok(Fingerprint {
        device: metadata.dev(),
        inode: metadata.ino(),
        size_bytes: metadata.len(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
    })
}

/// The file as it is now, so that every later change differs from it: file times stand still for a tick of the kernel's
/// clock (1 to 10 ms), so this waits until that clock has left the time of the last change. A time in the future is not
/// waited for.
pub fn settled_fingerprint(file: &File) -> io::Result<Fingerprint> {
    for _ in 0..MOST_TICKS {
        let clock = clock_gettime(ClockId::CLOCK_REALTIME_COARSE)?;
        let now = fingerprint(file)?;
        if (clock.tv_sec(), clock.tv_nsec()) > now.modified {
            return Ok(now);
        }
        thread::sleep(Duration::from_millis(1));
    }
    fingerprint(file)
}

/// Copies all of `from` into the empty file `to`, durably, and proves it.
pub fn copy(from: &File, to: &dyn Target, watch: &Watch<'_>) -> Result<Content, CopyError> {
    let length = from.metadata().map_err(CopyError::Read)?.len();
    let work = Work {
        from,
        to,
        length,
        cancelled: watch.cancelled,
        copied: AtomicU64::new(0),
        hashed: AtomicU64::new(0),
        given_up: AtomicBool::new(false),
    };
    let began = Instant::now();
    let (sha512, written) = work.write_and_hash(watch)?;
    work.compare(watch)?;
    log::info!(
        "{length} bytes were copied in {:.3} s, and durable, hashed and proven in {:.3} s",
        written.as_secs_f64(),
        began.elapsed().as_secs_f64()
    );
    Ok(Content { size_bytes: length, sha512 })
}

/// Reads all of a file.
pub fn read(file: &File, watch: &Watch<'_>) -> Result<Content, CopyError> {
    let length = file.metadata().map_err(CopyError::Read)?.len();
    let mut hash = Hash::new(file);
    while hash.at < length {
        if (watch.cancelled)() {
            return Err(CopyError::Cancelled);
        }
        hash.advance(length.min(hash.at + PART as u64)).map_err(CopyError::Read)?;
        (watch.progress)(percent(hash.at, length));
    }
    Ok(Content { size_bytes: length, sha512: hash.digest() })
}

struct Work<'a> {
    from: &'a File,
    to: &'a dyn Target,
    length: u64,
    cancelled: &'a (dyn Fn() -> bool + Sync),
    /// What lies before is copied.
    copied: AtomicU64,
    hashed: AtomicU64,
    /// One of the two threads has failed.
    given_up: AtomicBool,
}

impl Work<'_> {
    fn proceed(&self) -> Result<(), CopyError> {
        let ends = (self.cancelled)() || self.given_up.load(Ordering::Relaxed);
        if ends { Err(CopyError::Cancelled) } else { Ok(()) }
    }

    /// Returns the hash, and how long the copying alone took.
    fn write_and_hash(&self, watch: &Watch<'_>) -> Result<(String, Duration), CopyError> {
        thread::scope(|scope| {
            let hashing = thread::Builder::new().name("copy-hash".to_owned()).spawn_scoped(scope, || self.hash());
            let began = Instant::now();
            let copied = self.write(watch);
            let took = began.elapsed();
            let written = copied.and_then(|()| self.sync(watch));
            if written.is_err() {
                self.given_up.store(true, Ordering::Relaxed);
            }
            let hashed = match hashing {
                Ok(hashing) => self.wait_for(hashing, watch),
                Err(_) => self.hash(),
            };
            match (written, hashed) {
                (Ok(()), hashed) => hashed.map(|hash| (hash, took)),
                // It gave up because the other failed, or both because they were told to.
                (Err(CopyError::Cancelled), Err(error)) => Err(error),
                (Err(error), _) => Err(error),
            }
        })
    }

    fn write(&self, watch: &Watch<'_>) -> Result<(), CopyError> {
        self.to.set_len(self.length).map_err(CopyError::Write)?;
        if clone(self.from, self.to.file()) {
            self.copied.store(self.length, Ordering::Release);
            return Ok(());
        }
        let mut buffer = vec![0; PART];
        let mut at = 0;
        while at < self.length {
            self.proceed()?;
            let Some(start) = find(self.from, at, Find::Data).map_err(CopyError::Read)? else { break };
            let end = find(self.from, start, Find::Hole).map_err(CopyError::Read)?.unwrap_or(self.length);
            at = start;
            while at < end.min(self.length) {
                self.proceed()?;
                let most = usize::try_from(end.min(self.length) - at).unwrap_or(PART).min(PART);
                let part = &mut buffer[..most];
                self.from.read_exact_at(part, at).map_err(CopyError::Read)?;
                self.to.write(part, at).map_err(CopyError::Write)?;
                at += most as u64;
                self.copied.store(at, Ordering::Release);
                self.show(watch, 0);
            }
        }
        self.copied.store(self.length, Ordering::Release);
        Ok(())
    }

    /// A little at a time, since nothing interrupts fsync(2).
    fn sync(&self, watch: &Watch<'_>) -> Result<(), CopyError> {
        let mut at = 0;
        while at < self.length {
            self.proceed()?;
            write_out(self.to.file(), at, SYNCED_PART).map_err(CopyError::Write)?;
            at += SYNCED_PART;
            self.show(watch, 0);
        }
        self.to.sync().map_err(CopyError::Write)
    }

    fn wait_for(
        &self,
        hashing: ScopedJoinHandle<'_, Result<String, CopyError>>,
        watch: &Watch<'_>,
    ) -> Result<String, CopyError> {
        while !hashing.is_finished() {
            thread::sleep(SLICE);
            self.show(watch, 0);
        }
        let died = || CopyError::Write(io::Error::other("the thread that hashes it has died"));
        hashing.join().unwrap_or_else(|_| Err(died()))
    }

    fn hash(&self) -> Result<String, CopyError> {
        // The original has the same holes, and to look for them in the copy takes the lock that its writer needs. Were
        // there data where the original has none, the comparison would find it.
        let mut hash = Hash { file: self.to.file(), ..Hash::new(self.from) };
        // While there is something to copy, that comes first, should both share a processor.
        set_priority(BEHIND);
        let mut is_behind = true;
        while hash.at < self.length {
            self.proceed()?;
            let copied = self.copied.load(Ordering::Acquire);
            if is_behind && copied == self.length {
                set_priority(USUAL);
                is_behind = false;
            }
            if hash.at == copied {
                thread::sleep(Duration::from_millis(1));
                continue;
            }
            let end = copied.min(hash.at + PART as u64);
            if let Err(error) = hash.advance(end) {
                self.given_up.store(true, Ordering::Relaxed);
                return Err(CopyError::Write(error));
            }
            self.hashed.store(hash.at, Ordering::Relaxed);
        }
        Ok(hash.digest())
    }

    /// Reads the copy from the disk, and the original again.
    fn compare(&self, watch: &Watch<'_>) -> Result<(), CopyError> {
        let copy = self.to.file();
        // Where the system keeps the pages nevertheless, it compares those.
        let _advice = posix_fadvise(copy, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        if copy.metadata().map_err(CopyError::Write)?.len() != self.length {
            return Err(CopyError::Differs(self.length));
        }
        let (mut ours, mut theirs) = (vec![0; PART], vec![0; PART]);
        let mut at = 0;
        while at < self.length {
            if (self.cancelled)() {
                return Err(CopyError::Cancelled);
            }
            let data = [
                find(self.from, at, Find::Data).map_err(CopyError::Read)?,
                find(copy, at, Find::Data).map_err(CopyError::Write)?,
            ];
            let Some(start) = data.into_iter().flatten().min().filter(|start| *start < self.length) else { break };
            let most = usize::try_from(self.length - start).unwrap_or(PART).min(PART);
            self.from.read_exact_at(&mut theirs[..most], start).map_err(CopyError::Read)?;
            copy.read_exact_at(&mut ours[..most], start).map_err(CopyError::Write)?;
            if ours[..most] != theirs[..most] {
                let same = ours[..most].iter().zip(&theirs[..most]).take_while(|(one, other)| one == other).count();
                return Err(CopyError::Differs(start + same as u64));
            }
            at = start + most as u64;
            self.show(watch, at);
        }
        Ok(())
    }

    fn show(&self, watch: &Watch<'_>, compared: u64) {
        let done = [self.copied.load(Ordering::Relaxed), self.hashed.load(Ordering::Relaxed), compared];
        let thirds: u64 = done.into_iter().map(|part| part / 3).sum();
        (watch.progress)(percent(thirds, self.length));
    }
}

/// At most 100.
fn percent(done: u64, of: u64) -> u8 {
    (u128::from(done.min(of)) * 100 / u128::from(of.max(1))) as u8
}

struct Hash<'a> {
    /// Where the bytes are read.
    file: &'a File,
    /// Where it is looked for holes.
    map: &'a File,
    at: u64,
    state: Sha512,
    buffer: Vec<u8>,
}

impl<'a> Hash<'a> {
    fn new(file: &'a File) -> Hash<'a> {
        Hash { file, map: file, at: 0, state: Sha512::new(), buffer: vec![0; PART] }
    }

    /// Hashes up to `end`, holes without reading them.
    fn advance(&mut self, end: u64) -> io::Result<()> {
        while self.at < end {
            let data = find(self.map, self.at, Find::Data)?.unwrap_or(end).min(end);
            while self.at < data {
                let most = usize::try_from(data - self.at).unwrap_or(ZEROS.len()).min(ZEROS.len());
                self.state.update(&ZEROS[..most]);
                self.at += most as u64;
            }
            let hole = find(self.map, self.at, Find::Hole)?.unwrap_or(end).min(end);
            while self.at < hole {
                let most = usize::try_from(hole - self.at).unwrap_or(PART).min(PART);
                let part = &mut self.buffer[..most];
                self.file.read_exact_at(part, self.at)?;
                self.state.update(&*part);
                self.at += most as u64;
            }
        }
        Ok(())
    }

    fn digest(self) -> String {
        self.state.finish().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

nix::ioctl_write_int!(
    /// ioctl_ficlone(2).
    ficlone,
    0x94,
    9
);

/// Shares the original's blocks where the file system can; then nothing needs to be copied.
fn clone(from: &File, to: &File) -> bool {
    // SAFETY: FICLONE takes a descriptor; both are open.
    unsafe { ficlone(to.as_raw_fd(), from.as_raw_fd() as libc::c_ulong) }.is_ok()
}

const USUAL: libc::c_int = 0;
const BEHIND: libc::c_int = 10;

/// The nice value of the calling thread. Back to the usual one only root may go; it is as good a hash either way.
fn set_priority(nice: libc::c_int) {
    // SAFETY: takes numbers only; 0 is the calling thread, which is what Linux means by a process here.
    let _refused = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) };
}

/// Has a range written to the disk, without what makes it durable.
fn write_out(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let all = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    let (Ok(offset), Ok(length)) = (i64::try_from(offset), i64::try_from(length)) else { return Ok(()) };
    // SAFETY: takes numbers only; the descriptor is open.
    let result = unsafe { libc::sync_file_range(file.as_raw_fd(), offset, length, all) };
    match Errno::result(result) {
        Ok(_) => Ok(()),
        // fsync, which follows, reports an error but once, and this call has had it.
        Err(error @ (Errno::EIO | Errno::ENOSPC | Errno::EDQUOT)) => Err(error.into()),
        Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests;
