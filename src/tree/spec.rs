//! `spec.json`: what can be written, as one canonical document; and such a document as a change set.
//!
//! Both come from the rows: a file that holds a value and can be written is a key, and its value is written as the file's.

use serde_json::{Map, Value};

use super::attribute::{Row, Type, Write};
use super::json;
use super::reference::Resolver;
use super::task::{self, TaskRow};
use super::value::{escape, lines, malformed, text, unescape};
use super::{flavor, image, instance, transfer, volume};
use crate::inventory::{Flavor, Image, Instance, RunningTask, Task, Transfer, Volume};
use crate::model::change::{ImageChange, InstanceChange};
use crate::model::flavor::FlavorChange;
use crate::model::reason::Reason;
use crate::model::task::{Operation, TaskChange};
use crate::model::transfer::TransferChange;
use crate::model::volume::change::VolumeChange;

/// The key that is an order as much as a value.
const STATE: &str = "state";

/// The objects of a class, as their rows see them.
pub trait Specified: Sized + 'static {
    /// One attribute and its wanted value.
    type Change: 'static;
    /// The class's table.
    fn rows() -> &'static [Row<Self, Self::Change>];
    /// What `state` reads, or is going to: what a running operation works towards.
    fn goal(&self) -> &'static str;
}

impl Specified for Instance {
    type Change = InstanceChange;

    fn rows() -> &'static [Row<Instance, InstanceChange>] {
        instance::ROWS
    }

    fn goal(&self) -> &'static str {
        target(self.task.as_ref()).unwrap_or_else(|| self.observed().state.word())
    }
}

impl Specified for Image {
    type Change = ImageChange;

    fn rows() -> &'static [Row<Image, ImageChange>] {
        image::ROWS
    }

    fn goal(&self) -> &'static str {
        target(self.task.as_ref()).unwrap_or_else(|| self.state().word())
    }
}

impl Specified for Flavor {
    type Change = FlavorChange;

    fn rows() -> &'static [Row<Flavor, FlavorChange>] {
        flavor::ROWS
    }

    fn goal(&self) -> &'static str {
        crate::model::flavor::state(&self.record).word()
    }
}

impl Specified for Volume {
    type Change = VolumeChange;

    fn rows() -> &'static [Row<Volume, VolumeChange>] {
        volume::ROWS
    }

    fn goal(&self) -> &'static str {
        target(self.task.as_ref()).unwrap_or_else(|| self.record.state().word())
    }
}

impl Specified for Transfer {
    type Change = TransferChange;

    fn rows() -> &'static [Row<Transfer, TransferChange>] {
        transfer::ROWS
    }

    fn goal(&self) -> &'static str {
        self.record.state.word()
    }
}

impl Specified for Task {
    type Change = TaskChange;

    fn rows() -> &'static [TaskRow] {
        task::ROWS
    }

    fn goal(&self) -> &'static str {
        self.record.state.word()
    }
}

fn target(task: Option<&RunningTask>) -> Option<&'static str> {
    task.map(|task| &task.operation).and_then(Operation::target)
}

/// The document of an object: keys in alphabetical order, two spaces, a final newline, so that comparing texts compares
/// contents.
pub fn render<O: Specified>(object: &O) -> String {
    format!("{:#}\n", Value::Object(members(object)))
}

fn members<O: Specified>(object: &O) -> Map<String, Value> {
    O::rows().iter().filter_map(|row| Some((row.name.to_owned(), member(row, object)?))).collect()
}

fn member<O: Specified>(row: &Row<O, O::Change>, object: &O) -> Option<Value> {
    match &row.write {
        Write::Change(_) if row.name == STATE => Some(object.goal().into()),
        Write::Change(_) if row.is_verb() => None,
        Write::Change(_) => row.render(object).map(|text| value(row.kind, text.trim_end_matches('\n'))),
        Write::FreeKey { .. } => {
            let keys = row.keys(object).into_iter().filter_map(|key| Some((unescape(&key.name)?, key.value.into())));
            Some(Value::Object(keys.collect()))
        }
        // A document is not shown within another one.
        Write::Document(_)
        | Write::Json(_)
        | Write::Order(_)
        | Write::Never
        | Write::Spec
        | Write::Data
        | Write::Key(_) => None,
    }
}

/// A file's content in its exact type; what is empty is null.
fn value(kind: Type, text: &str) -> Value {
    match kind {
        Type::Groups => text.lines().map(Value::from).collect(),
        Type::Boolean => Value::Bool(text == "1"),
        Type::Number(_) => text.parse::<u64>().map_or(Value::Null, Value::from),
        Type::Time if text.is_empty() => Value::Null,
        // One that never comes is a word.
        Type::Time => text.parse::<u64>().map_or_else(|_| text.into(), Value::from),
        Type::Text
        | Type::Word
        | Type::Object
        | Type::User
        | Type::Group
        | Type::Document(_)
        | Type::Link
        | Type::Data
        | Type::Directory => {
            if text.is_empty() {
                Value::Null
            } else {
                text.into()
            }
        }
    }
}

/// What a document asks for. All that cannot be read in it is named at once.
pub fn changes<O: Specified>(object: &O, document: &[u8], resolver: &Resolver<'_>) -> Result<Vec<O::Change>, Reason> {
    of_members(object, json::object(document)?, resolver)
}

/// The same of a document that was read already.
pub fn of_members<O: Specified>(
    object: &O,
    document: Map<String, Value>,
    resolver: &Resolver<'_>,
) -> Result<Vec<O::Change>, Reason> {
    let present = members(object);
    let mut changes = Vec::new();
    let mut refused = Vec::new();
    for (key, value) in document {
        // What stands there already asks for nothing, whoever could not write it anew: an owner his own name, an image
        // that is gone since, root a lock that is the owner's. A state is always asked for: its operation is waited for.
        if key != STATE && present.get(&key) == Some(&value) {
            continue;
        }
        match O::rows().iter().find(|row| row.name == key).map(|row| &row.write) {
            Some(Write::FreeKey { write, remove }) => match free_keys(&key, present.get(&key), value) {
                Ok(entries) => {
                    for (name, wanted) in entries {
                        let change = match &wanted {
                            Some(value) => {
                                text(value.as_bytes()).and_then(|value| write(&escape(&name), value, resolver))
                            }
                            None => remove(&escape(&name)),
                        };
                        match change {
                            Ok(change) => changes.push(change),
                            Err(reason) => refused.push((format!("{key}/{name}"), reason)),
                        }
                    }
                }
                Err(refusal) => refused.push(refusal),
            },
            _ => match change::<O>(&key, &value, resolver) {
                Ok(change) => changes.push(change),
                Err(reason) => refused.push((key, reason)),
            },
        }
    }
    Reason::of_document(refused).map_or(Ok(changes), Err)
}

fn change<O: Specified>(key: &str, value: &Value, resolver: &Resolver<'_>) -> Result<O::Change, Reason> {
    let row = O::rows().iter().find(|row| row.name == key);
    let row = row.ok_or_else(|| malformed("there is no such key; spec.json itself shows those that there are"))?;
    match &row.write {
        Write::Change(parse) if !row.is_verb() => {
            let written = written(row.kind, value)?;
            let value = if row.kind == Type::Groups { lines(written.as_bytes()) } else { text(written.as_bytes()) };
            parse(value?, resolver)
        }
        Write::Document(parse) => match value {
            Value::Null => parse(""),
            Value::String(text) if text.len() <= super::document::LARGEST => parse(text),
            Value::String(_) => Err(Reason::TooLarge),
            Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => Err(malformed("write a string")),
        },
        Write::Change(_) | Write::Order(_) => Err(malformed("this is a verb; write it to its own file")),
        Write::Never | Write::Spec | Write::Json(_) | Write::Data | Write::Key(_) | Write::FreeKey { .. } => {
            Err(malformed("a document cannot set this"))
        }
    }
}

/// A JSON value as it would be written to the file.
fn written(kind: Type, value: &Value) -> Result<String, Reason> {
    match (kind, value) {
        (_, Value::Null) => Ok(String::new()),
        (_, Value::String(text)) => Ok(text.clone()),
        (Type::Boolean, Value::Bool(value)) => Ok(u8::from(*value).to_string()),
        (Type::Boolean | Type::Number(_) | Type::Time, Value::Number(number)) => Ok(number.to_string()),
        (Type::Groups, Value::Array(names)) => {
            let names: Option<Vec<_>> = names.iter().map(Value::as_str).collect();
            names.map(|names| names.join("\n")).ok_or_else(|| malformed("write a list of names"))
        }
        (Type::Boolean, _) => Err(malformed("write true or false")),
        (Type::Number(_) | Type::Time, _) => Err(malformed("write a number")),
        (Type::Groups, _) => Err(malformed("write a list of names")),
        (
            Type::Text
            | Type::Word
            | Type::Object
            | Type::User
            | Type::Group
            | Type::Document(_)
            | Type::Link
            | Type::Data
            | Type::Directory,
            _,
        ) => Err(malformed("write a string")),
    }
}

type Entries = Vec<(String, Option<String>)>;

/// The keys that are to change, as RFC 7396 merges: null removes, what is absent stays.
fn free_keys(key: &str, present: Option<&Value>, wanted: Value) -> Result<Entries, (String, Reason)> {
    let held = |name: &str| present.and_then(|present| present.get(name));
    let members = match wanted {
        Value::Object(members) => members,
        Value::Null => match present {
            Some(Value::Object(present)) => present.keys().map(|name| (name.clone(), Value::Null)).collect(),
            Some(_) | None => Map::new(),
        },
        Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            return Err((key.to_owned(), malformed("write an object of strings; null removes a key")));
        }
    };
    let changed = members.into_iter().filter(|(name, value)| held(name) != Some(value));
    changed
        .map(|(name, value)| match value {
            Value::String(text) => Ok((name, Some(text))),
            Value::Null => Ok((name, None)),
            Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
                Err((format!("{key}/{name}"), malformed("write a string, or null to remove it")))
            }
        })
        .collect()
}
