//! The main job on a real guest: libvirt's QEMU driver inside the daemon, and a small Linux that boots.

#[path = "guest/bin.rs"]
mod bin;
#[path = "guest/bridge.rs"]
mod bridge;
#[allow(dead_code, reason = "each test program uses its own part of this")]
#[path = "libvirt_backend/daemon.rs"]
mod host;
#[path = "guest/libvirt_network.rs"]
mod libvirt_network;
#[path = "guest/network.rs"]
mod network;
#[path = "guest/shelf.rs"]
mod shelf;
mod support;
#[path = "guest/undefined.rs"]
mod undefined;
#[path = "guest/volume.rs"]
mod volume;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use support::guests::{Guests, long_wait};
use support::{Daemon, errno, wait_until};
use uuid::Uuid;

fn guest_image() -> PathBuf {
    std::env::var_os("INSTANCEFS_GUEST_IMAGE").map_or_else(
        || panic!("run scripts/test, or set INSTANCEFS_GUEST_IMAGE to what scripts/guest-image made"),
        PathBuf::from,
    )
}

fn boot(daemon: &Daemon) -> Uuid {
    boot_with(daemon, &[])
}

/// A guest with these values beside the usual ones.
fn boot_with(daemon: &Daemon, values: &[(&str, &str)]) -> Uuid {
    let image = Uuid::new_v4();
    fs::create_dir(daemon.path(format!("images/{image}"))).expect("a draft");
    let copied = Command::new("cp").arg(guest_image()).arg(daemon.path(format!("images/{image}/data"))).status();
    assert!(copied.expect("cp runs").success());
    daemon.set(format!("images/{image}/state"), "active");
    long_wait("the image is active", || daemon.read(format!("images/{image}/state")) == "active");
    let id = Uuid::new_v4();
    fs::create_dir(daemon.path(format!("instances/{id}"))).expect("a draft");
    daemon.set(format!("instances/{id}/name"), "guest <&> 1");
    daemon.set(format!("instances/{id}/image"), &format!("images/{image}"));
    daemon.set(format!("instances/{id}/memory_bytes"), "192M");
    for (file, value) in values {
        daemon.set(format!("instances/{id}/{file}"), value);
    }
    daemon.set(format!("instances/{id}/state"), "active");
    long_wait("it is active", || daemon.read(format!("instances/{id}/state")) == "active");
    id
}

fn console(daemon: &Daemon, id: Uuid) -> String {
    let bytes = fs::read(daemon.path(format!("instances/{id}/console.log"))).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn wait_command(daemon: &Daemon, id: Uuid, word: &str) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_instancefs"));
    command.arg("wait").arg(daemon.path(format!("instances/{id}"))).args(["--for", word, "--timeout", "120"]);
    let output = command.output().expect("wait runs");
    assert!(output.status.success(), "wait --for {word}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_real_guest_boots_is_locked_survives_the_daemon_and_stops_when_asked() {
    let mut daemon = Daemon::start_with("embed", &[]);
    let guests = Guests(daemon.state_directory());
    let id = boot(&daemon);
    let file = |name: &str| format!("instances/{id}/{name}");
    long_wait("it prints from inside", || console(&daemon, id).contains("READY"));
    assert!(console(&daemon, id).contains("BOOTS=1"));
    let pid = *guests.pids().first().expect("a QEMU process");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let field = |name: &str| status.lines().find(|line| line.starts_with(name)).expect("a field").to_owned();
    assert!(!field("Uid:").contains("\t0"), "the guest runs as root: {}", field("Uid:"));
    assert!(field("Seccomp:").ends_with('2'), "the guest runs without seccomp: {}", field("Seccomp:"));

    let image = daemon.state_directory().join("images").join(daemon.read(file("image"))).join("data");
    assert_eq!(fs::metadata(image).expect("the image").uid(), 0, "a guest's QEMU owns what other guests run on");

    daemon.set(file("locked"), "1");
    daemon.set(file("locked_reason"), "month end");
    assert_eq!(errno(daemon.write(file("state"), "stopped")), libc::EPERM);
    assert!(daemon.read(file("last_error")).contains("month end"));
    daemon.set(file("locked"), "0");

    daemon.set(file("state"), "paused");
    assert_eq!(daemon.read(file("power_state")), "paused");
    daemon.set(file("state"), "active");
    daemon.set(file("state"), "suspended");
    wait_command(&daemon, id, "suspended");
    daemon.set(file("state"), "active");
    wait_command(&daemon, id, "active");

    daemon.kill();
    assert!(Path::new(&format!("/proc/{}", guests.pids().first().expect("the guest runs on"))).exists());
    daemon.spawn();
    assert_eq!(daemon.read(file("state")), "active");
    wait_until("the hypervisor is back", || daemon.read("health").contains("hypervisor ok"));

    daemon.set(file("state"), "stopped");
    wait_command(&daemon, id, "stopped");
    assert!(console(&daemon, id).contains("POWERBUTTON"), "it was asked, not killed");
    assert!(guests.pids().is_empty());

    let link = |word: &str| daemon.path(format!("by-state/instances/{word}/{id}"));
    wait_until("the link stands", || link("stopped").is_symlink());
    fs::rename(link("stopped"), link("active")).expect("the move is accepted");
    wait_command(&daemon, id, "active");
    long_wait("its own disk remembers the first boot", || console(&daemon, id).contains("BOOTS=2"));
    daemon.set(file("state"), "stopped");
    wait_command(&daemon, id, "stopped");
    assert!(daemon.stop(), "a clean end");
}

#[test]
fn a_soft_reboot_restarts_the_guest_by_its_power_button() {
    let daemon = Daemon::start_with("embed", &[]);
    let guests = Guests(daemon.state_directory());
    let id = boot(&daemon);
    let file = |name: &str| format!("instances/{id}/{name}");
    long_wait("it has booted", || console(&daemon, id).contains("READY"));
    let pids = guests.pids();
    daemon.set(file("reboot"), "soft");
    long_wait("the reboot ends", || daemon.read(file("task")).is_empty());
    assert_eq!((daemon.read(file("last_error")), daemon.read(file("state"))), ("ok".into(), "active".into()));
    assert!(console(&daemon, id).contains("POWERBUTTON"), "it was asked");
    long_wait("it has booted again", || console(&daemon, id).matches("READY").count() == 2);
    assert!(console(&daemon, id).contains("BOOTS=2"));
    assert_eq!(guests.pids(), pids, "its QEMU goes on");
}

fn token(daemon: &Daemon, id: Uuid, device: &str) -> String {
    daemon.read(format!("instances/{id}/console/{device}"))
}

/// What socat prints while `input` is typed, which has to end with the word that is waited for.
fn socat(daemon: &Daemon, id: Uuid, input: &str, word: &str) -> String {
    let mut command = Command::new("socat");
    command.args(["-", &format!("UNIX-CONNECT:{}", token(daemon, id, "serial"))]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("socat runs");
    child.stdin.as_mut().expect("a pipe").write_all(input.as_bytes()).expect("typed");
    let mut heard = Vec::new();
    let mut output = child.stdout.take().expect("a pipe");
    while !String::from_utf8_lossy(&heard).contains(word) {
        let mut buffer = [0; 4096];
        let count = output.read(&mut buffer).expect("socat prints");
        assert!(count > 0, "it ended with {:?}", String::from_utf8_lossy(&heard));
        heard.extend_from_slice(&buffer[..count]);
    }
    child.kill().expect("killed");
    child.wait().expect("reaped");
    String::from_utf8_lossy(&heard).into_owned()
}

#[test]
fn a_real_guest_is_used_through_its_consoles_and_reset_if_it_does_not_listen() {
    let daemon = Daemon::start_with("embed", &[]);
    let guests = Guests(daemon.state_directory());
    let id = boot(&daemon);
    let file = |name: &str| format!("instances/{id}/{name}");
    long_wait("it has booted", || console(&daemon, id).contains("READY"));

    socat(&daemon, id, "echo hello-$((6*7))\n", "hello-42");
    long_wait("what passes a session is logged as well", || console(&daemon, id).contains("hello-42"));
    let second = {
        let mut first = UnixStream::connect(token(&daemon, id, "serial")).expect("a token");
        first.write_all(b"echo first-$((1+1))\n").expect("typed");
        long_wait("the first one is in", || console(&daemon, id).contains("first-2"));
        let mut text = String::new();
        let mut second = UnixStream::connect(token(&daemon, id, "serial")).expect("a token");
        second.read_to_string(&mut text).expect("refused");
        text
    };
    assert!(second.contains("no serial console"), "{second}");

    let mut screen = UnixStream::connect(token(&daemon, id, "vnc")).expect("a token");
    let mut greeting = [0; 12];
    screen.read_exact(&mut greeting).expect("RFB");
    assert_eq!(&greeting, b"RFB 003.008\n");
    // Version, security type 1 (none), ClientInit: then the screen describes itself.
    screen.write_all(b"RFB 003.008\n").expect("written");
    let mut security = [0; 2];
    screen.read_exact(&mut security).expect("security types");
    assert_eq!(security, [1, 1]);
    screen.write_all(&[1]).expect("written");
    let mut result = [0; 4];
    screen.read_exact(&mut result).expect("the result");
    screen.write_all(&[1]).expect("written");
    let mut size = [0; 4];
    screen.read_exact(&mut size).expect("the screen");
    assert_eq!((result, &size), ([0; 4], &[2, 0xd0, 1, 0x90]), "720 x 400: VGA text");

    // Without who reads the button, the guest does not listen.
    long_wait("the console is free", || {
        let mut socket = UnixStream::connect(token(&daemon, id, "serial")).expect("a token");
        let _typed = socket.write_all(b"killall dd; echo deaf-$((2+2))\n");
        std::thread::sleep(Duration::from_millis(300));
        console(&daemon, id).contains("deaf-4")
    });
    daemon.set(file("stop_timeout_seconds"), "2");
    daemon.set(file("reboot"), "soft");
    long_wait("the reboot ends", || daemon.read(file("task")).is_empty());
    assert_eq!(daemon.read(file("last_error")), "ok");
    assert!(daemon.log_text().contains("is reset"));
    long_wait("it has booted again", || console(&daemon, id).contains("BOOTS=2"));
    assert!(!console(&daemon, id).contains("POWERBUTTON"));

    let unused = token(&daemon, id, "vnc");
    daemon.set(file("stop_timeout_seconds"), "0");
    daemon.set(file("state"), "stopped");
    wait_command(&daemon, id, "stopped");
    let mut rest = Vec::new();
    screen.read_to_end(&mut rest).expect("the guest's end is the session's");
    wait_until("the token is gone", || !Path::new(&unused).exists());
    assert!(guests.pids().is_empty());
}
