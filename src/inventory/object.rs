//! What the inventory holds: immutable objects, shared by reference.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use uuid::Uuid;

use crate::model::backend::BackendRecord;
use crate::model::caller::{Caller, NO_PROJECT, Ownership};
use crate::model::domain::Domain;
use crate::model::protection::Lock;
use crate::model::record::{BinEntry, ErrorHistory, FlavorRecord, ImageRecord, InstanceRecord};
use crate::model::task::{Operation, TaskRecord};
use crate::model::transfer::TransferRecord;
use crate::model::volume::record::VolumeRecord;
use crate::model::{Class, image, instance, volume};

/// The operation that owns an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunningTask {
    /// Its id, under `tasks/`.
    pub id: Uuid,
    /// What it does.
    pub operation: Operation,
    /// Percent.
    pub progress: u8,
}

/// A virtual machine: what we store of it, what libvirt said last, and what runs on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    /// The domain's UUID.
    pub id: Uuid,
    /// What the store holds.
    pub record: InstanceRecord,
    /// What the hypervisor said last; `None` for drafts and domains that are gone.
    pub domain: Option<Domain>,
    /// Where it can be reached, as last asked; none while it is off.
    pub addresses: Addresses,
    /// What runs on it.
    pub task: Option<RunningTask>,
}

/// The addresses of a running guest, by who says so.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// The guest itself, by its agent.
    pub agent: Vec<IpAddr>,
    /// The host: its DHCP leases, else its neighbour table.
    pub host: Vec<IpAddr>,
}

impl Addresses {
    /// Those to show: the guest knows best.
    pub fn shown(&self) -> &[IpAddr] {
        if self.agent.is_empty() { &self.host } else { &self.agent }
    }
}

impl Instance {
    /// Whether it is started with the host.
    pub fn autostart(&self) -> bool {
        match (self.record.draft, &self.domain) {
            (None, Some(domain)) => domain.autostart,
            (Some(_), _) | (None, None) => self.record.autostart,
        }
    }

    /// What is known of it in the bin, if it is there.
    pub fn bin(&self) -> Option<&BinEntry> {
        self.record.bin.as_ref().map(|bin| &bin.entry)
    }

    /// The libvirt name, of a draft the wanted one.
    pub fn name(&self) -> &str {
        self.domain.as_ref().map_or(&self.record.name, |domain| &domain.name)
    }

    /// State and reason.
    pub fn observed(&self) -> instance::Observed {
        instance::observe(&self.record, self.domain.as_ref())
    }

    /// What a judge needs to know when `caller` asks.
    pub fn situation<'a>(&'a self, caller: &Caller, unreachable: Option<&'a str>) -> instance::Situation<'a> {
        instance::Situation {
            role: caller.role(&self.record.ownership),
            state: self.observed().state,
            is_defined: self.domain.is_some() || self.record.draft.is_some(),
            before_bin: self.record.bin.as_ref().map(|bin| bin.state),
            task: self.task.as_ref().map(|task| &task.operation),
            protection: &self.record.protection,
            unreachable,
        }
    }
}

/// An image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its uuid.
    pub id: Uuid,
    /// What the store holds.
    pub record: ImageRecord,
    /// What runs on it.
    pub task: Option<RunningTask>,
    /// Bytes of a draft's `data` so far; of an active image [`ImageRecord::size_bytes`].
    pub data_bytes: u64,
}

impl Image {
    /// The state.
    pub fn state(&self) -> image::State {
        match (&self.record.draft, self.record.deactivated) {
            _ if self.record.bin.is_some() => image::State::SoftDeleted,
            (Some(_), _) => image::State::Draft,
            (None, true) => image::State::Deactivated,
            (None, false) => image::State::Active,
        }
    }

    /// What a judge needs to know when `caller` asks.
    pub fn situation<'a>(&'a self, caller: &'a Caller) -> image::Situation<'a> {
        image::Situation {
            caller,
            role: caller.role(&self.record.ownership),
            state: self.state(),
            task: self.task.as_ref().map(|task| &task.operation),
            delete_protection: self.record.delete_protection,
        }
    }
}

/// An operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Its uuid.
    pub id: Uuid,
    /// What the store holds.
    pub record: TaskRecord,
}

/// A named size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flavor {
    /// Its key in the store; its directory bears its name.
    pub id: Uuid,
    /// What the store holds.
    pub record: FlavorRecord,
}

/// A disk that exists by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Its uuid.
    pub id: Uuid,
    /// What the store holds.
    pub record: VolumeRecord,
    /// What runs on it.
    pub task: Option<RunningTask>,
}

impl Volume {
    /// What a judge needs to know when `caller` asks. `instance_lock` is that of an instance that has it.
    pub fn situation<'a>(&'a self, caller: &Caller, instance_lock: Option<&'a Lock>) -> volume::Situation<'a> {
        volume::Situation {
            role: caller.role(&self.record.ownership),
            state: self.record.state(),
            task: self.task.as_ref().map(|task| &task.operation),
            record: &self.record,
            instance_lock,
        }
    }
}

/// An offer of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// Its uuid.
    pub id: Uuid,
    /// What the store holds.
    pub record: TransferRecord,
}

/// A place for disks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Its key in the store; its directory bears its name.
    pub id: Uuid,
    /// What the store holds.
    pub record: BackendRecord,
    /// Total and free bytes, as last asked; `None` if it does not say.
    pub capacity: Option<(u64, u64)>,
}

/// Any object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// A virtual machine.
    Instance(Arc<Instance>),
    /// An image.
    Image(Arc<Image>),
    /// An operation.
    Task(Arc<Task>),
    /// A named size.
    Flavor(Arc<Flavor>),
    /// A disk that exists by itself.
    Volume(Arc<Volume>),
    /// An offer of a volume.
    Transfer(Arc<Transfer>),
    /// A place for disks.
    Backend(Arc<Backend>),
}

impl Object {
    /// Its class.
    pub fn class(&self) -> Class {
        match self {
            Object::Instance(_) => Class::Instance,
            Object::Image(_) => Class::Image,
            Object::Task(_) => Class::Task,
            Object::Flavor(_) => Class::Flavor,
            Object::Volume(_) => Class::Volume,
            Object::Transfer(_) => Class::Transfer,
            Object::Backend(_) => Class::Backend,
        }
    }

    /// Its uuid.
    pub fn id(&self) -> Uuid {
        match self {
            Object::Instance(instance) => instance.id,
            Object::Image(image) => image.id,
            Object::Task(task) => task.id,
            Object::Flavor(flavor) => flavor.id,
            Object::Volume(volume) => volume.id,
            Object::Transfer(transfer) => transfer.id,
            Object::Backend(backend) => backend.id,
        }
    }

    /// The number behind its inodes.
    pub fn number(&self) -> u64 {
        match self {
            Object::Instance(instance) => instance.record.number,
            Object::Image(image) => image.record.number,
            Object::Task(task) => task.record.number,
            Object::Flavor(flavor) => flavor.record.number,
            Object::Volume(volume) => volume.record.number,
            Object::Transfer(transfer) => transfer.record.number,
            Object::Backend(backend) => backend.record.number,
        }
    }

    /// Whose it is.
    pub fn ownership(&self) -> Ownership {
        match self {
            Object::Instance(instance) => instance.record.ownership,
            Object::Image(image) => image.record.ownership,
            Object::Flavor(flavor) => flavor.record.ownership,
            Object::Volume(volume) => volume.record.ownership,
            Object::Transfer(transfer) => transfer.record.ownership,
            Object::Backend(_) => Ownership { owner: 0, project: NO_PROJECT, generation: 0 },
            Object::Task(task) => Ownership { owner: task.record.owner, project: task.record.project, generation: 0 },
        }
    }

    /// What is known of it in the bin, if it is there.
    pub fn bin(&self) -> Option<&BinEntry> {
        match self {
            Object::Instance(instance) => instance.bin(),
            Object::Image(image) => image.record.bin.as_ref(),
            Object::Volume(volume) => volume.record.bin.as_ref(),
            Object::Task(_) | Object::Flavor(_) | Object::Transfer(_) | Object::Backend(_) => None,
        }
    }

    /// For people: what it is called.
    pub fn name(&self) -> &str {
        match self {
            Object::Instance(instance) => instance.name(),
            Object::Image(image) => &image.record.name,
            Object::Flavor(flavor) => &flavor.record.name,
            Object::Volume(volume) => &volume.record.name,
            Object::Transfer(transfer) => &transfer.record.name,
            Object::Backend(backend) => &backend.record.name,
            Object::Task(_) => "",
        }
    }

    /// The operation that owns it, as stored.
    pub fn operation(&self) -> Option<Uuid> {
        match self {
            Object::Instance(instance) => instance.record.operation,
            Object::Image(image) => image.record.operation,
            Object::Volume(volume) => volume.record.operation,
            Object::Task(_) | Object::Flavor(_) | Object::Transfer(_) | Object::Backend(_) => None,
        }
    }

    /// Its refusals and failures; tasks have a message instead.
    pub fn errors(&self) -> Option<&ErrorHistory> {
        match self {
            Object::Instance(instance) => Some(&instance.record.errors),
            Object::Image(image) => Some(&image.record.errors),
            Object::Flavor(flavor) => Some(&flavor.record.errors),
            Object::Volume(volume) => Some(&volume.record.errors),
            Object::Transfer(transfer) => Some(&transfer.record.errors),
            Object::Task(_) | Object::Backend(_) => None,
        }
    }
}

/// How one part of the system is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Part {
    /// It answers.
    #[default]
    Ok,
    /// It takes requests but has not answered since then: what is shown may be stale.
    Hung {
        /// Unix seconds.
        since: u64,
    },
    /// It does not work.
    Down {
        /// Unix seconds.
        since: u64,
        /// Why.
        detail: String,
    },
}

impl Part {
    /// Why requests that need it are refused, if they are: a hung part still takes them.
    pub fn unreachable(&self) -> Option<&str> {
        match self {
            Part::Ok | Part::Hung { .. } => None,
            Part::Down { detail, .. } => Some(detail),
        }
    }
}

/// The content of `health`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// The connection to the hypervisor.
    pub hypervisor: Part,
    /// The store.
    pub store: Part,
    /// The disks' directory.
    pub directory: Part,
    /// The backends that the configuration names, by name.
    pub backends: BTreeMap<String, Part>,
    /// The child process that makes inotify events.
    pub announcer: Part,
    /// Name of the host that the domains run on, for `host`.
    pub hostname: String,
}
