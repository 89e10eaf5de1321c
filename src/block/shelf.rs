//! The shelf: copies of instances' disks, `<directory>/<instance>/<operation>-<file>`, each a byte-exact copy of the
//! disk's file, 0600.
//!
//! They bear the operation that made them, as disks do. No object of the tree is behind them: nobody can boot, share or
//! delete one. They depend on the same image as the disk itself.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, RenameFlags, openat, renameat2};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};
use uuid::Uuid;

use super::copy::{self, Content, Watch};
use super::marked::{self, Found, look, unlink_exactly};
use super::{BlockError, Format};
use crate::image::qemu_img;
use crate::model::record::Copied;

const DIRECTORY_MODE: u32 = 0o700;

/// See the module.
pub struct Shelf {
    directory: PathBuf,
}

impl Shelf {
    /// Below `directory`, which is made when the first copy is.
    pub fn new(directory: PathBuf) -> Shelf {
        Shelf { directory }
    }

    /// Where a copy lies.
    pub fn path(&self, instance: Uuid, copy: &Copied) -> PathBuf {
        self.directory.join(instance.to_string()).join(name(copy))
    }

    /// Copies a disk and proves the copy: its bytes, and with qemu-img what the format can tell. What this operation made
    /// of it before is replaced.
    pub fn store(
        &self,
        instance: Uuid,
        copy: &Copied,
        disk: &File,
        format: Format,
        watch: &Watch<'_>,
    ) -> Result<Content, BlockError> {
        let path = self.path(instance, copy);
        let failed = |error: io::Error| BlockError::of_write(&path.display().to_string(), &error);
        let parent = self.directory.join(instance.to_string());
        DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(&parent).map_err(failed)?;
        let directory = open(&parent).map_err(failed)?;
        for name in [partial(copy), name(copy)] {
            remove_ours(&directory, &name, copy)?;
        }
        let stored = store_in(&directory, &path, copy, disk, format, watch);
        if stored.is_err() {
            // What this call has made; if even that fails, the undo of the operation does it.
            let _tried_again_later = remove_ours(&directory, &partial(copy), copy);
        }
        let content = stored?;
        let sync = |path: &Path| File::open(path).and_then(|directory| directory.sync_all());
        File::from(directory).sync_all().map_err(failed)?;
        let above = [Some(self.directory.as_path()), self.directory.parent()];
        above.into_iter().flatten().try_for_each(sync).map_err(failed)?;
        Ok(content)
    }

    /// Opens a copy for reading.
    pub fn open(&self, instance: Uuid, copy: &Copied) -> Result<File, BlockError> {
        let path = self.path(instance, copy);
        let shown = || path.display().to_string();
        let failed = |error: io::Error| BlockError::Failed(format!("{} cannot be opened: {error}", shown()));
        let found = match open(&self.directory.join(instance.to_string())) {
            Ok(directory) => look(&directory, &name(copy)).map_err(failed)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Found::Nothing,
            Err(error) => return Err(failed(error)),
        };
        match found {
            Found::Disk { file, operation: Some(operation) } if operation == copy.operation => Ok(file),
            Found::Disk { .. } | Found::Foreign => Err(BlockError::NotOurs(shown())),
            Found::Nothing => Err(BlockError::Missing(format!("copy {}", shown()))),
        }
    }

    /// Removes exactly this copy, and what a crash left of its making; an absent one is success.
    pub fn remove(&self, instance: Uuid, copy: &Copied) -> Result<(), BlockError> {
        let parent = self.directory.join(instance.to_string());
        let failed = |error: io::Error| BlockError::of_write(&parent.display().to_string(), &error);
        let directory = match open(&parent) {
            Ok(directory) => directory,
            Err(error) if [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory].contains(&error.kind()) => {
                return Ok(());
            }
            Err(error) => return Err(failed(error)),
        };
        for name in [partial(copy), name(copy)] {
            remove_ours(&directory, &name, copy)?;
        }
        File::from(directory).sync_all().map_err(failed)?;
        match unlinkat(AT_FDCWD, &parent, UnlinkatFlags::RemoveDir) {
            Ok(()) => File::open(&self.directory).and_then(|above| above.sync_all()).map_err(failed),
            // Other copies of this instance lie there.
            Err(Errno::ENOTEMPTY | Errno::EEXIST | Errno::ENOENT | Errno::EBUSY) => Ok(()),
            Err(error) => Err(failed(error.into())),
        }
    }
}

fn store_in(
    directory: &OwnedFd,
    path: &Path,
    copy: &Copied,
    disk: &File,
    format: Format,
    watch: &Watch<'_>,
) -> Result<Content, BlockError> {
    let shown = path.display().to_string();
    let failed = |error: io::Error| BlockError::of_write(&shown, &error);
    let make = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file = openat(directory, partial(copy).as_str(), make, Mode::S_IRUSR | Mode::S_IWUSR)
        .map_err(|error| failed(error.into()))?;
    let file = File::from(file);
    marked::set_operation(&file, copy.operation).map_err(failed)?;
    let content = copy::copy(disk, &file, watch).map_err(|error| error.named(&copy.disk.reference, &shown))?;
    match format {
        Format::Qcow2 => {
            let partial = path.with_file_name(partial(copy));
            qemu_img::check(&partial, watch.cancelled).map_err(|failure| match failure {
                qemu_img::CheckFailure::Cancelled => BlockError::Cancelled,
                qemu_img::CheckFailure::Damaged(words) => BlockError::Damaged(format!(
                    "qemu-img finds the disk {} damaged ({words}); repair it with qemu-img check -r all first",
                    copy.disk.reference
                )),
                qemu_img::CheckFailure::Failed(words) => BlockError::Failed(words),
            })?;
        }
        Format::Raw => {}
    }
    renameat2(directory, partial(copy).as_str(), directory, name(copy).as_str(), RenameFlags::RENAME_NOREPLACE)
        .map_err(|error| match error {
            Errno::EEXIST => BlockError::Exists(shown.clone()),
            other => failed(other.into()),
        })?;
    Ok(content)
}

fn open(directory: &Path) -> io::Result<OwnedFd> {
    let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
    OpenOptions::new().read(true).custom_flags(flags).open(directory).map(OwnedFd::from)
}

/// Never a path: what a reference has before its last slash names a place of the backend's.
fn name(copy: &Copied) -> String {
    let reference = &copy.disk.reference;
    format!("{}-{}", copy.operation, reference.rsplit_once('/').map_or(reference.as_str(), |(_, file)| file))
}

fn partial(copy: &Copied) -> String {
    format!(".{}.partial", name(copy))
}

/// Removes what this operation made under this name. The name comes before the mark, so the file bears the operation, or
/// nothing at all and is empty; any other stays.
fn remove_ours(directory: &OwnedFd, name: &str, copy: &Copied) -> Result<(), BlockError> {
    let failed = |error: io::Error| BlockError::of_write(name, &error);
    let (file, operation) = match look(directory, name).map_err(failed)? {
        Found::Nothing => return Ok(()),
        Found::Foreign => return Err(BlockError::NotOurs(name.to_owned())),
        Found::Disk { file, operation } => (file, operation),
    };
    let is_ours = match operation {
        Some(operation) => operation == copy.operation,
        None => name.starts_with('.') && file.metadata().map_err(failed)?.len() == 0,
    };
    if is_ours && unlink_exactly(directory, name, &file).map_err(failed)? {
        return Ok(());
    }
    Err(BlockError::NotOurs(name.to_owned()))
}
