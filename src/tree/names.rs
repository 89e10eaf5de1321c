//! The published names: what lookup and readdir answer from.
//!
//! An object stands in up to three places, two of which may be in one directory for a moment: a link that was moved into
//! the bin, and the object that follows it. Where it *should* stand follows from the inventory; where it *does* stand is
//! here, and changes only when the kernel has been told by a MKDIR, RMDIR, RENAME, SYMLINK or UNLINK of its own, the
//! user's or the announcer's: a name that the kernel learns by a lookup first would never raise an event.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Condvar, Mutex, RwLock};

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

    /// Which of an object's places a node is, and which object's, if it is one.
    fn of(node: Node) -> Option<(Position, Class, u64)> {
        match node {
            Node::Object(class, number) => Some((Position::Home, class, number)),
            Node::NameLink(class, number) => Some((Position::Name, class, number)),
            Node::StateLink(class, number) => Some((Position::State, class, number)),
            Node::Directory(_)
            | Node::File(..)
            | Node::Attribute(..)
            | Node::Key(..)
            | Node::Events(_)
            | Node::Scratch(_) => None,
        }
    }

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
    by_name: HashMap<Arc<str>, u64>,
    by_cookie: BTreeMap<u64, (Arc<str>, Node)>,
}

/// The cookie of a place: the same wherever it stands.
fn cookie(position: Position, number: u64) -> u64 {
    (number << 2) | position as u64
}

/// Where an object is published, by its positions.
struct Standing {
    class: Class,
    places: [Option<(Directory, Arc<str>)>; Position::ALL.len()],
}

#[derive(Default)]
struct Table {
    directories: HashMap<Directory, Entries>,
    /// By the object's number.
    objects: HashMap<u64, Standing>,
}

/// See the module.
#[derive(Default)]
pub struct Names {
    table: RwLock<Table>,
    /// Names that came; who waits for one looks again with each.
    came: Mutex<u64>,
    coming: Condvar,
}

impl Names {
    /// An empty table.
    pub fn new() -> Names {
        Names::default()
    }

    /// Where a place is published.
    pub fn published(&self, node: Node) -> Option<Place> {
        let (position, class, number) = Position::of(node)?;
        let table = self.table.read();
        let standing = table.objects.get(&number).filter(|standing| standing.class == class)?;
        let (directory, name) = standing.places[position as usize].as_ref()?;
        Some(Place { directory: *directory, name: name.as_ref().to_owned() })
    }

    /// Moves a place to where it is published from now on; `None` removes it. Other nodes have no place.
    pub fn publish(&self, node: Node, place: Option<Place>) {
        self.set(node, place);
        // After the table is free again: whoever waits looks into it.
        *self.came.lock() += 1;
        self.coming.notify_all();
    }

    fn set(&self, node: Node, place: Option<Place>) {
        let Some((position, class, number)) = Position::of(node) else { return };
        let Table { directories, objects } = &mut *self.table.write();
        let cookie = cookie(position, number);
        let standing = objects.entry(number).or_insert_with(|| Standing { class, places: Default::default() });
        if let Some((directory, name)) = standing.places[position as usize].take()
            && let Some(entries) = directories.get_mut(&directory)
        {
            entries.by_cookie.remove(&cookie);
            if entries.by_name.get(&name) == Some(&cookie) {
                entries.by_name.remove(&name);
            }
        }
        if let Some(Place { directory, name }) = place {
            let name: Arc<str> = name.into();
            let entries = directories.entry(directory).or_default();
            entries.by_name.insert(name.clone(), cookie);
            entries.by_cookie.insert(cookie, (name.clone(), node));
            standing.places[position as usize] = Some((directory, name));
        } else if standing.places.iter().all(Option::is_none) {
            objects.remove(&number);
        }
    }

    /// Waits until a place is published, or until then. Whether it is.
    pub fn wait(&self, node: Node, until: Instant) -> bool {
        let mut came = self.came.lock();
        while self.published(node).is_none() {
            if self.coming.wait_until(&mut came, until).timed_out() {
                return self.published(node).is_some();
            }
        }
        true
    }

    /// The class of an object of which any place is published.
    pub fn class(&self, number: u64) -> Option<Class> {
        self.table.read().objects.get(&number).map(|standing| standing.class)
    }

    /// A name in one of the directories whose entries are objects.
    pub fn lookup(&self, directory: Directory, name: &str) -> Option<Node> {
        let table = self.table.read();
        let entries = table.directories.get(&directory)?;
        let cookie = entries.by_name.get(name)?;
        entries.by_cookie.get(cookie).map(|(_, node)| *node)
    }

    /// The entries after a cookie.
    pub fn list(&self, directory: Directory, cookie: u64, each: &mut dyn FnMut(u64, &str, Node) -> bool) {
        let table = self.table.read();
        let Some(entries) = table.directories.get(&directory) else { return };
        for (cookie, (name, node)) in entries.by_cookie.range((Bound::Excluded(cookie), Bound::Unbounded)) {
            if !each(*cookie, name, *node) {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_and_its_link_stand_side_by_side_in_the_bin_and_leave_it_alone() {
        let names = Names::new();
        let at = |directory, name: &str| Some(Place { directory, name: name.to_owned() });
        let (home, link) = (Node::Object(Class::Image, 16), Node::NameLink(Class::Image, 16));
        names.publish(link, at(Directory::Trash, "web"));
        names.publish(home, at(Directory::Trash, "uuid"));
        let mut listed = Vec::new();
        names.list(Directory::Trash, 0, &mut |_, name, node| {
            listed.push((name.to_owned(), node));
            true
        });
        assert_eq!(listed, [("uuid".to_owned(), home), ("web".to_owned(), link)]);
        names.publish(link, at(Directory::ByNameTrash, "web"));
        assert_eq!(names.lookup(Directory::Trash, "web"), None);
        assert_eq!(names.lookup(Directory::Trash, "uuid"), Some(home));
        // A link that was moved there under the very name that its object comes under.
        names.publish(link, at(Directory::Class(Class::Image), "uuid"));
        names.publish(link, at(Directory::Trash, "uuid"));
        names.publish(home, at(Directory::Trash, "uuid"));
        names.publish(link, at(Directory::ByNameTrash, "uuid"));
        assert_eq!(names.lookup(Directory::Trash, "uuid"), Some(home));
        assert_eq!(names.published(link), at(Directory::ByNameTrash, "uuid"));
    }
}
