//! One domain of the simulated host, and what libvirt asks of it before it acts.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::hypervisor::{Domain, HypervisorError, Places, PowerState};

/// One domain and the guest that runs in it, as kept on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Guest {
    /// What the hypervisor says of it.
    pub(super) domain: Domain,
    /// The definition.
    pub(super) xml: String,
    /// The saved memory is that of a paused guest, which stays paused when it is restored.
    pub(super) saved_paused: bool,
    /// The guest takes no notice of its power button.
    pub(super) ignores_acpi: bool,
    /// How long it takes over a shutdown or reboot, in milliseconds.
    pub(super) acpi_delay_ms: u64,
    /// The power button was pressed and the guest has not finished yet.
    pub(super) button: Option<Button>,
    /// How often a kernel booted in it: starts without saved memory, reboots and resets.
    pub(super) boots: u64,
    /// Its addresses, as its agent says them.
    #[serde(default)]
    pub(super) agent_addresses: Vec<IpAddr>,
    /// Its addresses, as the host knows them.
    #[serde(default)]
    pub(super) host_addresses: Vec<IpAddr>,
    /// What it has while it runs.
    #[serde(default)]
    pub(super) live_xml: Option<String>,
    /// It refuses to let disks go.
    #[serde(default)]
    pub(super) refuses_detach: bool,
    /// How long it takes to let a disk go, in milliseconds.
    #[serde(default)]
    pub(super) detach_delay_ms: u64,
    /// The disks that it was asked to let go, by device, with when it will, in milliseconds of the epoch.
    #[serde(default)]
    pub(super) leaving: BTreeMap<String, u64>,
    /// The sizes in bytes that disks were given while it ran, by device.
    #[serde(default)]
    pub(super) disk_bytes: BTreeMap<String, u64>,
}

/// A request that the guest is working on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Button {
    /// When it will be done, in milliseconds of the epoch.
    pub(super) due_ms: u64,
    /// It restarts, rather than stays off.
    pub(super) restart: bool,
}

impl Guest {
    /// One that was just defined, and is off.
    pub(super) fn new(uuid: Uuid, name: String, xml: String) -> Guest {
        Guest {
            domain: Domain {
                uuid,
                name,
                power: PowerState::ShutOff,
                reason: "unknown".to_owned(),
                persistent: true,
                has_managed_save: false,
                autostart: false,
            },
            xml,
            saved_paused: false,
            ignores_acpi: false,
            acpi_delay_ms: 0,
            button: None,
            boots: 0,
            agent_addresses: Vec::new(),
            host_addresses: Vec::new(),
            live_xml: None,
            refuses_detach: false,
            detach_delay_ms: 0,
            leaving: BTreeMap::new(),
            disk_bytes: BTreeMap::new(),
        }
    }

    /// QEMU runs for it, whether the guest does or not.
    pub(super) fn active(&self) -> bool {
        match self.domain.power {
            PowerState::Running | PowerState::Paused | PowerState::PmSuspended | PowerState::Crashed => true,
            PowerState::ShutOff => false,
        }
    }

    /// Puts it into this state; one that is off has forgotten its power button.
    pub(super) fn enter(&mut self, power: PowerState, reason: &str) {
        self.domain.power = power;
        reason.clone_into(&mut self.domain.reason);
        if self.active() {
            self.live_xml.get_or_insert_with(|| self.xml.clone());
        } else {
            self.button = None;
            self.live_xml = None;
            self.leaving.clear();
        }
    }

    pub(super) fn demand_active(&self) -> Result<(), HypervisorError> {
        if self.active() { Ok(()) } else { Err(invalid("domain is not running")) }
    }

    pub(super) fn demand_persistent(&self, refusal: &str) -> Result<(), HypervisorError> {
        if self.domain.persistent { Ok(()) } else { Err(invalid(refusal)) }
    }

    /// What libvirt asks before it touches these definitions.
    pub(super) fn demand(&self, places: Places) -> Result<(), HypervisorError> {
        if places.live {
            self.demand_active()?;
        }
        if places.persistent {
            self.demand_persistent("transient domains do not have any persistent config")?;
        }
        Ok(())
    }

    /// When its button takes effect, or it lets a disk go; a guest whose CPUs stand still gets nowhere.
    pub(super) fn due(&self) -> Option<(u64, Uuid)> {
        if self.domain.power != PowerState::Running {
            return None;
        }
        let due = self.button.map(|button| button.due_ms).into_iter().chain(self.leaving.values().copied()).min();
        due.map(|due| (due, self.domain.uuid))
    }
}

/// libvirt's `VIR_ERR_OPERATION_INVALID`.
pub(super) fn invalid(detail: &str) -> HypervisorError {
    HypervisorError::InvalidState(format!("Requested operation is not valid: {detail}"))
}
