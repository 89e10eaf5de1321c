//! A file that changes under the commit: root writes it past the daemon, in its state directory.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use instancefs::image::inspect::inspect;
use openssl::sha::sha512;
use uuid::Uuid;

use super::qcow2::{DATA, Qcow2};
use super::support::{Daemon, wait_until};

/// Enough to hash that the commit takes a while.
const BYTES: usize = 8 << 20;

fn sound() -> Vec<u8> {
    let mut bytes = Qcow2::new(3).bytes;
    bytes.resize(BYTES, 0x5a);
    bytes
}

/// A header that names a file of the host.
fn hostile() -> Vec<u8> {
    Qcow2::new(3).with(|image| image.back(b"/etc/shadow", Some("raw")))[..512].to_vec()
}

/// Writes a sound draft and returns the daemon's own file of it, too.
fn draft(daemon: &Daemon, bytes: &[u8]) -> (Uuid, File) {
    let id = Uuid::new_v4();
    fs::create_dir(daemon.path(format!("images/{id}"))).expect("a draft");
    fs::write(daemon.path(format!("images/{id}/data")), bytes).expect("written");
    let path = daemon.state_directory().join(format!("images/{id}/data.part"));
    (id, OpenOptions::new().write(true).open(path).expect("the daemon's file"))
}

/// Commits and returns whether it became active. Whatever it says, it has ended then.
fn becomes_active(daemon: &Daemon, id: Uuid) -> bool {
    let _said_by_the_state = daemon.write(format!("images/{id}/state"), "active");
    wait_until("the commit ends", || daemon.read(format!("images/{id}/task")).is_empty());
    daemon.read(format!("images/{id}/state")) == "active"
}

fn assert_as_inspected(daemon: &Daemon, id: Uuid, when: &str) {
    let path = daemon.state_directory().join(format!("images/{id}/data"));
    let bytes = fs::read(&path).expect("readable");
    let sum: String = sha512(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(daemon.read(format!("images/{id}/sha512")) == sum, "{when}: active with other bytes than were hashed");
    let verdict = inspect(&File::open(&path).expect("readable"), None);
    assert!(verdict.is_ok(), "{when}: active and hostile: {verdict:?}");
}

#[test]
fn an_image_whose_file_is_rewritten_all_the_time_never_becomes_active_with_other_bytes() {
    let daemon = Daemon::start(&[]);
    let (good, bad) = (sound(), hostile());
    for round in 0..8 {
        let (id, file) = draft(&daemon, &good);
        let ended = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !ended.load(Ordering::SeqCst) {
                    file.write_all_at(&bad, 0).expect("written");
                    file.write_all_at(&[round as u8; 64], DATA).expect("written");
                    file.write_all_at(&good[..512], 0).expect("written");
                }
            });
            let active = becomes_active(&daemon, id);
            ended.store(true, Ordering::SeqCst);
            assert!(!active, "round {round}");
        });
        let last = daemon.read(format!("images/{id}/last_error"));
        assert!(last.contains("changed") || last.contains("backing file"), "{last}");
    }
}

#[test]
fn one_change_at_any_moment_of_a_commit_is_seen() {
    let daemon = Daemon::start(&[]);
    let (good, bad) = (sound(), hostile());
    let begun = Instant::now();
    let (id, _) = draft(&daemon, &good);
    assert!(becomes_active(&daemon, id), "{}", daemon.read(format!("images/{id}/last_error")));
    let begun = begun.elapsed();
    let (mut active, mut refused) = (0, 0);
    let rounds = if std::env::var_os("INSTANCEFS_LONG").is_some() { 300 } else { 60 };
    for round in 0..rounds {
        let (id, file) = draft(&daemon, &good);
        let delay = begun.mul_f64(f64::from(round) / f64::from(rounds));
        let draft_file = daemon.state_directory().join(format!("images/{id}/data.part"));
        thread::scope(|scope| {
            let writer = scope.spawn(|| {
                // The moment itself is what varies; any is right.
                thread::sleep(delay);
                let bytes = if round % 2 == 0 { &bad[..] } else { &[0xa5; 512][..] };
                file.write_all_at(bytes, if round % 2 == 0 { 0 } else { DATA }).expect("written");
                // Afterwards it is a published file, which root may ruin as any other.
                draft_file.exists()
            });
            let is_active = becomes_active(&daemon, id);
            let in_time = writer.join().expect("no panic");
            if is_active && in_time {
                assert_as_inspected(&daemon, id, &format!("round {round}, after {delay:?}"));
            }
            *(if is_active { &mut active } else { &mut refused }) += 1;
        });
        if daemon.read(format!("images/{id}/state")) == "draft" {
            daemon.set(format!("images/{id}/state"), "deleted");
        }
    }
    println!("one change during a commit: {active} active, {refused} refused");
    assert!(refused > 0, "no change came in time");
}
