//! The published names: what lookup and readdir answer from.
//!
//! An object stands in up to three places. Where it *should* stand follows from the inventory; where it *does* stand is
//! here, and changes only when the kernel has been told by a MKDIR, RMDIR, RENAME, SYMLINK or UNLINK of its own, the
//! user's or the announcer's: a name that the kernel learns by a lookup first would never raise an event.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;

use parking_lot::RwLock;

use super::node::{Directory, Node};
use crate::model::Class;

/// One of the places of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Position {
    /// Its directory, in its class's directory.
    Home,
    /// Its symlink in `by-name`.
    Name,
    /// Its symlink in `by-state`.
    State,
}

impl Position {
    /// All of them, in the order in which a new object is published.
    pub const ALL: [Position; 3] = [Position::Home, Position::Name, Position::State];

    /// The place itself.
    pub fn node(self, class: Class, number: u64) -> Node {
        match self {
            Position::Home => Node::Object(class, number),
            Position::Name => Node::NameLink(class, number),
            Position::State => Node::StateLink(class, number),
        }
    }
}

/// A name in a directory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// The directory.
    pub directory: Directory,
    /// The name in it.
    pub name: String,
}

#[derive(Default)]
struct Entries {
    by_name: HashMap<String, u64>,
    by_number: BTreeMap<u64, (String, Node)>,
}

#[derive(Default)]
struct Table {
    directories: HashMap<Directory, Entries>,
    places: HashMap<Node, Place>,
}

/// See the module.
#[derive(Default)]
pub struct Names {
    table: RwLock<Table>,
}

impl Names {
    /// An empty table.
    pub fn new() -> Names {
        Names::default()
    }

    /// Where a place is published.
    pub fn published(&self, node: Node) -> Option<Place> {
        self.table.read().places.get(&node).cloned()
    }

    /// Moves a place to where it is published from now on; `None` removes it. `number` is its object's.
    pub fn publish(&self, node: Node, number: u64, place: Option<Place>) {
        let table = &mut *self.table.write();
        if let Some(old) = table.places.remove(&node)
            && let Some(entries) = table.directories.get_mut(&old.directory)
        {
            entries.by_number.remove(&number);
            if entries.by_name.get(&old.name) == Some(&number) {
                entries.by_name.remove(&old.name);
            }
        }
        if let Some(place) = place {
            let entries = table.directories.entry(place.directory).or_default();
            entries.by_name.insert(place.name.clone(), number);
            entries.by_number.insert(number, (place.name.clone(), node));
            table.places.insert(node, place);
        }
    }

    /// The class of an object of which any place is published.
    pub fn class(&self, number: u64) -> Option<Class> {
        let table = self.table.read();
        Class::ALL.into_iter().find(|class| {
            Position::ALL.into_iter().any(|position| table.places.contains_key(&position.node(*class, number)))
        })
    }

    /// A name in one of the directories whose entries are objects.
    pub fn lookup(&self, directory: Directory, name: &str) -> Option<Node> {
        let table = self.table.read();
        let entries = table.directories.get(&directory)?;
        let number = entries.by_name.get(name)?;
        entries.by_number.get(number).map(|(_, node)| *node)
    }

    /// The entries after a cookie; cookies are object numbers.
    pub fn list(&self, directory: Directory, cookie: u64, each: &mut dyn FnMut(u64, &str, Node) -> bool) {
        let table = self.table.read();
        let Some(entries) = table.directories.get(&directory) else { return };
        for (number, (name, node)) in entries.by_number.range((Bound::Excluded(cookie), Bound::Unbounded)) {
            if !each(*number, name, *node) {
                break;
            }
        }
    }
}
