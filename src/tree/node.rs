//! The places of the tree, independent of their names, and their stable numbers.

use crate::model::task::TaskWord;
use crate::model::{Class, flavor, image, instance, volume};

/// A place. Objects are named by their number, attributes by the fixed id of their row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Node {
    /// A directory that always exists.
    Directory(Directory),
    /// A file of a fixed directory, by its row in that directory's table.
    File(Directory, u8),
    /// An object's directory.
    Object(Class, u64),
    /// A file or symlink in an object's directory, by its row in the class's table.
    Attribute(Class, u64, u8),
    /// A file in such a directory that comes and goes, by the directory's row and its own number there.
    Key(Class, u64, u8, u32),
    /// An object's symlink in `by-name`.
    NameLink(Class, u64),
    /// An object's symlink in `by-state`.
    StateLink(Class, u64),
    /// A file of the event log, by the number of its first line: `events` is another one after it was full.
    Events(u64),
    /// A temporary file.
    Scratch(u64),
}

/// The directories that always exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Directory {
    /// `/`
    Root,
    /// `/instances`, `/images`, `/tasks`
    Class(Class),
    /// `/trash`
    Trash,
    /// `/summary`
    Summary,
    /// `/by-name`
    ByName,
    /// `/by-name/<class>`
    ByNameClass(Class),
    /// `/by-name/trash`
    ByNameTrash,
    /// `/by-state`
    ByState,
    /// `/by-state/<class>`
    ByStateClass(Class),
    /// `/by-state/<class>/<state or task word>`, by its position in [`words`].
    ByStateWord(Class, u8),
}

/// The state and task words that have a directory under `by-state/<class>`. Tasks have no views.
pub fn words(class: Class) -> Vec<&'static str> {
    let tasks: &[TaskWord] = match class {
        Class::Instance => &[
            TaskWord::Building,
            TaskWord::Defining,
            TaskWord::Starting,
            TaskWord::Stopping,
            TaskWord::Pausing,
            TaskWord::Unpausing,
            TaskWord::Suspending,
            TaskWord::Resuming,
            TaskWord::Rebooting,
            TaskWord::Renaming,
            TaskWord::Deleting,
            TaskWord::Reconfiguring,
            TaskWord::SoftDeleting,
            TaskWord::Restoring,
            TaskWord::Shelving,
            TaskWord::ShelvingOffloading,
            TaskWord::Unshelving,
            TaskWord::Attaching,
            TaskWord::Detaching,
        ],
        Class::Image => &[TaskWord::Saving, TaskWord::Deleting, TaskWord::Importing],
        Class::Volume => &[
            TaskWord::Creating,
            TaskWord::Extending,
            TaskWord::Attaching,
            TaskWord::Detaching,
            TaskWord::Snapshotting,
            TaskWord::DeletingSnapshot,
            TaskWord::Examining,
            TaskWord::Deleting,
        ],
        Class::Task | Class::Flavor | Class::Transfer | Class::Backend => &[],
    };
    let states: Vec<&'static str> = match class {
        Class::Instance => instance::State::ALL.iter().map(|state| state.word()).collect(),
        Class::Image => image::State::ALL.iter().map(|state| state.word()).collect(),
        Class::Flavor => flavor::State::ALL.iter().map(|state| state.word()).collect(),
        Class::Volume => volume::State::ALL.iter().map(|state| state.word()).collect(),
        Class::Task | Class::Transfer | Class::Backend => Vec::new(),
    };
    // `building` is a state and a task of Nova's: one directory.
    let tasks = tasks.iter().map(|task| task.word()).filter(|word| !states.contains(word));
    states.iter().copied().chain(tasks).collect()
}

const FIELD_BITS: u32 = 8;
const SCRATCH: u64 = 1 << 62;
/// Below it, 30 bits of the object's number, 8 of the row, 23 of the serial.
const KEY: u64 = 1 << 61;
/// Not with [`KEY`], whose numbers reach as high.
const EVENTS: u64 = 1 << 60;
const SERIAL_BITS: u32 = 23;
const OBJECT_DIRECTORY: u8 = 0;
const NAME_LINK: u8 = 254;
const STATE_LINK: u8 = 255;
/// Fixed numbers below the first object: the root's own files, and one block a directory.
const ROOT: u64 = 1;
const BY_STATE_BASE: u64 = 8;
const OBJECTS: u64 = 16;

impl Directory {
    /// Position among the fixed directories; persistent, only ever appended to. Position 0 is the root.
    fn position(self) -> u64 {
        match self {
            Directory::Root => 0,
            Directory::Class(class) => 1 + class as u64,
            Directory::Trash => 16,
            Directory::Summary => 17,
            Directory::ByName => 18,
            Directory::ByNameTrash => 19,
            Directory::ByState => 20,
            Directory::ByNameClass(class) => 32 + class as u64,
            Directory::ByStateClass(class) => 48 + class as u64,
            Directory::ByStateWord(class, word) => ((BY_STATE_BASE + class as u64) << FIELD_BITS) | u64::from(word),
        }
    }

    fn from_position(position: u64) -> Option<Directory> {
        let class = |index: u64| Class::ALL.get(usize::try_from(index).ok()?).copied();
        match position {
            0 => Some(Directory::Root),
            1..16 => class(position - 1).map(Directory::Class),
            16 => Some(Directory::Trash),
            17 => Some(Directory::Summary),
            18 => Some(Directory::ByName),
            19 => Some(Directory::ByNameTrash),
            20 => Some(Directory::ByState),
            32..48 => class(position - 32).map(Directory::ByNameClass),
            48..64 => class(position - 48).map(Directory::ByStateClass),
            _ => None,
        }
    }
}

/// The number of the object that an inode belongs to.
pub fn object_number(inode: u64) -> Option<u64> {
    // The number does not depend on the class.
    Node::from_inode(inode, |_| Some(Class::Instance))?.object_number()
}

/// The stream that an inode is a file of: its number is the same for all files of one stream.
pub fn stream_of(inode: u64) -> Option<u64> {
    match Node::from_inode(inode, |_| Some(Class::Instance))? {
        Node::Events(_) => Some(EVENTS),
        Node::Key(class, number, row @ super::instance::CONSOLE_LOG, _) => {
            Some(Node::Attribute(class, number, row).inode())
        }
        Node::Key(..)
        | Node::Directory(_)
        | Node::File(..)
        | Node::Object(..)
        | Node::Attribute(..)
        | Node::NameLink(..)
        | Node::StateLink(..)
        | Node::Scratch(_) => None,
    }
}

/// Inode numbers: object number and row, so that they are stable across restarts without bookkeeping. Numbers below 16
/// are the fixed part: 0 the directories, 1 the files of the root, 2 those of `summary`, from 8 on `by-state`'s words.
impl Node {
    /// The row of the file that it is, or that it lies in.
    pub fn row(self) -> Option<u8> {
        match self {
            Node::Attribute(_, _, row) | Node::Key(_, _, row, _) => Some(row),
            Node::Directory(_)
            | Node::File(..)
            | Node::Events(_)
            | Node::Object(..)
            | Node::NameLink(..)
            | Node::StateLink(..)
            | Node::Scratch(_) => None,
        }
    }

    /// The number of the object that it belongs to.
    pub fn object_number(self) -> Option<u64> {
        match self {
            Node::Object(_, number)
            | Node::Attribute(_, number, _)
            | Node::Key(_, number, ..)
            | Node::NameLink(_, number)
            | Node::StateLink(_, number) => Some(number),
            Node::Directory(_) | Node::File(..) | Node::Events(_) | Node::Scratch(_) => None,
        }
    }

    /// The inode number; the root's is 1.
    pub fn inode(self) -> u64 {
        match self {
            Node::Directory(directory @ Directory::ByStateWord(..)) => directory.position(),
            Node::Directory(directory) => ROOT + directory.position(),
            Node::File(Directory::Summary, row) => (2 << FIELD_BITS) | u64::from(row),
            Node::File(_, row) => (1 << FIELD_BITS) | u64::from(row),
            Node::Object(_, number) => (number << FIELD_BITS) | u64::from(OBJECT_DIRECTORY),
            Node::Attribute(_, number, row) => (number << FIELD_BITS) | u64::from(row),
            Node::Key(_, number, row, serial) => {
                KEY | (((number << FIELD_BITS) | u64::from(row)) << SERIAL_BITS) | u64::from(serial)
            }
            Node::NameLink(_, number) => (number << FIELD_BITS) | u64::from(NAME_LINK),
            Node::StateLink(_, number) => (number << FIELD_BITS) | u64::from(STATE_LINK),
            Node::Events(first) => EVENTS | (first & (EVENTS - 1)),
            Node::Scratch(serial) => SCRATCH | serial,
        }
    }

    /// The place behind an inode number; `class` tells an object's class by its number.
    pub fn from_inode(inode: u64, class: impl FnOnce(u64) -> Option<Class>) -> Option<Node> {
        if inode & SCRATCH != 0 {
            return Some(Node::Scratch(inode & !SCRATCH));
        }
        if inode & KEY != 0 {
            let serial = u32::try_from(inode & ((1 << SERIAL_BITS) - 1)).ok()?;
            let place = (inode & !KEY) >> SERIAL_BITS;
            let number = place >> FIELD_BITS;
            return Some(Node::Key(class(number)?, number, u8::try_from(place & 0xff).ok()?, serial));
        }
        if inode & EVENTS != 0 {
            return Some(Node::Events(inode & !EVENTS));
        }
        let number = inode >> FIELD_BITS;
        let row = u8::try_from(inode & 0xff).ok()?;
        if number >= OBJECTS {
            let class = class(number)?;
            return Some(match row {
                OBJECT_DIRECTORY => Node::Object(class, number),
                NAME_LINK => Node::NameLink(class, number),
                STATE_LINK => Node::StateLink(class, number),
                row => Node::Attribute(class, number, row),
            });
        }
        match number {
            0 => Directory::from_position(inode.checked_sub(ROOT)?).map(Node::Directory),
            1 => Some(Node::File(Directory::Root, row)),
            2 => Some(Node::File(Directory::Summary, row)),
            BY_STATE_BASE.. => {
                let class = *Class::ALL.get(usize::try_from(number - BY_STATE_BASE).ok()?)?;
                (usize::from(row) < words(class).len()).then_some(Node::Directory(Directory::ByStateWord(class, row)))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_has_an_inode_number_of_its_own_that_leads_back() {
        let mut nodes = vec![Node::Scratch(7), Node::Events(7)];
        let fixed = [
            Directory::Root,
            Directory::Trash,
            Directory::Summary,
            Directory::ByName,
            Directory::ByNameTrash,
            Directory::ByState,
        ];
        nodes.extend(fixed.map(Node::Directory));
        for class in Class::ALL {
            nodes.extend([
                Node::Directory(Directory::Class(class)),
                Node::Directory(Directory::ByNameClass(class)),
                Node::Directory(Directory::ByStateClass(class)),
            ]);
            let count = u8::try_from(words(class).len()).expect("fits the inode scheme");
            nodes.extend((0..count).map(|word| Node::Directory(Directory::ByStateWord(class, word))));
        }
        for row in 1..=9 {
            nodes.extend([Node::File(Directory::Root, row), Node::File(Directory::Summary, row)]);
            nodes.push(Node::Attribute(Class::Image, 16, row));
        }
        nodes.extend([
            Node::Object(Class::Image, 16),
            Node::Key(Class::Image, 16, 19, 1),
            Node::Key(Class::Image, (1 << 30) - 1, 253, crate::model::keys::LARGEST_SERIAL),
            Node::NameLink(Class::Image, 16),
            Node::StateLink(Class::Image, 16),
        ]);
        let mut seen = std::collections::HashSet::new();
        for node in nodes {
            assert!(seen.insert(node.inode()), "{node:?} shares its inode number");
            assert_eq!(Node::from_inode(node.inode(), |_| Some(Class::Image)), Some(node));
        }
        assert_eq!(Node::Directory(Directory::Root).inode(), 1);
    }
}
