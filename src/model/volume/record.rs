//! What the store holds of a volume.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::State;
use crate::model::caller::Ownership;
use crate::model::image::Format;
use crate::model::keys::Keys;
use crate::model::protection::Protection;
use crate::model::record::{BinEntry, Draft, ErrorHistory};

/// Where a new volume's content comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// A copy of an active image.
    Image(Uuid),
    /// A copy of another volume.
    Volume(Uuid),
    /// A copy of a volume's snapshot.
    Snapshot {
        /// The volume.
        volume: Uuid,
        /// The snapshot's name.
        name: String,
    },
    /// No copy: data that is there already, where it is.
    Existing {
        /// The backend's name.
        backend: String,
        /// What the backend calls it; of a directory a path.
        reference: String,
    },
}

/// As it is written.
impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Image(id) => write!(f, "image:{id}"),
            Origin::Volume(id) => write!(f, "volume:{id}"),
            Origin::Snapshot { volume, name } => write!(f, "snapshot:{volume}/{name}"),
            Origin::Existing { backend, reference } => write!(f, "existing:{backend}:{reference}"),
        }
    }
}

/// The data of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VolumeData {
    /// Made by instancefs, which removes it with the volume.
    Ours(DataRecord),
    /// It was there before: never renamed, rewritten by us, or removed.
    Existing(ExistingData),
}

impl VolumeData {
    /// The backend's name.
    pub fn backend(&self) -> &str {
        match self {
            VolumeData::Ours(record) => &record.backend,
            VolumeData::Existing(existing) => &existing.backend,
        }
    }

    /// The format of its bytes.
    pub fn format(&self) -> Format {
        match self {
            VolumeData::Ours(record) => record.format,
            VolumeData::Existing(existing) => existing.format,
        }
    }
}

/// Data that instancefs made, of a volume or of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataRecord {
    /// The backend's name.
    pub backend: String,
    /// The backend's own name for it.
    pub reference: String,
    /// The operation that created it, which it bears as its provenance.
    pub operation: Uuid,
    /// The format of its bytes.
    pub format: Format,
}

/// Data that instancefs did not make. It is known by what it is, not by a mark on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExistingData {
    /// The backend's name.
    pub backend: String,
    /// What the backend calls it; of a directory its absolute path.
    pub reference: String,
    /// What it was when it was taken over, in the backend's words: other data in its place has another identity. Of a file
    /// its inode and when that was made.
    pub identity: String,
    /// The format of its bytes.
    pub format: Format,
}

/// A volume's place in one instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The device name in the guest, `vdb`.
    pub device: String,
    /// Unix seconds.
    pub attached_at: u64,
}

/// A volume as a block device of this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalAttachment {
    /// The device, `/dev/loop3`; `None`: it is to be made again, since the host restarted.
    pub device: Option<PathBuf>,
    /// The boot of the host, by its kernel's `boot_id`, in which the device was made.
    pub boot_id: String,
    /// The program that makes raw bytes of another format, if one does.
    pub exporter: Option<Exporter>,
    /// The file behind the device, with which it is ours.
    #[serde(default)]
    pub backing: Option<Backing>,
}

/// Which file it is, whatever it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backing {
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
}

/// A process that exports a disk's content as a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exporter {
    /// Its process id.
    pub pid: i32,
    /// Its start in clock ticks after boot (`/proc/PID/stat`, field 22), so that another process of that id is not it.
    pub started_at: u64,
    /// The file on which it is mounted.
    pub mountpoint: PathBuf,
}

/// The content of a volume at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// Its data; `None` until it is complete.
    pub data: Option<DataRecord>,
    /// Virtual size in bytes.
    pub size_bytes: u64,
    /// Unix seconds.
    pub created_at: u64,
}

/// A volume, under `volumes/<uuid>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// The number behind its inodes; never reused.
    pub number: u64,
    /// The name, not unique.
    pub name: String,
    /// Free text.
    pub description: String,
    /// Owner and project.
    pub ownership: Ownership,
    /// Lock, and `delete_protection` as [`Protection::disable_terminate`].
    pub protection: Protection,
    /// Unix seconds.
    pub created_at: u64,
    /// Unix seconds.
    pub updated_at: u64,
    /// Present until it is made.
    pub draft: Option<Draft>,
    /// Virtual size in bytes; 0 in a draft means that of its origin.
    pub size_bytes: u64,
    /// The backend's name.
    pub backend: String,
    /// The format of the data; `None` in a draft means the backend's own choice.
    pub disk_format: Option<Format>,
    /// An instance may boot from it.
    pub bootable: bool,
    /// Several instances may have it at once.
    pub multiattach: bool,
    /// Where its content came from.
    pub created_from: Option<Origin>,
    /// Its data; recorded before it is made.
    pub data: Option<VolumeData>,
    /// What operations made for it, failed to finish, and could not take back; removed with it at the latest.
    pub leftovers: Vec<DataRecord>,
    /// Who has it, by the instance's uuid.
    pub attachments: Keys<Attachment>,
    /// Present while it is, or is to be, a block device of this host.
    pub local: Option<LocalAttachment>,
    /// Its snapshots by name.
    pub snapshots: Keys<SnapshotRecord>,
    /// The offer under which it waits for somebody else.
    pub transfer: Option<Uuid>,
    /// Why it is in `error`.
    pub fault: Option<String>,
    /// The operation that owns it.
    pub operation: Option<Uuid>,
    /// The latest operation.
    pub last_task: Option<Uuid>,
    /// Refusals and failures.
    pub errors: ErrorHistory,
    /// Present while it is in the bin.
    pub bin: Option<BinEntry>,
}

impl VolumeRecord {
    /// One of which nothing else is known: no draft, and no data. `now` is in Unix seconds.
    pub fn new(number: u64, name: String, ownership: Ownership, backend: String, now: u64) -> VolumeRecord {
        VolumeRecord {
            number,
            name,
            description: String::new(),
            ownership,
            protection: Protection::default(),
            created_at: now,
            updated_at: now,
            draft: None,
            size_bytes: 0,
            backend,
            disk_format: None,
            bootable: false,
            multiattach: false,
            created_from: None,
            data: None,
            leftovers: Vec::new(),
            attachments: Keys::default(),
            local: None,
            snapshots: Keys::default(),
            transfer: None,
            fault: None,
            operation: None,
            last_task: None,
            errors: ErrorHistory::default(),
            bin: None,
        }
    }

    /// The state.
    pub fn state(&self) -> State {
        if self.bin.is_some() {
            State::SoftDeleted
        } else if self.draft.is_some() {
            State::Draft
        } else if self.fault.is_some() {
            State::Error
        } else if self.transfer.is_some() {
            State::AwaitingTransfer
        } else if !self.attachments.is_empty() || self.local.is_some() {
            State::InUse
        } else {
            State::Available
        }
    }

    /// The instances that have it, with its place there.
    pub fn attached_to(&self) -> impl Iterator<Item = (Uuid, &Attachment)> {
        self.attachments.iter().filter_map(|(id, entry)| Some((Uuid::try_parse(id).ok()?, &entry.value)))
    }
}
