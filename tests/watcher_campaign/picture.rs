//! What a watcher believes: it reads when it is woken, and at no other time.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use uuid::Uuid;

use crate::tools::{Heard, Tool};

/// The attributes of an instance whose values are compared.
pub const FILES: [&str; 4] = ["state", "description", "name", "locked"];
/// The directories whose names are compared.
pub const DIRECTORIES: [&str; 6] = [
    "instances",
    "by-name/instances",
    "by-state/instances/active",
    "by-state/instances/stopped",
    "by-state/instances/paused",
    "by-state/instances/error",
];
/// What nobody changes in the instances that change.
const CONSTANT: [&str; 9] =
    ["created_at", "owner", "project", "image", "flavor", "host", "vcpus", "memory_bytes", "network"];

/// What is compared, and what never changes.
pub struct Tracked {
    root: PathBuf,
    stayers: Vec<Uuid>,
    quiet: PathBuf,
}

impl Tracked {
    pub fn new(root: &Path, stayers: &[Uuid], quiet: Uuid) -> Tracked {
        let quiet = root.join(format!("instances/{quiet}"));
        Tracked { root: root.to_owned(), stayers: stayers.to_vec(), quiet }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn stayers(&self) -> &[Uuid] {
        &self.stayers
    }

    pub fn summary(&self) -> PathBuf {
        self.root.join("summary/instances")
    }

    /// The files of these instances, and the summary.
    pub fn files(&self, stayers: &[Uuid]) -> Vec<PathBuf> {
        let files = stayers.iter().flat_map(|id| FILES.map(|name| self.root.join(format!("instances/{id}/{name}"))));
        files.chain([self.summary()]).collect()
    }

    pub fn directories(&self) -> Vec<PathBuf> {
        DIRECTORIES.iter().map(|name| self.root.join(name)).collect()
    }

    /// Whether an event of this path is an invention.
    fn never_changes(&self, path: &Path) -> bool {
        // The instance itself comes with its directory's first listing and is no file that changes.
        let is_quiet = path.starts_with(&self.quiet) && path != self.quiet;
        let is_constant =
            path.parent().is_some_and(|home| self.stayers.iter().any(|id| home.ends_with(id.to_string())))
                && path.file_name().is_some_and(|name| CONSTANT.iter().any(|constant| name == *constant));
        is_quiet || is_constant
    }
}

/// A file's value, or the names in a directory; nothing if it is not there.
type Seen = Option<String>;

fn look(path: &Path) -> Seen {
    match fs::read_dir(path) {
        Ok(entries) => {
            let names: BTreeSet<_> = entries.flatten().map(|entry| entry.file_name()).collect();
            Some(format!("{names:?}"))
        }
        Err(_) => fs::read_to_string(path).ok(),
    }
}

#[derive(Default)]
struct Belief {
    seen: HashMap<PathBuf, Seen>,
    invented: BTreeSet<String>,
    woken: usize,
}

/// One tool's picture.
pub struct Picture {
    name: &'static str,
    belief: Arc<Mutex<Belief>>,
    _tool: Tool,
}

impl Picture {
    /// The tool watches already: what is looked at now is the beginning.
    pub fn of(mut tool: Tool, tracked: &Arc<Tracked>) -> Picture {
        let compared: HashSet<PathBuf> = tool.compared.iter().cloned().collect();
        let belief = Arc::new(Mutex::new(Belief::default()));
        for path in &compared {
            belief.lock().expect("whole").seen.insert(path.clone(), look(path));
        }
        let (name, events) = (tool.name, tool.events());
        let (kept, tracked) = (belief.clone(), tracked.clone());
        thread::spawn(move || {
            let mut dirty: HashSet<PathBuf> = HashSet::new();
            loop {
                // All that came meanwhile is one look, as any careful watcher does it.
                let wait = if dirty.is_empty() { Duration::from_secs(3600) } else { Duration::ZERO };
                match events.recv_timeout(wait) {
                    Ok(heard) => {
                        kept.lock().expect("whole").woken += 1;
                        match heard {
                            Heard::Of(path) => {
                                if tracked.never_changes(&path) {
                                    let mut belief = kept.lock().expect("whole");
                                    belief.invented.insert(path.display().to_string());
                                }
                                // Names that are late come without an event of their own, but not without the summary's.
                                if path == tracked.summary() {
                                    dirty.extend(tracked.directories());
                                }
                                dirty.extend(path.parent().map(Path::to_owned));
                                dirty.insert(path);
                            }
                            Heard::Something => dirty.extend(compared.iter().cloned()),
                        }
                    }
                    Err(RecvTimeoutError::Timeout) => {
                        for path in dirty.drain().filter(|path| compared.contains(path)) {
                            let seen = look(&path);
                            kept.lock().expect("whole").seen.insert(path, seen);
                        }
                    }
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        });
        Picture { name, belief, _tool: tool }
    }

    pub fn name(&self) -> &'static str {
        self.name
    }

    fn belief(&self) -> MutexGuard<'_, Belief> {
        self.belief.lock().expect("whole")
    }

    /// Where the picture differs from the tree.
    pub fn wrong(&self) -> Option<String> {
        let belief = self.belief();
        let wrong = belief.seen.iter().find(|(path, seen)| look(path) != **seen);
        wrong.map(|(path, seen)| format!("{}: believes {seen:?}, is {:?}", path.display(), look(path)))
    }

    /// Files of which it heard although they never changed.
    pub fn invented(&self) -> Vec<String> {
        self.belief().invented.iter().cloned().collect()
    }

    pub fn woken(&self) -> usize {
        self.belief().woken
    }
}
