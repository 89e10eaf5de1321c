//! Where disks live: one trait, one kind of backend so far, and the set of those that the configuration names.

pub mod backends;
pub mod backing;
mod base;
pub mod copy;
pub mod directory;
pub mod kept;
pub mod local;
mod marked;
pub mod open;
mod seed;
pub mod shelf;
mod volume_directory;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use uuid::Uuid;

pub use crate::image::Format;
pub use crate::model::domain::DiskSource;
pub use crate::model::record::{DiskRecord, DiskRole};
pub use crate::model::volume::record::{DataRecord, ExistingData, VolumeData};

/// A disk to be made as a copy-on-write child of an image.
#[derive(Clone, Debug)]
pub struct NewDisk<'a> {
    /// The owning instance; part of the reference.
    pub instance: Uuid,
    /// The operation that creates it, kept with the disk as provenance.
    pub operation: Uuid,
    /// The image's file, absolute; it never changes.
    pub image: &'a Path,
    /// The image's format.
    pub image_format: crate::image::Format,
    /// Virtual size in bytes, at least the image's.
    pub size_bytes: u64,
}

/// A seed to be made: a small read-only disk with documents for the guest, in the form that cloud-init looks for (NoCloud).
#[derive(Clone, Copy)]
pub struct NewSeed<'a> {
    /// The owning instance; part of the reference.
    pub instance: Uuid,
    /// The operation that creates it, kept with the disk as provenance.
    pub operation: Uuid,
    /// The files on it, by name. They may hold secrets.
    pub documents: &'a [(&'static str, &'a [u8])],
}

/// What the content of new data is copied from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// Nothing: it reads as zeros.
    Empty,
    /// An image's file, absolute, which never changes.
    Image(&'a Path, Format),
    /// A volume, which nobody writes to meanwhile.
    Volume(&'a VolumeData),
    /// A snapshot of a volume.
    Snapshot(&'a DataRecord),
    /// What another backend keeps, which nobody writes to meanwhile.
    Elsewhere(&'a DiskSource, Format),
}

/// The data of a new volume, or of a new snapshot of one.
#[derive(Clone, Copy, Debug)]
pub struct NewData<'a> {
    /// The volume; part of the reference.
    pub volume: Uuid,
    /// Of a snapshot, what tells it from others of this volume; part of the reference. Never used twice.
    pub snapshot: Option<Uuid>,
    /// The operation that creates it, kept with the data as provenance.
    pub operation: Uuid,
    /// Virtual size in bytes, at least the source's. A backend that deals out larger pieces makes it larger.
    pub size_bytes: u64,
    /// The wanted format; `None`: the backend's own choice.
    pub format: Option<Format>,
    /// What it begins with.
    pub source: Source<'a>,
}

/// What a backend knows of data that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Examined {
    /// Virtual size in bytes.
    pub size_bytes: u64,
    /// The format of its bytes.
    pub format: Format,
}

/// Asked now and then, from any thread, by what takes long: the percentage that is done is shown, and an error gives it up.
pub type Watch<'a> = &'a (dyn Fn(u8) -> Result<(), BlockError> + Sync);

/// Writes a new disk's bytes.
pub type FillFile<'a> = &'a dyn Fn(&File) -> Result<(), BlockError>;

/// Why a backend did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// No space left.
    #[error("no space left on {0}; free some and try again")]
    NoSpace(String),
    /// The disk exists and another operation made it.
    #[error("the disk {0} exists already and was not made by this operation; look at it before you move it away")]
    Exists(String),
    /// The record does not match what lies there: left alone.
    #[error("the disk {0} was not made by the operation that its record names; left as it is")]
    NotOurs(String),
    /// The quota is used up.
    #[error("the disk quota for {0} is used up; raise it or free some space")]
    Quota(String),
    /// What should be there is not.
    #[error("there is no {0}")]
    Missing(String),
    /// What is there is not what was written.
    #[error("{0}")]
    Damaged(String),
    /// Somebody has it open; a sentence that says who.
    #[error("{0}")]
    InUse(String),
    /// What was named is nothing that is taken over; a sentence that says why.
    #[error("{0}")]
    Refused(String),
    /// Given up on request.
    #[error("given up")]
    Cancelled,
    /// A tool or system call failed, in its own words.
    #[error("{0}")]
    Failed(String),
}

impl BlockError {
    /// What a failing write at `place` means.
    fn of_write(place: &str, error: &io::Error) -> BlockError {
        match error.raw_os_error() {
            Some(libc::ENOSPC) => BlockError::NoSpace(place.to_owned()),
            Some(libc::EDQUOT) => BlockError::Quota(place.to_owned()),
            Some(_) | None => BlockError::Failed(format!("{place}: {error}")),
        }
    }
}

/// Makes, grows and removes the disks of instances. Every call is idempotent for the same operation.
pub trait BlockBackend: Send + Sync {
    /// Its name in records.
    fn name(&self) -> &str;
    /// The record that [`BlockBackend::create`] will produce; journaled before the disk exists.
    fn plan(&self, disk: &NewDisk<'_>) -> DiskRecord;
    /// Makes the disk; succeeds if this same operation made it before, finishing what a crash left half-made.
    fn create(&self, disk: &NewDisk<'_>) -> Result<DiskRecord, BlockError>;
    /// The record that [`BlockBackend::create_seed`] will produce; journaled before the seed exists.
    fn plan_seed(&self, seed: &NewSeed<'_>) -> DiskRecord;
    /// Makes the seed, readable for QEMU alone; succeeds if this same operation made it before.
    fn create_seed(&self, seed: &NewSeed<'_>) -> Result<DiskRecord, BlockError>;
    /// Makes a root disk as large as this, in bytes, if its provenance matches the record; one of that size or larger is
    /// left as it is.
    fn grow(&self, record: &DiskRecord, size_bytes: u64) -> Result<(), BlockError>;
    /// Opens a disk for reading if its provenance matches the record; [`BlockError::Missing`] if there is none.
    fn open(&self, record: &DiskRecord) -> Result<File, BlockError>;
    /// The format of its bytes.
    fn format(&self, record: &DiskRecord) -> Format;
    /// Makes a disk that was there before at its place again, with the bytes that `fill` writes into the new, empty file;
    /// succeeds if this same operation made it before. The record is the former one with the operation that makes it now.
    fn create_again(&self, record: &DiskRecord, fill: FillFile<'_>) -> Result<(), BlockError>;
    /// The absolute path for a definition.
    fn path(&self, record: &DiskRecord) -> PathBuf;
    /// Removes exactly this disk if its provenance matches the record; an absent one is success.
    fn remove(&self, record: &DiskRecord) -> Result<(), BlockError>;
    /// Where it keeps volumes.
    fn volumes(&self) -> &dyn VolumeBackend;
}

/// Makes, grows and removes the data of volumes and snapshots, as every kind of storage can. Every call is idempotent for the same operation.
pub trait VolumeBackend: Send + Sync {
    /// The record that [`VolumeBackend::create_data`] will produce; journaled before the data exists.
    fn plan_data(&self, new: &NewData<'_>) -> DataRecord;
    /// Makes the data of a volume or snapshot, durable and complete; succeeds if this same operation made it before. Says
    /// what it became.
    fn create_data(&self, new: &NewData<'_>, watch: Watch<'_>) -> Result<Examined, BlockError>;
    /// Removes exactly this data if its provenance matches the record; absent data is success.
    fn remove_data(&self, record: &DataRecord) -> Result<(), BlockError>;
    /// Makes a volume at least as large as this, in bytes, and says how large it is; never smaller. `in_use`: a guest or this
    /// host has it open, and will be told of the new size by the caller. What only the one who has it open can do is left to
    /// him, and the size is the old one then.
    fn grow_data(&self, data: &VolumeData, size_bytes: u64, in_use: bool) -> Result<u64, BlockError>;
    /// Looks whether the data is there and still what the record says.
    fn examine(&self, data: &VolumeData) -> Result<Examined, BlockError>;
    /// Looks at data that is there already, without changing it in any way, and says what the record has to say of it.
    /// `claimed`: the format that somebody says it has.
    fn adopt(&self, reference: &str, claimed: Option<Format>) -> Result<(ExistingData, Examined), BlockError>;
    /// How a guest, or this host, reaches the data. Asks nobody.
    fn source(&self, data: &VolumeData) -> DiskSource;
    /// Makes the data reachable as its source says, before a guest or this host opens it; nothing to do where it always is.
    fn prepare(&self, data: &VolumeData) -> Result<(), BlockError>;
    /// Opens the data for reading and writing, for this host, if it is what the record says.
    fn open_data(&self, data: &VolumeData) -> Result<File, BlockError>;
    /// Who has the data open, in words for a sentence.
    fn holder(&self, data: &VolumeData) -> Result<Option<String>, BlockError>;
    /// Total and free bytes.
    fn capacity(&self) -> Result<(u64, u64), BlockError>;
}
