//! Writing a draft's data, of which the kernel is told before it is in the file.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use nix::unistd::{Whence, close, lseek};
use uuid::Uuid;

use crate::support::{Daemon, errno, skipped, wait_until};

const PART: usize = 1 << 20;

fn part(index: usize) -> Vec<u8> {
    (0..PART).map(|at| (at * 31 + index) as u8).collect()
}

/// Writes parts on end.
fn write_parts(file: &File, parts: std::ops::Range<usize>) {
    for index in parts {
        file.write_all_at(&part(index), (index * PART) as u64).expect("written");
    }
}

/// Writes so many parts, from the start, until more space is reserved than they take. A process that another test starts
/// closes this file too, with what is reserved for it.
fn write_until_reserved(file: &File, data: &Path, parts: usize) {
    wait_until("space is reserved", || {
        file.set_len(0).expect("emptied");
        write_parts(file, 0..parts);
        allocated(data) >= 40 * PART
    });
}

fn draft(daemon: &Daemon) -> (Uuid, PathBuf) {
    let id = Uuid::new_v4();
    fs::create_dir(daemon.path(format!("images/{id}"))).expect("a draft");
    (id, daemon.path(format!("images/{id}/data")))
}

/// A daemon whose state is on a disk, as it is in life.
fn daemon() -> (tempfile::TempDir, Daemon) {
    let directory = tempfile::tempdir_in("/var/tmp").expect("a directory");
    let state = directory.path().join("state").display().to_string();
    (directory, Daemon::start_in(&state, &[]))
}

fn sha512sum(path: &Path) -> String {
    let output = Command::new("sha512sum").arg(path).output().expect("sha512sum");
    String::from_utf8_lossy(&output.stdout).split(' ').next().unwrap_or_default().to_owned()
}

fn allocated(path: &Path) -> usize {
    fs::metadata(path).expect("attributes").blocks() as usize * 512
}

#[test]
fn what_a_write_has_answered_every_handle_sees_and_the_commit_hashes() {
    let (_directory, daemon) = daemon();
    let (id, data) = draft(&daemon);
    let writer = File::create(&data).expect("opened");
    let second = OpenOptions::new().read(true).write(true).open(&data).expect("opened");
    let mut bytes = vec![0; PART];
    for index in 0..48 {
        let offset = (index * PART) as u64;
        // Each other handle is the first to ask in its turn.
        write_parts(&writer, index..index + 1);
        match index % 4 {
            0 => assert_eq!(fs::metadata(&data).expect("attributes").len(), offset + PART as u64),
            1 => {
                second.read_exact_at(&mut bytes, offset).expect("read");
                assert!(bytes == part(index), "part {index}");
            }
            2 => {
                let reader = File::open(&data).expect("opened");
                reader.read_exact_at(&mut bytes, offset).expect("read");
                assert!(bytes == part(index), "part {index}");
            }
            _ => {
                second.write_all_at(b"by another", offset + 5).expect("written");
                second.write_all_at(&part(index)[5..15], offset + 5).expect("written");
            }
        }
    }
    write_parts(&writer, 48..60);
    drop(second);
    drop(writer);
    let plain = daemon.scratch().join("plain");
    write_parts(&File::create(&plain).expect("made"), 0..60);
    daemon.set(format!("images/{id}/disk_format"), "raw");
    daemon.set(format!("images/{id}/state"), "active");
    wait_until("it is active", || daemon.read(format!("images/{id}/state")) == "active");
    assert_eq!(daemon.read(format!("images/{id}/sha512")), sha512sum(&plain));
}

#[test]
fn space_is_reserved_for_a_writer_and_what_he_leaves_out_stays_a_hole() {
    let (_directory, daemon) = daemon();
    let (_, data) = draft(&daemon);
    let file = OpenOptions::new().read(true).write(true).open(&data).expect("opened");
    write_until_reserved(&file, &data, 16);
    assert_eq!(fs::metadata(&data).expect("attributes").len(), 16 << 20, "which is no length");
    write_parts(&file, 100..116);
    assert_eq!(lseek(&file, 0, Whence::SeekHole), Ok(16 << 20));
    assert_eq!(lseek(&file, 16 << 20, Whence::SeekData), Ok(100 << 20));
    close(file).expect("closed");
    assert!((32 * PART..34 * PART).contains(&allocated(&data)), "allocated: {}", allocated(&data));
}

/// Makes a file unchangeable for everybody, and changeable again when dropped. By a process that is there before: a new
/// one would inherit the test's open files and close them.
struct Immutable {
    shell: Child,
    said: BufReader<ChildStdout>,
}

impl Immutable {
    fn prepare(path: &Path) -> Immutable {
        let mut shell = Command::new("sh")
            .args([
                "-c",
                "while read _; do chattr +i \"$1\"; echo; read _; chattr -i \"$1\"; echo; done; chattr -i \"$1\"",
                "sh",
            ])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a shell");
        let said = BufReader::new(shell.stdout.take().expect("piped"));
        Immutable { shell, said }
    }

    /// Makes it so, or not so again.
    fn toggle(&mut self) {
        self.shell.stdin.as_mut().expect("piped").write_all(b"\n").expect("told");
        self.said.read_line(&mut String::new()).expect("done");
    }
}

impl Drop for Immutable {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        let _ = self.shell.wait();
    }
}

#[test]
fn a_write_that_was_answered_and_is_lost_is_told_to_the_next_write_to_fsync_and_to_close() {
    let (_directory, daemon) = daemon();
    let (id, data) = draft(&daemon);
    let below = daemon.state_directory().join(format!("images/{id}/data.part"));
    let mut immutable = Immutable::prepare(&below);
    let file = File::create(&data).expect("opened");
    // A process that another test starts closes this file too, whereupon a write is answered when it is written.
    let mut next = 0;
    loop {
        write_parts(&file, next..next + 8);
        next += 8;
        // What is not in the file yet would be lost with it.
        file.sync_all().expect("synced");
        let open = OpenOptions::new().write(true).open(&below).expect("opened");
        immutable.toggle();
        if errno(open.write_at(b"x", 0)) == 0 {
            return skipped("a lost write is told", "this disk cannot make an open file fail");
        }
        if errno(file.write_at(&part(next), (next * PART) as u64)) == 0 {
            break;
        }
        assert!(next < 400, "no write was answered before it was written");
        immutable.toggle();
    }
    wait_until("it is lost", || errno(file.sync_all()) == libc::EIO);
    drop(immutable);
    assert_eq!(errno(file.write_all_at(b"more", 0)), libc::EIO, "though the disk takes it");
    assert_eq!(errno(file.sync_all()), libc::EIO, "again");
    assert_eq!(close(file), Err(nix::errno::Errno::EIO));
    // Through another handle it is written again.
    let file = OpenOptions::new().write(true).open(&data).expect("opened");
    write_parts(&file, next..next + 1);
    assert_eq!(close(file), Ok(()));
    assert_eq!(fs::metadata(&data).expect("attributes").len(), (next as u64 + 1) << 20);
}

#[test]
fn after_the_daemon_was_killed_between_two_writes_the_draft_is_written_again_and_nothing_stays_reserved() {
    let (_directory, mut daemon) = daemon();
    let (id, data) = draft(&daemon);
    let file = File::create(&data).expect("opened");
    write_until_reserved(&file, &data, 12);
    daemon.kill();
    drop(file);
    daemon.spawn();
    let file = OpenOptions::new().write(true).open(&data).expect("opened");
    write_parts(&file, 0..1);
    assert_eq!(close(file), Ok(()));
    let length = fs::metadata(&data).expect("attributes").len() as usize;
    assert!(allocated(&data) <= length + PART, "{} for {length}", allocated(&data));
    fs::write(&data, part(3)).expect("written again");
    daemon.set(format!("images/{id}/disk_format"), "raw");
    daemon.set(format!("images/{id}/state"), "active");
    wait_until("it is active", || daemon.read(format!("images/{id}/state")) == "active");
    assert_eq!(daemon.read(format!("images/{id}/size_bytes")), PART.to_string());
}
