//! The files of a task.

use uuid::Uuid;

use super::attribute::{Read, Row, Type, Write};
use super::order;
use super::value::one;
use crate::inventory::Task;
use crate::model::Class;
use crate::model::task::TaskChange;
use crate::workflow::recovery::KEPT_SECONDS;
use crate::workflow::request::DOCUMENT;

/// The rows; ids are fixed for ever.
pub type TaskRow = Row<Task, TaskChange>;

const fn row(id: u8, name: &'static str, kind: Type, read: fn(&Task) -> String, description: &'static str) -> TaskRow {
    Row { id, name, mode: 0o440, kind, read: Read::Value(read), write: Write::Never, description }
}

const fn place(
    id: u8,
    name: &'static str,
    read: fn(&Task) -> Option<(Class, Uuid)>,
    description: &'static str,
) -> TaskRow {
    Row { id, name, mode: 0o440, kind: Type::Text, read: Read::Place(read), write: Write::Never, description }
}

fn object(task: &Task) -> Option<(Class, Uuid)> {
    task.record.draft.is_none().then_some((task.record.class, task.record.object))
}

/// A task that something else began has none.
fn specification(task: &Task) -> Option<String> {
    match task.record.draft {
        Some(_) => Some("{}".to_owned()),
        None => task.record.spec.clone(),
    }
}

/// The table.
pub static ROWS: &[TaskRow] = &[
    row(
        1,
        "type",
        Type::Word,
        |task| match task.record.draft {
            Some(_) => String::new(),
            None => task.record.operation.task_word().word().to_owned(),
        },
        "What it does: building, stopping, ...; empty in a task of yours until it is told.",
    ),
    place(2, "object", object, "The object that it works on, as a path in this tree, wherever that stands now."),
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
    row(
        6,
        "started_at",
        Type::Time,
        |task| match task.record.draft {
            Some(_) => String::new(),
            None => task.record.started_at.to_string(),
        },
        "When it began; empty before.",
    ),
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
    row(
        9,
        "message",
        Type::Text,
        |task| task.record.message.clone(),
        "What went wrong, in one line, or that it was asked to give up too late; else empty.",
    ),
    row(10, "login", Type::User, |task| task.record.login.clone(), "Who asked for it."),
    place(
        11,
        "result",
        |task| task.record.result(),
        "What it made, as a path in this tree, once it has; empty where nothing is made.",
    ),
    TaskRow {
        read: Read::Nothing,
        write: Write::Change(|value, _| one(value).map(|()| TaskChange::Cancel)),
        mode: 0o220,
        ..row(
            12,
            "cancel",
            Type::Boolean,
            |_| String::new(),
            "1: give up. It undoes what it did and ends as cancelled; one that has come too far for that goes on to its \
             end, and message says so. For whoever may change the object, and not while that is locked.",
        )
    },
    TaskRow {
        read: Read::Sometimes(specification),
        write: Write::Json(order::parse),
        mode: 0o660,
        ..row(
            50,
            DOCUMENT,
            Type::Document("JSON"),
            |_| String::new(),
            "In a task of yours, made by mkdir tasks/$(uuidgen): what it is to do, which it begins when the document is \
             complete. {\"type\": \"import\", \"input\": {\"import_from\": URL or path, \"import_from_format\": FORMAT, \
             \"image_properties\": {\"name\": ..., \"disk_format\": ..., \"container_format\": \"bare\"}}} makes an image, \
             which may have there whatever an image's spec.json can say, and imports its data.",
        )
    },
];
