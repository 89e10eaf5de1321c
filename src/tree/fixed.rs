//! The fixed directories: their entries and paths.

use std::path::PathBuf;

use super::node::{Directory, Node, words};
use super::root;
use crate::model::Class;

/// The classes that have a view by name; flavors live under theirs.
const NAMED: [Class; 3] = [Class::Instance, Class::Image, Class::Volume];

/// The classes that have a view by state.
const STATED: [Class; 4] = [Class::Instance, Class::Image, Class::Flavor, Class::Volume];

/// What always stands in a directory, in the order of its listing.
pub fn entries(directory: Directory) -> Vec<(String, Node)> {
    let named = |name: &str, directory| (name.to_owned(), Node::Directory(directory));
    let files = root::table(directory).iter().map(|row| (row.name.to_owned(), Node::File(directory, row.id)));
    let directories: Vec<_> = match directory {
        Directory::Root => Class::ALL
            .map(|class| named(class.directory(), Directory::Class(class)))
            .into_iter()
            .chain([
                named("trash", Directory::Trash),
                named("summary", Directory::Summary),
                named("by-name", Directory::ByName),
                named("by-state", Directory::ByState),
            ])
            .collect(),
        Directory::ByName => NAMED
            .map(|class| named(class.directory(), Directory::ByNameClass(class)))
            .into_iter()
            .chain([named("trash", Directory::ByNameTrash)])
            .collect(),
        Directory::ByState => STATED.map(|class| named(class.directory(), Directory::ByStateClass(class))).to_vec(),
        Directory::ByStateClass(class) => {
            (0..).zip(words(class)).map(|(index, word)| named(word, Directory::ByStateWord(class, index))).collect()
        }
        Directory::Class(_)
        | Directory::Trash
        | Directory::Summary
        | Directory::ByNameClass(_)
        | Directory::ByNameTrash
        | Directory::ByStateWord(..) => Vec::new(),
    };
    files.chain(directories).collect()
}

/// One of them by name.
pub fn lookup(directory: Directory, name: &str) -> Option<Node> {
    entries(directory).into_iter().find(|(entry, _)| entry == name).map(|(_, node)| node)
}

/// Below the mount point; empty for the root.
pub fn path(directory: Directory) -> PathBuf {
    match directory {
        Directory::Root => PathBuf::new(),
        Directory::Class(class) => class.directory().into(),
        Directory::Trash => "trash".into(),
        Directory::Summary => "summary".into(),
        Directory::ByName => "by-name".into(),
        Directory::ByNameClass(class) => PathBuf::from("by-name").join(class.directory()),
        Directory::ByNameTrash => "by-name/trash".into(),
        Directory::ByState => "by-state".into(),
        Directory::ByStateClass(class) => PathBuf::from("by-state").join(class.directory()),
        Directory::ByStateWord(class, word) => {
            let words = words(class);
            path(Directory::ByStateClass(class)).join(words.get(usize::from(word)).copied().unwrap_or_default())
        }
    }
}
