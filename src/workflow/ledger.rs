//! The one way in which objects change: a durable transaction first, then the inventory, as one step.
//!
//! A batch sees its own staged objects. Batches run one after the other, so what a batch read cannot change before it
//! commits; the store's compare-and-set protects against everything outside this process. Nobody holds the ledger
//! while calling the hypervisor.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use uuid::Uuid;

use crate::inventory::{Flavor, Image, Instance, Inventory, Object, Task, Transfer, Update, Volume};
use crate::model::Class;
use crate::store::{Change, Compare, Revision, Store, StoreError};

/// The first number given to an object; those below belong to the fixed parts of the tree.
pub const FIRST_NUMBER: u64 = 16;

const META: &str = "meta/";
const NEXT_NUMBER: &str = "meta/next_number";

struct State {
    next_number: u64,
    revisions: HashMap<String, Revision>,
    /// Objects that read differently from their stored record; see [`Batch::show`].
    unsaved: HashSet<(Class, Uuid)>,
}

/// See the module.
pub struct Ledger {
    store: Arc<dyn Store>,
    inventory: Arc<Inventory>,
    meta: HashMap<String, Vec<u8>>,
    state: Mutex<State>,
}

/// Now, in Unix seconds.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}

/// The store's key of an object.
pub fn key(class: Class, id: Uuid) -> String {
    format!("{}/{id}", class.directory())
}

impl Ledger {
    /// Loads the revisions and the counter. The caller loads the objects themselves.
    pub fn open(store: Arc<dyn Store>, inventory: Arc<Inventory>) -> Result<Ledger, StoreError> {
        let mut revisions = HashMap::new();
        let mut meta = HashMap::new();
        for record in store.list("")? {
            if record.key.starts_with(META) {
                meta.insert(record.key.clone(), record.value);
            }
            revisions.insert(record.key, record.revision);
        }
        let next_number = match meta.get(NEXT_NUMBER) {
            Some(value) => serde_json::from_slice(value)
                .map_err(|error| StoreError::Failed(format!("{NEXT_NUMBER} cannot be read: {error}")))?,
            None => FIRST_NUMBER,
        };
        let state = State { next_number, revisions, unsaved: HashSet::new() };
        Ok(Ledger { store, inventory, meta, state: Mutex::new(state) })
    }

    /// The view that batches are based on.
    pub fn inventory(&self) -> &Arc<Inventory> {
        &self.inventory
    }

    /// The value of a key below `meta/`, as it was when the ledger was opened.
    pub fn meta(&self, key: &str) -> Option<&[u8]> {
        self.meta.get(key).map(Vec::as_slice)
    }

    /// Runs `edit` on a batch, stores what it put, and makes everything visible at once. On an error nothing changed.
    /// A batch that put nothing costs no commit.
    pub fn transact<T>(&self, edit: impl FnOnce(&mut Batch<'_>) -> T) -> Result<T, StoreError> {
        self.carry_out(&mut self.state.lock(), edit)
    }

    /// As [`Ledger::transact`], but `None`, and nothing happened, while another batch is being stored: for whoever has
    /// better things to do than to wait for a disk.
    pub fn try_transact<T>(&self, edit: impl FnOnce(&mut Batch<'_>) -> T) -> Option<Result<T, StoreError>> {
        Some(self.carry_out(&mut *self.state.try_lock()?, edit))
    }

    fn carry_out<T>(&self, state: &mut State, edit: impl FnOnce(&mut Batch<'_>) -> T) -> Result<T, StoreError> {
        let mut batch = Batch {
            inventory: &self.inventory,
            staged: HashMap::new(),
            order: Vec::new(),
            saves: HashSet::new(),
            extra: Vec::new(),
            next_number: state.next_number,
        };
        let result = edit(&mut batch);
        let Batch { mut staged, order, saves, extra, next_number, .. } = batch;
        let mut changes = extra;
        for (class, id) in &saves {
            changes.push(match staged.get(&(*class, *id)) {
                Some(Some(object)) => Change::Put(key(*class, *id), encode(object)?),
                Some(None) | None => Change::Delete(key(*class, *id)),
            });
        }
        if next_number != state.next_number {
            changes.push(Change::Put(NEXT_NUMBER.to_owned(), next_number.to_string().into_bytes()));
        }
        if !changes.is_empty() {
            let compares: Vec<_> = changes
                .iter()
                .map(|change| {
                    let (Change::Put(key, _) | Change::Delete(key)) = change;
                    match state.revisions.get(key) {
                        Some(revision) => Compare::At(key.clone(), *revision),
                        None => Compare::Absent(key.clone()),
                    }
                })
                .collect();
            let began = Instant::now();
            let stored = self.store.transact(&compares, &changes);
            match &stored {
                Ok(_) => self.inventory.metrics().committed(began.elapsed()),
                Err(_) => self.inventory.metrics().commit_failed(),
            }
            let revision = stored?;
            for change in changes {
                match change {
                    Change::Put(key, _) => drop(state.revisions.insert(key, revision)),
                    Change::Delete(key) => drop(state.revisions.remove(&key)),
                }
            }
        }
        state.next_number = next_number;
        let mut updates = Vec::with_capacity(order.len());
        for (class, id) in order {
            let Some(object) = staged.remove(&(class, id)) else { continue };
            if saves.contains(&(class, id)) || object.is_none() {
                state.unsaved.remove(&(class, id));
            } else {
                state.unsaved.insert((class, id));
            }
            updates.push(object.map_or(Update::Remove(class, id), Update::Put));
        }
        self.inventory.apply(updates);
        Ok(result)
    }

    /// Stores the records of all objects that were only shown so far, in one transaction.
    pub fn save_shown(&self) -> Result<(), StoreError> {
        let unsaved: Vec<_> = self.state.lock().unsaved.iter().copied().collect();
        if unsaved.is_empty() {
            return Ok(());
        }
        self.transact(|batch| {
            for (class, id) in unsaved {
                if let Some(object) = batch.get(class, id) {
                    batch.put(object);
                }
            }
        })
    }
}

fn encode(object: &Object) -> Result<Vec<u8>, StoreError> {
    match object {
        Object::Instance(instance) => serde_json::to_vec(&instance.record),
        Object::Image(image) => serde_json::to_vec(&image.record),
        Object::Task(task) => serde_json::to_vec(&task.record),
        Object::Flavor(flavor) => serde_json::to_vec(&flavor.record),
        Object::Volume(volume) => serde_json::to_vec(&volume.record),
        Object::Transfer(transfer) => serde_json::to_vec(&transfer.record),
        Object::Backend(backend) => serde_json::to_vec(&backend.record),
    }
    .map_err(|error| StoreError::Failed(format!("a record cannot be written as JSON: {error}")))
}

/// One step of the ledger under construction.
pub struct Batch<'a> {
    inventory: &'a Inventory,
    staged: HashMap<(Class, Uuid), Option<Object>>,
    order: Vec<(Class, Uuid)>,
    saves: HashSet<(Class, Uuid)>,
    extra: Vec<Change>,
    next_number: u64,
}

impl Batch<'_> {
    /// An object as this batch leaves it.
    pub fn get(&self, class: Class, id: Uuid) -> Option<Object> {
        match self.staged.get(&(class, id)) {
            Some(staged) => staged.clone(),
            None => self.inventory.get(class, id),
        }
    }

    /// An instance as this batch leaves it.
    pub fn instance(&self, id: Uuid) -> Option<Arc<Instance>> {
        let Some(Object::Instance(instance)) = self.get(Class::Instance, id) else { return None };
        Some(instance)
    }

    /// An image as this batch leaves it.
    pub fn image(&self, id: Uuid) -> Option<Arc<Image>> {
        let Some(Object::Image(image)) = self.get(Class::Image, id) else { return None };
        Some(image)
    }

    /// A task as this batch leaves it.
    pub fn task(&self, id: Uuid) -> Option<Arc<Task>> {
        let Some(Object::Task(task)) = self.get(Class::Task, id) else { return None };
        Some(task)
    }

    /// A flavor as this batch leaves it.
    pub fn flavor(&self, id: Uuid) -> Option<Arc<Flavor>> {
        let Some(Object::Flavor(flavor)) = self.get(Class::Flavor, id) else { return None };
        Some(flavor)
    }

    /// A volume as this batch leaves it.
    pub fn volume(&self, id: Uuid) -> Option<Arc<Volume>> {
        let Some(Object::Volume(volume)) = self.get(Class::Volume, id) else { return None };
        Some(volume)
    }

    /// All volumes as this batch leaves them.
    pub fn volumes(&self) -> Vec<Arc<Volume>> {
        let staged = self.staged.values().flatten().filter_map(|object| match object {
            Object::Volume(volume) => Some(volume.clone()),
            Object::Instance(_)
            | Object::Image(_)
            | Object::Task(_)
            | Object::Flavor(_)
            | Object::Transfer(_)
            | Object::Backend(_) => None,
        });
        let volumes = self.inventory.volumes().into_iter();
        volumes.filter(|volume| !self.staged.contains_key(&(Class::Volume, volume.id))).chain(staged).collect()
    }

    /// An offer as this batch leaves it.
    pub fn transfer(&self, id: Uuid) -> Option<Arc<Transfer>> {
        let Some(Object::Transfer(transfer)) = self.get(Class::Transfer, id) else { return None };
        Some(transfer)
    }

    /// Whether a flavor has this name, as this batch leaves it.
    pub fn has_flavor_named(&self, name: &str) -> bool {
        let bears = |object: &Object| matches!(object, Object::Flavor(flavor) if flavor.record.name == name);
        let staged = self.staged.values().flatten().any(bears);
        staged || self.inventory.flavor_named(name).is_some_and(|flavor| self.flavor(flavor.id).is_some())
    }

    /// Whether any class has this uuid.
    pub fn contains(&self, id: Uuid) -> bool {
        Class::ALL.into_iter().any(|class| self.get(class, id).is_some())
    }

    /// Stores and shows an object.
    pub fn put(&mut self, object: Object) {
        self.saves.insert((object.class(), object.id()));
        self.show(object);
    }

    /// Shows an object without storing it yet: for what the hypervisor reports. [`Ledger::save_shown`] stores it later.
    pub fn show(&mut self, object: Object) {
        let place = (object.class(), object.id());
        if self.staged.insert(place, Some(object)).is_none() {
            self.order.push(place);
        }
    }

    /// Removes an object from store and view.
    pub fn remove(&mut self, class: Class, id: Uuid) {
        self.saves.insert((class, id));
        if self.staged.insert((class, id), None).is_none() {
            self.order.push((class, id));
        }
    }

    /// Takes back an object that this batch has put and nothing had before.
    pub(super) fn withdraw(&mut self, class: Class, id: Uuid) {
        self.staged.remove(&(class, id));
        self.saves.remove(&(class, id));
        self.order.retain(|place| *place != (class, id));
    }

    /// Stores a value that is no object, such as a definition.
    pub fn store(&mut self, change: Change) {
        self.extra.push(change);
    }

    /// A number that no object had before.
    pub fn next_number(&mut self) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        number
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::sqlite::SqliteStore;

    #[test]
    fn who_does_not_want_to_wait_is_told_that_another_batch_is_under_way() {
        let directory = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&directory.path().join("store.sqlite")).unwrap();
        let ledger = Ledger::open(Arc::new(store), Arc::default()).unwrap();
        let meanwhile = ledger.transact(|_| ledger.try_transact(|_| ()).is_none()).unwrap();
        assert!(meanwhile);
        assert_eq!(ledger.try_transact(|batch| batch.next_number()).unwrap().unwrap(), FIRST_NUMBER);
        assert_eq!(ledger.transact(|batch| batch.next_number()).unwrap(), FIRST_NUMBER + 1);
    }
}
