//! Which part of a mounted tree a path means.

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use uuid::Uuid;

/// Directories in the root whose entries are objects; an id stands in one of them at a time.
pub const CLASSES: [&str; 7] = ["instances", "volumes", "images", "backups", "transfers", "tasks", "trash"];
/// The views whose last component is an id: `by-state/<class>/<word>/<uuid>`.
const BY_STATE: &str = "by-state";
/// The file that tells a tree of ours from any other directory.
const MARK: &str = "abi_version";

/// An absolute path without `.` and `..`, without asking the file system; what is before the tree's root is canonical
/// as far as it exists.
pub fn lexical(path: &Path) -> io::Result<PathBuf> {
    let absolute = std::path::absolute(path)?;
    let mut clean = PathBuf::new();
    for component in absolute.components() {
        match component {
            Component::ParentDir => drop(clean.pop()),
            Component::CurDir => {}
            Component::Normal(_) | Component::RootDir | Component::Prefix(_) => clean.push(component),
        }
    }
    Ok(clean)
}

/// Root, class and id in a path: `ROOT/<class>/<uuid>/...` or `ROOT/by-state/<class>/<word>/<uuid>`, where ROOT has our
/// mark.
pub fn locate(path: &Path) -> Option<(PathBuf, String, Uuid)> {
    let names: Vec<&OsStr> = path.iter().collect();
    (1..names.len()).rev().find_map(|index| {
        let id = identifier(names[index])?;
        let at = |back: usize| index.checked_sub(back).map(|index| names[index]);
        let class = |name: &OsStr| CLASSES.into_iter().find(|class| name == *class).map(str::to_owned);
        let (above, class) = match (at(1).and_then(class), at(2).and_then(class), at(3)) {
            (Some(class), _, _) => (1, class),
            (None, Some(class), Some(view)) if view == BY_STATE => (3, class),
            (None, _, _) => return None,
        };
        let root: PathBuf = names[..index - above].iter().collect();
        root.join(MARK).symlink_metadata().is_ok().then_some((root, class, id))
    })
}

/// Ids are canonical: lower case, with hyphens.
pub fn identifier(name: &OsStr) -> Option<Uuid> {
    let text = name.to_str()?;
    Uuid::parse_str(text).ok().filter(|id| id.to_string() == text)
}

/// The root of the tree that a canonical path lies in.
pub fn root_of(path: &Path) -> Option<&Path> {
    path.ancestors().find(|place| place.join(MARK).symlink_metadata().is_ok())
}

/// Whether the tree that was found on this device is still there: absent in a tree that is gone means nothing.
pub fn is_there(root: &Path, device: u64) -> bool {
    root.join(MARK).symlink_metadata().is_ok() && root.metadata().is_ok_and(|metadata| metadata.dev() == device)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn objects_are_located_by_their_paths() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        fs::write(root.join(MARK), "1\n").unwrap();
        let id = "0d8c5a0e-6f2b-4d7c-9a53-1f6f5b2f9a11";
        let expect = |path: &str, class: &str| {
            let found = locate(&root.join(path)).unwrap();
            assert_eq!(found, (root.to_owned(), class.to_owned(), id.parse().unwrap()), "{path}");
        };
        expect(&format!("instances/{id}"), "instances");
        expect(&format!("instances/{id}/state"), "instances");
        expect(&format!("trash/{id}/metadata/key"), "trash");
        expect(&format!("by-state/images/draft/{id}"), "images");
        for path in ["instances", "README", "instances/x/state", &format!("elsewhere/{id}")] {
            assert_eq!(locate(&root.join(path)), None, "{path}");
        }
    }

    #[test]
    fn a_directory_that_only_looks_like_a_tree_is_none() {
        let root = tempfile::tempdir().unwrap();
        let id = "0d8c5a0e-6f2b-4d7c-9a53-1f6f5b2f9a11";
        assert_eq!(locate(&root.path().join("instances").join(id)), None);
    }
}
