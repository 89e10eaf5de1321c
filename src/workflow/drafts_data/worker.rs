//! The thread that carries out what one handle on a draft's data was told, in order.

use std::io;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use uuid::Uuid;

use super::ahead::{Mark, Right};
use super::{DraftData, FindCompletion, ReadCompletion, of_io};
use crate::image::extent::Find;
use crate::image::ingest;
use crate::inventory::Object;
use crate::model::reason::Reason;
use crate::workflow::ledger::{Batch, now};
use crate::workflow::operation::Fault;
use crate::workflow::request::Completion;

/// The shown length follows the file's at most this often while it is being written.
const SHOW_EVERY: Duration = Duration::from_secs(1);
/// What has to be written on end before space is reserved for more.
const WORTHWHILE: u64 = 2 << 20;

/// What is to be done.
pub(super) enum Job {
    /// A write into reserved space, which was acknowledged if nobody waits for it.
    Promised(u64, Vec<u8>, Option<Completion>),
    /// Any other write.
    Write {
        offset: u64,
        bytes: Vec<u8>,
        /// Whether such writes may be acknowledged early.
        early: bool,
        done: Completion,
    },
    Read(Mark, u64, usize, ReadCompletion),
    Truncate(u64, Completion),
    Allocate {
        offset: u64,
        length: u64,
        mode: i32,
        done: Completion,
    },
    Find(Mark, u64, Find, FindCompletion),
    Sync(Mark, Completion),
    Flush(Completion),
    /// Sees to what is due while a writer goes on.
    Tend,
}

impl Job {
    /// Answers that it was not done.
    pub(super) fn fail(self, reason: &Reason) {
        match self {
            Job::Write { done, .. }
            | Job::Truncate(_, done)
            | Job::Allocate { done, .. }
            | Job::Sync(_, done)
            | Job::Flush(done)
            | Job::Promised(_, _, Some(done)) => done(Err(reason.clone())),
            Job::Promised(_, _, None) | Job::Tend => {}
            Job::Read(_, _, _, done) => done(Err(reason.clone())),
            Job::Find(_, _, _, done) => done(Err(reason.clone())),
        }
    }
}

/// The thread's own.
pub(super) struct Worker {
    data: Arc<DraftData>,
    handle: u64,
    generation: u32,
    shown: Option<Instant>,
    common: Arc<Common>,
    /// The bytes written last without a gap, and where they end.
    run: (u64, u64),
}

/// What the thread shares with its handle.
#[derive(Default)]
pub(super) struct Common {
    /// Once something was changed: it is there and stays while there is a writer.
    pub draft: OnceLock<Arc<ingest::Draft>>,
    /// A write that was acknowledged is lost: nobody is to believe that his data is there.
    lost: Mutex<Option<Reason>>,
    /// Buffers of writes that were carried out. New ones would have to be backed by memory again, page by page, which
    /// costs as much as the copying.
    spare: Mutex<Vec<Vec<u8>>>,
}

/// As many as may be ahead, if a writer writes a MiB at a time.
const MOST_SPARE: usize = 5;

impl Common {
    /// A copy of these bytes.
    pub(super) fn copy(&self, bytes: &[u8]) -> Vec<u8> {
        let mut copy = self.spare.lock().pop().unwrap_or_default();
        copy.clear();
        copy.extend_from_slice(bytes);
        copy
    }

    /// A copy is needed no more.
    fn give_back(&self, copy: Vec<u8>) {
        let mut spare = self.spare.lock();
        if spare.len() < MOST_SPARE {
            spare.push(copy);
        }
    }

    /// A write that was acknowledged was carried out, or is lost.
    pub(super) fn carried_out(&self, data: &DraftData, length: u64, written: io::Result<()>) {
        if let Err(error) = written {
            log::warn!("acknowledged data of image {} is lost: {error}", data.image);
            self.lost.lock().get_or_insert_with(|| of_io(&error));
            data.ahead.end_right();
        }
        data.ahead.carried_out(length);
    }

    /// Whether nothing is lost.
    fn whole(&self) -> Result<(), Reason> {
        self.lost.lock().clone().map_or(Ok(()), Err)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.data.ahead.abandon(self.handle);
        self.data.state.lock().writers -= 1;
        self.data.changed.notify_all();
    }
}

impl Worker {
    pub(super) fn new(data: Arc<DraftData>, handle: u64, generation: u32, common: Arc<Common>) -> Worker {
        Worker { data, handle, generation, shown: None, common, run: (0, 0) }
    }

    pub(super) fn run(mut self, queue: &Receiver<Job>) {
        while let Ok(job) = queue.recv() {
            match job {
                Job::Promised(offset, bytes, done) => {
                    self.keep(offset, &bytes, done);
                    self.common.give_back(bytes);
                }
                Job::Write { offset, bytes, early, done } => {
                    self.data.ahead.begin_change();
                    let result = self.write(offset, &bytes);
                    let right = if early && result.is_ok() { self.right() } else { None };
                    // Before the answer, after which the next write comes.
                    self.data.ahead.end_change(right);
                    done(result);
                    self.go_on();
                }
                Job::Truncate(length, done) => {
                    self.data.ahead.begin_change();
                    let result = match length {
                        0 if self.data.is_empty() => Ok(()),
                        length => self.change(|draft| draft.truncate(length)),
                    };
                    self.data.ahead.end_change(None);
                    self.show(true);
                    done(result);
                }
                Job::Allocate { offset, length, mode, done } => {
                    self.data.ahead.begin_change();
                    let result = self.change(|draft| draft.allocate(offset, length, mode));
                    self.data.ahead.end_change(None);
                    self.show(true);
                    done(result);
                }
                Job::Flush(done) => {
                    self.data.ahead.begin_change();
                    let released = self.common.draft.get().map_or(Ok(()), |draft| draft.release());
                    self.data.ahead.end_change(None);
                    done(self.common.whole().and(released.map_err(|error| of_io(&error))));
                }
                Job::Read(mark, offset, size, done) => {
                    self.data.ahead.settle(mark);
                    done(self.read(offset, size));
                }
                Job::Find(mark, offset, what, done) => {
                    self.data.ahead.settle(mark);
                    done(self.find(offset, what));
                }
                Job::Sync(mark, done) => {
                    self.data.ahead.settle(mark);
                    done(self.sync());
                }
                Job::Tend => self.go_on(),
            }
        }
        if self.shown.is_some() {
            self.show(true);
        }
    }

    /// Carries out what was promised, whoever the draft belongs to meanwhile.
    fn keep(&mut self, offset: u64, bytes: &[u8], done: Option<Completion>) {
        let length = bytes.len() as u64;
        let written = match self.common.draft.get() {
            Some(draft) => draft.write_at(offset, bytes),
            None => Err(io::ErrorKind::NotFound.into()),
        };
        self.common.carried_out(&self.data, length, written);
        self.run = (self.run.0 + length, offset + length);
        if let Some(done) = done {
            done(self.common.whole());
        }
        self.go_on();
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Reason> {
        self.common.whole()?;
        self.change(|draft| draft.write_at(offset, bytes))?;
        let length = bytes.len() as u64;
        let before = if self.run.1 == offset { self.run.0 } else { 0 };
        self.run = (before + length, offset + length);
        Ok(())
    }

    /// The right to go on from where the last write ended, if that is the end of the data.
    fn right(&self) -> Option<Right> {
        let (written, next) = self.run;
        if written < WORTHWHILE || self.data.len() != next {
            return None;
        }
        self.reserve().map(|end| Right { handle: self.handle, next, end })
    }

    fn reserve(&self) -> Option<u64> {
        self.common.draft.get()?.reserve().unwrap_or_else(|error| {
            log::debug!("no space is reserved for image {}: {error}", self.data.image);
            None
        })
    }

    /// What is done while the writer goes on.
    fn go_on(&mut self) {
        if self.data.ahead.left(self.handle).is_some_and(|left| left < ingest::RESERVED_AT_LEAST)
            && let Some(end) = self.reserve()
        {
            self.data.ahead.extend(self.handle, end);
        }
        if let Some(draft) = self.common.draft.get() {
            draft.follow();
        }
        self.show(false);
    }

    fn change(&mut self, change: impl FnOnce(&ingest::Draft) -> io::Result<()>) -> Result<(), Reason> {
        let written = self.data.may_change(self.generation)?;
        let shared = self.data.shared.upgrade().ok_or_else(|| Fault::Stopped.reason())?;
        let id = self.data.image;
        let is_idle = shared.parts.ledger.inventory().image(id).is_none_or(|image| image.task.is_none());
        if is_idle && self.data.state.lock().closed {
            return Err(Reason::StaleHandle);
        }
        if !written {
            // Before the first byte: a draft that says that it was never written to is discarded by a mere rmdir.
            shared.edit(Arc::new(move |batch| mark_written(batch, id))).map_err(|fault| fault.reason())?;
        }
        let draft = match self.common.draft.get() {
            Some(draft) => draft.clone(),
            None => {
                let draft = self.data.existing_or_new().map_err(|error| of_io(&error))?;
                self.common.draft.get_or_init(|| draft).clone()
            }
        };
        change(&draft).map_err(|error| of_io(&error))
    }

    fn sync(&self) -> Result<(), Reason> {
        self.common.whole()?;
        let synced = self.data.existing_or_none().and_then(|draft| draft.map_or(Ok(()), |draft| draft.sync()));
        synced.map_err(|error| of_io(&error))
    }

    fn find(&self, offset: u64, what: Find) -> Result<Option<u64>, Reason> {
        let draft = self.data.existing_or_none();
        let found = draft.and_then(|draft| draft.map_or(Ok(None), |draft| draft.find(offset, what)));
        found.map_err(|error| of_io(&error))
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
