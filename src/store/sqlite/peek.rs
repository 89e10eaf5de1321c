//! Looks into a store without touching it, whoever has it open.
//!
//! SQLite cannot read a database in WAL mode without writing beside it, so a copy is read. A copy taken while somebody
//! writes may be torn: what is found in it counts for values that never change, and a failure may mean nothing.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rusqlite::OptionalExtension;
use uuid::Uuid;

use super::file::{connect, failure};
use super::record;
use crate::store::StoreError;

/// A copy is not made of more; no store is so large that is not broken.
const MAX_BYTES: u64 = 1 << 30;

/// A directory of ours that goes with this value.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> io::Result<Scratch> {
        let path = std::env::temp_dir().join(format!("instancefs-peek-{}", Uuid::new_v4()));
        // Fails if there is such a name already.
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            log::warn!("{} cannot be removed: {error}", self.0.display());
        }
    }
}

/// One value of the store at `path`, `None` if it has none of that key.
///
/// # Errors
///
/// [`StoreError::Failed`] if it cannot be copied or the copy not be read.
pub fn peek(path: &Path, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
    let failed = |error: io::Error| StoreError::Failed(format!("{} cannot be copied: {error}", path.display()));
    let scratch = Scratch::new().map_err(failed)?;
    let copy = scratch.0.join("store");
    for suffix in ["", "-wal"] {
        let with_suffix = |path: &Path| {
            let mut name = path.as_os_str().to_owned();
            name.push(suffix);
            PathBuf::from(name)
        };
        let from = with_suffix(path);
        match from.metadata() {
            Ok(metadata) if metadata.len() > MAX_BYTES => {
                return Err(StoreError::Failed(format!("{} is too large to be copied", from.display())));
            }
            Ok(_) => drop(fs::copy(&from, with_suffix(&copy)).map_err(failed)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !suffix.is_empty() => {}
            Err(error) => return Err(failed(error)),
        }
    }
    let value = connect(&copy).and_then(|connection| {
        connection.query_row("SELECT key, value, revision FROM record WHERE key = ?1", [key], record).optional()
    });
    Ok(value.map_err(|error| failure(path, &error))?.map(|record| record.value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::sqlite::SqliteStore;
    use crate::store::{Change, Store};

    #[test]
    fn a_store_in_use_is_read_and_left_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store");
        let store = SqliteStore::open(&path).unwrap();
        store.transact(&[], &[Change::Put("key".to_owned(), b"value".to_vec())]).unwrap();
        let files = || {
            let entries = directory.path().read_dir().unwrap().map(|entry| entry.unwrap().path());
            let mut files: Vec<_> = entries.map(|path| (fs::read(&path).unwrap(), path)).collect();
            files.sort_by(|one, other| one.1.cmp(&other.1));
            files
        };
        let before = files();
        assert_eq!(peek(&path, "key").unwrap().as_deref(), Some(b"value".as_slice()));
        assert_eq!(peek(&path, "none").unwrap(), None);
        assert_eq!(files(), before);
        assert!(peek(&directory.path().join("absent"), "key").is_err());
    }
}
