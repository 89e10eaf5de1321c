//! `events`: what happened, one JSON object a line, appended by a thread of its own.
//!
//! The lines are a log, not a journal: they are written in batches after the fact, and a full disk loses some rather
//! than stopping anything. Lost lines leave a gap in `seq`.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::ledger::now;
use crate::inventory::{Growth, Inventory, Update};
use crate::model::Class;

/// The file is renamed to `events.1` before it grows beyond so many bytes.
pub const LENGTH_MAX: u64 = 16 << 20;

/// A batch is written when it has so many bytes, or nothing more is waiting.
const BATCH_BYTES: usize = 1 << 20;

/// How much of the end of a file is searched for its last line; longer than any line.
const TAIL_BYTES: u64 = 256 << 10;

/// How long [`EventLog::flush`] waits for a disk that does not answer.
const FLUSH_PATIENCE: Duration = Duration::from_secs(5);

/// One thing that happened. Strings that do not apply are empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Class of the object, if one is concerned.
    pub class: Option<Class>,
    /// The object.
    pub id: Option<Uuid>,
    /// Its name then.
    pub name: String,
    /// Who did it.
    pub uid: u32,
    /// The person, or the program, behind it.
    pub login: String,
    /// What happened, a word.
    pub what: String,
    /// The former value.
    pub from: String,
    /// The new value.
    pub to: String,
    /// The errno's name of what failed.
    pub errno: String,
    /// Why.
    pub reason: String,
}

#[derive(Serialize)]
struct Line<'a> {
    seq: u64,
    time: u64,
    class: Option<Class>,
    uuid: Option<Uuid>,
    name: &'a str,
    uid: u32,
    login: &'a str,
    what: &'a str,
    from: &'a str,
    to: &'a str,
    errno: &'a str,
    reason: &'a str,
}

/// The part of a line that matters when the file is opened again.
#[derive(Deserialize)]
struct Numbered {
    seq: u64,
}

enum Message {
    Entry(u64, Entry),
    /// Answered when everything before it is on the disk, or lost.
    Flush(Sender<()>),
}

/// A file of the log as it is now.
#[derive(Clone, Debug)]
pub struct Segment {
    /// The number of its first line, which tells it from all others.
    pub first: u64,
    /// Bytes of whole lines in it.
    pub length: u64,
    /// It, open for reading; `None` if it cannot be opened.
    pub file: Option<Arc<File>>,
}

struct Segments {
    current: Segment,
    former: Option<Segment>,
}

/// The log and its writer.
pub struct EventLog {
    path: PathBuf,
    segments: Arc<Mutex<Segments>>,
    queue: Mutex<Sender<Message>>,
}

impl EventLog {
    /// Opens or makes the file (mode 0640) and continues its numbering. Half a line, left by a crash, is completed or
    /// cut off.
    ///
    /// # Errors
    ///
    /// What the file system reports when the file cannot be opened, read or repaired.
    pub fn open(path: PathBuf, inventory: Arc<Inventory>) -> io::Result<Arc<EventLog>> {
        EventLog::with_limit(path, inventory, LENGTH_MAX)
    }

    fn with_limit(path: PathBuf, inventory: Arc<Inventory>, limit: u64) -> io::Result<Arc<EventLog>> {
        let mut file = open(&path)?;
        repair(&mut file)?;
        let last = match last_seq(&mut file)? {
            Some(seq) => Some(seq),
            None => match File::open(former(&path)) {
                Ok(mut file) => last_seq(&mut file)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(error),
            },
        };
        let next_seq = last.map_or(1, |seq| seq + 1);
        let current = segment(&path, next_seq)?;
        let former = match segment(&former(&path), 0) {
            Ok(segment) => Some(segment),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let announced = current.first;
        let segments = Arc::new(Mutex::new(Segments { current, former }));
        let (sender, receiver) = channel();
        let writer = Writer {
            path: path.clone(),
            file: Some(file),
            segments: Arc::clone(&segments),
            announced,
            limit,
            next_seq,
            batch_first: next_seq,
            failing: false,
            inventory,
        };
        thread::Builder::new().name("events".to_owned()).spawn(move || writer.run(&receiver))?;
        Ok(Arc::new(EventLog { path, segments, queue: Mutex::new(sender) }))
    }

    /// Queues an entry; never blocks.
    pub fn record(&self, entry: Entry) {
        // The writer ends only after this sender is gone.
        let _sent = self.queue.lock().send(Message::Entry(now(), entry));
    }

    /// Where the growing file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The growing file.
    pub fn current(&self) -> Segment {
        self.segments.lock().current.clone()
    }

    /// The one before.
    pub fn former(&self) -> Option<Segment> {
        self.segments.lock().former.clone()
    }

    /// The file with this first line, if it is one of these two.
    pub fn segment(&self, first: u64) -> Option<Segment> {
        let segments = self.segments.lock();
        std::iter::once(&segments.current).chain(&segments.former).find(|segment| segment.first == first).cloned()
    }

    /// Waits until everything recorded so far is on the disk, or lost; at most 5 s.
    pub fn flush(&self) {
        let (done, written) = channel();
        if self.queue.lock().send(Message::Flush(done)).is_ok() && written.recv_timeout(FLUSH_PATIENCE).is_err() {
            log::warn!("{} is not written yet; the disk does not answer", self.path.display());
        }
    }
}

struct Writer {
    path: PathBuf,
    /// `None` after a rotation that could not open the new file.
    file: Option<File>,
    segments: Arc<Mutex<Segments>>,
    /// The first line of the file that was announced last.
    announced: u64,
    limit: u64,
    next_seq: u64,
    /// The number of the first line of the batch.
    batch_first: u64,
    failing: bool,
    inventory: Arc<Inventory>,
}

impl Writer {
    fn run(mut self, queue: &Receiver<Message>) {
        let mut batch = Vec::new();
        while let Ok(first) = queue.recv() {
            let mut flushed = Vec::new();
            self.batch_first = self.next_seq;
            let mut next = Some(first);
            while let Some(message) = next {
                match message {
                    Message::Entry(time, entry) => self.line(&mut batch, time, &entry),
                    Message::Flush(done) => flushed.push(done),
                }
                next = if batch.len() < BATCH_BYTES { queue.try_recv().ok() } else { None };
            }
            if !batch.is_empty() {
                self.write(&batch);
                batch.clear();
            }
            if !flushed.is_empty() {
                if let Some(Err(error)) = self.file.as_ref().map(File::sync_data) {
                    self.failed(&error);
                }
                for done in flushed {
                    // Nobody waits any more: that is his affair.
                    let _sent = done.send(());
                }
            }
        }
    }

    fn line(&mut self, batch: &mut Vec<u8>, time: u64, entry: &Entry) {
        let line = Line {
            seq: self.next_seq,
            time,
            class: entry.class,
            uuid: entry.id,
            name: &entry.name,
            uid: entry.uid,
            login: &entry.login,
            what: &entry.what,
            from: &entry.from,
            to: &entry.to,
            errno: &entry.errno,
            reason: &entry.reason,
        };
        self.next_seq += 1;
        match serde_json::to_vec(&line) {
            Ok(text) => {
                batch.extend(text);
                batch.push(b'\n');
            }
            Err(error) => log::error!("an event cannot be written as JSON: {error}"),
        }
    }

    fn write(&mut self, batch: &[u8]) {
        match self.append(batch) {
            Ok(()) => {
                if self.failing {
                    log::info!("{} is written again", self.path.display());
                    self.failing = false;
                }
                let current = self.segments.lock().current.first;
                let former = (current != self.announced).then_some(self.announced);
                self.announced = current;
                self.inventory.apply(vec![Update::Events(Growth { current, former })]);
            }
            Err(error) => self.failed(&error),
        }
    }

    fn append(&mut self, batch: &[u8]) -> io::Result<()> {
        let length = self.segments.lock().current.length;
        if length > 0 && length + batch.len() as u64 > self.limit {
            self.file = None;
            match std::fs::rename(&self.path, former(&self.path)) {
                Ok(()) => {}
                // A former attempt got as far as the rename.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            let mut segments = self.segments.lock();
            let next = Segment { first: self.batch_first, length: 0, file: None };
            segments.former = Some(std::mem::replace(&mut segments.current, next));
        }
        let file = match &mut self.file {
            Some(file) => file,
            none => {
                let file = open(&self.path)?;
                let readable = Arc::new(File::open(&self.path)?);
                let mut segments = self.segments.lock();
                segments.current.file = Some(readable);
                // Lines that were lost before the file could be opened are not in it.
                segments.current.first = self.batch_first;
                drop(segments);
                none.insert(file)
            }
        };
        let length = self.segments.lock().current.length;
        // What is behind the last whole line is half a batch of ours that did not fit.
        if file.metadata()?.len() > length {
            file.set_len(length)?;
        }
        file.write_all(batch)?;
        self.segments.lock().current.length = length + batch.len() as u64;
        Ok(())
    }

    fn failed(&mut self, error: &io::Error) {
        if !self.failing {
            log::error!("{} cannot be written and misses lines from now on: {error}", self.path.display());
            self.failing = true;
        }
    }
}

/// A file of the log, opened for reading; `next` is the number of its first line while it has none.
fn segment(path: &Path, next: u64) -> io::Result<Segment> {
    let file = File::open(path)?;
    let mut line = Vec::new();
    BufReader::new(&file).take(TAIL_BYTES).read_until(b'\n', &mut line)?;
    let first = serde_json::from_slice::<Numbered>(&line).map_or(next, |line| line.seq);
    Ok(Segment { first, length: file.metadata()?.len(), file: Some(file.into()) })
}

fn former(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    PathBuf::from(name)
}

fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).append(true).create(true).mode(0o640).open(path)?;
    // Whatever the umask is.
    file.set_permissions(PermissionsExt::from_mode(0o640))?;
    Ok(file)
}

/// The end of the file and where it begins.
fn tail(file: &mut File) -> io::Result<(u64, Vec<u8>)> {
    let start = file.metadata()?.len().saturating_sub(TAIL_BYTES);
    file.seek(SeekFrom::Start(start))?;
    let mut tail = Vec::new();
    file.read_to_end(&mut tail)?;
    Ok((start, tail))
}

/// Has the file end with a whole line.
fn repair(file: &mut File) -> io::Result<()> {
    let (start, tail) = tail(file)?;
    if tail.is_empty() || tail.ends_with(b"\n") {
        return Ok(());
    }
    let whole = tail.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
    if serde_json::from_slice::<Numbered>(&tail[whole..]).is_ok() {
        return file.write_all(b"\n");
    }
    file.set_len(start + whole as u64)
}

fn last_seq(file: &mut File) -> io::Result<Option<u64>> {
    let (_, tail) = tail(file)?;
    Ok(tail
        .split(|byte| *byte == b'\n')
        .rev()
        .find_map(|line| serde_json::from_slice::<Numbered>(line).ok())
        .map(|line| line.seq))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(what: &str) -> Entry {
        Entry { what: what.to_owned(), class: Some(Class::Instance), id: Some(Uuid::nil()), ..Entry::default() }
    }

    fn lines(path: &Path) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.is_empty() || text.ends_with('\n'));
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn seqs(path: &Path) -> Vec<u64> {
        lines(path).iter().map(|line| line["seq"].as_u64().unwrap()).collect()
    }

    #[test]
    fn the_numbering_continues_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events");
        for _ in 0..2 {
            let log = EventLog::open(path.clone(), Arc::new(Inventory::new())).unwrap();
            log.record(entry("one"));
            log.record(entry("two"));
            log.flush();
            assert_eq!(log.current().length, path.metadata().unwrap().len());
        }
        assert_eq!(seqs(&path), [1, 2, 3, 4]);
        assert_eq!(lines(&path)[1]["what"], "two");
        assert_eq!(lines(&path)[1]["class"], "instance");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o640);
    }

    #[test]
    fn a_full_file_becomes_events_1_and_the_numbering_continues() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events");
        let inventory = Arc::new(Inventory::new());
        let log = EventLog::with_limit(path.clone(), Arc::clone(&inventory), 1000).unwrap();
        let mut recorded = 0;
        while !former(&path).exists() {
            assert!(recorded < 100, "it never rotates");
            log.record(entry("growth"));
            log.flush();
            recorded += 1;
        }
        assert!(former(&path).metadata().unwrap().len() <= 1000);
        let (current, old) = (log.current(), log.former().unwrap());
        assert_eq!((old.first, current.first), (1, seqs(&path)[0]));
        assert_eq!(old.length, former(&path).metadata().unwrap().len());
        let all: Vec<u64> = seqs(&former(&path)).into_iter().chain(seqs(&path)).collect();
        assert_eq!(all, (1..=recorded).collect::<Vec<_>>());

        // Even if nothing was written into the new file before the restart.
        std::fs::write(&path, "").unwrap();
        drop(log);
        let log = EventLog::with_limit(path.clone(), inventory, 1000).unwrap();
        log.record(entry("after"));
        log.flush();
        assert_eq!(seqs(&path), [recorded]);
    }

    #[test]
    fn half_a_line_is_cut_and_a_whole_one_completed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events");
        for (left, expected) in [
            ("{\"seq\":7}\n{\"seq\":8,\"wh", vec![7, 8]),
            ("{\"seq\":7}\n{\"seq\":8}", vec![7, 8, 9]),
            ("{\"seq", vec![1]),
        ] {
            std::fs::write(&path, left).unwrap();
            let log = EventLog::open(path.clone(), Arc::new(Inventory::new())).unwrap();
            log.record(entry("next"));
            log.flush();
            assert_eq!(seqs(&path), expected, "{left}");
        }
    }

    #[test]
    fn subscribers_learn_that_it_grew_after_the_line_can_be_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events");
        let inventory = Arc::new(Inventory::new());
        let changes = inventory.subscribe();
        let log = EventLog::open(path.clone(), inventory).unwrap();
        log.record(entry("one"));
        let batch = changes.recv_timeout(Duration::from_secs(10)).unwrap();
        assert!(matches!(batch[..], [crate::inventory::Change::Events(_)]));
        assert_eq!(seqs(&path), [1]);
    }

    #[test]
    fn a_disk_that_refuses_loses_lines_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events");
        let log = EventLog::with_limit(path.clone(), Arc::new(Inventory::new()), 10).unwrap();
        log.record(entry("before"));
        log.flush();
        // The rotation cannot rename over a directory.
        std::fs::create_dir(former(&path)).unwrap();
        log.record(entry("lost"));
        log.flush();
        std::fs::remove_dir(former(&path)).unwrap();
        log.record(entry("after"));
        log.flush();
        assert_eq!(seqs(&former(&path)), [1]);
        assert_eq!(seqs(&path), [3]);
    }
}
