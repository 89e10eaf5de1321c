//! The simulated host: its domains, and what happens to them, as libvirt's QEMU driver would have it
//! (`src/qemu/qemu_driver.c`, whose refusals are quoted).

mod devices;
mod power;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;

use uuid::Uuid;

use super::consoles::Consoles;
use super::disk::Disk;
use super::guest::{Button, Guest, invalid};
use super::xml;
use crate::hypervisor::definition::Definition;
use crate::hypervisor::{AddressSource, ConsoleDevice, Event, HypervisorError, PowerState};

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
            return Ok(Guest::new(uuid, name, xml));
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
