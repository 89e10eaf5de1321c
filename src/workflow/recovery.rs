//! What an earlier life of the program left: its records, its unfinished operations, and its finished ones.

use std::collections::HashMap;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::engine::Shared;
use super::judge::running;
use super::ledger::now;
use super::transfer;
use crate::inventory::{
    Addresses, Backend, Flavor, Image, Instance, Object, RunningTask, Task, Transfer, Update, Volume,
};
use crate::model::Class;
use crate::model::backend::BackendRecord;
use crate::model::reason::Reason;
use crate::model::record::{FlavorRecord, ImageRecord, InstanceRecord};
use crate::model::task::{TaskRecord, TaskState};
use crate::model::transfer::TransferRecord;
use crate::model::volume::record::VolumeRecord;
use crate::store::{Store, StoreError};

/// Finished tasks are kept for so many seconds after their end.
pub const KEPT_SECONDS: u64 = 48 * 3600;

/// All records as inventory updates, with the domains as last seen and the operations that own objects, so that
/// everything can be shown before the hypervisor has answered.
pub fn load(store: &dyn Store) -> Result<Vec<Update>, StoreError> {
    let tasks: Vec<(Uuid, TaskRecord)> = read(store, Class::Task)?;
    let tasks: Vec<_> = tasks.into_iter().map(|(id, record)| Arc::new(Task { id, record })).collect();
    let unfinished: HashMap<Uuid, RunningTask> =
        tasks.iter().filter(|task| !task.record.state.is_final()).map(|task| (task.id, running(task))).collect();
    let task_of = |operation: Option<Uuid>| operation.and_then(|id| unfinished.get(&id).cloned());
    let mut updates = Vec::new();
    for (id, record) in read::<ImageRecord>(store, Class::Image)? {
        let task = task_of(record.operation);
        let data_bytes = record.size_bytes;
        updates.push(Update::Put(Object::Image(Arc::new(Image { id, record, task, data_bytes }))));
    }
    for (id, record) in read::<InstanceRecord>(store, Class::Instance)? {
        let task = task_of(record.operation);
        let domain = record.seen.clone();
        updates.push(Update::Put(Object::Instance(Arc::new(Instance {
            id,
            record,
            domain,
            addresses: Addresses::default(),
            task,
        }))));
    }
    for (id, record) in read::<FlavorRecord>(store, Class::Flavor)? {
        updates.push(Update::Put(Object::Flavor(Arc::new(Flavor { id, record }))));
    }
    for (id, record) in read::<VolumeRecord>(store, Class::Volume)? {
        let task = task_of(record.operation);
        updates.push(Update::Put(Object::Volume(Arc::new(Volume { id, record, task }))));
    }
    for (id, record) in read::<TransferRecord>(store, Class::Transfer)? {
        updates.push(Update::Put(Object::Transfer(Arc::new(Transfer { id, record }))));
    }
    for (id, record) in read::<BackendRecord>(store, Class::Backend)? {
        updates.push(Update::Put(Object::Backend(Arc::new(Backend { id, record, capacity: None }))));
    }
    updates.extend(tasks.into_iter().map(|task| Update::Put(Object::Task(task))));
    Ok(updates)
}

fn read<T: DeserializeOwned>(store: &dyn Store, class: Class) -> Result<Vec<(Uuid, T)>, StoreError> {
    let prefix = format!("{}/", class.directory());
    let records = store.list(&prefix)?.into_iter().map(|record| {
        let broken = |detail: String| StoreError::Failed(format!("the record {} cannot be read: {detail}", record.key));
        let id = Uuid::try_parse(&record.key[prefix.len()..]).map_err(|error| broken(error.to_string()))?;
        let value = serde_json::from_slice(&record.value).map_err(|error| broken(error.to_string()))?;
        Ok((id, value))
    });
    records.collect()
}

/// The operations to run again. One whose object is gone, or owned by another operation, is ended here.
pub(super) fn unfinished(shared: &Shared) -> Result<Vec<Arc<Task>>, StoreError> {
    let ledger = &shared.parts.ledger;
    let is_unfinished = |task: &Arc<Task>| !task.record.state.is_final() && task.record.draft.is_none();
    let tasks: Vec<_> = ledger.inventory().tasks().into_iter().filter(is_unfinished).collect();
    let (owners, orphans): (Vec<_>, Vec<_>) = tasks.into_iter().partition(|task| {
        let object = ledger.inventory().get(task.record.class, task.record.object);
        object.and_then(|object| object.operation()) == Some(task.id)
    });
    ledger.transact(|batch| {
        for orphan in orphans {
            let reason = Reason::NotFound(format!("{} {}", orphan.record.class.noun(), orphan.record.object));
            let mut task = (*orphan).clone();
            task.record.state = TaskState::Failure;
            task.record.ended_at = Some(now());
            task.record.message = reason.to_string();
            task.record.errno = reason.errno();
            batch.put(Object::Task(Arc::new(task)));
        }
        for image in ledger.inventory().images().into_iter().filter(|image| image.record.draft.is_some()) {
            let length = std::fs::symlink_metadata(shared.draft_path(image.id)).map_or(0, |metadata| metadata.len());
            if image.data_bytes != length {
                let mut image = (*image).clone();
                image.data_bytes = length;
                batch.show(Object::Image(Arc::new(image)));
            }
        }
    })?;
    Ok(owners)
}

/// Removes finished tasks and ended offers whose time is over, and what points to them.
pub(super) fn expire(shared: &Shared) {
    if shared.settings.read_only {
        return;
    }
    transfer::forget_ended(shared);
    let ledger = &shared.parts.ledger;
    let now = now();
    let is_over =
        |task: &Arc<Task>| task.record.ended_at.is_some_and(|ended| ended.saturating_add(KEPT_SECONDS) <= now);
    let over: Vec<_> = ledger.inventory().tasks().into_iter().filter(is_over).collect();
    if over.is_empty() {
        return;
    }
    let removed = ledger.transact(|batch| {
        for task in &over {
            batch.remove(Class::Task, task.id);
            match batch.get(task.record.class, task.record.object) {
                Some(Object::Instance(instance)) if instance.record.last_task == Some(task.id) => {
                    let mut instance = (*instance).clone();
                    instance.record.last_task = None;
                    batch.put(Object::Instance(Arc::new(instance)));
                }
                Some(Object::Image(image)) if image.record.last_task == Some(task.id) => {
                    let mut image = (*image).clone();
                    image.record.last_task = None;
                    batch.put(Object::Image(Arc::new(image)));
                }
                Some(Object::Volume(volume)) if volume.record.last_task == Some(task.id) => {
                    let mut volume = (*volume).clone();
                    volume.record.last_task = None;
                    batch.put(Object::Volume(Arc::new(volume)));
                }
                Some(
                    Object::Instance(_)
                    | Object::Image(_)
                    | Object::Task(_)
                    | Object::Flavor(_)
                    | Object::Volume(_)
                    | Object::Transfer(_)
                    | Object::Backend(_),
                )
                | None => {}
            }
            if let Some(instance) = task.record.instance.and_then(|id| batch.instance(id))
                && instance.record.last_task == Some(task.id)
            {
                let mut instance = (*instance).clone();
                instance.record.last_task = None;
                batch.put(Object::Instance(Arc::new(instance)));
            }
        }
    });
    if let Err(error) = removed {
        log::warn!("{} finished tasks are kept for now: {error}", over.len());
    }
}
