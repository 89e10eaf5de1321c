//! Submissions, judged one after the other against a batch that sees what the ones before changed. A change set is
//! taken as a whole or refused as a whole.

use std::collections::HashMap;
use std::sync::Arc;

use uuid::Uuid;

use super::apply::{self, Words};
use super::boot;
use super::engine::Shared;
use super::events::Entry;
use super::ledger::Batch;
use super::request::Request;
use crate::inventory::{Instance, Object, RunningTask, Task};
use crate::model::Class;
use crate::model::caller::{Caller, Ownership};
use crate::model::change::{Effect, ImageChange, InstanceChange, judge_image, judge_instance};
use crate::model::protection::Action;
use crate::model::reason::Reason;
use crate::model::record::ErrorLine;
use crate::model::task::{Operation, TaskRecord, TaskState};

/// Names that running operations will give, with the instance and the operation.
pub(super) type Names = HashMap<String, (Uuid, Uuid)>;

/// What an accepted submission waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Answer {
    /// Nothing.
    #[default]
    Now,
    /// The end of this operation.
    Operation(Uuid),
    /// The end of this operation, which was told to give up.
    Cancelled(Uuid),
    /// A look at the hypervisor.
    Look(Uuid),
}

/// What an accepted submission leads to, once its batch is stored.
#[derive(Default)]
pub(super) struct Accepted {
    pub(super) answer: Answer,
    /// Operations to run.
    pub(super) begun: Vec<Arc<Task>>,
    /// The instance whose metadata has to follow.
    pub(super) mirror: Option<Uuid>,
    pub(super) entries: Vec<Entry>,
    /// The uuid is no draft's any more.
    pub(super) forgotten: Option<Uuid>,
}

/// See the module.
pub(super) struct Judge<'a, 'b> {
    pub(super) batch: &'a mut Batch<'b>,
    pub(super) shared: &'a Shared,
    pub(super) names: &'a mut Names,
    /// Drafts by owner, counted when first asked for.
    pub(super) drafts: HashMap<u32, usize>,
    /// Unix seconds.
    pub(super) now: u64,
    /// Why the hypervisor is not reachable, if it is not.
    pub(super) unreachable: Option<String>,
}

impl Judge<'_, '_> {
    /// Judges one submission, and applies it to the batch if it is accepted.
    pub(super) fn judge(&mut self, caller: &Caller, request: &Request) -> Result<Accepted, Reason> {
        if self.shared.settings.read_only {
            return Err(Reason::ReadOnlyMount);
        }
        match request {
            Request::Instance { id, changes } => self.instance(caller, *id, changes),
            Request::Image { id, changes } => self.image(caller, *id, changes),
            Request::MakeDraft { class, id } => self.make_draft(caller, *class, *id),
            Request::DiscardUnwritten { class, id } => self.discard_unwritten(caller, *class, *id),
        }
    }

    /// Remembers a refusal with its object.
    pub(super) fn refuse(&mut self, object: Option<(Class, Uuid)>, line: ErrorLine) -> bool {
        match object.and_then(|(class, id)| self.batch.get(class, id)) {
            Some(Object::Instance(instance)) => {
                let mut instance = (*instance).clone();
                instance.record.errors.push(line);
                self.batch.show(Object::Instance(Arc::new(instance)));
                true
            }
            Some(Object::Image(image)) => {
                let mut image = (*image).clone();
                image.record.errors.push(line);
                self.batch.show(Object::Image(Arc::new(image)));
                true
            }
            Some(Object::Task(_)) | None => false,
        }
    }

    fn instance(&mut self, caller: &Caller, id: Uuid, changes: &[InstanceChange]) -> Result<Accepted, Reason> {
        let present = self.batch.instance(id).ok_or_else(|| Reason::NotFound(format!("instance {id}")))?;
        let mut instance = (*present).clone();
        let mut sorted: Vec<_> = changes.iter().collect();
        sorted.sort_by_key(|change| rank(change));
        let mut accepted = Accepted::default();
        let mut task = None;
        let mut changed = false;
        for change in sorted {
            let situation = instance.situation(caller, self.unreachable.as_deref());
            let effect = judge_instance(&situation, &instance.record, instance.name(), change)?;
            let told = apply::describe_instance(&instance, change);
            match effect {
                Effect::AlreadyTrue => continue,
                Effect::Join => {
                    accepted.answer = instance.task.as_ref().map_or(Answer::Now, |task| Answer::Operation(task.id));
                    continue;
                }
                Effect::Record => {
                    self.record_instance(&mut instance, caller, change)?;
                    changed = true;
                    if apply::is_mirrored(change) && instance.record.draft.is_none() {
                        accepted.mirror = Some(id);
                    }
                }
                Effect::Start(operation) => {
                    self.can_begin(&instance, &operation)?;
                    let begun = self.begin(caller, Class::Instance, id, instance.record.ownership, operation);
                    instance.record.operation = Some(begun.id);
                    instance.record.last_task = Some(begun.id);
                    instance.task = Some(running(&begun));
                    accepted.answer = Answer::Operation(begun.id);
                    task = Some(begun);
                    changed = true;
                }
                Effect::Reset => {
                    accepted.answer =
                        instance.task.as_ref().map_or(Answer::Look(id), |task| Answer::Cancelled(task.id));
                }
            }
            accepted.entries.push(entry(Class::Instance, id, instance.name(), caller, told));
        }
        if changed {
            instance.record.updated_at = self.now;
            instance.record.errors.current = false;
            if let Some(draft) = &mut instance.record.draft {
                draft.written = true;
            }
            if let Some(task) = task {
                let name = wanted_name(&instance, &task.record.operation).map(str::to_owned);
                if let Some(name) = name {
                    self.names.insert(name, (id, task.id));
                }
                let task = Arc::new(task);
                self.batch.put(Object::Task(task.clone()));
                accepted.begun.push(task);
            }
            self.batch.put(Object::Instance(Arc::new(instance)));
        } else if instance.record.errors.current {
            instance.record.errors.current = false;
            self.batch.show(Object::Instance(Arc::new(instance)));
        }
        Ok(accepted)
    }

    fn image(&mut self, caller: &Caller, id: Uuid, changes: &[ImageChange]) -> Result<Accepted, Reason> {
        let present = self.batch.image(id).ok_or_else(|| Reason::NotFound(format!("image {id}")))?;
        let mut image = (*present).clone();
        let mut sorted: Vec<_> = changes.iter().collect();
        sorted.sort_by_key(|change| matches!(change, ImageChange::State(_)));
        let mut accepted = Accepted::default();
        let mut task = None;
        let mut changed = false;
        for change in sorted {
            let effect = judge_image(&image.situation(caller), &image.record, change)?;
            let told = apply::describe_image(&image, change);
            match effect {
                Effect::AlreadyTrue => continue,
                Effect::Join => {
                    accepted.answer = image.task.as_ref().map_or(Answer::Now, |task| Answer::Operation(task.id));
                    continue;
                }
                Effect::Record => apply::record_image(&mut image, change)?,
                Effect::Start(operation) => {
                    let begun = self.begin(caller, Class::Image, id, image.record.ownership, operation);
                    image.record.operation = Some(begun.id);
                    image.record.last_task = Some(begun.id);
                    image.task = Some(running(&begun));
                    accepted.answer = Answer::Operation(begun.id);
                    task = Some(Arc::new(begun));
                }
                // Images have no such verb.
                Effect::Reset => continue,
            }
            changed = true;
            accepted.entries.push(entry(Class::Image, id, &image.record.name, caller, told));
        }
        if changed {
            image.record.updated_at = self.now;
            image.record.errors.current = false;
            if let Some(draft) = &mut image.record.draft {
                draft.written = true;
            }
            if let Some(task) = task {
                self.batch.put(Object::Task(task.clone()));
                accepted.begun.push(task);
            }
            self.batch.put(Object::Image(Arc::new(image)));
        } else if image.record.errors.current {
            image.record.errors.current = false;
            self.batch.show(Object::Image(Arc::new(image)));
        }
        Ok(accepted)
    }

    fn make_draft(&mut self, caller: &Caller, class: Class, id: Uuid) -> Result<Accepted, Reason> {
        if self.batch.contains(id) {
            return Err(Reason::Exists);
        }
        let limit = self.shared.settings.drafts_per_user;
        if self.count_drafts(caller.uid) >= limit {
            return Err(Reason::DraftQuota { limit });
        }
        let object = match class {
            Class::Instance => Object::Instance(Arc::new(self.instance_draft(caller, id))),
            Class::Image => Object::Image(Arc::new(self.image_draft(caller, id))),
            Class::Task => return Err(Reason::NotBuilt { what: "tasks of your own" }),
        };
        self.batch.put(object);
        *self.drafts.entry(caller.uid).or_default() += 1;
        let told = Words { what: "draft".into(), from: String::new(), to: "draft".to_owned() };
        Ok(Accepted { entries: vec![entry(class, id, &id.to_string(), caller, told)], ..Accepted::default() })
    }

    /// A draft without anything in it has nothing on any disk: its record is all there is.
    fn discard_unwritten(&mut self, caller: &Caller, class: Class, id: Uuid) -> Result<Accepted, Reason> {
        let missing = || Reason::NotFound(format!("{} {id}", class.noun()));
        let (owner, name) = match self.batch.get(class, id).ok_or_else(missing)? {
            Object::Instance(instance) => {
                let situation = instance.situation(caller, None);
                crate::model::instance::access(&situation)?;
                let record = &instance.record;
                if record.draft.is_none_or(|draft| draft.written) || !record.disks.is_empty() {
                    return Err(Reason::NotEmpty);
                }
                record.protection.check(Action::Delete, situation.role)?;
                crate::model::instance::idle(situation.task)?;
                (record.ownership.owner, instance.name().to_owned())
            }
            Object::Image(image) => {
                let situation = image.situation(caller);
                crate::model::image::access(&situation)?;
                if image.record.draft.is_none_or(|draft| draft.written) {
                    return Err(Reason::NotEmpty);
                }
                crate::model::instance::idle(situation.task)?;
                (image.record.ownership.owner, image.record.name.clone())
            }
            Object::Task(_) => return Err(Reason::NotEmpty),
        };
        self.batch.remove(class, id);
        let count = self.count_drafts(owner);
        self.drafts.insert(owner, count.saturating_sub(1));
        let told = Words { what: "draft".into(), from: "draft".to_owned(), to: "deleted".to_owned() };
        Ok(Accepted {
            entries: vec![entry(class, id, &name, caller, told)],
            forgotten: Some(id),
            ..Accepted::default()
        })
    }

    /// The drafts of a user, as this batch leaves them as far as it made and removed some.
    fn count_drafts(&mut self, uid: u32) -> usize {
        if let Some(count) = self.drafts.get(&uid) {
            return *count;
        }
        let inventory = self.shared.parts.ledger.inventory();
        let owned = |ownership: &Ownership, is_draft: bool| is_draft && ownership.owner == uid;
        let instances = inventory.instances();
        let images = inventory.images();
        let count = instances.iter().filter(|i| owned(&i.record.ownership, i.record.draft.is_some())).count()
            + images.iter().filter(|i| owned(&i.record.ownership, i.record.draft.is_some())).count();
        self.drafts.insert(uid, count);
        count
    }

    /// What the operation's first step would find out, said at once.
    fn can_begin(&self, instance: &Instance, operation: &Operation) -> Result<(), Reason> {
        match operation {
            Operation::Boot | Operation::Define => {
                let id = instance.record.image.ok_or_else(boot::no_image)?;
                let image = self.batch.image(id).ok_or_else(|| Reason::NotFound(format!("image {id}")))?;
                if image.record.draft.is_some() {
                    return Err(boot::not_active());
                }
                boot::disk_size(&instance.record, &image)?;
                self.name_is_free(&instance.record.name, instance.id)
            }
            Operation::Rename { to, .. } => self.name_is_free(to, instance.id),
            Operation::Start
            | Operation::Stop
            | Operation::Pause
            | Operation::Unpause
            | Operation::Suspend
            | Operation::Resume
            | Operation::RebootSoft
            | Operation::RebootHard
            | Operation::CommitImage
            | Operation::DiscardDraft => Ok(()),
        }
    }

    /// Names are unique among what is real and what is about to be.
    pub(super) fn name_is_free(&self, name: &str, id: Uuid) -> Result<(), Reason> {
        let holder = self.shared.parts.ledger.inventory().instance_named(name);
        let coming = self.names.get(name).map(|(instance, _)| *instance);
        match [holder, coming].into_iter().flatten().all(|other| other == id) {
            true => Ok(()),
            false => Err(Reason::NameTaken(name.to_owned())),
        }
    }

    fn begin(
        &mut self,
        caller: &Caller,
        class: Class,
        object: Uuid,
        ownership: Ownership,
        operation: Operation,
    ) -> Task {
        let record = TaskRecord {
            number: self.batch.next_number(),
            class,
            object,
            operation,
            uid: caller.uid,
            login: caller.login.clone(),
            owner: ownership.owner,
            project: ownership.project,
            state: TaskState::Pending,
            steps: Vec::new(),
            progress: 0,
            started_at: self.now,
            ended_at: None,
            message: String::new(),
            errno: 0,
        };
        Task { id: Uuid::new_v4(), record }
    }
}

/// The claim, as the object shows it.
pub(super) fn running(task: &Task) -> RunningTask {
    RunningTask { id: task.id, operation: task.record.operation.clone(), progress: task.record.progress }
}

/// The name that an operation will give to an instance.
pub(super) fn wanted_name<'a>(instance: &'a Instance, operation: &'a Operation) -> Option<&'a str> {
    match operation {
        Operation::Boot | Operation::Define => Some(&instance.record.name),
        Operation::Rename { to, .. } => Some(to),
        Operation::Start
        | Operation::Stop
        | Operation::Pause
        | Operation::Unpause
        | Operation::Suspend
        | Operation::Resume
        | Operation::RebootSoft
        | Operation::RebootHard
        | Operation::CommitImage
        | Operation::DiscardDraft => None,
    }
}

/// The order within a change set: unlocking opens the way for the rest, operations see the attributes, locking closes.
fn rank(change: &InstanceChange) -> u8 {
    match change {
        InstanceChange::Locked(false) => 0,
        InstanceChange::Description(_)
        | InstanceChange::DisableTerminate(_)
        | InstanceChange::Owner(_)
        | InstanceChange::Project(_)
        | InstanceChange::Image(_)
        | InstanceChange::Vcpus(_)
        | InstanceChange::MemoryBytes(_)
        | InstanceChange::RootDiskBytes(_)
        | InstanceChange::StopTimeoutSeconds(_)
        | InstanceChange::Metadata(..) => 1,
        InstanceChange::Name(_) => 2,
        InstanceChange::State(_)
        | InstanceChange::RebootSoft
        | InstanceChange::RebootHard
        | InstanceChange::ResetState => 3,
        InstanceChange::Locked(true) => 4,
        InstanceChange::LockedReason(_) => 5,
    }
}

fn entry(class: Class, id: Uuid, name: &str, caller: &Caller, told: Words) -> Entry {
    Entry {
        class: Some(class),
        id: Some(id),
        name: name.to_owned(),
        uid: caller.uid,
        login: caller.login.clone(),
        what: told.what.into_owned(),
        from: told.from,
        to: told.to,
        errno: String::new(),
        reason: String::new(),
    }
}
