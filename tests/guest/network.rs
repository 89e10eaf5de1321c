//! A guest that can be reached: from an image file to `ssh`, by the very file that users copy.

use std::io::Read;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::{env, fs};

use uuid::Uuid;

use crate::bridge::Bridge;
use crate::libvirt_network::LibvirtNetwork;
use crate::support::{Daemon, errno};
use crate::{Guests, console, long_wait, wait_command};

fn cloud_image() -> PathBuf {
    env::var_os("INSTANCEFS_CLOUD_IMAGE").map_or_else(
        || panic!("run scripts/test, or set INSTANCEFS_CLOUD_IMAGE to what scripts/guest-image --cloud made"),
        PathBuf::from,
    )
}

fn key(directory: &Path) -> PathBuf {
    let key = directory.join("key");
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status();
    assert!(made.expect("ssh-keygen runs (scripts/setup)").success());
    key
}

/// Runs `mount-examples/cloud-image`.
fn session(daemon: &Daemon, name: &str, key: &Path, network: &str) -> Output {
    let program = Path::new(env!("CARGO_BIN_EXE_instancefs")).parent().expect("a directory");
    let known = format!("-o UserKnownHostsFile={}", daemon.scratch().join("known_hosts").display());
    Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("mount-examples/cloud-image"))
        .args([Path::new(name), &cloud_image(), key, Path::new(network)])
        .env("PATH", format!("{}:{}", program.display(), env::var("PATH").unwrap_or_default()))
        .env("INSTANCEFS", daemon.root())
        .env("MEMORY", "192M")
        .env("SSH_OPTIONS", known)
        .output()
        .expect("the example runs")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn named(daemon: &Daemon, name: &str) -> Uuid {
    let link = fs::read_link(daemon.path(format!("by-name/instances/{name}"))).expect("a name");
    link.file_name().and_then(|id| id.to_str()).expect("an id").parse().expect("a uuid")
}

#[test]
fn from_an_image_file_to_ssh_and_to_a_larger_guest() {
    let mut daemon = Daemon::start_with("embed", &[]);
    let guests = Guests(daemon.state_directory());
    let Some(bridge) = Bridge::new("ssh into a guest", daemon.scratch()) else { return };
    let key = key(daemon.scratch());
    let network = format!("bridge:{}", bridge.name);

    let output = session(&daemon, "cloudy", &key, &network);
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("inside cloudy: cloudy was here"), "{}", text(&output));
    let id = named(&daemon, "cloudy");
    let file = |name: &str| format!("instances/{id}/{name}");
    let address = daemon.read(file("addresses"));
    assert!(address.starts_with(&bridge.prefix), "{address}");
    assert_eq!(daemon.read(file("network")), network);
    let again = session(&daemon, "cloudy", &key, &network);
    assert!(again.status.success(), "{}", text(&again));

    daemon.set(file("state"), "stopped");
    wait_command(&daemon, id, "stopped");
    assert_eq!(daemon.read(file("addresses")), "");
    for (name, value) in [("vcpus", "2"), ("memory_bytes", "256M"), ("root_disk_bytes", "1G")] {
        daemon.set(file(name), value);
    }
    assert_eq!(errno(daemon.write(file("root_disk_bytes"), "512M")), libc::ERANGE);
    daemon.set(file("state"), "active");
    wait_command(&daemon, id, "active");
    long_wait("it has an address again", || daemon.read(file("addresses")).starts_with(&bridge.prefix));
    let address = daemon.read(file("addresses")).lines().next().expect("one").to_owned();
    let inside = || {
        let output = Command::new("ssh")
            .arg("-i")
            .arg(&key)
            .args(["-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-o", "ConnectTimeout=5", "-o"])
            .arg(format!("UserKnownHostsFile={}", daemon.scratch().join("known_hosts").display()))
            .arg(format!("root@{address}"))
            .arg("grep -c ^processor /proc/cpuinfo; cat /sys/block/vda/size; grep MemTotal /proc/meminfo")
            .output()
            .expect("ssh runs");
        text(&output)
    };
    let mut said = String::new();
    long_wait("ssh gets in again", || {
        said = inside();
        said.contains("MemTotal")
    });
    let mut words = said.split_ascii_whitespace();
    assert_eq!((words.next(), words.next()), (Some("2"), Some("2097152")), "{said}");
    let kib: u64 = words.nth(1).and_then(|kib| kib.parse().ok()).expect("a number");
    assert!(kib > 200 << 10, "{said}");

    daemon.set(file("state"), "stopped");
    wait_command(&daemon, id, "stopped");
    assert!(guests.pids().is_empty());
    let missing = bridge.name.clone();
    drop(bridge);
    let refused = daemon.write(file("state"), "active");
    assert_eq!(errno(refused), libc::EINVAL);
    assert!(daemon.read(file("last_error")).contains(&format!("no bridge {missing}")));
    assert!(daemon.stop(), "a clean end");
}

#[test]
fn a_network_of_libvirt_tells_the_address_and_without_it_nothing_starts() {
    let Some(network) = LibvirtNetwork::new("a network of libvirt") else { return };
    let mut daemon = Daemon::start_with(&network.socket(), &[]);
    let key = key(daemon.scratch());
    let written = format!("network:{}", network.name);

    let output = session(&daemon, "leased", &key, &written);
    assert!(text(&output).contains("inside leased: leased was here"), "{}", text(&output));
    let id = named(&daemon, "leased");
    let file = |name: &str| format!("instances/{id}/{name}");
    assert_eq!(daemon.read(file("network")), written);
    assert!(daemon.read(file("addresses")).starts_with(&network.prefix), "{}", daemon.read(file("addresses")));
    daemon.set(file("state"), "stopped");
    wait_command(&daemon, id, "stopped");
    assert_eq!(daemon.read(file("addresses")), "");

    assert!(network.stop().status.success());
    assert_eq!(errno(daemon.write(file("state"), "active")), libc::EINVAL);
    let said = daemon.read(file("last_error"));
    assert!(said.contains(&network.name) && said.contains("virsh net-start"), "{said}");
    assert_eq!(daemon.read(file("state")), "stopped");
    assert!(network.start().status.success());
    daemon.set(file("state"), "active");
    wait_command(&daemon, id, "active");
    daemon.set(file("state"), "stopped");
    wait_command(&daemon, id, "stopped");

    let draft = Uuid::new_v4();
    let file = |name: &str| format!("instances/{draft}/{name}");
    fs::create_dir(daemon.path(format!("instances/{draft}"))).expect("a draft");
    daemon.set(file("image"), &daemon.read(format!("instances/{id}/image")));
    daemon.set(file("network"), "network:nonesuch");
    assert_eq!(errno(daemon.write(file("state"), "active")), libc::EINVAL);
    let said = daemon.read(file("last_error"));
    assert!(said.contains("'nonesuch'") && said.contains("virsh net-list"), "{said}");
    assert_eq!(daemon.read(file("state")), "draft", "nothing of it is left");
    assert!(daemon.stop(), "a clean end");
}

#[test]
fn one_ansible_play_goes_the_same_way_and_changes_nothing_the_second_time() {
    let daemon = Daemon::start_with("embed", &[]);
    let _guests = Guests(daemon.state_directory());
    let Some(bridge) = Bridge::new("an Ansible play", daemon.scratch()) else { return };
    let key = key(daemon.scratch());
    let program = Path::new(env!("CARGO_BIN_EXE_instancefs")).parent().expect("a directory");
    let variables = serde_json::json!({
        "tree": daemon.root(),
        "imports": daemon.state_directory().join("import"),
        "name": "played",
        "file": cloud_image(),
        "key": key,
        "network": format!("bridge:{}", bridge.name),
        "memory_bytes": 192 << 20,
        "ssh_options": format!("-o UserKnownHostsFile={}", daemon.scratch().join("known_hosts").display()),
    });
    let play = || {
        let output = Command::new("ansible-playbook")
            .args(["--inventory", "localhost,", "--extra-vars", &variables.to_string()])
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("mount-examples/cloud-image.yml"))
            .env("PATH", format!("{}:{}", program.display(), env::var("PATH").unwrap_or_default()))
            .env("ANSIBLE_HOME", daemon.scratch().join("ansible"))
            .env("ANSIBLE_LOCAL_TEMP", daemon.scratch().join("ansible/local"))
            .env("ANSIBLE_REMOTE_TEMP", daemon.scratch().join("ansible/remote"))
            .env("ANSIBLE_SSH_ARGS", "-o ControlMaster=no")
            .output()
            .expect("ansible-playbook runs (scripts/setup)");
        let said = text(&output);
        assert!(output.status.success(), "{said}");
        said
    };
    let first = play();
    assert!(first.contains("changed=7"), "{first}");
    let id = named(&daemon, "played");
    let before = daemon.read(format!("instances/{id}/updated_at"));
    let again = play();
    assert!(again.contains("changed=0") && !again.contains("changed=1"), "{again}");
    assert_eq!(daemon.read(format!("instances/{id}/updated_at")), before);
    daemon.set(format!("instances/{id}/state"), "stopped");
    wait_command(&daemon, id, "stopped");
}

#[test]
fn a_guest_without_a_bridge_connects_out_and_its_agent_tells_its_address() {
    let daemon = Daemon::start_with("embed", &[]);
    let _guests = Guests(daemon.state_directory());
    let image = Uuid::new_v4();
    fs::create_dir(daemon.path(format!("images/{image}"))).expect("a draft");
    let copied = Command::new("cp").arg(cloud_image()).arg(daemon.path(format!("images/{image}/data"))).status();
    assert!(copied.expect("cp runs").success());
    daemon.set(format!("images/{image}/state"), "active");
    long_wait("the image is active", || daemon.read(format!("images/{image}/state")) == "active");

    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let id = Uuid::new_v4();
    let file = |name: &str| format!("instances/{id}/{name}");
    fs::create_dir(daemon.path(format!("instances/{id}"))).expect("a draft");
    assert_eq!(daemon.read(file("network")), "user");
    assert_eq!(errno(daemon.write(file("network"), "network:default")), libc::EOPNOTSUPP);
    daemon.set(file("image"), &image.to_string());
    daemon.set(file("memory_bytes"), "192M");
    let script = format!("#!/bin/sh\necho \"from $(hostname)\" | nc 10.0.2.2 {port}\n");
    fs::write(daemon.path(file("user_data")), script).expect("user data");
    daemon.set(file("name"), "Out & about");
    daemon.set(file("state"), "active");
    wait_command(&daemon, id, "active");

    let (mut stream, _) = listener.accept().expect("the guest connects");
    let mut said = String::new();
    stream.read_to_string(&mut said).expect("it speaks");
    assert_eq!(said, "from out---about\n", "{}", console(&daemon, id));
    // QEMU's own DHCP server gives the first guest this one.
    long_wait("its agent tells", || daemon.read(file("addresses")).contains("10.0.2.15"));
}
