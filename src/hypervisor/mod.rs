//! What instancefs needs from a hypervisor, and the two that it has: libvirt, and a simulated one for tests.
//!
//! Every call may block for as long as the hypervisor likes and cannot be cancelled; callers run them in threads of
//! their own and never while holding a lock.

pub mod definition;
pub mod libvirt;
pub mod simulated;
pub mod target;

use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Receiver;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use crate::model::domain::{ConsoleDevice, Domain, PowerState};
use crate::model::network::Network;

/// What happened, as far as it needs attention. Events may be merged or repeated; after one the receiver looks again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// This domain came, went, or changed its power, definition, metadata or devices.
    Changed(Uuid),
    /// This domain's CPUs were stopped, or go on; nothing else changed.
    Frozen(Uuid),
    /// This domain's guest restarted, by itself or by reset, without its QEMU ending.
    Rebooted(Uuid),
    /// This domain's guest has moved to another host, which owns its disks now. Its definition may have stayed, or gone
    /// without another word.
    Moved(Uuid),
    /// A device was taken out of this domain's guest: the guest has let it go.
    DeviceRemoved(Uuid),
    /// The guest was asked to let a device go, and refused.
    DeviceKept {
        /// The domain.
        uuid: Uuid,
        /// The hypervisor's own name for the device, see [`definition::disk_alias`].
        device: String,
    },
    /// This domain was undefined. `kept` says that libvirt reported a rename or a migration, after which the
    /// definition lives on elsewhere.
    Undefined {
        /// The domain.
        uuid: Uuid,
        /// The definition lives on under another name or on another host.
        kept: bool,
    },
    /// The connection is up (again): whatever was known may be stale.
    Connected,
    /// The connection is lost, with the reason.
    Disconnected(String),
}

/// Who we are connected to; recorded at the first mount of a state directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The connection URI that a later mount has to use.
    pub uri: String,
    /// The host's UUID, as the hypervisor reports it.
    pub host_uuid: String,
    /// The host's name, for `host`.
    pub hostname: String,
}

/// How a guest is restarted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reboot {
    /// The guest is asked to (ACPI, or its agent).
    Soft,
    /// The virtual reset button.
    Hard,
}

/// What a domain runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accelerator {
    /// Hardware virtualisation.
    Kvm,
    /// QEMU's emulation.
    Tcg,
}

/// Who is asked for a guest's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressSource {
    /// The guest itself, by its agent. It may never answer.
    Agent,
    /// The host: its DHCP leases, else its neighbour table.
    Host,
}

/// Which of a domain's two definitions a call is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// The one that outlives its run.
    pub persistent: bool,
    /// What the guest has now.
    pub live: bool,
}

/// Which networks guests can have here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Networks {
    /// What a new draft has.
    pub default: Network,
    /// There is a driver for libvirt's networks.
    pub has_libvirt_networks: bool,
    /// Guests run on this very host, so that its bridges are theirs.
    pub is_local: bool,
}

/// Why the hypervisor did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HypervisorError {
    /// There is no connection, or it broke during the call: the outcome is unknown.
    #[error("the hypervisor is not reachable: {0}")]
    Unreachable(String),
    /// No such domain.
    #[error("the hypervisor does not know this domain")]
    NoDomain,
    /// The domain is not in a state for this call.
    #[error("{0}")]
    InvalidState(String),
    /// A domain of that name or UUID exists already.
    #[error("{0}")]
    Exists(String),
    /// This hypervisor or connection cannot do it.
    #[error("{0}")]
    Unsupported(String),
    /// It refused or failed, in its own words.
    #[error("{0}")]
    Failed(String),
}

/// A hypervisor and the connection to it.
///
/// The connection is kept up by the implementation: it reconnects by itself, sends [`Event::Connected`] each time, and
/// answers [`HypervisorError::Unreachable`] meanwhile.
pub trait Hypervisor: Send + Sync {
    /// Who answers on the other side; an RPC, so also the check whether it answers at all.
    fn identity(&self) -> Result<Identity, HypervisorError>;
    /// The events from now on. Called once, before the first [`Hypervisor::connect`].
    fn events(&self) -> Receiver<Event>;
    /// Connects for the first time, and reports why that is impossible; afterwards the connection is kept up.
    fn connect(&self) -> Result<(), HypervisorError>;
    /// A cheap round trip.
    fn ping(&self) -> Result<(), HypervisorError>;
    /// All domains in a constant number of round trips.
    fn domains(&self) -> Result<Vec<Domain>, HypervisorError>;
    /// One domain, `None` if there is none.
    fn domain(&self, uuid: Uuid) -> Result<Option<Domain>, HypervisorError>;
    /// What one domain does, and its reason: a part of the same answer that may come sooner.
    fn power(&self, uuid: Uuid) -> Result<Option<(PowerState, String)>, HypervisorError> {
        Ok(self.domain(uuid)?.map(|domain| (domain.power, domain.reason)))
    }
    /// The persistent definition (the live one of a transient domain) as XML, without secrets.
    fn definition(&self, uuid: Uuid) -> Result<String, HypervisorError>;
    /// What the guest has now, as XML without secrets; `None` while there is no guest.
    fn live_definition(&self, uuid: Uuid) -> Result<Option<String>, HypervisorError>;
    /// Creates or replaces a definition.
    fn define(&self, xml: &str) -> Result<(), HypervisorError>;
    /// Removes a definition and its saved memory; disks, NVRAM and TPM state stay.
    fn undefine(&self, uuid: Uuid) -> Result<(), HypervisorError>;
    /// Starts a defined domain, from its saved memory if it has some.
    fn start(&self, uuid: Uuid) -> Result<(), HypervisorError>;
    /// Asks the guest to shut down (ACPI); returns when the request is sent.
    fn shutdown(&self, uuid: Uuid) -> Result<(), HypervisorError>;
    /// Pulls the plug; returns when the domain is off.
    fn power_off(&self, uuid: Uuid) -> Result<(), HypervisorError>;
    /// Freezes the virtual CPUs.
    fn pause(&self, uuid: Uuid) -> Result<(), HypervisorError>;
    /// Lets them run again.
    fn unpause(&self, uuid: Uuid) -> Result<(), HypervisorError>;
    /// Saves the memory to disk and stops the domain (managed save).
    fn save(&self, uuid: Uuid) -> Result<(), HypervisorError>;
    /// Restarts the guest; returns when the request is sent.
    fn reboot(&self, uuid: Uuid, kind: Reboot) -> Result<(), HypervisorError>;
    /// Connects to a console of a running guest. It ends with the guest's run, or when the caller closes it.
    fn open_console(&self, uuid: Uuid, device: ConsoleDevice) -> Result<UnixStream, HypervisorError>;
    /// Renames a stopped domain.
    fn rename(&self, uuid: Uuid, name: &str) -> Result<(), HypervisorError>;
    /// Sets or removes (`None`) our metadata element (see [`definition::METADATA_NAMESPACE`]), live and persistent.
    fn set_metadata(&self, uuid: Uuid, xml: Option<&str>) -> Result<(), HypervisorError>;
    /// Sets or removes the domain's description.
    fn set_description(&self, uuid: Uuid, text: Option<&str>) -> Result<(), HypervisorError>;
    /// Has a domain started with the host, or not.
    fn set_autostart(&self, uuid: Uuid, on: bool) -> Result<(), HypervisorError>;
    /// Changes virtual CPUs and memory in the definition of a domain that is off; everything else in it stays, secrets
    /// included. `None` leaves a value as it is.
    fn set_hardware(&self, uuid: Uuid, vcpus: Option<u32>, memory_bytes: Option<u64>) -> Result<(), HypervisorError>;
    /// Puts a disk into these definitions, in one call: into both, or into neither. Refused where the device is there
    /// already.
    fn attach_disk(&self, uuid: Uuid, disk: &definition::AttachedDisk, places: Places) -> Result<(), HypervisorError>;
    /// Takes a disk out of these definitions. The guest is only asked to let it go, and does later or never: then
    /// [`Event::DeviceRemoved`] or [`Event::DeviceKept`] comes.
    fn detach_disk(&self, uuid: Uuid, device: &str, places: Places) -> Result<(), HypervisorError>;
    /// Makes a disk of a guest that is there larger, and tells the guest; one of this size or larger stays as it is. Where
    /// the disk is a file, that grows too.
    fn resize_disk(&self, uuid: Uuid, device: &str, size_bytes: u64) -> Result<(), HypervisorError>;
    /// The addresses of a running guest, as this source knows them; empty if it knows none.
    fn addresses(&self, uuid: Uuid, source: AddressSource) -> Result<Vec<IpAddr>, HypervisorError>;
    /// Which networks guests can have here. Asks nobody.
    fn networks(&self) -> Networks;
    /// What new guests run on here: found out by trying (see [`libvirt::accelerator`]), remembered afterwards. May
    /// take up to 5 s the first time.
    fn accelerator(&self) -> Result<Accelerator, HypervisorError>;
    /// How new guests are wired: paths and device choices that this connection needs in a definition.
    fn definition_profile(&self) -> definition::Profile;
}
