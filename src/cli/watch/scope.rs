//! Which part of a tree is watched.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::WatchError;
use super::line::Line;
use crate::cli::mountpoint::mounts_of_ours;
use crate::cli::place::{CLASSES, lexical, locate, root_of};
use crate::model::Class;

/// A part of a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    /// The tree.
    pub root: PathBuf,
    /// Of the root.
    pub device: u64,
    /// The part.
    pub part: Part,
}

/// What a path means.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// Everything.
    Tree,
    /// All objects of a class.
    Class(Class),
    /// One object, wherever it is moved.
    Object(Uuid),
    /// One task.
    Task(Uuid),
    /// One file of an object, by its path in the object's directory.
    Attribute(Uuid, PathBuf),
    /// Any other file, by its path in the tree.
    File(PathBuf),
    /// The entries and files of any other directory, by its path in the tree.
    Directory(PathBuf),
}

impl Scope {
    /// What is watched where nobody says what.
    pub fn usual() -> Result<Scope, WatchError> {
        let here = std::env::current_dir().and_then(|path| path.canonicalize());
        if let Some(root) = here.ok().as_deref().and_then(root_of) {
            return Scope::of(root.to_owned(), Part::Tree);
        }
        let mut mounts = mounts_of_ours().map_err(WatchError::Searching)?;
        match (mounts.pop(), mounts.is_empty()) {
            (None, _) => Err(WatchError::NoTree),
            (Some(only), true) => Scope::of(only.path, Part::Tree),
            (Some(last), false) => {
                let paths: Vec<String> =
                    mounts.iter().chain([&last]).map(|mount| mount.path.display().to_string()).collect();
                Err(WatchError::SeveralTrees(paths.join(", ")))
            }
        }
    }

    /// What `path` means.
    pub fn find(path: &Path) -> Result<Scope, WatchError> {
        let unreadable = |source| WatchError::Unreadable { file: path.to_owned(), source };
        let canonical = match path.canonicalize() {
            Ok(canonical) => canonical,
            // An id says which object is meant even when it has left this state's directory.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let clean = lexical(path).map_err(unreadable)?;
                let Some((root, _, id)) = locate(&clean) else { return Err(WatchError::Absent(path.to_owned())) };
                if !CLASSES.iter().any(|class| root.join(class).join(id.to_string()).exists()) {
                    return Err(WatchError::Absent(path.to_owned()));
                }
                return Scope::of(root, Part::Object(id));
            }
            Err(error) => return Err(unreadable(error)),
        };
        let root = root_of(&canonical).ok_or_else(|| WatchError::NotInTree(path.to_owned()))?.to_owned();
        let inside = canonical.strip_prefix(&root).unwrap_or(&canonical).to_owned();
        let part = match locate(&canonical) {
            Some((_, class, id)) => {
                let file = inside.strip_prefix(Path::new(&class).join(id.to_string())).unwrap_or(Path::new(""));
                match file.as_os_str().is_empty() {
                    true if class == Class::Task.directory() => Part::Task(id),
                    true => Part::Object(id),
                    false => Part::Attribute(id, file.to_owned()),
                }
            }
            None if inside.as_os_str().is_empty() => Part::Tree,
            None if canonical.is_dir() => match classes().find(|class| inside == Path::new(class.directory())) {
                Some(class) => Part::Class(class),
                None => Part::Directory(inside),
            },
            None => Part::File(inside),
        };
        Scope::of(root, part)
    }

    fn of(root: PathBuf, part: Part) -> Result<Scope, WatchError> {
        match root.metadata() {
            Ok(metadata) => Ok(Scope { device: metadata.dev(), root, part }),
            Err(source) => Err(super::explained(WatchError::Unreadable { file: root.clone(), source }, &root, 0)),
        }
    }
}

/// The classes whose objects people make and change.
fn classes() -> impl Iterator<Item = Class> {
    Class::ALL.into_iter().filter(|class| *class != Class::Task)
}

/// Whether `summary/` tells of a class.
pub fn is_summarised(class: Class) -> bool {
    match class {
        Class::Instance | Class::Image | Class::Volume => true,
        Class::Task | Class::Flavor | Class::Transfer | Class::Backend => false,
    }
}

impl Part {
    /// Whether `events` has what is asked for. A value by itself changes more often than somebody changes it, and of
    /// names and links it says nothing.
    pub fn is_told_by_events(&self) -> bool {
        match self {
            Part::Tree | Part::Class(_) | Part::Object(_) => true,
            Part::Task(_) | Part::Attribute(..) | Part::File(_) | Part::Directory(_) => false,
        }
    }

    /// Whether a line of `events` belongs to it.
    pub fn has(&self, line: &Line) -> bool {
        match self {
            Part::Tree => true,
            Part::Class(class) => line.class.as_deref() == Some(class.noun()),
            Part::Object(id) => line.uuid == Some(*id),
            Part::Task(_) | Part::Attribute(..) | Part::File(_) | Part::Directory(_) => false,
        }
    }
}
