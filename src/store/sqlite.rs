//! The embedded engine: one SQLite database in WAL mode.
//!
//! Committed means on the disk (`synchronous=FULL`). One connection writes, behind a mutex that also orders what
//! watchers receive; reads have connections of their own, so that none of them waits for a commit's fsync. Values that
//! are UTF-8 are stored as text, so that an administrator can query them with `sqlite3` and its JSON functions.

mod file;
mod peek;

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};

use parking_lot::Mutex;
use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, ErrorCode, OptionalExtension, Row, Transaction, TransactionBehavior, params};

use file::{MIGRATIONS, connect, failure};
pub use peek::peek;

use super::{Change, Committed, Compare, Record, Revision, Store, StoreError};

/// Idle read connections that are kept.
const READERS_KEPT: usize = 4;

/// A [`Store`] in one SQLite file.
pub struct SqliteStore {
    path: PathBuf,
    readers: Mutex<Vec<Connection>>,
    writer: Mutex<Writer>,
}

struct Writer {
    connection: Connection,
    watchers: Vec<Watcher>,
    /// A commit whose outcome the disk did not tell; nothing may build on it before the file is opened anew.
    broken: Option<String>,
}

struct Watcher {
    prefix: String,
    sender: Sender<Committed>,
}

impl SqliteStore {
    /// Opens the database, makes it if the path does not exist, and migrates an older schema.
    ///
    /// # Errors
    ///
    /// [`StoreError::Foreign`] for a file that is no store of ours or is damaged, [`StoreError::TooNew`] for a newer
    /// schema; both leave the file as it is. [`StoreError::Full`] and [`StoreError::Failed`] from the disk.
    pub fn open(path: &Path) -> Result<SqliteStore, StoreError> {
        open_with(path, MIGRATIONS)
    }

    fn read<T>(&self, query: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, StoreError> {
        let idle = self.readers.lock().pop();
        let connection = match idle {
            Some(connection) => connection,
            None => connect(&self.path)
                .and_then(|connection| {
                    connection.pragma_update(None, "query_only", true)?;
                    Ok(connection)
                })
                .map_err(|error| failure(&self.path, &error))?,
        };
        let result = query(&connection).map_err(|error| failure(&self.path, &error));
        let mut readers = self.readers.lock();
        if readers.len() < READERS_KEPT {
            readers.push(connection);
        }
        result
    }
}

impl Store for SqliteStore {
    fn get(&self, key: &str) -> Result<Option<Record>, StoreError> {
        self.read(|connection| {
            connection
                .prepare_cached("SELECT key, value, revision FROM record WHERE key = ?1")?
                .query_row([key], record)
                .optional()
        })
    }

    fn list(&self, prefix: &str) -> Result<Vec<Record>, StoreError> {
        // The keys of a prefix are one run of the key order (BINARY collation, that of `str`), so the scan ends at the
        // first stranger; LIKE and GLOB would give some characters a meaning.
        self.read(|connection| {
            let mut statement =
                connection.prepare_cached("SELECT key, value, revision FROM record WHERE key >= ?1 ORDER BY key")?;
            let mut rows = statement.query([prefix])?;
            let mut records = Vec::new();
            while let Some(row) = rows.next()? {
                if !row.get_ref(0)?.as_str()?.starts_with(prefix) {
                    break;
                }
                records.push(record(row)?);
            }
            Ok(records)
        })
    }

    fn transact(&self, compares: &[Compare], changes: &[Change]) -> Result<Revision, StoreError> {
        let mut writer = self.writer.lock();
        if let Some(detail) = &writer.broken {
            return Err(StoreError::Failed(format!(
                "an earlier commit broke off ({detail}); check the disk and start instancefs again"
            )));
        }
        let failed = |error: &rusqlite::Error| failure(&self.path, error);
        let transaction = Transaction::new_unchecked(&writer.connection, TransactionBehavior::Immediate)
            .map_err(|error| failed(&error))?;
        for compare in compares {
            let (key, expected) = match compare {
                Compare::Absent(key) => (key, None),
                Compare::At(key, revision) => (key, Some(*revision)),
            };
            if revision_of(&transaction, key).map_err(|error| failed(&error))? != expected {
                return Err(StoreError::Conflict { key: key.clone() });
            }
        }
        let revision = apply(&transaction, changes).map_err(|error| failed(&error))?;
        if let Err(error) = transaction.commit() {
            let answer = failed(&error);
            // After a failed fsync the kernel may have dropped the pages and call them clean: the journal's end is
            // unknown until it is read again.
            if matches!(answer, StoreError::Failed(_)) && error.sqlite_error_code() == Some(ErrorCode::SystemIoFailure)
            {
                writer.broken = Some(error.to_string());
            }
            return Err(answer);
        }
        writer.watchers.retain(|watcher| watcher.deliver(revision, changes));
        Ok(revision)
    }

    fn watch(&self, prefix: &str) -> Receiver<Committed> {
        let (sender, receiver) = channel();
        self.writer.lock().watchers.push(Watcher { prefix: prefix.to_owned(), sender });
        receiver
    }
}

impl Watcher {
    /// Sends what is below the prefix; false when the receiver is gone.
    fn deliver(&self, revision: Revision, changes: &[Change]) -> bool {
        let below: Vec<Change> = changes
            .iter()
            .filter(|change| match change {
                Change::Put(key, _) | Change::Delete(key) => key.starts_with(&self.prefix),
            })
            .cloned()
            .collect();
        below.is_empty() || self.sender.send(Committed { revision, changes: below }).is_ok()
    }
}

fn record(row: &Row<'_>) -> rusqlite::Result<Record> {
    Ok(Record {
        key: row.get(0)?,
        value: row.get_ref(1)?.as_bytes()?.to_vec(),
        revision: row.get::<_, i64>(2)? as Revision,
    })
}

fn revision_of(connection: &Connection, key: &str) -> rusqlite::Result<Option<Revision>> {
    connection
        .prepare_cached("SELECT revision FROM record WHERE key = ?1")?
        .query_row([key], |row| row.get::<_, i64>(0).map(|revision| revision as Revision))
        .optional()
}

fn apply(transaction: &Transaction<'_>, changes: &[Change]) -> rusqlite::Result<Revision> {
    let revision: i64 = transaction
        .prepare_cached("UPDATE counter SET revision = revision + 1 RETURNING revision")?
        .query_row([], |row| row.get(0))?;
    for change in changes {
        match change {
            Change::Put(key, value) => {
                let stored = match std::str::from_utf8(value) {
                    Ok(text) => ValueRef::Text(text.as_bytes()),
                    Err(_) => ValueRef::Blob(value),
                };
                transaction
                    .prepare_cached(
                        "INSERT INTO record (key, value, revision) VALUES (?1, ?2, ?3)
                         ON CONFLICT (key) DO UPDATE SET value = excluded.value, revision = excluded.revision",
                    )?
                    .execute(params![key, ToSqlOutput::Borrowed(stored), revision])?;
            }
            Change::Delete(key) => {
                transaction.prepare_cached("DELETE FROM record WHERE key = ?1")?.execute([key])?;
            }
        }
    }
    Ok(revision as Revision)
}

fn open_with(path: &Path, migrations: &[&str]) -> Result<SqliteStore, StoreError> {
    let connection = file::open(path, migrations)?;
    Ok(SqliteStore {
        path: path.to_owned(),
        readers: Mutex::new(Vec::new()),
        writer: Mutex::new(Writer { connection, watchers: Vec::new(), broken: None }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const WITH_AUTHOR: &[&str] = &[MIGRATIONS[0], "ALTER TABLE record ADD COLUMN author TEXT NOT NULL DEFAULT 'old';"];

    fn author(store: &SqliteStore, key: &str) -> rusqlite::Result<String> {
        let writer = store.writer.lock();
        writer.connection.query_row("SELECT author FROM record WHERE key = ?1", [key], |row| row.get(0))
    }

    fn put(key: &str) -> Change {
        Change::Put(key.to_owned(), b"{}".to_vec())
    }

    #[test]
    fn an_older_schema_is_migrated_with_its_records_and_revisions() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store");
        let before = {
            let store = open_with(&path, &WITH_AUTHOR[..1]).unwrap();
            store.transact(&[], &[put("a")]).unwrap();
            store.transact(&[], &[put("b")]).unwrap();
            store.list("").unwrap()
        };
        let store = open_with(&path, WITH_AUTHOR).unwrap();
        assert_eq!(store.list("").unwrap(), before);
        assert_eq!(author(&store, "a").unwrap(), "old");
        assert_eq!(store.transact(&[], &[put("c")]).unwrap(), before[1].revision + 1);
        drop(store);
        assert!(matches!(
            open_with(&path, &WITH_AUTHOR[..1]).map(|_| ()),
            Err(StoreError::TooNew { found: 2, known: 1 })
        ));
    }

    #[test]
    fn a_migration_that_fails_leaves_the_older_schema_usable() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store");
        open_with(&path, MIGRATIONS).unwrap().transact(&[], &[put("a")]).unwrap();
        let failing = [MIGRATIONS[0], WITH_AUTHOR[1], "DROP TABLE counter; DROP TABLE nothing;"];
        assert!(matches!(open_with(&path, &failing).map(|_| ()), Err(StoreError::Failed(_))));
        let store = open_with(&path, MIGRATIONS).unwrap();
        assert!(author(&store, "a").is_err());
        assert_eq!(store.transact(&[], &[put("b")]).unwrap(), 2);
    }

    #[test]
    fn a_version_that_only_the_journal_knows_is_refused_when_newer() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store");
        let store = open_with(&path, MIGRATIONS).unwrap();
        store.writer.lock().connection.pragma_update(None, "user_version", 9).unwrap();
        assert!(matches!(open_with(&path, MIGRATIONS).map(|_| ()), Err(StoreError::TooNew { found: 9, known: 1 })));
    }

    #[test]
    fn after_a_commit_of_unknown_outcome_nothing_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&directory.path().join("store")).unwrap();
        store.writer.lock().broken = Some("fsync failed".to_owned());
        assert!(matches!(store.transact(&[], &[put("a")]), Err(StoreError::Failed(_))));
        assert_eq!(store.list("").unwrap(), []);
    }
}
