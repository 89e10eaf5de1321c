//! The files of a task.

use super::attribute::{Read, Row, Type, Write};
use crate::inventory::Task;
use crate::workflow::recovery::KEPT_SECONDS;

/// A change of a task; there is none yet.
#[derive(Clone, Copy, Debug)]
pub enum TaskChange {}

/// The rows; ids are fixed for ever.
pub type TaskRow = Row<Task, TaskChange>;

const fn row(id: u8, name: &'static str, kind: Type, read: fn(&Task) -> String, description: &'static str) -> TaskRow {
    Row { id, name, mode: 0o440, kind, read: Read::Value(read), write: Write::Never, description }
}

/// The table.
pub static ROWS: &[TaskRow] = &[
    row(
        1,
        "type",
        Type::Word,
        |task| task.record.operation.task_word().word().to_owned(),
        "What it does: building, stopping, ...",
    ),
    row(
        2,
        "object",
        Type::Text,
        |task| format!("{}/{}", task.record.class.directory(), task.record.object),
        "The object that it works on, as a path in this tree.",
    ),
    row(
        3,
        "state",
        Type::Word,
        |task| task.record.state.word().to_owned(),
        "pending, processing, success, failure or cancelled.",
    ),
    row(
        4,
        "phase",
        Type::Word,
        |task| task.record.steps.last().map_or_else(String::new, |step| step.name.clone()),
        "The step under way, or the last one.",
    ),
    row(5, "progress", Type::Number("percent"), |task| task.record.progress.to_string(), "How far it is."),
    row(6, "started_at", Type::Time, |task| task.record.started_at.to_string(), "When it began."),
    row(
        7,
        "ended_at",
        Type::Time,
        |task| task.record.ended_at.map_or_else(String::new, |time| time.to_string()),
        "When it ended; empty while it runs.",
    ),
    row(
        8,
        "expires_at",
        Type::Time,
        |task| task.record.ended_at.map_or_else(String::new, |time| (time + KEPT_SECONDS).to_string()),
        "When it leaves the tree: 48 hours after its end.",
    ),
    row(9, "message", Type::Text, |task| task.record.message.clone(), "What went wrong, in one line; else empty."),
    row(10, "login", Type::User, |task| task.record.login.clone(), "Who asked for it."),
];
