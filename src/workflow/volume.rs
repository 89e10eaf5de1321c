//! Volumes: what a change set does to one, and the operations on them.

mod attach;
mod copying;
mod create;
mod detach;
pub(super) mod devices;
mod disks;
mod examine;
pub(super) mod exporters;
mod extend;
mod grow;
mod local;
mod remove;
mod snapshot;

use std::sync::Arc;

use uuid::Uuid;

use super::apply::{Words, expires_at, hand_over, words};
use super::bin;
use super::boot::of_block;
use super::delete;
use super::judge::Judge;
use super::ledger::Batch;
use super::operation::{Ending, Halt, Run};
use super::subject::{Subject, Traces};
use super::transfer;
use crate::block::VolumeData;
use crate::inventory::{Instance, Object, RunningTask, Volume};
use crate::model::Class;
use crate::model::caller::{Caller, Ownership};
use crate::model::change::Effect;
use crate::model::image::Format;
use crate::model::instance::reachable;
use crate::model::protection::{Level, Lock};
use crate::model::reason::Reason;
use crate::model::record::ErrorLine;
use crate::model::task::Operation;
use crate::model::volume::change::{VolumeChange, judge};
use crate::model::volume::record::{Origin, VolumeRecord};
use crate::model::volume::{self, VolumeCreation, VolumeOperation};

pub(super) use disks::{disk, record_all_detached, record_attached, record_detached};
pub(super) use remove::{delete, discard};

impl Subject for Volume {
    type Change = VolumeChange;
    const CLASS: Class = Class::Volume;

    fn get(batch: &Batch<'_>, id: Uuid) -> Option<Arc<Volume>> {
        batch.volume(id)
    }

    fn object(self) -> Object {
        Object::Volume(Arc::new(self))
    }

    fn name(&self) -> &str {
        &self.record.name
    }

    fn ownership(&self) -> Ownership {
        self.record.ownership
    }

    /// Unlocking opens the way for the rest, operations see the attributes, locking closes.
    fn rank(change: &VolumeChange) -> u8 {
        match change {
            VolumeChange::Locked(false) => 0,
            VolumeChange::Name(_)
            | VolumeChange::Description(_)
            | VolumeChange::DeleteProtection(_)
            | VolumeChange::Owner(_)
            | VolumeChange::Project(_)
            | VolumeChange::SizeBytes(_)
            | VolumeChange::Backend(_)
            | VolumeChange::DiskFormat(_)
            | VolumeChange::Bootable(_)
            | VolumeChange::Multiattach(_)
            | VolumeChange::CreatedFrom(_)
            | VolumeChange::ExpiresAt(_) => 1,
            VolumeChange::State(_)
            | VolumeChange::Attach { .. }
            | VolumeChange::Detach(_)
            | VolumeChange::LocalAttach(_)
            | VolumeChange::RenewLocalDevice
            | VolumeChange::TakeSnapshot(_)
            | VolumeChange::DeleteSnapshot(_)
            | VolumeChange::Offer { .. }
            | VolumeChange::Unmanage
            | VolumeChange::Restore => 2,
            VolumeChange::Locked(true) => 3,
            VolumeChange::LockedReason(_) => 4,
        }
    }

    fn judge(&self, submissions: &Judge<'_, '_>, caller: &Caller, change: &VolumeChange) -> Result<Effect, Reason> {
        let locked = self.record.attached_to().find_map(|(id, _)| {
            submissions.batch.instance(id).filter(|instance| instance.record.protection.lock.is_some())
        });
        let lock = locked.as_ref().and_then(|instance| instance.record.protection.lock.as_ref());
        let situation = self.situation(caller, lock);
        if let VolumeChange::Offer { name, recipient, .. } = change {
            volume::access(situation.role)?;
            if transfer::is_offered(submissions, self, name, *recipient) {
                return Ok(Effect::AlreadyTrue);
            }
        }
        let effect = judge(&situation, change)?;
        match &effect {
            Effect::Start(operation) => is_not_copied(submissions.batch, self.id, Some(operation))?,
            Effect::Remove => is_not_copied(submissions.batch, self.id, None)?,
            Effect::AlreadyTrue | Effect::Join | Effect::Record | Effect::Reset => {}
        }
        Ok(effect)
    }

    fn describe(&self, change: &VolumeChange) -> Words {
        describe(self, change)
    }

    fn record(&mut self, judge: &mut Judge<'_, '_>, caller: &Caller, change: &VolumeChange) -> Result<(), Reason> {
        record(self, judge, caller, change)
    }

    fn traces(&mut self) -> Traces<'_> {
        let record = &mut self.record;
        Traces { updated_at: &mut record.updated_at, errors: &mut record.errors, draft: &mut record.draft }
    }

    fn task(&self) -> Option<&RunningTask> {
        self.task.as_ref()
    }

    fn claim(&mut self, task: RunningTask) {
        self.record.operation = Some(task.id);
        self.record.last_task = Some(task.id);
        self.task = Some(task);
    }

    fn enter(&mut self, judge: &Judge<'_, '_>, _caller: &Caller, operation: &Operation) {
        if let Operation::Volume(VolumeOperation::TakeSnapshot { name }) = operation {
            let begun = snapshot::begun(&self.record, judge.now);
            let _there_is_room = self.record.snapshots.set(name, begun);
        }
    }

    fn can_begin(&self, judge: &Judge<'_, '_>, caller: &Caller, operation: &Operation) -> Result<(), Reason> {
        if *operation == Operation::Delete {
            // Who uses it is asked of the hypervisor.
            return reachable(judge.unreachable.as_deref());
        }
        let Operation::Volume(operation) = operation else { return Ok(()) };
        if let Some(id) = operation.instance() {
            let instance = judge.batch.instance(id).ok_or_else(|| Reason::NotFound(format!("instance {id}")))?;
            may_claim(&instance, caller)?;
            if instance.record.draft.is_none() {
                reachable(judge.unreachable.as_deref())?;
            }
            return match operation {
                VolumeOperation::Attach { device, .. } => attach::can_begin(self, &instance, device.as_deref()),
                VolumeOperation::Detach { .. }
                | VolumeOperation::Create
                | VolumeOperation::Extend { .. }
                | VolumeOperation::AttachLocally
                | VolumeOperation::DetachLocally
                | VolumeOperation::TakeSnapshot { .. }
                | VolumeOperation::DeleteSnapshot { .. }
                | VolumeOperation::Examine => detach::can_begin(&instance, self.id),
            };
        }
        match operation {
            VolumeOperation::Create => create::can_begin(judge, caller, self),
            VolumeOperation::TakeSnapshot { name } => snapshot::can_begin(self, name),
            VolumeOperation::DeleteSnapshot { .. } => reachable(judge.unreachable.as_deref()),
            VolumeOperation::AttachLocally => local::can_begin(judge.shared, self),
            VolumeOperation::Extend { .. }
            | VolumeOperation::Attach { .. }
            | VolumeOperation::Detach { .. }
            | VolumeOperation::DetachLocally
            | VolumeOperation::Examine => Ok(()),
        }
    }
}

/// Whether nobody makes a copy of the volume, or of what an operation would take from under him. `None`: it is to be
/// forgotten.
fn is_not_copied(batch: &Batch<'_>, id: Uuid, operation: Option<&Operation>) -> Result<(), Reason> {
    let is_disturbed = |origin: &Origin| match (origin, operation) {
        (Origin::Volume(source), Some(Operation::Volume(operation))) => match operation {
            // They only read it, or leave it alone.
            VolumeOperation::Examine
            | VolumeOperation::TakeSnapshot { .. }
            | VolumeOperation::DeleteSnapshot { .. } => false,
            VolumeOperation::Create
            | VolumeOperation::Extend { .. }
            | VolumeOperation::Attach { .. }
            | VolumeOperation::Detach { .. }
            | VolumeOperation::AttachLocally
            | VolumeOperation::DetachLocally => *source == id,
        },
        (Origin::Snapshot { volume, name }, Some(Operation::Volume(operation))) => {
            *volume == id && matches!(operation, VolumeOperation::DeleteSnapshot { name: other } if other == name)
        }
        (Origin::Volume(source) | Origin::Snapshot { volume: source, .. }, Some(_) | None) => *source == id,
        (Origin::Image(_) | Origin::Existing { .. }, _) => false,
    };
    let copy = batch.volumes().into_iter().find(|copy| {
        let is_made =
            copy.task.as_ref().map(|task| &task.operation) == Some(&Operation::Volume(VolumeOperation::Create));
        is_made && copy.record.created_from.as_ref().is_some_and(is_disturbed)
    });
    match copy {
        Some(copy) => Err(Reason::InUse(format!(
            "the volume {} is being made as a copy of it; try again after that (instancefs wait)",
            copy.id
        ))),
        None => Ok(()),
    }
}

/// Whether an operation on one of its volumes may own an instance.
fn may_claim(instance: &Instance, caller: &Caller) -> Result<(), Reason> {
    let situation = instance.situation(caller, None);
    crate::model::instance::access(&situation)?;
    if let Some(lock) = &instance.record.protection.lock {
        return Err(Reason::InstanceLocked(lock.clone()));
    }
    crate::model::instance::idle(situation.task)
}

fn describe(volume: &Volume, change: &VolumeChange) -> Words {
    let record = &volume.record;
    let lock = record.protection.lock.as_ref();
    match change {
        VolumeChange::Name(name) => words("name", &record.name, name),
        VolumeChange::Description(text) => words("description", &record.description, text),
        VolumeChange::State(word) => words("state", record.state().word(), word.word()),
        VolumeChange::Locked(value) => words("locked", u8::from(lock.is_some()), u8::from(*value)),
        VolumeChange::LockedReason(text) => words("locked_reason", lock.map_or("", |lock| lock.reason.as_str()), text),
        VolumeChange::DeleteProtection(value) => {
            words("delete_protection", u8::from(record.protection.disable_terminate), u8::from(*value))
        }
        VolumeChange::Owner(uid) => words("owner", record.ownership.owner, uid),
        VolumeChange::Project(gid) => words("project", record.ownership.project, gid),
        VolumeChange::SizeBytes(bytes) => words("size_bytes", record.size_bytes, bytes),
        VolumeChange::Backend(name) => words("backend", &record.backend, name),
        VolumeChange::DiskFormat(format) => {
            words("disk_format", record.disk_format.map_or("", Format::word), format.word())
        }
        VolumeChange::Bootable(value) => words("bootable", u8::from(record.bootable), u8::from(*value)),
        VolumeChange::Multiattach(value) => words("multiattach", u8::from(record.multiattach), u8::from(*value)),
        VolumeChange::CreatedFrom(origin) => {
            words("created_from", record.created_from.as_ref().map_or_else(String::new, Origin::to_string), origin)
        }
        VolumeChange::Attach { instance, device } => {
            words("attach", "", format!("{instance} {}", device.as_deref().unwrap_or_default()).trim_end())
        }
        VolumeChange::Detach(instance) => words("detach", instance.map(|id| id.to_string()).unwrap_or_default(), ""),
        VolumeChange::LocalAttach(value) => words("local_attach", u8::from(record.local.is_some()), u8::from(*value)),
        VolumeChange::RenewLocalDevice => words("local_attach", "1", "1"),
        VolumeChange::TakeSnapshot(name) => words("snapshots", "", name),
        VolumeChange::DeleteSnapshot(name) => words("snapshots", name, ""),
        VolumeChange::Offer { transfer, .. } => words("transfer", "", transfer),
        VolumeChange::Unmanage => words("unmanage", "", "1"),
        VolumeChange::Restore => words("state", record.state().word(), "restored"),
        VolumeChange::ExpiresAt(at) => expires_at(record.bin.as_ref(), *at),
    }
}

/// Writes an attribute that is nothing but a record.
fn record(
    volume: &mut Volume,
    judge: &mut Judge<'_, '_>,
    caller: &Caller,
    change: &VolumeChange,
) -> Result<(), Reason> {
    let role = caller.role(&volume.record.ownership);
    let record = &mut volume.record;
    match change {
        VolumeChange::Name(name) => record.name.clone_from(name),
        VolumeChange::Description(text) => record.description.clone_from(text),
        VolumeChange::Locked(true) => {
            let reason = record.protection.lock.take().map(|lock| lock.reason).unwrap_or_default();
            let level = if role.is_administrator() { Level::Admin } else { Level::Owner };
            record.protection.lock = Some(Lock { by: caller.login.clone(), at: judge.now, level, reason });
        }
        VolumeChange::Locked(false) => record.protection.lock = None,
        VolumeChange::LockedReason(text) => {
            if let Some(lock) = &mut record.protection.lock {
                lock.reason.clone_from(text);
            }
        }
        VolumeChange::DeleteProtection(value) => record.protection.disable_terminate = *value,
        VolumeChange::Owner(uid) => hand_over(&mut record.ownership, |ownership| ownership.owner = *uid),
        VolumeChange::Project(gid) => hand_over(&mut record.ownership, |ownership| ownership.project = *gid),
        VolumeChange::SizeBytes(bytes) => record.size_bytes = *bytes,
        VolumeChange::Backend(name) => {
            judge.shared.backend(name)?;
            record.backend.clone_from(name);
        }
        VolumeChange::DiskFormat(format) => record.disk_format = Some(*format),
        VolumeChange::Bootable(value) => record.bootable = *value,
        VolumeChange::Multiattach(value) => record.multiattach = *value,
        VolumeChange::CreatedFrom(origin) => record.created_from = Some(origin.clone()),
        VolumeChange::ExpiresAt(at) => {
            if let Some(entry) = &mut record.bin {
                entry.expiry = at.map(|at| bin::expiry(judge.shared, judge.now, at));
            }
        }
        VolumeChange::State(volume::Word::State(volume::State::SoftDeleted)) => {
            record.bin = Some(bin::entry(judge.shared, caller, judge.now));
        }
        VolumeChange::State(volume::Word::State(_)) | VolumeChange::Restore => record.bin = None,
        VolumeChange::Offer { transfer: id, name, recipient } => {
            return transfer::offer(judge, caller, volume, *id, name, *recipient);
        }
        // These are operations, or the end of the record.
        VolumeChange::State(volume::Word::Deleted)
        | VolumeChange::Attach { .. }
        | VolumeChange::Detach(_)
        | VolumeChange::LocalAttach(_)
        | VolumeChange::RenewLocalDevice
        | VolumeChange::TakeSnapshot(_)
        | VolumeChange::DeleteSnapshot(_)
        | VolumeChange::Unmanage => {}
    }
    Ok(())
}

/// Ends the claim of an operation on a volume, and on the instance that it owned beside it. `line` says how it failed.
pub(super) fn release(batch: &mut Batch<'_>, volume: Arc<Volume>, operation: Uuid, now: u64, line: Option<ErrorLine>) {
    let mut volume = (*volume).clone();
    if volume.record.operation == Some(operation) {
        volume.record.operation = None;
        volume.task = None;
    }
    volume.record.updated_at = now;
    match line {
        Some(line) => {
            volume.record.errors.push(line);
            // Only one operation at a time takes one, and this one has failed.
            volume.record.snapshots.retain(|snapshot| snapshot.data.is_some());
        }
        None => volume.record.errors.current = false,
    }
    batch.put(Object::Volume(Arc::new(volume)));
    let instance = batch.task(operation).and_then(|task| batch.instance(task.record.instance?));
    if let Some(instance) = instance.filter(|instance| instance.record.operation == Some(operation)) {
        let mut instance = (*instance).clone();
        instance.record.operation = None;
        instance.task = None;
        batch.put(Object::Instance(Arc::new(instance)));
    }
}

/// Does an operation on a volume.
pub(super) fn perform(run: &Run, operation: &VolumeOperation) -> Result<Ending, Halt> {
    match operation {
        VolumeOperation::Create => create::create(run),
        VolumeOperation::Extend { size_bytes } => extend::extend(run, *size_bytes),
        VolumeOperation::Attach { instance, device } => attach::attach(run, *instance, device.as_deref()),
        VolumeOperation::Detach { instance } => detach::detach(run, *instance),
        VolumeOperation::AttachLocally => local::attach(run),
        VolumeOperation::DetachLocally => local::detach(run),
        VolumeOperation::TakeSnapshot { name } => snapshot::take(run, name),
        VolumeOperation::DeleteSnapshot { name } => snapshot::delete(run, name),
        VolumeOperation::Examine => examine::examine(run),
    }
}

/// Undoes what a step created. `false`: it stays, and so does everything made before it.
pub(super) fn undo(run: &Run, creation: &VolumeCreation) -> Result<bool, Halt> {
    match creation {
        VolumeCreation::Data(data) => remove::undo(run, data),
        VolumeCreation::Snapshot { data, .. } => remove::undo_snapshot(run, data).map(|()| true),
        VolumeCreation::AttachedDisk { .. } => {
            run.operation.instance().map_or(Ok(true), |instance| attach::undo(run, instance))
        }
        VolumeCreation::LocalDevice(local) => local::undo(run, local),
    }
}

/// What the record says of a creation that is undone.
pub(super) fn forget(batch: &mut Batch<'_>, object: Uuid, creation: &VolumeCreation) {
    match creation {
        VolumeCreation::Data(data) => edit(batch, object, |record| {
            if record.data.as_ref() == Some(&VolumeData::Ours(data.clone())) {
                record.data = None;
            }
        }),
        // The entry of one that did not become complete goes with the claim.
        VolumeCreation::Snapshot { .. } | VolumeCreation::AttachedDisk { .. } | VolumeCreation::LocalDevice(_) => {}
    }
}

/// Whether no definition names this data, and nobody has it open.
pub(super) fn nobody_uses(run: &Run, data: &VolumeData) -> Result<(), Halt> {
    let backend = run.shared.backend_of(data).map_err(Halt::Failed)?;
    let failed = |error| Halt::Failed(of_block(error));
    if let Some(path) = backend.source(data).path() {
        delete::nobody_uses(run, path)?;
    }
    match backend.holder(data).map_err(failed)? {
        Some(holder) => {
            Err(Halt::Failed(Reason::InUse(format!("{holder} has it open; end that first, and ask again"))))
        }
        None => Ok(()),
    }
}

/// Changes a volume's record in a batch.
pub(super) fn edit(batch: &mut Batch<'_>, id: Uuid, change: impl FnOnce(&mut VolumeRecord)) {
    if let Some(volume) = batch.volume(id) {
        let mut volume = (*volume).clone();
        change(&mut volume.record);
        batch.put(Object::Volume(Arc::new(volume)));
    }
}

/// A success that changes the volume's record.
fn ending(run: &Run, change: impl Fn(&mut VolumeRecord) + Send + Sync + 'static) -> Ending {
    let object = run.object;
    Ending::Edit(Box::new(move |batch| edit(batch, object, &change)))
}
