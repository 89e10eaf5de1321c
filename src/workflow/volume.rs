//! Volumes: what a change set does to one, and the operations on them.

use std::sync::Arc;

use uuid::Uuid;

use super::apply::{Words, expires_at, hand_over, words};
use super::bin;
use super::judge::Judge;
use super::ledger::Batch;
use super::operation::{Ending, Halt, Run};
use super::subject::{Subject, Traces};
use crate::inventory::{Instance, Object, RunningTask, Volume};
use crate::model::Class;
use crate::model::caller::{Caller, Ownership};
use crate::model::change::Effect;
use crate::model::image::Format;
use crate::model::protection::{Level, Lock};
use crate::model::reason::Reason;
use crate::model::record::{Draft, ErrorLine};
use crate::model::task::Operation;
use crate::model::volume::change::{VolumeChange, judge};
use crate::model::volume::record::{Origin, VolumeRecord};
use crate::model::volume::{self, VolumeCreation, VolumeOperation};

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
        judge(&self.situation(caller, lock), change)
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

    fn can_begin(&self, judge: &Judge<'_, '_>, caller: &Caller, operation: &Operation) -> Result<(), Reason> {
        let Operation::Volume(operation) = operation else { return Ok(()) };
        match operation.instance() {
            Some(instance) => {
                let instance = judge.batch.instance(instance);
                may_claim(&*instance.ok_or_else(|| Reason::NotFound("such instance any more".to_owned()))?, caller)
            }
            None => Ok(()),
        }
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
            if judge.shared.parts.ledger.inventory().backend_named(name).is_none() {
                return Err(Reason::NotFound(format!("backend named {name:?}")));
            }
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
        VolumeChange::Offer { .. } => return Err(Reason::NotBuilt { what: "offering a volume" }),
        // These are operations, or the end of the record.
        VolumeChange::State(volume::Word::Deleted)
        | VolumeChange::Attach { .. }
        | VolumeChange::Detach(_)
        | VolumeChange::LocalAttach(_)
        | VolumeChange::TakeSnapshot(_)
        | VolumeChange::DeleteSnapshot(_)
        | VolumeChange::Unmanage => {}
    }
    Ok(())
}

impl Judge<'_, '_> {
    /// A new volume draft, numbered.
    pub(super) fn volume_draft(&mut self, caller: &Caller, id: Uuid) -> Volume {
        let backend = self.shared.parts.block.name().to_owned();
        let (number, ownership) = (self.batch.next_number(), self.ownership_for(caller));
        let record = VolumeRecord {
            draft: Some(Draft { written: false }),
            ..VolumeRecord::new(number, id.to_string(), ownership, backend, self.now)
        };
        Volume { id, record, task: None }
    }
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
        Some(line) => volume.record.errors.push(line),
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
pub(super) fn perform(_run: &Run, operation: &VolumeOperation) -> Result<Ending, Halt> {
    let what = match operation {
        VolumeOperation::Create => "making a volume",
        VolumeOperation::Extend { .. } => "making a volume larger",
        VolumeOperation::Attach { .. } => "attaching a volume",
        VolumeOperation::Detach { .. } => "detaching a volume",
        VolumeOperation::AttachLocally | VolumeOperation::DetachLocally => "local_attach",
        VolumeOperation::TakeSnapshot { .. } | VolumeOperation::DeleteSnapshot { .. } => "snapshots",
        VolumeOperation::Examine => "looking at a volume again",
    };
    Err(Halt::Failed(Reason::NotBuilt { what }))
}

/// Undoes what a step created. `false`: it stays, and so does everything made before it.
pub(super) fn undo(_run: &Run, creation: &VolumeCreation) -> Result<bool, Halt> {
    let what = match creation {
        VolumeCreation::Data(_) => "removing a volume's data",
        VolumeCreation::Snapshot { .. } => "removing a snapshot's data",
        VolumeCreation::AttachedDisk { .. } => "detaching again",
        VolumeCreation::LocalDevice(_) => "taking a local device away again",
    };
    Err(Halt::Failed(Reason::NotBuilt { what }))
}

/// Removes a volume in the bin for good, with the data that instancefs made for it.
pub(super) fn delete(_run: &Run) -> Result<Ending, Halt> {
    Err(Halt::Failed(Reason::NotBuilt { what: "deleting a volume" }))
}

/// Removes a draft, and the data that a failed creation could not take back.
pub(super) fn discard(_run: &Run) -> Result<Ending, Halt> {
    Ok(Ending::Removed)
}
