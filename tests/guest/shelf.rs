//! A real guest on the shelf: what it wrote is there when it comes back.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use super::support::guests::{Guests, long_wait};
use super::support::{Daemon, wait_until};
use super::{boot, console, socat, wait_command};

#[test]
fn what_a_guest_wrote_is_there_when_it_comes_back_from_the_shelf() {
    let daemon = Daemon::start_with("embed", &[]);
    let guests = Guests(daemon.state_directory());
    let id = boot(&daemon);
    let file = |name: &str| format!("instances/{id}/{name}");
    long_wait("it has booted", || console(&daemon, id).contains("READY"));
    assert!(console(&daemon, id).contains("BOOTS=1"));

    daemon.set(file("state"), "shelved");
    wait_command(&daemon, id, "shelved");
    assert!(console(&daemon, id).contains("POWERBUTTON"), "it was asked, not killed");
    assert!(guests.pids().is_empty());
    let disk = daemon.state_directory().join(format!("disks/{id}/root.qcow2"));
    let bytes = fs::read(&disk).expect("the disk");
    let copies = || {
        let entries = fs::read_dir(daemon.state_directory().join(format!("shelf/{id}"))).into_iter().flatten();
        entries.map(|entry| entry.expect("an entry").path()).collect::<Vec<_>>()
    };
    let [copy] = &copies()[..] else { panic!("one copy: {:?}", copies()) };
    assert!(fs::read(copy).expect("the copy") == bytes);
    let (ours, theirs) = (fs::metadata(copy).expect("a copy").blocks(), fs::metadata(&disk).expect("a disk").blocks());
    assert!(ours * 10 <= theirs * 11, "{ours} blocks of {theirs}");

    daemon.set(file("state"), "shelved_offloaded");
    wait_command(&daemon, id, "shelved_offloaded");
    assert!(!disk.exists());

    // The shelf in the bin.
    let (instances, trash) = (daemon.path(format!("instances/{id}")), daemon.path(format!("trash/{id}")));
    fs::rename(&instances, &trash).expect("into the bin");
    wait_until("it is at rest there", || daemon.read(format!("trash/{id}/task")).is_empty());
    assert_eq!(daemon.read(format!("trash/{id}/state")), "soft_deleted");
    fs::rename(&trash, &instances).expect("and back");
    wait_command(&daemon, id, "shelved_offloaded");

    daemon.set(file("state"), "active");
    wait_command(&daemon, id, "active");
    long_wait("its own disk remembers the first boot", || console(&daemon, id).contains("BOOTS=2"));
    wait_until("the copies are still there", || copies().len() == 1);
    socat(&daemon, id, "echo alive-$((6*7))\n", "alive-42");
    let check = Command::new("qemu-img").args(["check", "-q", "-U", "-f", "qcow2"]).arg(&disk).status();
    assert!(check.expect("qemu-img runs").success());

    // From the bin straight to work, by way of the shelf.
    daemon.set(file("state"), "shelved_offloaded");
    wait_command(&daemon, id, "shelved_offloaded");
    fs::rename(&instances, &trash).expect("into the bin");
    wait_until("it is at rest there", || daemon.read(format!("trash/{id}/task")).is_empty());
    daemon.set(format!("trash/{id}/state"), "active");
    wait_until("it is out of the bin", || instances.exists());
    wait_command(&daemon, id, "active");
    long_wait("and the second one", || console(&daemon, id).contains("BOOTS=3"));
    daemon.set(file("state"), "stopped");
    wait_command(&daemon, id, "stopped");
}
