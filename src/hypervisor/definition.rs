//! Domain XML: what we write for a new guest, and what we read out of any definition.

use std::path::PathBuf;

use uuid::Uuid;

use super::Accelerator;
pub use crate::model::domain::{DefinedDisk, Definition};

/// The namespace of our element in a domain's `<metadata>`.
pub const METADATA_NAMESPACE: &str = "https://instancefs.org/xmlns/instance/1";

/// What the connection demands of a definition that we write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// The QEMU binary, absolute.
    pub emulator: PathBuf,
    /// `x86_64`, ...
    pub architecture: String,
    /// `pc`, `q35`.
    pub machine: String,
}

/// A new guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewDomain {
    /// The instance's UUID.
    pub uuid: Uuid,
    /// The domain's name.
    pub name: String,
    /// The description, empty for none.
    pub description: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// The root disk (qcow2), absolute.
    pub root_disk: PathBuf,
    /// Where the serial console is logged, absolute.
    pub console_log: PathBuf,
    /// What it runs on.
    pub accelerator: Accelerator,
    /// Our metadata element, complete, or empty.
    pub metadata: String,
}
