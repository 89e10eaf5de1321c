//! Streams that are followed over the ends of their files, by the tool that people follow them with.

mod support;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use support::{Daemon, wait_until};
use uuid::Uuid;

const PIECE: u64 = 4 << 20;

/// `tail -F`, more eager than people are, writing into a file.
struct Tail {
    child: Child,
    output: PathBuf,
}

impl Tail {
    fn follow(daemon: &Daemon, file: &str) -> Tail {
        let output = daemon.scratch().join("tail");
        let mut command = Command::new("tail");
        command.args(["-c", "+1", "-F", "-s", "0.02", "--max-unchanged-stats=2"]).arg(daemon.path(file));
        let child = command.stdout(File::create(&output).expect("a file")).stderr(Stdio::null()).spawn();
        Tail { child: child.expect("tail runs"), output }
    }

    fn heard(&self) -> Vec<u8> {
        fs::read(&self.output).expect("tail's output")
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// A running instance that we made, and the file that its QEMU would print into.
fn guest(daemon: &Daemon) -> (Uuid, PathBuf) {
    let image = daemon.image();
    let id = Uuid::new_v4();
    fs::create_dir(daemon.path(format!("instances/{id}"))).expect("a draft");
    daemon.set(format!("instances/{id}/image"), &image.to_string());
    daemon.set(format!("instances/{id}/state"), "active");
    daemon.wait_state(id, "active");
    (id, daemon.state_directory().join(format!("consoles/{id}.log")))
}

/// Numbered lines, as a guest prints them.
fn print(log: &Path, from: u64, bytes: u64) -> Vec<u8> {
    let mut text = Vec::new();
    let mut number = from;
    while (text.len() as u64) < bytes {
        number += 1;
        writeln!(text, "line {number} of a guest that has much to say").expect("memory");
    }
    let mut file = OpenOptions::new().create(true).append(true).open(log).expect("the log");
    file.write_all(&text).expect("printed");
    text
}

#[test]
fn a_console_log_is_followed_over_its_rotations_and_takes_no_more_disk() {
    let daemon = Daemon::start(&[]);
    let (id, log) = guest(&daemon);
    let name = format!("instances/{id}/console.log");
    let tail = Tail::follow(&daemon, &name);
    let inode = |name: &str| daemon.path(name).metadata().expect("it exists").ino();
    let mut printed = Vec::new();
    for turn in 0..4 {
        let before = inode(&name);
        while (printed.len() as u64) < PIECE * (turn + 1) + 1000 {
            printed.extend(print(&log, printed.len() as u64, PIECE / 4));
            wait_until("tail has heard it", || tail.heard().len() == printed.len());
        }
        assert_eq!(inode(&format!("{name}.1")), before);
        assert_ne!(inode(&name), before);
    }
    assert!(tail.heard() == printed, "a byte was lost, repeated or changed");
    let read = |name: &str| fs::read(daemon.path(name)).expect("read");
    let both = [read(&format!("{name}.1")), read(&name)].concat();
    assert!(printed.ends_with(&both) && both.len() as u64 > PIECE);
    for name in [&name, &format!("{name}.1")] {
        assert_eq!(daemon.path(name).metadata().expect("it exists").len(), read(name).len() as u64);
    }
    wait_until("the beginning is off the disk", || {
        log.metadata().expect("the log").blocks() * 512 <= 2 * PIECE + (64 << 10)
    });
}

#[test]
fn a_piece_that_is_gone_is_refused_and_never_read_as_zeros() {
    let daemon = Daemon::start(&[]);
    let (id, log) = guest(&daemon);
    print(&log, 0, 1000);
    let mut held = File::open(daemon.path(format!("instances/{id}/console.log"))).expect("open");
    let mut start = [0; 5];
    held.read_exact(&mut start).expect("read");
    assert_eq!(&start, b"line ");
    print(&log, 0, PIECE);
    let mut rest = Vec::new();
    held.read_to_end(&mut rest).expect("the former piece is read to its end");
    assert_eq!(rest.len() as u64 + 5, PIECE);
    print(&log, 0, 2 * PIECE);
    held.seek(SeekFrom::Start(5)).expect("seek");
    assert_eq!(held.read(&mut start).unwrap_err().raw_os_error(), Some(libc::ESTALE));
}

#[test]
fn a_log_that_grew_while_the_daemon_was_away_is_cut_when_it_is_back() {
    let mut daemon = Daemon::start(&[]);
    let (id, log) = guest(&daemon);
    assert!(daemon.stop());
    let printed = print(&log, 0, 5 * PIECE + PIECE / 2);
    daemon.spawn();
    let current = fs::read(daemon.path(format!("instances/{id}/console.log"))).expect("read");
    assert!(printed.ends_with(&current) && current.len() < PIECE as usize);
    wait_until("the beginning is off the disk", || {
        log.metadata().expect("the log").blocks() * 512 <= 2 * PIECE + (64 << 10)
    });
}

#[test]
fn a_log_that_is_not_ours_is_never_cut() {
    let daemon = Daemon::start(&[]);
    let id = Uuid::new_v4();
    let log = daemon.state_directory().join(format!("consoles/{id}.log"));
    fs::create_dir_all(log.parent().expect("a directory")).expect("the directory");
    let printed = print(&log, 0, 3 * PIECE);
    let xml = format!(
        "<domain type='qemu'><name>theirs</name><uuid>{id}</uuid><devices><serial type='pty'>\
         <log file='{}' append='on'/></serial></devices></domain>",
        log.display()
    );
    daemon.host_does(serde_json::json!({"do": "define", "xml": xml}));
    wait_until("its definition is known", || daemon.path(format!("instances/{id}/domain.xml")).exists());
    daemon.domain_does(id, "start", "active");
    let tail = Tail::follow(&daemon, &format!("instances/{id}/console.log"));
    let more = print(&log, 0, 10);
    wait_until("it is read", || tail.heard().ends_with(&more));
    assert_eq!(fs::read(&log).expect("the log"), [printed, more].concat());
}

#[test]
fn events_are_followed_over_a_rotation() {
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("talkative");
    let tail = Tail::follow(&daemon, "events");
    let inode = |name: &str| daemon.path(name).metadata().expect("it exists").ino();
    let before = inode("events");
    let mut turn = 0;
    while !daemon.path("events.1").exists() {
        turn += 1;
        assert!(turn < 4000, "it never rotates");
        daemon.set(format!("instances/{id}/description"), &format!("{turn:04}{}", "x".repeat(4000)));
    }
    assert_eq!(inode("events.1"), before);
    assert_ne!(inode("events"), before);
    daemon.set(format!("instances/{id}/description"), "the end");
    wait_until("tail has heard the end", || {
        let heard = tail.heard();
        heard.ends_with(b"\n")
            && String::from_utf8_lossy(&heard[heard.len().saturating_sub(9000)..]).contains("the end")
    });
    let heard = String::from_utf8(tail.heard()).expect("text");
    let seqs = heard.lines().map(|line| serde_json::from_str::<Value>(line).expect("a whole line")["seq"].as_u64());
    for (expected, seq) in (1..).zip(seqs) {
        assert_eq!(seq, Some(expected), "a line is lost or repeated");
    }
}
