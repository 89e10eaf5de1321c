//! What an attribute is: one row of a table. Dispatch, permissions, `docs/abi/` and the test that the mounted tree and
//! the document agree all come from these rows.

use std::path::PathBuf;

use crate::model::reason::Reason;
use crate::tree::reference::Resolver;

/// The type column of the documentation, and what `--help` of a file would say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// Free text of one line.
    Text,
    /// `0` or `1`.
    Boolean,
    /// A word of a fixed set.
    Word,
    /// A decimal in the given unit.
    Number(&'static str),
    /// Unix seconds, UTC.
    Time,
    /// An object: written as uuid, unique name or path; read as uuid.
    Object,
    /// A user's name.
    User,
    /// A group's name.
    Group,
    /// Several lines or a document of the named kind.
    Document(&'static str),
    /// A symlink.
    Link,
    /// Bulk data.
    Data,
}

/// Where a file's content comes from.
pub enum Read<O> {
    /// Write-only: size 0.
    Nothing,
    /// A value, rendered with its newline added.
    Value(fn(&O) -> String),
    /// A value that may not exist: then neither does the file.
    Sometimes(fn(&O) -> Option<String>),
    /// A symlink's target, if it exists.
    Link(fn(&O) -> Option<String>),
    /// Lines or a document, rendered as they are.
    Document(fn(&O) -> String),
    /// The definition last seen, from the store.
    Definition,
    /// A file on disk that only grows.
    Stream(fn(&O) -> Option<PathBuf>),
    /// An image's bytes.
    Data,
}

/// What a write does.
pub enum Write<C> {
    /// Read-only for everybody, root too.
    Never,
    /// The value as a change; the resolver finds the objects that it names.
    Change(fn(&str, &Resolver<'_>) -> Result<C, Reason>),
    /// Bulk data.
    Data,
}

/// One row: a file in every object's directory of the class.
pub struct Row<O: 'static, C: 'static> {
    /// Fixed for ever: part of the inode number. 1 to 253.
    pub id: u8,
    /// The file's name.
    pub name: &'static str,
    /// Permission bits.
    pub mode: u16,
    /// Its type.
    pub kind: Type,
    /// Where its content comes from.
    pub read: Read<O>,
    /// What a write does.
    pub write: Write<C>,
    /// One paragraph for the documentation.
    pub description: &'static str,
}

impl<O, C> Row<O, C> {
    /// Whether opening for writing is refused for everybody.
    pub fn is_read_only(&self) -> bool {
        matches!(self.write, Write::Never)
    }

    /// The rendered value, if it is one that is kept in the inventory.
    pub fn render(&self, object: &O) -> Option<String> {
        match &self.read {
            Read::Value(render) => Some(render(object) + "\n"),
            Read::Sometimes(render) => render(object).map(|value| value + "\n"),
            Read::Document(render) => Some(render(object)),
            Read::Nothing => Some(String::new()),
            Read::Link(_) | Read::Definition | Read::Stream(_) | Read::Data => None,
        }
    }
}
