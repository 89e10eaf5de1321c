//! Submissions, judged one after the other against a batch that sees what the ones before changed. A change set is
//! taken as a whole or refused as a whole.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use uuid::Uuid;

use super::apply::Words;
use super::beginning::wanted_name;
use super::engine::Shared;
use super::events::Entry;
use super::ledger::Batch;
use super::request::{DOCUMENT, Request};
use super::subject::Subject;
use crate::inventory::{Flavor, Image, Instance, Object, RunningTask, Task, Volume};
use crate::model::Class;
use crate::model::caller::{Caller, Ownership};
use crate::model::change::Effect;
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

    /// Remembers a refusal with its object; whether it has a place for it.
    pub(super) fn refuse(&mut self, object: Option<(Class, Uuid)>, line: ErrorLine) -> bool {
        let object = match object.and_then(|(class, id)| self.batch.get(class, id)) {
            Some(Object::Instance(instance)) => refused(&*instance, line),
            Some(Object::Image(image)) => refused(&*image, line),
            Some(Object::Flavor(flavor)) => refused(&*flavor, line),
            Some(Object::Volume(volume)) => refused(&*volume, line),
            Some(Object::Transfer(transfer)) => {
                let mut transfer = (*transfer).clone();
                transfer.record.errors.push(line);
                Object::Transfer(Arc::new(transfer))
            }
            // Of one that has begun the message tells how that went.
            Some(Object::Task(task)) if task.record.draft.is_some() => {
                let mut task = (*task).clone();
                task.record.message = line.reason;
                Object::Task(Arc::new(task))
            }
            Some(Object::Task(_) | Object::Backend(_)) | None => return false,
        };
        self.batch.show(object);
        true
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

fn refused<S: Subject>(subject: &S, line: ErrorLine) -> Object {
    let mut subject = subject.clone();
    subject.traces().errors.push(line);
    subject.object()
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
