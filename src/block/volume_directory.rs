//! Volumes as files below one directory: `<directory>/<volume>/data`, and beside it a snapshot as `<directory>/<volume>/<its
//! uuid>`, each marked as the disks of instances are. And volumes that were files before, in directories that the
//! administrator names: those are only ever looked at, grown and handed to guests.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::time::UNIX_EPOCH;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use uuid::Uuid;

use super::base::{Base, Place};
use super::copy::{self, copy, fingerprint, settled_fingerprint};
use super::{
    BlockError, DataRecord, DiskSource, Examined, ExistingData, Format, NewData, Source, VolumeBackend, VolumeData,
    Watch, open,
};
use crate::image::{inspect, qemu_img};

const DATA: &str = "data";
/// The unit of a disk's size, in bytes.
const SECTOR_BYTES: u64 = 512;
/// The mode of a file that everybody may write to.
const WRITABLE_BY_ALL: u32 = 0o002;

/// See the module.
pub(super) struct VolumeDirectory {
    name: String,
    base: Base,
    manage: Vec<PathBuf>,
}

/// Data that is there.
struct Opened {
    file: File,
    path: PathBuf,
    format: Format,
}

impl VolumeDirectory {
    pub(super) fn new(name: &str, directory: PathBuf, guest_group: Option<u32>) -> VolumeDirectory {
        VolumeDirectory { name: name.to_owned(), base: Base::new(directory, guest_group), manage: Vec::new() }
    }

    pub(super) fn named(self, name: &str) -> VolumeDirectory {
        VolumeDirectory { name: name.to_owned(), ..self }
    }

    pub(super) fn managing(self, manage: Vec<PathBuf>) -> VolumeDirectory {
        VolumeDirectory { manage, ..self }
    }

    /// Writes what the new, empty file is to begin with.
    fn fill(&self, made: &Opened, source: Source<'_>, size_bytes: u64, watch: Watch<'_>) -> Result<(), BlockError> {
        match source {
            Source::Empty => match made.format {
                Format::Raw => Ok(()),
                Format::Qcow2 => {
                    qemu_img::create(&made.file, &made.path, size_bytes).map_err(|words| self.base.said(words))
                }
            },
            Source::Image(path, format) => self.copy(&open_source(path, format)?, made, watch),
            Source::Volume(data) => self.copy(&self.open(data)?, made, watch),
            Source::Snapshot(record) => {
                let opened = self.find(record)?.ok_or_else(|| self.missing(record))?;
                self.copy(&opened, made, watch)
            }
            Source::Elsewhere(DiskSource::File(path) | DiskSource::Block(path), format) => {
                self.copy(&open_source(path, format)?, made, watch)
            }
        }
    }

    /// Copies a disk that nobody may write to meanwhile, which is looked at before and afterwards.
    fn copy(&self, from: &Opened, to: &Opened, watch: Watch<'_>) -> Result<(), BlockError> {
        let unreadable = |error| BlockError::Failed(format!("{} cannot be read: {error}", from.path.display()));
        let is_file = from.file.metadata().map_err(unreadable)?.is_file();
        nobody_writes(&from.path)?;
        let before = settled_fingerprint(&from.file).map_err(unreadable)?;
        if is_file && from.format == to.format {
            let progress = |percent: u8| drop(watch(percent));
            let watch = copy::Watch { cancelled: &|| watch(0).is_err(), progress: &progress };
            copy(&from.file, &to.file, &watch).map_err(|error| {
                error.named(&from.path.display().to_string(), &self.base.path().display().to_string())
            })?;
        } else {
            let end = |end: &Opened| (end.format, end.path.clone());
            let ((from_format, from_path), (to_format, to_path)) = (end(from), end(to));
            qemu_img::convert(
                qemu_img::End { file: &from.file, path: &from_path, format: from_format },
                qemu_img::End { file: &to.file, path: &to_path, format: to_format },
                &|percent| watch(percent).is_ok(),
            )
            .map_err(|failure| match failure {
                qemu_img::ConvertFailure::Cancelled => BlockError::Cancelled,
                qemu_img::ConvertFailure::Failed(words) => self.base.said(words),
            })?;
        }
        nobody_writes(&from.path)?;
        if is_file && fingerprint(&from.file).map_err(unreadable)? != before {
            return Err(BlockError::InUse(format!(
                "{} changed while it was copied; see who writes to it, and try again",
                from.path.display()
            )));
        }
        Ok(())
    }

    /// Makes a disk larger that is smaller.
    fn enlarge(&self, opened: &Opened, size_bytes: u64) -> Result<(), BlockError> {
        match opened.format {
            Format::Raw => {
                let size_bytes = size_bytes.next_multiple_of(SECTOR_BYTES);
                // Exactly the file that was found, whatever its name leads to by now.
                let own = format!("/proc/self/fd/{}", opened.file.as_raw_fd());
                let grown = OpenOptions::new().write(true).open(own).and_then(|file| file.set_len(size_bytes));
                grown.map_err(|error| self.base.at(&opened.path, error))
            }
            Format::Qcow2 => qemu_img::grow(&opened.path, size_bytes).map_err(|words| self.base.said(words)),
        }
    }

    /// Opens a regular file below one of the directories that the administrator named, for reading. Neither `..` nor a
    /// symlink leads there, nor does a mount below them: that could be our own tree, which must not be read from here.
    fn open_managed(&self, path: &Path) -> Result<File, BlockError> {
        let refused = |why: &str| BlockError::Refused(format!("{} is not taken over: {why}", path.display()));
        let is_plain = path.is_absolute()
            && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        if !is_plain {
            return Err(refused("write its absolute path, without .."));
        }
        let below = self.manage.iter().find_map(|directory| Some((directory, path.strip_prefix(directory).ok()?)));
        let Some((directory, name)) = below else {
            return Err(refused(&format!(
                "it lies below no directory that root named as manage of [backends.{}] in the configuration",
                self.name
            )));
        };
        let failed = |error: Errno| match error {
            Errno::EXDEV | Errno::ELOOP => refused("a symlink or another mount leads there"),
            Errno::ENOENT | Errno::ENOTDIR => BlockError::Missing(format!("file {}", path.display())),
            error => self.base.at(path, error.into()),
        };
        let directory = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(directory)
            .map_err(|error| self.base.at(directory, error))?;
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV;
        // Without opening it really: a device or FIFO would notice.
        let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(resolve);
        let found = openat2(&directory, name, how).map(File::from).map_err(failed)?;
        if !found.metadata().map_err(|error| self.base.at(path, error))?.is_file() {
            return Err(refused("it is not a regular file"));
        }
        File::open(format!("/proc/self/fd/{}", found.as_raw_fd())).map_err(|error| self.base.at(path, error))
    }

    /// Where the data lies. A record that is not one of ours leads to a path where nothing is.
    fn path(&self, data: &VolumeData) -> PathBuf {
        match data {
            VolumeData::Ours(record) => match self.place(record) {
                Ok(_) => self.base.path().join(&record.reference),
                Err(_) => self.base.path().join("not-a-volume-of-this-backend"),
            },
            VolumeData::Existing(existing) => PathBuf::from(&existing.reference),
        }
    }

    fn open(&self, data: &VolumeData) -> Result<Opened, BlockError> {
        match data {
            VolumeData::Ours(record) => self.find(record)?.ok_or_else(|| self.missing(record)),
            VolumeData::Existing(existing) => {
                let opened = open_source(Path::new(&existing.reference), existing.format)?;
                let metadata = opened.file.metadata().map_err(|error| self.base.at(&opened.path, error))?;
                if !metadata.is_file() || identity(&metadata) != existing.identity {
                    return Err(BlockError::Damaged(format!(
                        "{} is not the file any more that was taken over: another one lies in its place",
                        existing.reference
                    )));
                }
                Ok(opened)
            }
        }
    }

    fn find(&self, record: &DataRecord) -> Result<Option<Opened>, BlockError> {
        let found = self.base.find(&self.place(record)?)?;
        let path = self.base.path().join(&record.reference);
        Ok(found.map(|file| Opened { file, path, format: record.format }))
    }

    fn missing(&self, record: &DataRecord) -> BlockError {
        BlockError::Missing(format!("volume data {}", self.base.path().join(&record.reference).display()))
    }

    fn size(&self, opened: &Opened) -> Result<u64, BlockError> {
        match opened.format {
            Format::Raw => Ok(opened.file.metadata().map_err(|error| self.base.at(&opened.path, error))?.len()),
            Format::Qcow2 => {
                qemu_img::volume_size(&opened.file, &opened.path, Format::Qcow2).map_err(BlockError::Failed)
            }
        }
    }

    /// The place of a record, if this backend could have written it: exactly `<uuid>/data` or `<uuid>/<uuid>`, nothing that
    /// leads elsewhere.
    fn place<'a>(&self, record: &'a DataRecord) -> Result<Place<'a>, BlockError> {
        let parse = |text: &str| Uuid::try_parse(text).ok().filter(|id| id.to_string() == text);
        let parts = record.reference.split_once('/').filter(|_| record.backend == self.name);
        let parts = parts.and_then(|(volume, name)| Some((parse(volume)?, name)));
        match parts {
            Some((owner, name)) if name == DATA || parse(name).is_some() => {
                Ok(Place { owner, name, operation: record.operation, aside: None })
            }
            Some(_) | None => Err(BlockError::NotOurs(record.reference.clone())),
        }
    }
}

impl VolumeBackend for VolumeDirectory {
    fn plan_data(&self, new: &NewData<'_>) -> DataRecord {
        let name = new.snapshot.map_or_else(|| DATA.to_owned(), |snapshot| snapshot.to_string());
        DataRecord {
            backend: self.name.clone(),
            reference: format!("{}/{name}", new.volume),
            operation: new.operation,
            format: new.format.unwrap_or(Format::Qcow2),
        }
    }

    fn create_data(&self, new: &NewData<'_>, watch: Watch<'_>) -> Result<Examined, BlockError> {
        let record = self.plan_data(new);
        let size_bytes = new
            .size_bytes
            .checked_next_multiple_of(SECTOR_BYTES)
            .ok_or_else(|| BlockError::Refused(format!("{} bytes are no size of a disk", new.size_bytes)))?;
        self.base.make(&self.place(&record)?, &|file, path| {
            let made = Opened {
                file: file.try_clone().map_err(|error| self.base.at(path, error))?,
                path: path.to_owned(),
                format: record.format,
            };
            self.fill(&made, new.source, size_bytes, watch)?;
            // A source may be larger than its record says: its growing was interrupted.
            if self.size(&made)? < size_bytes { self.enlarge(&made, size_bytes) } else { Ok(()) }
        })?;
        let made = self.find(&record)?.ok_or_else(|| self.missing(&record))?;
        Ok(Examined { size_bytes: self.size(&made)?, format: record.format })
    }

    fn remove_data(&self, record: &DataRecord) -> Result<(), BlockError> {
        self.base.remove(&self.place(record)?)
    }

    fn grow_data(&self, data: &VolumeData, size_bytes: u64, in_use: bool) -> Result<u64, BlockError> {
        let opened = self.open(data)?;
        let present = self.size(&opened)?;
        if present >= size_bytes {
            return Ok(present);
        }
        match opened.format {
            Format::Raw => {}
            // Its tables belong to who has it open, who grows it when he is told to.
            Format::Qcow2 if in_use => return Ok(present),
            Format::Qcow2 => {
                if let Some(holder) = self.holder(data)? {
                    return Err(BlockError::InUse(format!("{holder} has {} open", opened.path.display())));
                }
            }
        }
        self.enlarge(&opened, size_bytes)?;
        opened.file.sync_all().map_err(|error| self.base.at(&opened.path, error))?;
        self.size(&opened)
    }

    fn examine(&self, data: &VolumeData) -> Result<Examined, BlockError> {
        let opened = self.open(data)?;
        let size_bytes = self.size(&opened).map_err(|error| match error {
            BlockError::Failed(words) => BlockError::Damaged(format!(
                "{} cannot be opened as {}: {words}",
                opened.path.display(),
                opened.format.word()
            )),
            error => error,
        })?;
        Ok(Examined { size_bytes, format: opened.format })
    }

    fn adopt(&self, reference: &str, claimed: Option<Format>) -> Result<(ExistingData, Examined), BlockError> {
        let path = Path::new(reference);
        let file = self.open_managed(path)?;
        let metadata = file.metadata().map_err(|error| self.base.at(path, error))?;
        let refused = |why: &str| BlockError::Refused(format!("{reference} is not taken over: {why}"));
        if metadata.nlink() != 1 {
            return Err(refused("it has other names too, and others may use it by those; remove them, or make a copy"));
        }
        if metadata.mode() & WRITABLE_BY_ALL != 0 {
            return Err(refused("everybody may write to it; chmod o-w it first"));
        }
        let failed =
            |error| BlockError::Failed(format!("whether anybody has {reference} open cannot be found out: {error}"));
        if let Some(holder) = open::holder(path).map_err(failed)? {
            return Err(BlockError::InUse(format!("{holder} has {reference} open; end that first, and try again")));
        }
        let inspected = inspect::inspect(&file, claimed).map_err(|refusal| refused(&refusal.to_string()))?;
        let examined = Examined { size_bytes: inspected.virtual_size_bytes, format: inspected.format };
        let existing = ExistingData {
            backend: self.name.clone(),
            reference: reference.to_owned(),
            identity: identity(&metadata),
            format: inspected.format,
        };
        Ok((existing, examined))
    }

    fn source(&self, data: &VolumeData) -> DiskSource {
        DiskSource::File(self.path(data))
    }

    fn prepare(&self, _data: &VolumeData) -> Result<(), BlockError> {
        Ok(())
    }

    fn open_data(&self, data: &VolumeData) -> Result<File, BlockError> {
        let opened = self.open(data)?;
        // The same file again, whatever lies in its place by now.
        let same = format!("/proc/self/fd/{}", opened.file.as_raw_fd());
        let file = OpenOptions::new().read(true).write(true).open(same);
        file.map_err(|error| self.base.at(&opened.path, error))
    }

    fn holder(&self, data: &VolumeData) -> Result<Option<String>, BlockError> {
        let path = self.path(data);
        let holder = open::holder(&path).map_err(|error| self.base.at(&path, error))?;
        Ok(holder.map(|holder| holder.to_string()))
    }

    fn capacity(&self) -> Result<(u64, u64), BlockError> {
        self.base.capacity()
    }
}

fn nobody_writes(path: &Path) -> Result<(), BlockError> {
    match open::writer(path) {
        Ok(None) => Ok(()),
        Ok(Some(writer)) => Err(BlockError::InUse(format!(
            "{writer} has {} open for writing; end that first, and try again",
            path.display()
        ))),
        Err(error) => Err(BlockError::Failed(format!(
            "whether anybody writes to {} cannot be found out: {error}",
            path.display()
        ))),
    }
}

/// Opens a disk that lies elsewhere, for reading.
fn open_source(path: &Path, format: Format) -> Result<Opened, BlockError> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => BlockError::Missing(format!("file {}", path.display())),
        _ => BlockError::Failed(format!("{} cannot be opened: {error}", path.display())),
    })?;
    Ok(Opened { file, path: path.to_owned(), format })
}

/// What a file is, for [`ExistingData::identity`]. Where the file system does not say when a file was made, its inode alone.
fn identity(metadata: &fs::Metadata) -> String {
    let made = metadata.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    match made {
        Some(made) => format!("inode {} made {}.{:09}", metadata.ino(), made.as_secs(), made.subsec_nanos()),
        None => format!("inode {}", metadata.ino()),
    }
}
