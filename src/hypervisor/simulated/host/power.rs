//! What runs and what does not: as people want it, and as it befalls guests.

use uuid::Uuid;

use super::Host;
use crate::hypervisor::simulated::guest::{Button, invalid};
use crate::hypervisor::{Event, HypervisorError, PowerState, Reboot};

impl Host {
    pub(in crate::hypervisor::simulated) fn start(&mut self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.change(uuid, |guest| {
            if guest.active() {
                return Err(invalid("domain is already running"));
            }
            if guest.domain.has_managed_save {
                guest.domain.has_managed_save = false;
                if guest.saved_paused {
                    guest.enter(PowerState::Paused, "migration");
                } else {
                    guest.enter(PowerState::Running, "restored");
                }
            } else {
                guest.boots += 1;
                guest.enter(PowerState::Running, "booted");
            }
            Ok(())
        })
    }

    /// Presses the power button. A guest that stands still never hears of it.
    pub(in crate::hypervisor::simulated) fn press_button(
        &mut self,
        uuid: Uuid,
        restart: bool,
        now_ms: u64,
    ) -> Result<(), HypervisorError> {
        let guest = self.guest(uuid)?;
        guest.demand_active()?;
        if guest.domain.power != PowerState::Running || guest.ignores_acpi {
            return Ok(());
        }
        let mut guest = guest.clone();
        let due_ms = now_ms.saturating_add(guest.acpi_delay_ms);
        guest.button = Some(Button { due_ms, restart });
        // No event: nothing of the domain has changed before the guest is done.
        self.store(guest)
    }

    pub(in crate::hypervisor::simulated) fn reboot(
        &mut self,
        uuid: Uuid,
        kind: Reboot,
        now_ms: u64,
    ) -> Result<(), HypervisorError> {
        match kind {
            Reboot::Soft => self.press_button(uuid, true, now_ms),
            Reboot::Hard => self.restart(uuid),
        }
    }

    pub(super) fn restart(&mut self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.alter(uuid, Event::Rebooted(uuid), |guest| {
            guest.demand_active()?;
            guest.button = None;
            guest.boots += 1;
            Ok(())
        })
    }

    /// Ends the guest's run, for the reason given (`destroyed`, `shutdown`, `crashed`, ...).
    pub(in crate::hypervisor::simulated) fn end(&mut self, uuid: Uuid, reason: &str) -> Result<(), HypervisorError> {
        self.change(uuid, |guest| {
            guest.demand_active()?;
            guest.enter(PowerState::ShutOff, reason);
            Ok(())
        })
    }

    /// The guest panics and its remains are kept (`<on_crash>preserve</on_crash>`).
    pub(in crate::hypervisor::simulated) fn panic(&mut self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.change(uuid, |guest| {
            guest.demand_active()?;
            guest.enter(PowerState::Crashed, "panicked");
            Ok(())
        })
    }

    pub(in crate::hypervisor::simulated) fn pause(&mut self, uuid: Uuid, reason: &str) -> Result<(), HypervisorError> {
        self.change(uuid, |guest| {
            guest.demand_active()?;
            match guest.domain.power {
                PowerState::PmSuspended => Err(invalid("domain is pmsuspended")),
                PowerState::Running | PowerState::Crashed => {
                    guest.enter(PowerState::Paused, reason);
                    Ok(())
                }
                PowerState::Paused | PowerState::ShutOff => Ok(()),
            }
        })
    }

    pub(in crate::hypervisor::simulated) fn unpause(&mut self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.change(uuid, |guest| {
            guest.demand_active()?;
            match guest.domain.power {
                PowerState::PmSuspended => Err(invalid("domain is pmsuspended")),
                PowerState::Running => Err(invalid("domain is already running")),
                PowerState::Paused | PowerState::Crashed | PowerState::ShutOff => {
                    guest.enter(PowerState::Running, "unpaused");
                    Ok(())
                }
            }
        })
    }

    /// The guest goes to sleep by itself.
    pub(in crate::hypervisor::simulated) fn sleep(&mut self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.change(uuid, |guest| {
            guest.demand_active()?;
            guest.enter(PowerState::PmSuspended, "unknown");
            Ok(())
        })
    }

    /// Something wakes the sleeping guest.
    pub(in crate::hypervisor::simulated) fn wake(&mut self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.change(uuid, |guest| match guest.domain.power {
            PowerState::PmSuspended => {
                guest.enter(PowerState::Running, "wakeup");
                Ok(())
            }
            PowerState::Running | PowerState::Paused | PowerState::ShutOff | PowerState::Crashed => {
                Err(invalid("domain is not pmsuspended"))
            }
        })
    }

    pub(in crate::hypervisor::simulated) fn save(&mut self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.change(uuid, |guest| {
            guest.demand_active()?;
            guest.demand_persistent("cannot do managed save for transient domain")?;
            guest.saved_paused = match guest.domain.power {
                PowerState::Running => false,
                PowerState::Paused => true,
                PowerState::PmSuspended | PowerState::Crashed | PowerState::ShutOff => {
                    return Err(invalid("domain is neither running nor paused"));
                }
            };
            guest.enter(PowerState::ShutOff, "saved");
            guest.domain.has_managed_save = true;
            Ok(())
        })
    }
}
