//! Temporary files and symlinks: what tools make next to an attribute in order to rename it over the attribute, and the directories by
//! which Puppet reserves such a file's name.
//!
//! They live in memory, belong to their creator, and are gone a minute after their last close. Nothing can be made in such
//! a directory.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::node::Node;
use super::{Data, FindCompletion, Kind, ReadCompletion};
use crate::image::extent::Find;
use crate::model::reason::Reason;
use crate::workflow::drafts_data::Leave;
use crate::workflow::request::Completion;

/// Bytes of one file.
pub const LARGEST: usize = 1 << 20;
/// Files and directories of one user in one directory.
pub const MOST: usize = 16;
/// How long a closed one stays.
pub const KEPT: Duration = Duration::from_secs(60);

struct File {
    parent: Node,
    name: String,
    uid: u32,
    kind: Kind,
    /// Of a symlink its target.
    content: Vec<u8>,
    open: usize,
    closed_at: Instant,
}

#[derive(Default)]
struct Files {
    files: HashMap<u64, File>,
    last: u64,
}

/// All temporary files of the tree.
#[derive(Clone, Default)]
pub struct Scratch {
    files: Arc<Mutex<Files>>,
}

/// Whether a name is one that tools use for replacing a file, in a directory whose attributes are `attributes`.
pub fn is_temporary<'a>(name: &str, attributes: impl Iterator<Item = &'a str>) -> bool {
    let tool = |prefix: &str, length: usize| name.strip_prefix(prefix).is_some_and(|rest| is_random(rest, length));
    // No attribute has a capital or a digit, so that a misspelt one is none of these.
    let perl = tool("", 8) && name.bytes().any(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit());
    (name.starts_with('.') && name.len() > 1)
        || name == "4913"
        || perl
        || tool("sed", 6)
        || tool("tmp", 8)
        || name.starts_with("__salt.tmp.")
        || after_attribute(name, attributes).is_some_and(|rest| {
            // Salt adds eight characters as Python's tempfile chooses them.
            let salt = is_random(rest, 8);
            salt || rest == "~" || rest.starts_with(|next: char| next == '.' || next.is_ascii_digit())
        })
}

fn is_random(part: &str, length: usize) -> bool {
    part.len() == length && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// What follows the attribute in a name that begins with one; with the longest, so that `locked_reasons` is a misspelt
/// `locked_reason` and no `locked` of Salt's.
fn after_attribute<'n, 'a>(name: &'n str, attributes: impl Iterator<Item = &'a str>) -> Option<&'n str> {
    attributes.filter_map(|attribute| name.strip_prefix(attribute)).min_by_key(|rest| rest.len())
}

/// Whether a name is one of a directory that is made to reserve a temporary file's name: `state20261122-1-x.lock` of Puppet.
pub fn is_reservation<'a>(name: &str, attributes: impl Iterator<Item = &'a str>) -> bool {
    let Some(reserved) = name.strip_suffix(".lock") else { return false };
    after_attribute(reserved, attributes).is_some_and(|rest| rest.starts_with(|next: char| next.is_ascii_digit()))
}

impl Scratch {
    /// Makes an empty file; the creator's handle is counted by [`Scratch::open`].
    pub fn create(&self, parent: Node, name: &str, uid: u32) -> Result<u64, Reason> {
        self.make(parent, name, uid, Kind::File, &[])
    }

    /// Makes a symlink.
    pub fn create_link(&self, parent: Node, name: &str, uid: u32, target: &str) -> Result<u64, Reason> {
        self.make(parent, name, uid, Kind::Symlink, target.as_bytes())
    }

    /// Makes a directory.
    pub fn make_directory(&self, parent: Node, name: &str, uid: u32) -> Result<u64, Reason> {
        self.make(parent, name, uid, Kind::Directory, &[])
    }

    fn make(&self, parent: Node, name: &str, uid: u32, kind: Kind, content: &[u8]) -> Result<u64, Reason> {
        let files = &mut *self.files.lock();
        files.files.retain(|_, file| !file.is_over());
        if files.files.values().any(|file| file.parent == parent && file.name == name) {
            return Err(Reason::Exists);
        }
        if files.files.values().filter(|file| file.parent == parent && file.uid == uid).count() >= MOST {
            return Err(Reason::ScratchQuota);
        }
        files.last += 1;
        let (name, content) = (name.to_owned(), content.to_vec());
        let file = File { parent, name, uid, kind, content, open: 0, closed_at: Instant::now() };
        files.files.insert(files.last, file);
        Ok(files.last)
    }

    /// A file by name.
    pub fn lookup(&self, parent: Node, name: &str) -> Option<u64> {
        let files = self.files.lock();
        let mut named = files.files.iter().filter(|(_, file)| file.parent == parent && file.name == name);
        named.find(|(_, file)| !file.is_over()).map(|(serial, _)| *serial)
    }

    /// The files of a directory.
    pub fn list(&self, parent: Node) -> Vec<(u64, String)> {
        let files = self.files.lock();
        let mut listed: Vec<_> = files
            .files
            .iter()
            .filter(|(_, file)| file.parent == parent && !file.is_over())
            .map(|(serial, file)| (*serial, file.name.clone()))
            .collect();
        listed.sort_unstable();
        listed
    }

    /// Creator and length.
    pub fn stat(&self, serial: u64) -> Option<(u32, Node, u64)> {
        let files = self.files.lock();
        files.files.get(&serial).map(|file| (file.uid, file.parent, file.content.len() as u64))
    }

    /// Where a symlink leads to.
    pub fn target(&self, serial: u64) -> Option<String> {
        let files = self.files.lock();
        let file = files.files.get(&serial).filter(|file| file.kind == Kind::Symlink)?;
        String::from_utf8(file.content.clone()).ok()
    }

    /// What it is.
    pub fn kind(&self, serial: u64) -> Option<Kind> {
        self.files.lock().files.get(&serial).map(|file| file.kind)
    }

    /// Its content.
    pub fn content(&self, serial: u64) -> Option<Vec<u8>> {
        self.files.lock().files.get(&serial).map(|file| file.content.clone())
    }

    /// Forgets it.
    pub fn remove(&self, serial: u64) {
        self.files.lock().files.remove(&serial);
    }

    /// Gives it another name in its directory, replacing a temporary file of that name.
    pub fn rename(&self, serial: u64, name: &str) {
        let files = &mut *self.files.lock();
        let Some(parent) = files.files.get(&serial).map(|file| file.parent) else { return };
        files.files.retain(|other, file| *other == serial || file.parent != parent || file.name != name);
        if let Some(file) = files.files.get_mut(&serial) {
            file.name = name.to_owned();
        }
    }

    /// A handle; the file stays for a minute after the last one is dropped.
    pub fn open(&self, serial: u64) -> Option<Handle> {
        self.files.lock().files.get_mut(&serial)?.open += 1;
        Some(Handle { files: self.files.clone(), serial })
    }
}

impl File {
    fn is_over(&self) -> bool {
        self.open == 0 && self.closed_at.elapsed() > KEPT
    }
}

/// An open temporary file.
pub struct Handle {
    files: Arc<Mutex<Files>>,
    serial: u64,
}

impl Handle {
    fn with<T>(&self, change: impl FnOnce(&mut Vec<u8>) -> Result<T, Reason>) -> Result<T, Reason> {
        match self.files.lock().files.get_mut(&self.serial) {
            Some(file) => change(&mut file.content),
            None => Err(Reason::StaleHandle),
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if let Some(file) = self.files.lock().files.get_mut(&self.serial) {
            file.open -= 1;
            file.closed_at = Instant::now();
        }
    }
}

fn within(end: Option<usize>) -> Result<usize, Reason> {
    end.filter(|end| *end <= LARGEST).ok_or(Reason::TooLarge)
}

impl Data for Handle {
    fn write_at(&self, offset: u64, bytes: &[u8], _leave: Leave, done: Completion) {
        done(self.with(|content| {
            let start = usize::try_from(offset).map_err(|_| Reason::TooLarge)?;
            let end = within(start.checked_add(bytes.len()))?;
            if content.len() < end {
                content.resize(end, 0);
            }
            content[start..end].copy_from_slice(bytes);
            Ok(())
        }));
    }

    fn read_at(&self, offset: u64, size: usize, done: ReadCompletion) {
        done(self.with(|content| {
            let start = usize::try_from(offset).unwrap_or(usize::MAX).min(content.len());
            Ok(content[start..content.len().min(start.saturating_add(size))].to_vec())
        }));
    }

    fn truncate(&self, length: u64, done: Completion) {
        done(self.with(|content| {
            content.resize(within(usize::try_from(length).ok())?, 0);
            Ok(())
        }));
    }

    fn allocate(&self, _offset: u64, _length: u64, _mode: i32, done: Completion) {
        done(Err(Reason::Unsupported("temporary files are not allocated in advance".into())));
    }

    fn find(&self, offset: u64, what: Find, done: FindCompletion) {
        done(self.with(|content| {
            let end = content.len() as u64;
            Ok((offset < end).then_some(match what {
                Find::Data => offset,
                Find::Hole => end,
            }))
        }));
    }

    fn sync(&self, done: Completion) {
        done(Ok(()));
    }

    fn flush(&self, done: Completion) {
        done(Ok(()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Class;

    const PARENT: Node = Node::Object(Class::Instance, 16);

    #[test]
    fn only_the_names_of_replacing_tools_are_temporary() {
        let attributes = ["state", "name", "state_reason"];
        let temporary = |name| is_temporary(name, attributes.into_iter());
        for name in [
            ".state.swp",
            ".x",
            "sedA1b2C3",
            "4913",
            "state~",
            "state.Xy12",
            "state1",
            "tmpabcd_123",
            "__salt.tmp.x",
            "kJx9qmQa",
            "stated52w1qqq",
            "state_reasonabcd_fgh",
        ] {
            assert!(temporary(name), "{name}");
        }
        for name in
            ["stat", "stated", "statex", ".", "sed12", "tmp", "lockd", "~", "metadata", "mEtadat", "state_reasons"]
        {
            assert!(!temporary(name), "{name}");
        }
        let reservation = |name| is_reservation(name, attributes.into_iter());
        assert!(reservation("state20261122-427-1dg9osu.lock"));
        for name in ["state.lock", "stat20261122-427-1dg9osu.lock", "state20261122-427-1dg9osu", ".lock", "1.lock"] {
            assert!(!reservation(name), "{name}");
        }
    }

    #[test]
    fn a_user_has_sixteen_files_in_a_directory_and_one_mebibyte_in_each() {
        let scratch = Scratch::default();
        for index in 0..MOST {
            scratch.create(PARENT, &format!(".{index}"), 7).expect("within the quota");
        }
        assert_eq!(scratch.create(PARENT, ".more", 7).expect_err("over the quota").errno(), libc::EDQUOT);
        let serial = scratch.create(PARENT, ".more", 8).expect("another user");
        let handle = scratch.open(serial).expect("exists");
        let (sender, outcome) = std::sync::mpsc::channel();
        handle.write_at(
            LARGEST as u64,
            &[1],
            Leave { early: true, here: true },
            Box::new(move |result| sender.send(result).expect("received")),
        );
        assert_eq!(outcome.recv().expect("answered").expect_err("too large").errno(), libc::EFBIG);
        assert_eq!(scratch.content(serial), Some(Vec::new()));
    }
    #[test]
    fn a_file_is_gone_a_minute_after_its_last_close_and_stays_while_it_is_open() {
        let scratch = Scratch::default();
        let serial = scratch.create(PARENT, ".x", 7).expect("made");
        let (first, second) = (scratch.open(serial), scratch.open(serial));
        let age = |seconds| {
            let long_ago = Instant::now().checked_sub(KEPT + Duration::from_secs(seconds)).expect("a time");
            scratch.files.lock().files.get_mut(&serial).expect("exists").closed_at = long_ago;
        };
        drop(first);
        age(1);
        assert_eq!(scratch.lookup(PARENT, ".x"), Some(serial), "it is still open");
        drop(second);
        assert_eq!(scratch.lookup(PARENT, ".x"), Some(serial), "its minute begins with the last close");
        age(1);
        assert_eq!(scratch.lookup(PARENT, ".x"), None);
        assert!(scratch.list(PARENT).is_empty());
        scratch.create(PARENT, ".x", 7).expect("the name is free");
        assert_eq!(scratch.content(serial), None, "its memory is given back");
    }
}
