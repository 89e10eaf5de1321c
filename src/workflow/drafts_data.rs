//! The bulk data of image drafts: who writes it, and that nobody does while it is being committed.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use uuid::Uuid;

use super::engine::Shared;
use super::ledger::{Batch, now};
use super::operation::Fault;
use super::request::Completion;
use crate::image::extent::Find;
use crate::image::ingest;
use crate::inventory::Object;
use crate::model;
use crate::model::caller::Caller;
use crate::model::reason::Reason;

/// Answers a read.
pub type ReadCompletion = Box<dyn FnOnce(Result<Vec<u8>, Reason>) + Send>;

/// Answers where the next data or hole begins; `None`: from the end on.
pub type FindCompletion = Box<dyn FnOnce(Result<Option<u64>, Reason>) + Send>;

/// The shown length follows the file's at most this often while it is being written.
const SHOW_EVERY: Duration = Duration::from_secs(1);

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
}

impl DraftData {
    /// The file; it is there once something was written.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        fs::symlink_metadata(&self.path).map_or(0, |metadata| metadata.len())
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
        let worker =
            Worker { data: self.clone(), generation: image.record.ownership.generation, shown: None, draft: None };
        thread::Builder::new()
            .name("draft-data".to_owned())
            .stack_size(256 << 10)
            .spawn(move || worker.run(&queue))
            .map_err(|error| Reason::Failed(format!("no thread for the data: {error}")))?;
        state.writers += 1;
        Ok(Writer { jobs })
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
    jobs: Sender<Job>,
}

enum Job {
    Write(u64, Vec<u8>, Completion),
    Read(u64, usize, ReadCompletion),
    Truncate(u64, Completion),
    Allocate { offset: u64, length: u64, mode: i32, done: Completion },
    Find(u64, Find, FindCompletion),
    Sync(Completion),
}

impl Writer {
    /// Writes all bytes at the offset.
    pub fn write_at(&self, offset: u64, bytes: Vec<u8>, done: Completion) {
        self.give(Job::Write(offset, bytes, done));
    }

    /// Reads up to `size` bytes.
    pub fn read_at(&self, offset: u64, size: usize, done: ReadCompletion) {
        self.give(Job::Read(offset, size, done));
    }

    /// Sets the length.
    pub fn truncate(&self, length: u64, done: Completion) {
        self.give(Job::Truncate(length, done));
    }

    /// fallocate(2).
    pub fn allocate(&self, offset: u64, length: u64, mode: i32, done: Completion) {
        self.give(Job::Allocate { offset, length, mode, done });
    }

    /// Finds the next data or hole.
    pub fn find(&self, offset: u64, what: Find, done: FindCompletion) {
        self.give(Job::Find(offset, what, done));
    }

    /// Answers when everything written so far is on disk.
    pub fn sync(&self, done: Completion) {
        self.give(Job::Sync(done));
    }

    fn give(&self, job: Job) {
        // The thread ends after this sender is gone only, unless it panicked.
        if let Err(error) = self.jobs.send(job) {
            let reason = || Reason::Failed("the thread of this file has died; open it again".to_owned());
            match error.0 {
                Job::Write(_, _, done) | Job::Truncate(_, done) | Job::Allocate { done, .. } | Job::Sync(done) => {
                    done(Err(reason()))
                }
                Job::Read(_, _, done) => done(Err(reason())),
                Job::Find(_, _, done) => done(Err(reason())),
            }
        }
    }
}

struct Worker {
    data: Arc<DraftData>,
    generation: u32,
    shown: Option<Instant>,
    /// Once something was changed: it is there and stays while there is a writer.
    draft: Option<Arc<ingest::Draft>>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.data.state.lock().writers -= 1;
        self.data.changed.notify_all();
    }
}

impl Worker {
    fn run(mut self, queue: &Receiver<Job>) {
        while let Ok(job) = queue.recv() {
            match job {
                Job::Write(offset, bytes, done) => {
                    let result = self.change(|draft| draft.write_at(offset, &bytes));
                    done(result);
                    // The writer goes on meanwhile.
                    if let Some(draft) = &self.draft {
                        draft.follow();
                    }
                    self.show(false);
                }
                Job::Read(offset, size, done) => done(self.read(offset, size)),
                Job::Truncate(0, done) if self.data.is_empty() => done(Ok(())),
                Job::Truncate(length, done) => {
                    let result = self.change(|draft| draft.truncate(length));
                    self.show(true);
                    done(result);
                }
                Job::Allocate { offset, length, mode, done } => {
                    let result = self.change(|draft| draft.allocate(offset, length, mode));
                    self.show(true);
                    done(result);
                }
                Job::Find(offset, what, done) => {
                    let draft = self.data.existing_or_none();
                    let found = draft.and_then(|draft| draft.map_or(Ok(None), |draft| draft.find(offset, what)));
                    done(found.map_err(|error| of_io(&error)));
                }
                Job::Sync(done) => done(
                    self.data
                        .existing_or_none()
                        .and_then(|draft| draft.map_or(Ok(()), |draft| draft.sync()))
                        .map_err(|error| of_io(&error)),
                ),
            }
        }
        if self.shown.is_some() {
            self.show(true);
        }
    }

    fn change(&mut self, change: impl FnOnce(&ingest::Draft) -> io::Result<()>) -> Result<(), Reason> {
        let shared = self.data.shared.upgrade().ok_or_else(|| Fault::Stopped.reason())?;
        let id = self.data.image;
        let image = shared.parts.ledger.inventory().image(id).ok_or(Reason::StaleHandle)?;
        let Some(draft) = image.record.draft else { return Err(Reason::DraftOnly) };
        if image.record.ownership.generation != self.generation {
            return Err(Reason::HandleOutlivedOwner);
        }
        if self.data.state.lock().closed && image.task.is_none() {
            return Err(Reason::StaleHandle);
        }
        if !draft.written {
            // Before the first byte: a draft that says that it was never written to is discarded by a mere rmdir.
            shared.edit(Arc::new(move |batch| mark_written(batch, id))).map_err(|fault| fault.reason())?;
        }
        let draft = match &self.draft {
            Some(draft) => draft,
            None => self.draft.insert(self.data.existing_or_new().map_err(|error| of_io(&error))?),
        };
        change(draft).map_err(|error| of_io(&error))
    }

    fn read(&self, offset: u64, size: usize) -> Result<Vec<u8>, Reason> {
        let read = || {
            let Some(draft) = self.data.existing_or_none()? else { return Ok(Vec::new()) };
            let mut buffer = vec![0; size];
            let mut filled = 0;
            while filled < size {
                match draft.read_at(offset.saturating_add(filled as u64), &mut buffer[filled..]) {
                    Ok(0) => break,
                    Ok(count) => filled += count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            buffer.truncate(filled);
            Ok(buffer)
        };
        read().map_err(|error: io::Error| of_io(&error))
    }

    fn show(&mut self, always: bool) {
        if !always && self.shown.is_some_and(|shown| shown.elapsed() < SHOW_EVERY) {
            return;
        }
        self.shown = Some(Instant::now());
        let Some(shared) = self.data.shared.upgrade() else { return };
        let length = self.data.len();
        let shown = shared.parts.ledger.transact(|batch| {
            if let Some(image) = batch.image(self.data.image)
                && image.record.draft.is_some()
                && image.data_bytes != length
            {
                let mut image = (*image).clone();
                image.data_bytes = length;
                batch.show(Object::Image(Arc::new(image)));
            }
        });
        if let Err(error) = shown {
            log::warn!("the length of image {} is not shown: {error}", self.data.image);
        }
    }
}

fn mark_written(batch: &mut Batch<'_>, id: Uuid) {
    let Some(image) = batch.image(id) else { return };
    let mut image = (*image).clone();
    if let Some(draft) = &mut image.record.draft {
        draft.written = true;
        image.record.updated_at = now();
        batch.put(Object::Image(Arc::new(image)));
    }
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
