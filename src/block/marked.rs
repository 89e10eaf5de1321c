//! Files that bear the operation that made them: its id in an extended attribute of their inode. What bears another, or
//! none, is never removed.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use uuid::Uuid;

const OPEN_TO_LOOK: OFlag = OFlag::O_RDONLY.union(OFlag::O_NOFOLLOW).union(OFlag::O_NONBLOCK).union(OFlag::O_CLOEXEC);

/// Readable with `getfattr -n user.instancefs.operation`.
const NAME: &std::ffi::CStr = c"user.instancefs.operation";

/// A uuid with hyphens.
const TEXT_BYTES: usize = 36;

/// Writes the id; `EOPNOTSUPP` where the file system has no such attributes, `EEXIST` if the file bears one.
pub(super) fn set_operation(file: &File, operation: Uuid) -> io::Result<()> {
    let text = operation.to_string();
    // SAFETY: the name ends with NUL, `text` is valid for its length, both outlive the call, the descriptor is open.
    let result = unsafe {
        libc::fsetxattr(file.as_raw_fd(), NAME.as_ptr(), text.as_ptr().cast(), text.len(), libc::XATTR_CREATE)
    };
    Errno::result(result)?;
    Ok(())
}

/// The id that the file bears. None if there is none, or something that is not one.
pub(super) fn operation(file: &File) -> io::Result<Option<Uuid>> {
    let mut text = [0u8; TEXT_BYTES];
    // SAFETY: the name ends with NUL, the buffer is writable for the length given, the descriptor is open.
    let result = unsafe { libc::fgetxattr(file.as_raw_fd(), NAME.as_ptr(), text.as_mut_ptr().cast(), text.len()) };
    match Errno::result(result) {
        Ok(_length) => Ok(Uuid::try_parse_ascii(&text).ok()),
        Err(Errno::ENODATA | Errno::EOPNOTSUPP | Errno::ERANGE) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What a name in a directory holds.
pub(super) enum Found {
    Nothing,
    /// A regular file with this provenance, if any. The open file keeps its inode number from being used again.
    Disk {
        file: File,
        operation: Option<Uuid>,
    },
    /// A symlink, a directory, a device: never ours.
    Foreign,
}

/// What is at this name.
pub(super) fn look(directory: &OwnedFd, name: &str) -> io::Result<Found> {
    let status = match fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(status) => status,
        Err(Errno::ENOENT) => return Ok(Found::Nothing),
        Err(error) => return Err(error.into()),
    };
    // Asked first, since opening a device can have effects.
    if status.st_mode & libc::S_IFMT != libc::S_IFREG {
        return Ok(Found::Foreign);
    }
    let file = match openat(directory, name, OPEN_TO_LOOK, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::ENOENT) => return Ok(Found::Nothing),
        Err(Errno::ELOOP) => return Ok(Found::Foreign),
        Err(error) => return Err(error.into()),
    };
    let operation = operation(&file)?;
    Ok(Found::Disk { file, operation })
}

/// Unlinks `name` if it is still the file that was judged; says whether it did.
pub(super) fn unlink_exactly(directory: &OwnedFd, name: &str, judged: &File) -> io::Result<bool> {
    let judged = judged.metadata()?;
    let now = fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    if (now.st_dev, now.st_ino) != (judged.dev(), judged.ino()) {
        return Ok(false);
    }
    unlinkat(directory, name, UnlinkatFlags::NoRemoveDir)?;
    Ok(true)
}
