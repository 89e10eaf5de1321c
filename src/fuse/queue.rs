//! What is still to be announced: a set, so it is bounded, and a change during an announcement asks for another.
//!
//! Files are announced at once, then at most once per [`QUIET`]. Objects whose published names may differ from the
//! wanted ones are here until they agree, or until [`LATE`] has passed: then the names are published without events.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::inventory::metrics::Backlog;
use crate::model::Class;
use crate::tree::{Node, Place, Position, Touched, object_number};

/// Shortest time between two announcements of one file.
const QUIET: Duration = Duration::from_millis(50);
/// How long a name may wait for its replay.
const LATE: Duration = Duration::from_millis(100);
/// Jobs that the announcer has at a time. They fit into its pipe, so that writing to it never blocks.
const WINDOW: usize = 48;

/// The replay of one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Move {
    /// The object's class.
    pub class: Class,
    /// The object's number.
    pub number: u64,
    /// Which of its places.
    pub position: Position,
    /// Where it was published when this was queued.
    pub from: Option<Place>,
    /// Where it is to be published.
    pub to: Option<Place>,
}

impl Move {
    /// The place.
    pub fn node(&self) -> Node {
        self.position.node(self.class, self.number)
    }
}

/// What the dispatcher is to do next.
#[derive(Debug)]
pub enum Step {
    /// Announce this file, which was at this path when it changed; the job counts as running already.
    Touch(u64, u64, PathBuf),
    /// Compare this object's names, then call [`Queue::start`], [`Queue::agree`] or [`Queue::give_up`].
    Compare(Pending),
    /// Publish this object's names without replays.
    Publish(Class, u64, Vec<Position>),
    /// The end.
    Stop,
}

/// An object to be compared.
#[derive(Clone, Debug)]
pub struct Pending {
    /// Its class.
    pub class: Class,
    /// Its number.
    pub number: u64,
    /// The places that may differ and whose replay has not failed.
    pub positions: Vec<Position>,
    marks: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Announced a moment ago.
    Resting,
    /// To be announced.
    Waiting,
    /// Being announced; `again` if it changed meanwhile.
    Running { again: bool },
}

struct FileEntry {
    path: PathBuf,
    stage: Stage,
    started: Instant,
    /// Since when its last change waits to be announced.
    changed: Instant,
    /// It was not where it should be: it is looked for once more, since its object may have moved meanwhile.
    missed: bool,
}

struct ObjectEntry {
    class: Class,
    positions: Vec<Position>,
    failed: Vec<Position>,
    /// Grows with each change, so that a comparison can be told to be out of date.
    marks: u64,
    came: Instant,
    deadline: Instant,
    running: Option<u64>,
    /// The replay before: one that succeeds without effect must not be repeated for ever.
    last: Option<Move>,
    /// Files of it whose announcement needs its names first.
    held: Vec<u64>,
}

enum Running {
    File(u64),
    Place(Move),
}

#[derive(Default)]
struct State {
    announcer: Option<u32>,
    stopping: bool,
    last_job: u64,
    files: HashMap<u64, FileEntry>,
    ready_files: VecDeque<u64>,
    timers: BTreeSet<(Instant, u64)>,
    objects: HashMap<u64, ObjectEntry>,
    ready_objects: VecDeque<u64>,
    running: HashMap<u64, Running>,
}

/// See the module. No method calls out while it holds the lock.
#[derive(Default)]
pub struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

impl Queue {
    /// A file reads differently.
    pub fn touch(&self, touched: Touched) {
        let inode = touched.node.inode();
        let state = &mut *self.state.lock();
        if state.stopping {
            return;
        }
        let now = Instant::now();
        let entry = state.files.entry(inode).or_insert_with(|| {
            state.ready_files.push_back(inode);
            FileEntry { path: PathBuf::new(), stage: Stage::Waiting, started: now, changed: now, missed: false }
        });
        entry.path = touched.path;
        entry.missed = false;
        match entry.stage {
            // Its timer is set already.
            Stage::Resting => {
                entry.stage = Stage::Waiting;
                entry.changed = now;
            }
            Stage::Waiting => {}
            Stage::Running { .. } => entry.stage = Stage::Running { again: true },
        }
        self.changed.notify_one();
    }

    /// Names of an object may differ from the wanted ones.
    pub fn moved(&self, class: Class, number: u64, position: Position) {
        let state = &mut *self.state.lock();
        let now = Instant::now();
        let entry = state.objects.entry(number).or_insert_with(|| ObjectEntry {
            class,
            positions: Vec::new(),
            failed: Vec::new(),
            marks: 0,
            came: now,
            deadline: now + LATE,
            running: None,
            last: None,
            held: Vec::new(),
        });
        entry.marks += 1;
        entry.failed.retain(|failed| *failed != position);
        if !entry.positions.contains(&position) {
            entry.positions.push(position);
        }
        if entry.running.is_none() {
            state.ready_objects.push_back(number);
        }
        self.changed.notify_one();
    }

    /// Waits for something to do.
    pub fn next(&self) -> Step {
        let mut state = self.state.lock();
        loop {
            if state.stopping {
                return Step::Stop;
            }
            let now = Instant::now();
            if let Some(step) = state.late(now) {
                return step;
            }
            state.fire(now);
            if let Some(step) = state.ready(now) {
                return step;
            }
            let timer = state.timers.first().map(|(at, _)| *at);
            let deadline = state.objects.values().map(|object| object.deadline).min();
            match timer.into_iter().chain(deadline).min() {
                Some(at) => drop(self.changed.wait_until(&mut state, at)),
                None => self.changed.wait(&mut state),
            }
        }
    }

    /// The comparison has found a difference: the replay's job, unless the object is not here any more or this very
    /// replay has changed nothing before.
    pub fn start(&self, step: Move) -> Option<u64> {
        let state = &mut *self.state.lock();
        let object = state.objects.get_mut(&step.number)?;
        if object.last.as_ref() == Some(&step) {
            object.failed.push(step.position);
            state.ready_objects.push_back(step.number);
            return None;
        }
        object.last = Some(step.clone());
        state.last_job += 1;
        object.running = Some(state.last_job);
        state.running.insert(state.last_job, Running::Place(step));
        Some(state.last_job)
    }

    /// The comparison has found no difference.
    pub fn agree(&self, pending: &Pending) {
        let state = &mut *self.state.lock();
        match state.objects.get(&pending.number) {
            Some(object) if object.marks == pending.marks && object.failed.is_empty() => {
                state.remove_object(pending.number);
            }
            Some(object) if object.marks != pending.marks => state.ready_objects.push_back(pending.number),
            // What has failed is published when it is late.
            Some(_) | None => {}
        }
        self.changed.notify_one();
    }

    /// The object's names were published without replays, or shall be.
    pub fn give_up(&self, number: u64) {
        let state = &mut *self.state.lock();
        if state.objects.contains_key(&number) {
            state.remove_object(number);
            self.changed.notify_one();
        }
    }

    /// A job has ended.
    pub fn done(&self, id: u64, errno: i32) {
        let state = &mut *self.state.lock();
        match state.running.remove(&id) {
            Some(Running::File(inode)) => {
                if errno == libc::ENOENT
                    && let Some(file) = state.files.get_mut(&inode)
                    && !std::mem::replace(&mut file.missed, true)
                {
                    file.stage = Stage::Running { again: true };
                }
                state.rest(inode);
            }
            Some(Running::Place(step)) => {
                if let Some(object) = state.objects.get_mut(&step.number)
                    && object.running == Some(id)
                {
                    object.running = None;
                    if errno == 0 {
                        object.deadline = Instant::now() + LATE;
                    } else if !object.failed.contains(&step.position) {
                        object.failed.push(step.position);
                    }
                    state.ready_objects.push_back(step.number);
                }
            }
            None => {}
        }
        self.changed.notify_one();
    }

    /// The announcer takes jobs; `process` is its id.
    pub fn open(&self, process: u32) {
        self.state.lock().announcer = Some(process);
        self.changed.notify_one();
    }

    /// The announcer takes no more jobs: what it had is queued again.
    pub fn close(&self) {
        let state = &mut *self.state.lock();
        state.announcer = None;
        for (id, running) in std::mem::take(&mut state.running) {
            match running {
                Running::File(inode) => state.again(inode),
                Running::Place(step) => {
                    if let Some(object) = state.objects.get_mut(&step.number)
                        && object.running == Some(id)
                    {
                        object.running = None;
                        state.ready_objects.push_back(step.number);
                    }
                }
            }
        }
        self.changed.notify_one();
    }

    /// A file's announcement cannot be said, or nobody is to hear it.
    pub fn drop_touch(&self, id: u64) {
        let state = &mut *self.state.lock();
        if let Some(Running::File(inode)) = state.running.remove(&id) {
            state.files.remove(&inode);
        }
    }

    /// A job did not reach the announcer.
    pub fn unsent(&self, id: u64) {
        let state = &mut *self.state.lock();
        match state.running.remove(&id) {
            Some(Running::File(inode)) => state.again(inode),
            Some(Running::Place(step)) => {
                if let Some(object) = state.objects.get_mut(&step.number) {
                    object.running = None;
                    object.failed.push(step.position);
                }
            }
            None => {}
        }
    }

    /// What is still to be announced, for `metrics`.
    pub fn backlog(&self) -> Backlog {
        let state = self.state.lock();
        let files = state.files.values().filter(|file| file.stage != Stage::Resting).map(|file| file.changed);
        let objects = state.objects.values().map(|object| object.came);
        let waiting: Vec<_> = files.chain(objects).collect();
        let oldest = waiting.iter().min().map_or(Duration::ZERO, Instant::elapsed);
        Backlog { length: waiting.len(), oldest }
    }

    /// Ends [`Queue::next`].
    pub fn stop(&self) {
        self.state.lock().stopping = true;
        self.changed.notify_all();
    }

    /// Whether names can be replayed.
    pub fn is_open(&self) -> bool {
        self.state.lock().announcer.is_some()
    }

    /// Whether a request comes from the announcer. Its process cannot be replaced by another of its number while we
    /// have not waited for it.
    pub fn is_announcer(&self, thread: u32) -> bool {
        let process = self.state.lock().announcer;
        process
            .is_some_and(|process| process == thread || Path::new(&format!("/proc/{process}/task/{thread}")).exists())
    }

    /// Whether an announcement of this file is under way.
    pub fn is_announcing(&self, inode: u64) -> bool {
        matches!(self.state.lock().files.get(&inode), Some(FileEntry { stage: Stage::Running { .. }, .. }))
    }

    /// The replay under way that is about exactly these names.
    pub fn replay(&self, from: Option<&Place>, to: Option<&Place>) -> Option<Move> {
        self.state.lock().running.values().find_map(|running| match running {
            Running::Place(step) if step.from.as_ref() == from && step.to.as_ref() == to => Some(step.clone()),
            Running::Place(_) | Running::File(_) => None,
        })
    }
}

impl State {
    fn late(&mut self, now: Instant) -> Option<Step> {
        let (number, object) = self.objects.iter().find(|(_, object)| object.deadline <= now)?;
        let (number, class, positions) = (*number, object.class, object.positions.clone());
        self.remove_object(number);
        Some(Step::Publish(class, number, positions))
    }

    fn fire(&mut self, now: Instant) {
        while let Some((at, inode)) = self.timers.first().copied()
            && at <= now
        {
            self.timers.pop_first();
            match self.files.get(&inode).map(|file| file.stage) {
                Some(Stage::Resting) => drop(self.files.remove(&inode)),
                Some(Stage::Waiting) => self.ready_files.push_back(inode),
                Some(Stage::Running { .. }) | None => {}
            }
        }
    }

    fn ready(&mut self, now: Instant) -> Option<Step> {
        if self.announcer.is_none() || self.running.len() >= WINDOW {
            return None;
        }
        while let Some(number) = self.ready_objects.pop_front() {
            if let Some(object) = self.objects.get(&number)
                && object.running.is_none()
            {
                let positions =
                    object.positions.iter().copied().filter(|position| !object.failed.contains(position)).collect();
                return Some(Step::Compare(Pending { class: object.class, number, positions, marks: object.marks }));
            }
        }
        while let Some(inode) = self.ready_files.pop_front() {
            let Some(file) = self.files.get_mut(&inode) else { continue };
            if file.stage != Stage::Waiting {
                continue;
            }
            if let Some(object) = object_number(inode).and_then(|number| self.objects.get_mut(&number)) {
                object.held.push(inode);
                continue;
            }
            file.stage = Stage::Running { again: false };
            file.started = now;
            let path = file.path.clone();
            self.last_job += 1;
            self.running.insert(self.last_job, Running::File(inode));
            return Some(Step::Touch(self.last_job, inode, path));
        }
        None
    }

    /// A file's announcement has ended.
    fn rest(&mut self, inode: u64) {
        if let Some(file) = self.files.get_mut(&inode) {
            file.stage = match file.stage {
                Stage::Running { again: true } => {
                    file.changed = Instant::now();
                    Stage::Waiting
                }
                Stage::Running { again: false } | Stage::Resting | Stage::Waiting => Stage::Resting,
            };
            self.timers.insert((file.started + QUIET, inode));
        }
    }

    /// A file's announcement was lost.
    fn again(&mut self, inode: u64) {
        if let Some(file) = self.files.get_mut(&inode) {
            file.stage = Stage::Waiting;
            self.ready_files.push_back(inode);
        }
    }

    /// A replay of it that is still under way is refused from now on.
    fn remove_object(&mut self, number: u64) {
        if let Some(object) = self.objects.remove(&number) {
            if let Some(id) = object.running {
                self.running.remove(&id);
            }
            let held: HashSet<u64> = object.held.into_iter().collect();
            self.ready_files.extend(held);
        }
    }
}

#[cfg(test)]
mod tests;
