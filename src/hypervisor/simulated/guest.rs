//! One domain of the simulated host, and what libvirt asks of it before it acts.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::hypervisor::{Domain, HypervisorError, PowerState};

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
        if !self.active() {
            self.button = None;
        }
    }

    pub(super) fn demand_active(&self) -> Result<(), HypervisorError> {
        if self.active() { Ok(()) } else { Err(invalid("domain is not running")) }
    }

    pub(super) fn demand_persistent(&self, refusal: &str) -> Result<(), HypervisorError> {
        if self.domain.persistent { Ok(()) } else { Err(invalid(refusal)) }
    }

    /// When its button takes effect; a guest whose CPUs stand still gets nowhere.
    pub(super) fn due(&self) -> Option<(u64, Uuid)> {
        match (self.domain.power, self.button) {
            (PowerState::Running, Some(button)) => Some((button.due_ms, self.domain.uuid)),
            _ => None,
        }
    }
}

/// libvirt's `VIR_ERR_OPERATION_INVALID`.
pub(super) fn invalid(detail: &str) -> HypervisorError {
    HypervisorError::InvalidState(format!("Requested operation is not valid: {detail}"))
}
