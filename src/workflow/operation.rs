//! One operation on a thread of its own: run until it ends one way or the other, then recorded as ended (see `ending`).
//!
//! Operations converge: they look before they act, so running one again from the top, after a lost connection or a
//! crash, leads to where it was going. The thread may hang in the hypervisor for ever; nobody waits for it but the claim.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::engine::{Message, Shared};
use super::ledger::Batch;
use super::{bin, boot, commit, define_again, delete, discard, import, power, reboot, reconfigure, shelve, volume};
use crate::hypervisor::{Domain, Hypervisor, HypervisorError};
use crate::inventory::{Image, Instance, Task, Volume};
use crate::model::Class;
use crate::model::reason::Reason;
use crate::model::task::{Operation, TaskState};

/// An edit of a batch that can be tried again.
pub(super) type Edit = Arc<dyn Fn(&mut Batch<'_>) + Send + Sync>;

const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LAST: Duration = Duration::from_secs(5);

/// Why an edit was not stored.
#[derive(Clone, Debug)]
pub(super) enum Fault {
    /// The disk is full; nothing changed.
    Full,
    /// Anything else; whether it is durable is not known.
    Failed(String),
    /// The engine ends.
    Stopped,
}

impl Fault {
    /// What a waiting writer hears.
    pub(super) fn reason(&self) -> Reason {
        match self {
            Fault::Full => Reason::NoSpace("the state directory".to_owned()),
            Fault::Failed(detail) => Reason::Failed(detail.clone()),
            Fault::Stopped => Reason::Failed("instancefs is ending; try again when it is back".to_owned()),
        }
    }
}

/// Why an operation did not go on.
#[derive(Debug)]
pub(super) enum Halt {
    /// It failed; what it created is to be undone.
    Failed(Reason),
    /// The connection broke: the outcome of the last call is unknown.
    Lost,
    /// Given up on request.
    Cancelled,
    /// The engine ends; everything stays as it is, for the next start.
    Stopped,
}

impl From<HypervisorError> for Halt {
    fn from(error: HypervisorError) -> Halt {
        match error {
            HypervisorError::Unreachable(_) => Halt::Lost,
            HypervisorError::NoDomain => {
                Halt::Failed(Reason::NotFound("domain of this uuid any more; it was undefined outside".to_owned()))
            }
            HypervisorError::InvalidState(words) => Halt::Failed(Reason::Malformed(words)),
            HypervisorError::Exists(words) | HypervisorError::Failed(words) => Halt::Failed(Reason::Failed(words)),
            HypervisorError::Unsupported(words) => Halt::Failed(Reason::Unsupported(words)),
        }
    }
}

/// What success changes, beside the end of the task.
pub(super) enum Ending {
    /// The instance.
    Instance(Box<dyn Fn(&mut Instance) + Send + Sync>),
    /// The image.
    Image(Box<dyn Fn(&mut Image) + Send + Sync>),
    /// Anything, of several objects.
    Edit(Box<dyn Fn(&mut Batch<'_>) + Send + Sync>),
    /// The object is gone.
    Removed,
}

/// How an operation ended.
pub(super) enum Outcome {
    Done(Ending),
    Failed(Reason),
    Cancelled,
}

/// What undoing came to.
pub(super) enum RolledBack {
    /// Nothing of the operation is left, or what is left is recorded.
    Back,
    /// The guest has run: there is no way back, and none is needed.
    Ran,
}

/// What a full disk means to an edit.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum WhenFull {
    /// The operation fails.
    Fail,
    /// It is tried again until there is space.
    Wait,
}

/// One running operation.
pub(super) struct Run {
    pub(super) shared: Arc<Shared>,
    pub(super) id: Uuid,
    pub(super) class: Class,
    pub(super) object: Uuid,
    pub(super) operation: Operation,
    pub(super) uid: u32,
    pub(super) login: String,
    /// Unix seconds.
    pub(super) started_at: u64,
    pub(super) cancel: Arc<AtomicBool>,
}

impl Run {
    /// Runs it to its end, or to the engine's.
    pub(super) fn run(&self) {
        let began = Instant::now();
        match self.outcome().and_then(|outcome| self.finish(outcome)) {
            Ok((result, state)) => {
                let word = state.word();
                let metrics = self.shared.parts.ledger.inventory().metrics();
                metrics.operation_ended(self.operation.task_word(), state, began.elapsed());
                log::info!(
                    "operation {} {} on {} {} by uid {} ({}) took {:.3} s: {word}{}",
                    self.id,
                    self.operation.task_word().word(),
                    self.class.noun(),
                    self.object,
                    self.uid,
                    self.login,
                    began.elapsed().as_secs_f64(),
                    result.as_ref().err().map(|reason| format!(" ({reason})")).unwrap_or_default()
                );
                self.shared.tell(Message::Ended { id: self.id, result, cancelled: state == TaskState::Cancelled });
            }
            Err(halt) => log::info!(
                "operation {} {} on {} {} is left for the next start ({halt:?})",
                self.id,
                self.operation.task_word().word(),
                self.class.noun(),
                self.object
            ),
        }
    }

    fn outcome(&self) -> Result<Outcome, Halt> {
        loop {
            let outcome = match self.attempt() {
                Ok(ending) => return Ok(Outcome::Done(ending)),
                Err(Halt::Lost) => {
                    self.wait_for_connection()?;
                    continue;
                }
                Err(Halt::Failed(reason)) => Outcome::Failed(reason),
                Err(Halt::Cancelled) => Outcome::Cancelled,
                Err(Halt::Stopped) => return Err(Halt::Stopped),
            };
            let mut retry = RETRY_FIRST;
            loop {
                match self.roll_back() {
                    Ok(RolledBack::Back) => {
                        if self.class == Class::Instance {
                            // Best shown as it is; without a connection it is shown when that is back.
                            let _shown_later = self.refresh();
                        }
                        return Ok(outcome);
                    }
                    Ok(RolledBack::Ran) => return Ok(Outcome::Done(boot::ran(self)?)),
                    Err(Halt::Lost) => self.wait_for_connection()?,
                    // Not known what is there, so neither undone nor given up: both could lose something.
                    Err(Halt::Failed(reason)) => {
                        log::error!("operation {} cannot be undone yet: {reason}; trying again", self.id);
                        self.shared.gate.sleep(retry, &|| false);
                        if self.shared.gate.stopping() {
                            return Err(Halt::Stopped);
                        }
                        retry = (retry * 2).min(RETRY_LAST);
                    }
                    Err(halt @ (Halt::Cancelled | Halt::Stopped)) => return Err(halt),
                }
            }
        }
    }

    fn attempt(&self) -> Result<Ending, Halt> {
        self.perform(&self.operation)
    }

    /// Does an operation, or the part of one that is an operation too.
    pub(super) fn perform(&self, operation: &Operation) -> Result<Ending, Halt> {
        match operation {
            Operation::Boot => boot::boot(self, boot::Then::Start),
            Operation::Define => boot::boot(self, boot::Then::StayOff),
            Operation::Start => power::start(self),
            Operation::Stop => power::stop(self),
            Operation::Pause => power::pause(self),
            Operation::Unpause => power::unpause(self),
            Operation::Suspend => power::suspend(self),
            Operation::Resume => power::resume(self),
            Operation::RebootSoft => reboot::soft(self),
            Operation::RebootHard => reboot::hard(self),
            Operation::Rename { to, .. } => power::rename(self, to),
            Operation::Reconfigure { change, then } => reconfigure::reconfigure(self, change, then.as_deref()),
            Operation::CommitImage => commit::commit(self),
            Operation::ImportImage => import::import_image(self),
            Operation::DiscardDraft => discard::discard(self),
            Operation::SoftDelete => bin::soft_delete(self),
            Operation::Restore { state } => bin::restore(self, *state),
            Operation::Delete => delete::delete(self),
            Operation::Shelve { offload } => shelve::shelve(self, *offload),
            Operation::Offload => shelve::offload(self),
            Operation::Unshelve { start } => shelve::unshelve(self, *start),
            Operation::DefineAgain => define_again::define_again(self),
            Operation::Volume(operation) => volume::perform(self, operation),
        }
    }

    /// The hypervisor. Called only on this thread, and never with a lock held.
    pub(super) fn hypervisor(&self) -> &dyn Hypervisor {
        &*self.shared.parts.hypervisor
    }

    /// What the hypervisor says of the instance's domain now.
    pub(super) fn look(&self) -> Result<Option<Domain>, Halt> {
        Ok(self.hypervisor().domain(self.object)?)
    }

    /// Shows what the hypervisor says now.
    pub(super) fn refresh(&self) -> Result<(), Halt> {
        match self.shared.parts.reconciler.refresh(self.object) {
            Ok(()) => Ok(()),
            Err(HypervisorError::Unreachable(_)) => Err(Halt::Lost),
            // What was done is done; it is shown with the next pass.
            Err(
                error @ (HypervisorError::NoDomain
                | HypervisorError::InvalidState(_)
                | HypervisorError::Exists(_)
                | HypervisorError::Unsupported(_)
                | HypervisorError::Failed(_)),
            ) => {
                log::warn!("{} is not shown as it is now: {error}", self.object);
                Ok(())
            }
        }
    }

    /// The instance as it is now.
    pub(super) fn instance(&self) -> Result<Arc<Instance>, Halt> {
        let instance = self.shared.parts.ledger.inventory().instance(self.object);
        instance.ok_or_else(|| Halt::Failed(Reason::NotFound(format!("instance {}", self.object))))
    }

    /// The image as it is now.
    pub(super) fn image(&self) -> Result<Arc<Image>, Halt> {
        let image = self.shared.parts.ledger.inventory().image(self.object);
        image.ok_or_else(|| Halt::Failed(Reason::NotFound(format!("image {}", self.object))))
    }

    /// The volume as it is now.
    pub(super) fn volume(&self) -> Result<Arc<Volume>, Halt> {
        let volume = self.shared.parts.ledger.inventory().volume(self.object);
        volume.ok_or_else(|| Halt::Failed(Reason::NotFound(format!("volume {}", self.object))))
    }

    /// The task as it is now.
    pub(super) fn task(&self) -> Result<Arc<Task>, Halt> {
        let task = self.shared.parts.ledger.inventory().task(self.id);
        task.ok_or_else(|| Halt::Failed(Reason::NotFound(format!("task {}", self.id))))
    }

    /// Whether to go on.
    pub(super) fn proceed(&self) -> Result<(), Halt> {
        if self.shared.gate.stopping() {
            Err(Halt::Stopped)
        } else if self.cancel.load(Ordering::Acquire) {
            Err(Halt::Cancelled)
        } else {
            Ok(())
        }
    }

    /// A lock takes hold during an operation: asked right before each step that destroys something.
    pub(super) fn guard(&self) -> Result<(), Halt> {
        let lock = match self.class {
            Class::Volume => self.volume()?.record.protection.lock.clone(),
            Class::Instance | Class::Image | Class::Task | Class::Flavor | Class::Transfer | Class::Backend => {
                self.instance()?.record.protection.lock.clone()
            }
        };
        match lock {
            Some(lock) => Err(Halt::Failed(Reason::Locked(lock))),
            None => Ok(()),
        }
    }

    /// Waits until the hypervisor answers again. A cancelled operation waits too: what it did is unknown until then.
    fn wait_for_connection(&self) -> Result<(), Halt> {
        let mut retry = RETRY_FIRST;
        loop {
            self.shared.gate.sleep(retry, &|| false);
            if self.shared.gate.stopping() {
                return Err(Halt::Stopped);
            }
            if self.hypervisor().ping().is_ok() {
                return Ok(());
            }
            retry = (retry * 2).min(RETRY_LAST);
        }
    }

    /// Stores an edit. After an error whose outcome is unknown nothing may be undone, so it is tried until it works.
    pub(super) fn store(&self, edit: Edit, full: WhenFull) -> Result<(), Halt> {
        let mut retry = RETRY_FIRST;
        loop {
            let fault = match self.shared.edit(edit.clone()) {
                Ok(()) => return Ok(()),
                Err(Fault::Stopped) => return Err(Halt::Stopped),
                Err(fault @ Fault::Full) if full == WhenFull::Fail => return Err(Halt::Failed(fault.reason())),
                Err(fault) => fault,
            };
            log::error!("the journal of operation {} cannot be written: {}; trying again", self.id, fault.reason());
            self.shared.gate.sleep(retry, &|| false);
            if self.shared.gate.stopping() {
                return Err(Halt::Stopped);
            }
            retry = (retry * 2).min(RETRY_LAST);
        }
    }
}
