//! The database file: is it ours, how is it made, how is an older schema carried on.
//!
//! The database names itself by `application_id` and its schema by `user_version`. A file that is not ours is found
//! out by its header, before SQLite opens it: opening alone can change a database that has a journal beside it.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags, Transaction, TransactionBehavior, ffi};

use crate::store::StoreError;

/// `infs`, at offset 68 of the database header ("Application ID", SQLite file format 1.3).
const APPLICATION_ID: i32 = 0x696e_6673;
/// How long another process (a `sqlite3` of the administrator) may hold the database.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);
/// What a checkpoint leaves of the journal file, in bytes.
const JOURNAL_SIZE_LIMIT: i64 = 16 << 20;

/// The statements that lead from each schema version to the next; their number is the current version. Entries are
/// never changed, only added.
pub(super) const MIGRATIONS: &[&str] = &["CREATE TABLE record (
         key TEXT PRIMARY KEY NOT NULL,
         value BLOB NOT NULL,
         revision INTEGER NOT NULL
     );
     CREATE TABLE counter (
         id INTEGER PRIMARY KEY CHECK (id = 0),
         revision INTEGER NOT NULL
     );
     INSERT INTO counter VALUES (0, 0);"];

/// The writing connection to the database at `path`, made if there is none, with the schema of `migrations`.
pub(super) fn open(path: &Path, migrations: &[&str]) -> Result<Connection, StoreError> {
    let known = u32::try_from(migrations.len()).unwrap_or(u32::MAX);
    match File::open(path) {
        Ok(file) => check_header(path, file, known)?,
        Err(error) if error.kind() == ErrorKind::NotFound => create(path, migrations)?,
        Err(error) => return Err(disk_failure(path, &error)),
    }
    let failed = |error: rusqlite::Error| failure(path, &error);
    let connection = connect(path).map_err(failed)?;
    // Until the content is known to be sound, closing must not carry the journal into the database.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).map_err(failed)?;
    let verdict: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(failed)?;
    if verdict != "ok" {
        return Err(foreign(path, verdict));
    }
    migrate(&connection, path, migrations, known)?;
    let mode: String =
        connection.pragma_update_and_check(None, "journal_mode", "wal", |row| row.get(0)).map_err(failed)?;
    if mode != "wal" {
        return Err(StoreError::Failed(format!(
            "{} is on a file system without shared memory maps (journal mode {mode}); use a local one",
            path.display()
        )));
    }
    connection.pragma_update(None, "journal_size_limit", JOURNAL_SIZE_LIMIT).map_err(failed)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false).map_err(failed)?;
    Ok(connection)
}

/// A connection to an existing database, without a statement that changes it.
pub(super) fn connect(path: &Path) -> rusqlite::Result<Connection> {
    // Neither CREATE nor URI: a path is a path, and only `create` makes databases.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "synchronous", "full")?;
    Ok(connection)
}

/// Refuses by the 100-byte header (SQLite file format 1.3) what is not ours or newer, without opening the database.
fn check_header(path: &Path, mut file: File, known: u32) -> Result<(), StoreError> {
    let mut header = [0_u8; 100];
    match file.read_exact(&mut header) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
            return Err(foreign(path, "it is shorter than a database header".to_owned()));
        }
        Err(error) if error.kind() == ErrorKind::IsADirectory => {
            return Err(foreign(path, "it is a directory".to_owned()));
        }
        Err(error) => return Err(disk_failure(path, &error)),
    }
    if !header.starts_with(b"SQLite format 3\0") {
        return Err(foreign(path, "it is no SQLite database".to_owned()));
    }
    if header[68..72] != APPLICATION_ID.to_be_bytes() {
        return Err(foreign(path, "it is the database of another program".to_owned()));
    }
    let found = u32::from_be_bytes([header[60], header[61], header[62], header[63]]);
    if found > known {
        return Err(StoreError::TooNew { found, known });
    }
    Ok(())
}

/// Makes the database beside its place and links it there when it is complete, so that no crash leaves a half-made
/// one, and nothing that appeared at `path` meanwhile is replaced.
fn create(path: &Path, migrations: &[&str]) -> Result<(), StoreError> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}.new", uuid::Uuid::new_v4()));
    let beside = PathBuf::from(beside);
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&beside)
        .map_err(|error| disk_failure(path, &error))?;
    let made =
        build(&beside, migrations).map_err(|error| failure(path, &error)).and_then(|()| {
            match std::fs::hard_link(&beside, path) {
                Ok(()) => Ok(()),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
                Err(error) => Err(disk_failure(path, &error)),
            }
        });
    // Made a few lines above, under a name of its own; SQLite has removed its journal with the commit.
    if let Err(error) = std::fs::remove_file(&beside) {
        log::warn!("{} could not be removed: {error}", beside.display());
    }
    made?;
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(|error| disk_failure(path, &error))
}

/// One transaction in the rollback journal mode: the identity is in the file itself, not in a journal beside it.
fn build(path: &Path, migrations: &[&str]) -> rusqlite::Result<()> {
    let connection = connect(path)?;
    let transaction = Transaction::new_unchecked(&connection, TransactionBehavior::Immediate)?;
    transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
    for statements in migrations {
        transaction.execute_batch(statements)?;
    }
    transaction.pragma_update(None, "user_version", i64::try_from(migrations.len()).unwrap_or(i64::MAX))?;
    transaction.commit()
}

/// Carries an older schema to the known one, all steps in one transaction.
fn migrate(connection: &Connection, path: &Path, migrations: &[&str], known: u32) -> Result<(), StoreError> {
    let failed = |error: rusqlite::Error| failure(path, &error);
    let version = |connection: &Connection| -> Result<u32, StoreError> {
        connection.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(failed)
    };
    // The header alone may be behind the journal.
    let found = version(connection)?;
    if found > known {
        return Err(StoreError::TooNew { found, known });
    }
    if found == known {
        return Ok(());
    }
    let transaction = Transaction::new_unchecked(connection, TransactionBehavior::Immediate).map_err(failed)?;
    let found = version(&transaction)?;
    for statements in migrations.iter().skip(found as usize) {
        transaction.execute_batch(statements).map_err(failed)?;
    }
    transaction.pragma_update(None, "user_version", known).map_err(failed)?;
    transaction.commit().map_err(failed)?;
    log::info!("{}: schema version {found} migrated to {known}", path.display());
    Ok(())
}

fn foreign(path: &Path, detail: String) -> StoreError {
    StoreError::Foreign { path: path.display().to_string(), detail }
}

fn disk_failure(path: &Path, error: &std::io::Error) -> StoreError {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => StoreError::Full,
        _ => StoreError::Failed(format!("{}: {error}", path.display())),
    }
}

/// What an error of SQLite means to callers of the store.
pub(super) fn failure(path: &Path, error: &rusqlite::Error) -> StoreError {
    let extended = error.sqlite_error().map_or(0, |error| error.extended_code);
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => StoreError::Full,
        // Growing the shared-memory index fails for want of space, and SQLite has no other code for it.
        _ if extended == ffi::SQLITE_IOERR_SHMSIZE => StoreError::Full,
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => foreign(path, error.to_string()),
        _ => StoreError::Failed(format!("{}: {error}", path.display())),
    }
}
