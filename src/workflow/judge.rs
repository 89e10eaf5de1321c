//! Submissions, judged one after the other against a batch that sees what the ones before changed. A change set is
//! taken as a whole or refused as a whole.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use uuid::Uuid;

use super::apply::Words;
use super::draft;
use super::engine::Shared;
use super::events::Entry;
use super::ledger::Batch;
use super::orders::may_write;
use super::request::{DOCUMENT, Request};
use super::subject::Subject;
use super::{boot, define_again, delete, network};
use crate::inventory::{Flavor, Image, Instance, Object, RunningTask, Task, Volume};
use crate::model::Class;
use crate::model::caller::{Caller, NO_PROJECT, Ownership};
use crate::model::change::{Effect, InstanceChange};
use crate::model::protection::{Action, check_deletion};
use crate::model::reason::Reason;
use crate::model::record::ErrorLine;
use crate::model::sharing::may_read;
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
    /// The object is in the bin: when it expires may be another moment now.
    pub(super) in_bin: bool,
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
    pub(super) fn judge(&mut self, caller: &Caller, file: &str, request: &Request) -> Result<Accepted, Reason> {
        if self.shared.settings.read_only {
            return Err(Reason::ReadOnlyMount);
        }
        match request {
            Request::Instance { id, changes } => self.change::<Instance>(caller, file, *id, changes),
            Request::Image { id, changes } => self.change::<Image>(caller, file, *id, changes),
            Request::Flavor { id, changes } => self.change::<Flavor>(caller, file, *id, changes),
            Request::Volume { id, changes } => self.change::<Volume>(caller, file, *id, changes),
            Request::Transfer { id, change } => self.transfer(caller, *id, change),
            Request::Import { id, import } => self.import(caller, file, *id, import),
            Request::Cancel { id, class, object } => self.cancel(caller, *id, *class, *object),
            Request::MakeFlavor { id, name } => self.make_flavor(caller, *id, name),
            Request::MakeDraft { class, id } => self.make_draft(caller, *class, *id),
            Request::DiscardUnwritten { class, id } => self.discard_unwritten(caller, *class, *id),
            Request::DefineAgain { id } => self.define_again(caller, *id),
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
            Some(Object::Flavor(flavor)) => {
                let mut flavor = (*flavor).clone();
                flavor.record.errors.push(line);
                self.batch.show(Object::Flavor(Arc::new(flavor)));
                true
            }
            Some(Object::Volume(volume)) => {
                let mut volume = (*volume).clone();
                volume.record.errors.push(line);
                self.batch.show(Object::Volume(Arc::new(volume)));
                true
            }
            Some(Object::Transfer(transfer)) => {
                let mut transfer = (*transfer).clone();
                transfer.record.errors.push(line);
                self.batch.show(Object::Transfer(Arc::new(transfer)));
                true
            }
            // Of one that has begun the message tells how that went.
            Some(Object::Task(task)) if task.record.draft.is_some() => {
                let mut task = (*task).clone();
                task.record.message = line.reason;
                self.batch.show(Object::Task(Arc::new(task)));
                true
            }
            Some(Object::Task(_) | Object::Backend(_)) | None => false,
        }
    }

    fn change<S: Subject>(
        &mut self,
        caller: &Caller,
        file: &str,
        id: Uuid,
        changes: &[S::Change],
    ) -> Result<Accepted, Reason> {
        self.change_as::<S>(caller, file, id, changes, None)
    }

    /// Applies a change set as a whole, or refuses it as a whole. What it begins is begun as `order`, a user's own task,
    /// if there is one.
    pub(super) fn change_as<S: Subject>(
        &mut self,
        caller: &Caller,
        file: &str,
        id: Uuid,
        changes: &[S::Change],
        order: Option<Task>,
    ) -> Result<Accepted, Reason> {
        let missing = || Reason::NotFound(format!("{} {id}", S::CLASS.noun()));
        let mut subject = (*S::get(self.batch, id).ok_or_else(missing)?).clone();
        let mut sorted: Vec<_> = changes.iter().collect();
        sorted.sort_by_key(|change| S::rank(change));
        let mut accepted = Accepted::default();
        let mut task = None;
        let mut changed = false;
        let mut removed = false;
        // All that is wrong with a document is said at once.
        let mut refused = Vec::new();
        // Begun at the end, so that all values and what is to follow them are one operation.
        let mut planned: Option<Operation> = None;
        for change in sorted {
            let told = subject.describe(change);
            let what = told.what.clone();
            let effect = match subject.judge(self, caller, change) {
                Ok(effect) => effect,
                Err(reason) => {
                    refused.push((what, reason));
                    continue;
                }
            };
            match effect {
                Effect::AlreadyTrue => continue,
                Effect::Join => {
                    accepted.answer = subject.task().map_or(Answer::Now, |task| Answer::Operation(task.id));
                    continue;
                }
                Effect::Record => {
                    if let Err(reason) = subject.record(self, caller, change) {
                        refused.push((what, reason));
                        continue;
                    }
                    changed = true;
                    if subject.is_mirrored(change) {
                        accepted.mirror = Some(id);
                    }
                }
                Effect::Start(operation) => {
                    let begins =
                        subject.can_begin(self, caller, &operation).and_then(|()| joined(planned.as_ref(), operation));
                    match begins {
                        Ok(operation) => planned = Some(operation),
                        Err(reason) => {
                            refused.push((what, reason));
                            continue;
                        }
                    }
                }
                Effect::Reset => {
                    accepted.answer = subject.task().map_or(Answer::Look(id), |task| Answer::Cancelled(task.id));
                }
                Effect::Remove => removed = true,
            }
            accepted.entries.push(entry(S::CLASS, id, subject.name(), caller, told));
        }
        if let Some(reason) = whole(file, refused) {
            return Err(reason);
        }
        if removed {
            self.batch.remove(S::CLASS, id);
            return Ok(accepted);
        }
        if let Some(operation) = planned {
            let begun = match order {
                Some(order) => order,
                None => self.begin(caller, S::CLASS, id, subject.ownership(), operation),
            };
            subject.enter(self, caller, &begun.record.operation);
            subject.claim(running(&begun));
            self.claim_instance(&begun);
            accepted.answer = Answer::Operation(begun.id);
            task = Some(begun);
            changed = true;
        }
        let now = self.now;
        let traces = subject.traces();
        let was_refused = std::mem::take(&mut traces.errors.current);
        if changed {
            *traces.updated_at = now;
            if let Some(draft) = traces.draft {
                draft.written = true;
            }
        }
        let object = subject.object();
        if changed {
            accepted.in_bin = object.bin().is_some();
            if let Some(task) = task {
                if let Object::Instance(instance) = &object
                    && let Some(name) = wanted_name(instance, &task.record.operation)
                {
                    self.names.insert(name.to_owned(), (id, task.id));
                }
                let task = Arc::new(task);
                self.batch.put(Object::Task(task.clone()));
                accepted.begun.push(task);
            }
            self.batch.put(object);
        } else if was_refused {
            self.batch.show(object);
        }
        Ok(accepted)
    }

    /// The instance that an operation owns beside its object.
    fn claim_instance(&mut self, task: &Task) {
        let Some(instance) = task.record.instance.and_then(|id| self.batch.instance(id)) else { return };
        let mut instance = (*instance).clone();
        Subject::claim(&mut instance, running(task));
        self.batch.put(Object::Instance(Arc::new(instance)));
    }

    fn make_flavor(&mut self, caller: &Caller, id: Uuid, name: &str) -> Result<Accepted, Reason> {
        let ownership = Ownership { project: NO_PROJECT, ..self.ownership_for(caller) };
        crate::model::flavor::by_root(caller.role(&ownership))?;
        if self.batch.has_flavor_named(name) {
            return Err(Reason::Exists);
        }
        let number = self.batch.next_number();
        self.batch.put(Object::Flavor(Arc::new(draft::new_flavor(id, number, name, ownership, self.now))));
        let told = Words { what: "draft".into(), from: String::new(), to: "draft".to_owned() };
        Ok(Accepted { entries: vec![entry(Class::Flavor, id, name, caller, told)], ..Accepted::default() })
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
            Class::Task => Object::Task(Arc::new(self.task_draft(caller, id))),
            Class::Volume => Object::Volume(Arc::new(self.volume_draft(caller, id))),
            Class::Transfer => {
                return Err(Reason::Policy("an offer is made by writing to a volume's transfer".to_owned()));
            }
            Class::Backend => return Err(Reason::Policy("backends are named in the configuration".to_owned())),
            Class::Flavor => return Err(Reason::Policy("a flavor is made by its name".to_owned())),
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
                let has_disks = !record.disks.is_empty() || !record.volumes.is_empty();
                if record.draft.is_none_or(|draft| draft.written) || has_disks {
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
                check_deletion(situation.delete_protection)?;
                crate::model::instance::idle(situation.task)?;
                (image.record.ownership.owner, image.record.name.clone())
            }
            Object::Flavor(flavor) => {
                crate::model::flavor::by_root(caller.role(&flavor.record.ownership))?;
                if flavor.record.draft.is_none_or(|draft| draft.written) {
                    return Err(Reason::NotEmpty);
                }
                self.batch.remove(class, id);
                let told = Words { what: "draft".into(), from: "draft".to_owned(), to: "deleted".to_owned() };
                let entries = vec![entry(class, id, &flavor.record.name, caller, told)];
                return Ok(Accepted { entries, ..Accepted::default() });
            }
            Object::Volume(volume) => {
                let situation = volume.situation(caller, None);
                crate::model::volume::access(situation.role)?;
                if volume.record.draft.is_none_or(|draft| draft.written) || volume.record.data.is_some() {
                    return Err(Reason::NotEmpty);
                }
                situation.check(Action::Delete)?;
                crate::model::instance::idle(situation.task)?;
                (volume.record.ownership.owner, volume.record.name.clone())
            }
            Object::Transfer(_) | Object::Backend(_) => return Err(Reason::NotEmpty),
            Object::Task(task) => {
                may_write(&task, caller)?;
                if task.record.draft.is_none() {
                    return Err(Reason::NotEmpty);
                }
                (task.record.owner, String::new())
            }
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
        let volumes = inventory.volumes();
        let count = instances.iter().filter(|i| owned(&i.record.ownership, i.record.draft.is_some())).count()
            + images.iter().filter(|i| owned(&i.record.ownership, i.record.draft.is_some())).count()
            + volumes.iter().filter(|v| owned(&v.record.ownership, v.record.draft.is_some())).count()
            + inventory.tasks().iter().filter(|task| task.record.draft.is_some() && task.record.owner == uid).count();
        self.drafts.insert(uid, count);
        count
    }

    /// What the operation's first step would find out, said at once.
    pub(super) fn can_begin(&self, caller: &Caller, instance: &Instance, operation: &Operation) -> Result<(), Reason> {
        match operation {
            Operation::Boot | Operation::Define => {
                self.can_have_root(caller, instance)?;
                self.volumes_are_free(instance)?;
                network::exists(instance.record.network.as_ref(), &self.shared.parts.hypervisor.networks())?;
                self.name_is_free(&instance.record.name, instance.id)
            }
            Operation::Start | Operation::Resume | Operation::Unshelve { start: true } => {
                self.volumes_are_free(instance)?;
                network::exists(instance.record.network.as_ref(), &self.shared.parts.hypervisor.networks())
            }
            Operation::Rename { to, .. } => self.name_is_free(to, instance.id),
            Operation::Delete => delete::may_delete_instance(instance),
            Operation::DefineAgain => {
                define_again::can_be(instance)?;
                self.name_is_free(&instance.record.name, instance.id)
            }
            Operation::Stop
            | Operation::Pause
            | Operation::Unpause
            | Operation::Suspend
            | Operation::RebootSoft
            | Operation::RebootHard
            | Operation::Reconfigure { .. }
            | Operation::CommitImage
            | Operation::ImportImage
            | Operation::DiscardDraft
            | Operation::SoftDelete
            | Operation::Restore { .. }
            | Operation::Shelve { .. }
            | Operation::Offload
            | Operation::Unshelve { start: false }
            | Operation::Volume(_) => Ok(()),
        }
    }

    /// Whether a draft has something to boot from.
    fn can_have_root(&self, caller: &Caller, instance: &Instance) -> Result<(), Reason> {
        let record = &instance.record;
        if let Some(id) = boot::root_volume(record) {
            let volume = self.batch.volume(id).ok_or_else(|| Reason::NotFound(format!("volume {id}")))?;
            return boot::can_boot_from(record, &volume);
        }
        let id = record.image.ok_or_else(boot::no_image)?;
        let image = self.batch.image(id).ok_or_else(|| Reason::NotFound(format!("image {id}")))?;
        // It was checked when the image was named; the right may have been taken back since.
        if !may_read(&image.record, caller) {
            return Err(Reason::NotYours { class: Class::Image });
        }
        boot::can_make_disks(&image)?;
        boot::demands(record, &image)
    }

    /// Whether a guest may begin to write to the volumes of an instance: nothing runs on one of them, and this host has
    /// none as a block device.
    fn volumes_are_free(&self, instance: &Instance) -> Result<(), Reason> {
        for (_, entry) in instance.record.volumes.iter() {
            let Some(volume) = self.batch.volume(entry.value) else { continue };
            crate::model::instance::idle(volume.task.as_ref().map(|task| &task.operation))?;
            if volume.record.local.is_some() {
                return Err(Reason::InUse(format!(
                    "its volume {} is a block device of this host; write 0 to its local_attach first",
                    volume.id
                )));
            }
        }
        Ok(())
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

    pub(super) fn begin(
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
            instance: operation.instance(),
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
            draft: None,
            spec: None,
            is_cancelled: false,
        };
        Task { id: Uuid::new_v4(), record }
    }
}

/// The claim, as the object shows it.
pub(super) fn running(task: &Task) -> RunningTask {
    RunningTask { id: task.id, operation: task.record.operation.clone(), progress: task.record.progress }
}

/// What a change set has begun so far, and one more operation. Values are set together, and one other operation can
/// follow them; two others would own the object both.
fn joined(planned: Option<&Operation>, operation: Operation) -> Result<Operation, Reason> {
    match (planned, operation) {
        (None, operation) => Ok(operation),
        (Some(Operation::Reconfigure { change, then: None }), Operation::Reconfigure { change: later, then: None }) => {
            Ok(Operation::Reconfigure { change: change.merged(&later), then: None })
        }
        (Some(Operation::Reconfigure { change, then: None }), operation) => {
            Ok(Operation::Reconfigure { change: change.clone(), then: Some(Box::new(operation)) })
        }
        (Some(first), _) => Err(Reason::Busy { task: first.task_word().word() }),
    }
}

/// The name that an operation will give to an instance.
pub(super) fn wanted_name<'a>(instance: &'a Instance, operation: &'a Operation) -> Option<&'a str> {
    match operation {
        Operation::Boot | Operation::Define | Operation::DefineAgain => Some(&instance.record.name),
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
        | Operation::ImportImage
        | Operation::DiscardDraft
        | Operation::SoftDelete
        | Operation::Restore { .. }
        | Operation::Delete
        | Operation::Shelve { .. }
        | Operation::Offload
        | Operation::Unshelve { .. }
        | Operation::Volume(_) => None,
        Operation::Reconfigure { then, .. } => then.as_ref().and_then(|then| wanted_name(instance, then)),
    }
}

/// The order within a change set: unlocking opens the way for the rest, operations see the attributes, locking closes.
pub(super) fn rank(change: &InstanceChange) -> u8 {
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

/// The refusals of a change set as one: a document's name its keys.
fn whole(file: &str, mut refused: Vec<(Cow<'static, str>, Reason)>) -> Option<Reason> {
    if file == DOCUMENT {
        return Reason::of_document(refused.into_iter().map(|(key, reason)| (key.into_owned(), reason)).collect());
    }
    if refused.is_empty() { None } else { Some(refused.remove(0).1) }
}

pub(super) fn entry(class: Class, id: Uuid, name: &str, caller: &Caller, told: Words) -> Entry {
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
