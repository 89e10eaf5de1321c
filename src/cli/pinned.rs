//! A hypervisor that answers only as the host that the state directory belongs to.
//!
//! The same URI can lead to another host tomorrow: a cloned disk, an address that moved. Each new connection is asked
//! who it is before anything else is, and on the wrong host every call is [`HypervisorError::Unreachable`].

use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, OnceLock};
use std::thread;

use parking_lot::Mutex;
use uuid::Uuid;

use super::identity::verify;
use crate::hypervisor::definition::{AttachedDisk, Profile};
use crate::hypervisor::{
    Accelerator, AddressSource, ConsoleDevice, Domain, Event, Hypervisor, HypervisorError, Identity, Networks, Places,
    PowerState, Reboot,
};

/// What is known of the present connection.
#[derive(Clone, Debug)]
enum Gate {
    /// It was not asked yet.
    Unknown,
    /// The right host.
    Open,
    /// Another host, with the sentence that says so.
    Closed(String),
}

struct Pin {
    recorded: OnceLock<Identity>,
    gate: Mutex<Gate>,
}

/// See the module.
pub struct Pinned {
    inner: Arc<dyn Hypervisor>,
    pin: Arc<Pin>,
}

impl Pinned {
    /// Not pinned yet if nothing is recorded: the first mount asks whom it has found.
    pub fn new(inner: Arc<dyn Hypervisor>, recorded: Option<Identity>) -> Pinned {
        let pin = Pin { recorded: recorded.map(OnceLock::from).unwrap_or_default(), gate: Mutex::new(Gate::Unknown) };
        Pinned { inner, pin: Arc::new(pin) }
    }

    /// From here on only this host is accepted. The first call counts.
    pub fn pin(&self, identity: Identity) {
        let _ = self.pin.recorded.set(identity);
    }

    /// The hypervisor behind, if it is the right one. The question is asked without the lock, since it may hang.
    fn right(&self) -> Result<&dyn Hypervisor, HypervisorError> {
        let inner = self.inner.as_ref();
        let Some(recorded) = self.pin.recorded.get() else { return Ok(inner) };
        let known = self.pin.gate.lock().clone();
        match known {
            Gate::Open => Ok(inner),
            Gate::Closed(reason) => Err(HypervisorError::Unreachable(reason)),
            Gate::Unknown => self.admit(recorded, &inner.identity()?).map(|()| inner),
        }
    }

    fn admit(&self, recorded: &Identity, answered: &Identity) -> Result<(), HypervisorError> {
        let verdict = verify(recorded, answered).map_err(|error| error.to_string());
        *self.pin.gate.lock() = match &verdict {
            Ok(()) => Gate::Open,
            Err(reason) => Gate::Closed(reason.clone()),
        };
        verdict.map_err(HypervisorError::Unreachable)
    }
}

impl Hypervisor for Pinned {
    /// Always asked, so that a ping of it also notices a host that became the right one.
    fn identity(&self) -> Result<Identity, HypervisorError> {
        let answered = self.inner.identity()?;
        if let Some(recorded) = self.pin.recorded.get() {
            self.admit(recorded, &answered)?;
        }
        Ok(answered)
    }

    /// Forwarded by a thread, which forgets what was known of the connection before anybody hears of a new one.
    fn events(&self) -> Receiver<Event> {
        let incoming = self.inner.events();
        let (sender, receiver) = channel();
        let pin = Arc::clone(&self.pin);
        let forward = move || {
            for event in incoming {
                match event {
                    Event::Connected | Event::Disconnected(_) => *pin.gate.lock() = Gate::Unknown,
                    Event::Changed(_)
                    | Event::Frozen(_)
                    | Event::Rebooted(_)
                    | Event::Moved(_)
                    | Event::DeviceRemoved(_)
                    | Event::DeviceKept { .. }
                    | Event::Undefined { .. } => {}
                }
                if sender.send(event).is_err() {
                    return;
                }
            }
        };
        if let Err(error) = thread::Builder::new().name("pinned-events".to_owned()).spawn(forward) {
            log::error!("the hypervisor's events are not heard, only regular looks find changes: {error}");
        }
        receiver
    }

    fn connect(&self) -> Result<(), HypervisorError> {
        self.inner.connect()?;
        *self.pin.gate.lock() = Gate::Unknown;
        self.right().map(drop)
    }

    fn ping(&self) -> Result<(), HypervisorError> {
        self.right()?.ping()
    }

    fn domains(&self) -> Result<Vec<Domain>, HypervisorError> {
        self.right()?.domains()
    }

    fn power(&self, uuid: Uuid) -> Result<Option<(PowerState, String)>, HypervisorError> {
        self.right()?.power(uuid)
    }

    fn domain(&self, uuid: Uuid) -> Result<Option<Domain>, HypervisorError> {
        self.right()?.domain(uuid)
    }

    fn definition(&self, uuid: Uuid) -> Result<String, HypervisorError> {
        self.right()?.definition(uuid)
    }

    fn live_definition(&self, uuid: Uuid) -> Result<Option<String>, HypervisorError> {
        self.right()?.live_definition(uuid)
    }

    fn attach_disk(&self, uuid: Uuid, disk: &AttachedDisk, places: Places) -> Result<(), HypervisorError> {
        self.right()?.attach_disk(uuid, disk, places)
    }

    fn detach_disk(&self, uuid: Uuid, device: &str, places: Places) -> Result<(), HypervisorError> {
        self.right()?.detach_disk(uuid, device, places)
    }

    fn resize_disk(&self, uuid: Uuid, device: &str, size_bytes: u64) -> Result<(), HypervisorError> {
        self.right()?.resize_disk(uuid, device, size_bytes)
    }

    fn define(&self, xml: &str) -> Result<(), HypervisorError> {
        self.right()?.define(xml)
    }

    fn undefine(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.right()?.undefine(uuid)
    }

    fn start(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.right()?.start(uuid)
    }

    fn shutdown(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.right()?.shutdown(uuid)
    }

    fn power_off(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.right()?.power_off(uuid)
    }

    fn pause(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.right()?.pause(uuid)
    }

    fn unpause(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.right()?.unpause(uuid)
    }

    fn save(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.right()?.save(uuid)
    }

    fn reboot(&self, uuid: Uuid, kind: Reboot) -> Result<(), HypervisorError> {
        self.right()?.reboot(uuid, kind)
    }

    fn open_console(&self, uuid: Uuid, device: ConsoleDevice) -> Result<UnixStream, HypervisorError> {
        self.right()?.open_console(uuid, device)
    }

    fn rename(&self, uuid: Uuid, name: &str) -> Result<(), HypervisorError> {
        self.right()?.rename(uuid, name)
    }

    fn set_metadata(&self, uuid: Uuid, xml: Option<&str>) -> Result<(), HypervisorError> {
        self.right()?.set_metadata(uuid, xml)
    }

    fn set_description(&self, uuid: Uuid, text: Option<&str>) -> Result<(), HypervisorError> {
        self.right()?.set_description(uuid, text)
    }

    fn set_autostart(&self, uuid: Uuid, on: bool) -> Result<(), HypervisorError> {
        self.right()?.set_autostart(uuid, on)
    }

    fn set_hardware(&self, uuid: Uuid, vcpus: Option<u32>, memory_bytes: Option<u64>) -> Result<(), HypervisorError> {
        self.right()?.set_hardware(uuid, vcpus, memory_bytes)
    }

    fn addresses(&self, uuid: Uuid, source: AddressSource) -> Result<Vec<IpAddr>, HypervisorError> {
        self.right()?.addresses(uuid, source)
    }

    fn networks(&self) -> Networks {
        self.inner.networks()
    }

    fn accelerator(&self) -> Result<Accelerator, HypervisorError> {
        self.right()?.accelerator()
    }

    fn definition_profile(&self) -> Profile {
        self.inner.definition_profile()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::simulated::SimulatedHypervisor;

    fn host() -> (tempfile::TempDir, Arc<dyn Hypervisor>, Identity) {
        let directory = tempfile::tempdir().unwrap();
        let hypervisor: Arc<dyn Hypervisor> = Arc::new(SimulatedHypervisor::open(directory.path()).unwrap());
        hypervisor.connect().unwrap();
        let identity = hypervisor.identity().unwrap();
        (directory, hypervisor, identity)
    }

    #[test]
    fn the_recorded_host_is_asked_everything() {
        let (_directory, hypervisor, identity) = host();
        let pinned = Pinned::new(hypervisor, Some(identity));
        assert_eq!(pinned.domains(), Ok(Vec::new()));
    }

    #[test]
    fn another_host_is_unreachable_with_the_reason() {
        let (_directory, hypervisor, mut identity) = host();
        identity.host_uuid = "another".to_owned();
        let pinned = Pinned::new(hypervisor, Some(identity));
        for result in [pinned.connect(), pinned.ping(), pinned.undefine(Uuid::nil()), pinned.identity().map(drop)] {
            let Err(HypervisorError::Unreachable(reason)) = result else { panic!("{result:?}") };
            assert!(reason.contains("belongs to host another"), "{reason}");
        }
    }

    #[test]
    fn the_first_host_is_the_one_from_then_on() {
        let (_directory, hypervisor, mut identity) = host();
        let pinned = Pinned::new(hypervisor, None);
        assert_eq!(pinned.ping(), Ok(()));
        identity.host_uuid = "another".to_owned();
        pinned.pin(identity);
        assert!(pinned.ping().is_err());
    }
}
