//! What a file system can do, found out by doing it with a file that has no name, or one for a moment.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::libc::O_TMPFILE;
use nix::unistd::linkat;

use crate::block::directory::takes_marks;
use crate::cli::state_directory::TRIAL_PREFIX;

/// Why nothing was tried, or what failed.
pub struct Tried {
    /// User attributes, by which disks are known again.
    pub marks: io::Result<()>,
    /// A second name of a file, by which disks survive.
    pub links: io::Result<()>,
}

/// Tries both in `directory`. Fails if no file can be made there.
pub fn attempt(directory: &Path) -> io::Result<Tried> {
    let file = OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(O_TMPFILE).open(directory)?;
    Ok(Tried { marks: takes_marks(&file), links: link_twice(&file, directory) })
}

/// The first name makes it a file like any other, the second one is the hard link.
fn link_twice(file: &File, directory: &Path) -> io::Result<()> {
    let unique = uuid::Uuid::new_v4();
    let (first, second) =
        (directory.join(format!("{TRIAL_PREFIX}{unique}-1")), directory.join(format!("{TRIAL_PREFIX}{unique}-2")));
    let nameless = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(AT_FDCWD, nameless.as_str(), AT_FDCWD, &first, AtFlags::AT_SYMLINK_FOLLOW)?;
    let linked = fs::hard_link(&first, &second);
    // Both names were made here, a moment ago, and are nobody else's.
    if linked.is_ok() {
        fs::remove_file(&second)?;
    }
    fs::remove_file(&first)?;
    linked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trial_leaves_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        let tried = attempt(directory.path()).unwrap();
        tried.links.unwrap();
        assert_eq!(directory.path().read_dir().unwrap().count(), 0);
    }
}
