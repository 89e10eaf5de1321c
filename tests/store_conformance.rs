//! The SQLite engine: the contract of every store, and what only an engine with a file can show.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use instancefs::store::power_loss::{Moment, PowerLoss};
use instancefs::store::sqlite::SqliteStore;
use instancefs::store::{Change, Committed, Compare, Store, StoreError, conformance};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

fn put(key: &str, value: &[u8]) -> Change {
    Change::Put(key.to_owned(), value.to_vec())
}

fn open(path: &Path) -> SqliteStore {
    SqliteStore::open(path).expect("the store opens")
}

fn refusal(path: &Path) -> StoreError {
    match SqliteStore::open(path) {
        Ok(_) => panic!("{} was accepted as a store", path.display()),
        Err(error) => error,
    }
}

#[test]
fn sqlite_keeps_the_contract() {
    let directory = TempDir::new().unwrap();
    let serial = std::cell::Cell::new(0);
    conformance::check(|| {
        serial.set(serial.get() + 1);
        Box::new(open(&directory.path().join(serial.get().to_string())))
    });
}

#[test]
fn a_store_that_never_loses_power_keeps_the_contract() {
    let directory = TempDir::new().unwrap();
    let serial = std::cell::Cell::new(0);
    conformance::check(|| {
        serial.set(serial.get() + 1);
        Box::new(PowerLoss::new(open(&directory.path().join(serial.get().to_string())), 0, Moment::Before))
    });
}

#[test]
fn a_reopened_store_has_everything_and_goes_on_counting() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("store");
    let (records, revision) = {
        let store = open(&path);
        store.transact(&[], &[put("a", b"1"), put("b", b"\xff")]).unwrap();
        let revision = store.transact(&[], &[put("gone", b""), Change::Delete("gone".to_owned())]).unwrap();
        (store.list("").unwrap(), revision)
    };
    let store = open(&path);
    assert_eq!(store.list("").unwrap(), records);
    assert_eq!(store.transact(&[], &[]).unwrap(), revision + 1);
}

#[test]
fn a_new_store_is_readable_by_its_owner_only_and_leaves_nothing_beside_it() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("store");
    drop(open(&path));
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let names: Vec<_> = directory.path().read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["store"]);
}

#[test]
fn a_newer_schema_is_refused() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("store");
    drop(open(&path));
    rusqlite::Connection::open(&path).unwrap().pragma_update(None, "user_version", 7).unwrap();
    let before = std::fs::read(&path).unwrap();
    assert!(matches!(refusal(&path), StoreError::TooNew { found: 7, known: 1 }));
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[test]
fn a_foreign_file_is_refused_and_left_untouched() {
    let directory = TempDir::new().unwrap();
    let database = directory.path().join("somebody.db");
    let theirs = rusqlite::Connection::open(&database).unwrap();
    theirs.pragma_update_and_check(None, "journal_mode", "wal", |_| Ok(())).unwrap();
    theirs.execute_batch("CREATE TABLE t (x); PRAGMA wal_checkpoint; INSERT INTO t VALUES (1);").unwrap();

    let disk = directory.path().join("disk.img");
    std::fs::write(&disk, vec![7_u8; 8192]).unwrap();
    let empty = directory.path().join("empty");
    std::fs::write(&empty, b"").unwrap();

    let snapshot = || -> Vec<_> {
        let mut files: Vec<_> = directory.path().read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files.into_iter().map(|path| (std::fs::read(&path).unwrap(), path)).collect()
    };
    let before = snapshot();
    for path in [&database, &disk, &empty] {
        assert!(matches!(refusal(path), StoreError::Foreign { .. }), "{}", path.display());
    }
    assert!(snapshot() == before, "a refused file was changed, or something was left beside it");
    assert!(matches!(refusal(directory.path()), StoreError::Foreign { .. }));
    drop(theirs);
}

#[test]
fn a_damaged_store_is_refused_and_left_untouched() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("store");
    {
        let store = open(&path);
        let changes: Vec<Change> = (0..500).map(|index| put(&format!("k/{index}"), &[b'x'; 200])).collect();
        store.transact(&[], &changes).unwrap();
    }
    let sound = std::fs::read(&path).unwrap();
    let mut overwritten = sound.clone();
    overwritten[8192..16384].fill(0xa5);
    for damaged in [&sound[..sound.len() / 2], &sound[..200], &overwritten] {
        std::fs::write(&path, damaged).unwrap();
        assert!(matches!(refusal(&path), StoreError::Foreign { .. }));
        assert!(std::fs::read(&path).unwrap() == damaged, "a damaged store was changed");
    }
    std::fs::write(&path, &sound).unwrap();
    assert_eq!(open(&path).list("k/").unwrap().len(), 500);
}

#[test]
fn a_damaged_store_with_a_journal_beside_it_is_left_untouched() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("store");
    let changes: Vec<Change> = (0..500).map(|index| put(&format!("k/{index:03}"), &[b'x'; 200])).collect();
    open(&path).transact(&[], &changes).unwrap();
    let store = open(&path);
    store.transact(&[], &[put("k/000", b"in the journal")]).unwrap();
    // What a kill would leave: the database and a journal that it does not contain yet.
    let copy = directory.path().join("copy");
    let (wal, copied_wal) = (path.with_file_name("store-wal"), copy.with_file_name("copy-wal"));
    std::fs::copy(&wal, &copied_wal).unwrap();
    let mut damaged = std::fs::read(&path).unwrap();
    let middle = damaged.len() / 2 / 4096 * 4096;
    damaged[middle..middle + 4096].fill(0xa5);
    std::fs::write(&copy, &damaged).unwrap();
    let journal = std::fs::read(&copied_wal).unwrap();
    assert!(!journal.is_empty());

    assert!(matches!(refusal(&copy), StoreError::Foreign { .. }));
    assert!(std::fs::read(&copy).unwrap() == damaged, "the journal was carried into a damaged store");
    assert!(std::fs::read(&copied_wal).unwrap() == journal, "the journal was changed");
}

#[test]
fn two_openings_of_one_file_contend_like_one() {
    const INCREMENTS: u64 = 30;
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("store");
    open(&path).transact(&[], &[put("n", b"0")]).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let store = open(&path);
                let mut done = 0;
                while done < INCREMENTS {
                    let record = store.get("n").unwrap().unwrap();
                    let count: u64 = std::str::from_utf8(&record.value).unwrap().parse().unwrap();
                    let next = put("n", (count + 1).to_string().as_bytes());
                    match store.transact(&[Compare::At("n".to_owned(), record.revision)], &[next]) {
                        Ok(_) => done += 1,
                        Err(StoreError::Conflict { .. }) => {}
                        Err(other) => panic!("{other}"),
                    }
                }
            });
        }
    });
    let record = open(&path).get("n").unwrap().unwrap();
    assert_eq!(record.value, (2 * INCREMENTS).to_string().as_bytes());
}

/// A file system of its own, unmounted with the value.
struct Tmpfs(TempDir);

impl Tmpfs {
    fn new(options: &str) -> Tmpfs {
        let directory = TempDir::new().unwrap();
        mount(Some("tmpfs"), directory.path(), Some("tmpfs"), MsFlags::empty(), Some(options))
            .expect("a tmpfs is mounted (these tests run as root)");
        Tmpfs(directory)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        umount2(self.0.path(), MntFlags::MNT_DETACH).expect("the tmpfs of this test is unmounted");
    }
}

#[test]
fn a_full_disk_refuses_the_whole_transaction_and_keeps_what_was_acknowledged() {
    let tmpfs = Tmpfs::new("size=2m");
    let path = tmpfs.0.path().join("store");
    let ballast = tmpfs.0.path().join("ballast");
    std::fs::write(&ballast, vec![0_u8; 512 << 10]).unwrap();
    let store = open(&path);
    let watch = store.watch("");
    let mut acknowledged = Vec::new();
    let refused = loop {
        let key = format!("k/{:04}", acknowledged.len());
        let changes = [put(&key, &[b'x'; 40_000]), put(&format!("{key}/second"), b"y")];
        match store.transact(&[Compare::Absent(key.clone())], &changes) {
            Ok(revision) => acknowledged.push((key, revision)),
            Err(error) => break error,
        }
        assert!(acknowledged.len() < 1000, "a disk of 2 MiB never filled");
    };
    assert!(matches!(refused, StoreError::Full), "{refused:?}");
    assert!(acknowledged.len() > 3);
    assert_eq!(store.list("").unwrap().len(), 2 * acknowledged.len(), "half a transaction is visible");
    assert_eq!(watch.try_iter().map(|Committed { revision, .. }| revision).max(), Some(acknowledged.last().unwrap().1));

    std::fs::remove_file(&ballast).unwrap();
    let revision = store.transact(&[], &[put("after", b"")]).expect("a store goes on when there is room again");
    assert_eq!(revision, acknowledged.last().unwrap().1 + 1);
    drop(store);
    let store = open(&path);
    for (key, revision) in &acknowledged {
        assert_eq!(store.get(key).unwrap().expect("an acknowledged record is kept").revision, *revision);
    }
    assert_eq!(store.list("").unwrap().len(), 2 * acknowledged.len() + 1);
}

#[test]
fn a_disk_too_full_for_a_new_store_leaves_none() {
    let tmpfs = Tmpfs::new("size=64k");
    std::fs::write(tmpfs.0.path().join("ballast"), vec![0_u8; 60 << 10]).unwrap();
    assert!(matches!(refusal(&tmpfs.0.path().join("store")), StoreError::Full));
    assert_eq!(tmpfs.0.path().read_dir().unwrap().count(), 1);
}

const KILLED_WRITER: &str = "INSTANCEFS_TEST_KILLED_WRITER";

/// The child process of the test below; started otherwise it has nothing to do.
#[test]
fn writer_to_be_killed() {
    let Some(path) = std::env::var_os(KILLED_WRITER) else { return };
    let store = open(Path::new(&path));
    for index in 0_u64.. {
        let key = format!("k/{index:08}");
        store.transact(&[], &[put(&key, b"{}"), put("last", key.as_bytes())]).unwrap();
        eprintln!("{key}");
    }
}

#[test]
fn a_killed_writer_loses_nothing_it_acknowledged() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("store");
    let mut kept = 0;
    for _ in 0..3 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writer_to_be_killed", "--nocapture"])
            .env(KILLED_WRITER, &path)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut acknowledged: Vec<String> = lines.by_ref().take(50).map(Result::unwrap).collect();
        child.kill().unwrap();
        child.wait().unwrap();
        acknowledged.extend(lines.map(Result::unwrap));
        assert!(acknowledged.len() >= 50, "{acknowledged:?}");

        let store = open(&path);
        for key in &acknowledged {
            assert!(store.get(key).unwrap().is_some(), "{key} was acknowledged and is gone");
        }
        let records = store.list("k/").unwrap();
        let last = store.get("last").unwrap().unwrap();
        assert_eq!(last.revision, records.iter().map(|record| record.revision).max().unwrap(), "half a commit");
        assert!(records.len() >= kept, "an earlier life's records are gone");
        kept = records.len();
    }
}

#[test]
fn ten_thousand_records_are_one_transaction_and_one_list() {
    let directory = TempDir::new().unwrap();
    let store = open(&directory.path().join("store"));
    let changes: Vec<Change> = (0..10_000).map(|index| put(&format!("instances/{index:08}"), &[b'x'; 500])).collect();
    let started = Instant::now();
    let revision = store.transact(&[], &changes).unwrap();
    let written = started.elapsed();
    let started = Instant::now();
    let records = store.list("instances/").unwrap();
    println!("10000 puts {written:?}, list {:?}", started.elapsed());
    assert_eq!(records.len(), 10_000);
    assert!(records.iter().all(|record| record.revision == revision));
}

#[test]
fn power_goes_at_the_chosen_commit_and_stays_gone() {
    for (moment, survivors) in [(Moment::Before, 1), (Moment::After, 2)] {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("store");
        let store = PowerLoss::new(open(&path), 2, moment);
        store.transact(&[], &[put("1", b"")]).unwrap();
        assert!(!store.lost());
        assert!(matches!(store.transact(&[], &[put("2", b"")]), Err(StoreError::Failed(_))));
        assert!(store.lost());
        assert!(matches!(store.transact(&[], &[put("3", b"")]), Err(StoreError::Failed(_))));
        assert!(store.get("1").is_err() && store.list("").is_err());
        assert!(store.watch("").recv().is_err());
        assert_eq!(store.transactions(), 2);
        drop(store);
        assert_eq!(open(&path).list("").unwrap().len(), survivors);
    }
}
