//! A committed draft's file under its final name, and back.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, fchown};

use super::DRAFT_MODE;
use crate::image::durable;

/// The mode of an image that never changes any more.
const PUBLISHED_MODE: Mode = Mode::S_IRUSR.union(Mode::S_IRGRP);

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
