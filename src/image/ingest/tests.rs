use std::cell::RefCell;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

use super::follower::Holes;
use super::*;
use crate::image::inspect::Refusal;
use crate::image::{Format, Inspected};

fn sha512sum(path: &Path) -> String {
    let output = Command::new("sha512sum").arg(path).output().unwrap();
    String::from_utf8(output.stdout).unwrap().split(' ').next().unwrap().to_owned()
}

fn commit(draft: &Draft, claimed: Option<Format>) -> Result<Committed, CommitError> {
    draft.commit(claimed, &|_| {}, &|| false)
}

fn length(draft: &Draft) -> u64 {
    draft.file.metadata().unwrap().len()
}

fn bytes(length: usize) -> Vec<u8> {
    // A prime period, so that no part equals another.
    let period: Vec<u8> = (0..65_521).map(|index| (index * 31 % 251) as u8).collect();
    period.repeat(length / period.len() + 1)[..length].to_vec()
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < end, "waited in vain for: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn hashed(draft: &Draft) -> u64 {
    draft.running.lock().hashed()
}

/// Hashes as far behind the writers as a follower goes.
fn catch_up(draft: &Draft) {
    let mut buffer = vec![0; PART];
    while draft.follow_once(&mut buffer) {}
}

#[test]
fn data_in_order_is_hashed_behind_the_writer_and_not_read_again() {
    let directory = tempfile::tempdir().unwrap();
    let draft = Arc::new(Draft::open(&directory.path().join("data")).unwrap());
    assert_eq!(length(&draft), 0);
    let data = bytes(40 << 20);
    for (index, part) in data.chunks(777_777).enumerate() {
        draft.write_at(index as u64 * 777_777, part).unwrap();
        draft.follow();
    }
    until("most of it is hashed", || hashed(&draft) >= 24 << 20);
    let reports = RefCell::new(Vec::new());
    let committed = draft.commit(None, &|percent| reports.borrow_mut().push(percent), &|| false).unwrap();
    let reports = reports.into_inner();
    assert_eq!((reports[0], reports.last()), (0, Some(&100)));
    assert!(reports[1] >= 60, "what was hashed is not read again: {reports:?}");
    assert_eq!(committed.sha512, sha512sum(&draft.path));
    assert_eq!(committed.size_bytes, 40 << 20);
    assert_eq!(committed.inspected, Inspected { format: Format::Raw, virtual_size_bytes: 40 << 20 });
    assert_eq!(std::fs::metadata(&draft.path).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn what_is_rewritten_behind_the_hash_is_hashed_again() {
    const LENGTH: u64 = 20 << 20;
    type Step = fn(&Draft) -> io::Result<()>;
    let steps: &[Step] = &[
        |d| d.write_at(1 << 20, b"rewritten"),
        |d| d.truncate(1 << 20),
        |d| d.truncate(0).and_then(|()| d.truncate(LENGTH)),
        |d| d.allocate(4096, 8192, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE),
        |d| d.allocate(1 << 20, 1 << 20, libc::FALLOC_FL_ZERO_RANGE),
        |d| d.allocate(0, LENGTH + 5000, 0),
        |d| d.truncate(0).and_then(|()| d.write_at(0, &bytes(LENGTH as usize - 1))),
        |d| {
            (0..20).try_for_each(|index| {
                catch_up(d);
                d.write_at(index * 4096, b"over and over").and_then(|()| d.write_at(LENGTH, b"the end"))
            })
        },
    ];
    // On a disk, since a file system in memory may not know all of these.
    for (index, step) in steps.iter().enumerate() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let draft = Draft::open(&directory.path().join("data")).unwrap();
        draft.write_at(0, &bytes(LENGTH as usize)).unwrap();
        catch_up(&draft);
        assert!(hashed(&draft) >= 8 << 20);
        step(&draft).unwrap();
        catch_up(&draft);
        assert_eq!(commit(&draft, None).unwrap().sha512, sha512sum(&draft.path), "step {index}");
        // Once more, now that everything is hashed.
        draft.thaw();
        step(&draft).unwrap();
        assert_eq!(commit(&draft, None).unwrap().sha512, sha512sum(&draft.path), "step {index} again");
    }
}

#[test]
fn a_follower_races_with_writers_and_the_hash_is_true() {
    let directory = tempfile::tempdir().unwrap();
    let draft = Arc::new(Draft::open(&directory.path().join("data")).unwrap());
    let mut random = 1u64;
    for round in 0..600u64 {
        draft.write_at(round << 17, &vec![round as u8; 1 << 17]).unwrap();
        draft.follow();
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        if round % 100 == 99 {
            // Just where the follower may be reading.
            let near = (round << 17).saturating_sub((8 << 20) + (random >> 44));
            draft.write_at(near, b"changed under the reader").unwrap();
            draft.write_at(round << 17, b"on").unwrap();
        }
    }
    assert_eq!(commit(&draft, None).unwrap().sha512, sha512sum(&draft.path));
}

#[test]
fn holes_stay_holes_and_are_hashed_as_zeros() {
    const LENGTH: u64 = 3 << 30;
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let draft = Draft::open(&directory.path().join("data")).unwrap();
    draft.truncate(1 << 30).unwrap();
    draft.write_at((64 << 20) + 5, &bytes(100_000)).unwrap();
    catch_up(&draft);
    draft.write_at(96 << 20, b"end").unwrap();
    draft.truncate(128 << 20).unwrap();
    let data = draft.find(0, Find::Data).unwrap().unwrap();
    assert!(data > 0 && data <= (64 << 20) + 5, "{data}");
    assert_eq!(draft.find(0, Find::Hole).unwrap(), Some(0));
    assert_eq!(draft.find(LENGTH, Find::Data).unwrap(), None);
    assert_eq!(commit(&draft, None).unwrap().sha512, sha512sum(&draft.path));
    assert!(std::fs::metadata(&draft.path).unwrap().blocks() * 512 < 1 << 20, "committing filled the holes");
}

#[test]
fn a_removed_draft_takes_no_space_although_it_is_open_and_one_with_another_name_is_left_alone() {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let (path, other) = (directory.path().join("data"), directory.path().join("other"));
    let draft = Draft::open(&path).unwrap();
    draft.write_at(0, &bytes(1 << 20)).unwrap();
    std::fs::hard_link(&path, &other).unwrap();
    std::fs::remove_file(&path).unwrap();
    draft.free_removed().unwrap();
    assert_eq!(std::fs::read(&other).unwrap(), bytes(1 << 20));
    std::fs::remove_file(&other).unwrap();
    draft.free_removed().unwrap();
    assert_eq!(draft.file.metadata().unwrap().blocks(), 0);
}

#[test]
fn holes_are_looked_for_again_behind_what_was_cut_punched_or_left_out() {
    const LENGTH: u64 = 32 << 20;
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let draft = Draft::open(&directory.path().join("data")).unwrap();
    let holes = |draft: &Draft| {
        let mut running = draft.running.lock();
        let part = draft.arrived.lock().claim(&mut running).expect("there is enough to hash");
        part.holes
    };
    draft.write_at(0, &bytes(LENGTH as usize)).unwrap();
    assert!(holes(&draft) == Holes::None);
    draft.allocate(4096, 8192, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE).unwrap();
    draft.write_at(LENGTH, b"more").unwrap();
    assert!(holes(&draft) == Holes::Unknown);
    draft.truncate(0).unwrap();
    draft.write_at(1, &bytes(LENGTH as usize)).unwrap();
    assert!(holes(&draft) == Holes::Unknown);
    draft.write_at(0, b"x").unwrap();
    draft.write_at(1, &bytes(LENGTH as usize)).unwrap();
    assert!(holes(&draft) == Holes::None);
}

#[test]
fn allocating_keeps_its_promises_and_refuses_what_shifts_bytes() {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let draft = Draft::open(&directory.path().join("data")).unwrap();
    draft.allocate(0, 1 << 20, libc::FALLOC_FL_KEEP_SIZE).unwrap();
    assert_eq!(length(&draft), 0);
    draft.allocate(0, 1 << 20, 0).unwrap();
    assert_eq!(length(&draft), 1 << 20);
    for mode in [libc::FALLOC_FL_COLLAPSE_RANGE, libc::FALLOC_FL_INSERT_RANGE, 1 << 30, -1] {
        assert_eq!(draft.allocate(0, 4096, mode).unwrap_err().raw_os_error(), Some(libc::EOPNOTSUPP), "{mode:#x}");
    }
    assert_eq!(draft.allocate(u64::MAX, 1, 0).unwrap_err().raw_os_error(), Some(libc::EFBIG));
    assert_eq!(draft.write_at(u64::MAX - 1, b"xyz").unwrap_err().raw_os_error(), Some(libc::EFBIG));
    draft.write_at(0, &bytes(4096)).unwrap();
    commit(&draft, None).unwrap();
    assert_eq!(draft.allocate(0, 4096, 0).unwrap_err().raw_os_error(), Some(libc::EBUSY));
}

#[test]
fn any_order_of_writes_and_truncations_gives_the_hash_of_the_file() {
    type Step = fn(&Draft) -> io::Result<()>;
    let scripts: &[&[Step]] = &[
        &[|d| d.write_at(0, &bytes(4096)), |d| d.write_at(100, b"overwritten")],
        &[|d| d.write_at(0, &bytes(4096)), |d| d.write_at(8192, b"after a hole")],
        &[|d| d.write_at(4096, &bytes(4096)), |d| d.write_at(0, &bytes(4096))],
        &[|d| d.write_at(0, &bytes(4096)), |d| d.truncate(1000)],
        &[|d| d.write_at(0, &bytes(4096)), |d| d.truncate(9000)],
        &[|d| d.write_at(0, &bytes(4096)), |d| d.truncate(1000), |d| d.write_at(4096, b"again")],
        &[|d| d.write_at(0, &bytes(4096)), |d| d.write_at(0, &bytes(600)), |d| d.write_at(600, b"short")],
        &[|d| d.write_at(0, &bytes(4096)), |d| d.truncate(0), |d| d.write_at(0, &bytes(999))],
    ];
    for (index, script) in scripts.iter().enumerate() {
        let directory = tempfile::tempdir().unwrap();
        let draft = Draft::open(&directory.path().join("data")).unwrap();
        for step in *script {
            step(&draft).unwrap();
        }
        let committed = commit(&draft, None).unwrap();
        assert_eq!(committed.sha512, sha512sum(&draft.path), "script {index}");
        assert_eq!(committed.size_bytes, length(&draft));
    }
}

#[test]
fn a_draft_opened_again_after_a_restart_is_read_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("data");
    Draft::open(&path).unwrap().write_at(0, &bytes(5000)).unwrap();
    let draft = Draft::open(&path).unwrap();
    draft.write_at(5000, &bytes(5000)).unwrap();
    assert_eq!(commit(&draft, Some(Format::Raw)).unwrap().sha512, sha512sum(&path));
}

#[test]
fn writers_in_parallel_leave_a_hash_that_is_true() {
    let directory = tempfile::tempdir().unwrap();
    let draft = Draft::open(&directory.path().join("data")).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let draft = &draft;
            scope.spawn(move || {
                for round in 0..200 {
                    draft.write_at((round * 4 + thread) * 300, &[thread as u8; 700]).unwrap();
                }
            });
        }
    });
    assert_eq!(commit(&draft, None).unwrap().sha512, sha512sum(&draft.path));
}

#[test]
fn nobody_writes_past_the_inspection() {
    let directory = tempfile::tempdir().unwrap();
    let draft = Draft::open(&directory.path().join("data")).unwrap();
    draft.write_at(0, &bytes(4096)).unwrap();
    let during = RefCell::new(Vec::new());
    let attempt = |_| {
        let written = draft.write_at(0, b"x").unwrap_err().raw_os_error();
        let cut = draft.truncate(1).unwrap_err().raw_os_error();
        let committed = matches!(commit(&draft, None), Err(CommitError::Busy));
        during.borrow_mut().push((written, cut, committed));
    };
    draft.commit(None, &attempt, &|| false).unwrap();
    attempt(0);
    let during = during.into_inner();
    assert!(during.len() > 2, "{during:?}");
    assert!(during.iter().all(|seen| *seen == (Some(libc::EBUSY), Some(libc::EBUSY), true)), "{during:?}");
    draft.thaw();
    draft.write_at(0, b"x").unwrap();
}

#[test]
fn a_refused_or_cancelled_draft_can_be_written_again() {
    let directory = tempfile::tempdir().unwrap();
    let draft = Draft::open(&directory.path().join("data")).unwrap();
    assert!(matches!(commit(&draft, None), Err(CommitError::Refused(Refusal::Empty))));
    draft.write_at(0, &bytes(4096)).unwrap();
    assert!(matches!(commit(&draft, Some(Format::Qcow2)), Err(CommitError::Refused(Refusal::NotQcow2))));
    assert!(matches!(draft.commit(None, &|_| {}, &|| true), Err(CommitError::Cancelled)));
    draft.write_at(4096, b"more").unwrap();
    assert_eq!(commit(&draft, None).unwrap().size_bytes, 4100);
}

#[test]
fn a_file_changed_behind_us_during_the_commit_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("data");
    std::fs::write(&path, bytes(4096)).unwrap();
    let draft = Draft::open(&path).unwrap();
    let intruder = OpenOptions::new().write(true).open(&path).unwrap();
    let interfere = || {
        intruder.write_all_at(b"x", 9000).unwrap();
        false
    };
    assert!(matches!(draft.commit(None, &|_| {}, &interfere), Err(CommitError::Changed)));
}

#[test]
fn publishing_freezes_the_file_and_can_be_repeated() {
    let directory = tempfile::tempdir().unwrap();
    let (from, to) = (directory.path().join("draft"), directory.path().join("image"));
    std::fs::write(&from, b"data").unwrap();
    for _ in 0..2 {
        publish(&from, &to, Some(65534)).unwrap();
        let metadata = std::fs::metadata(&to).unwrap();
        assert_eq!((metadata.mode() & 0o7777, metadata.gid()), (0o440, 65534));
        assert!(!from.exists());
    }
}

#[test]
fn publishing_never_replaces_and_says_when_there_is_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (from, to) = (directory.path().join("draft"), directory.path().join("image"));
    assert_eq!(publish(&from, &to, None).unwrap_err().kind(), io::ErrorKind::NotFound);
    std::fs::write(&from, b"new").unwrap();
    std::fs::write(&to, b"old").unwrap();
    assert_eq!(publish(&from, &to, None).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read(&to).unwrap(), b"old");
    assert_eq!(std::fs::read(&from).unwrap(), b"new");
}

#[test]
fn a_symlink_is_neither_a_draft_nor_published() {
    let directory = tempfile::tempdir().unwrap();
    let (target, link) = (directory.path().join("target"), directory.path().join("link"));
    std::fs::write(&target, b"somebody's").unwrap();
    std::os::unix::fs::symlink(&target, &link).unwrap();
    assert!(Draft::open(&link).is_err());
    assert!(publish(&link, &directory.path().join("image"), None).is_err());
    assert!(link.is_symlink());
}
