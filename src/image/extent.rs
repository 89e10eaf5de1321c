//! Data and holes of sparse files.

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

/// What is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Find {
    /// Bytes that take space on the disk.
    Data,
    /// Bytes that take none and read as zeros; the end of the file is one.
    Hole,
}

/// Where, from `offset` on, the next of them begins, as lseek(2) has it: `None` from the end of the file on, and where
/// no data follows. The position of `file` means nothing afterwards.
pub fn find(file: &File, offset: u64, find: Find) -> io::Result<Option<u64>> {
    let Ok(offset) = i64::try_from(offset) else { return Ok(None) };
    let whence = match find {
        Find::Data => Whence::SeekData,
        Find::Hole => Whence::SeekHole,
    };
    match lseek(file, offset, whence) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}
