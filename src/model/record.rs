//! What the store holds of an object; JSON, one record a key.

mod bin;
mod shelf;

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::caller::Ownership;
use super::domain::{Definition, Domain};
use super::image::Format;
use super::keys::Keys;
use super::network::Network;
use super::protection::Protection;
use super::sharing::Sharing;
pub use bin::{BinEntry, Expiry, InstanceBin};
pub use shelf::{Copied, Fingerprint, Shelf, ShelfCopy, ShelfStage};

/// What a disk is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskRole {
    /// The guest boots from it.
    #[default]
    Root,
    /// It tells a new guest its `user_data`.
    Seed,
}

/// A disk that instancefs made. A disk without such a record is never deleted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// The backend's name, `directory`.
    pub backend: String,
    /// The backend's own name for it.
    pub reference: String,
    /// The operation that created it.
    pub operation: Uuid,
    /// What it is for.
    #[serde(default)]
    pub role: DiskRole,
}

/// A refusal or failure, as `last_error` and `errors` show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorLine {
    /// Unix seconds.
    pub time: u64,
    /// Who asked.
    pub login: String,
    /// The file that he wrote, or the verb.
    pub file: String,
    /// `EPERM`, ...
    pub errno: String,
    /// One sentence: what happened and what to do next.
    pub reason: String,
}

/// The last refusals and failures of one object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorHistory {
    /// Whether the newest line still stands: no later write or operation succeeded.
    pub current: bool,
    /// At most [`ErrorHistory::LENGTH`], the newest last.
    pub lines: Vec<ErrorLine>,
}

impl ErrorHistory {
    /// How many lines are kept.
    pub const LENGTH: usize = 16;

    /// Appends a line, which becomes `last_error`.
    pub fn push(&mut self, line: ErrorLine) {
        if self.lines.len() == Self::LENGTH {
            self.lines.remove(0);
        }
        self.lines.push(line);
        self.current = true;
    }

    /// The line that `last_error` shows; `None` reads as `ok`.
    pub fn last(&self) -> Option<&ErrorLine> {
        if self.current { self.lines.last() } else { None }
    }
}

/// What is kept of a draft until it becomes real.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Draft {
    /// Some write into it succeeded, so `rmdir` no longer discards it.
    pub written: bool,
}

/// A second link of a protected disk's file, so that removing the disk by its path loses nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptLink {
    /// The disk's path.
    pub path: PathBuf,
    /// The link's.
    pub link: PathBuf,
    /// The inode number of both.
    pub inode: u64,
    /// The path was seen not to lead there any more, so that the link may be the last name of what it holds. Somebody
    /// was told, once.
    #[serde(default)]
    pub is_told: bool,
}

/// What became of a domain that is not defined any more, or was not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undefined {
    /// Unix seconds when it was noticed.
    pub at: u64,
    /// How its definition went.
    pub departure: Departure,
    /// It had saved memory, which went with the definition.
    pub had_saved_memory: bool,
}

/// How a definition went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Departure {
    /// The hypervisor told us that it was undefined.
    Told,
    /// It was not there when we looked: who undefined it, and why, is not known.
    Missing,
    /// It lives on under another name or on another host, which owns the disks now.
    Moved,
}

/// The value of [`InstanceRecord::crashed`] that says: the crash that the hypervisor reports is no error any more. It
/// holds until the guest runs again.
pub const CRASH_ACKNOWLEDGED: &str = "";

/// An instance, under `instances/<uuid>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceRecord {
    /// The number behind its inodes; never reused.
    pub number: u64,
    /// The name: of a draft the wanted one, else the domain's, last seen.
    pub name: String,
    /// Free text.
    pub description: String,
    /// Owner and project.
    pub ownership: Ownership,
    /// Lock and termination protection.
    pub protection: Protection,
    /// Unix seconds.
    pub created_at: u64,
    /// Unix seconds.
    pub updated_at: u64,
    /// Unix seconds of the last start that we saw.
    pub launched_at: Option<u64>,
    /// How long `stopped` waits for the guest, in seconds.
    pub stop_timeout_seconds: u32,
    /// Present until it is defined.
    pub draft: Option<Draft>,
    /// The image of its root disk.
    pub image: Option<Uuid>,
    /// The name of the flavor whose values were copied last.
    #[serde(default)]
    pub flavor: Option<String>,
    /// Virtual CPUs: of a draft the wanted number; else the definition says.
    pub vcpus: u32,
    /// Memory in bytes, likewise.
    pub memory_bytes: u64,
    /// Size of the root disk in bytes; `None` in a draft means the image's.
    pub root_disk_bytes: Option<u64>,
    /// What its network card is connected to: of a draft as wanted, else as the definition says; `None` if that says
    /// something else than [`Network`] can.
    #[serde(default)]
    pub network: Option<Network>,
    /// Of a draft, whether it is to be started with the host; on the shelf and in the bin, where it is not, whether it
    /// will be afterwards; else the hypervisor says.
    #[serde(default)]
    pub autostart: bool,
    /// The disks that we made for it.
    pub disks: Vec<DiskRecord>,
    /// Why it is in `error` although the hypervisor has moved on (a crash is remembered until the next start);
    /// [`CRASH_ACKNOWLEDGED`] after somebody answered the crash that the hypervisor still reports.
    pub crashed: Option<String>,
    /// The operation that owns it.
    pub operation: Option<Uuid>,
    /// The latest operation.
    pub last_task: Option<Uuid>,
    /// Refusals and failures.
    pub errors: ErrorHistory,
    /// The domain as last seen, where it lives on while there is no connection.
    pub seen: Option<Domain>,
    /// What its definition said, last seen.
    pub definition: Option<Definition>,
    /// Grows whenever the stored definition becomes another text.
    pub definition_revision: u64,
    /// `metadata/`: free text.
    #[serde(default)]
    pub metadata: Keys<String>,
    /// What cloud-init in the guest is to read. Shared, since it may be large and the record is copied often.
    #[serde(default)]
    pub user_data: Option<Arc<str>>,
    /// Present while it is in the bin.
    #[serde(default)]
    pub bin: Option<InstanceBin>,
    /// Present while something of it is on the shelf.
    #[serde(default)]
    pub shelf: Option<Shelf>,
    /// Its domain was undefined outside; stays after it was defined again, until something else happens to it.
    #[serde(default)]
    pub undefined: Option<Undefined>,
    /// The second links of its disks' files, recorded before they are made.
    #[serde(default)]
    pub kept: Vec<KeptLink>,
    /// The volumes that it has, by device name.
    #[serde(default)]
    pub volumes: Keys<Uuid>,
}

impl InstanceRecord {
    /// How long `stopped` waits for the guest where nobody said otherwise, in seconds.
    const STOP_TIMEOUT_SECONDS: u32 = 60;

    /// One of which nothing else is known: no draft, without image, disks and definition. `now` is in Unix seconds.
    pub fn new(number: u64, name: String, ownership: Ownership, now: u64) -> InstanceRecord {
        InstanceRecord {
            number,
            name,
            description: String::new(),
            ownership,
            protection: Protection::default(),
            created_at: now,
            updated_at: now,
            launched_at: None,
            stop_timeout_seconds: Self::STOP_TIMEOUT_SECONDS,
            draft: None,
            image: None,
            flavor: None,
            vcpus: 0,
            memory_bytes: 0,
            root_disk_bytes: None,
            network: None,
            autostart: false,
            disks: Vec::new(),
            crashed: None,
            operation: None,
            last_task: None,
            errors: ErrorHistory::default(),
            seen: None,
            definition: None,
            definition_revision: 0,
            metadata: Keys::default(),
            user_data: None,
            bin: None,
            shelf: None,
            undefined: None,
            kept: Vec::new(),
            volumes: Keys::default(),
        }
    }
}

/// An image, under `images/<uuid>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// The number behind its inodes; never reused.
    pub number: u64,
    /// The name, not unique.
    pub name: String,
    /// Free text.
    pub description: String,
    /// Owner and project.
    pub ownership: Ownership,
    /// Unix seconds.
    pub created_at: u64,
    /// Unix seconds.
    pub updated_at: u64,
    /// Present until it is committed.
    pub draft: Option<Draft>,
    /// The claimed format of a draft (`None`: find out), the proven one of an active image.
    pub disk_format: Option<Format>,
    /// Bytes of `data`, once active.
    pub size_bytes: u64,
    /// Bytes that a guest sees, once active.
    pub virtual_size_bytes: u64,
    /// Lower-case hexadecimal, once active.
    pub sha512: Option<String>,
    /// Who may read it.
    #[serde(default)]
    pub sharing: Sharing,
    /// Refuses every kind of deletion.
    #[serde(default)]
    pub delete_protection: bool,
    /// Taken out of use after it was active.
    #[serde(default)]
    pub deactivated: bool,
    /// Bytes that a root disk made from it must have at least; 0 for no demand.
    #[serde(default)]
    pub min_disk_bytes: u64,
    /// Bytes of memory that a guest made from it must have at least; 0 for no demand.
    #[serde(default)]
    pub min_memory_bytes: u64,
    /// The operation that owns it.
    pub operation: Option<Uuid>,
    /// The latest operation.
    pub last_task: Option<Uuid>,
    /// Refusals and failures.
    pub errors: ErrorHistory,
    /// `metadata/`: free text.
    #[serde(default)]
    pub metadata: Keys<String>,
    /// Where a draft's data is to come from: an http(s) URL, or a path below the import directory.
    #[serde(default)]
    pub import_from: Option<String>,
    /// Present while it is in the bin.
    #[serde(default)]
    pub bin: Option<BinEntry>,
}

impl ImageRecord {
    /// One of which nothing else is known: no draft, and no data. `now` is in Unix seconds.
    pub fn new(number: u64, name: String, ownership: Ownership, now: u64) -> ImageRecord {
        ImageRecord {
            number,
            name,
            description: String::new(),
            ownership,
            created_at: now,
            updated_at: now,
            draft: None,
            disk_format: None,
            size_bytes: 0,
            virtual_size_bytes: 0,
            sha512: None,
            sharing: Sharing::default(),
            delete_protection: false,
            deactivated: false,
            min_disk_bytes: 0,
            min_memory_bytes: 0,
            operation: None,
            last_task: None,
            errors: ErrorHistory::default(),
            metadata: Keys::default(),
            import_from: None,
            bin: None,
        }
    }
}

/// A flavor, stored under its uuid and shown under its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlavorRecord {
    /// The number behind its inodes; never reused.
    pub number: u64,
    /// The name, unique.
    pub name: String,
    /// Free text.
    pub description: String,
    /// Who made it.
    pub ownership: Ownership,
    /// Unix seconds.
    pub created_at: u64,
    /// Unix seconds.
    pub updated_at: u64,
    /// Present while it is not offered.
    pub draft: Option<Draft>,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Size of the root disk in bytes; `None` means the image's.
    pub root_disk_bytes: Option<u64>,
    /// Everybody in the access group may use it.
    pub is_public: bool,
    /// The groups that may use it where it is not public, in ascending order.
    pub access: Vec<u32>,
    /// Refusals.
    pub errors: ErrorHistory,
}
