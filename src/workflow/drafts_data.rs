//! The bulk data of image drafts: who writes it, and that nobody does while it is being committed.

mod ahead;
mod worker;

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use uuid::Uuid;

use self::ahead::{Ahead, Decision, Mark};
use self::worker::{Common, Job, Worker};
use super::engine::Shared;
use super::operation::Fault;
use super::request::Completion;
use crate::image::extent::Find;
use crate::image::ingest;
use crate::model;
use crate::model::caller::Caller;
use crate::model::reason::Reason;

/// Answers a read.
pub type ReadCompletion = Box<dyn FnOnce(Result<Vec<u8>, Reason>) + Send>;

/// Answers where the next data or hole begins; `None`: from the end on.
pub type FindCompletion = Box<dyn FnOnce(Result<Option<u64>, Reason>) + Send>;

/// After so many bytes a handle's thread looks after what a caller's has written.
const TENDED_EVERY: u64 = 4 << 20;

/// All drafts whose data somebody asked for.
#[derive(Default)]
pub(super) struct Drafts {
    open: Mutex<HashMap<Uuid, Arc<DraftData>>>,
}

impl Drafts {
    /// The data of a draft.
    pub(super) fn get(&self, shared: &Arc<Shared>, image: Uuid) -> Arc<DraftData> {
        let mut open = self.open.lock();
        let data = open.entry(image).or_insert_with(|| {
            Arc::new(DraftData {
                image,
                path: shared.draft_path(image),
                shared: Arc::downgrade(shared),
                state: Mutex::default(),
                changed: Condvar::new(),
                ahead: Ahead::default(),
            })
        });
        data.clone()
    }

    /// The draft is none any more. Writers that still have it are refused.
    pub(super) fn forget(&self, image: Uuid) {
        if let Some(data) = self.open.lock().remove(&image) {
            data.state.lock().closed = true;
        }
    }
}

#[derive(Default)]
struct State {
    /// Nobody may write: a commit reads, or the draft is no more.
    closed: bool,
    writers: usize,
    draft: Option<Arc<ingest::Draft>>,
}

/// The data of one draft.
pub struct DraftData {
    image: Uuid,
    path: PathBuf,
    shared: Weak<Shared>,
    state: Mutex<State>,
    changed: Condvar,
    ahead: Ahead,
}

impl fmt::Debug for DraftData {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("DraftData")
            .field("image", &self.image)
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl DraftData {
    /// The file; it is there once something was written.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length in bytes, with what was acknowledged.
    pub fn len(&self) -> u64 {
        // In this order: what is carried out in between is then in the file.
        let acknowledged = self.ahead.length();
        fs::symlink_metadata(&self.path).map_or(0, |metadata| metadata.len()).max(acknowledged)
    }

    /// Returns when the file has everything that was acknowledged by now. May wait for the disk.
    pub fn settle(&self) {
        self.ahead.settle(self.ahead.mark());
    }

    /// Whether its length is 0.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Opens it for reading and writing, `EBUSY` while an operation runs on it. A commit waits until the writer is dropped and has done what it was told.
    pub fn open_writer(self: &Arc<DraftData>, caller: &Caller) -> Result<Writer, Reason> {
        let shared = self.shared.upgrade().ok_or_else(|| Fault::Stopped.reason())?;
        if shared.settings.read_only {
            return Err(Reason::ReadOnlyMount);
        }
        let image = shared.parts.ledger.inventory().image(self.image);
        let image = image.ok_or_else(|| Reason::NotFound(format!("image {}", self.image)))?;
        let situation = image.situation(caller);
        model::image::access(&situation)?;
        model::instance::idle(situation.task)?;
        if image.record.draft.is_none() {
            return Err(Reason::DraftOnly);
        }
        let mut state = self.state.lock();
        if state.closed {
            return Err(closed());
        }
        let (jobs, queue) = channel();
        let (handle, generation) = (self.ahead.handle(), image.record.ownership.generation);
        let common = Arc::new(Common::default());
        let worker = Worker::new(self.clone(), handle, generation, common.clone());
        thread::Builder::new()
            .name("draft-data".to_owned())
            .stack_size(256 << 10)
            .spawn(move || worker.run(&queue))
            .map_err(|error| Reason::Failed(format!("no thread for the data: {error}")))?;
        state.writers += 1;
        Ok(Writer { data: self.clone(), handle, generation, common, jobs })
    }

    /// Whether a handle that was opened in this generation may change the data, and whether it says already that it was
    /// written to.
    fn may_change(&self, generation: u32) -> Result<bool, Reason> {
        let shared = self.shared.upgrade().ok_or_else(|| Fault::Stopped.reason())?;
        let image = shared.parts.ledger.inventory().image(self.image).ok_or(Reason::StaleHandle)?;
        let Some(draft) = &image.record.draft else { return Err(Reason::DraftOnly) };
        if image.record.ownership.generation != generation {
            return Err(Reason::HandleOutlivedOwner);
        }
        Ok(draft.written)
    }

    /// Lets nobody write any more, and waits for those who do: the kernel tells us late that a file was closed.
    pub(super) fn close(&self, patience: Duration) -> Result<(), Reason> {
        let deadline = Instant::now() + patience;
        let mut state = self.state.lock();
        state.closed = true;
        while state.writers > 0 {
            if self.changed.wait_until(&mut state, deadline).timed_out() && state.writers > 0 {
                state.closed = false;
                return Err(Reason::DataOpen);
            }
        }
        Ok(())
    }

    /// Lets it be written again.
    pub(super) fn reopen(&self) {
        self.state.lock().closed = false;
    }

    /// Its file was removed: the space is free on return, also while somebody has it open still.
    pub(super) fn free_removed(&self) {
        let draft = self.state.lock().draft.take();
        if let Some(draft) = draft
            && let Err(error) = draft.free_removed()
        {
            log::warn!("the space of image {} is not free yet: {error}", self.image);
        }
    }

    /// The file, which is there. One process has one [`ingest::Draft`] for it.
    pub(super) fn existing(&self) -> io::Result<Arc<ingest::Draft>> {
        let mut state = self.state.lock();
        if let Some(draft) = &state.draft {
            return Ok(draft.clone());
        }
        let draft = Arc::new(ingest::Draft::open(&self.path)?);
        state.draft = Some(draft.clone());
        Ok(draft)
    }

    fn existing_or_none(&self) -> io::Result<Option<Arc<ingest::Draft>>> {
        match fs::symlink_metadata(&self.path) {
            Ok(_) => self.existing().map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The file, made with its directory if it is not there.
    pub(super) fn existing_or_new(&self) -> io::Result<Arc<ingest::Draft>> {
        if let Some(directory) = self.path.parent() {
            if let Some(images) = directory.parent() {
                make_passable(images)?;
            }
            make_passable(directory)?;
            let draft = self.existing()?;
            fs::File::open(directory)?.sync_all()?;
            return Ok(draft);
        }
        self.existing()
    }
}

/// A directory that QEMU can pass through to the image's file, but not list.
fn make_passable(directory: &Path) -> io::Result<()> {
    match fs::create_dir(directory) {
        Ok(()) => {
            fs::set_permissions(directory, fs::Permissions::from_mode(0o711))?;
            directory.parent().map_or(Ok(()), |parent| fs::File::open(parent)?.sync_all())
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

fn closed() -> Reason {
    Reason::Busy { task: "saving" }
}

/// An open handle on a draft's data. Every call returns at once and is carried out in order by a thread of its own.
pub struct Writer {
    data: Arc<DraftData>,
    /// Its number among the handles of this draft.
    handle: u64,
    generation: u32,
    common: Arc<Common>,
    jobs: Sender<Job>,
}

/// What a write may do besides writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leave {
    /// It may be answered before the bytes are in the file, if the space is there.
    pub early: bool,
    /// After such an answer the calling thread may be used to write, which may wait for the disk.
    pub here: bool,
}

impl Writer {
    /// Writes all bytes at the offset. If one fails that was answered early, every later write, [`Writer::sync`] and
    /// [`Writer::flush`] through this handle does.
    pub fn write_at(&self, offset: u64, bytes: &[u8], leave: Leave, done: Completion) {
        let may = leave.early && self.data.may_change(self.generation).is_ok();
        let mut order = self.data.ahead.order();
        let decision = order.write(self.handle, offset, bytes.len() as u64, may);
        if decision == Decision::First
            && leave.here
            && let Some(draft) = self.common.draft.get()
            && let Some(mut turn) = draft.try_turn()
        {
            // What is queued from here on waits for this turn to end.
            drop(order);
            done(Ok(()));
            let written = turn.write_at(offset, bytes);
            drop(turn);
            self.common.carried_out(&self.data, bytes.len() as u64, written);
            if offset / TENDED_EVERY != (offset + bytes.len() as u64) / TENDED_EVERY {
                self.give(Job::Tend);
            }
            return;
        }
        match decision {
            Decision::First | Decision::Now => {
                let refused = self.jobs.send(Job::Promised(offset, self.common.copy(bytes), None)).is_err();
                drop(order);
                done(if refused { Err(died()) } else { Ok(()) });
            }
            Decision::Enough => self.give(Job::Promised(offset, self.common.copy(bytes), Some(done))),
            Decision::Change => self.give(Job::Write { offset, bytes: bytes.to_vec(), early: leave.early, done }),
        }
    }

    /// Reads up to `size` bytes.
    pub fn read_at(&self, offset: u64, size: usize, done: ReadCompletion) {
        self.give_after(|mark| Job::Read(mark, offset, size, done));
    }

    /// Sets the length.
    pub fn truncate(&self, length: u64, done: Completion) {
        self.give_change(Job::Truncate(length, done));
    }

    /// fallocate(2).
    pub fn allocate(&self, offset: u64, length: u64, mode: i32, done: Completion) {
        self.give_change(Job::Allocate { offset, length, mode, done });
    }

    /// Finds the next data or hole.
    pub fn find(&self, offset: u64, what: Find, done: FindCompletion) {
        self.give_after(|mark| Job::Find(mark, offset, what, done));
    }

    /// Answers when everything written so far is on disk.
    pub fn sync(&self, done: Completion) {
        self.give_after(|mark| Job::Sync(mark, done));
    }

    /// Answers when everything acknowledged so far is in the file, and space that nothing was written into is free again.
    pub fn flush(&self, done: Completion) {
        self.give_change(Job::Flush(done));
    }

    fn give_after(&self, job: impl FnOnce(Mark) -> Job) {
        let order = self.data.ahead.order();
        self.give(job(order.mark()));
    }

    fn give_change(&self, job: Job) {
        let mut order = self.data.ahead.order();
        order.change();
        self.give(job);
    }

    fn give(&self, job: Job) {
        // The thread ends after this sender is gone only, unless it panicked.
        if let Err(error) = self.jobs.send(job) {
            error.0.fail(&died());
        }
    }
}

fn died() -> Reason {
    Reason::Failed("the thread of this file has died; open it again".to_owned())
}

/// What a failing file means to its writer.
pub(super) fn of_io(error: &io::Error) -> Reason {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => Reason::NoSpace("the disk of the images".to_owned()),
        Some(libc::EFBIG) => Reason::FileTooLarge,
        Some(libc::EINVAL) => Reason::Malformed("the disk of the images does not take these offsets".to_owned()),
        Some(libc::EOPNOTSUPP) => Reason::Unsupported("the disk of the images cannot do this to a file".to_owned()),
        Some(libc::EBUSY) => closed(),
        Some(_) | None => Reason::Failed(format!("the image's data cannot be read or written: {error}")),
    }
}
