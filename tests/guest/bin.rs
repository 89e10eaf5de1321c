//! A real guest in the bin, and back.

use std::fs;

use crate::support::guests::{Guests, long_wait};
use crate::support::{Daemon, errno};
use crate::{boot, console, wait_command};

#[test]
fn a_real_guest_comes_back_from_the_bin_with_its_disk_and_its_memory_and_goes_for_good() {
    let daemon = Daemon::start_with("embed", &[]);
    let guests = Guests(daemon.state_directory());
    let id = boot(&daemon);
    let (there, binned) = (format!("instances/{id}"), format!("trash/{id}"));
    let moved = |from: &str, to: &str| fs::rename(daemon.path(from), daemon.path(to));
    let boots = || console(&daemon, id).matches("READY").count();
    long_wait("it has booted", || boots() == 1);
    daemon.set(format!("{there}/autostart"), "1");

    moved(&there, &binned).expect("into the bin");
    long_wait("it is at rest", || daemon.read(format!("{binned}/task")).is_empty());
    assert_eq!(daemon.read(format!("{binned}/last_error")), "ok");
    assert!(guests.pids().is_empty() && !daemon.path(&there).exists());
    let log = fs::read_to_string(daemon.path(format!("{binned}/console.log"))).expect("its console");
    assert!(log.contains("POWERBUTTON"), "it was asked, not killed");
    assert_eq!(daemon.read(format!("{binned}/autostart")), "0");

    moved(&binned, &there).expect("out of the bin");
    wait_command(&daemon, id, "active");
    long_wait("its disk remembers the first boot", || console(&daemon, id).contains("BOOTS=2"));
    assert_eq!(daemon.read(format!("{there}/autostart")), "1");

    let image = daemon.read(format!("{there}/image"));
    moved(&format!("images/{image}"), &format!("trash/{image}")).expect("the image into the bin");
    let deletion = || daemon.write(format!("trash/{image}/state"), "deleted");
    assert_eq!(errno(deletion()), libc::EBUSY, "a guest runs on it");

    long_wait("it has booted again", || boots() == 2);
    daemon.set(format!("{there}/state"), "suspended");
    wait_command(&daemon, id, "suspended");
    daemon.set(format!("{there}/state"), "soft_deleted");
    wait_command(&daemon, id, "soft_deleted");
    long_wait("it is at rest", || daemon.read(format!("{binned}/task")).is_empty());
    moved(&binned, &there).expect("out of the bin");
    wait_command(&daemon, id, "suspended");
    daemon.set(format!("{there}/state"), "active");
    wait_command(&daemon, id, "active");
    assert_eq!(boots(), 2, "it went on where it was");

    daemon.set(format!("{there}/stop_timeout_seconds"), "0");
    daemon.set(format!("{there}/state"), "soft_deleted");
    wait_command(&daemon, id, "soft_deleted");
    long_wait("it is at rest", || daemon.read(format!("{binned}/task")).is_empty());
    let state = daemon.state_directory();
    let disk = state.join("disks").join(id.to_string());
    let data = state.join("images").join(&image).join("data");
    assert_eq!(errno(deletion()), libc::EBUSY, "its disk is made from it");
    assert!(disk.join("root.qcow2").exists() && data.exists());
    daemon.set(format!("{binned}/state"), "deleted");
    wait_command(&daemon, id, "deleted");
    assert!(!disk.exists() && data.exists() && !daemon.path(&binned).exists());
    deletion().expect("nobody needs the image any more");
    long_wait("it is gone", || !daemon.path(format!("trash/{image}")).exists());
    assert!(!data.exists());
}
