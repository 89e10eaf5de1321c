//! Domain XML: what we write for a new guest, and what we read out of any definition.

use std::path::PathBuf;

use uuid::Uuid;

use super::Accelerator;

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

/// One disk of a definition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DefinedDisk {
    /// Target device, `vda`.
    pub device: String,
    /// File or block device, if it is one.
    pub path: Option<PathBuf>,
    /// `qcow2`, `raw`, ...
    pub format: Option<String>,
}

/// What we read out of a definition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Definition {
    /// Maximum virtual CPUs.
    pub vcpus: Option<u32>,
    /// Maximum memory in bytes.
    pub memory_bytes: Option<u64>,
    /// `<description>`.
    pub description: Option<String>,
    /// Disks (device='disk' only).
    pub disks: Vec<DefinedDisk>,
    /// The file that logs the first serial or console device.
    pub console_log: Option<PathBuf>,
}
