//! An object in the mounted tree, wherever it goes.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::statfs::{FUSE_SUPER_MAGIC, fstatfs};
use uuid::Uuid;

use super::super::place::{CLASSES, identifier, is_there, lexical, locate};
use super::verdict::Goal;

const TASKS: &str = "tasks";
/// Values are lines; documents are not read here.
const MAX_VALUE: usize = 64 * 1024;

/// Why nothing can be said about an object.
#[derive(Debug, thiserror::Error)]
pub enum WaitError {
    /// Nothing of that name.
    #[error("there is no such object")]
    NoObject,
    /// Somewhere else in the file system, or a directory of the tree that is no object.
    #[error("this is no object of an instancefs tree; name its directory, a file in it, or a link to it")]
    NotInTree,
    /// The tree went away.
    #[error("the tree {0} is not mounted any more, so nothing can be said about the object")]
    TreeGone(PathBuf),
    /// A file cannot be read.
    #[error("{file} cannot be read")]
    Unreadable {
        /// The file.
        file: String,
        /// Why.
        source: io::Error,
    },
    /// poll(2) failed.
    #[error("poll failed")]
    Poll(#[source] Errno),
}

/// The files that tell what goes on, as they were opened.
#[derive(Debug)]
struct Files {
    /// Absent in objects that are tasks themselves.
    task: Option<File>,
    state: File,
}

/// An object, found by its id.
#[derive(Debug)]
pub struct Object {
    root: PathBuf,
    /// Of the root: an unmounted tree is no empty tree.
    device: u64,
    class: String,
    id: Uuid,
    has_poll: bool,
    files: Option<Files>,
}

/// What can be read of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Look {
    /// It is there.
    Present {
        /// The running task's word, empty when idle.
        task: String,
        /// The state, read after the task.
        state: String,
    },
    /// It is nowhere in the tree.
    Absent,
}

impl Object {
    /// Finds the object that a path means. `None` if it is gone and that is the goal.
    pub fn find(path: &Path, goal: &Goal) -> Result<Option<Object>, WaitError> {
        let unreadable = |source| WaitError::Unreadable { file: path.display().to_string(), source };
        let (root, class, id) = match path.canonicalize() {
            Ok(canonical) => locate(&canonical).ok_or(WaitError::NotInTree)?,
            // An id says which object is meant even when it is not there, or has left this state's directory.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                locate(&lexical(path).map_err(unreadable)?).ok_or(WaitError::NoObject)?
            }
            Err(error) => return Err(unreadable(error)),
        };
        let device = root.metadata().map_err(unreadable)?.dev();
        let mut object = Object { root, device, class, id, has_poll: true, files: None };
        match object.open()? {
            true => Ok(Some(object)),
            false if *goal == Goal::Gone => Ok(None),
            false => Err(WaitError::NoObject),
        }
    }

    /// Whether it is a task, whose `state` says how it stands.
    pub fn is_task(&self) -> bool {
        self.class == TASKS
    }

    /// Whether its files raise events.
    pub fn has_poll(&self) -> bool {
        self.has_poll
    }

    /// The open files to sleep on.
    pub fn files(&self) -> impl Iterator<Item = &File> {
        self.files.iter().flat_map(|files| files.task.iter().chain([&files.state]))
    }

    /// Reads it; `fresh` opens it anew, wherever it is now.
    pub fn look(&mut self, fresh: bool) -> Result<Look, WaitError> {
        if !fresh
            && let Some(files) = &self.files
            && let Ok(look) = read_files(files)
        {
            return Ok(look);
        }
        // It may move or go between being found and being read: then it is looked for again.
        let mut last = None;
        for _ in 0..3 {
            if !self.open()? {
                return Ok(Look::Absent);
            }
            let Some(files) = &self.files else { continue };
            match read_files(files) {
                Ok(look) => return Ok(look),
                Err(error) => last = Some(error),
            }
        }
        let source = last.unwrap_or_else(|| io::Error::from(io::ErrorKind::NotFound));
        Err(WaitError::Unreadable { file: self.directory().join("state").display().to_string(), source })
    }

    /// A value of one of its files, `None` if it has no such file.
    pub fn value(&self, file: &str) -> Result<Option<String>, WaitError> {
        read_value(&self.directory().join(file))
    }

    /// The id that its `last_task` names.
    pub fn last_task(&self) -> Option<Uuid> {
        let target = fs::read_link(self.directory().join("last_task")).ok()?;
        identifier(target.file_name()?)
    }

    /// A value of a task's file, `None` if there is no such task.
    pub fn task_value(&self, task: Uuid, file: &str) -> Result<Option<String>, WaitError> {
        read_value(&self.root.join(TASKS).join(task.to_string()).join(file))
    }

    fn directory(&self) -> PathBuf {
        self.root.join(&self.class).join(self.id.to_string())
    }

    /// Opens its files where it is now; false if it is nowhere.
    fn open(&mut self) -> Result<bool, WaitError> {
        self.files = None;
        // Twice: it may be moved from a directory not looked into yet to one that was.
        for _ in 0..2 {
            let known = std::mem::take(&mut self.class);
            let others = CLASSES.into_iter().filter(|class| *class != known);
            let candidates: Vec<&str> = [known.as_str()].into_iter().chain(others).collect();
            for class in candidates {
                self.class = class.to_owned();
                match self.open_here() {
                    Ok(files) => {
                        self.has_poll = is_fuse(&files.state);
                        self.files = Some(files);
                        return Ok(true);
                    }
                    Err(error) if is_absent(&error) => {}
                    Err(source) => {
                        let file = self.directory().join("state").display().to_string();
                        return Err(WaitError::Unreadable { file, source });
                    }
                }
            }
            self.class = known;
        }
        // Absent in a tree that is gone means nothing.
        if is_there(&self.root, self.device) { Ok(false) } else { Err(WaitError::TreeGone(self.root.clone())) }
    }

    fn open_here(&self) -> io::Result<Files> {
        let directory = self.directory();
        let state = File::open(directory.join("state"))?;
        let task = if self.is_task() { None } else { Some(File::open(directory.join("task"))?) };
        Ok(Files { task, state })
    }
}

/// The task first: if it is empty, the state read afterwards is at least as new as the end of that task.
fn read_files(files: &Files) -> io::Result<Look> {
    let task = files.task.as_ref().map_or(Ok(String::new()), read_from_start)?;
    let state = read_from_start(&files.state)?;
    Ok(Look::Present { task, state })
}

/// Reading offset 0 takes the newest version and arms poll again.
fn read_from_start(file: &File) -> io::Result<String> {
    let mut bytes = vec![0; MAX_VALUE];
    let mut length = 0;
    loop {
        let count = file.read_at(&mut bytes[length..], length as u64)?;
        length += count;
        if count == 0 || length == bytes.len() {
            break;
        }
    }
    Ok(String::from_utf8_lossy(&bytes[..length]).trim_end().to_owned())
}

fn read_value(path: &Path) -> Result<Option<String>, WaitError> {
    match File::open(path).and_then(|file| read_from_start(&file)) {
        Ok(value) => Ok(Some(value)),
        Err(error) if is_absent(&error) => Ok(None),
        Err(source) => Err(WaitError::Unreadable { file: path.display().to_string(), source }),
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::ENOENT | Errno::ESTALE | Errno::ENOTDIR))
}

fn is_fuse(file: &File) -> bool {
    fstatfs(file).is_ok_and(|statfs| statfs.filesystem_type() == FUSE_SUPER_MAGIC)
}
