//! The journal of an operation: each step is stored before it runs, with what it will create, and undone by that.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::ledger::Batch;
use super::operation::{Halt, RolledBack, Run, WhenFull};
use crate::block::BlockError;
use crate::hypervisor::{Domain, HypervisorError};
use crate::inventory::{Instance, Object, Task};
use crate::model::record::DiskRecord;
use crate::model::task::{Creation, Step, StepState, TaskState};

/// How often an undo that fails is tried.
pub(super) const UNDO_TRIES: u32 = 3;
pub(super) const UNDO_PAUSE: Duration = Duration::from_millis(200);

impl Run {
    /// Stores that a step begins, which says that those before it are done.
    pub(super) fn begin(&self, name: &'static str) -> Result<(), Halt> {
        self.step(name, None, |_| {})
    }

    /// Stores that a step begins that creates something. A disk is in the instance's record from here on.
    pub(super) fn begin_creating(&self, name: &'static str, creates: Creation) -> Result<(), Halt> {
        let (object, disk) = match &creates {
            Creation::Disk(disk) | Creation::DiskAgain(disk) => (self.object, Some(disk.clone())),
            Creation::Definition
            | Creation::Settings { .. }
            | Creation::ShelfCopy(_)
            | Creation::PutAway { .. }
            | Creation::Volume(_) => (self.object, None),
        };
        self.step(name, Some(creates), move |batch| {
            let (Some(instance), Some(disk)) = (batch.instance(object), &disk) else { return };
            if !instance.record.disks.contains(disk) {
                let mut instance = (*instance).clone();
                // One that is made again takes the place of the one that is gone.
                instance.record.disks.retain(|other| other.reference != disk.reference);
                instance.record.disks.push(disk.clone());
                batch.put(Object::Instance(Arc::new(instance)));
            }
        })
    }

    /// Stores that a step begins, together with another edit.
    pub(super) fn step(
        &self,
        name: &'static str,
        creates: Option<Creation>,
        with: impl Fn(&mut Batch<'_>) + Send + Sync + 'static,
    ) -> Result<(), Halt> {
        if !self.comes_now(name, creates.as_ref())? {
            return Ok(());
        }
        let id = self.id;
        let edit = move |batch: &mut Batch<'_>| {
            let Some(task) = batch.task(id) else { return };
            batch.put(Object::Task(Arc::new(begun(&task, name, creates.clone()))));
            with(batch);
        };
        self.store(Arc::new(edit), WhenFull::Fail)
    }

    /// Shows that a step begins, and stores it with whatever is stored next: for one that creates nothing and by which
    /// nothing is decided later. That the operation was asked for is stored already, and it looks before it acts when it
    /// is run again.
    pub(super) fn show_step(&self, name: &'static str) -> Result<(), Halt> {
        if !self.comes_now(name, None)? {
            return Ok(());
        }
        let id = self.id;
        let edit = move |batch: &mut Batch<'_>| {
            let Some(task) = batch.task(id) else { return };
            batch.show(Object::Task(Arc::new(begun(&task, name, None))));
        };
        self.store(Arc::new(edit), WhenFull::Fail)
    }

    /// Whether the operation may go on, and this step does not run already.
    fn comes_now(&self, name: &str, creates: Option<&Creation>) -> Result<bool, Halt> {
        self.proceed()?;
        let runs =
            |step: &Step| step.name == name && step.state == StepState::Started && step.creates.as_ref() == creates;
        Ok(!self.task()?.record.steps.iter().any(runs))
    }

    /// Whether a step was begun, in this life of the program or an earlier one, and not undone.
    pub(super) fn has_begun(&self, name: &str) -> Result<bool, Halt> {
        Ok(self.task()?.record.steps.iter().any(|step| step.name == name && step.state != StepState::Undone))
    }

    /// Undoes what this operation created, newest first, and nothing else. What cannot be undone stays recorded.
    pub(super) fn roll_back(&self) -> Result<RolledBack, Halt> {
        let steps: Vec<_> = self.task()?.record.steps.iter().rev().cloned().collect();
        for step in steps {
            if step.state == StepState::Undone {
                continue;
            }
            let undone = match &step.creates {
                None => continue,
                Some(Creation::Definition) => self.undo_definition()?,
                Some(Creation::Disk(disk)) => self.undo_disk(disk)?,
                Some(Creation::Settings { .. }) if self.has_begun(super::reconfigure::SET)? => continue,
                Some(Creation::Settings { vcpus, memory_bytes, autostart }) => {
                    self.undo_settings(*vcpus, *memory_bytes, *autostart)?
                }
                Some(Creation::ShelfCopy(_) | Creation::PutAway { .. })
                    if self.has_begun(super::shelve::SHELVED)? =>
                {
                    continue;
                }
                Some(Creation::DiskAgain(_)) if self.has_begun(super::shelve::LEFT)? => continue,
                Some(Creation::ShelfCopy(disk)) => {
                    super::copies::undo_copy(self, disk)?;
                    Undone::Yes
                }
                Some(Creation::DiskAgain(disk)) => match super::copies::undo_disk(self, disk)? {
                    true => Undone::Yes,
                    false => continue,
                },
                Some(Creation::Volume(creation)) => match super::volume::undo(self, creation)? {
                    true => Undone::Yes,
                    false => Undone::No,
                },
                Some(Creation::PutAway { autostart, was_running }) => {
                    super::shelve::undo_put_away(self, *autostart, *was_running)?;
                    Undone::Yes
                }
            };
            match undone {
                Undone::Yes => self.mark_undone(&step)?,
                Undone::No => return Ok(RolledBack::Back),
                Undone::Ran => return Ok(RolledBack::Ran),
            }
        }
        Ok(RolledBack::Back)
    }

    fn undo_definition(&self) -> Result<Undone, Halt> {
        for _ in 0..UNDO_TRIES {
            let Some(domain) = self.look()? else { return Ok(Undone::Yes) };
            if self.has_begun(super::boot::START)? && has_run(&domain) {
                return Ok(Undone::Ran);
            }
            if is_active(&domain) || self.maker()? != Some(self.id) {
                log::warn!("the definition of {} is not undone: it is in use or not ours", self.object);
                return Ok(Undone::No);
            }
            if self.is_locked() {
                log::warn!("the definition of {} is not undone: it was locked meanwhile", self.object);
                return Ok(Undone::No);
            }
            match self.hypervisor().undefine(self.object) {
                Ok(()) | Err(HypervisorError::NoDomain) => {
                    self.refresh()?;
                    return Ok(Undone::Yes);
                }
                Err(HypervisorError::Unreachable(_)) => return Err(Halt::Lost),
                Err(error) => log::warn!("the definition of {} cannot be undone: {error}", self.object),
            }
            self.shared.gate.sleep(UNDO_PAUSE, &|| false);
        }
        Ok(Undone::No)
    }

    fn undo_disk(&self, disk: &DiskRecord) -> Result<Undone, Halt> {
        // A domain of this uuid may use it, whoever defined it.
        if self.look()?.is_some() || self.is_locked() {
            // Nothing is kept where nothing was made, and the record must not name what is not there.
            if let Err(BlockError::Missing(_)) = self.shared.parts.block.open(disk) {
                return Ok(Undone::Yes);
            }
            log::warn!("the disk {} is kept: a domain may use it, or it was locked meanwhile", disk.reference);
            return Ok(Undone::No);
        }
        for _ in 0..UNDO_TRIES {
            match self.shared.parts.block.remove(disk) {
                Ok(()) => return Ok(Undone::Yes),
                Err(error) => log::warn!("the disk {} cannot be undone: {error}", disk.reference),
            }
            self.shared.gate.sleep(UNDO_PAUSE, &|| false);
        }
        Ok(Undone::No)
    }

    fn undo_settings(&self, vcpus: u32, memory_bytes: u64, autostart: bool) -> Result<Undone, Halt> {
        for _ in 0..UNDO_TRIES {
            let Some(domain) = self.look()? else { return Ok(Undone::Yes) };
            if is_active(&domain) || domain.has_managed_save || self.is_locked() {
                log::warn!("the settings of {} are not undone: it runs, or was locked meanwhile", self.object);
                return Ok(Undone::No);
            }
            let hypervisor = self.hypervisor();
            let undone = hypervisor
                .set_hardware(self.object, Some(vcpus), Some(memory_bytes))
                .and_then(|()| hypervisor.set_autostart(self.object, autostart));
            match undone {
                Ok(()) => return Ok(Undone::Yes),
                Err(HypervisorError::Unreachable(_)) => return Err(Halt::Lost),
                Err(error) => log::warn!("the settings of {} cannot be undone: {error}", self.object),
            }
            self.shared.gate.sleep(UNDO_PAUSE, &|| false);
        }
        Ok(Undone::No)
    }

    fn mark_undone(&self, undone: &Step) -> Result<(), Halt> {
        let (id, object, undone) = (self.id, self.object, undone.clone());
        let edit = move |batch: &mut Batch<'_>| {
            if let Some(task) = batch.task(id) {
                let mut task = (*task).clone();
                for step in &mut task.record.steps {
                    if step.name == undone.name {
                        step.state = StepState::Undone;
                    }
                }
                batch.put(Object::Task(Arc::new(task)));
            }
            if let Some(Creation::Volume(creation)) = &undone.creates {
                super::volume::forget(batch, object, creation);
            }
            let Some(instance) = batch.instance(object) else { return };
            match &undone.creates {
                Some(Creation::Disk(disk) | Creation::DiskAgain(disk)) => {
                    batch.put(Object::Instance(Arc::new(without_disk(&instance, disk))));
                }
                Some(Creation::Settings { vcpus, memory_bytes, .. }) => {
                    // The background may have read the definition meanwhile.
                    let mut instance = (*instance).clone();
                    instance.record.vcpus = *vcpus;
                    instance.record.memory_bytes = *memory_bytes;
                    batch.put(Object::Instance(Arc::new(instance)));
                }
                Some(
                    Creation::Definition | Creation::ShelfCopy(_) | Creation::PutAway { .. } | Creation::Volume(_),
                )
                | None => {}
            }
        };
        self.store(Arc::new(edit), WhenFull::Wait)
    }

    pub(super) fn is_locked(&self) -> bool {
        self.shared
            .parts
            .ledger
            .inventory()
            .instance(self.object)
            .is_some_and(|instance| instance.record.protection.lock.is_some())
    }

    /// The operation that made the domain's present definition, as its metadata says.
    pub(super) fn maker(&self) -> Result<Option<Uuid>, Halt> {
        match self.hypervisor().definition(self.object) {
            Ok(xml) => Ok(super::boot::maker(&xml)),
            Err(HypervisorError::NoDomain) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// A task in which a step begins, and those before it are done.
fn begun(task: &Task, name: &str, creates: Option<Creation>) -> Task {
    let mut task = task.clone();
    let record = &mut task.record;
    record.state = TaskState::Processing;
    for step in &mut record.steps {
        if step.state == StepState::Started {
            step.state = StepState::Done;
        }
    }
    let begun = Step { name: name.to_owned(), creates, state: StepState::Started };
    // One that runs again keeps its place: the order is that of the first creations.
    match record.steps.iter_mut().find(|step| step.name == name) {
        Some(step) => *step = begun,
        None => record.steps.push(begun),
    }
    task
}

enum Undone {
    Yes,
    /// It stays, and so does everything made before it.
    No,
    /// The guest has run.
    Ran,
}

/// The instance without a disk that is gone.
pub(super) fn without_disk(instance: &Instance, disk: &DiskRecord) -> Instance {
    let mut instance = instance.clone();
    instance.record.disks.retain(|other| other != disk);
    instance
}

/// Whether a guest is there.
pub(super) fn is_active(domain: &Domain) -> bool {
    domain.power.is_on()
}

/// Whether a guest is there or was there since the domain was defined.
pub(super) fn has_run(domain: &Domain) -> bool {
    is_active(domain) || !["unknown", "failed"].contains(&domain.reason.as_str())
}
