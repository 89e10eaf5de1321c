//! Space that is reserved behind the end of a draft's data, so that a write into it cannot fail for want of space.
//!
//! It lies behind the end only, where reserved space is neither data nor length: a file that is written with holes keeps
//! them, since whatever does not go on from the end gives the reservation back before.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statvfs::fstatvfs;

/// How much is reserved at a time.
pub const STEP: u64 = 32 << 20;
/// What a disk has to have free for that: on one that is nearly full, others need the space more.
const ROOM: u64 = 4 * STEP;
/// The unit of `st_blocks`.
const STAT_BLOCK: u64 = 512;

/// What is reserved of one file; it lives under the lock that every change of the file is made under.
#[derive(Default)]
pub struct Reservation {
    /// Up to where it is sure; 0: nothing is.
    end: u64,
    /// Up to where some of it may be reserved.
    furthest: u64,
    /// The disk refused, or the writer reserves himself: what he has reserved is not ours to give back.
    given_up: bool,
}

impl Reservation {
    /// Reserves more behind `length`, the file's, if there is less than [`STEP`]; returns up to where it is. `None`:
    /// nothing is.
    pub fn extend(&mut self, file: &File, length: u64) -> io::Result<Option<u64>> {
        if !self.given_up && self.end.saturating_sub(length) < STEP && has_room(file) {
            let start = self.end.max(length);
            let (limit, _) = getrlimit(Resource::RLIMIT_FSIZE)?;
            let end = start.saturating_add(STEP).min(limit);
            self.furthest = end.max(start);
            if reserve(file, start, end) {
                self.end = end;
            } else {
                // Full, or not able to: what was reserved before stays, since it may be promised.
                self.given_up = true;
            }
        }
        if self.end > length {
            return Ok(Some(self.end));
        }
        self.release(file)?;
        Ok(None)
    }

    /// A write at `offset` comes.
    pub fn before_write(&mut self, file: &File, offset: u64) -> io::Result<()> {
        if self.furthest > 0 && offset > file.metadata()?.len() { self.release(file) } else { Ok(()) }
    }

    /// Gives back what is not written.
    pub fn release(&mut self, file: &File) -> io::Result<()> {
        let length = file.metadata()?.len();
        if self.furthest > length {
            // Cuts nothing off but what lies behind the end.
            file.set_len(length)?;
        }
        (self.end, self.furthest) = (0, 0);
        Ok(())
    }

    /// The writer reserves himself from now on.
    pub fn leave_to_writer(&mut self) {
        self.given_up = true;
    }
}

fn has_room(file: &File) -> bool {
    fstatvfs(file).is_ok_and(|disk| disk.blocks_available().saturating_mul(disk.fragment_size()) >= ROOM)
}

fn reserve(file: &File, start: u64, end: u64) -> bool {
    let range = i64::try_from(start).ok().zip(i64::try_from(end.saturating_sub(start)).ok());
    range.is_some_and(|(start, length)| {
        length > 0 && fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, start, length).is_ok()
    })
}

/// Gives back what a life of the program that was killed has reserved.
pub fn release_left_over(file: &File) -> io::Result<()> {
    let metadata = file.metadata()?;
    if metadata.blocks() * STAT_BLOCK >= metadata.len().saturating_add(STEP / 2) {
        file.set_len(metadata.len())?;
    }
    Ok(())
}
