//! The end of an image: its data file, and nothing else.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::fstatat;
use nix::unistd::{UnlinkatFlags, unlinkat};

/// Removes a published image's data, and its directory if nothing else lies there. An absent file is success.
///
/// # Errors
///
/// What the system says; [`io::ErrorKind::InvalidInput`] if something else than a file lies there, which stays.
pub fn remove(path: &Path) -> io::Result<()> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} is no image", path.display())));
    };
    let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let open: File = match OpenOptions::new().read(true).custom_flags(flags).open(directory) {
        Ok(open) => open,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    match fstatat(&open, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(status) if status.st_mode & libc::S_IFMT == libc::S_IFREG => {
            unlinkat(&open, name, UnlinkatFlags::NoRemoveDir)?;
            open.sync_all()?;
        }
        Ok(_) => {
            let words = format!("{} is not the file that was published; it is left as it is", path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, words));
        }
        Err(Errno::ENOENT) => {}
        Err(error) => return Err(error.into()),
    }
    match std::fs::remove_dir(directory) {
        // What somebody else put there is not ours to judge.
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            log::info!("the directory {} stays: {error}", directory.display());
        }
        Ok(()) | Err(_) => {}
    }
    Ok(())
}
