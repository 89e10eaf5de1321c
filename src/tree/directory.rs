//! The directories of an object: its own, and those in it.

use super::Kind;
use super::attribute::{KeyFile, Read, Row};
use super::content::find;
use super::document;
use super::interface::Tree;
use super::node::Node;
use super::tables::{with_rows, with_table};
use crate::inventory::Object;
use crate::model::Class;
use crate::model::keys::Keys;

/// What a listing needs to know of a row.
pub(super) struct Head {
    /// The row's id.
    pub(super) id: u8,
    /// The row's name.
    pub(super) name: &'static str,
    /// The row's permission bits.
    pub(super) mode: u16,
    /// Nobody may write it.
    pub(super) is_read_only: bool,
    /// It is a piece of a stream.
    pub(super) is_stream: bool,
    /// How its documents are told to be complete.
    pub(super) document: Option<document::Kind>,
}

/// Of every row of a class.
pub(super) fn rows(class: Class) -> Box<dyn Iterator<Item = Head>> {
    fn heads<O, C>(rows: &'static [Row<O, C>]) -> Box<dyn Iterator<Item = Head>> {
        Box::new(rows.iter().map(|row| Head {
            id: row.id,
            name: row.name,
            mode: row.mode,
            is_read_only: row.is_read_only(),
            is_stream: matches!(row.read, Read::Stream),
            document: row.document(),
        }))
    }
    with_rows!(class, |rows| heads(rows))
}

/// The rows that stand in the object's directory itself, with their names; or those in its directory of this name.
fn rows_in(class: Class, directory: Option<&'static str>) -> impl Iterator<Item = (Head, &'static str)> {
    rows(class).filter_map(move |head| {
        let name = match (directory, head.name.rsplit_once('/')) {
            (None, None) => head.name,
            (Some(directory), Some((parent, name))) if parent == directory => name,
            (None, Some(_)) | (Some(_), _) => return None,
        };
        Some((head, name))
    })
}

/// What comes and goes in one of an object's directories.
pub(super) fn keys(object: &Object, row: u8) -> Vec<KeyFile> {
    fn of<O, C>(rows: &'static [Row<O, C>], row: u8, object: &O) -> Vec<KeyFile> {
        find(rows, row).map(|row| row.keys(object)).unwrap_or_default()
    }
    with_table!(object, |rows, value| of(rows, row, value.as_ref()))
}

/// One of them.
pub(super) fn key(object: &Object, row: u8, serial: u32) -> Option<KeyFile> {
    keys(object, row).into_iter().find(|key| key.serial == serial)
}

/// What the entries of such a directory are.
pub(super) fn key_kind(class: Class, row: u8) -> Kind {
    fn of<O, C>(rows: &'static [Row<O, C>], row: u8) -> Kind {
        match find(rows, row).map(|row| &row.read) {
            Some(Read::Links(_)) => Kind::Symlink,
            Some(Read::Nested(_)) => Kind::Directory,
            Some(_) | None => Kind::File,
        }
    }
    with_rows!(class, |rows| of(rows, row))
}

/// The own mode of the files in such a directory.
pub(super) fn key_mode(class: Class, row: u8) -> u16 {
    rows(class).find(|head| head.id == row).map_or(0, |head| head.mode & 0o666)
}

/// The files of `metadata/`.
pub(super) fn metadata(keys: &Keys<String>) -> Vec<KeyFile> {
    let file = |(key, entry): (&str, &crate::model::keys::Entry<String>)| KeyFile {
        serial: entry.serial,
        name: super::value::escape(key),
        value: entry.value.clone(),
        writer: None,
    };
    keys.iter().map(file).collect()
}

impl Tree {
    /// A name in a directory of an object.
    pub(super) fn child(&self, parent: Node, name: &str) -> Option<Node> {
        let object = self.object(parent)?;
        let (class, number) = (object.class(), object.number());
        let row = rows_in(class, directory_name(parent)?).find(|(_, child)| *child == name);
        if let Some((head, _)) = row {
            return self.named(parent, &object, &head);
        }
        let key = match parent {
            Node::Attribute(_, _, row) => {
                let key = keys(&object, row).into_iter().find(|key| key.name == name);
                key.map(|key| Node::Key(class, number, row, key.serial))
            }
            _ => None,
        };
        key.or_else(|| self.scratch.lookup(parent, name).map(Node::Scratch))
    }

    /// The entries of a directory of an object after a cookie; cookies are row ids, serials, and temporary files' numbers.
    pub(super) fn children(
        &self,
        parent: Node,
        object: &Object,
        cookie: u64,
        each: &mut dyn FnMut(u64, &str, Node) -> bool,
    ) {
        let (class, number) = (object.class(), object.number());
        let Some(directory) = directory_name(parent) else { return };
        for (head, name) in rows_in(class, directory).filter(|(head, _)| u64::from(head.id) > cookie) {
            let Some(node) = self.named(parent, object, &head) else { continue };
            if !each(u64::from(head.id), name, node) {
                return;
            }
        }
        const KEYS: u64 = 1 << 8;
        if let Node::Attribute(_, _, row) = parent {
            let mut keys = keys(object, row);
            keys.sort_by_key(|key| key.serial);
            for key in keys {
                let position = KEYS + u64::from(key.serial);
                if position > cookie && !each(position, &key.name, Node::Key(class, number, row, key.serial)) {
                    return;
                }
            }
        }
        for (serial, name) in self.scratch.list(parent) {
            let position = (1 << 32) + serial;
            if position > cookie && !each(position, &name, Node::Scratch(serial)) {
                return;
            }
        }
    }

    /// The place that a row's name stands for now in a directory, if it exists.
    fn named(&self, directory: Node, object: &Object, head: &Head) -> Option<Node> {
        if head.is_stream {
            return self.piece(head.id, object);
        }
        let (class, number) = (object.class(), object.number());
        let node = match directory {
            Node::Key(_, _, _, serial) => Node::Key(class, number, head.id, serial),
            _ => Node::Attribute(class, number, head.id),
        };
        self.object_attributes(node, object).map(|_| node)
    }

    /// The names in a directory in which tools may make temporary files, which are told from misspelt names by them.
    pub(super) fn replaceable(&self, parent: Node) -> Option<Vec<String>> {
        match parent {
            Node::Object(class, _) => Some(rows_in(class, None).map(|(_, name)| name.to_owned()).collect()),
            Node::Attribute(class, _, row) if is_key_directory(class, row) => {
                let object = self.object(parent)?;
                Some(keys(&object, row).into_iter().map(|key| key.name).collect())
            }
            Node::Key(class, ..) => {
                let directory = directory_name(parent)?;
                Some(rows_in(class, directory).map(|(_, name)| name.to_owned()).collect())
            }
            _ => None,
        }
    }
}

/// The name by which the rows in a directory of an object are told: `Some(None)` for the object's own directory.
fn directory_name(node: Node) -> Option<Option<&'static str>> {
    match node {
        Node::Object(..) => Some(None),
        Node::Attribute(class, _, row) => rows(class).find(|head| head.id == row).map(|head| Some(head.name)),
        Node::Key(class, _, row, _) if key_kind(class, row) == Kind::Directory => {
            let directory = rows(class).find(|head| head.id == row)?.name;
            let inner = |head: Head| {
                let (parent, _) = head.name.rsplit_once('/')?;
                parent.strip_suffix("/*").filter(|outer| *outer == directory).map(|_| parent)
            };
            rows(class).find_map(inner).map(Some)
        }
        Node::Directory(_)
        | Node::File(..)
        | Node::Key(..)
        | Node::Events(_)
        | Node::NameLink(..)
        | Node::StateLink(..)
        | Node::Scratch(_) => None,
    }
}

fn is_key_directory(class: Class, row: u8) -> bool {
    fn is<O, C>(rows: &'static [Row<O, C>], row: u8) -> bool {
        find(rows, row).is_some_and(|row| matches!(row.read, Read::Keys(_)))
    }
    with_rows!(class, |rows| is(rows, row))
}
