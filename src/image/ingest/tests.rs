use std::cell::RefCell;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use super::*;

fn sha512sum(path: &Path) -> String {
    let output = Command::new("sha512sum").arg(path).output().unwrap();
    String::from_utf8(output.stdout).unwrap().split(' ').next().unwrap().to_owned()
}

fn commit(draft: &Draft, claimed: Option<Format>) -> Result<Committed, CommitError> {
    draft.commit(claimed, &|_| {}, &|| false)
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index * 31 % 251) as u8).collect()
}

#[test]
fn data_in_order_is_hashed_on_the_way_and_not_read_again() {
    let directory = tempfile::tempdir().unwrap();
    let draft = Draft::open(&directory.path().join("data")).unwrap();
    assert!(!draft.has_data().unwrap());
    for (index, part) in bytes(10_000).chunks(777).enumerate() {
        draft.write_at(index as u64 * 777, part).unwrap();
    }
    let reports = RefCell::new(Vec::new());
    let committed = draft.commit(None, &|percent| reports.borrow_mut().push(percent), &|| false).unwrap();
    assert_eq!(reports.into_inner(), [0, 100]);
    assert_eq!(committed.sha512, sha512sum(draft.path()));
    assert_eq!(committed.size_bytes, 10_000);
    assert_eq!(committed.inspected, Inspected { format: Format::Raw, virtual_size_bytes: 10_240 });
    assert_eq!(std::fs::metadata(draft.path()).unwrap().permissions().mode() & 0o777, 0o600);
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
        assert_eq!(committed.sha512, sha512sum(draft.path()), "script {index}");
        assert_eq!(committed.size_bytes, draft.len().unwrap());
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
    assert_eq!(commit(&draft, None).unwrap().sha512, sha512sum(draft.path()));
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
    assert_eq!(*during.borrow(), [(Some(libc::EBUSY), Some(libc::EBUSY), true); 3]);
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
fn an_image_that_only_qemu_refuses_is_refused() {
    let ours = Inspected { format: Format::Qcow2, virtual_size_bytes: 4096 };
    let agreeing = r#"{"format":"qcow2","virtual-size":4096}"#;
    let info = |text: &str| serde_json::from_str::<qemu_img::QemuInfo>(text).unwrap();
    agree(&ours, &info(agreeing)).unwrap();
    for text in [
        r#"{"format":"raw","virtual-size":4096}"#,
        r#"{"format":"qcow2","virtual-size":4608}"#,
        r#"{"format":"qcow2","virtual-size":4096,"backing-filename":"/etc/shadow"}"#,
        r#"{"format":"qcow2","virtual-size":4096,"format-specific":{"type":"qcow2","data":{"data-file":"/dev/sda"}}}"#,
        r#"{"format":"qcow2","virtual-size":4096,"encrypted":true}"#,
    ] {
        assert!(matches!(agree(&ours, &info(text)), Err(CommitError::Disagrees(_))), "{text}");
    }
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
