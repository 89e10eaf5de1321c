//! One write of a value, as a request.

use std::sync::Arc;

use super::attribute::Type;
use super::attribute::{Row, Write};
use super::content::find;
use super::interface::Tree;
use super::reference::Resolver;
use super::value::{lines, text};
use super::{Data, FindCompletion, OpenFile, ReadCompletion, directory, flavor, image, instance, task};
use crate::image::extent::Find;
use crate::inventory::{Image, Object};
use crate::model::Class;
use crate::model::caller::{Caller, Role};
use crate::model::reason::Reason;
use crate::workflow::drafts_data::Writer;
use crate::workflow::request::{Completion, Request};

/// The file's name for `last_error`, and why the write is refused.
pub type Refusal = (&'static str, Reason);

/// What a write asks for; `None` if it means nothing (a lone newline after a good value).
pub fn request(
    tree: &Tree,
    file: OpenFile,
    object: &Object,
    caller: &Caller,
    bytes: &[u8],
) -> Result<Option<(&'static str, Request)>, Refusal> {
    let id = object.id();
    match (object, row_id(file)) {
        (Object::Instance(_), Some(row)) => {
            let row = find(instance::ROWS, row).ok_or_else(nothing)?;
            let change = change(tree, row, file, object, caller, bytes)?;
            Ok(change.map(|change| (row.name, Request::Instance { id, changes: vec![change] })))
        }
        (Object::Image(_), Some(row)) => {
            let row = find(image::ROWS, row).ok_or_else(nothing)?;
            let change = change(tree, row, file, object, caller, bytes)?;
            Ok(change.map(|change| (row.name, Request::Image { id, changes: vec![change] })))
        }
        (Object::Flavor(_), Some(row)) => {
            let row = find(flavor::ROWS, row).ok_or_else(nothing)?;
            let change = change(tree, row, file, object, caller, bytes)?;
            Ok(change.map(|change| (row.name, Request::Flavor { id, changes: vec![change] })))
        }
        (Object::Task(_), Some(row)) => {
            let row = find(task::ROWS, row).ok_or_else(nothing)?;
            let change = change(tree, row, file, object, caller, bytes)?;
            Ok(change.map(|change| match change {}))
        }
        (Object::Instance(_) | Object::Image(_) | Object::Task(_) | Object::Flavor(_), None) => Err(nothing()),
    }
}

fn row_id(file: OpenFile) -> Option<u8> {
    match file.node {
        super::Node::Attribute(_, _, row) | super::Node::Key(_, _, row, _) => Some(row),
        super::Node::Directory(_)
        | super::Node::File(..)
        | super::Node::Object(..)
        | super::Node::Events(_)
        | super::Node::NameLink(..)
        | super::Node::StateLink(..)
        | super::Node::Scratch(_) => None,
    }
}

/// Whether this one file is the caller's to write although the object is not his.
fn is_writer(object: &Object, file: OpenFile, caller: &Caller) -> bool {
    match file.node {
        super::Node::Key(_, _, row, serial) => {
            let key = directory::key(object, row, serial);
            key.and_then(|key| key.writer).is_some_and(|group| caller.in_group(group))
        }
        super::Node::Attribute(..)
        | super::Node::Directory(_)
        | super::Node::File(..)
        | super::Node::Events(_)
        | super::Node::Object(..)
        | super::Node::NameLink(..)
        | super::Node::StateLink(..)
        | super::Node::Scratch(_) => false,
    }
}

fn nothing() -> Refusal {
    ("write", Reason::ReadOnlyAttribute)
}

fn change<O, C>(
    tree: &Tree,
    row: &'static Row<O, C>,
    file: OpenFile,
    object: &Object,
    caller: &Caller,
    bytes: &[u8],
) -> Result<Option<C>, Refusal> {
    let refused = |reason| (row.name, reason);
    // A flavor's readers are no strangers to it: they are told that it is root's to change.
    let is_stranger = caller.role(&object.ownership()) == Role::Stranger;
    if is_stranger && !matches!(object, Object::Flavor(_)) && !is_writer(object, file, caller) {
        return Err(refused(Reason::NotYours { class: object.class() }));
    }
    if file.generation != object.ownership().generation {
        return Err(refused(Reason::HandleOutlivedOwner));
    }
    let value = if row.kind == Type::Groups { lines(bytes) } else { text(bytes) }.map_err(refused)?;
    if value.is_empty() && file.written {
        return Ok(None);
    }
    let resolver = Resolver { inventory: &tree.inventory, caller, mountpoint: &tree.settings.mountpoint };
    let parsed = match (&row.write, file.node) {
        (Write::Change(parse), _) => parse(value, &resolver),
        (Write::Key(parse), super::Node::Key(_, _, row, serial)) => {
            let key = directory::key(object, row, serial).ok_or_else(|| Reason::NotFound("such key any more".into()));
            key.and_then(|key| parse(&key.name, value, &resolver))
        }
        (Write::Never | Write::Data | Write::Key(_), _) => Err(Reason::ReadOnlyAttribute),
    };
    parsed.map(Some).map_err(refused)
}

/// A handle on a draft's data.
pub fn open_draft(tree: &Tree, image: &Image, caller: &Caller) -> Result<Arc<dyn Data>, Reason> {
    if caller.role(&image.record.ownership) == Role::Stranger {
        return Err(Reason::NotYours { class: Class::Image });
    }
    let gone = || Reason::NotFound("such draft any more".into());
    let data = tree.engine.draft_data(image.id).ok_or_else(gone)?;
    Ok(Arc::new(DraftHandle(data.open_writer(caller)?)))
}

struct DraftHandle(Writer);

impl Data for DraftHandle {
    fn write_at(&self, offset: u64, bytes: Vec<u8>, done: Completion) {
        self.0.write_at(offset, bytes, done);
    }

    fn read_at(&self, offset: u64, size: usize, done: ReadCompletion) {
        self.0.read_at(offset, size, done);
    }

    fn truncate(&self, length: u64, done: Completion) {
        self.0.truncate(length, done);
    }

    fn allocate(&self, offset: u64, length: u64, mode: i32, done: Completion) {
        self.0.allocate(offset, length, mode, done);
    }

    fn find(&self, offset: u64, what: Find, done: FindCompletion) {
        self.0.find(offset, what, done);
    }

    fn sync(&self, done: Completion) {
        self.0.sync(done);
    }
}
