//! When files changed last, and who polls them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use fuser::PollNotifier;
use parking_lot::{Mutex, RwLock};

use super::inode::object_inodes;
use crate::tree::{object_number, stream_of};

/// How many files of a stream there are at a time.
const STREAM_FILES: usize = 2;

/// Per inode: the number of its last change and its time. Whoever has not changed since the start is not in it.
#[derive(Default)]
pub struct Versions {
    last: AtomicU64,
    table: RwLock<HashMap<u64, (u64, SystemTime)>>,
}

impl Versions {
    /// A change happened now.
    pub fn bump(&self, inode: u64) {
        let sequence = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let mut table = self.table.write();
        if table.insert(inode, (sequence, SystemTime::now())).is_none() {
            // Files of a stream take turns for ever; the last but one is gone when a new one begins.
            if let Some(stream) = stream_of(inode) {
                let mut turns: Vec<(u64, u64)> = table
                    .iter()
                    .filter(|(other, _)| stream_of(**other) == Some(stream))
                    .map(|(other, (sequence, _))| (*sequence, *other))
                    .collect();
                turns.sort_unstable_by(|one, other| other.cmp(one));
                for (_, gone) in turns.into_iter().skip(STREAM_FILES) {
                    table.remove(&gone);
                }
            }
        }
    }

    /// The number of the last change; 0 before the first.
    pub fn sequence(&self, inode: u64) -> u64 {
        self.table.read().get(&inode).map_or(0, |(sequence, _)| *sequence)
    }

    /// When the last change was.
    pub fn time(&self, inode: u64) -> Option<SystemTime> {
        self.table.read().get(&inode).map(|(_, time)| *time)
    }

    /// The object is gone for good; its inode numbers are never used again.
    pub fn forget_object(&self, number: u64) {
        let mut table = self.table.write();
        for inode in object_inodes(number) {
            table.remove(&inode);
        }
    }
}

/// The open files that somebody polls.
#[derive(Default)]
pub struct Pollers {
    table: Mutex<HashMap<u64, HashMap<u64, PollNotifier>>>,
}

impl Pollers {
    /// `handle` of a file is polled from now on, until it is released: a notification too many is harmless, one too
    /// few is not.
    pub fn add(&self, inode: u64, handle: u64, notifier: PollNotifier) {
        self.table.lock().entry(inode).or_default().insert(handle, notifier);
    }

    /// The handle is released.
    pub fn remove(&self, inode: u64, handle: u64) {
        let mut table = self.table.lock();
        if let Some(handles) = table.get_mut(&inode) {
            handles.remove(&handle);
            if handles.is_empty() {
                table.remove(&inode);
            }
        }
    }

    /// Wakes everybody who polls the file.
    pub fn wake(&self, inode: u64) {
        let notifiers: Vec<_> =
            self.table.lock().get(&inode).map(|handles| handles.values().cloned().collect()).unwrap_or_default();
        notify(notifiers);
    }

    /// Wakes everybody who polls a file of the object.
    pub fn wake_object(&self, number: u64) {
        let notifiers: Vec<_> = self
            .table
            .lock()
            .iter()
            .filter(|(inode, _)| object_number(**inode) == Some(number))
            .flat_map(|(_, handles)| handles.values().cloned())
            .collect();
        notify(notifiers);
    }
}

/// The table is not locked here: the kernel may call us back.
fn notify(notifiers: Vec<PollNotifier>) {
    for notifier in notifiers {
        // The kernel knows best whether the file is still open.
        let _ = notifier.notify();
    }
}
