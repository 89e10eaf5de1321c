//! kill -9 of the daemon in the middle of copying a large disk, to the shelf and back.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use support::Daemon;
use uuid::Uuid;

/// How long the daemon may be away: generous on a busy machine. The promise is 5 s.
const AWAY: Duration = Duration::from_secs(30);
/// How long the work may go on in all.
const WORK: Duration = Duration::from_secs(300);

/// Bytes on the disk.
fn amount() -> u64 {
    if std::env::var_os("INSTANCEFS_LONG").is_some() { 1 << 30 } else { 128 << 20 }
}

fn qemu_io(disk: &Path, command: &str) {
    let output = Command::new("qemu-io").args(["-f", "qcow2", "-c", command]).arg(disk).output().expect("qemu-io runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && !said.contains("failed"), "{command}: {said}");
}

fn long_wait(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + WORK;
    while !condition() {
        assert!(Instant::now() < end, "waited in vain for: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Asks for a state, kills the daemon once that percentage is copied, and has the next life end the work.
fn killed_at(daemon: &mut Daemon, id: Uuid, state: &str, percent: u64) {
    let file = |name: &str| format!("instances/{id}/{name}");
    daemon.write(file("state"), state).expect("accepted");
    let is_there = |daemon: &Daemon| {
        daemon.read(file("state")) == state
            || daemon.read(file("progress")).parse().is_ok_and(|shown: u64| shown >= percent)
    };
    long_wait("it is copying", || is_there(daemon));
    let was_at_work = daemon.read(file("state")) != state;
    daemon.kill();
    let begun = Instant::now();
    daemon.spawn();
    let _answered = daemon.read(file("state"));
    let away = begun.elapsed();
    assert!(away < AWAY, "away for {away:?}");
    println!("killed while {} at {percent} %: answers after {away:?}", if was_at_work { "copying" } else { "done" });
    long_wait(&format!("{state} is reached"), || {
        daemon.read(file("task")).is_empty() && daemon.read(file("state")) == state
    });
    assert_eq!(daemon.read(file("last_error")), "ok");
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().map(|entry| entry.expect("an entry").path());
    entries.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

#[test]
fn a_daemon_killed_in_the_middle_of_a_large_disk_answers_soon_and_ends_the_work_by_itself() {
    let mut daemon = Daemon::start(&["--settle", "0"]);
    let image = daemon.image();
    let id = Uuid::new_v4();
    std::fs::create_dir(daemon.path(format!("instances/{id}"))).expect("a draft");
    daemon.set(format!("instances/{id}/image"), &image.to_string());
    daemon.set(format!("instances/{id}/root_disk_bytes"), "4G");
    daemon.write(format!("instances/{id}/state"), "stopped").expect("accepted");
    daemon.wait_state(id, "stopped");
    let disk = daemon.state_directory().join(format!("disks/{id}/root.qcow2"));
    qemu_io(&disk, &format!("write -P 0x5a 64M {}", amount()));
    for percent in [1, 60] {
        killed_at(&mut daemon, id, "shelved_offloaded", percent);
        assert!(!disk.exists(), "the disk is put away");
        assert_eq!(files_below(&daemon.state_directory().join("shelf")).len(), 1, "one copy, and nothing left over");
        killed_at(&mut daemon, id, "stopped", percent);
        qemu_io(&disk, &format!("read -P 0x5a 64M {}", amount()));
        qemu_io(&disk, "read -P 0 0 8M");
    }
}
