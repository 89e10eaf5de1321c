//! Open files.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::SystemTime;

use parking_lot::{Mutex, RwLock};

use crate::model::caller::Caller;
use crate::model::reason::Reason;
use crate::tree::document::{Buffer, Kind, Step};
use crate::tree::{Content, Data, Node, OpenFile};

/// What a handle is for.
pub enum Purpose {
    /// Values: snapshots are read, commands written.
    Value,
    /// Bulk data, written and read at offsets.
    Data(Arc<dyn Data>),
    /// The announcer's: nothing that happens through it has an effect.
    Announcement,
}

/// One open file.
pub struct Handle {
    /// What is open.
    pub node: Node,
    /// What for.
    pub purpose: Purpose,
    generation: u32,
    /// Made for a number that this process did not give out: the daemon before us did.
    adopted: bool,
    content: Mutex<Option<Content>>,
    /// 1 + the sequence of the last version read; 0: never read.
    seen: AtomicU64,
    written: AtomicBool,
    /// The document that is being written, and who writes it.
    document: Mutex<Option<(Buffer, Caller)>>,
}

impl Handle {
    fn new(node: Node, generation: u32, purpose: Purpose, adopted: bool) -> Handle {
        Handle {
            node,
            purpose,
            generation,
            adopted,
            content: Mutex::new(None),
            seen: AtomicU64::new(0),
            written: AtomicBool::new(false),
            document: Mutex::new(None),
        }
    }

    /// What a write through it is part of.
    pub fn open_file(&self) -> OpenFile {
        OpenFile { node: self.node, generation: self.generation, written: self.written.load(Ordering::Acquire) }
    }

    /// A write through it succeeded.
    pub fn wrote(&self) {
        self.written.store(true, Ordering::Release);
    }

    /// One write of a document, see [`Buffer::write`].
    pub fn collect(&self, kind: Kind, caller: &Caller, rewinds: bool, bytes: &[u8]) -> Result<Step, Reason> {
        let mut document = self.document.lock();
        let (buffer, writer) = document.get_or_insert_with(|| (Buffer::new(kind), caller.clone()));
        writer.clone_from(caller);
        buffer.write(rewinds, bytes)
    }

    /// Who wrote a document that was never completed.
    pub fn unfinished(&self) -> Option<Caller> {
        let document = self.document.lock();
        document.as_ref().filter(|(buffer, _)| buffer.is_unfinished()).map(|(_, writer)| writer.clone())
    }

    /// What is served at an offset other than 0: what was read at 0.
    pub fn held(&self) -> Option<Content> {
        self.content.lock().clone()
    }

    /// Serves this from now on; `sequence` was the file's before the content was taken.
    pub fn hold(&self, content: Content, sequence: u64) {
        *self.content.lock() = Some(content);
        self.saw(sequence);
    }

    /// The reader has seen everything up to this change.
    pub fn saw(&self, sequence: u64) {
        self.seen.store(sequence + 1, Ordering::Release);
    }

    /// Whether the file changed since it was read through this handle, or was never read.
    pub fn is_behind(&self, sequence: u64) -> bool {
        self.seen.load(Ordering::Acquire) != sequence + 1
    }

    /// Whether nothing is known of what was done through it before.
    pub fn is_adopted(&self) -> bool {
        self.adopted
    }
}

/// All open files. A number is the owner's generation and a serial, so that a successor of this process can tell the
/// generation from the number alone.
pub struct Handles {
    table: RwLock<HashMap<u64, Arc<Handle>>>,
    serial: AtomicU32,
}

impl Handles {
    /// None; the serial begins where a predecessor's hardly was.
    pub fn new() -> Handles {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        // Truncation is meant: any start will do.
        Handles { table: RwLock::default(), serial: AtomicU32::new((now.as_micros() >> 6) as u32) }
    }

    /// A new handle's number.
    pub fn open(&self, node: Node, generation: u32, purpose: Purpose) -> u64 {
        let handle = Arc::new(Handle::new(node, generation, purpose, false));
        let mut table = self.table.write();
        loop {
            let serial = self.serial.fetch_add(1, Ordering::Relaxed);
            let number = (u64::from(generation) << 32) | u64::from(serial);
            if serial != 0 && !table.contains_key(&number) {
                table.insert(number, handle);
                return number;
            }
        }
    }

    /// The handle of a number.
    pub fn get(&self, number: u64) -> Option<Arc<Handle>> {
        self.table.read().get(&number).cloned()
    }

    /// Takes over a number that the daemon before us gave out.
    pub fn adopt(&self, number: u64, node: Node) -> Arc<Handle> {
        let generation = (number >> 32) as u32;
        let mut table = self.table.write();
        table.entry(number).or_insert_with(|| Arc::new(Handle::new(node, generation, Purpose::Value, true))).clone()
    }

    /// The kernel has released it.
    pub fn close(&self, number: u64) -> Option<Arc<Handle>> {
        self.table.write().remove(&number)
    }

    /// The mount is gone, and nothing will be released any more.
    pub fn close_all(&self) {
        let handles = std::mem::take(&mut *self.table.write());
        drop(handles);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Directory;

    const FILE: Node = Node::File(Directory::Root, 1);

    #[test]
    fn a_number_tells_the_generation_to_a_successor() {
        let before = Handles::new();
        let number = before.open(FILE, 7, Purpose::Value);
        let successor = Handles::new();
        assert!(successor.get(number).is_none());
        let handle = successor.adopt(number, FILE);
        assert_eq!(handle.open_file().generation, 7);
        assert!(handle.is_adopted());
    }

    #[test]
    fn a_handle_that_was_never_read_is_behind() {
        let handles = Handles::new();
        let handle = handles.get(handles.open(FILE, 0, Purpose::Value)).expect("just opened");
        assert!(handle.is_behind(0));
        handle.saw(0);
        assert!(!handle.is_behind(0));
        assert!(handle.is_behind(1));
    }
}
