//! The content of a seed: an ISO 9660 file system of the label by which cloud-init knows it, made by `xorriso`.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::image::qemu_img::cage;
use crate::image::qemu_img::rights::Rights;

/// The extension of the directory in which `xorriso` finds the documents.
pub(super) const DOCUMENTS: &str = "documents";

/// What NoCloud reads; whatever else lies in such a directory is not ours.
const NAMES: [&str; 3] = ["user-data", "meta-data", "network-config"];

/// The label that NoCloud goes by.
const LABEL: &str = "cidata";

/// Why there is no image.
pub(super) enum Failure {
    /// The documents could not be written.
    File(io::Error),
    /// `xorriso`, in its own words.
    Tool(String),
}

/// The image of these documents, which lie in a directory of our own for that long: `xorriso` takes files only.
pub(super) fn image(directory: &Path, documents: &[(&str, &[u8])]) -> Result<Vec<u8>, Failure> {
    DirBuilder::new().mode(0o700).create(directory).map_err(Failure::File)?;
    let made = write(directory, documents).map_err(Failure::File).and_then(|()| {
        let mut command = Command::new("xorriso");
        command.args(["-as", "mkisofs", "-quiet", "-V", LABEL, "-J", "-r"]).arg(directory).stdin(Stdio::null());
        cage::run(command, cage::Limits::imaging(), Rights::Ours).map_err(|words| Failure::Tool(explained(words)))
    });
    // Secrets: gone now, and if that fails, with the disk.
    let removed = documents.iter().try_for_each(|(name, _)| fs::remove_file(directory.join(name)));
    let removed = removed.and_then(|()| fs::remove_dir(directory));
    made.and_then(|image| removed.map(|()| image).map_err(Failure::File))
}

fn write(directory: &Path, documents: &[(&str, &[u8])]) -> io::Result<()> {
    documents.iter().try_for_each(|(name, content)| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(directory.join(name))?;
        file.write_all(content)
    })
}

fn explained(words: String) -> String {
    if words.starts_with("cannot run xorriso") {
        return "xorriso is missing, which makes the disk for user_data: install it (Debian: apt install xorriso), or \
                clear user_data"
            .to_owned();
    }
    words
}

/// Removes what a crash left of [`image`]. The directory's name has the operation in it, so nobody else made it.
pub(super) fn remove_documents(parent: &OwnedFd, name: &Path) -> io::Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let directory = match openat(parent, name, flags, Mode::empty()) {
        Ok(directory) => directory,
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    for document in NAMES {
        match unlinkat(&directory, document, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    unlinkat(parent, name, UnlinkatFlags::RemoveDir).map_err(io::Error::from)
}
