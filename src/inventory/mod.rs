//! The live objects: one consistent view, read by everyone, changed by the workflow room only.
//!
//! Objects are immutable and shared; a change replaces an object as a whole. Batches become visible at once, and reach
//! subscribers in the order in which they became visible.

pub mod metrics;
pub mod object;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use parking_lot::{Mutex, RwLock};
use uuid::Uuid;

use crate::model::Class;
use crate::model::record::ErrorHistory;
use metrics::Metrics;
pub use object::{
    Addresses, Backend, Flavor, Health, Image, Instance, Object, Part, RunningTask, Task, Transfer, Volume,
};

/// Which files of a stream grew, by the numbers that tell them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Growth {
    /// The growing one.
    pub current: u64,
    /// The one before, if it ended since the last time.
    pub former: Option<u64>,
}

/// One change that became visible.
#[derive(Clone, Debug)]
pub enum Change {
    /// An object came (`old` is `None`), went (`new` is `None`) or was replaced.
    Object {
        /// What it was.
        old: Option<Object>,
        /// What it is.
        new: Option<Object>,
    },
    /// `health` reads differently.
    Health,
    /// `events` grew.
    Events(Growth),
    /// An instance's console log grew.
    Console(Arc<Instance>, Growth),
    /// A user moved a link of this object: whether it stands where it should has to be looked at again.
    Moved(Class, Uuid),
}

/// What is to become visible.
#[derive(Clone, Debug)]
pub enum Update {
    /// This object exists, like this.
    Put(Object),
    /// This object is gone.
    Remove(Class, Uuid),
    /// The new health.
    Health(Health),
    /// `events` grew.
    Events(Growth),
    /// An instance's console log grew.
    Console(Uuid, Growth),
    /// A user moved a link of this object.
    Moved(Class, Uuid),
}

#[derive(Default)]
struct Objects {
    instances: BTreeMap<Uuid, Arc<Instance>>,
    images: BTreeMap<Uuid, Arc<Image>>,
    tasks: BTreeMap<Uuid, Arc<Task>>,
    flavors: BTreeMap<Uuid, Arc<Flavor>>,
    volumes: BTreeMap<Uuid, Arc<Volume>>,
    transfers: BTreeMap<Uuid, Arc<Transfer>>,
    backends: BTreeMap<Uuid, Arc<Backend>>,
    numbers: HashMap<u64, (Class, Uuid)>,
    instance_names: HashMap<String, Uuid>,
    health: Health,
    /// Grows with each batch that became visible.
    revision: u64,
    /// Last refusals that belong to no object, by uid.
    refusals: HashMap<u32, ErrorHistory>,
}

/// The live view.
#[derive(Default)]
pub struct Inventory {
    objects: RwLock<Objects>,
    subscribers: Mutex<Vec<Sender<Arc<Vec<Change>>>>>,
    metrics: Metrics,
}

impl Inventory {
    /// An empty one.
    pub fn new() -> Inventory {
        Inventory::default()
    }

    /// What is counted beside the objects.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Every batch from now on, in order.
    pub fn subscribe(&self) -> Receiver<Arc<Vec<Change>>> {
        let (sender, receiver) = channel();
        self.subscribers.lock().push(sender);
        receiver
    }

    /// Makes a batch visible at once and publishes it.
    pub fn apply(&self, updates: Vec<Update>) {
        let mut objects = self.objects.write();
        let changes: Vec<_> = updates.into_iter().filter_map(|update| objects.apply(update)).collect();
        if changes.is_empty() {
            return;
        }
        objects.revision += 1;
        let changes = Arc::new(changes);
        // Sent under the lock, so that batches arrive in the order in which they became visible; an unbounded channel
        // never blocks.
        self.subscribers.lock().retain(|subscriber| subscriber.send(changes.clone()).is_ok());
    }

    /// One instance.
    pub fn instance(&self, id: Uuid) -> Option<Arc<Instance>> {
        self.objects.read().instances.get(&id).cloned()
    }

    /// One image.
    pub fn image(&self, id: Uuid) -> Option<Arc<Image>> {
        self.objects.read().images.get(&id).cloned()
    }

    /// One task.
    pub fn task(&self, id: Uuid) -> Option<Arc<Task>> {
        self.objects.read().tasks.get(&id).cloned()
    }

    /// One flavor.
    pub fn flavor(&self, id: Uuid) -> Option<Arc<Flavor>> {
        self.objects.read().flavors.get(&id).cloned()
    }

    /// One volume.
    pub fn volume(&self, id: Uuid) -> Option<Arc<Volume>> {
        self.objects.read().volumes.get(&id).cloned()
    }

    /// One offer.
    pub fn transfer(&self, id: Uuid) -> Option<Arc<Transfer>> {
        self.objects.read().transfers.get(&id).cloned()
    }

    /// All volumes, by uuid.
    pub fn volumes(&self) -> Vec<Arc<Volume>> {
        self.objects.read().volumes.values().cloned().collect()
    }

    /// All offers, by uuid.
    pub fn transfers(&self) -> Vec<Arc<Transfer>> {
        self.objects.read().transfers.values().cloned().collect()
    }

    /// All backends, by uuid.
    pub fn backends(&self) -> Vec<Arc<Backend>> {
        self.objects.read().backends.values().cloned().collect()
    }

    /// The backend of a name; there are few.
    pub fn backend_named(&self, name: &str) -> Option<Arc<Backend>> {
        self.objects.read().backends.values().find(|backend| backend.record.name == name).cloned()
    }

    /// The flavor of a name; there are few.
    pub fn flavor_named(&self, name: &str) -> Option<Arc<Flavor>> {
        self.objects.read().flavors.values().find(|flavor| flavor.record.name == name).cloned()
    }

    /// The object behind a number.
    pub fn by_number(&self, number: u64) -> Option<Object> {
        let objects = self.objects.read();
        let (class, id) = *objects.numbers.get(&number)?;
        objects.get(class, id)
    }

    /// One object of a class.
    pub fn get(&self, class: Class, id: Uuid) -> Option<Object> {
        self.objects.read().get(class, id)
    }

    /// Whether any class has this uuid.
    pub fn contains(&self, id: Uuid) -> bool {
        let objects = self.objects.read();
        Class::ALL.into_iter().any(|class| objects.get(class, id).is_some())
    }

    /// The instance that holds a name; drafts hold none.
    pub fn instance_named(&self, name: &str) -> Option<Uuid> {
        self.objects.read().instance_names.get(name).copied()
    }

    /// Grows with each batch that became visible: what was rendered at one revision holds until the next.
    pub fn revision(&self) -> u64 {
        self.objects.read().revision
    }

    /// All instances, by uuid.
    pub fn instances(&self) -> Vec<Arc<Instance>> {
        self.objects.read().instances.values().cloned().collect()
    }

    /// All images, by uuid.
    pub fn images(&self) -> Vec<Arc<Image>> {
        self.objects.read().images.values().cloned().collect()
    }

    /// All tasks, by uuid.
    pub fn tasks(&self) -> Vec<Arc<Task>> {
        self.objects.read().tasks.values().cloned().collect()
    }

    /// All flavors, by uuid.
    pub fn flavors(&self) -> Vec<Arc<Flavor>> {
        self.objects.read().flavors.values().cloned().collect()
    }

    /// The health of the parts.
    pub fn health(&self) -> Health {
        self.objects.read().health.clone()
    }

    /// The last refusals of a user that belong to no object.
    pub fn refusals(&self, uid: u32) -> ErrorHistory {
        self.objects.read().refusals.get(&uid).cloned().unwrap_or_default()
    }

    /// Remembers such refusals; they are neither stored nor announced.
    pub fn set_refusals(&self, uid: u32, history: ErrorHistory) {
        self.objects.write().refusals.insert(uid, history);
    }
}

impl Objects {
    fn get(&self, class: Class, id: Uuid) -> Option<Object> {
        match class {
            Class::Instance => self.instances.get(&id).cloned().map(Object::Instance),
            Class::Image => self.images.get(&id).cloned().map(Object::Image),
            Class::Task => self.tasks.get(&id).cloned().map(Object::Task),
            Class::Flavor => self.flavors.get(&id).cloned().map(Object::Flavor),
            Class::Volume => self.volumes.get(&id).cloned().map(Object::Volume),
            Class::Transfer => self.transfers.get(&id).cloned().map(Object::Transfer),
            Class::Backend => self.backends.get(&id).cloned().map(Object::Backend),
        }
    }

    fn apply(&mut self, update: Update) -> Option<Change> {
        match update {
            Update::Put(new) => {
                let old = self.get(new.class(), new.id());
                if old.as_ref() == Some(&new) {
                    return None;
                }
                self.forget_name(old.as_ref());
                self.numbers.insert(new.number(), (new.class(), new.id()));
                match &new {
                    Object::Instance(instance) => {
                        if instance.record.draft.is_none() {
                            self.instance_names.insert(instance.name().to_owned(), instance.id);
                        }
                        self.instances.insert(instance.id, instance.clone());
                    }
                    Object::Image(image) => {
                        self.images.insert(image.id, image.clone());
                    }
                    Object::Task(task) => {
                        self.tasks.insert(task.id, task.clone());
                    }
                    Object::Flavor(flavor) => {
                        self.flavors.insert(flavor.id, flavor.clone());
                    }
                    Object::Volume(volume) => {
                        self.volumes.insert(volume.id, volume.clone());
                    }
                    Object::Transfer(transfer) => {
                        self.transfers.insert(transfer.id, transfer.clone());
                    }
                    Object::Backend(backend) => {
                        self.backends.insert(backend.id, backend.clone());
                    }
                }
                Some(Change::Object { old, new: Some(new) })
            }
            Update::Remove(class, id) => {
                let old = self.get(class, id)?;
                self.forget_name(Some(&old));
                self.numbers.remove(&old.number());
                match class {
                    Class::Instance => drop(self.instances.remove(&id)),
                    Class::Image => drop(self.images.remove(&id)),
                    Class::Task => drop(self.tasks.remove(&id)),
                    Class::Flavor => drop(self.flavors.remove(&id)),
                    Class::Volume => drop(self.volumes.remove(&id)),
                    Class::Transfer => drop(self.transfers.remove(&id)),
                    Class::Backend => drop(self.backends.remove(&id)),
                }
                Some(Change::Object { old: Some(old), new: None })
            }
            Update::Health(health) => {
                if self.health == health {
                    return None;
                }
                self.health = health;
                Some(Change::Health)
            }
            Update::Events(growth) => Some(Change::Events(growth)),
            Update::Console(id, growth) => {
                self.instances.get(&id).cloned().map(|instance| Change::Console(instance, growth))
            }
            Update::Moved(class, id) => Some(Change::Moved(class, id)),
        }
    }

    /// Two domains can swap names within one batch: a name is forgotten by its holder only.
    fn forget_name(&mut self, old: Option<&Object>) {
        if let Some(Object::Instance(instance)) = old
            && self.instance_names.get(instance.name()) == Some(&instance.id)
        {
            self.instance_names.remove(instance.name());
        }
    }
}
