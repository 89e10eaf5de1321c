//! Disks as files below one directory: `<directory>/<instance>/root.qcow2`, an overlay of its image, and beside it
//! `seed.iso`. Volumes are files below a directory of their own, see `volume_directory`.
//!
//! **Provenance** is the operation's id in the extended attribute `user.instancefs.operation` of the disk itself. It is
//! bound to the inode: it appears together with the name, survives renames, chown and restarts, and does not pass to a file
//! that somebody puts in the disk's place, as a note beside the disk would. Where it got lost (a copy without
//! attributes) the disk is left alone, which is the safe side. File systems without user attributes are refused.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::base::{Base, Fill, Place};
use super::volume_directory::VolumeDirectory;
use super::{
    BlockBackend, BlockError, DiskRecord, DiskRole, FillFile, Format, NewDisk, NewSeed, VolumeBackend, marked, seed,
};
use crate::image::qemu_img;

/// The name of the one that is always there.
pub const BUILT_IN: &str = "directory";
const ROLES: [DiskRole; 2] = [DiskRole::Root, DiskRole::Seed];

/// A backend of the type `directory`.
pub struct DirectoryBackend {
    name: String,
    guest_group: Option<u32>,
    disks: Base,
    volumes: VolumeDirectory,
}

/// Whether the file system of a file that its caller has just made keeps what marks disks. The mark stays on it.
///
/// # Errors
///
/// What the file system says; `EOPNOTSUPP` if it has no user attributes.
pub fn takes_marks(file: &File) -> io::Result<()> {
    marked::set_operation(file, Uuid::nil())
}

impl DirectoryBackend {
    /// The backend [`BUILT_IN`], with disks and volumes below `directory`, which is made when the first one is (not its
    /// parents). Disks are 0600 and root's; libvirt's dynamic ownership gives them to QEMU while it runs. Directories made
    /// are 0711; with the group that QEMU runs in, `guest_group`, they are that group's and 0710.
    pub fn new(directory: PathBuf, guest_group: Option<u32>) -> DirectoryBackend {
        DirectoryBackend {
            name: BUILT_IN.to_owned(),
            guest_group,
            disks: Base::new(directory.clone(), guest_group),
            volumes: VolumeDirectory::new(BUILT_IN, directory, guest_group),
        }
    }

    /// The same with its volumes below another directory.
    #[must_use]
    pub fn with_volumes_in(mut self, directory: PathBuf) -> DirectoryBackend {
        self.volumes = VolumeDirectory::new(&self.name, directory, self.guest_group);
        self
    }

    /// The same under another name.
    #[must_use]
    pub fn named(mut self, name: &str) -> DirectoryBackend {
        name.clone_into(&mut self.name);
        self.volumes = self.volumes.named(name);
        self
    }

    /// The same, taking over files below these directories, absolute.
    #[must_use]
    pub fn managing(mut self, directories: Vec<PathBuf>) -> DirectoryBackend {
        self.volumes = self.volumes.managing(directories);
        self
    }

    /// Makes the disk, or finds the one that this operation made before.
    fn make(&self, record: &DiskRecord, instance: Uuid, fill: Fill<'_>) -> Result<(), BlockError> {
        self.disks.make(&place(instance, record), fill)
    }

    fn record(&self, instance: Uuid, operation: Uuid, role: DiskRole) -> DiskRecord {
        DiskRecord { backend: self.name.clone(), reference: reference(instance, role), operation, role }
    }

    /// The instance of a record, if this backend could have written it: exactly `<uuid>/` and the file of its role,
    /// nothing that leads elsewhere.
    fn instance_of(&self, record: &DiskRecord) -> Option<Uuid> {
        let (instance, _disk) = record.reference.split_once('/')?;
        let instance = Uuid::try_parse(instance).ok()?;
        let could = |role| record.role == role && record.reference == reference(instance, role);
        (record.backend == self.name && ROLES.into_iter().any(could)).then_some(instance)
    }
}

impl BlockBackend for DirectoryBackend {
    fn name(&self) -> &str {
        &self.name
    }

    fn plan(&self, disk: &NewDisk<'_>) -> DiskRecord {
        self.record(disk.instance, disk.operation, DiskRole::Root)
    }

    fn create(&self, disk: &NewDisk<'_>) -> Result<DiskRecord, BlockError> {
        let record = self.plan(disk);
        self.make(&record, disk.instance, &|_file, path| {
            qemu_img::create_overlay(path, disk.image, disk.image_format, disk.size_bytes)
                .map_err(|words| self.disks.said(words))
        })?;
        Ok(record)
    }

    fn plan_seed(&self, seed: &NewSeed<'_>) -> DiskRecord {
        self.record(seed.instance, seed.operation, DiskRole::Seed)
    }

    fn create_seed(&self, new: &NewSeed<'_>) -> Result<DiskRecord, BlockError> {
        let record = self.plan_seed(new);
        self.make(&record, new.instance, &|mut file, path| {
            let image =
                seed::image(&path.with_extension(seed::DOCUMENTS), new.documents).map_err(|failure| match failure {
                    seed::Failure::File(error) => self.disks.at(path, error),
                    seed::Failure::Tool(words) => self.disks.said(words),
                })?;
            io::Write::write_all(&mut file, &image).map_err(|error| self.disks.at(path, error))
        })?;
        Ok(record)
    }

    fn grow(&self, record: &DiskRecord, size_bytes: u64) -> Result<(), BlockError> {
        let not_ours = || BlockError::NotOurs(record.reference.clone());
        let instance = self.instance_of(record).filter(|_| record.role == DiskRole::Root).ok_or_else(not_ours)?;
        let path = self.path(record);
        let missing = || BlockError::Missing(format!("disk {}", path.display()));
        let file = self.disks.find(&place(instance, record))?.ok_or_else(missing)?;
        let present = qemu_img::disk_size(&path).map_err(|words| self.disks.said(words))?;
        if present < size_bytes {
            qemu_img::grow(&path, size_bytes).map_err(|words| self.disks.said(words))?;
            file.sync_all().map_err(|error| self.disks.at(&path, error))?;
        }
        Ok(())
    }

    fn open(&self, record: &DiskRecord) -> Result<File, BlockError> {
        let instance = self.instance_of(record).ok_or_else(|| BlockError::NotOurs(record.reference.clone()))?;
        let missing = || BlockError::Missing(format!("disk {}", self.path(record).display()));
        self.disks.find(&place(instance, record))?.ok_or_else(missing)
    }

    fn format(&self, record: &DiskRecord) -> Format {
        match record.role {
            DiskRole::Root => Format::Qcow2,
            DiskRole::Seed => Format::Raw,
        }
    }

    fn create_again(&self, record: &DiskRecord, fill: FillFile<'_>) -> Result<(), BlockError> {
        let instance = self.instance_of(record).ok_or_else(|| BlockError::NotOurs(record.reference.clone()))?;
        self.make(record, instance, &|file, _path| fill(file))
    }

    /// The path of the disk. A record that is not one of ours leads to a path where nothing is.
    fn path(&self, record: &DiskRecord) -> PathBuf {
        match self.instance_of(record) {
            Some(instance) => self.disks.path().join(reference(instance, record.role)),
            None => self.disks.path().join("not-a-disk-of-this-backend"),
        }
    }

    fn remove(&self, record: &DiskRecord) -> Result<(), BlockError> {
        let instance = self.instance_of(record).ok_or_else(|| BlockError::NotOurs(record.reference.clone()))?;
        self.disks.remove(&place(instance, record))
    }

    fn volumes(&self) -> &dyn VolumeBackend {
        &self.volumes
    }
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

fn place(instance: Uuid, record: &DiskRecord) -> Place<'static> {
    let aside = match record.role {
        DiskRole::Root => None,
        DiskRole::Seed => Some(remove_documents as fn(&OwnedFd, &Path) -> io::Result<()>),
    };
    Place { owner: instance, name: file_name(record.role), operation: record.operation, aside }
}

fn remove_documents(directory: &OwnedFd, temporary: &Path) -> io::Result<()> {
    seed::remove_documents(directory, &temporary.with_extension(seed::DOCUMENTS))
}
