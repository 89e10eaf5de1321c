//! Domains that were undefined outside are defined again, from the definition last seen: on request, and of protected
//! ones by ourselves.
//!
//! Never where the definition lives on elsewhere, under another name or on another host: two domains would own one disk.

use std::sync::Arc;

use uuid::Uuid;

use super::judge::{Accepted, Answer, Judge, running};
use super::kept;
use super::ledger::now;
use super::operation::{Ending, Halt, Run};
use crate::hypervisor::HypervisorError;
use crate::hypervisor::definition::with_operation;
use crate::inventory::{Instance, Object};
use crate::model::caller::Caller;
use crate::model::instance::idle;
use crate::model::reason::Reason;
use crate::model::record::{Departure, ErrorLine, Undefined};
use crate::model::task::{Creation, Operation};

const DISKS: &str = "disks";
/// The step that defines it.
pub(super) const DEFINE: &str = "define";

/// Defines a domain from its definition last seen. One that runs without a definition gets it back and runs on.
pub(super) fn define_again(run: &Run) -> Result<Ending, Halt> {
    let instance = run.instance()?;
    let domain = run.look()?;
    // Whoever defined it: this operation before a crash, or somebody else.
    if !domain.as_ref().is_some_and(|domain| domain.persistent) {
        can_be(&instance).map_err(Halt::Failed)?;
        let xml = run.shared.parts.reconciler.definition(run.object).ok_or_else(|| Halt::Failed(no_definition()))?;
        let marked = with_operation(&xml, run.id).map_err(|error| Halt::Failed(Reason::Failed(error)))?;
        // A guest that runs has its disks open, wherever their names went.
        if domain.is_none() {
            run.begin(DISKS)?;
            kept::restore(run)?;
        }
        run.begin_creating(DEFINE, Creation::Definition)?;
        define(run, &instance, &marked)?;
    }
    run.refresh()?;
    Ok(defined(instance.record.undefined, run.login.clone()))
}

fn define(run: &Run, instance: &Instance, xml: &str) -> Result<(), Halt> {
    match run.hypervisor().define(xml) {
        Ok(()) => Ok(()),
        Err(HypervisorError::Unreachable(_)) => Err(Halt::Lost),
        Err(HypervisorError::Exists(_)) => Err(Halt::Failed(Reason::NameTaken(instance.record.name.clone()))),
        Err(error) => Err(error.into()),
    }
}

fn defined(undefined: Option<Undefined>, login: String) -> Ending {
    Ending::Instance(Box::new(move |instance: &mut Instance| {
        let record = &mut instance.record;
        if instance.domain.as_ref().is_some_and(|domain| !domain.power.is_on()) {
            let unknown = Undefined { at: now(), departure: Departure::Missing, had_saved_memory: false };
            record.undefined = Some(undefined.unwrap_or(unknown));
        }
        if undefined.is_some_and(|undefined| undefined.had_saved_memory) {
            record.errors.push(ErrorLine {
                time: now(),
                login: login.clone(),
                file: "state".to_owned(),
                errno: "ENOENT".to_owned(),
                reason: "its saved memory was removed together with its definition; it boots at the next start"
                    .to_owned(),
            });
        }
    }))
}

/// Whether an instance whose domain is not defined can be defined again.
pub(super) fn can_be(instance: &Instance) -> Result<(), Reason> {
    let record = &instance.record;
    match record.undefined.map(|undefined| undefined.departure) {
        Some(Departure::Moved) => Err(Reason::Policy(
            "its definition went to another name or host, which owns its disks now; if it does not, define it with \
             virsh define"
                .to_owned(),
        )),
        Some(Departure::Told | Departure::Missing) | None if record.definition.is_none() => Err(no_definition()),
        Some(Departure::Told | Departure::Missing) | None => Ok(()),
    }
}

fn no_definition() -> Reason {
    Reason::NotFound("definition of this domain was seen before it was undefined; define it with virsh".to_owned())
}

/// Whether its definition went and is to come back without anybody's asking.
pub(super) fn is_wanted(instance: &Instance) -> bool {
    let record = &instance.record;
    let was_told = record.undefined.is_some_and(|undefined| undefined.departure == Departure::Told);
    let is_defined = instance.domain.as_ref().is_some_and(|domain| domain.persistent);
    was_told && !is_defined && record.draft.is_none() && record.protection.protects()
}

impl Judge<'_, '_> {
    /// Begins to define a protected domain again.
    pub(super) fn define_again(&mut self, caller: &Caller, id: Uuid) -> Result<Accepted, Reason> {
        let instance = self.batch.instance(id).ok_or_else(|| Reason::NotFound(format!("instance {id}")))?;
        if !is_wanted(&instance) {
            return Err(Reason::Policy("it is defined, or it is not protected any more".to_owned()));
        }
        idle(instance.task.as_ref().map(|task| &task.operation))?;
        self.can_begin(caller, &instance, &Operation::DefineAgain)?;
        let mut instance = (*instance).clone();
        let class = crate::model::Class::Instance;
        let task = Arc::new(self.begin(caller, class, id, instance.record.ownership, Operation::DefineAgain));
        instance.record.operation = Some(task.id);
        instance.record.last_task = Some(task.id);
        instance.record.updated_at = self.now;
        instance.task = Some(running(&task));
        self.names.insert(instance.record.name.clone(), (id, task.id));
        self.batch.put(Object::Task(task.clone()));
        self.batch.put(Object::Instance(Arc::new(instance)));
        Ok(Accepted { answer: Answer::Operation(task.id), begun: vec![task], ..Accepted::default() })
    }
}
