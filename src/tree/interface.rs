//! [`Tree`]: the tables, views and names as one [`Interface`].

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use uuid::Uuid;

use super::attribute::{Read, Row};
use super::content::{Rendered, find, link, snapshot};
use super::directory::rows;
use super::names::{Names, Place, Position};
use super::node::{Directory, Node};
use super::rename;
use super::root;
use super::scratch::{self, Scratch};
use super::stat::private;
use super::tables::with_table;
use super::{
    Admission, Attributes, CallerOf, Content, Data, Grant, Interface, Kind, NodeCompletion, OpenFile, Touched,
    directory, document, fixed, image, instance, links, rights, transfer, view, volume, write,
};
use crate::inventory::{Change, Inventory, Object};
use crate::model::Class;
use crate::model::caller::Caller;
use crate::model::reason::Reason;
use crate::privilege::Privilege;
use crate::workflow::engine::Engine;
use crate::workflow::events::EventLog;
use crate::workflow::reconcile::Reconciler;
use crate::workflow::request::{Completion, Request, Submission, Wait};

/// What the mount decides.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Who mounts.
    pub privilege: Privilege,
    /// The group that may see the class directories.
    pub access_group: u32,
    /// The group that may read `events`.
    pub admin_group: u32,
    /// Where the tree is mounted, absolute.
    pub mountpoint: PathBuf,
    /// Where the daemon's own files are, absolute.
    pub state_directory: PathBuf,
    /// Unix seconds of the mount, the time of what never changes.
    pub started_at: u64,
}

/// The tree.
pub struct Tree {
    pub(super) inventory: Arc<Inventory>,
    pub(super) engine: Arc<Engine>,
    pub(super) reconciler: Arc<Reconciler>,
    pub(super) events: Arc<EventLog>,
    pub(super) settings: Settings,
    pub(super) names: Names,
    pub(super) scratch: Scratch,
    pub(super) summaries: Mutex<HashMap<u8, Rendered>>,
    /// Itself, for what goes on after a call has returned.
    pub(super) own: Weak<Tree>,
}

impl Tree {
    /// Publishes every object that the inventory holds, before anybody can look.
    pub fn new(
        inventory: Arc<Inventory>,
        engine: Arc<Engine>,
        reconciler: Arc<Reconciler>,
        events: Arc<EventLog>,
        settings: Settings,
    ) -> Arc<Tree> {
        let mut tree = Tree {
            inventory,
            engine,
            reconciler,
            events,
            settings,
            names: Names::new(),
            scratch: Scratch::default(),
            summaries: Mutex::default(),
            own: Weak::new(),
        };
        let instances = tree.inventory.instances().into_iter().map(Object::Instance);
        let images = tree.inventory.images().into_iter().map(Object::Image);
        let tasks = tree.inventory.tasks().into_iter().map(Object::Task);
        let flavors = tree.inventory.flavors().into_iter().map(Object::Flavor);
        let volumes = tree.inventory.volumes().into_iter().map(Object::Volume);
        let transfers = tree.inventory.transfers().into_iter().map(Object::Transfer);
        let backends = tree.inventory.backends().into_iter().map(Object::Backend);
        let all = instances.chain(images).chain(tasks).chain(flavors).chain(volumes).chain(transfers).chain(backends);
        for object in all {
            for position in Position::ALL {
                let node = position.node(object.class(), object.number());
                tree.names.publish(node, view::wanted(&object, position, &tree.names));
            }
        }
        Arc::new_cyclic(|own| {
            tree.own = own.clone();
            tree
        })
    }

    pub(super) fn object(&self, node: Node) -> Option<Object> {
        match node {
            Node::Scratch(serial) => self.object(self.scratch.stat(serial)?.1),
            node => self.inventory.by_number(node.object_number()?),
        }
    }

    pub(super) fn entry(&self, parent: Node, name: &str) -> Option<Node> {
        match parent {
            Node::Directory(directory) => fixed::lookup(directory, name)
                .and_then(|node| self.present(node))
                .or_else(|| self.names.lookup(directory, name)),
            Node::Object(..) | Node::Attribute(..) | Node::Key(..) => self.child(parent, name),
            Node::File(..) | Node::Events(_) | Node::NameLink(..) | Node::StateLink(..) | Node::Scratch(_) => None,
        }
    }

    /// The place that a name of the tables stands for now, if it exists.
    fn present(&self, node: Node) -> Option<Node> {
        match node {
            Node::File(Directory::Root, root::EVENTS) => Some(Node::Events(self.events.current().first)),
            Node::File(Directory::Root, root::EVENTS_OLD) => Some(Node::Events(self.events.former()?.first)),
            node => Some(node),
        }
    }

    pub(super) fn submit(&self, caller: Caller, file: &str, request: Request, wait: Wait, done: Completion) {
        self.engine.submit(Submission { caller, file: file.to_owned(), request, wait, done });
    }

    /// Records a refusal of the tree itself.
    pub(super) fn refusal(&self, caller: &Caller, object: Option<(Class, Uuid)>, file: &str, reason: Reason) -> Reason {
        self.engine.refused(caller, object, file, &reason);
        reason
    }
}

impl Interface for Tree {
    fn attributes(&self, node: Node) -> Option<Attributes> {
        let shared = self.shared_attributes(node)?;
        let privilege = self.settings.privilege;
        Some(if privilege.is_root() { shared } else { private(shared, privilege) })
    }

    fn node(&self, inode: u64) -> Option<Node> {
        Node::from_inode(inode, |number| {
            self.inventory.by_number(number).map(|object| object.class()).or_else(|| self.names.class(number))
        })
    }

    fn lookup(&self, parent: Node, name: &str) -> Option<Node> {
        self.entry(parent, name)
    }

    fn list(&self, directory: Node, cookie: u64, each: &mut dyn FnMut(u64, &str, Node) -> bool) -> Result<(), Reason> {
        match directory {
            Node::Directory(place) => {
                for (index, (name, node)) in fixed::entries(place).into_iter().enumerate() {
                    let position = index as u64 + 1;
                    let Some(node) = self.present(node).filter(|_| position > cookie) else { continue };
                    if !each(position, &name, node) {
                        return Ok(());
                    }
                }
                self.names.list(place, cookie, each);
                Ok(())
            }
            Node::Object(..) | Node::Attribute(..) | Node::Key(..) => {
                let object = self.object(directory).ok_or_else(|| Reason::NotFound("such object any more".into()))?;
                self.children(directory, &object, cookie, each);
                Ok(())
            }
            Node::File(..) | Node::Events(_) | Node::NameLink(..) | Node::StateLink(..) => {
                Err(Reason::NotFound("such directory".into()))
            }
            // A reservation is empty.
            Node::Scratch(_) => Ok(()),
        }
    }

    fn target(&self, node: Node) -> Option<String> {
        if let Node::Scratch(serial) = node {
            return self.scratch.target(serial);
        }
        let object = self.object(node)?;
        match node {
            Node::Key(class, _, row, serial) => self.key_target(class, row, serial, &object),
            Node::NameLink(..) | Node::StateLink(..) => Some(self.link_target(node, &object)),
            Node::Attribute(_, _, id) => with_table!(&object, |rows, value| link(find(rows, id)?, value.as_ref())),
            Node::Directory(_) | Node::File(..) | Node::Object(..) | Node::Events(_) | Node::Scratch(_) => None,
        }
    }

    fn content(&self, node: Node, uid: u32) -> Result<Content, Reason> {
        let gone = || Reason::NotFound("such object any more".into());
        match node {
            Node::File(directory, id) => self.file_content(directory, id, uid),
            Node::Attribute(_, _, id) => {
                let object = self.object(node).ok_or_else(gone)?;
                let absent = || Reason::NotFound("such file".into());
                with_table!(&object, |rows, value| {
                    self.row_content(find(rows, id).ok_or_else(absent)?, value.as_ref(), &object, uid)
                })
            }
            Node::Events(first) => match self.events.segment(first).and_then(|segment| segment.file) {
                Some(file) => Ok(Content::File(file)),
                None => Ok(snapshot("")),
            },
            Node::Key(Class::Instance, _, instance::CONSOLE_LOG, piece) => {
                self.console_log(&self.object(node).ok_or_else(gone)?, piece)
            }
            Node::Key(class, _, row, serial) if directory::key_kind(class, row) == Kind::File => {
                let object = self.object(node).ok_or_else(gone)?;
                let key = directory::key(&object, row, serial);
                key.map(|key| snapshot(&(key.value + "\n"))).ok_or_else(|| Reason::NotFound("such key any more".into()))
            }
            Node::Scratch(serial) => {
                self.scratch.content(serial).map(|bytes| Content::Snapshot(bytes.into())).ok_or_else(gone)
            }
            Node::Directory(_) | Node::Object(..) | Node::Key(..) | Node::NameLink(..) | Node::StateLink(..) => {
                Err(Reason::Malformed("this is no file".into()))
            }
        }
    }

    fn grants(&self, node: Node) -> Vec<Grant> {
        if !self.settings.privilege.is_root() {
            return Vec::new();
        }
        match node {
            // What a tool makes there is its own.
            Node::Scratch(_) => Vec::new(),
            Node::Object(..) | Node::Attribute(..) | Node::Key(..) => {
                self.object(node).map(|object| self.object_grants(node, &object)).unwrap_or_default()
            }
            Node::Directory(_) | Node::File(..) | Node::Events(_) | Node::NameLink(..) | Node::StateLink(..) => {
                Vec::new()
            }
        }
    }

    fn admission(&self, node: Node) -> Admission {
        self.object(node).map(|object| rights::admission(&object)).unwrap_or_default()
    }

    fn governed(&self, node: Node) -> Node {
        match self.object(node) {
            Some(Object::Transfer(transfer)) => match self.inventory.volume(transfer.record.volume) {
                Some(volume) => Node::Object(Class::Volume, volume.record.number),
                None => node,
            },
            Some(
                Object::Instance(_)
                | Object::Image(_)
                | Object::Task(_)
                | Object::Flavor(_)
                | Object::Volume(_)
                | Object::Backend(_),
            )
            | None => node,
        }
    }

    fn generation(&self, node: Node) -> u32 {
        self.object(node).map_or(0, |object| object.ownership().generation)
    }

    fn may_open(&self, node: Node, caller: CallerOf<'_>) -> bool {
        match self.object(node) {
            Some(Object::Flavor(flavor)) => {
                flavor.record.is_public || crate::model::flavor::may_read(&flavor.record, &caller())
            }
            // By the mode the kernel knows it too, but not that what it believed before has changed.
            Some(Object::Image(image)) if image.record.deactivated => {
                let row = node.row().and_then(|row| find(image::ROWS, row));
                row.is_none_or(|row| rights::image_row(row, &image).is_some()) || caller().is_administrator()
            }
            // Root's tools read everything that they find: this is to get into no backup.
            Some(Object::Transfer(transfer)) => {
                let is_key = node.row().and_then(|row| find(transfer::ROWS, row)).is_some_and(Row::is_offer_key);
                !is_key || caller().uid == transfer.record.offered_by
            }
            Some(Object::Instance(_) | Object::Image(_) | Object::Task(_) | Object::Volume(_) | Object::Backend(_))
            | None => true,
        }
    }

    fn is_read_only(&self, node: Node) -> bool {
        match node {
            Node::Attribute(class, _, id) => {
                let is_data = || find(image::ROWS, id).is_some_and(|row| matches!(row.read, Read::Data));
                let object = self.object(node);
                let is_published =
                    matches!(&object, Some(Object::Image(image)) if image.record.draft.is_none() && is_data());
                is_published || rows(class).any(|head| head.id == id && head.is_read_only)
            }
            Node::File(..) | Node::Events(_) => true,
            Node::Key(class, _, row, _) => rows(class).any(|head| head.id == row && head.is_read_only),
            Node::Directory(_) | Node::Object(..) | Node::NameLink(..) | Node::StateLink(..) | Node::Scratch(_) => {
                false
            }
        }
    }

    fn document(&self, node: Node) -> Option<document::Kind> {
        match node {
            Node::Attribute(class, _, row) => rows(class).find(|head| head.id == row).and_then(|head| head.document),
            Node::Directory(_)
            | Node::File(..)
            | Node::Object(..)
            | Node::Key(..)
            | Node::Events(_)
            | Node::NameLink(..)
            | Node::StateLink(..)
            | Node::Scratch(_) => None,
        }
    }

    fn refuse(&self, node: Node, caller: &Caller, reason: Reason, done: Completion) {
        let object = self.object(node).map(|object| write::answerable(&object));
        let name = match node {
            Node::Attribute(class, _, row) | Node::Key(class, _, row, _) => {
                rows(class).find(|head| head.id == row).map(|head| head.name)
            }
            _ => None,
        };
        self.engine.refuse(caller, object, name.unwrap_or("write"), &reason, done);
    }

    fn write(&self, file: OpenFile, caller: Caller, bytes: &[u8], done: Completion) {
        self.write_value(file, caller, bytes, Wait::Settle, done);
    }

    fn make_directory(self: Arc<Self>, parent: Node, name: &str, caller: Caller, done: NodeCompletion) {
        if let Node::Attribute(Class::Volume, _, volume::SNAPSHOTS) = parent {
            return links::take_snapshot(self, parent, name, caller, done);
        }
        if self.is_reservation(parent, name) {
            let object = self.object(parent).map(|object| (object.class(), object.id()));
            let made = self.scratch.make_directory(parent, name, caller.uid).map(Node::Scratch);
            return done(made.map_err(|reason| self.refusal(&caller, object, name, reason)));
        }
        let (class, id, request) = match rename::draft(parent, name) {
            Ok(draft) => draft,
            Err(reason) => return done(Err(self.refusal(&caller, None, "mkdir", reason))),
        };
        let tree = self.clone();
        let published: Completion = Box::new(move |outcome| {
            done(outcome.and_then(|()| {
                let object = tree.inventory.get(class, id);
                let object = object.ok_or_else(|| Reason::NotFound("such object any more".into()))?;
                let node = Node::Object(class, object.number());
                tree.names.publish(node, view::wanted(&object, Position::Home, &tree.names));
                Ok(node)
            }));
        });
        self.submit(caller, "mkdir", request, Wait::Accepted, published);
    }

    fn remove_directory(self: Arc<Self>, parent: Node, name: &str, caller: Caller, done: Completion) {
        let Some(node) = self.entry(parent, name) else {
            return done(Err(Reason::NotFound(format!("{name:?} in this directory"))));
        };
        if let Node::Scratch(serial) = node
            && self.scratch.kind(serial) == Some(Kind::Directory)
        {
            return done(self.own_scratch(serial, &caller).map(|()| self.scratch.remove(serial)));
        }
        let object = self.object(node);
        let (Node::Object(class, _), Some(object)) = (node, object) else {
            return done(Err(self.refusal(&caller, None, "rmdir", Reason::NotEmpty)));
        };
        let tree = self.clone();
        let id = object.id();
        let published: Completion = Box::new(move |outcome| {
            if outcome.is_ok() {
                tree.names.publish(node, None);
            }
            done(outcome);
        });
        self.submit(caller, "rmdir", Request::DiscardUnwritten { class, id }, Wait::Accepted, published);
    }

    fn unlink(&self, parent: Node, name: &str, caller: Caller) -> Result<(), Reason> {
        let node = self.entry(parent, name);
        match node {
            None => Err(Reason::NotFound(format!("{name:?} in this directory"))),
            Some(Node::Scratch(serial)) => {
                self.own_scratch(serial, &caller)?;
                self.scratch.remove(serial);
                Ok(())
            }
            Some(_) => {
                let object = self.object(parent).map(|object| (object.class(), object.id()));
                let reason = Reason::Policy("the tree's own files cannot be removed; write to state instead".into());
                Err(self.refusal(&caller, object, name, reason))
            }
        }
    }

    fn symlink(self: Arc<Self>, parent: Node, name: &str, target: &str, caller: Caller, done: NodeCompletion) {
        links::symlink(self, parent, name, target, caller, done);
    }

    fn rename(self: Arc<Self>, from: (Node, &str), to: (Node, &str), caller: Caller, done: Completion) {
        rename::rename(self, from, to, caller, done);
    }

    fn create(&self, parent: Node, name: &str, caller: Caller) -> Result<Node, Reason> {
        let object = self.object(parent).map(|object| (object.class(), object.id()));
        let created = if self.is_temporary(parent, name) {
            self.scratch.create(parent, name, caller.uid).map(Node::Scratch)
        } else {
            Err(Reason::NotFound(format!("attribute {name:?}; check its spelling")))
        };
        created.map_err(|reason| self.refusal(&caller, object, name, reason))
    }

    fn open_data(&self, node: Node, caller: Caller, writing: bool) -> Option<Result<Arc<dyn Data>, Reason>> {
        match node {
            Node::Scratch(serial) => {
                let handle = self.scratch.open(serial).ok_or(Reason::StaleHandle);
                Some(handle.map(|handle| Arc::new(handle) as Arc<dyn Data>))
            }
            Node::Attribute(Class::Image, _, id)
                if find(image::ROWS, id).is_some_and(|row| matches!(row.read, Read::Data)) =>
            {
                let Some(Object::Image(image)) = self.object(node) else { return Some(Err(Reason::StaleHandle)) };
                image.record.draft.filter(|_| writing)?;
                Some(write::open_draft(self, &image, &caller))
            }
            _ => None,
        }
    }

    fn touched(&self, change: &Change) -> Vec<Touched> {
        super::changes::touched(&self.inventory, change)
    }

    fn moved(&self, change: &Change) -> Vec<(Class, u64, Position)> {
        super::changes::moved(&self.inventory, change)
    }

    fn wanted(&self, _class: Class, number: u64, position: Position) -> Option<Place> {
        view::wanted(&self.inventory.by_number(number)?, position, &self.names)
    }

    fn names(&self) -> &Names {
        &self.names
    }

    fn directory_path(&self, directory: Directory) -> PathBuf {
        fixed::path(directory)
    }
}

impl Tree {
    pub(super) fn is_temporary(&self, parent: Node, name: &str) -> bool {
        let names = self.replaceable(parent);
        names.is_some_and(|names| scratch::is_temporary(name, names.iter().map(String::as_str)))
    }

    fn is_reservation(&self, parent: Node, name: &str) -> bool {
        let names = self.replaceable(parent);
        names.is_some_and(|names| scratch::is_reservation(name, names.iter().map(String::as_str)))
    }

    /// Whether a temporary file is the caller's, or he is root.
    pub(super) fn own_scratch(&self, serial: u64, caller: &Caller) -> Result<(), Reason> {
        let is_his = self.scratch.stat(serial).is_some_and(|(uid, ..)| uid == caller.uid || caller.uid == 0);
        if is_his { Ok(()) } else { Err(Reason::Policy("this temporary file belongs to somebody else".into())) }
    }
}
