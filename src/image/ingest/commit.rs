//! The commit of a draft: its data checked and hashed.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::thread;

use super::follower::{Bytes, Holes, Part, read};
use super::{Draft, Fingerprint};
use crate::image::inspect::{Refusal, inspect};
use crate::image::{Format, Inspected, qemu_img};

/// What a commit hashes before it shows its progress again, and between two looks at whether it is still wanted.
const STEP: u64 = 4 << 20;
/// What is read at a time. The two threads wake each other for each, so it is as large as the caches that they share
/// bear; hashing took 5 % longer with a quarter of it.
const BUFFER: usize = 1 << 20;
/// How many are read ahead.
const BUFFERS: usize = 3;

/// What a commit found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Format and virtual size.
    pub inspected: Inspected,
    /// The file's length in bytes.
    pub size_bytes: u64,
    /// SHA-512 of the whole file, 128 lower-case hexadecimal digits.
    pub sha512: String,
}

/// Why a draft was not committed. It stays a draft and can be written again.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// Our inspector refuses it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// qemu-img refuses it, or sees something else than we do.
    #[error("qemu-img does not agree that this is a sound image: {0}; convert it with qemu-img convert -O qcow2")]
    Disagrees(String),
    /// Somebody wrote the file past us.
    #[error("the image's file was changed while it was being checked; write it again and repeat")]
    Changed,
    /// Asked to stop.
    #[error("cancelled; the draft is as it was")]
    Cancelled,
    /// Another commit is under way, or has succeeded.
    #[error("the draft is being committed already; wait for that")]
    Busy,
    /// Reading or syncing failed.
    #[error("the draft's data cannot be read or made durable: {0}")]
    Io(#[from] io::Error),
}

impl Draft {
    /// Lets a draft be written again whose commit succeeded but whose publication did not happen.
    pub fn thaw(&self) {
        self.arrival.lock().frozen = false;
        self.arrived.lock().pause(false);
    }

    /// Checks and hashes the data. Writes are refused from here on; after an error they are allowed again, after
    /// success not until [`Draft::thaw`]. The file keeps its name and mode: see [`super::publish()`].
    ///
    /// `progress` is called with 0 to 100, `cancelled` is asked before each part.
    pub fn commit(
        &self,
        claimed: Option<Format>,
        progress: &dyn Fn(u8),
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Committed, CommitError> {
        {
            let mut arrival = self.arrival.lock();
            if arrival.frozen {
                return Err(CommitError::Busy);
            }
            arrival.frozen = true;
            self.arrived.lock().pause(true);
        }
        let result = self.check(claimed, progress, cancelled);
        if result.is_err() {
            self.thaw();
        }
        result
    }

    /// Whether the file is still the one that the last successful commit has checked.
    pub fn is_as_checked(&self) -> io::Result<bool> {
        Ok(self.arrival.lock().checked == Some(Fingerprint::of(&self.file)?))
    }

    fn check(
        &self,
        claimed: Option<Format>,
        progress: &dyn Fn(u8),
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Committed, CommitError> {
        progress(0);
        let before = Fingerprint::settled(&self.file)?;
        {
            let mut arrival = self.arrival.lock();
            arrival.checked = None;
            if arrival.left != Some(before) {
                self.arrived.lock().forget(0);
            }
        }
        let outcome = self.judge(claimed).and_then(|inspected| {
            let sha512 = self.hash_and_sync(before.length, progress, cancelled)?;
            Ok(Committed { inspected, size_bytes: before.length, sha512 })
        });
        // Whatever was found is not about the file that is there now.
        if Fingerprint::of(&self.file)? != before {
            self.arrived.lock().forget(0);
            return Err(CommitError::Changed);
        }
        let committed = outcome?;
        self.arrival.lock().checked = Some(before);
        progress(100);
        Ok(committed)
    }

    fn judge(&self, claimed: Option<Format>) -> Result<Inspected, CommitError> {
        let inspected = inspect(&self.file, claimed)?;
        let theirs = qemu_img::info_of(&self.file, inspected.format).map_err(CommitError::Disagrees)?;
        agree(&inspected, &theirs)?;
        Ok(inspected)
    }

    /// The disk writes while the processor hashes; not sooner, since qemu-img looks for holes, for which it would wait.
    fn hash_and_sync(
        &self,
        length: u64,
        progress: &dyn Fn(u8),
        cancelled: &dyn Fn() -> bool,
    ) -> Result<String, CommitError> {
        thread::scope(|scope| {
            let syncing = thread::Builder::new().name("draft-sync".to_owned()).spawn_scoped(scope, || self.sync())?;
            let hashed = self.hash_rest(length, progress, cancelled);
            let synced = syncing.join().unwrap_or_else(|_| Err(io::Error::other("the thread that syncs has died")));
            let sha512 = hashed?;
            synced?;
            Ok(sha512)
        })
    }

    fn hash_rest(
        &self,
        length: u64,
        progress: &dyn Fn(u8),
        cancelled: &dyn Fn() -> bool,
    ) -> Result<String, CommitError> {
        let mut running = self.running.lock();
        self.arrived.lock().claim_all(&mut running, length);
        if running.hashed() > length {
            // Somebody else has cut the file, which says that the hash is of other bytes.
            running.restart();
        }
        let start = running.hashed();
        let mut shown = start;
        thread::scope(|scope| {
            // One processor reads while another one hashes.
            let (filled, to_hash) = sync_channel(BUFFERS);
            let (hashed, to_fill) = channel();
            let read = move || read_all(&self.file, start..length, &to_fill, &filled);
            thread::Builder::new().name("draft-read".to_owned()).spawn_scoped(scope, read)?;
            for _ in 0..BUFFERS {
                // Its receiver goes with the reader, who says why.
                let _reader_ended = hashed.send(vec![0; BUFFER]);
            }
            while running.hashed() < length {
                if cancelled() {
                    return Err(CommitError::Cancelled);
                }
                let died = || io::Error::other("the thread that reads the draft has died");
                let (bytes, buffer): (Bytes, Vec<u8>) =
                    to_hash.recv().unwrap_or_else(|_| Err(died())).map_err(of_read)?;
                match bytes {
                    Bytes::Zeros(count) => running.take_zeros(count),
                    Bytes::Data(count) => running.take(&buffer[..count]),
                }
                let _reader_ended = hashed.send(buffer);
                if running.hashed() - shown >= STEP {
                    shown = running.hashed();
                    // At most 100: the quotient is at most 1.
                    progress((u128::from(shown) * 100 / u128::from(length)) as u8);
                }
            }
            Ok(())
        })?;
        Ok(running.digest())
    }
}

/// Reads a range, at most [`STEP`] at a time, into buffers that come back. Ends early if nobody wants the rest.
fn read_all(
    file: &File,
    range: Range<u64>,
    to_fill: &Receiver<Vec<u8>>,
    filled: &SyncSender<io::Result<(Bytes, Vec<u8>)>>,
) {
    let mut at = range.start;
    while at < range.end
        && let Ok(mut buffer) = to_fill.recv()
    {
        let part = Part { end: range.end.min(at + STEP), holes: Holes::Unknown };
        let result = read(file, at, &part, &mut buffer);
        at += match result {
            Ok(Bytes::Zeros(count)) => count,
            Ok(Bytes::Data(count)) => count as u64,
            // Which is the last that is sent.
            Err(_) => u64::MAX - at,
        };
        if filled.send(result.map(|bytes| (bytes, buffer))).is_err() {
            return;
        }
    }
}

fn of_read(error: io::Error) -> CommitError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => CommitError::Changed,
        _ => CommitError::Io(error),
    }
}

fn agree(ours: &Inspected, theirs: &qemu_img::QemuInfo) -> Result<(), CommitError> {
    let complaint = if theirs.format != ours.format.word() {
        format!("its format is {} for us and {} for it", ours.format.word(), theirs.format)
    } else if theirs.virtual_size_bytes != ours.virtual_size_bytes {
        format!("its virtual size is {} bytes for us and {} for it", ours.virtual_size_bytes, theirs.virtual_size_bytes)
    } else if let Some(name) = theirs.backing_file.as_deref().or(theirs.data_file()) {
        format!("it depends on another file, {name}")
    } else if theirs.encrypted {
        "it is encrypted".to_owned()
    } else {
        return Ok(());
    };
    Err(CommitError::Disagrees(complaint))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_only_qemu_refuses_is_refused() {
        let ours = Inspected { format: Format::Qcow2, virtual_size_bytes: 4096 };
        let agreeing = r#"{"format":"qcow2","virtual-size":4096}"#;
        let info = |text: &str| serde_json::from_str::<qemu_img::QemuInfo>(text).unwrap();
        agree(&ours, &info(agreeing)).unwrap();
        for text in [
            r#"{"format":"raw","virtual-size":4096}"#,
            r#"{"format":"qcow2","virtual-size":4608}"#,
            r#"{"format":"qcow2","virtual-size":4096,"backing-filename":"/etc/shadow"}"#,
            r#"{"format":"qcow2","virtual-size":4096,"format-specific":{"type":"qcow2","data":{"data-file":"/dev/sda"}}}"#,
            r#"{"format":"qcow2","virtual-size":4096,"encrypted":true}"#,
        ] {
            assert!(matches!(agree(&ours, &info(text)), Err(CommitError::Disagrees(_))), "{text}");
        }
    }
}
