//! What an attribute is: one row of a table. Dispatch, permissions, `docs/abi/` and the test that the mounted tree and
//! the document agree all come from these rows.

use uuid::Uuid;

use crate::model::Class;
use crate::model::domain::ConsoleDevice;
use crate::model::reason::Reason;
use crate::tree::reference::Resolver;
use crate::tree::{Kind, document};

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
    /// Groups' names: one a line, written separated by any whitespace.
    Groups,
    /// Several lines or a document of the named kind.
    Document(&'static str),
    /// A symlink.
    Link,
    /// Bulk data.
    Data,
    /// A directory.
    Directory,
}

/// An entry of a directory whose entries come and go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyFile {
    /// Its number in the directory, see [`crate::model::keys::Entry`].
    pub serial: u32,
    /// Its name, as a file name; of a file of [`Read::Entries`] the name of the directory that it lies in.
    pub name: String,
    /// Its value, without the newline; of a symlink the uuid of what it leads to, of a directory nothing.
    pub value: String,
    /// The group that writes it, besides those who may write everything in the directory.
    pub writer: Option<u32>,
}

/// Where a file's content comes from.
pub enum Read<O> {
    /// Write-only: size 0.
    Nothing,
    /// A value, rendered with its newline added.
    Value(fn(&O) -> String),
    /// A value that may not exist: then neither does the file.
    Sometimes(fn(&O) -> Option<String>),
    /// The path of an object in this tree, wherever it stands; empty for none.
    Place(fn(&O) -> Option<(Class, Uuid)>),
    /// A symlink's target, if it exists.
    Link(fn(&O) -> Option<String>),
    /// Lines or a document, rendered as they are.
    Document(fn(&O) -> String),
    /// The definition last seen, from the store.
    Definition,
    /// A piece of the console log.
    Stream,
    /// An image's bytes.
    Data,
    /// The path of a new socket that leads to a console, once.
    Console(ConsoleDevice),
    /// A directory of the files whose rows are named `<this>/<file>`.
    Directory,
    /// A directory of files that come and go.
    Keys(fn(&O) -> Vec<KeyFile>),
    /// A directory of symlinks that come and go.
    Links(fn(&O) -> Vec<KeyFile>),
    /// A directory of directories that come and go; the rows of their files are named `<this>/*/<file>`.
    Nested(fn(&O) -> Vec<KeyFile>),
    /// A file in each of those: its value there.
    Entries(fn(&O) -> Vec<KeyFile>),
    /// The key of an offer, which only who offered can read, and only for a while.
    OfferKey,
}

impl<O> Read<O> {
    /// What a row with it is in an object's directory.
    pub fn kind(&self) -> Kind {
        match self {
            Read::Link(_) => Kind::Symlink,
            Read::Directory | Read::Keys(_) | Read::Links(_) | Read::Nested(_) => Kind::Directory,
            Read::Nothing
            | Read::Value(_)
            | Read::Sometimes(_)
            | Read::Place(_)
            | Read::Document(_)
            | Read::Definition
            | Read::Stream
            | Read::Data
            | Read::Console(_)
            | Read::Entries(_)
            | Read::OfferKey => Kind::File,
        }
    }
}

/// What a write does.
pub enum Write<C> {
    /// Read-only for everybody, root too.
    Never,
    /// The value as a change; the resolver finds the objects that it names.
    Change(fn(&str, &Resolver<'_>) -> Result<C, Reason>),
    /// The same of an order that reads otherwise than it was written: no part of `spec.json`.
    Order(fn(&str, &Resolver<'_>) -> Result<C, Reason>),
    /// Bulk data.
    Data,
    /// A whole document, which is collected until it is complete.
    Document(fn(&str) -> Result<C, Reason>),
    /// The same in JSON.
    Json(fn(&[u8], &Resolver<'_>) -> Result<C, Reason>),
    /// A document that sets any of the object's values.
    Spec,
    /// The value of a file in this directory, with its name.
    Key(fn(&str, &str, &Resolver<'_>) -> Result<C, Reason>),
    /// The same where `spec.json` makes and removes the files.
    FreeKey {
        /// The value of a file, with its name.
        write: fn(&str, &str, &Resolver<'_>) -> Result<C, Reason>,
        /// The removal of one.
        remove: fn(&str) -> Result<C, Reason>,
    },
}

/// One row: a file in every object's directory of the class.
pub struct Row<O: 'static, C: 'static> {
    /// Fixed for ever: part of the inode number. 1 to 253.
    pub id: u8,
    /// The file's name; `<directory>/<file>` for one in a directory of the object's.
    pub name: &'static str,
    /// Permission bits; of a directory also those of its files, but for execution.
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

    /// How the documents written to it are told to be complete.
    pub fn document(&self) -> Option<document::Kind> {
        match self.write {
            Write::Spec | Write::Json(_) => Some(document::Kind::Json),
            Write::Document(_) => Some(document::Kind::Text),
            Write::Never | Write::Change(_) | Write::Order(_) | Write::Data | Write::Key(_) | Write::FreeKey { .. } => {
                None
            }
        }
    }

    /// Whether it can be written and has nothing to read.
    pub fn is_verb(&self) -> bool {
        matches!(self.read, Read::Nothing)
    }

    /// The files of the directory that this is, if they come and go.
    pub fn keys(&self, object: &O) -> Vec<KeyFile> {
        match &self.read {
            Read::Keys(keys) | Read::Links(keys) | Read::Nested(keys) | Read::Entries(keys) => keys(object),
            _ => Vec::new(),
        }
    }

    /// The object whose path it reads, if that is what it reads.
    pub fn place(&self, object: &O) -> Option<(Class, Uuid)> {
        match &self.read {
            Read::Place(place) => place(object),
            _ => None,
        }
    }

    /// Whether it is the key of an offer.
    pub fn is_offer_key(&self) -> bool {
        matches!(self.read, Read::OfferKey)
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.read.kind() == Kind::Directory
    }

    /// Whether the value is there, and is empty.
    pub fn reads_empty(&self, object: &O) -> bool {
        self.render(object).is_some_and(|value| value.trim_end().is_empty())
    }

    /// The rendered value, if it is one that is kept in the inventory.
    pub fn render(&self, object: &O) -> Option<String> {
        match &self.read {
            Read::Value(render) => Some(render(object) + "\n"),
            Read::Sometimes(render) => render(object).map(|value| value + "\n"),
            Read::Document(render) => Some(render(object)),
            Read::Nothing => Some(String::new()),
            _ => None,
        }
    }
}
