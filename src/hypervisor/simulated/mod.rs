//! A hypervisor for tests: `--connect simulated:DIR`.
//!
//! It behaves as libvirt does, without guests: domains have definitions and power states, refuse what libvirt refuses,
//! and report what happens to them. They live in DIR and outlive the process that connects to them; the directory
//! belongs to one process at a time. What real hypervisors do rarely, this one does on demand: fail, hang, answer late,
//! lose the connection. Tests ask for it by [`SimulatedHypervisor::control`], or, from other processes, by the Unix
//! socket `DIR/control`, whose commands are in `control.rs`:
//!
//! ```text
//! {"do":"define","xml":"<domain>...</domain>"}              -> {"ok":true,"uuid":"..."}
//! {"do":"crash","uuid":"..."}                               -> {"ok":true}
//! {"do":"fault","call":"start","mode":"hang","times":1}     -> {"ok":true}
//! {"do":"release","call":"start"}                           -> {"ok":true,"released":1}
//! {"do":"start","uuid":"..."}                               -> {"ok":false,"kind":"invalid_state","error":"..."}
//! ```

mod consoles;
mod control;
mod daemon;
mod disk;
mod guest;
mod host;
mod xml;

use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use serde_json::Value;
use uuid::Uuid;

use super::definition::{AttachedDisk, Profile, with_hardware};
use super::{
    Accelerator, AddressSource, ConsoleDevice, Domain, Event, Hypervisor, HypervisorError, Identity, Networks, Places,
    Reboot,
};
use crate::model::network::Network;
use daemon::{Daemon, Mode, Pending, Wake, now_ms, unreachable};
use disk::Disk;
use host::Host;

/// The calls that are counted and can be given faults: the trait's methods that ask the daemon.
pub const CALLS: &[&str] = &[
    "identity",
    "connect",
    "ping",
    "domains",
    "domain",
    "definition",
    "live_definition",
    "define",
    "undefine",
    "start",
    "shutdown",
    "power_off",
    "pause",
    "unpause",
    "save",
    "reboot",
    "open_console",
    "rename",
    "set_metadata",
    "set_description",
    "set_autostart",
    "set_hardware",
    "attach_disk",
    "detach_disk",
    "resize_disk",
    "agent_addresses",
    "host_addresses",
    "accelerator",
];

/// The simulated hypervisor and the connection to it. Dropping it leaves its domains where they are, ends its threads
/// and frees the directory for the next one.
pub struct SimulatedHypervisor {
    shared: Arc<Shared>,
    identity: Identity,
    /// Its closing ends the control socket's thread.
    control: Mutex<Option<UnixStream>>,
}

struct Shared {
    daemon: Mutex<Daemon>,
    /// Something may have become due, or has ended.
    changed: Condvar,
}

impl SimulatedHypervisor {
    /// Opens the host that lives in `directory`, and makes a new one if there is none.
    ///
    /// # Errors
    ///
    /// [`HypervisorError::Unreachable`] while another process has it open; [`HypervisorError::Failed`] for a directory
    /// that cannot be read or written.
    pub fn open(directory: &Path) -> Result<SimulatedHypervisor, HypervisorError> {
        let disk = Disk::open(directory)?;
        let identity = Identity {
            uri: format!("simulated:{}", disk.directory().display()),
            host_uuid: disk.host_uuid()?,
            hostname: "simulated".to_owned(),
        };
        let state = disk.daemon()?;
        let daemon = Daemon::new(Host::load(disk)?, state);
        let shared = Arc::new(Shared { daemon: Mutex::new(daemon), changed: Condvar::new() });
        let clock = Arc::clone(&shared);
        thread::Builder::new()
            .name("simulated-clock".to_owned())
            .spawn(move || clock.keep_time())
            .map_err(|error| HypervisorError::Failed(format!("no thread: {error}")))?;
        Ok(SimulatedHypervisor { shared, identity, control: Mutex::new(None) })
    }

    /// Does what a line on the control socket does, and returns the answer. Works before
    /// [`Hypervisor::connect`] too, and whatever the daemon does.
    pub fn control(&self, command: Value) -> Value {
        self.shared.control(command)
    }

    /// Makes a call: counts it, lets its fault have it, and otherwise carries it out at once.
    fn call<T: Send + 'static>(
        &self,
        call: &'static str,
        uuid: Option<Uuid>,
        effect: impl FnOnce(&mut Host) -> Result<T, HypervisorError> + Send + 'static,
    ) -> Result<T, HypervisorError> {
        let mut daemon = self.shared.daemon.lock();
        daemon.count(call);
        daemon.reachable()?;
        let fault = if daemon.hung() { None } else { daemon.meet_fault(call, uuid) };
        let wake = match fault {
            None if daemon.hung() => Wake::Resumed,
            None => {
                let answer = effect(&mut daemon.host);
                daemon.publish();
                self.shared.changed.notify_all();
                return answer;
            }
            Some(Mode::Fail(error)) => return Err(error),
            Some(Mode::Hang) => Wake::Released,
            Some(Mode::Late(ms)) => Wake::At(now_ms().saturating_add(ms)),
            Some(Mode::Disconnect { reason, applied, back_after_ms }) => {
                if applied {
                    // The answer is lost with the connection, and so are the events.
                    let _lost = effect(&mut daemon.host);
                }
                daemon.disconnect(&reason)?;
                daemon.publish();
                if let Some(ms) = back_after_ms {
                    daemon.come_back_at(now_ms().saturating_add(ms));
                }
                self.shared.changed.notify_all();
                return Err(unreachable(&reason));
            }
        };
        let (answer, answered) = channel();
        let abandoned = answer.clone();
        // Whoever waits may have been told already that the connection broke: then nobody receives.
        daemon.take(Pending {
            call,
            uuid,
            wake,
            effect: Box::new(move |host| drop(answer.send(effect(host)))),
            abandon: Box::new(move |error| drop(abandoned.send(Err(error)))),
        });
        self.shared.changed.notify_all();
        drop(daemon);
        answered.recv().unwrap_or_else(|_| Err(unreachable("the simulated host was closed")))
    }

    /// A call that changes one domain.
    fn act(
        &self,
        call: &'static str,
        uuid: Uuid,
        effect: impl FnOnce(&mut Host) -> Result<(), HypervisorError> + Send + 'static,
    ) -> Result<(), HypervisorError> {
        self.call(call, Some(uuid), effect)
    }
}

impl Shared {
    fn control(&self, command: Value) -> Value {
        let mut daemon = self.daemon.lock();
        let answer = control::run(&mut daemon, command);
        self.changed.notify_all();
        answer
    }

    fn keep_time(&self) {
        let mut daemon = self.daemon.lock();
        while !daemon.closed() {
            match daemon.run_due() {
                Some(at) => {
                    let wait = Duration::from_millis(at.saturating_sub(now_ms()));
                    self.changed.wait_for(&mut daemon, wait);
                }
                None => self.changed.wait(&mut daemon),
            }
        }
    }
}

impl Drop for SimulatedHypervisor {
    fn drop(&mut self) {
        self.shared.daemon.lock().close();
        self.shared.changed.notify_all();
    }
}

impl Hypervisor for SimulatedHypervisor {
    fn identity(&self) -> Result<Identity, HypervisorError> {
        let identity = self.identity.clone();
        self.call("identity", None, move |_| Ok(identity))
    }

    /// Unlike others this one may be asked again, by a second life of the program in the same process.
    fn events(&self) -> Receiver<Event> {
        let (sender, receiver) = channel();
        self.shared.daemon.lock().subscribe(sender);
        receiver
    }

    fn connect(&self) -> Result<(), HypervisorError> {
        let mut control = self.control.lock();
        if control.is_none() {
            let (ours, theirs) =
                UnixStream::pair().map_err(|error| HypervisorError::Failed(format!("no socket: {error}")))?;
            control::serve(Arc::clone(&self.shared), theirs)?;
            *control = Some(ours);
        }
        drop(control);
        self.shared.daemon.lock().want();
        self.call("connect", None, |_| Ok(()))?;
        self.shared.daemon.lock().send(&Event::Connected);
        Ok(())
    }

    fn ping(&self) -> Result<(), HypervisorError> {
        self.call("ping", None, |_| Ok(()))
    }

    fn domains(&self) -> Result<Vec<Domain>, HypervisorError> {
        self.call("domains", None, |host| Ok(host.guests().map(|guest| guest.domain.clone()).collect()))
    }

    fn domain(&self, uuid: Uuid) -> Result<Option<Domain>, HypervisorError> {
        self.call("domain", Some(uuid), move |host| Ok(host.guest(uuid).ok().map(|guest| guest.domain.clone())))
    }

    fn definition(&self, uuid: Uuid) -> Result<String, HypervisorError> {
        self.call("definition", Some(uuid), move |host| Ok(host.guest(uuid)?.xml.clone()))
    }

    fn live_definition(&self, uuid: Uuid) -> Result<Option<String>, HypervisorError> {
        self.call("live_definition", Some(uuid), move |host| Ok(host.guest(uuid)?.live_xml.clone()))
    }

    fn define(&self, xml: &str) -> Result<(), HypervisorError> {
        let uuid = xml::name_and_uuid(xml).ok().and_then(|(_, uuid)| uuid);
        let xml = xml.to_owned();
        self.call("define", uuid, move |host| host.define(&xml).map(|_| ()))
    }

    fn undefine(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.act("undefine", uuid, move |host| host.undefine(uuid))
    }

    fn start(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.act("start", uuid, move |host| host.start(uuid))
    }

    fn shutdown(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.act("shutdown", uuid, move |host| host.press_button(uuid, false, now_ms()))
    }

    fn power_off(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.act("power_off", uuid, move |host| host.end(uuid, "destroyed"))
    }

    fn pause(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.act("pause", uuid, move |host| host.pause(uuid, "user"))
    }

    fn unpause(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.act("unpause", uuid, move |host| host.unpause(uuid))
    }

    fn save(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.act("save", uuid, move |host| host.save(uuid))
    }

    fn reboot(&self, uuid: Uuid, kind: Reboot) -> Result<(), HypervisorError> {
        self.act("reboot", uuid, move |host| host.reboot(uuid, kind, now_ms()))
    }

    fn open_console(&self, uuid: Uuid, device: ConsoleDevice) -> Result<UnixStream, HypervisorError> {
        self.call("open_console", Some(uuid), move |host| host.open_console(uuid, device))
    }

    fn rename(&self, uuid: Uuid, name: &str) -> Result<(), HypervisorError> {
        let name = name.to_owned();
        self.act("rename", uuid, move |host| host.rename(uuid, &name))
    }

    fn set_metadata(&self, uuid: Uuid, xml: Option<&str>) -> Result<(), HypervisorError> {
        let element = xml.map(str::to_owned);
        self.act("set_metadata", uuid, move |host| host.edit(uuid, |xml| xml::with_metadata(xml, element.as_deref())))
    }

    fn set_description(&self, uuid: Uuid, text: Option<&str>) -> Result<(), HypervisorError> {
        let text = text.map(str::to_owned);
        self.act("set_description", uuid, move |host| {
            host.edit(uuid, |xml| xml::with_description(xml, text.as_deref()))
        })
    }

    fn set_autostart(&self, uuid: Uuid, on: bool) -> Result<(), HypervisorError> {
        self.act("set_autostart", uuid, move |host| host.set_autostart(uuid, on))
    }

    fn set_hardware(&self, uuid: Uuid, vcpus: Option<u32>, memory_bytes: Option<u64>) -> Result<(), HypervisorError> {
        self.act("set_hardware", uuid, move |host| {
            host.edit(uuid, |xml| with_hardware(xml, vcpus, memory_bytes).map_err(HypervisorError::Unsupported))
        })
    }

    fn attach_disk(&self, uuid: Uuid, disk: &AttachedDisk, places: Places) -> Result<(), HypervisorError> {
        let element = disk.to_xml();
        self.act("attach_disk", uuid, move |host| host.attach_disk(uuid, element.trim(), places))
    }

    fn detach_disk(&self, uuid: Uuid, device: &str, places: Places) -> Result<(), HypervisorError> {
        let device = device.to_owned();
        self.act("detach_disk", uuid, move |host| host.detach_disk(uuid, &device, places, now_ms()))
    }

    fn resize_disk(&self, uuid: Uuid, device: &str, size_bytes: u64) -> Result<(), HypervisorError> {
        let device = device.to_owned();
        self.act("resize_disk", uuid, move |host| host.resize_disk(uuid, &device, size_bytes))
    }

    /// Those that a test gave the guest, from its agent or from the host.
    fn addresses(&self, uuid: Uuid, source: AddressSource) -> Result<Vec<IpAddr>, HypervisorError> {
        let call = match source {
            AddressSource::Agent => "agent_addresses",
            AddressSource::Host => "host_addresses",
        };
        self.call(call, Some(uuid), move |host| host.addresses(uuid, source))
    }

    fn networks(&self) -> Networks {
        Networks { default: Network::Libvirt("default".to_owned()), has_libvirt_networks: true, is_local: false }
    }

    fn accelerator(&self) -> Result<Accelerator, HypervisorError> {
        self.call("accelerator", None, |_| Ok(Accelerator::Tcg))
    }

    fn definition_profile(&self) -> Profile {
        Profile {
            emulator: "/usr/bin/qemu-system-x86_64".into(),
            architecture: "x86_64".to_owned(),
            machine: "pc".to_owned(),
            agent_sockets: None,
        }
    }
}
