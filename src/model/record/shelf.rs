//! What is recorded of the shelf of an instance.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::DiskRecord;

/// What is on the shelf of an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shelf {
    /// How far it is.
    pub stage: ShelfStage,
    /// Unix seconds.
    pub shelved_at: u64,
    /// The operation that made the copies.
    pub operation: Uuid,
    /// The copies, one for each disk.
    pub copies: Vec<ShelfCopy>,
    /// Copies that nobody needs any more: newer ones are proven, or these were never finished. Any time is right to
    /// remove them.
    #[serde(default)]
    pub former: Vec<Copied>,
    /// Unix seconds of the guest's last start since it left the shelf.
    #[serde(default)]
    pub ran_at: Option<u64>,
}

impl Shelf {
    /// The guest was seen to start. From outside too, where its disks are: then they are ahead of the copies.
    pub fn saw_start(&mut self, now: u64) {
        self.stage = ShelfStage::Left;
        self.ran_at = Some(now);
    }
}

/// How far a shelved instance is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShelfStage {
    /// Disks and copies are there.
    Shelved,
    /// Only the copies.
    Offloaded,
    /// Back from the shelf; the copies stay until the guest has run.
    Left,
}

/// Which copy of which disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copied {
    /// The operation that made the copy.
    pub operation: Uuid,
    /// The disk that it was made of.
    pub disk: DiskRecord,
}

/// What tells a file, as it was at one moment, from every other and from itself after a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
    /// Length in bytes.
    pub size_bytes: u64,
    /// Time of the last change of its bytes: Unix seconds, and nanoseconds.
    pub modified: (i64, i64),
}

/// A proven copy of a disk, byte for byte.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShelfCopy {
    /// Which.
    pub of: Copied,
    /// The disk's file when the copy was proven.
    pub fingerprint: Fingerprint,
    /// Length in bytes.
    pub size_bytes: u64,
    /// Of its bytes; lower-case hexadecimal.
    pub sha512: String,
}
