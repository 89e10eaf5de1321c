//! Disks that remember who made them, each a small file, and fail on demand.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;

use instancefs::block::{BlockBackend, BlockError, DiskRecord, DiskRole, FillFile, NewDisk, NewSeed, VolumeBackend};
use instancefs::model::image::Format;
use parking_lot::Mutex;
use tempfile::TempDir;
use uuid::Uuid;

use crate::volume_files::VolumeFiles;

/// See the module.
pub struct Disks {
    files: Files,
    pub volumes: VolumeFiles,
    pub disks: Mutex<BTreeMap<String, Uuid>>,
    /// The documents on seeds, by reference.
    pub seeds: Mutex<BTreeMap<String, String>>,
    /// The sizes that root disks have grown to, by reference.
    pub grown: Mutex<BTreeMap<String, u64>>,
    pub seed_fails: Mutex<bool>,
    pub grow_fails: Mutex<bool>,
    pub create_fails: Mutex<Option<String>>,
    pub remove_fails: Mutex<bool>,
    pub open_fails: Mutex<Option<DiskRole>>,
}

impl Default for Disks {
    fn default() -> Disks {
        let files = Files::default();
        let volumes = VolumeFiles::new("memory", files.0.path().join("volumes"));
        Disks {
            files,
            volumes,
            disks: Mutex::default(),
            seeds: Mutex::default(),
            grown: Mutex::default(),
            seed_fails: Mutex::default(),
            grow_fails: Mutex::default(),
            create_fails: Mutex::default(),
            remove_fails: Mutex::default(),
            open_fails: Mutex::default(),
        }
    }
}

/// Where the files lie.
struct Files(TempDir);

impl Default for Files {
    fn default() -> Files {
        Files(TempDir::new().unwrap())
    }
}

impl BlockBackend for Disks {
    fn name(&self) -> &str {
        "memory"
    }

    fn plan(&self, disk: &NewDisk<'_>) -> DiskRecord {
        record(disk.instance.to_string(), disk.operation, DiskRole::Root)
    }

    fn create(&self, disk: &NewDisk<'_>) -> Result<DiskRecord, BlockError> {
        if let Some(words) = &*self.create_fails.lock() {
            return Err(BlockError::NoSpace(words.clone()));
        }
        self.made(self.plan(disk))
    }

    fn plan_seed(&self, seed: &NewSeed<'_>) -> DiskRecord {
        record(format!("{}-seed", seed.instance), seed.operation, DiskRole::Seed)
    }

    fn create_seed(&self, seed: &NewSeed<'_>) -> Result<DiskRecord, BlockError> {
        if *self.seed_fails.lock() {
            return Err(BlockError::Failed("a test wants it so".to_owned()));
        }
        let record = self.made(self.plan_seed(seed))?;
        let text = |content: &[u8]| String::from_utf8(content.to_vec()).unwrap();
        let documents = seed.documents.iter().map(|(name, content)| format!("{name}: {}", text(content)));
        self.seeds.lock().insert(record.reference.clone(), documents.collect());
        Ok(record)
    }

    fn grow(&self, record: &DiskRecord, size_bytes: u64) -> Result<(), BlockError> {
        if *self.grow_fails.lock() {
            return Err(BlockError::NoSpace("the disks' place".to_owned()));
        }
        match self.disks.lock().get(&record.reference) {
            Some(operation) if *operation == record.operation => {
                let mut grown = self.grown.lock();
                let size = grown.entry(record.reference.clone()).or_default();
                *size = size_bytes.max(*size);
                Ok(())
            }
            Some(_) | None => Err(BlockError::NotOurs(record.reference.clone())),
        }
    }

    fn open(&self, record: &DiskRecord) -> Result<File, BlockError> {
        if *self.open_fails.lock() == Some(record.role) {
            return Err(BlockError::Failed("a test wants it so".to_owned()));
        }
        match self.disks.lock().get(&record.reference) {
            Some(operation) if *operation == record.operation => Ok(File::open(self.path(record)).unwrap()),
            Some(_) => Err(BlockError::NotOurs(record.reference.clone())),
            None => Err(BlockError::Missing(format!("disk {}", record.reference))),
        }
    }

    fn format(&self, _record: &DiskRecord) -> Format {
        Format::Raw
    }

    fn create_again(&self, record: &DiskRecord, fill: FillFile<'_>) -> Result<(), BlockError> {
        if let Some(words) = &*self.create_fails.lock() {
            return Err(BlockError::NoSpace(words.clone()));
        }
        match self.disks.lock().get(&record.reference) {
            Some(operation) if *operation == record.operation => return Ok(()),
            Some(_) => return Err(BlockError::Exists(record.reference.clone())),
            None => {}
        }
        let file = File::options().read(true).write(true).create(true).truncate(true).open(self.path(record)).unwrap();
        fill(&file)?;
        self.disks.lock().insert(record.reference.clone(), record.operation);
        Ok(())
    }

    fn path(&self, record: &DiskRecord) -> PathBuf {
        self.file(&record.reference)
    }

    fn remove(&self, record: &DiskRecord) -> Result<(), BlockError> {
        if *self.remove_fails.lock() {
            return Err(BlockError::Failed("a test wants it so".to_owned()));
        }
        let mut disks = self.disks.lock();
        match disks.get(&record.reference) {
            None => Ok(()),
            Some(operation) if *operation == record.operation => {
                std::fs::remove_file(self.path(record)).unwrap();
                disks.remove(&record.reference);
                Ok(())
            }
            Some(_) => Err(BlockError::NotOurs(record.reference.clone())),
        }
    }

    fn volumes(&self) -> &dyn VolumeBackend {
        &self.volumes
    }
}

fn record(reference: String, operation: Uuid, role: DiskRole) -> DiskRecord {
    DiskRecord { backend: "memory".to_owned(), reference, operation, role }
}

impl Disks {
    /// The file of a disk.
    pub fn file(&self, reference: &str) -> PathBuf {
        self.files.0.path().join(reference)
    }

    fn made(&self, record: DiskRecord) -> Result<DiskRecord, BlockError> {
        let mut disks = self.disks.lock();
        if *disks.entry(record.reference.clone()).or_insert(record.operation) != record.operation {
            return Err(BlockError::Exists(record.reference));
        }
        let path = self.path(&record);
        if !path.exists() {
            std::fs::write(path, format!("{} made by {}", record.reference, record.operation)).unwrap();
        }
        Ok(record)
    }
}
