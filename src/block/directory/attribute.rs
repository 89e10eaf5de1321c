//! The provenance of a disk: the operation's id in an extended attribute of its inode.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use uuid::Uuid;

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
