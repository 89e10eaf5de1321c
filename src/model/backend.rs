//! Storage backends, as `backends/<name>/` shows them.

use serde::{Deserialize, Serialize};

/// What a backend keeps disks in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Files in a directory.
    Directory,
}

impl Kind {
    /// The content of `type`.
    pub fn word(self) -> &'static str {
        match self {
            Kind::Directory => "directory",
        }
    }
}

/// What the store holds of a backend, so that its inodes stay the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendRecord {
    /// The number behind its inodes; never reused.
    pub number: u64,
    /// Its name, unique.
    pub name: String,
    /// What it is.
    pub kind: Kind,
}
