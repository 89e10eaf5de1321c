//! Volumes and backends that an earlier life of the daemon has left in its store.

use instancefs::model::backend::{BackendRecord, Kind};
use instancefs::model::caller::Ownership;
use instancefs::model::image::Format;
use instancefs::model::volume::record::{DataRecord, SnapshotRecord, VolumeData, VolumeRecord};
use instancefs::store::sqlite::SqliteStore;
use instancefs::store::{Change, Store};
use instancefs::workflow::ledger::FIRST_NUMBER;
use serde::Serialize;
use uuid::Uuid;

use crate::support::Daemon;

const NEXT_NUMBER: &str = "meta/next_number";
/// Virtual size of every volume in bytes.
pub const SIZE: u64 = 1 << 20;

/// What is to be in the store.
pub struct Stored {
    changes: Vec<Change>,
    next_number: u64,
}

/// Ends the daemon, adds to its store, and starts it again.
pub fn store(daemon: &mut Daemon, tell: impl FnOnce(&mut Stored)) {
    assert!(daemon.stop());
    let store = SqliteStore::open(&daemon.state_directory().join("instancefs.db")).expect("the store opens");
    let next = store.get(NEXT_NUMBER).expect("the store answers");
    let next_number = next.map_or(FIRST_NUMBER, |next| serde_json::from_slice(&next.value).expect("a number"));
    let mut stored = Stored { changes: Vec::new(), next_number };
    tell(&mut stored);
    stored.changes.push(Change::Put(NEXT_NUMBER.to_owned(), stored.next_number.to_string().into_bytes()));
    store.transact(&[], &stored.changes).expect("stored");
    drop(store);
    daemon.spawn();
}

impl Stored {
    fn put(&mut self, key: String, record: &impl Serialize) {
        self.changes.push(Change::Put(key, serde_json::to_vec(record).expect("JSON")));
        self.next_number += 1;
    }

    /// An available volume.
    pub fn volume(&mut self, (owner, project): (u32, u32), edit: impl FnOnce(&mut VolumeRecord)) -> Uuid {
        let id = Uuid::new_v4();
        let ownership = Ownership { owner, project, generation: 0 };
        let data = data(id, "data");
        let mut record = VolumeRecord {
            size_bytes: SIZE,
            disk_format: Some(data.format),
            data: Some(VolumeData::Ours(data)),
            ..VolumeRecord::new(self.next_number, format!("volume-{id}"), ownership, "directory".to_owned(), 1)
        };
        edit(&mut record);
        self.put(format!("volumes/{id}"), &record);
        id
    }

    /// A place for disks.
    pub fn backend(&mut self, name: &str) {
        let record = BackendRecord { number: self.next_number, name: name.to_owned(), kind: Kind::Directory };
        self.put(format!("backends/{}", Uuid::new_v4()), &record);
    }
}

/// A snapshot that is complete.
pub fn snapshot() -> SnapshotRecord {
    SnapshotRecord { data: Some(data(Uuid::new_v4(), "snapshot")), size_bytes: SIZE, created_at: 2 }
}

fn data(id: Uuid, name: &str) -> DataRecord {
    DataRecord {
        backend: "directory".to_owned(),
        reference: format!("volumes/{id}/{name}"),
        operation: Uuid::new_v4(),
        format: Format::Qcow2,
    }
}
