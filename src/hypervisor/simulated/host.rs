//! The simulated host: its domains, and what happens to them, as libvirt's QEMU driver would have it
//! (`src/qemu/qemu_driver.c`, whose refusals are quoted).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;

use uuid::Uuid;

use super::consoles::Consoles;
use super::disk::Disk;
use super::guest::{Button, Guest, invalid};
use super::xml;
use crate::hypervisor::definition::Definition;
use crate::hypervisor::{AddressSource, ConsoleDevice, Domain, Event, HypervisorError, Places, PowerState, Reboot};

/// All domains of the host, in memory and on disk.
pub(super) struct Host {
    pub(super) disk: Disk,
    guests: BTreeMap<Uuid, Guest>,
    names: HashMap<String, Uuid>,
    buttons: BTreeSet<(u64, Uuid)>,
    outbox: Vec<Event>,
    consoles: Consoles,
}

impl Host {
    pub(super) fn load(disk: Disk) -> Result<Host, HypervisorError> {
        let guests = disk.guests()?;
        let mut host = Host {
            disk,
            guests: BTreeMap::new(),
            names: HashMap::new(),
            buttons: BTreeSet::new(),
            outbox: Vec::new(),
            consoles: Consoles::default(),
        };
        for guest in guests {
            host.remember(guest);
        }
        Ok(host)
    }

    /// The events since the last call; what they tell is visible.
    pub(super) fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.outbox)
    }

    pub(super) fn guests(&self) -> impl Iterator<Item = &Guest> {
        self.guests.values()
    }

    pub(super) fn guest(&self, uuid: Uuid) -> Result<&Guest, HypervisorError> {
        self.guests.get(&uuid).ok_or(HypervisorError::NoDomain)
    }

    /// When the next guest finishes what its power button asked for, in milliseconds of the epoch.
    pub(super) fn next_due(&self) -> Option<u64> {
        self.buttons.first().map(|(due, _)| *due)
    }

    /// Lets the guests finish whose time has come.
    pub(super) fn run_due(&mut self, now_ms: u64) -> Result<(), HypervisorError> {
        while let Some((due, uuid)) = self.buttons.first().copied() {
            if due > now_ms {
                break;
            }
            match self.guest(uuid)?.button.filter(|button| button.due_ms <= due) {
                Some(Button { restart: true, .. }) => self.restart(uuid)?,
                Some(Button { restart: false, .. }) => self.change(uuid, |guest| {
                    guest.enter(PowerState::ShutOff, "shutdown");
                    Ok(())
                })?,
                None => self.let_go(uuid, due)?,
            }
        }
        Ok(())
    }

    pub(super) fn define(&mut self, xml: &str) -> Result<Uuid, HypervisorError> {
        let guest = self.prepared(xml)?;
        let uuid = guest.domain.uuid;
        self.store(guest)?;
        self.outbox.push(Event::Changed(uuid));
        Ok(uuid)
    }

    /// Defines domains `prefix-1` to `prefix-count`, and tells of them when all are there.
    pub(super) fn define_many(
        &mut self,
        prefix: &str,
        count: u32,
        running: bool,
    ) -> Result<Vec<Uuid>, HypervisorError> {
        let mut uuids = Vec::new();
        let mut events = Vec::new();
        for number in 1..=count {
            let uuid = Uuid::new_v4();
            let xml = format!(
                "<domain type='qemu'>\n  <name>{}-{number}</name>\n  <uuid>{uuid}</uuid>\n  \
                 <memory unit='MiB'>128</memory>\n  <vcpu>1</vcpu>\n  <os><type arch='x86_64' \
                 machine='pc'>hvm</type></os>\n  <devices/>\n</domain>\n",
                xml::escaped(prefix)
            );
            let mut guest = self.prepared(&xml)?;
            if running {
                guest.enter(PowerState::Running, "booted");
                guest.boots = 1;
            }
            self.store(guest)?;
            events.push(Event::Changed(uuid));
            uuids.push(uuid);
        }
        self.outbox.append(&mut events);
        Ok(uuids)
    }

    /// What defining `xml` would make of the domain.
    fn prepared(&self, xml: &str) -> Result<Guest, HypervisorError> {
        let (name, uuid) = xml::name_and_uuid(xml)?;
        let (uuid, xml) = match uuid {
            Some(uuid) => (uuid, xml.to_owned()),
            None => {
                let uuid = self.names.get(&name).copied().unwrap_or_else(Uuid::new_v4);
                (uuid, xml::with_uuid(xml, uuid)?)
            }
        };
        if let Some(other) = self.names.get(&name).filter(|other| **other != uuid) {
            return Err(HypervisorError::Exists(format!(
                "operation failed: domain '{name}' already exists with uuid {other}"
            )));
        }
        let Some(known) = self.guests.get(&uuid) else {
            return Ok(Guest {
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
            });
        };
        if known.domain.name != name {
            return Err(HypervisorError::Exists(format!(
                "operation failed: domain '{}' is already defined with uuid {uuid}",
                known.domain.name
            )));
        }
        let mut guest = known.clone();
        guest.xml = xml;
        guest.domain.persistent = true;
        Ok(guest)
    }

    pub(super) fn undefine(&mut self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.alter(uuid, Event::Undefined { uuid, kept: false }, |guest| {
            guest.demand_persistent("cannot undefine transient domain")?;
            guest.domain.persistent = false;
            guest.domain.autostart = false;
            guest.domain.has_managed_save = false;
            Ok(())
        })
    }

    /// Moves the domain to another host, which nobody simulates.
    pub(super) fn migrate(&mut self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.alter(uuid, Event::Undefined { uuid, kept: true }, |guest| {
            guest.enter(PowerState::ShutOff, "migrated");
            guest.domain.persistent = false;
            Ok(())
        })
    }

    pub(super) fn start(&mut self, uuid: Uuid) -> Result<(), HypervisorError> {
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
    pub(super) fn press_button(&mut self, uuid: Uuid, restart: bool, now_ms: u64) -> Result<(), HypervisorError> {
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

    pub(super) fn reboot(&mut self, uuid: Uuid, kind: Reboot, now_ms: u64) -> Result<(), HypervisorError> {
        match kind {
            Reboot::Soft => self.press_button(uuid, true, now_ms),
            Reboot::Hard => self.restart(uuid),
        }
    }

    /// Connects to a console, as far as the definition has it.
    pub(super) fn open_console(&mut self, uuid: Uuid, device: ConsoleDevice) -> Result<UnixStream, HypervisorError> {
        let guest = self.guest(uuid)?;
        guest.demand_active()?;
        let definition = Definition::parse(&guest.xml).map_err(HypervisorError::Failed)?;
        match device {
            ConsoleDevice::Serial if definition.has_serial => self.consoles.open(uuid, device),
            ConsoleDevice::Vnc if definition.has_vnc => self.consoles.open(uuid, device),
            ConsoleDevice::Serial => {
                Err(HypervisorError::Failed("internal error: cannot find character device".to_owned()))
            }
            ConsoleDevice::Vnc => {
                Err(HypervisorError::Failed("internal error: No graphics backend with index 0".to_owned()))
            }
        }
    }

    fn restart(&mut self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.alter(uuid, Event::Rebooted(uuid), |guest| {
            guest.demand_active()?;
            guest.button = None;
            guest.boots += 1;
            Ok(())
        })
    }

    /// Ends the guest's run, for the reason given (`destroyed`, `shutdown`, `crashed`, ...).
    pub(super) fn end(&mut self, uuid: Uuid, reason: &str) -> Result<(), HypervisorError> {
        self.change(uuid, |guest| {
            guest.demand_active()?;
            guest.enter(PowerState::ShutOff, reason);
            Ok(())
        })
    }

    /// The guest panics and its remains are kept (`<on_crash>preserve</on_crash>`).
    pub(super) fn panic(&mut self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.change(uuid, |guest| {
            guest.demand_active()?;
            guest.enter(PowerState::Crashed, "panicked");
            Ok(())
        })
    }

    pub(super) fn pause(&mut self, uuid: Uuid, reason: &str) -> Result<(), HypervisorError> {
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

    pub(super) fn unpause(&mut self, uuid: Uuid) -> Result<(), HypervisorError> {
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
    pub(super) fn sleep(&mut self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.change(uuid, |guest| {
            guest.demand_active()?;
            guest.enter(PowerState::PmSuspended, "unknown");
            Ok(())
        })
    }

    /// Something wakes the sleeping guest.
    pub(super) fn wake(&mut self, uuid: Uuid) -> Result<(), HypervisorError> {
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

    pub(super) fn save(&mut self, uuid: Uuid) -> Result<(), HypervisorError> {
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

    pub(super) fn rename(&mut self, uuid: Uuid, name: &str) -> Result<(), HypervisorError> {
        let other = self.names.get(name).copied();
        self.alter(uuid, Event::Undefined { uuid, kept: true }, |guest| {
            guest.demand_persistent("cannot rename a transient domain")?;
            xml::check_name(name)?;
            match other {
                Some(other) if other == uuid => {
                    return Err(HypervisorError::Failed("invalid argument: Can't rename domain to itself".to_owned()));
                }
                Some(_) => {
                    return Err(HypervisorError::Exists(format!(
                        "Requested operation is not valid: domain with name '{name}' already exists"
                    )));
                }
                None => {}
            }
            if guest.active() {
                return Err(invalid("cannot rename active domain"));
            }
            if guest.domain.has_managed_save {
                return Err(invalid("domain with a managed saved state can't be renamed"));
            }
            guest.xml = xml::with_name(&guest.xml, name)?;
            name.clone_into(&mut guest.domain.name);
            Ok(())
        })
    }

    pub(super) fn set_autostart(&mut self, uuid: Uuid, on: bool) -> Result<(), HypervisorError> {
        self.change(uuid, |guest| {
            guest.demand_persistent("cannot set autostart for transient domain")?;
            guest.domain.autostart = on;
            Ok(())
        })
    }

    /// The addresses that a test gave the guest, while it runs.
    pub(super) fn addresses(&self, uuid: Uuid, source: AddressSource) -> Result<Vec<IpAddr>, HypervisorError> {
        let guest = self.guest(uuid)?;
        guest.demand_active()?;
        Ok(match source {
            AddressSource::Agent => guest.agent_addresses.clone(),
            AddressSource::Host => guest.host_addresses.clone(),
        })
    }

    /// Gives the guest addresses, of which no hypervisor tells by itself.
    pub(super) fn set_addresses(
        &mut self,
        uuid: Uuid,
        agent: Option<Vec<IpAddr>>,
        host: Option<Vec<IpAddr>>,
    ) -> Result<(), HypervisorError> {
        let mut guest = self.guest(uuid)?.clone();
        guest.agent_addresses = agent.unwrap_or(guest.agent_addresses);
        guest.host_addresses = host.unwrap_or(guest.host_addresses);
        self.store(guest)
    }

    /// Puts a disk into these definitions.
    pub(super) fn attach_disk(&mut self, uuid: Uuid, element: &str, places: Places) -> Result<(), HypervisorError> {
        self.change(uuid, |guest| {
            guest.demand(places)?;
            if places.persistent {
                guest.xml = xml::with_disk(&guest.xml, element)?;
            }
            if let (true, Some(live)) = (places.live, &guest.live_xml) {
                guest.live_xml = Some(xml::with_disk(live, element)?);
            }
            Ok(())
        })
    }

    /// Takes a disk out of these definitions; the guest may need time for it, or refuse.
    pub(super) fn detach_disk(
        &mut self,
        uuid: Uuid,
        device: &str,
        places: Places,
        now_ms: u64,
    ) -> Result<(), HypervisorError> {
        let mut guest = self.guest(uuid)?.clone();
        guest.demand(places)?;
        let mut removed = false;
        if let (true, Some(live)) = (places.live, &guest.live_xml) {
            let without = xml::without_disk(live, device)?;
            if guest.refuses_detach {
                self.outbox.push(Event::DeviceKept { uuid, device: device.to_owned() });
                return Err(HypervisorError::Failed(
                    "operation failed: unplug of device was rejected by the guest".to_owned(),
                ));
            }
            if guest.detach_delay_ms == 0 && guest.domain.power == PowerState::Running {
                guest.live_xml = Some(without);
                removed = true;
            } else {
                guest.leaving.insert(device.to_owned(), now_ms.saturating_add(guest.detach_delay_ms));
            }
        }
        if places.persistent {
            guest.xml = xml::without_disk(&guest.xml, device)?;
        }
        self.store(guest)?;
        if removed {
            self.outbox.push(Event::DeviceRemoved(uuid));
        }
        self.outbox.push(Event::Changed(uuid));
        Ok(())
    }

    /// The guest lets those disks go whose time has come.
    fn let_go(&mut self, uuid: Uuid, now_ms: u64) -> Result<(), HypervisorError> {
        self.alter(uuid, Event::DeviceRemoved(uuid), |guest| {
            let (gone, staying) = std::mem::take(&mut guest.leaving).into_iter().partition(|(_, due)| *due <= now_ms);
            guest.leaving = staying;
            let gone: BTreeMap<String, u64> = gone;
            for device in gone.keys() {
                if let Some(live) = &guest.live_xml {
                    guest.live_xml = Some(xml::without_disk(live, device)?);
                }
            }
            Ok(())
        })
    }

    /// Tells the guest that a disk is larger now.
    pub(super) fn resize_disk(&mut self, uuid: Uuid, device: &str, size_bytes: u64) -> Result<(), HypervisorError> {
        self.change(uuid, |guest| {
            guest.demand_active()?;
            // Which fails where there is no such disk.
            xml::without_disk(guest.live_xml.as_deref().unwrap_or_default(), device)?;
            let size = guest.disk_bytes.entry(device.to_owned()).or_default();
            *size = size_bytes.max(*size);
            Ok(())
        })
    }

    /// Replaces the definition by what `edit` makes of it, and what a guest has that is there.
    pub(super) fn edit(
        &mut self,
        uuid: Uuid,
        edit: impl Fn(&str) -> Result<String, HypervisorError>,
    ) -> Result<(), HypervisorError> {
        self.change(uuid, |guest| {
            guest.xml = edit(&guest.xml)?;
            guest.live_xml = guest.live_xml.as_deref().map(&edit).transpose()?;
            Ok(())
        })
    }

    /// Changes how the guest behaves, which no hypervisor would notice.
    pub(super) fn set_behaviour(
        &mut self,
        uuid: Uuid,
        ignores_acpi: Option<bool>,
        acpi_delay_ms: Option<u64>,
        refuses_detach: Option<bool>,
        detach_delay_ms: Option<u64>,
    ) -> Result<(), HypervisorError> {
        let mut guest = self.guest(uuid)?.clone();
        guest.refuses_detach = refuses_detach.unwrap_or(guest.refuses_detach);
        guest.detach_delay_ms = detach_delay_ms.unwrap_or(guest.detach_delay_ms);
        guest.ignores_acpi = ignores_acpi.unwrap_or(guest.ignores_acpi);
        guest.acpi_delay_ms = acpi_delay_ms.unwrap_or(guest.acpi_delay_ms);
        self.store(guest)
    }

    fn change(
        &mut self,
        uuid: Uuid,
        change: impl FnOnce(&mut Guest) -> Result<(), HypervisorError>,
    ) -> Result<(), HypervisorError> {
        let mut guest = self.guest(uuid)?.clone();
        change(&mut guest)?;
        self.store(guest)?;
        self.outbox.push(Event::Changed(uuid));
        Ok(())
    }

    /// As [`Host::change`], with an event of its own before the one of the change.
    fn alter(
        &mut self,
        uuid: Uuid,
        event: Event,
        change: impl FnOnce(&mut Guest) -> Result<(), HypervisorError>,
    ) -> Result<(), HypervisorError> {
        let mut guest = self.guest(uuid)?.clone();
        change(&mut guest)?;
        self.store(guest)?;
        self.outbox.push(event);
        self.outbox.push(Event::Changed(uuid));
        Ok(())
    }

    /// Writes the guest, on disk before in memory. One that neither runs nor is defined is gone.
    fn store(&mut self, guest: Guest) -> Result<(), HypervisorError> {
        let uuid = guest.domain.uuid;
        if !guest.active() {
            self.consoles.end(uuid);
        }
        if guest.domain.persistent || guest.active() {
            self.disk.write_guest(&guest)?;
            self.forget(uuid);
            self.remember(guest);
        } else {
            self.disk.remove_guest(uuid)?;
            self.forget(uuid);
        }
        Ok(())
    }

    fn remember(&mut self, guest: Guest) {
        let uuid = guest.domain.uuid;
        self.names.insert(guest.domain.name.clone(), uuid);
        self.buttons.extend(guest.due());
        self.guests.insert(uuid, guest);
    }

    fn forget(&mut self, uuid: Uuid) {
        if let Some(guest) = self.guests.remove(&uuid) {
            self.names.remove(&guest.domain.name);
            if let Some(due) = guest.due() {
                self.buttons.remove(&due);
            }
        }
    }
}
