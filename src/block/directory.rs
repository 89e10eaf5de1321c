//! Disks as files below one directory: `<directory>/<instance>/root.qcow2`, an overlay of its image, and beside it
//! `seed.iso`.
//!
//! **Provenance** is the operation's id in the extended attribute `user.instancefs.operation` of the disk itself. It is
//! bound to the inode: it appears together with the name, survives renames, chown and restarts, and does not pass to a file
//! that somebody puts in the disk's place, as a note beside the disk would. Where it got lost (a copy without
//! attributes) the disk is left alone, which is the safe side. File systems without user attributes are refused.
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

use super::marked::{self, Found, look, unlink_exactly};
use super::{
    BlockBackend, BlockError, DataRecord, DiskRecord, DiskRole, DiskSource, Examined, ExistingData, FillFile, Format,
    NewData, NewDisk, NewSeed, VolumeData, Watch, seed,
};
use crate::image::qemu_img;

const BACKEND: &str = "directory";
const ROLES: [DiskRole; 2] = [DiskRole::Root, DiskRole::Seed];

/// Directories can be passed through, to open the disk that libvirt gives to QEMU's user, but not listed.
const DIRECTORY_MODE: Mode = Mode::S_IRWXU.union(Mode::S_IXGRP).union(Mode::S_IXOTH);
/// With a guest group: nobody else passes at all.
const GROUP_DIRECTORY_MODE: Mode = Mode::S_IRWXU.union(Mode::S_IXGRP);

const OPEN_DIRECTORY: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// The backend `directory`.
pub struct DirectoryBackend {
    directory: PathBuf,
    guest_group: Option<u32>,
}

/// Writes a new disk's content: into the open file, or at its path.
type Fill<'a> = &'a dyn Fn(&File, &Path) -> Result<(), BlockError>;

/// Whether the file system of a file that its caller has just made keeps what marks disks. The mark stays on it.
///
/// # Errors
///
/// What the file system says; `EOPNOTSUPP` if it has no user attributes.
pub fn takes_marks(file: &File) -> io::Result<()> {
    marked::set_operation(file, Uuid::nil())
}

impl DirectoryBackend {
    /// Disks below `directory`, which is made when the first one is (not its parents). Disks are 0600 and root's;
    /// libvirt's dynamic ownership gives them to QEMU while it runs. Directories made are 0711; with the group that
    /// QEMU runs in, `guest_group`, they are that group's and 0710.
    pub fn new(directory: PathBuf, guest_group: Option<u32>) -> DirectoryBackend {
        // Fails for an empty path only, which then fails again where it is used.
        let directory = std::path::absolute(&directory).unwrap_or(directory);
        DirectoryBackend { directory, guest_group }
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
    fn open_base(&self) -> io::Result<File> {
        OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(&self.directory)
    }

    fn make_base(&self) -> Result<File, BlockError> {
        let made =
            self.make_directory(nix::fcntl::AT_FDCWD, &self.directory).map_err(|e| self.failed("make", e.into()))?;
        if made && let Some(parent) = self.directory.parent() {
            File::open(parent).and_then(|parent| parent.sync_all()).map_err(|error| self.failed("sync", error))?;
        }
        self.open_base().map_err(|error| self.failed("open", error))
    }

    /// Makes the disk, or finds the one that this operation made before. `fill` writes the content into the new, empty
    /// file, which is also at the path.
    fn make(&self, record: &DiskRecord, instance: Uuid, fill: Fill<'_>) -> Result<(), BlockError> {
        let instance_name = instance.to_string();
        let path = self.directory.join(&instance_name);
        let failed = |error: io::Error| self.at(&path, error);

        let base = self.make_base()?;
        let made = self.make_directory(&base, Path::new(&instance_name)).map_err(|error| failed(error.into()))?;
        let directory = openat(&base, instance_name.as_str(), OPEN_DIRECTORY, Mode::empty())
            .map_err(|error| failed(error.into()))?;
        match look(&directory, file_name(record.role)).map_err(failed)? {
            Found::Nothing => {
                let result = self.create_in(&directory, &path, record, fill);
                if result.is_err() && made {
                    // This call made it, and rmdir takes only an empty one.
                    let _not_empty = unlinkat(&base, instance_name.as_str(), UnlinkatFlags::RemoveDir);
                }
                result?;
            }
            Found::Disk { operation: Some(operation), .. } if operation == record.operation => {}
            Found::Disk { .. } | Found::Foreign => {
                return Err(BlockError::Exists(record.reference.clone()));
            }
        }
        // Also when it was there: the crash may have come between the rename and this.
        File::from(directory).sync_all().and_then(|()| base.sync_all()).map_err(failed)
    }

    /// Makes the disk within the instance's open directory, which lies at `place`; the disk is not there yet.
    fn create_in(
        &self,
        directory: &OwnedFd,
        place: &Path,
        record: &DiskRecord,
        fill: Fill<'_>,
    ) -> Result<(), BlockError> {
        let path = place.join(temporary_name(record));
        remove_temporary(directory, record).map_err(|error| self.at(&path, error))?;
        let result = self.create_filled(directory, &path, record, fill);
        if result.is_err() {
            // What this call has made; if even that fails, the next create or remove of this operation does it.
            let _tried_again_later = remove_temporary(directory, record);
        }
        result
    }

    fn create_filled(
        &self,
        directory: &OwnedFd,
        path: &Path,
        record: &DiskRecord,
        fill: Fill<'_>,
    ) -> Result<(), BlockError> {
        let failed = |error: io::Error| self.at(path, error);
        let temporary = temporary_name(record);
        let make = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(directory, temporary.as_str(), make, Mode::S_IRUSR | Mode::S_IWUSR)
            .map_err(|error| failed(error.into()))?;
        let file = File::from(file);
        marked::set_operation(&file, record.operation).map_err(|error| match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => BlockError::Failed(format!(
                "the file system of {} has no extended attributes, which say what made a disk; use another one",
                self.directory.display()
            )),
            Some(_) | None => failed(error),
        })?;
        fill(&file, path)?;
        file.sync_all().map_err(failed)?;
        renameat2(directory, temporary.as_str(), directory, file_name(record.role), RenameFlags::RENAME_NOREPLACE)
            .map_err(|error| match error {
                Errno::EEXIST => BlockError::Exists(record.reference.clone()),
                other => failed(other.into()),
            })
    }

    /// An error of qemu-img, whose only words for a full disk are those of the C library.
    fn said(&self, words: String) -> BlockError {
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

    fn at(&self, path: &Path, error: io::Error) -> BlockError {
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => BlockError::NoSpace(self.directory.display().to_string()),
            Some(_) | None => BlockError::Failed(format!("{}: {error}", path.display())),
        }
    }
}

impl BlockBackend for DirectoryBackend {
    fn name(&self) -> &'static str {
        BACKEND
    }

    fn plan(&self, disk: &NewDisk<'_>) -> DiskRecord {
        record(disk.instance, disk.operation, DiskRole::Root)
    }

    fn create(&self, disk: &NewDisk<'_>) -> Result<DiskRecord, BlockError> {
        let record = self.plan(disk);
        self.make(&record, disk.instance, &|_file, path| {
            qemu_img::create_overlay(path, disk.image, disk.image_format, disk.size_bytes)
                .map_err(|words| self.said(words))
        })?;
        Ok(record)
    }

    fn plan_seed(&self, seed: &NewSeed<'_>) -> DiskRecord {
        record(seed.instance, seed.operation, DiskRole::Seed)
    }

    fn create_seed(&self, new: &NewSeed<'_>) -> Result<DiskRecord, BlockError> {
        let record = self.plan_seed(new);
        self.make(&record, new.instance, &|mut file, path| {
            let image =
                seed::image(&path.with_extension(seed::DOCUMENTS), new.documents).map_err(|failure| match failure {
                    seed::Failure::File(error) => self.at(path, error),
                    seed::Failure::Tool(words) => self.said(words),
                })?;
            io::Write::write_all(&mut file, &image).map_err(|error| self.at(path, error))
        })?;
        Ok(record)
    }

    fn grow(&self, record: &DiskRecord, size_bytes: u64) -> Result<(), BlockError> {
        let not_ours = || BlockError::NotOurs(record.reference.clone());
        let instance = instance_of(record).filter(|_| record.role == DiskRole::Root).ok_or_else(not_ours)?;
        let path = self.directory.join(reference(instance, record.role));
        let failed = |error: io::Error| self.at(&path, error);
        let base = self.open_base().map_err(failed)?;
        let directory = openat(&base, instance.to_string().as_str(), OPEN_DIRECTORY, Mode::empty())
            .map_err(|error| failed(error.into()))?;
        match look(&directory, file_name(record.role)).map_err(failed)? {
            Found::Disk { file, operation: Some(operation) } if operation == record.operation => {
                let present = qemu_img::disk_size(&path).map_err(|words| self.said(words))?;
                if present < size_bytes {
                    qemu_img::grow(&path, size_bytes).map_err(|words| self.said(words))?;
                    file.sync_all().map_err(failed)?;
                }
                Ok(())
            }
            Found::Disk { .. } | Found::Foreign => Err(not_ours()),
            Found::Nothing => Err(failed(Errno::ENOENT.into())),
        }
    }

    fn open(&self, record: &DiskRecord) -> Result<File, BlockError> {
        let not_ours = || BlockError::NotOurs(record.reference.clone());
        let missing = || BlockError::Missing(format!("disk {}", self.path(record).display()));
        let instance = instance_of(record).ok_or_else(not_ours)?;
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => missing(),
            _ => self.at(&self.path(record), error),
        };
        let base = self.open_base().map_err(failed)?;
        let directory = openat(&base, instance.to_string().as_str(), OPEN_DIRECTORY, Mode::empty())
            .map_err(|error| failed(error.into()))?;
        match look(&directory, file_name(record.role)).map_err(failed)? {
            Found::Disk { file, operation: Some(operation) } if operation == record.operation => Ok(file),
            Found::Disk { .. } | Found::Foreign => Err(not_ours()),
            Found::Nothing => Err(missing()),
        }
    }

    fn format(&self, record: &DiskRecord) -> Format {
        match record.role {
            DiskRole::Root => Format::Qcow2,
            DiskRole::Seed => Format::Raw,
        }
    }

    fn create_again(&self, record: &DiskRecord, fill: FillFile<'_>) -> Result<(), BlockError> {
        let instance = instance_of(record).ok_or_else(|| BlockError::NotOurs(record.reference.clone()))?;
        self.make(record, instance, &|file, _path| fill(file))
    }

    /// The path of the disk. A record that is not one of ours leads to a path where nothing is.
    fn path(&self, record: &DiskRecord) -> PathBuf {
        match instance_of(record) {
            Some(instance) => self.directory.join(reference(instance, record.role)),
            None => self.directory.join("not-a-disk-of-this-backend"),
        }
    }

    fn remove(&self, record: &DiskRecord) -> Result<(), BlockError> {
        let not_ours = || BlockError::NotOurs(record.reference.clone());
        let instance_name = instance_of(record).ok_or_else(not_ours)?.to_string();
        let path = self.directory.join(&instance_name);
        let failed = |error: io::Error| self.at(&path, error);

        let base = match self.open_base() {
            Ok(base) => base,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(failed(error)),
        };
        let directory = match openat(&base, instance_name.as_str(), OPEN_DIRECTORY, Mode::empty()) {
            Ok(directory) => directory,
            Err(Errno::ENOENT) => return Ok(()),
            Err(Errno::ELOOP | Errno::ENOTDIR) => return Err(not_ours()),
            Err(error) => return Err(failed(error.into())),
        };
        match look(&directory, file_name(record.role)).map_err(failed)? {
            Found::Nothing => {}
            Found::Disk { file, operation: Some(operation) } if operation == record.operation => {
                if !unlink_exactly(&directory, file_name(record.role), &file).map_err(failed)? {
                    return Err(not_ours());
                }
            }
            Found::Disk { .. } | Found::Foreign => return Err(not_ours()),
        }
        remove_temporary(&directory, record).map_err(failed)?;
        File::from(directory).sync_all().map_err(failed)?;
        match unlinkat(&base, instance_name.as_str(), UnlinkatFlags::RemoveDir) {
            Ok(()) => base.sync_all().map_err(failed),
            // Something else lies there: not ours to judge.
            Err(Errno::ENOTEMPTY | Errno::EEXIST | Errno::ENOENT | Errno::EBUSY) => Ok(()),
            Err(error) => Err(failed(error.into())),
        }
    }

    fn plan_data(&self, new: &NewData<'_>) -> DataRecord {
        let place = match new.snapshot {
            None => format!("{}/data", new.volume),
            Some(snapshot) => format!("{}/{snapshot}", new.volume),
        };
        let format = new.format.unwrap_or(Format::Qcow2);
        DataRecord { backend: BACKEND.to_owned(), reference: place, operation: new.operation, format }
    }

    fn create_data(&self, new: &NewData<'_>, _watch: Watch<'_>) -> Result<DataRecord, BlockError> {
        Err(not_built(&self.plan_data(new).reference))
    }

    fn remove_data(&self, record: &DataRecord) -> Result<(), BlockError> {
        Err(not_built(&record.reference))
    }

    fn grow_data(&self, data: &VolumeData, _size_bytes: u64, _in_use: bool) -> Result<(), BlockError> {
        Err(not_built(reference_of(data)))
    }

    fn examine(&self, data: &VolumeData) -> Result<Examined, BlockError> {
        Err(not_built(reference_of(data)))
    }

    fn adopt(&self, reference: &str) -> Result<(ExistingData, Examined), BlockError> {
        Err(not_built(reference))
    }

    fn source(&self, data: &VolumeData) -> DiskSource {
        DiskSource::File(self.directory.join(reference_of(data)))
    }

    fn holder(&self, data: &VolumeData) -> Result<Option<String>, BlockError> {
        Err(not_built(reference_of(data)))
    }

    fn capacity(&self) -> Result<(u64, u64), BlockError> {
        let numbers = statvfs(&self.directory).map_err(|error| self.failed("ask the size of", error.into()))?;
        let bytes = |blocks: u64| blocks.saturating_mul(numbers.fragment_size());
        Ok((bytes(numbers.blocks()), bytes(numbers.blocks_available())))
    }
}

fn reference_of(data: &VolumeData) -> &str {
    match data {
        VolumeData::Ours(record) => &record.reference,
        VolumeData::Existing(existing) => &existing.reference,
    }
}

fn not_built(reference: &str) -> BlockError {
    BlockError::Failed(format!("{reference}: volumes are not built yet"))
}

fn file_name(role: DiskRole) -> &'static str {
    match role {
        DiskRole::Root => "root.qcow2",
        DiskRole::Seed => "seed.iso",
    }
}

fn reference(instance: Uuid, role: DiskRole) -> String {
    format!("{instance}/{}", file_name(role))
}

fn record(instance: Uuid, operation: Uuid, role: DiskRole) -> DiskRecord {
    DiskRecord { backend: BACKEND.to_owned(), reference: reference(instance, role), operation, role }
}

/// The instance of a record, if this backend could have written it: exactly `<uuid>/` and the file of its role, nothing
/// that leads elsewhere.
fn instance_of(record: &DiskRecord) -> Option<Uuid> {
    let (instance, _disk) = record.reference.split_once('/')?;
    let instance = Uuid::try_parse(instance).ok()?;
    let could = |role| record.role == role && record.reference == reference(instance, role);
    (record.backend == BACKEND && ROLES.into_iter().any(could)).then_some(instance)
}

/// A name that only this operation uses.
fn temporary_name(record: &DiskRecord) -> String {
    format!(".{}.{}.partial", file_name(record.role), record.operation)
}

/// Removes what a crash of this very operation left. It made the name and then the provenance, so the file bears its id,
/// or nothing at all and is empty; any other is left, and the create that follows fails with `EEXIST`.
fn remove_temporary(directory: &OwnedFd, record: &DiskRecord) -> io::Result<()> {
    let operation = record.operation;
    let name = temporary_name(record);
    if record.role == DiskRole::Seed {
        seed::remove_documents(directory, &Path::new(&name).with_extension(seed::DOCUMENTS))?;
    }
    match look(directory, &name)? {
        Found::Disk { file, operation: Some(found) } if found == operation => {
            unlink_exactly(directory, &name, &file).map(|_| ())
        }
        Found::Disk { file, operation: None } if file.metadata()?.len() == 0 => {
            unlink_exactly(directory, &name, &file).map(|_| ())
        }
        Found::Nothing | Found::Disk { .. } | Found::Foreign => Ok(()),
    }
}
