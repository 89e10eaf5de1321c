//! The engine's thread: takes submissions, judges what is queued as one batch, stores it in one transaction, answers, and
//! starts operations on threads of their own.
//!
//! Operations store their journals through the same queue, so that many of them share a commit. Nothing here waits for
//! the hypervisor.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use uuid::Uuid;

use super::engine::{Message, Shared, line, record_refusal, remember_for_caller};
use super::judge::{Accepted, Answer, Judge, Names};
use super::ledger::now;
use super::operation::{Fault, Run};
use super::request::{Completion, MOVE, Request, Submission, Wait};
use super::{power, recovery};
use crate::hypervisor::HypervisorError;
use crate::inventory::{Object, Task};
use crate::model::Class;
use crate::model::reason::Reason;
use crate::model::record::ErrorLine;
use crate::store::StoreError;

/// So many messages share one transaction.
const BATCH: usize = 1024;

/// Operations hang in the hypervisor by the hundred when it hangs: their stacks are small.
const STACK_BYTES: usize = 512 << 10;

/// How often finished tasks are looked at.
const EXPIRE_EVERY: Duration = Duration::from_secs(3600);

/// A thread that could not be made is tried again after this time.
const SPAWN_RETRY: Duration = Duration::from_secs(1);

/// A request that waits for the end of an operation.
struct Waiter {
    done: Completion,
    deadline: Instant,
    /// The operation was told to give up: that is what it waits for.
    cancels: bool,
}

struct Running {
    /// Whoever joins is answered then at the latest.
    deadline: Instant,
    waiters: Vec<Waiter>,
    cancel: Arc<AtomicBool>,
}

/// A look at the hypervisor that a request waits for.
struct Look {
    deadline: Instant,
    done: Completion,
}

/// A thread that the end waits for.
pub(super) struct Inside(Arc<Shared>);

impl Inside {
    pub(super) fn of(shared: &Arc<Shared>) -> Inside {
        shared.gate.enter();
        Inside(shared.clone())
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.gate.leave();
    }
}

/// The engine's thread.
pub(super) struct EngineThread {
    shared: Arc<Shared>,
    names: Names,
    running: HashMap<Uuid, Running>,
    looks: HashMap<Uuid, Look>,
    unspawned: Vec<Arc<Task>>,
}

/// A message whose batch is on its way.
enum Staged {
    Judged(Box<(Submission, Result<Accepted, Reason>)>),
    Edited(Sender<Result<(), Fault>>),
    Refused { object: (Class, Uuid), line: ErrorLine, reason: Reason, done: Option<Completion> },
}

impl EngineThread {
    pub(super) fn new(shared: Arc<Shared>) -> EngineThread {
        let (running, looks) = (HashMap::new(), HashMap::new());
        EngineThread { shared, names: Names::new(), running, looks, unspawned: Vec::new() }
    }

    pub(super) fn run(mut self, queue: &Receiver<Message>) {
        let mut expired = Instant::now();
        recovery::expire(&self.shared);
        let mut retried = Instant::now();
        for task in std::mem::take(&mut self.unspawned) {
            self.spawn(task);
        }
        loop {
            let mut wake = (expired + EXPIRE_EVERY).min(self.next_deadline().unwrap_or(expired + EXPIRE_EVERY));
            if !self.unspawned.is_empty() {
                wake = wake.min(retried + SPAWN_RETRY);
            }
            let mut messages = match queue.recv_deadline(wake) {
                Ok(first) => vec![first],
                Err(RecvTimeoutError::Timeout) => Vec::new(),
                Err(RecvTimeoutError::Disconnected) => return,
            };
            messages.extend(queue.try_iter().take(BATCH));
            let ends = self.shared.gate.stopping();
            if ends {
                messages.extend(queue.try_iter());
            }
            if self.take(messages, ends) {
                return;
            }
            self.answer_late();
            if expired.elapsed() >= EXPIRE_EVERY {
                expired = Instant::now();
                recovery::expire(&self.shared);
            }
            if retried.elapsed() >= SPAWN_RETRY {
                retried = Instant::now();
                for task in std::mem::take(&mut self.unspawned) {
                    self.spawn(task);
                }
            }
        }
    }

    /// Works off what was queued; true at the end.
    fn take(&mut self, messages: Vec<Message>, ends: bool) -> bool {
        let mut stops = false;
        let mut work = Vec::new();
        for message in messages {
            match message {
                Message::Submit(_) | Message::Edit { .. } | Message::Refused { .. } if !ends => work.push(message),
                Message::Submit(submission) => (submission.done)(Err(Fault::Stopped.reason())),
                Message::Edit { done, .. } => drop(done.send(Err(Fault::Stopped))),
                Message::Refused { reason, done, .. } => answer_refused(done, reason),
                Message::Ended { id, result, cancelled } => {
                    // What came before in the queue is judged first, while the operation still counts as running.
                    self.batch(std::mem::take(&mut work));
                    self.ended(id, &result, cancelled);
                }
                Message::Looked { id, result } => {
                    if let Some(look) = self.looks.remove(&id) {
                        (look.done)(result);
                    }
                }
                // Whoever asked may have gone away.
                Message::Pulse(done) => drop(done.send(())),
                Message::Expire => recovery::expire(&self.shared),
                Message::Stop => stops = true,
            }
        }
        self.batch(work);
        stops
    }

    fn batch(&mut self, messages: Vec<Message>) {
        if messages.is_empty() {
            return;
        }
        let names_before = self.names.clone();
        let mut staged = Vec::with_capacity(messages.len());
        let shared = self.shared.clone();
        let unreachable = shared.parts.ledger.inventory().health().hypervisor.unreachable().map(str::to_owned);
        let stored = shared.parts.ledger.transact(|batch| {
            let mut judge = Judge {
                batch,
                shared: &shared,
                names: &mut self.names,
                drafts: HashMap::new(),
                now: shared.settings.clock.now(),
                unreachable,
            };
            for message in messages {
                match message {
                    Message::Submit(submission) => {
                        let mut verdict = judge.judge(&submission.caller, &submission.file, &submission.request);
                        if submission.file == MOVE {
                            verdict = verdict.map_err(Reason::of_move);
                        }
                        if let Err(reason) = &verdict {
                            let line = line(&submission.caller, &submission.file, reason);
                            judge.refuse(submission.request.object(), line);
                        }
                        staged.push(Staged::Judged(Box::new((submission, verdict))));
                    }
                    Message::Edit { edit, done } => {
                        edit(judge.batch);
                        staged.push(Staged::Edited(done));
                    }
                    Message::Refused { caller, object, file, reason, done } => {
                        let line = line(&caller, &file, &reason);
                        judge.refuse(Some(object), line.clone());
                        staged.push(Staged::Refused { object, line, reason, done });
                    }
                    Message::Ended { .. }
                    | Message::Looked { .. }
                    | Message::Pulse(_)
                    | Message::Expire
                    | Message::Stop => {}
                }
            }
        });
        match stored {
            Ok(()) => self.stored(staged),
            Err(error) => {
                self.names = names_before;
                self.not_stored(staged, &error);
            }
        }
    }

    fn stored(&mut self, staged: Vec<Staged>) {
        for member in staged {
            match member {
                Staged::Edited(done) => drop(done.send(Ok(()))),
                Staged::Refused { done, reason, .. } => answer_refused(done, reason),
                Staged::Judged(judged) => match *judged {
                    (submission, Ok(accepted)) => self.accepted(submission, accepted),
                    (submission, Err(reason)) => self.refused(submission, reason),
                },
            }
        }
    }

    fn not_stored(&mut self, staged: Vec<Staged>, error: &StoreError) {
        log::error!("a batch of {} changes was not stored: {error}", staged.len());
        let fault = match error {
            StoreError::Full => Fault::Full,
            StoreError::Conflict { .. }
            | StoreError::TooNew { .. }
            | StoreError::Foreign { .. }
            | StoreError::Failed(_) => Fault::Failed(error.to_string()),
        };
        // What the batch would have shown went with it.
        let (mut lines, mut refused, mut answers) = (Vec::new(), Vec::new(), Vec::new());
        for member in staged {
            match member {
                Staged::Edited(done) => drop(done.send(Err(fault.clone()))),
                Staged::Refused { object, line, reason, done } => {
                    lines.push((Some(object), line));
                    answers.push((done, reason));
                }
                Staged::Judged(judged) => {
                    let (submission, verdict) = *judged;
                    let reason = verdict.err().unwrap_or_else(|| fault.reason());
                    let line = line(&submission.caller, &submission.file, &reason);
                    lines.push((submission.request.object(), line));
                    refused.push((submission, reason));
                }
            }
        }
        let shared = self.shared.clone();
        let shown = shared.parts.ledger.transact(|batch| {
            let mut judge = Judge {
                batch,
                shared: &shared,
                names: &mut self.names,
                drafts: HashMap::new(),
                now: shared.settings.clock.now(),
                unreachable: None,
            };
            for (object, line) in lines {
                judge.refuse(object, line);
            }
        });
        if let Err(error) = shown {
            log::error!("refusals are not shown: {error}");
        }
        for (done, reason) in answers {
            answer_refused(done, reason);
        }
        for (submission, reason) in refused {
            self.refused(submission, reason);
        }
    }

    /// A refusal that its object, if it has one, shows already.
    fn refused(&self, submission: Submission, reason: Reason) {
        let Submission { caller, file, request, done, .. } = submission;
        let object =
            request.object().filter(|(class, id)| self.shared.parts.ledger.inventory().get(*class, *id).is_some());
        if object.is_none() {
            remember_for_caller(&self.shared, &caller, line(&caller, &file, &reason));
        }
        record_refusal(&self.shared, &caller, object, &file, &reason);
        done(Err(reason));
    }

    fn accepted(&mut self, submission: Submission, accepted: Accepted) {
        let Accepted { answer, begun, mirror, entries, forgotten, in_bin } = accepted;
        if in_bin {
            self.shared.wake_keeper(false);
        }
        for entry in entries {
            self.shared.parts.events.record(entry);
        }
        if let Some(id) = forgotten {
            self.shared.drafts.forget(id);
        }
        if let Some(id) = mirror {
            self.shared.parts.reconciler.mirror(id);
        }
        for task in begun {
            let deadline = Instant::now() + self.shared.settings.settle;
            self.enlist(&task, deadline);
            self.spawn(task);
        }
        if let Answer::Cancelled(id) = answer
            && let Some(running) = self.running.get(&id)
        {
            running.cancel.store(true, Ordering::Release);
            self.shared.gate.wake();
        }
        let waits = submission.wait == Wait::Settle;
        let submission = match submission.request {
            // Whatever comes of the operation now, it was asked to give up.
            Request::Cancel { .. } => {
                let done = submission.done;
                Submission { done: Box::new(move |_outcome| done(Ok(()))), ..submission }
            }
            Request::Instance { .. }
            | Request::Image { .. }
            | Request::Flavor { .. }
            | Request::Volume { .. }
            | Request::Transfer { .. }
            | Request::Import { .. }
            | Request::DefineAgain { .. }
            | Request::MakeFlavor { .. }
            | Request::MakeDraft { .. }
            | Request::DiscardUnwritten { .. } => submission,
        };
        let (id, cancels) = match answer {
            Answer::Now => return (submission.done)(Ok(())),
            Answer::Look(id) => return self.look(id, waits, submission.done),
            Answer::Operation(id) => (id, false),
            Answer::Cancelled(id) => (id, true),
        };
        match self.running.get_mut(&id) {
            Some(running) if waits => {
                // Giving up has a window of its own: it may take until a call returns.
                let deadline = if cancels { Instant::now() + self.shared.settings.settle } else { running.deadline };
                running.waiters.push(Waiter { done: submission.done, deadline, cancels });
            }
            Some(_) | None => (submission.done)(Ok(())),
        }
    }

    /// Asks the hypervisor again, and forgets a crash.
    fn look(&mut self, id: Uuid, waits: bool, done: Completion) {
        let key = Uuid::new_v4();
        let shared = self.shared.clone();
        let inside = Inside::of(&shared);
        let spawned = thread::Builder::new().name("look".to_owned()).stack_size(STACK_BYTES).spawn(move || {
            let _inside = inside;
            let result = match shared.parts.reconciler.refresh(id) {
                Ok(()) | Err(HypervisorError::NoDomain) => Ok(()),
                Err(HypervisorError::Unreachable(detail)) => Err(Reason::Unreachable(detail)),
                Err(error) => Err(Reason::Failed(error.to_string())),
            };
            let forgotten = shared.edit(Arc::new(move |batch| {
                if let Some(instance) = batch.instance(id)
                    && instance.task.is_none()
                {
                    let mut instance = (*instance).clone();
                    instance.record.crashed = power::acknowledged(instance.domain.as_ref());
                    instance.record.updated_at = now();
                    batch.put(Object::Instance(Arc::new(instance)));
                }
            }));
            let result = result.and(forgotten.map_err(|fault| fault.reason()));
            shared.tell(Message::Looked { id: key, result });
        });
        match spawned {
            Err(error) => done(Err(Reason::Failed(format!("no thread to look with: {error}")))),
            Ok(_) if waits => {
                let deadline = Instant::now() + self.shared.settings.settle;
                self.looks.insert(key, Look { deadline, done });
            }
            Ok(_) => done(Ok(())),
        }
    }

    /// Takes over an operation of an earlier life; its settle window is over.
    pub(super) fn adopt(&mut self, task: &Arc<Task>) {
        self.enlist(task, Instant::now());
        if let Some(instance) = self.shared.parts.ledger.inventory().instance(task.record.object)
            && let Some(name) = super::beginning::wanted_name(&instance, &task.record.operation)
        {
            self.names.insert(name.to_owned(), (instance.id, task.id));
        }
        self.unspawned.push(task.clone());
    }

    fn enlist(&mut self, task: &Task, deadline: Instant) {
        // One that was cancelled in an earlier life is still to give up.
        let cancel = Arc::new(AtomicBool::new(task.record.is_cancelled));
        self.running.insert(task.id, Running { deadline, waiters: Vec::new(), cancel });
    }

    fn spawn(&mut self, task: Arc<Task>) {
        let Some(running) = self.running.get(&task.id) else { return };
        let record = &task.record;
        let run = Run {
            shared: self.shared.clone(),
            id: task.id,
            class: record.class,
            object: record.object,
            operation: record.operation.clone(),
            uid: record.uid,
            login: record.login.clone(),
            started_at: record.started_at,
            cancel: running.cancel.clone(),
        };
        let inside = Inside::of(&self.shared);
        let spawned = thread::Builder::new().name("operation".to_owned()).stack_size(STACK_BYTES).spawn(move || {
            let _inside = inside;
            run.run();
        });
        if let Err(error) = spawned {
            log::warn!("no thread for operation {}: {error}; trying again", task.id);
            self.unspawned.push(task);
        }
    }

    fn ended(&mut self, id: Uuid, result: &Result<(), Reason>, cancelled: bool) {
        self.names.retain(|_, (_, operation)| *operation != id);
        for waiter in self.running.remove(&id).into_iter().flat_map(|running| running.waiters) {
            let gave_up = waiter.cancels && (cancelled || result.is_ok());
            (waiter.done)(if gave_up { Ok(()) } else { result.clone() });
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let waiting = self.running.values().flat_map(|running| &running.waiters);
        waiting.map(|waiter| waiter.deadline).chain(self.looks.values().map(|look| look.deadline)).min()
    }

    /// Answers those whose settle window is over: accepted and under way.
    fn answer_late(&mut self) {
        let now = Instant::now();
        for running in self.running.values_mut() {
            let (late, waiting): (Vec<_>, _) =
                std::mem::take(&mut running.waiters).into_iter().partition(|waiter| waiter.deadline <= now);
            running.waiters = waiting;
            for waiter in late {
                (waiter.done)(Ok(()));
            }
        }
        let late: Vec<_> = self.looks.iter().filter(|(_, look)| look.deadline <= now).map(|(key, _)| *key).collect();
        for look in late.iter().filter_map(|key| self.looks.remove(key)) {
            (look.done)(Ok(()));
        }
    }
}

/// Of a refusal from before the engine; it may have been answered there.
fn answer_refused(done: Option<Completion>, reason: Reason) {
    if let Some(done) = done {
        done(Err(reason));
    }
}
