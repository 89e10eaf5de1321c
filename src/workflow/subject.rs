//! The kinds of objects that change sets are applied to, as the judge sees them.

use std::sync::Arc;

use uuid::Uuid;

use super::apply::{self, Words};
use super::judge::Judge;
use super::ledger::Batch;
use super::{bin, delete, import};
use crate::inventory::{Flavor, Image, Instance, Object, RunningTask};
use crate::model::Class;
use crate::model::caller::{Caller, Ownership};
use crate::model::change::{Effect, ImageChange, InstanceChange, judge_image, judge_instance};
use crate::model::flavor::{self, FlavorChange};
use crate::model::instance::reachable;
use crate::model::reason::Reason;
use crate::model::record::{Draft, ErrorHistory};
use crate::model::task::Operation;

/// What every change leaves in the record.
pub(super) struct Traces<'a> {
    pub(super) updated_at: &'a mut u64,
    pub(super) errors: &'a mut ErrorHistory,
    pub(super) draft: &'a mut Option<Draft>,
}

/// One kind of objects.
pub(super) trait Subject: Clone {
    /// One attribute and its wanted value.
    type Change;
    /// The class.
    const CLASS: Class;

    /// The object as the batch leaves it.
    fn get(batch: &Batch<'_>, id: Uuid) -> Option<Arc<Self>>;
    /// As one of any kind.
    fn object(self) -> Object;
    /// For events.
    fn name(&self) -> &str;
    /// Whose it is.
    fn ownership(&self) -> Ownership;
    /// The place of a change within a change set.
    fn rank(change: &Self::Change) -> u8;
    /// Whether a change is allowed, and what it takes.
    fn judge(&self, judge: &Judge<'_, '_>, caller: &Caller, change: &Self::Change) -> Result<Effect, Reason>;
    /// Tells of a change before it is made.
    fn describe(&self, change: &Self::Change) -> Words;
    /// Writes an attribute that is nothing but a record.
    fn record(&mut self, judge: &mut Judge<'_, '_>, caller: &Caller, change: &Self::Change) -> Result<(), Reason>;
    /// What is left in the record.
    fn traces(&mut self) -> Traces<'_>;
    /// What runs on it.
    fn task(&self) -> Option<&RunningTask>;
    /// What an operation changes by being accepted.
    fn enter(&mut self, _judge: &Judge<'_, '_>, _caller: &Caller, _operation: &Operation) {}
    /// An operation owns it from now on.
    fn claim(&mut self, task: RunningTask);
    /// Whether the hypervisor's metadata tells of this attribute.
    fn is_mirrored(&self, _change: &Self::Change) -> bool {
        false
    }
    /// What the operation's first step would find out, said at once.
    fn can_begin(&self, _judge: &Judge<'_, '_>, _caller: &Caller, _operation: &Operation) -> Result<(), Reason> {
        Ok(())
    }
}

impl Subject for Instance {
    type Change = InstanceChange;
    const CLASS: Class = Class::Instance;

    fn get(batch: &Batch<'_>, id: Uuid) -> Option<Arc<Instance>> {
        batch.instance(id)
    }

    fn object(self) -> Object {
        Object::Instance(Arc::new(self))
    }

    fn name(&self) -> &str {
        Instance::name(self)
    }

    fn ownership(&self) -> Ownership {
        self.record.ownership
    }

    /// Unlocking opens the way for the rest, operations see the attributes, locking closes.
    fn rank(change: &InstanceChange) -> u8 {
        match change {
            InstanceChange::Locked(false) => 0,
            // What is written beside it deviates from it.
            InstanceChange::Flavor(_) => 1,
            InstanceChange::Description(_)
            | InstanceChange::DisableTerminate(_)
            | InstanceChange::Owner(_)
            | InstanceChange::Project(_)
            | InstanceChange::Image(_)
            | InstanceChange::UserData(_)
            | InstanceChange::Vcpus(_)
            | InstanceChange::MemoryBytes(_)
            | InstanceChange::RootDiskBytes(_)
            | InstanceChange::Network(_)
            | InstanceChange::Autostart(_)
            | InstanceChange::StopTimeoutSeconds(_)
            | InstanceChange::ExpiresAt(_)
            | InstanceChange::Metadata(..) => 2,
            InstanceChange::Name(_) => 3,
            InstanceChange::State(_)
            | InstanceChange::Restore
            | InstanceChange::SettleBin
            | InstanceChange::RebootSoft
            | InstanceChange::RebootHard
            | InstanceChange::ResetState => 4,
            InstanceChange::Locked(true) => 5,
            InstanceChange::LockedReason(_) => 6,
        }
    }

    fn judge(&self, judge: &Judge<'_, '_>, caller: &Caller, change: &InstanceChange) -> Result<Effect, Reason> {
        let situation = self.situation(caller, judge.unreachable.as_deref());
        judge_instance(&situation, &self.record, Instance::name(self), change)
    }

    fn describe(&self, change: &InstanceChange) -> Words {
        apply::describe_instance(self, change)
    }

    fn record(&mut self, judge: &mut Judge<'_, '_>, caller: &Caller, change: &InstanceChange) -> Result<(), Reason> {
        judge.record_instance(self, caller, change)
    }

    fn traces(&mut self) -> Traces<'_> {
        let record = &mut self.record;
        Traces { updated_at: &mut record.updated_at, errors: &mut record.errors, draft: &mut record.draft }
    }

    fn task(&self) -> Option<&RunningTask> {
        self.task.as_ref()
    }

    fn enter(&mut self, judge: &Judge<'_, '_>, caller: &Caller, operation: &Operation) {
        bin::enter(self, operation, || bin::entry(judge.shared, caller, judge.now));
    }

    fn claim(&mut self, task: RunningTask) {
        self.record.operation = Some(task.id);
        self.record.last_task = Some(task.id);
        self.task = Some(task);
    }

    fn is_mirrored(&self, change: &InstanceChange) -> bool {
        self.record.draft.is_none() && apply::is_mirrored(change)
    }

    fn can_begin(&self, judge: &Judge<'_, '_>, caller: &Caller, operation: &Operation) -> Result<(), Reason> {
        judge.can_begin(caller, self, operation)
    }
}

impl Subject for Image {
    type Change = ImageChange;
    const CLASS: Class = Class::Image;

    fn get(batch: &Batch<'_>, id: Uuid) -> Option<Arc<Image>> {
        batch.image(id)
    }

    fn object(self) -> Object {
        Object::Image(Arc::new(self))
    }

    fn name(&self) -> &str {
        &self.record.name
    }

    fn ownership(&self) -> Ownership {
        self.record.ownership
    }

    fn rank(change: &ImageChange) -> u8 {
        u8::from(matches!(change, ImageChange::State(_)))
    }

    fn judge(&self, _judge: &Judge<'_, '_>, caller: &Caller, change: &ImageChange) -> Result<Effect, Reason> {
        judge_image(&self.situation(caller), &self.record, change)
    }

    fn describe(&self, change: &ImageChange) -> Words {
        apply::describe_image(self, change)
    }

    fn record(&mut self, judge: &mut Judge<'_, '_>, caller: &Caller, change: &ImageChange) -> Result<(), Reason> {
        judge.record_image(self, caller, change)
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

    fn can_begin(&self, judge: &Judge<'_, '_>, _caller: &Caller, operation: &Operation) -> Result<(), Reason> {
        match (operation, &self.record.import_from) {
            (Operation::ImportImage, Some(source)) => {
                import::can_begin(source, &judge.shared.settings.import, self.data_bytes)
            }
            (Operation::Delete, _) => {
                reachable(judge.unreachable.as_deref())?;
                let file = judge.shared.image_path(self.id);
                delete::may_delete_image(judge.shared.parts.ledger.inventory(), self, &file)
            }
            (_, Some(_) | None) => Ok(()),
        }
    }
}

impl Subject for Flavor {
    type Change = FlavorChange;
    const CLASS: Class = Class::Flavor;

    fn get(batch: &Batch<'_>, id: Uuid) -> Option<Arc<Flavor>> {
        batch.flavor(id)
    }

    fn object(self) -> Object {
        Object::Flavor(Arc::new(self))
    }

    fn name(&self) -> &str {
        &self.record.name
    }

    fn ownership(&self) -> Ownership {
        self.record.ownership
    }

    fn rank(change: &FlavorChange) -> u8 {
        u8::from(matches!(change, FlavorChange::State(_)))
    }

    fn judge(&self, _judge: &Judge<'_, '_>, caller: &Caller, change: &FlavorChange) -> Result<Effect, Reason> {
        flavor::judge(&self.record, caller.role(&self.record.ownership), change)
    }

    fn describe(&self, change: &FlavorChange) -> Words {
        apply::describe_flavor(self, change)
    }

    fn record(&mut self, _judge: &mut Judge<'_, '_>, _caller: &Caller, change: &FlavorChange) -> Result<(), Reason> {
        apply::record_flavor(self, change);
        Ok(())
    }

    fn traces(&mut self) -> Traces<'_> {
        let record = &mut self.record;
        Traces { updated_at: &mut record.updated_at, errors: &mut record.errors, draft: &mut record.draft }
    }

    fn task(&self) -> Option<&RunningTask> {
        None
    }

    /// No operation ever runs on a flavor.
    fn claim(&mut self, _task: RunningTask) {}
}
