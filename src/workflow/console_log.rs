//! A console log as a stream of pieces.
//!
//! QEMU appends to one file for ever, and keeps it open: it cannot be renamed away. So the stream is cut by arithmetic:
//! each 4 MiB of the file are a piece, the last one is `console.log` and the one before `console.log.1`. Whoever reads a
//! piece goes on reading it when the next one begins. What lies before those two is punched out of logs that are ours,
//! which takes it off the disk and moves nothing.
//!
//! virtlogd renames a full log to `.0` and begins another one; both are cut in the same way.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};

/// The length of a full piece.
pub const PIECE_BYTES: u64 = 4 << 20;

/// A piece's number has so many bits: 32 TiB of a log. It is part of an inode number.
const NUMBER_BITS: u32 = 23;

/// A piece as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its number, which no other piece of the instance has.
    pub number: u32,
    /// Bytes in it.
    pub length: u64,
    /// The file that it is part of, and where it begins there.
    path: PathBuf,
    start: u64,
    inode: u64,
}

/// A file on disk, and how its pieces are numbered: from 0, or where files have followed each other from a number that
/// is the file's own.
struct Log {
    path: PathBuf,
    length: u64,
    inode: u64,
    base: u64,
}

impl Log {
    fn look(path: PathBuf, alone: bool) -> Option<Log> {
        let metadata = fs::metadata(&path).ok()?;
        let inode = metadata.ino();
        // Neighbouring inode numbers end up far apart.
        let base = if alone { 0 } else { inode.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - NUMBER_BITS) };
        Some(Log { path, length: metadata.len(), inode, base })
    }

    /// A piece begins with its first byte.
    fn last(&self) -> u64 {
        self.length.saturating_sub(1) / PIECE_BYTES
    }

    fn piece(&self, index: u64) -> Piece {
        let start = index * PIECE_BYTES;
        Piece {
            number: u32::try_from((self.base + index) & ((1 << NUMBER_BITS) - 1)).unwrap_or(0),
            length: self.length.saturating_sub(start).min(PIECE_BYTES),
            path: self.path.clone(),
            start,
            inode: self.inode,
        }
    }
}

/// The pieces of a log that can be read: the growing one, which is empty while there is no log, and the one before.
pub fn pieces(log: &Path) -> (Piece, Option<Piece>) {
    let former = Log::look(suffixed(log), false);
    let current = Log::look(log.to_owned(), former.is_none());
    let before = former.map(|former| former.piece(former.last()));
    match current {
        None => (Piece { number: 0, length: 0, path: log.to_owned(), start: 0, inode: 0 }, before),
        Some(current) => match current.last().checked_sub(1) {
            None => (current.piece(0), before),
            Some(index) => (current.piece(index + 1), Some(current.piece(index))),
        },
    }
}

/// The piece of this number, if it is still there.
pub fn find(log: &Path, number: u32) -> Option<Piece> {
    let (current, former) = pieces(log);
    std::iter::once(current).chain(former).find(|piece| piece.number == number)
}

/// Removes a log that is ours and what virtlogd renamed it to; an absent one is success, and what is no file stays.
pub fn remove(log: &Path) -> io::Result<()> {
    let (Some(directory), Some(name)) = (log.parent(), log.file_name().and_then(|name| name.to_str())) else {
        return Ok(());
    };
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let is_ours = entry.file_name().to_str().and_then(|other| other.strip_prefix(name)).is_some_and(|rest| {
            let number = rest.strip_prefix('.');
            rest.is_empty() || number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
        });
        if is_ours && entry.file_type()?.is_file() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn suffixed(log: &Path) -> PathBuf {
    let mut path = log.as_os_str().to_owned();
    path.push(".0");
    PathBuf::from(path)
}

/// An open piece.
#[derive(Clone, Debug)]
pub struct OpenPiece {
    file: std::sync::Arc<File>,
    start: u64,
}

impl Piece {
    /// Opens it; `None` if it is not there any more.
    ///
    /// # Errors
    ///
    /// What the file system reports.
    pub fn open(&self) -> io::Result<Option<OpenPiece>> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let is_same = file.metadata()?.ino() == self.inode;
        Ok(is_same.then(|| OpenPiece { file: file.into(), start: self.start }))
    }
}

impl OpenPiece {
    /// Reads with `read`, which gets the file, an offset in it and a length.
    ///
    /// # Errors
    ///
    /// Those of `read`, and `ESTALE` once the piece is so old that it may be punched out.
    pub fn read(
        &self,
        offset: u64,
        size: usize,
        read: impl FnOnce(&File, u64, usize) -> io::Result<Vec<u8>>,
    ) -> io::Result<Vec<u8>> {
        let left = usize::try_from(PIECE_BYTES.saturating_sub(offset)).unwrap_or(usize::MAX);
        if left == 0 {
            return Ok(Vec::new());
        }
        let bytes = read(&self.file, self.start + offset, size.min(left))?;
        // Looked at afterwards: a length only grows, and nothing is punched before it says so.
        let length = self.file.metadata()?.len();
        if self.start < punchable(length) { Err(io::Error::from_raw_os_error(libc::ESTALE)) } else { Ok(bytes) }
    }
}

/// How much of the beginning of a log of this length is no longer read.
fn punchable(length: u64) -> u64 {
    (length.saturating_sub(1) / PIECE_BYTES).saturating_sub(1) * PIECE_BYTES
}

/// Gives back the disk space of what is no longer read, beyond the first `done` bytes. Returns how much of the beginning
/// is given back. To be called for logs only that we had made.
///
/// # Errors
///
/// What the file system reports; one that cannot do it says `EOPNOTSUPP`.
pub fn punch(log: &Path, done: u64) -> io::Result<u64> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = match OpenOptions::new().write(true).custom_flags(flags).open(log) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(done),
        Err(error) => return Err(error),
    };
    let metadata = file.metadata()?;
    let end = punchable(metadata.len());
    if end <= done || !metadata.is_file() {
        return Ok(done);
    }
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, hole, 0, i64::try_from(end).unwrap_or(i64::MAX))?;
    Ok(end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    fn grow(path: &Path, byte: u8, bytes: u64) {
        let mut file = OpenOptions::new().create(true).append(true).open(path).unwrap();
        file.write_all(&vec![byte; usize::try_from(bytes).unwrap()]).unwrap();
    }

    fn read(piece: &OpenPiece, offset: u64, size: usize) -> io::Result<Vec<u8>> {
        piece.read(offset, size, |file, offset, size| {
            let mut bytes = vec![0; size];
            let count = file.read_at(&mut bytes, offset)?;
            bytes.truncate(count);
            Ok(bytes)
        })
    }

    #[test]
    fn a_full_piece_becomes_the_former_one_under_its_number() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        assert_eq!((pieces(&log).0.number, pieces(&log).0.length, pieces(&log).1), (0, 0, None));
        grow(&log, b'a', PIECE_BYTES);
        let (first, none) = pieces(&log);
        assert_eq!((first.number, first.length, none), (0, PIECE_BYTES, None));
        let open = first.open().unwrap().unwrap();
        grow(&log, b'b', 10);
        let (second, former) = pieces(&log);
        assert_eq!((second.number, second.length, former.unwrap().number), (1, 10, 0));
        assert_eq!(read(&open, PIECE_BYTES - 1, 5).unwrap(), b"a", "a piece ends where the next begins");
        assert_eq!(read(&second.open().unwrap().unwrap(), 0, 20).unwrap(), [b'b'; 10]);
        assert_eq!(find(&log, 7), None);
    }

    #[test]
    fn what_is_punched_is_off_the_disk_and_refused_rather_than_read_as_zeros() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        grow(&log, b'a', PIECE_BYTES);
        let oldest = pieces(&log).0.open().unwrap().unwrap();
        let mut done = 0;
        for byte in b'b'..b'g' {
            grow(&log, byte, PIECE_BYTES);
            done = punch(&log, done).unwrap();
            assert!(log.metadata().unwrap().blocks() * 512 <= 2 * PIECE_BYTES + 4096);
        }
        assert_eq!(done, 4 * PIECE_BYTES);
        assert_eq!(read(&oldest, 0, 1).unwrap_err().raw_os_error(), Some(libc::ESTALE));
        let (current, former) = pieces(&log);
        assert_eq!(read(&current.open().unwrap().unwrap(), 0, 1).unwrap(), b"f");
        assert_eq!(read(&former.unwrap().open().unwrap().unwrap(), 0, 1).unwrap(), b"e");
    }

    #[test]
    fn a_log_that_virtlogd_renamed_keeps_its_number() {
        let directory = tempfile::tempdir().unwrap();
        let (log, renamed) = (directory.path().join("log"), directory.path().join("log.0"));
        grow(&renamed, b'a', 10);
        grow(&log, b'b', 10);
        let (second, first) = pieces(&log);
        assert_ne!(second.number, first.unwrap().number);
        fs::rename(&log, &renamed).unwrap();
        grow(&log, b'c', 10);
        let (third, former) = pieces(&log);
        assert_eq!(former.unwrap().number, second.number);
        assert_ne!(third.number, second.number);
    }
}
