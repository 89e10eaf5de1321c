//! The disks of guests.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::Host;
use crate::hypervisor::simulated::xml;
use crate::hypervisor::{Event, HypervisorError, Places, PowerState};

impl Host {
    /// Puts a disk into these definitions.
    pub(in crate::hypervisor::simulated) fn attach_disk(
        &mut self,
        uuid: Uuid,
        element: &str,
        places: Places,
    ) -> Result<(), HypervisorError> {
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
    pub(in crate::hypervisor::simulated) fn detach_disk(
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
    pub(super) fn let_go(&mut self, uuid: Uuid, now_ms: u64) -> Result<(), HypervisorError> {
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
    pub(in crate::hypervisor::simulated) fn resize_disk(
        &mut self,
        uuid: Uuid,
        device: &str,
        size_bytes: u64,
    ) -> Result<(), HypervisorError> {
        self.change(uuid, |guest| {
            guest.demand_active()?;
            // Which fails where there is no such disk.
            xml::without_disk(guest.live_xml.as_deref().unwrap_or_default(), device)?;
            let size = guest.disk_bytes.entry(device.to_owned()).or_default();
            *size = size_bytes.max(*size);
            Ok(())
        })
    }
}
