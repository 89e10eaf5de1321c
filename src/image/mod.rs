//! Images: which bytes we accept as one, and how they come in.
//!
//! [`inspect`] is the only judge of a format, and no other program reads a byte of a draft before it agreed.

pub mod ingest;
pub mod inspect;

use serde::{Deserialize, Serialize};

/// The formats that we accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// QEMU copy on write, version 2 or 3, self-contained.
    Qcow2,
    /// Plain bytes.
    Raw,
}

impl Format {
    /// The word in files and on qemu-img's command line.
    pub fn word(self) -> &'static str {
        match self {
            Format::Qcow2 => "qcow2",
            Format::Raw => "raw",
        }
    }
}

/// What an inspection found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inspected {
    /// The format, which agrees with the claimed one if there was a claim.
    pub format: Format,
    /// The size that a guest sees, in bytes.
    pub virtual_size_bytes: u64,
}
