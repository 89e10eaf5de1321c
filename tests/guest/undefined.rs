//! virsh against a protected guest: it loses neither its definition nor what it wrote to its disk.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Output};

use uuid::Uuid;

use super::host::Daemon as Host;
use super::support::guests::long_wait;
use super::support::{Daemon, wait_until};
use super::{boot_with, console};

struct Virsh(Host);

impl Virsh {
    fn socket(&self) -> String {
        self.0.directory().join("run/libvirt-sock").display().to_string()
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let uri = format!("qemu:///system?socket={}", self.socket());
        Command::new("virsh").args(["--connect", &uri]).args(arguments).output().expect("virsh runs")
    }

    fn does(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "virsh {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn is_persistent(&self, id: Uuid) -> bool {
        let info = self.run(&["dominfo", &id.to_string()]);
        let text = String::from_utf8_lossy(&info.stdout).into_owned();
        text.lines().any(|line| line.starts_with("Persistent:") && line.ends_with("yes"))
    }
}

/// Ends the guest with the test.
struct Ended<'a>(&'a Virsh, Uuid);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.run(&["destroy", &self.1.to_string()]);
    }
}

#[test]
fn virsh_takes_neither_definition_nor_disk_from_a_protected_guest() {
    let virsh = Virsh(Host::start());
    let daemon = Daemon::start_with(&virsh.socket(), &[]);
    let id = boot_with(&daemon, &[("network", "none")]);
    let name = id.to_string();
    let _ended = Ended(&virsh, id);
    let file = |name: &str| format!("instances/{id}/{name}");
    let is = |name: &str, value: &str| daemon.read(file(name)) == value;
    long_wait("it prints from inside", || console(&daemon, id).contains("READY"));
    let disk = daemon.state_directory().join(format!("disks/{id}/root.qcow2"));
    let names = || disk.metadata().map_or(0, |metadata| metadata.nlink());
    daemon.set(file("disable_terminate"), "1");
    wait_until("its disk has a second name", || names() == 2);

    let process = virsh.does(&["domid", &name]);
    virsh.does(&["undefine", &name]);
    long_wait("it has its definition again", || virsh.is_persistent(id));
    assert_eq!((virsh.does(&["domid", &name]), virsh.does(&["domstate", &name]).trim()), (process, "running"));

    daemon.set(file("state"), "stopped");
    long_wait("it is off", || is("state", "stopped") && is("task", ""));
    let place = disk.parent().expect("a directory").display().to_string();
    virsh.does(&["pool-create-as", "disks", "dir", "--target", &place]);
    let said = virsh.does(&["undefine", &name, "--remove-all-storage"]);
    assert!(said.contains("removed"), "virsh removed no disk: {said}");
    wait_until("it is seen to be gone", || !is("state_reason", "shutdown"));
    long_wait("it is defined again", || is("state", "stopped") && is("state_reason", "undefined_outside"));
    wait_until("its disk is there", || names() == 2);
    daemon.set(file("state"), "active");
    long_wait("its disk remembers the first boot", || console(&daemon, id).contains("BOOTS=2"));

    // The same without protection.
    daemon.set(file("disable_terminate"), "0");
    wait_until("its disk has one name", || names() == 1);
    daemon.set(file("state"), "stopped");
    long_wait("it is off", || is("state", "stopped") && is("task", ""));
    virsh.does(&["pool-refresh", "disks"]);
    virsh.does(&["undefine", &name, "--remove-all-storage"]);
    wait_until("it stays, as what it is", || is("state", "error") && is("state_reason", "undefined_outside"));
    assert!(!disk.exists() && !virsh.run(&["dominfo", &name]).status.success());
    assert!(fs::read_to_string(daemon.path("events")).expect("readable").contains("undefined_outside"));
}
