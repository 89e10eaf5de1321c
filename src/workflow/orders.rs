//! Tasks that users make themselves, and the end that users put to any.

use std::sync::Arc;

use uuid::Uuid;

use super::apply::Words;
use super::import;
use super::judge::{Accepted, Answer, Judge, entry};
use super::request::DOCUMENT;
use crate::inventory::{Image, Object, Task};
use crate::model::Class;
use crate::model::caller::{Caller, Ownership, Role};
use crate::model::change::ImageChange;
use crate::model::image::{State, Word};
use crate::model::protection::Action;
use crate::model::reason::Reason;
use crate::model::record::Draft;
use crate::model::task::{Import, Operation, TaskState};

/// Whether a task is the caller's to write.
pub(super) fn may_write(task: &Task, caller: &Caller) -> Result<(), Reason> {
    let ownership = Ownership { owner: task.record.owner, project: task.record.project, generation: 0 };
    match caller.role(&ownership) {
        Role::Root | Role::Mounter | Role::Owner | Role::Member => Ok(()),
        Role::Stranger => Err(Reason::NotYours { class: Class::Task }),
    }
}

impl Judge<'_, '_> {
    /// A task that waits for its spec.json.
    pub(super) fn task_draft(&mut self, caller: &Caller, id: Uuid) -> Task {
        let ownership = self.ownership_for(caller);
        let mut task = self.begin(caller, Class::Image, Uuid::nil(), ownership, Operation::ImportImage);
        task.id = id;
        task.record.draft = Some(Draft { written: false });
        task
    }

    /// Makes the image draft that a task is told of, and begins its import as this very task: all of it or nothing.
    pub(super) fn import(
        &mut self,
        caller: &Caller,
        file: &str,
        id: Uuid,
        import: &Import,
    ) -> Result<Accepted, Reason> {
        let task = self.batch.task(id).ok_or_else(|| Reason::NotFound(format!("task {id}")))?;
        may_write(&task, caller)?;
        if task.record.draft.is_none() {
            if task.record.spec.as_ref() == Some(&import.document) {
                return Ok(Accepted::default());
            }
            return Err(Reason::Malformed("the task has begun; make another one: mkdir tasks/$(uuidgen)".to_owned()));
        }
        // Found out again when it begins; said here of the key that is wrong.
        import::can_begin(&import.source, &self.shared.settings.import, 0)
            .map_err(|reason| Reason::Document { refused: vec![("input.import_from".to_owned(), reason)], more: 0 })?;
        let image = Uuid::new_v4();
        let ownership = Ownership { owner: task.record.owner, project: task.record.project, generation: 0 };
        let mut draft: Image = self.image_draft(caller, image);
        draft.record.ownership = ownership;
        self.batch.put(Object::Image(Arc::new(draft)));
        let mut changes = import.properties.clone();
        changes.push(ImageChange::ImportFrom(Some(import.source.clone())));
        changes.push(ImageChange::State(Word::State(State::Active)));
        let mut order = (*task).clone();
        order.record.object = image;
        order.record.uid = caller.uid;
        order.record.login.clone_from(&caller.login);
        order.record.started_at = self.now;
        order.record.message = String::new();
        order.record.draft = None;
        order.record.spec = Some(import.document.clone());
        let accepted = self.change_as::<Image>(caller, DOCUMENT, image, &changes, Some(order));
        if accepted.is_err() {
            self.batch.withdraw(Class::Image, image);
        }
        let mut accepted = accepted?;
        let told = Words { what: file.to_owned().into(), from: "draft".into(), to: "import".to_owned() };
        accepted.entries.insert(0, entry(Class::Task, id, "", caller, told));
        Ok(accepted)
    }

    /// Asks an operation to give up: it undoes what it did, or finishes if it has come too far for that. Whoever may
    /// change the object may ask.
    pub(super) fn cancel(&mut self, caller: &Caller, id: Uuid, class: Class, object: Uuid) -> Result<Accepted, Reason> {
        let task = self.batch.task(id).ok_or_else(|| Reason::NotFound(format!("task {id}")))?;
        let mut name = String::new();
        match self.batch.get(class, object) {
            Some(Object::Instance(instance)) => {
                let situation = instance.situation(caller, None);
                crate::model::instance::access(&situation)?;
                still_runs(task.record.state, task.record.draft)?;
                situation.protection.check(Action::Change, situation.role)?;
                name.push_str(instance.name());
            }
            Some(Object::Image(image)) => {
                crate::model::image::access(&image.situation(caller))?;
                still_runs(task.record.state, task.record.draft)?;
                name.push_str(&image.record.name);
            }
            Some(Object::Volume(volume)) => {
                let situation = volume.situation(caller, None);
                crate::model::volume::access(situation.role)?;
                still_runs(task.record.state, task.record.draft)?;
                situation.check(Action::Change)?;
                name.push_str(&volume.record.name);
            }
            Some(Object::Task(_) | Object::Flavor(_) | Object::Transfer(_) | Object::Backend(_)) | None => {
                may_write(&task, caller)?;
                still_runs(task.record.state, task.record.draft)?;
            }
        }
        let answer = Answer::Cancelled(id);
        if task.record.is_cancelled {
            return Ok(Accepted { answer, ..Accepted::default() });
        }
        let mut cancelled = (*task).clone();
        cancelled.record.is_cancelled = true;
        let from = cancelled.record.state.word().to_owned();
        self.batch.put(Object::Task(Arc::new(cancelled)));
        let told = Words { what: "cancel".into(), from, to: TaskState::Cancelled.word().to_owned() };
        Ok(Accepted { answer, entries: vec![entry(class, object, &name, caller, told)], ..Accepted::default() })
    }
}

fn still_runs(state: TaskState, draft: Option<Draft>) -> Result<(), Reason> {
    match (state, draft) {
        (TaskState::Pending, Some(_)) => Err(Reason::Malformed("the task has not begun; rmdir discards it".to_owned())),
        (TaskState::Pending | TaskState::Processing, _) => Ok(()),
        (TaskState::Success | TaskState::Failure | TaskState::Cancelled, _) => Err(Reason::Malformed(format!(
            "the task is over, it ended as {}; there is nothing to cancel",
            state.word()
        ))),
    }
}
