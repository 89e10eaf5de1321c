//! Marked files below one directory, each in a subdirectory named after what owns it: made whole or not at all, found and
//! removed only with the mark of the operation that made them.
//!
//! Everything happens relative to open directories and never through a symlink below the base directory.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, RenameFlags, openat, renameat2};
use nix::sys::stat::{Mode, fchmod, mkdirat};
use nix::sys::statvfs::statvfs;
use nix::unistd::{Gid, UnlinkatFlags, fchown, unlinkat};
use uuid::Uuid;

use super::BlockError;
use super::marked::{self, Found, look, unlink_exactly};

/// Directories can be passed through, to open the disk that libvirt gives to QEMU's user, but not listed.
const DIRECTORY_MODE: Mode = Mode::S_IRWXU.union(Mode::S_IXGRP).union(Mode::S_IXOTH);
/// With a guest group: nobody else passes at all.
const GROUP_DIRECTORY_MODE: Mode = Mode::S_IRWXU.union(Mode::S_IXGRP);

const OPEN_DIRECTORY: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// Writes a new file's content: into the open file, or at its path.
pub(super) type Fill<'a> = &'a dyn Fn(&File, &Path) -> Result<(), BlockError>;

/// Removes what a crash left beside a temporary file of this name.
pub(super) type Aside = fn(&OwnedFd, &Path) -> io::Result<()>;

/// One file: `<owner>/<name>`.
pub(super) struct Place<'a> {
    /// Names the subdirectory.
    pub(super) owner: Uuid,
    /// The name in it.
    pub(super) name: &'a str,
    /// The operation that makes it, which it is marked with.
    pub(super) operation: Uuid,
    /// For a file whose making puts something beside it.
    pub(super) aside: Option<Aside>,
}

impl Place<'_> {
    fn reference(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }

    /// A name that only this operation uses.
    fn temporary(&self) -> String {
        format!(".{}.{}.partial", self.name, self.operation)
    }
}

/// See the module.
pub(super) struct Base {
    directory: PathBuf,
    guest_group: Option<u32>,
}

impl Base {
    /// Below `directory`, which is made when the first file is (not its parents).
    pub(super) fn new(directory: PathBuf, guest_group: Option<u32>) -> Base {
        // Fails for an empty path only, which then fails again where it is used.
        let directory = std::path::absolute(&directory).unwrap_or(directory);
        Base { directory, guest_group }
    }

    /// The directory.
    pub(super) fn path(&self) -> &Path {
        &self.directory
    }

    /// Makes a directory if there is none; one that is there keeps its mode.
    fn make_directory(&self, parent: impl AsFd, name: &Path) -> Result<bool, Errno> {
        match mkdirat(parent.as_fd(), name, Mode::S_IRWXU) {
            Ok(()) => {}
            Err(Errno::EEXIST) => return Ok(false),
            Err(error) => return Err(error),
        }
        let made = openat(parent.as_fd(), name, OPEN_DIRECTORY, Mode::empty())?;
        let mode = match self.guest_group {
            Some(group) => {
                fchown(&made, None, Some(Gid::from_raw(group)))?;
                GROUP_DIRECTORY_MODE
            }
            None => DIRECTORY_MODE,
        };
        fchmod(&made, mode)?;
        Ok(true)
    }

    /// The base directory; the administrator may have made it a symlink.
    fn open(&self) -> io::Result<File> {
        OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(&self.directory)
    }

    fn make_base(&self) -> Result<File, BlockError> {
        let made =
            self.make_directory(nix::fcntl::AT_FDCWD, &self.directory).map_err(|e| self.failed("make", e.into()))?;
        if made && let Some(parent) = self.directory.parent() {
            File::open(parent).and_then(|parent| parent.sync_all()).map_err(|error| self.failed("sync", error))?;
        }
        self.open().map_err(|error| self.failed("open", error))
    }

    /// Makes the file, or finds the one that this operation made before. `fill` writes the content into the new, empty
    /// file, which is also at the path.
    pub(super) fn make(&self, place: &Place<'_>, fill: Fill<'_>) -> Result<(), BlockError> {
        let owner = place.owner.to_string();
        let path = self.directory.join(&owner);
        let failed = |error: io::Error| self.at(&path, error);

        let base = self.make_base()?;
        let made = self.make_directory(&base, Path::new(&owner)).map_err(|error| failed(error.into()))?;
        let directory =
            openat(&base, owner.as_str(), OPEN_DIRECTORY, Mode::empty()).map_err(|error| failed(error.into()))?;
        match look(&directory, place.name).map_err(failed)? {
            Found::Nothing => {
                let result = self.create_in(&directory, &path, place, fill);
                if result.is_err() && made {
                    // This call made it, and rmdir takes only an empty one.
                    let _not_empty = unlinkat(&base, owner.as_str(), UnlinkatFlags::RemoveDir);
                }
                result?;
            }
            Found::Disk { operation: Some(operation), .. } if operation == place.operation => {}
            Found::Disk { .. } | Found::Foreign => return Err(BlockError::Exists(place.reference())),
        }
        // Also when it was there: the crash may have come between the rename and this.
        File::from(directory).sync_all().and_then(|()| base.sync_all()).map_err(failed)
    }

    /// Makes the file within the owner's open directory, which lies at `path`; the file is not there yet.
    fn create_in(&self, directory: &OwnedFd, path: &Path, place: &Place<'_>, fill: Fill<'_>) -> Result<(), BlockError> {
        let path = path.join(place.temporary());
        remove_temporary(directory, place).map_err(|error| self.at(&path, error))?;
        let result = self.create_filled(directory, &path, place, fill);
        if result.is_err() {
            // What this call has made; if even that fails, the next make or remove of this operation does it.
            let _tried_again_later = remove_temporary(directory, place);
        }
        result
    }

    fn create_filled(
        &self,
        directory: &OwnedFd,
        path: &Path,
        place: &Place<'_>,
        fill: Fill<'_>,
    ) -> Result<(), BlockError> {
        let failed = |error: io::Error| self.at(path, error);
        let temporary = place.temporary();
        let make = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(directory, temporary.as_str(), make, Mode::S_IRUSR | Mode::S_IWUSR)
            .map_err(|error| failed(error.into()))?;
        let file = File::from(file);
        marked::set_operation(&file, place.operation).map_err(|error| match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => BlockError::Failed(format!(
                "the file system of {} has no extended attributes, which say what made a disk; use another one",
                self.directory.display()
            )),
            Some(_) | None => failed(error),
        })?;
        fill(&file, path)?;
        file.sync_all().map_err(failed)?;
        renameat2(directory, temporary.as_str(), directory, place.name, RenameFlags::RENAME_NOREPLACE).map_err(
            |error| match error {
                Errno::EEXIST => BlockError::Exists(place.reference()),
                other => failed(other.into()),
            },
        )
    }

    /// Opens the file for reading; `None` if it is not there.
    ///
    /// # Errors
    ///
    /// [`BlockError::NotOurs`] if what is there was not made by this operation.
    pub(super) fn find(&self, place: &Place<'_>) -> Result<Option<File>, BlockError> {
        let not_ours = || BlockError::NotOurs(place.reference());
        let path = self.directory.join(place.reference());
        let failed = |error: io::Error| self.at(&path, error);
        let base = match self.open() {
            Ok(base) => base,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let directory = match openat(&base, place.owner.to_string().as_str(), OPEN_DIRECTORY, Mode::empty()) {
            Ok(directory) => directory,
            Err(Errno::ENOENT) => return Ok(None),
            Err(Errno::ELOOP | Errno::ENOTDIR) => return Err(not_ours()),
            Err(error) => return Err(failed(error.into())),
        };
        match look(&directory, place.name).map_err(failed)? {
            Found::Disk { file, operation: Some(operation) } if operation == place.operation => Ok(Some(file)),
            Found::Disk { .. } | Found::Foreign => Err(not_ours()),
            Found::Nothing => Ok(None),
        }
    }

    /// Removes exactly this file, what a crash left of its making, and the directory if it is empty then; an absent one is
    /// success.
    pub(super) fn remove(&self, place: &Place<'_>) -> Result<(), BlockError> {
        let not_ours = || BlockError::NotOurs(place.reference());
        let owner = place.owner.to_string();
        let path = self.directory.join(&owner);
        let failed = |error: io::Error| self.at(&path, error);

        let base = match self.open() {
            Ok(base) => base,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(failed(error)),
        };
        let directory = match openat(&base, owner.as_str(), OPEN_DIRECTORY, Mode::empty()) {
            Ok(directory) => directory,
            Err(Errno::ENOENT) => return Ok(()),
            Err(Errno::ELOOP | Errno::ENOTDIR) => return Err(not_ours()),
            Err(error) => return Err(failed(error.into())),
        };
        match look(&directory, place.name).map_err(failed)? {
            Found::Nothing => {}
            Found::Disk { file, operation: Some(operation) } if operation == place.operation => {
                if !unlink_exactly(&directory, place.name, &file).map_err(failed)? {
                    return Err(not_ours());
                }
            }
            Found::Disk { .. } | Found::Foreign => return Err(not_ours()),
        }
        remove_temporary(&directory, place).map_err(failed)?;
        File::from(directory).sync_all().map_err(failed)?;
        match unlinkat(&base, owner.as_str(), UnlinkatFlags::RemoveDir) {
            Ok(()) => base.sync_all().map_err(failed),
            // Something else lies there: not ours to judge.
            Err(Errno::ENOTEMPTY | Errno::EEXIST | Errno::ENOENT | Errno::EBUSY) => Ok(()),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// Total and free bytes of the file system; before the first file, of the one where the directory will be made.
    pub(super) fn capacity(&self) -> Result<(u64, u64), BlockError> {
        let asked = self.directory.ancestors().map(statvfs).find(|answer| *answer != Err(Errno::ENOENT));
        let numbers =
            asked.unwrap_or(Err(Errno::ENOENT)).map_err(|error| self.failed("ask the size of", error.into()))?;
        let bytes = |blocks: u64| blocks.saturating_mul(numbers.fragment_size());
        Ok((bytes(numbers.blocks()), bytes(numbers.blocks_available())))
    }

    /// An error of qemu-img, whose only words for a full disk are those of the C library.
    pub(super) fn said(&self, words: String) -> BlockError {
        let full = [Errno::ENOSPC, Errno::EDQUOT].iter().any(|error| words.contains(error.desc()));
        let full = full || words.contains("Disk quota exceeded");
        if full { BlockError::NoSpace(self.directory.display().to_string()) } else { BlockError::Failed(words) }
    }

    fn failed(&self, verb: &str, error: io::Error) -> BlockError {
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => BlockError::NoSpace(self.directory.display().to_string()),
            Some(_) | None => BlockError::Failed(format!("cannot {verb} {}: {error}", self.directory.display())),
        }
    }

    /// An error of the system at a path.
    pub(super) fn at(&self, path: &Path, error: io::Error) -> BlockError {
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => BlockError::NoSpace(self.directory.display().to_string()),
            Some(_) | None => BlockError::Failed(format!("{}: {error}", path.display())),
        }
    }
}

/// Removes what a crash of this very operation left. It made the name and then the provenance, so the file bears its id,
/// or nothing at all and is empty; any other is left, and the create that follows fails with `EEXIST`.
fn remove_temporary(directory: &OwnedFd, place: &Place<'_>) -> io::Result<()> {
    let name = place.temporary();
    if let Some(remove_aside) = place.aside {
        remove_aside(directory, Path::new(&name))?;
    }
    match look(directory, &name)? {
        Found::Disk { file, operation: Some(found) } if found == place.operation => {
            unlink_exactly(directory, &name, &file).map(|_| ())
        }
        Found::Disk { file, operation: None } if file.metadata()?.len() == 0 => {
            unlink_exactly(directory, &name, &file).map(|_| ())
        }
        Found::Nothing | Found::Disk { .. } | Found::Foreign => Ok(()),
    }
}
