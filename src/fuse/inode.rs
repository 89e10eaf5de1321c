//! What the kernel is told of a place: its attributes, and for how long it may believe them.

use std::time::{Duration, SystemTime};

use fuser::{FileAttr, FileType, INodeNo};

use crate::tree::{Attributes, Caching, Kind, Node};

/// "Until we say otherwise."
const LONG: Duration = Duration::from_secs(24 * 60 * 60);
const BLOCK: u64 = 512;
/// Largest write that the kernel may send; what cp and others therefore best write at a time.
pub const LARGEST_WRITE: u32 = 1 << 20;
const PAGE: u32 = 4096;

/// How long the kernel may believe names and attributes.
pub fn lifetime(caching: Caching) -> Duration {
    match caching {
        Caching::Attributes | Caching::Everything => LONG,
        Caching::Nothing => Duration::ZERO,
    }
}

/// All inodes that an object can have, but for those that the kernel does not remember.
pub fn object_inodes(number: u64) -> std::ops::RangeInclusive<u64> {
    number << 8..=number << 8 | 0xff
}

/// The kind, for directory entries.
pub fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::File => FileType::RegularFile,
        Kind::Symlink => FileType::Symlink,
    }
}

/// Attributes as the kernel wants them; `changed` is when the place changed last, if since the start.
pub fn attributes(node: Node, attributes: &Attributes, changed: Option<SystemTime>) -> FileAttr {
    let time = changed.unwrap_or_else(|| SystemTime::UNIX_EPOCH + Duration::from_secs(attributes.time));
    FileAttr {
        ino: INodeNo(node.inode()),
        size: attributes.size,
        blocks: attributes.allocated.unwrap_or(attributes.size).div_ceil(BLOCK),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: SystemTime::UNIX_EPOCH,
        kind: file_type(attributes.kind),
        perm: attributes.mode & 0o7777,
        nlink: match attributes.kind {
            // A rename over a file takes one away; at 0 every watch on the file would end.
            Kind::File => 2,
            // 1 says of a directory that its subdirectories are not counted.
            Kind::Directory | Kind::Symlink => 1,
        },
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: 0,
        blksize: if attributes.allocated.is_some() { LARGEST_WRITE } else { PAGE },
        flags: 0,
    }
}

/// What is left of an object's place between its end and the replay of its removal, whose path has to be found.
pub fn remains(node: Node) -> Option<Attributes> {
    let (kind, mode) = match node {
        Node::Object(..) => (Kind::Directory, 0o500),
        Node::NameLink(..) | Node::StateLink(..) => (Kind::Symlink, 0o777),
        Node::Directory(_)
        | Node::File(..)
        | Node::Attribute(..)
        | Node::Key(..)
        | Node::Events(_)
        | Node::Scratch(_) => {
            return None;
        }
    };
    Some(Attributes { kind, mode, uid: 0, gid: 0, size: 0, allocated: None, caching: Caching::Nothing, time: 0 })
}
