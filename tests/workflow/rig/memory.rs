//! A store and disks without a wait for the disk below, since thousands of lives use them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};

use instancefs::block::{BlockBackend, BlockError, DiskRecord, DiskRole, FillFile, NewDisk, NewSeed, VolumeBackend};
use instancefs::model::image::Format;
use instancefs::store::{Change, Committed, Compare, Record, Revision, Store, StoreError};
use parking_lot::Mutex;
use uuid::Uuid;

use crate::volume_files::VolumeFiles;

#[derive(Default)]
struct Records {
    revision: Revision,
    records: BTreeMap<String, Record>,
    watchers: Vec<(String, Sender<Committed>)>,
}

/// A [`Store`] in memory; it outlives the lives that use it.
#[derive(Default)]
pub struct MemoryStore(Mutex<Records>);

impl Store for MemoryStore {
    fn get(&self, key: &str) -> Result<Option<Record>, StoreError> {
        Ok(self.0.lock().records.get(key).cloned())
    }

    fn list(&self, prefix: &str) -> Result<Vec<Record>, StoreError> {
        let store = self.0.lock();
        Ok(store.records.values().filter(|record| record.key.starts_with(prefix)).cloned().collect())
    }

    fn transact(&self, compares: &[Compare], changes: &[Change]) -> Result<Revision, StoreError> {
        let mut store = self.0.lock();
        for compare in compares {
            let (key, is_so) = match compare {
                Compare::Absent(key) => (key, !store.records.contains_key(key)),
                Compare::At(key, at) => (key, store.records.get(key).is_some_and(|record| record.revision == *at)),
            };
            if !is_so {
                return Err(StoreError::Conflict { key: key.clone() });
            }
        }
        store.revision += 1;
        let revision = store.revision;
        for change in changes {
            match change {
                Change::Put(key, value) => {
                    let record = Record { key: key.clone(), value: value.clone(), revision };
                    store.records.insert(key.clone(), record);
                }
                Change::Delete(key) => drop(store.records.remove(key)),
            }
        }
        store.watchers.retain(|(prefix, watcher)| {
            let seen = |change: &&Change| {
                let (Change::Put(key, _) | Change::Delete(key)) = change;
                key.starts_with(prefix)
            };
            let changes: Vec<_> = changes.iter().filter(seen).cloned().collect();
            changes.is_empty() || watcher.send(Committed { revision, changes }).is_ok()
        });
        Ok(revision)
    }

    fn watch(&self, prefix: &str) -> Receiver<Committed> {
        let (sender, receiver) = channel();
        self.0.lock().watchers.push((prefix.to_owned(), sender));
        receiver
    }
}

/// Disks as small files, and who made them. They outlive the lives that use them.
pub struct FileDisks {
    directory: PathBuf,
    made_by: Mutex<BTreeMap<String, Uuid>>,
    pub volumes: VolumeFiles,
}

const BACKEND: &str = "memory";

impl FileDisks {
    pub fn new(directory: PathBuf) -> FileDisks {
        let volumes = VolumeFiles::new(BACKEND, directory.with_file_name("volumes"));
        FileDisks { directory, made_by: Mutex::default(), volumes }
    }

    /// The operation that made a disk, if it is there.
    pub fn operation_of(&self, reference: &str) -> Option<Uuid> {
        let made_by = self.made_by.lock().get(reference).copied();
        assert_eq!(made_by.is_some(), self.directory.join(reference).exists(), "{reference} went behind our back");
        made_by
    }

    fn record(&self, instance: Uuid, operation: Uuid, role: DiskRole) -> DiskRecord {
        let name = match role {
            DiskRole::Root => "root",
            DiskRole::Seed => "seed",
        };
        DiskRecord { backend: BACKEND.to_owned(), reference: format!("{instance}/{name}"), operation, role }
    }

    /// As the directory backend: the file appears with all that is in it, or not at all.
    fn make(&self, record: &DiskRecord, fill: FillFile<'_>) -> Result<(), BlockError> {
        if self.ours(record)? {
            return Ok(());
        }
        let path = self.path(record);
        let partial = path.with_extension("partial");
        fs::create_dir_all(path.parent().expect("a directory")).map_err(failed)?;
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&partial).map_err(failed)?;
        let filled = fill(&file);
        if filled.is_err() {
            fs::remove_file(&partial).map_err(failed)?;
            let _others_are_there = fs::remove_dir(path.parent().expect("a directory"));
            return filled;
        }
        self.made_by.lock().insert(record.reference.clone(), record.operation);
        fs::rename(partial, path).map_err(failed)
    }

    /// Whether it is there, made by who is recorded.
    fn ours(&self, record: &DiskRecord) -> Result<bool, BlockError> {
        match self.operation_of(&record.reference) {
            None => Ok(false),
            Some(operation) if operation == record.operation => Ok(true),
            Some(_) => Err(BlockError::NotOurs(record.reference.clone())),
        }
    }

    fn existing(&self, record: &DiskRecord) -> Result<PathBuf, BlockError> {
        match self.ours(record)? {
            true => Ok(self.path(record)),
            false => Err(BlockError::Missing(format!("disk {}", record.reference))),
        }
    }
}

fn failed(error: io::Error) -> BlockError {
    BlockError::Failed(error.to_string())
}

impl BlockBackend for FileDisks {
    fn name(&self) -> &str {
        BACKEND
    }

    fn plan(&self, disk: &NewDisk<'_>) -> DiskRecord {
        self.record(disk.instance, disk.operation, DiskRole::Root)
    }

    fn create(&self, disk: &NewDisk<'_>) -> Result<DiskRecord, BlockError> {
        let record = self.plan(disk);
        if self.operation_of(&record.reference).is_some_and(|operation| operation != record.operation) {
            return Err(BlockError::Exists(record.reference));
        }
        self.make(&record, &|mut file| writeln!(file, "size {}", disk.size_bytes).map_err(failed))?;
        Ok(record)
    }

    fn plan_seed(&self, seed: &NewSeed<'_>) -> DiskRecord {
        self.record(seed.instance, seed.operation, DiskRole::Seed)
    }

    fn create_seed(&self, seed: &NewSeed<'_>) -> Result<DiskRecord, BlockError> {
        let record = self.plan_seed(seed);
        self.make(&record, &|mut file| {
            for (name, text) in seed.documents {
                writeln!(file, "{name}: {}", String::from_utf8_lossy(text)).map_err(failed)?;
            }
            Ok(())
        })?;
        Ok(record)
    }

    fn grow(&self, record: &DiskRecord, size_bytes: u64) -> Result<(), BlockError> {
        let path = self.existing(record)?;
        let text = fs::read_to_string(&path).map_err(failed)?;
        let (line, rest) = text.split_once('\n').expect("a first line");
        let present = line.trim_start_matches("size ").parse().unwrap_or(0);
        fs::write(&path, format!("size {}\n{rest}", size_bytes.max(present))).map_err(failed)
    }

    fn open(&self, record: &DiskRecord) -> Result<File, BlockError> {
        File::open(self.existing(record)?).map_err(failed)
    }

    fn format(&self, _record: &DiskRecord) -> Format {
        Format::Raw
    }

    fn create_again(&self, record: &DiskRecord, fill: FillFile<'_>) -> Result<(), BlockError> {
        if self.operation_of(&record.reference).is_some_and(|operation| operation != record.operation) {
            return Err(BlockError::Exists(record.reference.clone()));
        }
        self.make(record, fill)
    }

    fn path(&self, record: &DiskRecord) -> PathBuf {
        self.directory.join(&record.reference)
    }

    fn remove(&self, record: &DiskRecord) -> Result<(), BlockError> {
        if self.ours(record)? {
            let path = self.path(record);
            fs::remove_file(&path).map_err(failed)?;
            self.made_by.lock().remove(&record.reference);
            let _others_are_there = fs::remove_dir(path.parent().expect("a directory"));
        }
        Ok(())
    }

    fn volumes(&self) -> &dyn VolumeBackend {
        &self.volumes
    }
}
