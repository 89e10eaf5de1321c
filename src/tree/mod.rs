//! The interface: the only room that knows names, modes and text.
//!
//! It knows no FUSE: the room above translates requests into these calls and hands over completions.

pub mod abi;
pub mod account;
pub mod attribute;
pub mod backend;
mod bin;
mod changes;
mod content;
mod directory;
pub mod document;
mod errors;
mod fixed;
pub mod flavor;
pub mod image;
pub mod instance;
pub mod interface;
mod json;
mod links;
mod metrics;
pub mod names;
pub mod node;
mod offer;
mod order;
pub mod reference;
mod rename;
pub mod rights;
pub mod root;
mod rows;
mod schema;
mod scratch;
mod spec;
mod stat;
mod tables;
mod target;
pub mod task;
pub mod transfer;
pub mod value;
mod view;
pub mod volume;
mod write;

use std::path::PathBuf;
use std::sync::Arc;

use crate::image::extent::Find;
use crate::inventory::Change;
use crate::model::Class;
use crate::model::caller::Caller;
use crate::model::reason::Reason;
use crate::model::secret::Secret;
use crate::workflow::console_log::OpenPiece;
pub use crate::workflow::drafts_data::FindCompletion;
use crate::workflow::drafts_data::{DraftData, Leave};
use crate::workflow::request::Completion;
pub use interface::{Settings, Tree};
pub use names::{Names, Place, Position};
pub use node::{Directory, Node, object_number, stream_of};
pub use rights::{Admission, Grant};

/// What `stat` says of a place, but for times and inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Directory, file or symlink.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Exact length of what a read returns; of a symlink its target's.
    pub size: u64,
    /// Of bulk data: how many bytes of it take space on the disk, which is sparse if they are fewer than `size`.
    pub allocated: Option<u64>,
    /// How the kernel may cache and how its bytes are served.
    pub caching: Caching,
    /// Unix seconds: the time of a place that has not changed since the daemon started.
    pub time: u64,
}

/// What a place is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symlink.
    Symlink,
}

/// How the kernel may cache a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caching {
    /// Names and attributes until invalidated; content never (direct I/O).
    Attributes,
    /// Nothing, not even names: temporary files, `/last_error` (whose content depends on who asks).
    Nothing,
    /// Everything: content that never changes.
    Everything,
}

/// What an open file serves.
#[derive(Clone, Debug)]
pub enum Content {
    /// One version, to be served until offset 0 is read again.
    Snapshot(Arc<[u8]>),
    /// The same of a secret, which is overwritten in memory when nobody holds it any more.
    Secret(Arc<Secret>),
    /// A file on disk that only grows, read live (`events`), or never changes (an active image).
    File(Arc<std::fs::File>),
    /// The data of an image draft, read live.
    Draft(Arc<std::fs::File>, Arc<DraftData>),
    /// A piece of a console log, read live.
    Piece(OpenPiece),
}

/// Answers a request that creates or finds a place.
pub type NodeCompletion = Box<dyn FnOnce(Result<Node, Reason>) + Send>;

/// An attribute that reads differently since a change, and where it lies below the mount point.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Touched {
    /// The file.
    pub node: Node,
    /// Its path relative to the root.
    pub path: PathBuf,
}

/// The caller as the kernel names him, before anything is looked up: cheap.
pub type CallerOf<'a> = &'a dyn Fn() -> Caller;

/// What a write is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenFile {
    /// The place.
    pub node: Node,
    /// The owner's generation when it was opened.
    pub generation: u32,
    /// A good value was written through this handle before: a lone newline after it is ignored.
    pub written: bool,
}

/// The interface.
pub trait Interface: Send + Sync {
    /// Attributes of a place that exists.
    fn attributes(&self, node: Node) -> Option<Attributes>;
    /// The place behind an inode number.
    fn node(&self, inode: u64) -> Option<Node>;
    /// A name in a directory, as far as it is published.
    fn lookup(&self, parent: Node, name: &str) -> Option<Node>;
    /// The entries of a directory after `cookie` (0: from the beginning), in a stable order, until `each` returns
    /// false. Cookies are stable while entries come and go.
    fn list(&self, directory: Node, cookie: u64, each: &mut dyn FnMut(u64, &str, Node) -> bool) -> Result<(), Reason>;
    /// The target of a symlink.
    fn target(&self, node: Node) -> Option<String>;
    /// What reading gives now. `uid` matters for `/last_error` and for consoles.
    fn content(&self, node: Node, uid: u32) -> Result<Content, Reason>;
    /// What single groups may beyond the mode of [`Interface::attributes`].
    fn grants(&self, node: Node) -> Vec<Grant>;
    /// What the rights to all places of the same object follow from.
    fn admission(&self, node: Node) -> Admission;
    /// A place of the object whose rights a write to this place can change: its own, or what is offered.
    fn governed(&self, node: Node) -> Node {
        node
    }
    /// The owner's generation, for [`OpenFile::generation`].
    fn generation(&self, node: Node) -> u32;
    /// Whether the caller may open a file as far as the kernel cannot tell: it knows one group a file.
    fn may_open(&self, node: Node, caller: CallerOf<'_>) -> bool;
    /// Whether opening for writing is refused for everybody but an announcement.
    fn is_read_only(&self, node: Node) -> bool;
    /// How a file's documents are told to be complete; `None` for files of one value, of which each write is one.
    fn document(&self, node: Node) -> Option<document::Kind>;
    /// Remembers that a write was refused before it came here, and answers with it.
    fn refuse(&self, node: Node, caller: &Caller, reason: Reason, done: Completion);
    /// One write(2) of a value, or one whole document: one command. Answers when the tree says so.
    fn write(&self, file: OpenFile, caller: Caller, bytes: &[u8], done: Completion);
    /// mkdir by a user.
    fn make_directory(self: Arc<Self>, parent: Node, name: &str, caller: Caller, done: NodeCompletion);
    /// rmdir by a user.
    fn remove_directory(self: Arc<Self>, parent: Node, name: &str, caller: Caller, done: Completion);
    /// unlink by a user.
    fn unlink(&self, parent: Node, name: &str, caller: Caller) -> Result<(), Reason>;
    /// symlink by a user.
    fn symlink(self: Arc<Self>, parent: Node, name: &str, target: &str, caller: Caller, done: NodeCompletion);
    /// rename by a user.
    fn rename(self: Arc<Self>, from: (Node, &str), to: (Node, &str), caller: Caller, done: Completion);
    /// create by a user: a temporary file, or a refusal.
    fn create(&self, parent: Node, name: &str, caller: Caller) -> Result<Node, Reason>;
    /// Opens an image's `data` that is still a draft's for writing, or a temporary file; `None` for every other place,
    /// which is read by [`Interface::content`]. Held until the kernel releases
    /// the handle: a commit waits for the writers.
    fn open_data(&self, node: Node, caller: Caller, writing: bool) -> Option<Result<Arc<dyn Data>, Reason>>;
    /// The attributes that read differently since a change.
    fn touched(&self, change: &Change) -> Vec<Touched>;
    /// The places of objects whose wanted name may differ since a change.
    fn moved(&self, change: &Change) -> Vec<(Class, u64, Position)>;
    /// Where a place should be published now; `None` if nowhere.
    fn wanted(&self, class: Class, number: u64, position: Position) -> Option<Place>;
    /// Where places are published.
    fn names(&self) -> &Names;
    /// The path of a directory below the mount point, relative; empty for the root.
    fn directory_path(&self, directory: Directory) -> PathBuf;
}

/// Answers a read of bulk data.
pub type ReadCompletion = Box<dyn FnOnce(Result<Vec<u8>, Reason>) + Send>;

/// The bulk data of an image draft; every call returns at once and is carried out in order by a thread of its own.
pub trait Data: Send + Sync {
    /// Writes all bytes at the offset.
    fn write_at(&self, offset: u64, bytes: &[u8], leave: Leave, done: Completion);
    /// Reads up to `size` bytes.
    fn read_at(&self, offset: u64, size: usize, done: ReadCompletion);
    /// Sets the length.
    fn truncate(&self, length: u64, done: Completion);
    /// fallocate(2), with its mode; `EOPNOTSUPP` where it is not possible.
    fn allocate(&self, offset: u64, length: u64, mode: i32, done: Completion);
    /// Where from `offset` on the next data or hole begins; `None`: there is none, or the end comes before.
    fn find(&self, offset: u64, what: Find, done: FindCompletion);
    /// Returns when everything written so far is on disk.
    fn sync(&self, done: Completion);
    /// A descriptor of it was closed. Says whether everything that was acknowledged was written.
    fn flush(&self, done: Completion);
}
