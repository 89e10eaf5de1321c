//! The volumes' part of a block backend for tests: each volume is a small file that says what it is.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use instancefs::block::{
    BlockError, DataRecord, DiskSource, Examined, ExistingData, Format, NewData, Source, VolumeBackend, VolumeData,
    Watch,
};
use parking_lot::Mutex;
use uuid::Uuid;

/// See the module.
pub struct VolumeFiles {
    backend: String,
    pub directory: PathBuf,
    /// Who made what, by reference.
    pub made_by: Mutex<BTreeMap<String, Uuid>>,
    /// Why growing fails, if it is to.
    pub grow_fails: Mutex<bool>,
    /// Making data fails half-way.
    pub create_fails: Mutex<bool>,
    /// Removing data fails.
    pub remove_fails: Mutex<bool>,
    /// Making data takes until this is over.
    pub holds: Mutex<bool>,
}

impl VolumeFiles {
    /// Of the backend of this name.
    pub fn new(backend: &str, directory: PathBuf) -> VolumeFiles {
        VolumeFiles {
            backend: backend.to_owned(),
            directory,
            made_by: Mutex::default(),
            grow_fails: Mutex::default(),
            create_fails: Mutex::default(),
            remove_fails: Mutex::default(),
            holds: Mutex::default(),
        }
    }

    /// Where the data lies.
    pub fn path(&self, data: &VolumeData) -> PathBuf {
        match data {
            VolumeData::Ours(record) => self.directory.join(&record.reference),
            VolumeData::Existing(existing) => PathBuf::from(&existing.reference),
        }
    }

    /// What there is, by reference.
    pub fn references(&self) -> BTreeMap<String, Uuid> {
        self.made_by.lock().clone()
    }

    /// What follows the first line.
    fn rest(&self, path: &std::path::Path) -> Result<String, BlockError> {
        let text = fs::read_to_string(path).map_err(failed)?;
        Ok(text.split_once('\n').map(|(_, rest)| rest.to_owned()).unwrap_or_default())
    }
}

impl VolumeBackend for VolumeFiles {
    fn plan_data(&self, new: &NewData<'_>) -> DataRecord {
        let name = new.snapshot.map_or("data".to_owned(), |snapshot| snapshot.to_string());
        DataRecord {
            backend: self.backend.clone(),
            reference: format!("{}/{name}", new.volume),
            operation: new.operation,
            format: new.format.unwrap_or(Format::Raw),
        }
    }

    fn create_data(&self, new: &NewData<'_>, watch: Watch<'_>) -> Result<Examined, BlockError> {
        let record = self.plan_data(new);
        let made = Examined { size_bytes: new.size_bytes, format: record.format };
        match self.made_by.lock().get(&record.reference) {
            Some(operation) if *operation == record.operation => return Ok(made),
            Some(_) => return Err(BlockError::Exists(record.reference)),
            None => {}
        }
        while *self.holds.lock() {
            watch(42)?;
            thread::sleep(Duration::from_millis(2));
        }
        if *self.create_fails.lock() {
            return Err(BlockError::NoSpace("the volumes' place".to_owned()));
        }
        let content = match new.source {
            Source::Empty => String::new(),
            Source::Image(path, _) => format!("from {}\n", path.display()),
            Source::Volume(data) => self.rest(&self.path(data))?,
            Source::Elsewhere(DiskSource::File(path) | DiskSource::Block(path), _) => self.rest(path)?,
            Source::Snapshot(data) => self.rest(&self.directory.join(&data.reference))?,
        };
        let path = self.directory.join(&record.reference);
        fs::create_dir_all(path.parent().expect("a directory")).map_err(failed)?;
        let text = format!("size {} {}\n{content}", new.size_bytes, record.format.word());
        self.made_by.lock().insert(record.reference.clone(), record.operation);
        fs::write(path, text).map_err(failed)?;
        Ok(made)
    }

    fn remove_data(&self, record: &DataRecord) -> Result<(), BlockError> {
        if *self.remove_fails.lock() {
            return Err(BlockError::Failed("a test wants it so".to_owned()));
        }
        let made_by = self.made_by.lock().get(&record.reference).copied();
        match made_by {
            None => Ok(()),
            Some(operation) if operation == record.operation => {
                let path = self.directory.join(&record.reference);
                fs::remove_file(&path).map_err(failed)?;
                self.made_by.lock().remove(&record.reference);
                let _others_are_there = fs::remove_dir(path.parent().expect("a directory"));
                Ok(())
            }
            Some(_) => Err(BlockError::NotOurs(record.reference.clone())),
        }
    }

    fn grow_data(&self, data: &VolumeData, size_bytes: u64, _in_use: bool) -> Result<u64, BlockError> {
        if *self.grow_fails.lock() {
            return Err(BlockError::NoSpace("the volumes' place".to_owned()));
        }
        let present = self.examine(data)?;
        let path = self.path(data);
        let rest = self.rest(&path)?;
        let size = size_bytes.max(present.size_bytes);
        fs::write(&path, format!("size {size} {}\n{rest}", present.format.word())).map_err(failed)?;
        Ok(size)
    }

    fn examine(&self, data: &VolumeData) -> Result<Examined, BlockError> {
        if let VolumeData::Ours(record) = data
            && self.made_by.lock().get(&record.reference) != Some(&record.operation)
        {
            return Err(BlockError::Missing(format!("volume {}", record.reference)));
        }
        let path = self.path(data);
        let text = fs::read_to_string(&path).map_err(|_| BlockError::Missing(format!("volume {}", path.display())))?;
        let mut words = text.split_ascii_whitespace().skip(1);
        let size_bytes = words.next().and_then(|size| size.parse().ok());
        let format = if words.next() == Some("qcow2") { Format::Qcow2 } else { Format::Raw };
        let size_bytes = size_bytes.ok_or_else(|| BlockError::Damaged(format!("{} says no size", path.display())))?;
        Ok(Examined { size_bytes, format })
    }

    fn adopt(&self, reference: &str, claimed: Option<Format>) -> Result<(ExistingData, Examined), BlockError> {
        use std::os::unix::fs::MetadataExt;
        let path = self.directory.join(reference);
        let metadata = fs::metadata(&path).map_err(|_| BlockError::Missing(format!("file {}", path.display())))?;
        let existing = ExistingData {
            backend: self.backend.clone(),
            reference: path.display().to_string(),
            identity: metadata.ino().to_string(),
            format: claimed.unwrap_or(Format::Raw),
        };
        let examined = self.examine(&VolumeData::Existing(existing.clone()))?;
        Ok((existing, examined))
    }

    fn source(&self, data: &VolumeData) -> DiskSource {
        DiskSource::File(self.path(data))
    }

    fn prepare(&self, _data: &VolumeData) -> Result<(), BlockError> {
        Ok(())
    }

    fn open_data(&self, data: &VolumeData) -> Result<fs::File, BlockError> {
        fs::File::open(self.path(data)).map_err(failed)
    }

    fn holder(&self, _data: &VolumeData) -> Result<Option<String>, BlockError> {
        Ok(None)
    }

    fn capacity(&self) -> Result<(u64, u64), BlockError> {
        Ok((0, 0))
    }
}

fn failed(error: std::io::Error) -> BlockError {
    BlockError::Failed(error.to_string())
}
