use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, AtomicU64};

use super::*;

const QUIET: Watch<'_> = Watch { cancelled: &|| false, progress: &|_| {} };

fn file(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

fn bytes(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn sha512(bytes: &[u8]) -> String {
    openssl::sha::sha512(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Data, a hole, data of an odd length, and a hole at the end.
fn sparse() -> File {
    let file = file(&[1; 5000]);
    file.write_all_at(&[2; 3 << 20], 8 << 20).unwrap();
    file.write_all_at(&[3; 7], (20 << 20) + 3).unwrap();
    file.set_len(32 << 20).unwrap();
    file
}

/// A file whose writes, or whose sync, fail.
struct Failing {
    file: File,
    errno: i32,
    /// So many writes succeed before.
    writes: AtomicU32,
    sync_fails: bool,
}

impl Target for Failing {
    fn file(&self) -> &File {
        &self.file
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if self.writes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_err() {
            return Err(io::Error::from_raw_os_error(self.errno));
        }
        self.file.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        if self.sync_fails { Err(io::Error::from_raw_os_error(self.errno)) } else { self.file.sync_all() }
    }
}

#[test]
fn a_copy_has_every_byte_and_hole_of_the_original() {
    for from in [sparse(), file(b""), file(b"short"), file(&vec![7; (2 << 20) + 1])] {
        let to = tempfile::tempfile().unwrap();
        let content = copy(&from, &to, &QUIET).unwrap();
        let wanted = bytes(&from);
        assert!(bytes(&to) == wanted);
        assert_eq!(content, Content { size_bytes: wanted.len() as u64, sha512: sha512(&wanted) });
        assert_eq!(read(&to, &QUIET).unwrap(), content);
        let (ours, theirs) = (to.metadata().unwrap().blocks(), from.metadata().unwrap().blocks());
        assert!(ours * 10 <= theirs * 11, "{ours} blocks of {theirs}");
    }
}

#[test]
fn every_failing_write_is_said_with_its_errno() {
    let from = sparse();
    for errno in [libc::ENOSPC, libc::EDQUOT, libc::EIO] {
        for (writes, sync_fails) in [(0, false), (1, false), (4, false), (u32::MAX, true)] {
            let file = tempfile::tempfile().unwrap();
            let to = Failing { file, errno, writes: AtomicU32::new(writes), sync_fails };
            let error = copy(&from, &to, &QUIET).unwrap_err();
            match (error.named("disk", "copy"), errno) {
                (BlockError::NoSpace(_), libc::ENOSPC)
                | (BlockError::Quota(_), libc::EDQUOT)
                | (BlockError::Failed(_), libc::EIO) => {}
                (error, errno) => panic!("{errno} is told as {error:?}"),
            }
        }
    }
}

#[test]
fn a_copy_that_is_not_what_was_read_is_refused() {
    struct Lying(File);
    impl Target for Lying {
        fn file(&self) -> &File {
            &self.0
        }
        fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
            let mut bytes = bytes.to_vec();
            if offset == 9 << 20 {
                bytes[5] ^= 1;
            }
            self.0.write_all_at(&bytes, offset)
        }
    }
    match copy(&sparse(), &Lying(tempfile::tempfile().unwrap()), &QUIET) {
        Err(CopyError::Differs(at)) => assert_eq!(at, (9 << 20) + 5),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_copy_is_given_up_wherever_it_is_told_to() {
    let from = sparse();
    let asked = AtomicU64::new(0);
    let count = || {
        asked.fetch_add(1, Ordering::Relaxed);
        false
    };
    copy(&from, &tempfile::tempfile().unwrap(), &Watch { cancelled: &count, progress: &|_| {} }).unwrap();
    let questions = asked.load(Ordering::Relaxed);
    assert!(questions > 20, "asked {questions} times for 32 MiB");
    for at in [1, 2, 5, 10, 20] {
        let asked = AtomicU64::new(0);
        let cancelled = || asked.fetch_add(1, Ordering::Relaxed) >= at;
        let error = copy(&from, &tempfile::tempfile().unwrap(), &Watch { cancelled: &cancelled, progress: &|_| {} });
        assert!(matches!(error, Err(CopyError::Cancelled)), "{error:?}");
    }
}

#[test]
fn a_change_of_a_disk_changes_its_fingerprint() {
    let file = file(b"one");
    let before = settled_fingerprint(&file).unwrap();
    assert_eq!(fingerprint(&file).unwrap(), before);
    file.write_all_at(b"two", 0).unwrap();
    assert_ne!(fingerprint(&file).unwrap(), before);
}
