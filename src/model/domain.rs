//! A domain, as the hypervisor described it at one moment.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::network::Network;

/// What the hypervisor says of a domain's power, in libvirt's terms (`virDomainState`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PowerState {
    /// RUNNING, BLOCKED or SHUTDOWN (being shut down by the guest).
    Running,
    /// PAUSED by the user, or for the reason given.
    Paused,
    /// PMSUSPENDED: the guest sleeps.
    PmSuspended,
    /// SHUTOFF.
    ShutOff,
    /// CRASHED.
    Crashed,
}

impl PowerState {
    /// Whether a guest is there.
    pub fn is_on(self) -> bool {
        match self {
            PowerState::Running | PowerState::Paused | PowerState::PmSuspended | PowerState::Crashed => true,
            PowerState::ShutOff => false,
        }
    }

    /// The content of `power_state`.
    pub fn word(self) -> &'static str {
        match self {
            PowerState::Running => "running",
            PowerState::Paused => "paused",
            PowerState::PmSuspended => "pmsuspended",
            PowerState::ShutOff => "shutoff",
            PowerState::Crashed => "crashed",
        }
    }
}

/// One domain, as the hypervisor described it at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Domain {
    /// Its UUID, which is the instance's.
    pub uuid: Uuid,
    /// Its libvirt name; any bytes that XML allows.
    pub name: String,
    /// Its power state.
    pub power: PowerState,
    /// Why, as libvirt's reason word in lower case with underscores: `booted`, `user`, `ioerror`, `crashed`,
    /// `watchdog`, `shutdown`, `destroyed`, `saved`, `failed`, `unknown`, ...
    pub reason: String,
    /// It has a definition that outlives its run.
    pub persistent: bool,
    /// It has saved memory that its next start resumes (managed save).
    pub has_managed_save: bool,
    /// It is started with the host.
    pub autostart: bool,
}

/// A console of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ConsoleDevice {
    /// The first serial port: what is typed and printed, for one client at a time.
    Serial,
    /// The screen, spoken to in the RFB protocol (RFC 6143).
    Vnc,
}

impl ConsoleDevice {
    /// Its file's name.
    pub fn word(self) -> &'static str {
        match self {
            ConsoleDevice::Serial => "serial",
            ConsoleDevice::Vnc => "vnc",
        }
    }
}

/// One disk of a definition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DefinedDisk {
    /// Target device, `vda`.
    pub device: String,
    /// File or block device, if it is one.
    pub path: Option<PathBuf>,
    /// `qcow2`, `raw`, ...
    pub format: Option<String>,
    /// The guest cannot write it.
    #[serde(default)]
    pub read_only: bool,
}

/// What we read out of a definition.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// Maximum virtual CPUs.
    pub vcpus: Option<u32>,
    /// Maximum memory in bytes.
    pub memory_bytes: Option<u64>,
    /// `<description>`.
    pub description: Option<String>,
    /// What its only network card is connected to; `None` if there are several or it is of another kind.
    #[serde(default)]
    pub network: Option<Network>,
    /// Disks (device='disk' only).
    pub disks: Vec<DefinedDisk>,
    /// The file that logs the first serial or console device.
    pub console_log: Option<PathBuf>,
    /// It has a serial or console device.
    #[serde(default)]
    pub has_serial: bool,
    /// It has VNC graphics.
    #[serde(default)]
    pub has_vnc: bool,
}

/// How the bytes of a disk are reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskSource {
    /// A file, absolute.
    File(PathBuf),
    /// A block device, absolute.
    Block(PathBuf),
}

impl DiskSource {
    /// Where it lies on this host, if it does.
    pub fn path(&self) -> Option<&Path> {
        match self {
            DiskSource::File(path) | DiskSource::Block(path) => Some(path),
        }
    }
}
