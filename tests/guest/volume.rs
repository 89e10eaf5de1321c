//! Volumes of real guests: what one writes, another one finds, and one boots from a volume.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use uuid::Uuid;

use super::support::guests::{Guests, long_wait};
use super::support::{Daemon, errno, wait_until};
use super::{boot, console, socat, wait_command};

const SIZE: u64 = 64 << 20;

/// A volume with these values, made.
fn volume(daemon: &Daemon, values: &[(&str, &str)]) -> Uuid {
    let id = Uuid::new_v4();
    fs::create_dir(daemon.path(format!("volumes/{id}"))).expect("a draft");
    for (file, value) in values {
        daemon.set(format!("volumes/{id}/{file}"), value);
    }
    daemon.set(format!("volumes/{id}/state"), "available");
    wait_volume(daemon, id, "available");
    id
}

fn wait_volume(daemon: &Daemon, id: Uuid, state: &str) {
    long_wait(&format!("the volume is {state}: {}", daemon.read(format!("volumes/{id}/last_error"))), || {
        daemon.read(format!("volumes/{id}/state")) == state && daemon.read(format!("volumes/{id}/task")).is_empty()
    });
}

/// The only file of a volume's data.
fn data(daemon: &Daemon, id: Uuid) -> PathBuf {
    fn find(directory: PathBuf, name: &str) -> Option<PathBuf> {
        let entries = fs::read_dir(directory).ok()?.filter_map(Result::ok);
        let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
        paths.sort();
        paths.into_iter().find_map(|path| match path.is_dir() {
            true => find(path, name),
            false => path.display().to_string().contains(name).then_some(path),
        })
    }
    find(daemon.state_directory().join("volumes"), &id.to_string()).expect("the volume's file")
}

/// Has the guest print words beside what it is asked, so that the echo of the question is not the answer.
fn ask(daemon: &Daemon, id: Uuid, what: &str, answer: &str) {
    socat(daemon, id, &format!("echo said-$({what})-$((6*7))\n"), &format!("said-{answer}-42"));
}

#[test]
fn what_one_guest_writes_on_a_volume_another_one_finds_and_boots_from_one_itself() {
    let daemon = Daemon::start_with("embed", &[]);
    let guests = Guests(daemon.state_directory());
    let one = boot(&daemon);
    long_wait("it has booted", || console(&daemon, one).contains("READY"));
    let id = volume(&daemon, &[("size_bytes", "64M"), ("disk_format", "raw")]);
    let file = |name: &str| format!("volumes/{id}/{name}");

    // Live, under its own name.
    daemon.set(file("attach"), &format!("instances/{one}"));
    wait_volume(&daemon, id, "in_use");
    let serial: String = id.to_string().chars().take(20).collect();
    long_wait("the guest sees it", || {
        socat(&daemon, one, "ls /sys/block; echo listed-$((6*7))\n", "listed-42").contains("vdb")
    });
    ask(&daemon, one, "cat /sys/block/vdb/serial", &serial);
    ask(&daemon, one, "cat /sys/block/vdb/size", &(SIZE / 512).to_string());
    assert_ne!(fs::metadata(data(&daemon, id)).expect("the data").uid(), 0, "QEMU has it");

    // Written, and grown under the guest.
    socat(
        &daemon,
        one,
        "echo from-one-$((40+2)) | dd of=/dev/vdb bs=512 conv=fsync,sync 2>/dev/null; echo written-$((6*7))\n",
        "written-42",
    );
    daemon.set(file("size_bytes"), "128M");
    wait_volume(&daemon, id, "in_use");
    assert_eq!(daemon.read(file("size_bytes")), (2 * SIZE).to_string());
    ask(&daemon, one, "cat /sys/block/vdb/size", &(2 * SIZE / 512).to_string());

    // Let go: the guest has it no more, and nobody but root the file.
    daemon.set(file("detach"), "1");
    wait_volume(&daemon, id, "available");
    ask(&daemon, one, "ls /sys/block | grep -c vdb", "0");
    let owner = fs::metadata(data(&daemon, id)).expect("the data").uid();
    assert_eq!(owner, 0, "QEMU of uid {owner} may write to it still");
    let instance = |name: &str| format!("instances/{one}/{name}");
    let image = daemon.read(instance("image"));
    daemon.set(instance("state"), "stopped");
    wait_command(&daemon, one, "stopped");
    assert!(guests.pids().is_empty());

    // On this host the same bytes, grown on the way, and others go back.
    daemon.set(file("local_attach"), "1");
    wait_volume(&daemon, id, "in_use");
    let device = daemon.read(file("local_device"));
    assert_eq!(fs::read(&device).map(|bytes| bytes.len() as u64).expect("the device"), 2 * SIZE);
    daemon.set(file("size_bytes"), "192M");
    wait_volume(&daemon, id, "in_use");
    let bytes = fs::read(&device).expect("the device");
    assert!(bytes.len() as u64 == 3 * SIZE && bytes.starts_with(b"from-one-42"));
    let host = fs::OpenOptions::new().write(true).open(&device).expect("the device");
    host.write_all_at(b"from-host-42", 2 * SIZE).and_then(|()| host.sync_all()).expect("written");
    assert_eq!(errno(daemon.write(file("local_attach"), "0")), libc::EBUSY, "it is open");
    drop(host);
    daemon.set(file("local_attach"), "0");
    wait_volume(&daemon, id, "available");

    // Another one, which boots from a copy of the image that is a volume.
    let root = volume(&daemon, &[("created_from", &format!("image:{image}")), ("bootable", "1")]);
    let two = Uuid::new_v4();
    let instance = |name: &str| format!("instances/{two}/{name}");
    fs::create_dir(daemon.path(format!("instances/{two}"))).expect("a draft");
    daemon.set(instance("memory_bytes"), "192M");
    assert_eq!(errno(daemon.write(instance("state"), "active")), libc::EINVAL);
    daemon.set(format!("volumes/{root}/attach"), &format!("instances/{two} vda"));
    wait_volume(&daemon, root, "in_use");
    daemon.set(instance("state"), "stopped");
    wait_command(&daemon, two, "stopped");
    daemon.set(file("attach"), &format!("instances/{two}"));
    wait_volume(&daemon, id, "in_use");
    daemon.set(instance("state"), "active");
    wait_command(&daemon, two, "active");
    long_wait("it has booted", || console(&daemon, two).contains("READY"));
    assert!(console(&daemon, two).contains("BOOTS=1"));
    ask(&daemon, two, "head -c 11 /dev/vdb", "from-one-42");
    ask(
        &daemon,
        two,
        &format!("dd if=/dev/vdb bs=512 skip={} count=1 2>/dev/null | head -c 12", 2 * SIZE / 512),
        "from-host-42",
    );

    // Its root disk is its own, and grows as well.
    let larger = daemon.read(format!("volumes/{root}/size_bytes")).parse::<u64>().expect("a number") + SIZE;
    daemon.set(format!("volumes/{root}/size_bytes"), &larger.to_string());
    wait_volume(&daemon, root, "in_use");
    ask(&daemon, two, "cat /sys/block/vda/size", &(larger / 512).to_string());
    wait_until("the instance says so too", || daemon.read(instance("root_disk_bytes")) == larger.to_string());

    // Deleted for good it leaves both.
    daemon.set(instance("state"), "stopped");
    wait_command(&daemon, two, "stopped");
    fs::rename(daemon.path(format!("instances/{two}")), daemon.path(format!("trash/{two}"))).expect("into the bin");
    wait_until("it is at rest there", || daemon.read(format!("trash/{two}/task")).is_empty());
    daemon.set(format!("trash/{two}/state"), "deleted");
    wait_volume(&daemon, id, "available");
    wait_volume(&daemon, root, "available");
    assert!(fs::read(data(&daemon, id)).expect("the data").starts_with(b"from-one-42"));
}
