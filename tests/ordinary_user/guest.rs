//! The main path on a real guest, with no option at all.

use std::fs;
use std::os::unix::fs::chown;

use uuid::Uuid;

use crate::support::guests::{Guests, long_wait};
use crate::user::{Ann, UID, tree};

#[test]
fn an_ordinary_users_guest_boots_as_himself_is_locked_survives_the_mount_and_stops() {
    let source = std::env::var_os("INSTANCEFS_GUEST_IMAGE")
        .expect("run scripts/test, or set INSTANCEFS_GUEST_IMAGE to what scripts/guest-image made");
    let ann = Ann::new();
    let disk = ann.home().join("disk.qcow2");
    fs::copy(source, &disk).expect("a copy for her");
    chown(&disk, Some(UID), Some(UID)).expect("hers");
    ann.mount(&[]);
    let guests = Guests(ann.state());

    let image = format!("images/{}", Uuid::new_v4());
    ann.make_directory(&image);
    let copied = ann.act(|| Ann::command("cp").arg(&disk).arg(tree(&format!("{image}/data"))).status());
    assert!(copied.expect("cp runs").success());
    ann.set(&format!("{image}/state"), "active");
    long_wait("the image is active", || ann.read(&format!("{image}/state")) == "active");

    let home = format!("instances/{}", Uuid::new_v4());
    let file = |name: &str| format!("{home}/{name}");
    ann.make_directory(&home);
    ann.set(&file("image"), &image);
    ann.set(&file("memory_bytes"), "128M");
    ann.set(&file("state"), "active");
    let console = || {
        let bytes = ann.act(|| fs::read(tree(&file("console.log")))).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    long_wait("the guest prints from inside", || console().contains("READY"));
    let pid = *guests.pids().first().expect("a QEMU process");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    assert!(status.contains(&format!("Uid:\t{UID}\t{UID}\t{UID}\t{UID}")), "not hers: {status}");
    assert!(status.contains("Seccomp:\t2"), "without seccomp: {status}");

    ann.set(&file("locked"), "1");
    assert_eq!(ann.write(&file("state"), "stopped"), libc::EPERM);
    ann.set(&file("locked"), "0");

    ann.unmount();
    assert!(guests.pids().contains(&pid), "the guest runs on");
    ann.mount(&[]);
    long_wait("the hypervisor is back", || ann.read("health").contains("hypervisor ok"));
    assert_eq!(ann.read(&file("state")), "active");

    ann.set(&file("state"), "stopped");
    long_wait("it stops", || ann.read(&file("state")) == "stopped" && ann.read(&file("task")).is_empty());
    assert!(console().contains("POWERBUTTON"), "it was asked, not killed");
    assert!(guests.pids().is_empty());
    ann.unmount();
}
