//! One write of a value, as a request.

use std::sync::Arc;

use super::attribute::{Row, Type, Write};
use super::content::find;
use super::interface::Tree;
use super::reference::Resolver;
use super::spec::{self, Specified};
use super::value::{lines, malformed, text};
use super::{Data, FindCompletion, Node, OpenFile, ReadCompletion, directory, transfer};
use crate::image::extent::Find;
use crate::inventory::{Image, Object, Task};
use crate::model::Class;
use crate::model::caller::{Caller, Role};
use crate::model::reason::Reason;
use crate::model::task::TaskChange;
use crate::workflow::drafts_data::{Leave, Writer};
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
    let row = row_id(file).ok_or_else(nothing)?;
    let asked = Asked { tree, file, row, object, caller, bytes };
    match object {
        Object::Instance(instance) => {
            Ok(asked.changes(instance.as_ref())?.map(|(name, changes)| (name, Request::Instance { id, changes })))
        }
        Object::Image(image) => {
            Ok(asked.changes(image.as_ref())?.map(|(name, changes)| (name, Request::Image { id, changes })))
        }
        Object::Flavor(flavor) => {
            Ok(asked.changes(flavor.as_ref())?.map(|(name, changes)| (name, Request::Flavor { id, changes })))
        }
        Object::Volume(volume) => {
            Ok(asked.changes(volume.as_ref())?.map(|(name, changes)| (name, Request::Volume { id, changes })))
        }
        Object::Transfer(transfer) => {
            let asks = asked.changes(transfer.as_ref())?;
            Ok(asks.and_then(|(name, changes)| {
                Some((name, Request::Transfer { id, change: changes.into_iter().next()? }))
            }))
        }
        Object::Backend(_) => Err(nothing()),
        Object::Task(task) => {
            let asks = asked.changes(task.as_ref())?;
            Ok(asks.and_then(|(name, changes)| Some((name, of_task(task, changes.into_iter().next()?)))))
        }
    }
}

fn of_task(task: &Task, change: TaskChange) -> Request {
    let (id, class, object) = (task.id, task.record.class, task.record.object);
    match change {
        TaskChange::Cancel => Request::Cancel { id, class, object },
        TaskChange::Import(import) => Request::Import { id, import },
    }
}

fn row_id(file: OpenFile) -> Option<u8> {
    match file.node {
        Node::Attribute(_, _, row) | Node::Key(_, _, row, _) => Some(row),
        Node::Directory(_)
        | Node::File(..)
        | Node::Object(..)
        | Node::Events(_)
        | Node::NameLink(..)
        | Node::StateLink(..)
        | Node::Scratch(_) => None,
    }
}

/// Whether this one file is the caller's to write although the object is not his.
fn is_writer(object: &Object, file: OpenFile, caller: &Caller) -> bool {
    match file.node {
        super::Node::Key(_, _, row, serial) => {
            let key = directory::key(object, row, serial);
            key.and_then(|key| key.writer).is_some_and(|group| caller.in_group(group))
        }
        // Whoever has the key may write it.
        super::Node::Attribute(Class::Transfer, _, row) => row == transfer::ACCEPT,
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

/// A file's name and what is to change in its object; `None` if the write means nothing.
type Asks<C> = Option<(&'static str, Vec<C>)>;

/// One write.
struct Asked<'a> {
    tree: &'a Tree,
    file: OpenFile,
    row: u8,
    object: &'a Object,
    caller: &'a Caller,
    bytes: &'a [u8],
}

impl Asked<'_> {
    /// The file's name and what is to change; `subject` is the object.
    fn changes<O: Specified>(&self, subject: &O) -> Result<Asks<O::Change>, Refusal> {
        let row = find(O::rows(), self.row).ok_or_else(nothing)?;
        let changes = self.allowed().and_then(|()| self.parse(row, subject)).map_err(|reason| (row.name, reason))?;
        Ok(changes.map(|changes| (row.name, changes)))
    }

    fn allowed(&self) -> Result<(), Reason> {
        // A flavor's readers are no strangers to it: they are told that it is root's to change.
        let is_stranger = self.caller.role(&self.object.ownership()) == Role::Stranger;
        let writes_his_own = is_writer(self.object, self.file, self.caller);
        if is_stranger && !matches!(self.object, Object::Flavor(_)) && !writes_his_own {
            return Err(Reason::NotYours { class: self.object.class() });
        }
        if self.file.generation != self.object.ownership().generation {
            return Err(Reason::HandleOutlivedOwner);
        }
        Ok(())
    }

    fn parse<O: Specified>(&self, row: &Row<O, O::Change>, subject: &O) -> Result<Option<Vec<O::Change>>, Reason> {
        let resolver = Resolver {
            inventory: &self.tree.inventory,
            caller: self.caller,
            mountpoint: &self.tree.settings.mountpoint,
        };
        match &row.write {
            Write::Spec => return spec::changes(subject, self.bytes, &resolver).map(Some),
            Write::Document(parse) => {
                let text = std::str::from_utf8(self.bytes).map_err(|_| malformed("this is no UTF-8 text"))?;
                return parse(text).map(|change| Some(vec![change]));
            }
            Write::Json(parse) => return parse(self.bytes, &resolver).map(|change| Some(vec![change])),
            Write::Never | Write::Change(_) | Write::Order(_) | Write::Data | Write::Key(_) | Write::FreeKey { .. } => {
            }
        }
        let value = if row.kind == Type::Groups { lines(self.bytes) } else { text(self.bytes) }?;
        if value.is_empty() && self.file.written {
            return Ok(None);
        }
        let change = match (&row.write, self.file.node) {
            // True already: what reads empty takes that back, so that a copy of the tree can be written back.
            (Write::Change(_) | Write::Order(_), _)
                if value.is_empty() && !row.is_verb() && row.reads_empty(subject) =>
            {
                return Ok(None);
            }
            (Write::Change(parse) | Write::Order(parse), _) => parse(value, &resolver),
            (Write::Key(write) | Write::FreeKey { write, .. }, Node::Key(_, _, row, serial)) => {
                let key = directory::key(self.object, row, serial);
                let key = key.ok_or_else(|| Reason::NotFound("such key any more".into()))?;
                write(&key.name, value, &resolver)
            }
            (
                Write::Never
                | Write::Data
                | Write::Document(_)
                | Write::Json(_)
                | Write::Spec
                | Write::Key(_)
                | Write::FreeKey { .. },
                _,
            ) => Err(Reason::ReadOnlyAttribute),
        };
        change.map(|change| Some(vec![change]))
    }
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
    fn write_at(&self, offset: u64, bytes: &[u8], leave: Leave, done: Completion) {
        self.0.write_at(offset, bytes, leave, done);
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

    fn flush(&self, done: Completion) {
        self.0.flush(done);
    }
}
