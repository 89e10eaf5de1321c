//! The end of an operation: its task, its object and the claim on that, in one transaction; and who is told of it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use uuid::Uuid;

use super::events::Entry;
use super::ledger::{Batch, now};
use super::operation::{Ending, Halt, Outcome, Run, WhenFull};
use super::{power, reconcile, volume};
use crate::inventory::{Image, Instance, Object, Task};
use crate::model::Class;
use crate::model::reason::Reason;
use crate::model::record::ErrorLine;
use crate::model::task::{Operation, StepState, TaskState};

/// The message of an operation that was asked to give up and did not.
const TOO_LATE: &str = "it was asked to give up too late: it had come so far that only the way to its end was left";

/// What is recorded of an end.
struct End {
    id: Uuid,
    class: Class,
    object: Uuid,
    state: TaskState,
    /// Why, unless it succeeded.
    reason: Option<Reason>,
    /// Of its success.
    ending: Option<Ending>,
    /// Somebody asked it to give up.
    was_asked: bool,
    login: String,
    file: &'static str,
}

impl Run {
    /// Ends the task and releases the claim, in one transaction with what it changed.
    pub(super) fn finish(&self, outcome: Outcome) -> Result<(Result<(), Reason>, TaskState), Halt> {
        let (state, reason, ending) = match outcome {
            Outcome::Done(ending) => (TaskState::Success, None, Some(ending)),
            Outcome::Failed(reason) => (TaskState::Failure, Some(reason), None),
            Outcome::Cancelled => {
                let reason = Reason::Failed("given up on request; look at state".to_owned());
                (TaskState::Cancelled, Some(reason), None)
            }
        };
        // Before it may be gone.
        let name = self.name();
        let end = End {
            id: self.id,
            class: self.class,
            object: self.object,
            state,
            reason: reason.clone(),
            ending,
            was_asked: self.cancel.load(Ordering::Acquire),
            login: self.login.clone(),
            file: file(&self.operation),
        };
        self.store(Arc::new(move |batch| end.record(batch)), WhenFull::Wait)?;
        self.tell_of_end(state);
        self.shared.parts.events.record(Entry {
            class: Some(self.class),
            id: Some(self.object),
            name,
            uid: self.uid,
            login: self.login.clone(),
            what: self.operation.task_word().word().to_owned(),
            from: TaskState::Processing.word().to_owned(),
            to: state.word().to_owned(),
            errno: reason.as_ref().map(|reason| reason.errno_name().to_owned()).unwrap_or_default(),
            reason: reason.as_ref().map(Reason::to_string).unwrap_or_default(),
        });
        Ok((reason.map_or(Ok(()), Err), state))
    }

    /// Everybody in this program who goes by what the operation changed.
    fn tell_of_end(&self, state: TaskState) {
        let succeeded = state == TaskState::Success;
        if self.class == Class::Image && succeeded {
            self.shared.drafts.forget(self.object);
        }
        if self.class == Class::Volume {
            // It may have an exporter by now.
            self.shared.exporters.look_again();
        }
        match self.operation {
            Operation::Boot | Operation::Define if succeeded => self.shared.parts.reconciler.mirror(self.object),
            Operation::DefineAgain => self.shared.parts.reconciler.mirror_anew(self.object),
            _ => {}
        }
        let instance = self.shared.parts.ledger.inventory().instance(self.object);
        if instance.is_some_and(|instance| instance.record.shelf.is_some()) {
            // What it leaves on the shelf may be due now, or at a time that was not known.
            self.shared.wake_keeper(false);
        }
    }

    fn name(&self) -> String {
        let object = self.shared.parts.ledger.inventory().get(self.class, self.object);
        object.map(|object| object.name().to_owned()).unwrap_or_default()
    }
}

impl End {
    fn record(&self, batch: &mut Batch<'_>) {
        let now = now();
        let task = batch.task(self.id);
        // Which is reset_state's; a task's `cancel` leaves it.
        let forgets_crash =
            self.state == TaskState::Cancelled && task.as_ref().is_some_and(|task| !task.record.is_cancelled);
        if let Some(task) = task {
            batch.put(Object::Task(Arc::new(self.ended(&task, now))));
        }
        if let Some(Ending::Removed) = self.ending {
            match self.class {
                Class::Instance => reconcile::forget(batch, self.object),
                class => batch.remove(class, self.object),
            }
        } else if let Some(instance) = batch.instance(self.object) {
            batch.put(Object::Instance(Arc::new(self.released_instance(&instance, now, forgets_crash))));
        } else if let Some(image) = batch.image(self.object) {
            batch.put(Object::Image(Arc::new(self.released_image(&image, now))));
        } else if let Some(volume) = batch.volume(self.object) {
            volume::release(batch, volume, self.id, now, self.line(now));
        }
        if let Some(Ending::Edit(change)) = &self.ending {
            change(batch);
        }
    }

    fn ended(&self, task: &Task, now: u64) -> Task {
        let mut task = task.clone();
        let record = &mut task.record;
        record.state = self.state;
        record.ended_at = Some(now);
        record.message = match &self.reason {
            Some(reason) => reason.to_string(),
            None if self.was_asked || record.is_cancelled => TOO_LATE.to_owned(),
            None => String::new(),
        };
        record.errno = self.reason.as_ref().map_or(0, Reason::errno);
        let succeeded = self.state == TaskState::Success;
        if succeeded {
            record.progress = 100;
        }
        for step in &mut record.steps {
            if step.state == StepState::Started && (succeeded || step.creates.is_none()) {
                step.state = if succeeded { StepState::Done } else { StepState::Undone };
            }
        }
        task
    }

    fn released_instance(&self, instance: &Instance, now: u64, forgets_crash: bool) -> Instance {
        let mut instance = instance.clone();
        if instance.record.operation == Some(self.id) {
            instance.record.operation = None;
            instance.task = None;
        }
        let line = self.line(now);
        if line.is_none() {
            instance.record.errors.current = false;
            if instance.domain.as_ref().is_some_and(|domain| domain.persistent) {
                instance.record.undefined = None;
            }
        }
        if let Some(Ending::Instance(change)) = &self.ending {
            change(&mut instance);
        }
        if forgets_crash {
            instance.record.crashed = power::acknowledged(instance.domain.as_ref());
        }
        instance.record.updated_at = now;
        if let Some(line) = line {
            instance.record.errors.push(line);
        }
        instance
    }

    fn released_image(&self, image: &Image, now: u64) -> Image {
        let mut image = image.clone();
        if image.record.operation == Some(self.id) {
            image.record.operation = None;
            image.task = None;
        }
        if let Some(Ending::Image(change)) = &self.ending {
            change(&mut image);
        }
        image.record.updated_at = now;
        match self.line(now) {
            Some(line) => image.record.errors.push(line),
            None => image.record.errors.current = false,
        }
        image
    }

    /// How it failed, for the object's errors.
    fn line(&self, now: u64) -> Option<ErrorLine> {
        self.reason.as_ref().map(|reason| ErrorLine {
            time: now,
            login: self.login.clone(),
            file: self.file.to_owned(),
            errno: reason.errno_name().to_owned(),
            reason: reason.to_string(),
        })
    }
}

/// The file whose write asks for an operation, for `last_error`.
fn file(operation: &Operation) -> &'static str {
    match operation {
        Operation::Boot
        | Operation::Define
        | Operation::Start
        | Operation::Stop
        | Operation::Pause
        | Operation::Unpause
        | Operation::Suspend
        | Operation::Resume
        | Operation::CommitImage
        | Operation::ImportImage
        | Operation::DiscardDraft
        | Operation::SoftDelete
        | Operation::Restore { .. }
        | Operation::Delete
        | Operation::Shelve { .. }
        | Operation::Offload
        | Operation::Unshelve { .. }
        | Operation::DefineAgain => "state",
        Operation::Volume(operation) => operation.file(),
        Operation::RebootSoft | Operation::RebootHard => "reboot",
        Operation::Rename { .. } => "name",
        Operation::Reconfigure { change, then: None } => change.file(),
        Operation::Reconfigure { then: Some(_), .. } => "spec.json",
    }
}
