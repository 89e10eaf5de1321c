//! One write of a value, as a request, and how it is answered.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use uuid::Uuid;

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
use crate::model::volume::change::VolumeChange;
use crate::workflow::drafts_data::{Leave, Writer};
use crate::workflow::request::{Completion, Request, Wait};

/// The file's name for `last_error`, and why the write is refused.
type Refusal = (&'static str, Reason);

/// How long who has made an offer waits for its directory, which the queue publishes much sooner.
const STANDS: Duration = Duration::from_secs(2);

/// The object whose `last_error` tells of a refusal: of a task that has begun, the one that it works on.
pub(super) fn answerable(object: &Object) -> (Class, Uuid) {
    match object {
        Object::Task(task) if task.record.draft.is_none() => (task.record.class, task.record.object),
        Object::Task(_)
        | Object::Instance(_)
        | Object::Image(_)
        | Object::Flavor(_)
        | Object::Volume(_)
        | Object::Transfer(_)
        | Object::Backend(_) => (object.class(), object.id()),
    }
}

impl Tree {
    /// One write of a value. For a rename it does not wait for the work: the kernel holds locks meanwhile.
    pub(super) fn write_value(&self, file: OpenFile, caller: Caller, bytes: &[u8], wait: Wait, done: Completion) {
        let Some(object) = self.object(file.node) else {
            return done(Err(Reason::NotFound("such object any more".into())));
        };
        let identity = Some(answerable(&object));
        match request(self, file, &object, &caller, bytes) {
            Ok(Some((name, request))) => {
                let done = match wait {
                    Wait::Settle => self.once_offer_stands(&request, done),
                    Wait::Accepted => done,
                };
                self.submit(caller, name, request, wait, done);
            }
            Ok(None) => done(Ok(())),
            Err((name, reason)) => self.engine.refuse(&caller, identity, name, &reason, done),
        }
    }

    /// Who has made an offer goes on to its directory, which is published a moment later.
    fn once_offer_stands(&self, request: &Request, done: Completion) -> Completion {
        let id = match request {
            Request::Volume { id, changes }
                if changes.iter().any(|change| matches!(change, VolumeChange::Offer { .. })) =>
            {
                *id
            }
            _ => return done,
        };
        let Some(tree) = self.own.upgrade() else { return done };
        Box::new(move |outcome| {
            let offer = tree.inventory.volume(id).and_then(|volume| tree.inventory.transfer(volume.record.transfer?));
            let Some(offer) = offer.filter(|_| outcome.is_ok()) else { return done(outcome) };
            let node = Node::Object(Class::Transfer, offer.record.number);
            if tree.names.published(node).is_some() {
                return done(outcome);
            }
            let answer = Arc::new(Mutex::new(Some((done, outcome))));
            let late = answer.clone();
            let waiting = move || {
                tree.names.wait(node, Instant::now() + STANDS);
                if let Some((done, outcome)) = late.lock().take() {
                    done(outcome);
                }
            };
            let spawned = thread::Builder::new().name("offer".to_owned()).spawn(waiting);
            if spawned.is_err()
                && let Some((done, outcome)) = answer.lock().take()
            {
                done(outcome);
            }
        })
    }
}

/// What a write asks for; `None` if it means nothing (a lone newline after a good value).
fn request(
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
