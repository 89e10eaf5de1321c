//! [`Hypervisor`] on a libvirt connection.

use std::collections::HashSet;
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain as LibvirtDomain;
use virt::error::{Error, ErrorNumber};
use virt::sys as raw;

use super::connection::{Failure, Keeper};
use super::power::power;
use super::{Target, accelerator, embed, error, neighbours, sys};
use crate::hypervisor::definition::{self, AttachedDisk, Profile};
use crate::hypervisor::{
    Accelerator, AddressSource, ConsoleDevice, Domain, Event, Hypervisor, HypervisorError, Identity, Networks, Places,
    PowerState, Reboot,
};
use crate::model::network::Network;

/// The namespace prefix that libvirt adds to our metadata element, and the one for an element that has used it itself:
/// libvirt refuses to declare a prefix twice.
const METADATA_KEY: &str = "instancefs";
const OTHER_METADATA_KEY: &str = "instance";

/// A libvirt host. Make it with [`super::open`], or with [`Libvirt::new`].
pub struct Libvirt {
    target: Target,
    state_dir: PathBuf,
    keeper: Keeper,
    events: Mutex<Option<Receiver<Event>>>,
    accelerator: Mutex<Option<Accelerator>>,
    profile: OnceLock<Profile>,
}

impl Libvirt {
    /// Starts libvirt's event loop (once per process) and the thread that will keep the connection; connects nothing.
    ///
    /// `accelerator` overrides the probe, whose result is otherwise remembered in `state_dir`.
    ///
    /// # Errors
    ///
    /// [`HypervisorError::Failed`] if a thread or the event loop cannot be started.
    pub fn new(target: Target, state_dir: &Path, accelerator: Option<Accelerator>) -> Result<Self, HypervisorError> {
        sys::initialise().map_err(HypervisorError::Failed)?;
        let (sender, receiver) = channel();
        Ok(Self {
            keeper: Keeper::start(target.clone(), sender)?,
            target,
            state_dir: state_dir.to_path_buf(),
            events: Mutex::new(Some(receiver)),
            accelerator: Mutex::new(accelerator),
            profile: OnceLock::new(),
        })
    }

    /// Runs one or more calls on a connection of their own. No lock is held meanwhile.
    fn call<T>(&self, body: impl FnOnce(&Connect) -> Result<T, Error>) -> Result<T, HypervisorError> {
        let current = self.keeper.current()?;
        current.call(body).map_err(|Failure { error, alive }| {
            if !alive {
                self.keeper.suspect(&current);
            }
            error::judge(&error, alive)
        })
    }

    fn on<T>(&self, uuid: Uuid, body: impl FnOnce(&LibvirtDomain) -> Result<T, Error>) -> Result<T, HypervisorError> {
        self.call(|connection| body(&connection.lookup_domain_by_uuid(uuid)?))
    }

    fn open_serial(&self, uuid: Uuid) -> Result<UnixStream, HypervisorError> {
        let current = self.keeper.current()?;
        current
            .lasting()
            .and_then(|connection| {
                connection
                    .lookup_domain_by_uuid(uuid)
                    .and_then(|domain| sys::stream::open_console(Arc::clone(&connection), &domain))
                    .map_err(|error| Failure { error, alive: connection.is_alive().unwrap_or(false) })
            })
            .map_err(|Failure { error, alive }| error::judge(&error, alive))
    }

    /// libvirt has no code of its own for a name that another domain has, so we look.
    fn name_is_taken(&self, name: &str, by_other_than: Option<Uuid>) -> bool {
        self.call(|connection| connection.lookup_domain_by_name(name)?.uuid())
            .is_ok_and(|holder| Some(holder) != by_other_than)
    }

    fn ask_for_profile(&self) -> Result<Profile, String> {
        let capabilities = self
            .call(|connection| connection.domain_capabilities(None, None, None, Some("qemu"), 0))
            .map_err(|error| error.to_string())?;
        definition::profile_of(&capabilities)
    }
}

/// Both as of one moment: a start takes the saved memory away when the domain runs already.
fn power_and_saved_memory(domain: &LibvirtDomain) -> Result<((PowerState, &'static str), bool), Error> {
    loop {
        let (state, reason) = sys::state(domain)?;
        let known = power(state, reason);
        let has_managed_save = domain.has_managed_save(0)?;
        if known.0 != PowerState::ShutOff || has_managed_save || sys::state(domain)? == (state, reason) {
            return Ok((known, has_managed_save));
        }
    }
}

impl Hypervisor for Libvirt {
    fn identity(&self) -> Result<Identity, HypervisorError> {
        let (host_uuid, hostname) = if self.target.embed_root().is_some() {
            (embed::host_uuid().to_string(), self.call(Connect::hostname)?)
        } else {
            let (capabilities, hostname) =
                self.call(|connection| Ok((connection.capabilities()?, connection.hostname()?)))?;
            (definition::host_uuid(&capabilities).map_err(HypervisorError::Failed)?, hostname)
        };
        Ok(Identity { uri: self.target.uri().to_owned(), host_uuid, hostname })
    }

    /// The receiver, at the first call; a later one gets a receiver that is closed.
    fn events(&self) -> Receiver<Event> {
        self.events.lock().take().unwrap_or_else(|| channel().1)
    }

    fn connect(&self) -> Result<(), HypervisorError> {
        self.keeper.connect()
    }

    fn ping(&self) -> Result<(), HypervisorError> {
        self.call(|connection| connection.lib_version().map(|_| ()))
    }

    /// Five round trips, however many domains there are.
    ///
    /// What has saved memory is asked before and after the states, so that a domain that is saved or restored meanwhile
    /// looks suspended, never merely stopped.
    fn domains(&self) -> Result<Vec<Domain>, HypervisorError> {
        self.call(|connection| {
            let before = listed(connection, raw::VIR_CONNECT_LIST_DOMAINS_MANAGEDSAVE)?;
            let states = sys::all_states(connection)?;
            let after = listed(connection, raw::VIR_CONNECT_LIST_DOMAINS_MANAGEDSAVE)?;
            let persistent = listed(connection, raw::VIR_CONNECT_LIST_DOMAINS_PERSISTENT)?;
            let autostart = listed(connection, raw::VIR_CONNECT_LIST_DOMAINS_AUTOSTART)?;
            Ok(states
                .into_iter()
                .map(|domain| {
                    let (power, reason) = power(domain.state, domain.reason);
                    let uuid = domain.uuid;
                    Domain {
                        uuid,
                        name: domain.name,
                        power,
                        reason: reason.to_owned(),
                        persistent: persistent.contains(&uuid),
                        has_managed_save: after.contains(&uuid)
                            || (power == PowerState::ShutOff && before.contains(&uuid)),
                        autostart: autostart.contains(&uuid),
                    }
                })
                .collect())
        })
    }

    fn domain(&self, uuid: Uuid) -> Result<Option<Domain>, HypervisorError> {
        let described = self.on(uuid, |domain| {
            let ((power, reason), has_managed_save) = power_and_saved_memory(domain)?;
            Ok(Domain {
                uuid,
                name: domain.name()?,
                power,
                reason: reason.to_owned(),
                persistent: domain.is_persistent()?,
                has_managed_save,
                autostart: domain.autostart()?,
            })
        });
        match described {
            Ok(domain) => Ok(Some(domain)),
            Err(HypervisorError::NoDomain) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn power(&self, uuid: Uuid) -> Result<Option<(PowerState, String)>, HypervisorError> {
        match self.on(uuid, sys::state) {
            Ok((state, reason)) => {
                let (power, reason) = power(state, reason);
                Ok(Some((power, reason.to_owned())))
            }
            Err(HypervisorError::NoDomain) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn definition(&self, uuid: Uuid) -> Result<String, HypervisorError> {
        self.on(uuid, |domain| domain.xml_desc(raw::VIR_DOMAIN_XML_INACTIVE))
    }

    /// What it is of is asked of the answer, so that no start or end can come between.
    fn live_definition(&self, uuid: Uuid) -> Result<Option<String>, HypervisorError> {
        let xml = self.on(uuid, |domain| domain.xml_desc(0))?;
        Ok(definition::is_live(&xml).then_some(xml))
    }

    fn define(&self, xml: &str) -> Result<(), HypervisorError> {
        let result = self.call(|connection| connection.define_domain_xml(xml).map(|_| ()));
        match result {
            Err(HypervisorError::Failed(message)) => match definition::identity_of(xml) {
                Some((name, uuid)) if self.name_is_taken(&name, uuid) => Err(HypervisorError::Exists(message)),
                _ => Err(HypervisorError::Failed(message)),
            },
            other => other,
        }
    }

    fn undefine(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        let done = self.on(uuid, |domain| {
            let metadata = raw::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                | raw::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                | raw::VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA;
            let keep_nvram = metadata | raw::VIR_DOMAIN_UNDEFINE_KEEP_NVRAM;
            match domain.undefine_flags(keep_nvram | raw::VIR_DOMAIN_UNDEFINE_KEEP_TPM) {
                Err(error) if error::is_unknown_flag(&error) => {}
                other => return other.map(|()| true),
            }
            // A driver that cannot promise to keep TPM state or NVRAM may only undefine a domain that has none.
            let xml = domain.xml_desc(raw::VIR_DOMAIN_XML_INACTIVE)?;
            if definition::has_firmware_state(&xml) {
                return Ok(false);
            }
            match domain.undefine_flags(metadata) {
                Err(error) if error::is_unknown_flag(&error) => {
                    domain.undefine_flags(raw::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE)
                }
                other => other,
            }
            .map(|()| true)
        })?;
        if done {
            Ok(())
        } else {
            Err(HypervisorError::Unsupported(
                "this libvirt cannot remove the definition and keep the guest's NVRAM or TPM state".to_owned(),
            ))
        }
    }

    fn start(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.on(uuid, |domain| domain.create())
    }

    fn shutdown(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.on(uuid, |domain| match domain.shutdown_flags(raw::VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN) {
            Err(error) if error::is_unknown_flag(&error) => domain.shutdown(),
            other => other,
        })
    }

    fn power_off(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.on(uuid, |domain| domain.destroy())
    }

    fn pause(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.on(uuid, |domain| domain.suspend().map(|_| ()))
    }

    fn unpause(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.on(uuid, |domain| domain.resume().map(|_| ()))
    }

    fn save(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.on(uuid, |domain| domain.managed_save(0).map(|_| ()))
    }

    fn reboot(&self, uuid: Uuid, kind: Reboot) -> Result<(), HypervisorError> {
        self.on(uuid, |domain| match kind {
            Reboot::Soft => domain.reboot(raw::VIR_DOMAIN_REBOOT_DEFAULT),
            Reboot::Hard => domain.reset().map(|_| ()),
        })
    }

    fn open_console(&self, uuid: Uuid, device: ConsoleDevice) -> Result<UnixStream, HypervisorError> {
        match device {
            ConsoleDevice::Serial => self.open_serial(uuid),
            ConsoleDevice::Vnc => {
                let index = definition::vnc_index(&self.on(uuid, |domain| domain.xml_desc(0))?);
                let index = index.ok_or_else(|| {
                    HypervisorError::Unsupported("the running domain has no VNC graphics; restart it".to_owned())
                })?;
                self.on(uuid, |domain| sys::open_graphics(domain, index))
            }
        }
    }

    fn rename(&self, uuid: Uuid, name: &str) -> Result<(), HypervisorError> {
        match self.on(uuid, |domain| domain.rename(name, 0).map(|_| ())) {
            Err(HypervisorError::InvalidState(message) | HypervisorError::Failed(message))
                if self.name_is_taken(name, Some(uuid)) =>
            {
                Err(HypervisorError::Exists(message))
            }
            other => other,
        }
    }

    fn set_metadata(&self, uuid: Uuid, xml: Option<&str>) -> Result<(), HypervisorError> {
        let declares_key = xml.is_some_and(|xml| xml.contains("xmlns:instancefs="));
        let key = if declares_key { OTHER_METADATA_KEY } else { METADATA_KEY };
        self.on(uuid, |domain| {
            set_metadata(domain, raw::VIR_DOMAIN_METADATA_ELEMENT, xml, Some(key), Some(definition::METADATA_NAMESPACE))
        })
    }

    fn set_description(&self, uuid: Uuid, text: Option<&str>) -> Result<(), HypervisorError> {
        self.on(uuid, |domain| set_metadata(domain, raw::VIR_DOMAIN_METADATA_DESCRIPTION, text, None, None))
    }

    fn set_autostart(&self, uuid: Uuid, on: bool) -> Result<(), HypervisorError> {
        self.on(uuid, |domain| domain.set_autostart(on).map(|_| ()))
    }

    /// Like `virsh edit`: the inactive definition with its secrets, defined again with other values.
    fn set_hardware(&self, uuid: Uuid, vcpus: Option<u32>, memory_bytes: Option<u64>) -> Result<(), HypervisorError> {
        let whole = raw::VIR_DOMAIN_XML_INACTIVE | raw::VIR_DOMAIN_XML_SECURE;
        let xml = self.on(uuid, |domain| domain.xml_desc(whole))?;
        let edited = definition::with_hardware(&xml, vcpus, memory_bytes).map_err(HypervisorError::Unsupported)?;
        self.call(|connection| connection.define_domain_xml(&edited).map(|_| ()))
    }

    fn attach_disk(&self, uuid: Uuid, disk: &AttachedDisk, places: Places) -> Result<(), HypervisorError> {
        self.on(uuid, |domain| domain.attach_device_flags(&disk.to_xml(), affected(places)))
    }

    /// The element is taken from the definition itself, in libvirt's own words for it.
    fn detach_disk(&self, uuid: Uuid, device: &str, places: Places) -> Result<(), HypervisorError> {
        let kind = if places.live { 0 } else { raw::VIR_DOMAIN_XML_INACTIVE };
        let is_there = self.on(uuid, |domain| match definition::disk_element(&domain.xml_desc(kind)?, device) {
            // Refused by libvirt itself where there is no guest.
            Some(element) => domain.detach_device_flags(&element, affected(places)).map(|()| true),
            None => Ok(false),
        })?;
        match is_there {
            true => Ok(()),
            false => Err(HypervisorError::Failed(format!("the domain has no disk {device}"))),
        }
    }

    fn resize_disk(&self, uuid: Uuid, device: &str, size_bytes: u64) -> Result<(), HypervisorError> {
        self.on(uuid, |domain| {
            // libvirt would make a larger one smaller. One of this size may have grown by itself, and the guest not know it.
            if domain.block_info(device, 0)?.capacity > size_bytes {
                return Ok(());
            }
            domain.block_resize(device, size_bytes, raw::VIR_DOMAIN_BLOCK_RESIZE_BYTES)
        })
    }

    fn addresses(&self, uuid: Uuid, source: AddressSource) -> Result<Vec<IpAddr>, HypervisorError> {
        self.on(uuid, |domain| match source {
            AddressSource::Agent => sys::addresses(domain, raw::VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_AGENT),
            AddressSource::Host => {
                // Where there is no network driver, or none that libvirt can use, the next source is asked.
                for source in
                    [raw::VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_LEASE, raw::VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_ARP]
                {
                    if let Ok(found) = sys::addresses(domain, source)
                        && !found.is_empty()
                    {
                        return Ok(found);
                    }
                }
                if !self.target.is_local_qemu() {
                    return Ok(Vec::new());
                }
                let xml = domain.xml_desc(0)?;
                Ok(neighbours::of(&definition::cards(&xml)))
            }
        })
    }

    fn networks(&self) -> Networks {
        let is_embedded = self.target.embed_root().is_some();
        Networks {
            default: if is_embedded { Network::User } else { Network::Libvirt("default".to_owned()) },
            has_libvirt_networks: !is_embedded,
            is_local: self.target.is_local_qemu(),
        }
    }

    /// For a host that is not this one nothing can be tried out; there the answer is what its libvirt offers.
    fn accelerator(&self) -> Result<Accelerator, HypervisorError> {
        let mut known = self.accelerator.lock();
        if let Some(accelerator) = *known {
            return Ok(accelerator);
        }
        let accelerator = if self.target.is_local_qemu() {
            let profile = self.definition_profile();
            accelerator::probe_remembered(&profile, &self.state_dir)
        } else {
            let offered = self.call(|connection| connection.domain_capabilities(None, None, None, Some("kvm"), 0));
            match offered {
                Ok(_) => Accelerator::Kvm,
                Err(HypervisorError::Unsupported(reason)) => {
                    return Err(HypervisorError::Unsupported(reason));
                }
                Err(HypervisorError::Failed(_)) => Accelerator::Tcg,
                Err(error) => return Err(error),
            }
        };
        *known = Some(accelerator);
        Ok(accelerator)
    }

    fn definition_profile(&self) -> Profile {
        if let Some(profile) = self.profile.get() {
            return profile.clone();
        }
        let agent_sockets = self.target.embed_root().map(embed::agent_sockets);
        match self.ask_for_profile() {
            Ok(profile) => self.profile.get_or_init(|| Profile { agent_sockets, ..profile }).clone(),
            Err(reason) => {
                log::debug!("no domain capabilities, taking the usual ones: {reason}");
                Profile { agent_sockets, ..embed::usual_profile() }
            }
        }
    }
}

/// `virDomainModificationImpact`. Never "current", which is decided when the call arrives.
fn affected(places: Places) -> u32 {
    let flag = |is_meant, flag| if is_meant { flag } else { 0 };
    flag(places.persistent, raw::VIR_DOMAIN_AFFECT_CONFIG) | flag(places.live, raw::VIR_DOMAIN_AFFECT_LIVE)
}

/// The UUIDs of the domains that a filter of `virConnectListAllDomains` selects: one round trip.
fn listed(connection: &Connect, filter: raw::virConnectListAllDomainsFlags) -> Result<HashSet<Uuid>, Error> {
    connection.list_all_domains(filter)?.iter().map(LibvirtDomain::uuid).collect()
}

/// Sets or removes metadata in the definition, and in the running domain too.
fn set_metadata(
    domain: &LibvirtDomain,
    kind: raw::virDomainMetadataType,
    text: Option<&str>,
    key: Option<&str>,
    namespace: Option<&str>,
) -> Result<(), Error> {
    let set = |flags| domain.set_metadata(kind as i32, text, key, namespace, flags);
    let present = || -> Result<u32, Error> {
        let mut flags = 0;
        if domain.is_persistent()? {
            flags |= raw::VIR_DOMAIN_AFFECT_CONFIG;
        }
        if domain.is_active()? {
            flags |= raw::VIR_DOMAIN_AFFECT_LIVE;
        }
        Ok(flags)
    };
    match set(present()?) {
        // It stopped or started between the question and the call.
        Err(error) if error.code().is(ErrorNumber::OperationInvalid) => set(present()?),
        other => other,
    }
}
