//! The wires between the program and what it works with: each call of an operation and each commit is a step with a
//! number, and something can happen at chosen steps.
//!
//! Only the threads of operations and of the engine are counted, so that a run makes the same steps each time; what the
//! background does is let through.

use std::fmt;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::thread;

use instancefs::store::power_loss::Moment;
use parking_lot::Mutex;

/// How a step fails, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The hypervisor says no.
    Refused,
    /// The hypervisor says that the domain is not in a state for it.
    WrongState,
    /// The connection breaks; the call took effect before or not.
    Lost { applied: bool },
    /// `ENOSPC`.
    NoSpace,
    /// `EDQUOT`.
    Quota,
    /// `EIO`; it took effect or not.
    Io { applied: bool },
}

/// What happens at a step.
#[derive(Clone)]
pub enum Act {
    /// The program dies there.
    Die(Moment),
    /// It fails.
    Fail(Failure),
    /// Somebody else acts after it, before the operation goes on. A commit is made to fail once, so that it does not go on
    /// before.
    Meanwhile(Arc<dyn Fn() + Send + Sync>),
}

impl fmt::Debug for Act {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Act::Die(moment) => write!(formatter, "death {moment:?}"),
            Act::Fail(failure) => write!(formatter, "{failure:?}"),
            Act::Meanwhile(_) => write!(formatter, "somebody else"),
        }
    }
}

/// Which wire a step is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Hypervisor,
    Block,
    Commit,
}

/// One step that was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    pub kind: Kind,
    pub call: &'static str,
    /// The object was marked before: see [`Wire::mark`].
    pub is_marked: bool,
}

#[derive(Default)]
struct Progress {
    steps: Vec<Step>,
    is_dead: bool,
    is_marked: bool,
    is_over: bool,
}

/// What one life of the program does, step by step.
#[derive(Default)]
pub struct Wire {
    /// Steps, counted from 1, and what happens there.
    plan: Vec<(usize, Act)>,
    progress: Mutex<Progress>,
}

/// What a wrapper is to do with a call.
pub enum Verdict {
    Pass,
    Dead,
    Act(Act),
}

impl Wire {
    pub fn new(plan: Vec<(usize, Act)>) -> Arc<Wire> {
        Arc::new(Wire { plan, progress: Mutex::default() })
    }

    /// The steps made so far.
    pub fn steps(&self) -> Vec<Step> {
        self.progress.lock().steps.clone()
    }

    /// Whether the program has died.
    pub fn is_dead(&self) -> bool {
        self.progress.lock().is_dead
    }

    /// Marks all steps that begin from now on.
    pub fn mark(&self) {
        self.progress.lock().is_marked = true;
    }

    /// Asked by the wrappers at the beginning of each call.
    pub fn step(&self, kind: Kind, call: &'static str) -> Verdict {
        let thread = thread::current();
        let is_operation = thread.name() == Some("operation");
        let is_counted = is_operation || (kind == Kind::Commit && thread.name() == Some("engine"));
        let mut progress = self.progress.lock();
        if progress.is_dead {
            if is_operation && kind != Kind::Commit {
                drop(progress);
                die();
            }
            return Verdict::Dead;
        }
        if !is_counted || progress.is_over {
            return Verdict::Pass;
        }
        let is_marked = progress.is_marked;
        progress.steps.push(Step { kind, call, is_marked });
        let number = progress.steps.len();
        match self.plan.iter().find(|(at, _)| *at == number) {
            Some((_, act)) => {
                if let Act::Die(Moment::Before) = act {
                    progress.is_dead = true;
                }
                Verdict::Act(act.clone())
            }
            None => Verdict::Pass,
        }
    }

    /// Steps are let through and not counted any more; false if the program has died before.
    pub fn ends(&self) -> bool {
        let mut progress = self.progress.lock();
        progress.is_over = true;
        !progress.is_dead
    }

    /// From now on nothing gets through any more.
    pub fn kill(&self) {
        self.progress.lock().is_dead = true;
    }
}

/// Ends a thread of an operation as the death of the program does: without a word, and without another step.
pub fn die() -> ! {
    resume_unwind(Box::new("the program is dead (a test killed it)"))
}
