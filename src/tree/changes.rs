//! What a change of the inventory means for files and names.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::attribute::Row;
use super::names::Position;
use super::node::{Directory, Node};
use super::{Kind, Touched, backend, directory, fixed, flavor, image, instance, root, task, transfer, view, volume};
use crate::inventory::{Change, Instance, Inventory, Object, Task};
use crate::model::Class;

/// The files that read differently since a change, and the directories of objects in which entries came or went.
/// Symlinks and bulk data are not among them.
pub fn touched(inventory: &Inventory, change: &Change) -> Vec<Touched> {
    match change {
        Change::Object { old, new } => {
            let mut touched = object(old.as_ref(), new.as_ref());
            if let (Some(old), Some(new)) = (old, new)
                && old.bin().is_some() != new.bin().is_some()
            {
                let tasks = inventory.tasks().into_iter().filter(|task| task.record.object == new.id());
                touched.extend(tasks.flat_map(|task| naming(&task)));
            }
            touched
        }
        Change::Health => vec![file(Directory::Root, root::HEALTH)],
        Change::Events(growth) => {
            let former = growth.former.map(|first| (root::EVENTS_OLD, first));
            let files = std::iter::once((root::EVENTS, growth.current)).chain(former);
            files.map(|(id, first)| Touched { node: Node::Events(first), ..file(Directory::Root, id) }).collect()
        }
        Change::Console(instance, growth) => {
            let former = growth.former.map(|piece| (instance::FORMER_CONSOLE_LOG, piece));
            let files = std::iter::once((instance::CONSOLE_LOG, growth.current)).chain(former);
            files.filter_map(|(id, piece)| console(instance, id, piece)).collect()
        }
        Change::Moved(..) => Vec::new(),
    }
}

/// The places whose wanted name may differ since a change.
pub fn moved(inventory: &Inventory, change: &Change) -> Vec<(Class, u64, Position)> {
    let all = |class, number| Position::ALL.map(|position| (class, number, position)).to_vec();
    match change {
        Change::Object { old, new } => match new.as_ref().or(old.as_ref()) {
            Some(object) => all(object.class(), object.number()),
            None => Vec::new(),
        },
        Change::Moved(class, id) => match inventory.get(*class, *id) {
            Some(object) => all(*class, object.number()),
            None => Vec::new(),
        },
        Change::Health | Change::Events(_) | Change::Console(..) => Vec::new(),
    }
}

fn object(old: Option<&Object>, new: Option<&Object>) -> Vec<Touched> {
    let mut touched = match (old, new) {
        (Some(Object::Instance(old)), Some(Object::Instance(new))) => {
            let mut touched = rows(instance::ROWS, old.as_ref(), new.as_ref(), |row| attribute(new, row.id, row.name));
            if old.record.definition_revision != new.record.definition_revision {
                let row = instance::ROWS.iter().find(|row| row.name == "domain.xml");
                touched.extend(row.map(|row| attribute(new, row.id, row.name)));
            }
            touched
        }
        (Some(Object::Image(old)), Some(Object::Image(new))) => {
            let object = Object::Image(new.clone());
            rows(image::ROWS, old.as_ref(), new.as_ref(), |row| place(&object, row.id, row.name))
        }
        (Some(Object::Task(old)), Some(Object::Task(new))) => {
            let object = Object::Task(new.clone());
            rows(task::ROWS, old.as_ref(), new.as_ref(), |row| place(&object, row.id, row.name))
        }
        (Some(Object::Flavor(old)), Some(Object::Flavor(new))) => {
            let object = Object::Flavor(new.clone());
            rows(flavor::ROWS, old.as_ref(), new.as_ref(), |row| place(&object, row.id, row.name))
        }
        (Some(Object::Volume(old)), Some(Object::Volume(new))) => {
            let object = Object::Volume(new.clone());
            rows(volume::ROWS, old.as_ref(), new.as_ref(), |row| place(&object, row.id, row.name))
        }
        (Some(Object::Transfer(old)), Some(Object::Transfer(new))) => {
            let object = Object::Transfer(new.clone());
            rows(transfer::ROWS, old.as_ref(), new.as_ref(), |row| place(&object, row.id, row.name))
        }
        (Some(Object::Backend(old)), Some(Object::Backend(new))) => {
            let object = Object::Backend(new.clone());
            rows(backend::ROWS, old.as_ref(), new.as_ref(), |row| place(&object, row.id, row.name))
        }
        _ => Vec::new(),
    };
    touched.extend(summary(old, new));
    touched
}

/// The files of a task that say where its object stands.
fn naming(task: &Arc<Task>) -> Vec<Touched> {
    let rows = task::ROWS.iter().filter(|row| row.place(task).is_some());
    rows.map(|row| place(&Object::Task(task.clone()), row.id, row.name)).collect()
}

fn rows<O, C>(rows: &[Row<O, C>], old: &O, new: &O, touched: impl Fn(&Row<O, C>) -> Touched) -> Vec<Touched> {
    let values =
        rows.iter().filter(|row| row.render(old) != row.render(new) || row.place(old) != row.place(new)).map(&touched);
    let keys = rows.iter().flat_map(|row| changed_keys(row, old, new, touched(row)));
    values.chain(keys).collect()
}

/// The files of a directory that read differently, and the directory itself if entries came or went.
fn changed_keys<O, C>(row: &Row<O, C>, old: &O, new: &O, place: Touched) -> Vec<Touched> {
    let Node::Attribute(class, number, id) = place.node else { return Vec::new() };
    let (before, after) = (row.keys(old), row.keys(new));
    let mut touched = Vec::new();
    if before.iter().map(|key| key.serial).ne(after.iter().map(|key| key.serial)) && row.is_directory() {
        touched.push(place.clone());
    }
    if directory::key_kind(class, id) == Kind::File {
        let changed = after.iter().filter(|key| !before.contains(key));
        touched.extend(changed.map(|key| Touched {
            node: Node::Key(class, number, id, key.serial),
            path: if row.is_directory() { place.path.join(&key.name) } else { within(&place.path, &key.name) },
        }));
    }
    touched
}

/// The file of this name in one of the directories for which its row says `*`.
fn within(path: &Path, entry: &str) -> PathBuf {
    let outer = path.parent().and_then(Path::parent).unwrap_or(path);
    outer.join(entry).join(path.file_name().unwrap_or_default())
}

fn summary(old: Option<&Object>, new: Option<&Object>) -> Option<Touched> {
    let line = |object: Option<&Object>| match object {
        Some(Object::Instance(instance)) => Some((root::SUMMARY_INSTANCES, root::instance_line(instance))),
        Some(Object::Image(image)) => Some((root::SUMMARY_IMAGES, root::image_line(image))),
        Some(Object::Volume(volume)) => Some((root::SUMMARY_VOLUMES, root::volume_line(volume))),
        Some(Object::Task(_) | Object::Flavor(_) | Object::Transfer(_) | Object::Backend(_)) | None => None,
    };
    let (old, new) = (line(old), line(new));
    let row = old.as_ref().or(new.as_ref()).map(|(row, _)| *row)?;
    (old != new).then(|| file(Directory::Summary, row))
}

fn attribute(instance: &Arc<Instance>, row: u8, name: &str) -> Touched {
    place(&Object::Instance(instance.clone()), row, name)
}

/// A piece of the console log, under the name of this row.
fn console(instance: &Arc<Instance>, id: u8, piece: u64) -> Option<Touched> {
    let row = instance::ROWS.iter().find(|row| row.id == id)?;
    let piece = u32::try_from(piece).ok()?;
    let node = Node::Key(Class::Instance, instance.record.number, instance::CONSOLE_LOG, piece);
    Some(Touched { node, ..attribute(instance, row.id, row.name) })
}

fn place(object: &Object, row: u8, name: &str) -> Touched {
    let path = view::home_path(object).join(name);
    Touched { node: Node::Attribute(object.class(), object.number(), row), path }
}

fn file(directory: Directory, id: u8) -> Touched {
    let name = root::table(directory).iter().find(|row| row.id == id).map_or("", |row| row.name);
    Touched { node: Node::File(directory, id), path: fixed::path(directory).join(name) }
}
