//! When waiting for an object is over, and how.

use std::thread;
use std::time::Duration;

use uuid::Uuid;

use super::object::{Look, Object, WaitError};

/// A task's directory may appear a moment after the object says that it is done.
const TASK_APPEARS: Duration = Duration::from_millis(300);
const TASK_APPEARS_STEP: Duration = Duration::from_millis(10);

/// What is waited for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Goal {
    /// No task.
    Idle,
    /// This state.
    State(String),
    /// The object is gone.
    Gone,
}

/// How it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Wait on; the task's percentage where it tells.
    Pending(Option<u64>),
    /// Done.
    Reached,
    /// It will not be reached, with the reason.
    Failed(String),
}

/// Waiting for one object.
pub struct Wait {
    object: Object,
    goal: Goal,
    /// Task and state as last seen.
    task: String,
    state: String,
    /// The tasks that were waited for, in their order.
    tasks: Vec<Uuid>,
}

impl Wait {
    /// Nothing was looked at yet.
    pub fn new(object: Object, goal: Goal) -> Wait {
        Wait { object, goal, task: String::new(), state: String::new(), tasks: Vec::new() }
    }

    /// The object.
    pub fn object(&self) -> &Object {
        &self.object
    }

    /// The running task's word.
    pub fn task(&self) -> &str {
        &self.task
    }

    /// How it stands, for the time limit's message.
    pub fn describe(&self) -> String {
        match self.task.as_str() {
            "" => format!("still {}", self.state),
            task => format!("still {task} (state {})", self.state),
        }
    }

    /// Looks at the object; `fresh` opens its files anew. What is final is judged on freshly opened files only: those
    /// of an object that was moved or replaced may be out of date, and its other files are elsewhere.
    pub fn look(&mut self, fresh: bool) -> Result<Verdict, WaitError> {
        match self.judge(fresh)? {
            Verdict::Reached | Verdict::Failed(_) if !fresh => self.judge(true),
            verdict @ (Verdict::Pending(_) | Verdict::Reached | Verdict::Failed(_)) => Ok(verdict),
        }
    }

    fn judge(&mut self, fresh: bool) -> Result<Verdict, WaitError> {
        match self.object.look(fresh)? {
            Look::Present { task, state } => {
                self.task = task;
                self.state = state;
            }
            Look::Absent => return self.absent(),
        }
        if self.object.is_task() {
            return self.judge_task();
        }
        if !self.task.is_empty()
            && let Some(id) = self.object.last_task()
            && self.tasks.last() != Some(&id)
        {
            self.tasks.push(id);
        }
        match &self.goal {
            Goal::State(word) if *word == self.state => Ok(Verdict::Reached),
            Goal::Idle | Goal::State(_) | Goal::Gone if !self.task.is_empty() => self.pending(),
            Goal::Idle => self.judge_tasks(),
            Goal::State(_) | Goal::Gone => self.missed(),
        }
    }

    fn pending(&self) -> Result<Verdict, WaitError> {
        let percent = self.object.value("progress")?;
        Ok(Verdict::Pending(percent.and_then(|percent| percent.trim_end_matches('%').parse().ok())))
    }

    fn absent(&self) -> Result<Verdict, WaitError> {
        match &self.goal {
            Goal::Gone => Ok(Verdict::Reached),
            Goal::State(word) => Ok(Verdict::Failed(format!("it is gone and will not be {word}"))),
            Goal::Idle => self.judge_tasks(),
        }
    }

    /// The object is a task itself: over when its state is final.
    fn judge_task(&self) -> Result<Verdict, WaitError> {
        match (&self.goal, self.state.as_str()) {
            (Goal::State(word), state) if word == state => Ok(Verdict::Reached),
            (_, "pending" | "processing") => self.pending(),
            (Goal::Idle, "success") => Ok(Verdict::Reached),
            (Goal::Idle, state) => {
                let message = self.object.value("message")?.unwrap_or_default();
                Ok(Verdict::Failed(outcome("the task", state, &message)))
            }
            (Goal::State(_) | Goal::Gone, _) => self.missed(),
        }
    }

    /// Nothing runs any more: how did that end which we waited for, or else what ran last?
    fn judge_tasks(&self) -> Result<Verdict, WaitError> {
        let last = if self.tasks.is_empty() { self.object.last_task() } else { None };
        for &task in self.tasks.iter().chain(&last) {
            let state = self.task_state(task)?;
            if let Some(state @ ("failure" | "cancelled")) = state.as_deref() {
                let message = self.object.task_value(task, "message")?.unwrap_or_default();
                return Ok(Verdict::Failed(outcome(&format!("task {task}"), state, &message)));
            }
        }
        Ok(Verdict::Reached)
    }

    /// `None` if the task is not there any more: it ended long ago.
    fn task_state(&self, task: Uuid) -> Result<Option<String>, WaitError> {
        let mut waited = Duration::ZERO;
        loop {
            let state = self.object.task_value(task, "state")?;
            if state.is_some() || waited >= TASK_APPEARS {
                return Ok(state);
            }
            thread::sleep(TASK_APPEARS_STEP);
            waited += TASK_APPEARS_STEP;
        }
    }

    /// No task runs, and the goal is not reached.
    fn missed(&self) -> Result<Verdict, WaitError> {
        let mut reason = format!("no task runs and the state is {}", self.state);
        if let Some(error) = self.object.value("last_error")?.filter(|error| !error.is_empty() && error != "ok") {
            reason.push_str("; last error: ");
            reason.push_str(&error);
        }
        Ok(Verdict::Failed(reason))
    }
}

fn outcome(subject: &str, state: &str, message: &str) -> String {
    let verb = match state {
        "failure" => "failed",
        "cancelled" => "was cancelled",
        other => return format!("{subject} ended in the state {other}"),
    };
    if message.is_empty() { format!("{subject} {verb}") } else { format!("{subject} {verb}: {message}") }
}
