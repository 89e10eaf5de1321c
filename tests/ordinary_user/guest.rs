//! The main path on a real guest, with no option at all.

use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::support::signal;
use crate::user::{Ann, UID, tree};

/// Her emulators, by the pid files of the embedded driver; ended with the test.
struct Guests(PathBuf);

impl Guests {
    fn pids(&self) -> Vec<u32> {
        let files = fs::read_dir(self.0.join("libvirt/run/qemu")).into_iter().flatten().filter_map(Result::ok);
        files
            .filter(|file| file.path().extension().is_some_and(|extension| extension == "pid"))
            .filter(|file| file.file_name() != "driver.pid")
            .filter_map(|file| fs::read_to_string(file.path()).ok()?.trim().parse().ok())
            .filter(|pid: &u32| Path::new(&format!("/proc/{pid}")).exists())
            .collect()
    }
}

impl Drop for Guests {
    fn drop(&mut self) {
        for pid in self.pids() {
            signal(pid, libc::SIGKILL);
        }
    }
}

fn long_wait(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(120);
    while !condition() {
        assert!(Instant::now() < end, "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

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
