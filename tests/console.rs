//! Consoles through their one-use sockets, on a real mount with simulated guests.

mod support;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;
use support::{DEADLINE, Daemon, User, errno, wait_until};
use uuid::Uuid;

const DEVICES: &str = "<devices><serial type='pty'/><graphics type='vnc'/></devices>";

/// A running guest with these devices.
fn guest(daemon: &Daemon, devices: &str) -> Uuid {
    let id = Uuid::new_v4();
    let xml = format!(
        "<domain type='qemu'><name>{id}</name><uuid>{id}</uuid><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
         <os><type>hvm</type></os>{devices}</domain>"
    );
    daemon.host_does(json!({"do": "define", "xml": xml}));
    wait_until("its definition is known", || daemon.path(format!("instances/{id}/domain.xml")).exists());
    daemon.domain_does(id, "start", "active");
    id
}

fn token(daemon: &Daemon, id: Uuid, device: &str) -> PathBuf {
    PathBuf::from(daemon.read(format!("instances/{id}/console/{device}")))
}

fn connect(path: &Path) -> UnixStream {
    let socket = UnixStream::connect(path).expect("the token holds");
    socket.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    socket
}

fn everything(mut socket: UnixStream) -> String {
    let mut text = String::new();
    socket.read_to_string(&mut text).expect("it is closed");
    text
}

fn hears(socket: &mut UnixStream, expected: &[u8]) {
    let mut bytes = vec![0; expected.len()];
    socket.read_exact(&mut bytes).expect("bytes");
    assert_eq!(bytes, expected);
}

#[test]
fn a_token_leads_to_the_console_once() {
    let daemon = Daemon::start(&[]);
    let id = guest(&daemon, DEVICES);
    let path = token(&daemon, id, "serial");
    assert_ne!(token(&daemon, id, "serial"), path, "each reader gets his own");
    let file = daemon.path(format!("instances/{id}/console/serial"));
    assert_eq!(file.metadata().unwrap().len(), path.as_os_str().len() as u64 + 1);

    let mut socket = connect(&path);
    socket.write_all(b"hello").unwrap();
    hears(&mut socket, b"hello");
    assert_eq!(UnixStream::connect(&path).unwrap_err().kind(), ErrorKind::NotFound);

    // libvirt gives a serial console to one client at a time.
    let second = everything(connect(&token(&daemon, id, "serial")));
    assert!(second.contains("Active console session"), "{second}");
    drop(socket);
    wait_until("the first one has left", || {
        let mut third = connect(&token(&daemon, id, "serial"));
        let mut byte = [0];
        third.write_all(b"!").is_ok() && third.read_exact(&mut byte).is_ok() && byte == *b"!"
    });

    let mut screen = connect(&token(&daemon, id, "vnc"));
    hears(&mut screen, b"RFB 003.008\n");
    assert!(daemon.log_text().contains(&format!("serial console of instance {id} by uid 0 ended")));
}

#[test]
fn a_stopped_guest_ends_its_tokens_and_sessions() {
    let daemon = Daemon::start(&[]);
    let id = guest(&daemon, DEVICES);
    let (unused, mut open) = (token(&daemon, id, "serial"), connect(&token(&daemon, id, "vnc")));
    hears(&mut open, b"RFB 003.008\n");
    daemon.set(format!("instances/{id}/state"), "stopped");
    assert_eq!(everything(open), "");
    wait_until("the token is gone", || !unused.exists());
    let file = daemon.path(format!("instances/{id}/console/serial"));
    assert_eq!(errno(fs::read(&file)), libc::EINVAL);
    assert_eq!(file.metadata().unwrap().len(), 0);
}

#[test]
fn a_guest_without_the_device_says_so() {
    let daemon = Daemon::start(&[]);
    let id = guest(&daemon, "");
    for device in ["serial", "vnc"] {
        assert_eq!(errno(fs::read(daemon.path(format!("instances/{id}/console/{device}")))), libc::EOPNOTSUPP);
    }
}

#[test]
fn a_token_is_its_readers_alone() {
    let daemon = Daemon::start(&["-o", "access_group=users"]);
    let id = guest(&daemon, DEVICES);
    daemon.set(format!("instances/{id}/owner"), "daemon");
    let group = support::gid("users");
    let user = |name: &str| {
        let user = nix::unistd::User::from_name(name).unwrap().expect("the user exists");
        User { uid: user.uid.as_raw(), gid: user.gid.as_raw(), groups: vec![group] }
    };
    let (owner, other) = (user("daemon"), user("games"));
    let file = daemon.path(format!("instances/{id}/console/serial"));
    assert_eq!(other.act(|| errno(fs::read(&file))), libc::EACCES);
    let path = PathBuf::from(owner.act(|| fs::read_to_string(&file)).expect("the owner reads").trim_end());
    assert_eq!((path.metadata().unwrap().uid(), path.metadata().unwrap().mode() & 0o777), (owner.uid, 0o600));
    assert_eq!(other.act(|| errno(UnixStream::connect(&path))), libc::EACCES);
    let mut socket = owner.act(|| connect(&path));
    socket.write_all(b"mine").unwrap();
    hears(&mut socket, b"mine");

    let given = PathBuf::from(owner.act(|| fs::read_to_string(&file)).expect("the owner reads").trim_end());
    daemon.set(format!("instances/{id}/owner"), "games");
    wait_until("it has changed hands", || !given.exists());
    assert_eq!(everything(socket), "", "who had it is out");
}

#[test]
fn tokens_are_few_and_do_not_outlive_the_daemon() {
    let mut daemon = Daemon::start(&[]);
    let id = guest(&daemon, DEVICES);
    let tokens: Vec<PathBuf> = (0..20).map(|_| token(&daemon, id, "serial")).collect();
    assert_eq!(tokens.iter().filter(|path| path.exists()).count(), 8);
    let mut socket = connect(&tokens[19]);
    socket.write_all(b"x").unwrap();
    hears(&mut socket, b"x");
    daemon.kill();
    assert_eq!(everything(socket), "");
    daemon.spawn();
    assert!(tokens.iter().all(|path| !path.exists()));
}

#[test]
fn a_hypervisor_that_hangs_holds_nobody_but_the_client() {
    let daemon = Daemon::start(&[]);
    let id = guest(&daemon, DEVICES);
    daemon.host_does(json!({"do": "fault", "call": "open_console", "mode": "hang", "times": 1}));
    let mut waiting = connect(&token(&daemon, id, "serial"));
    waiting.write_all(b"early").unwrap();
    wait_until("it hangs", || !daemon.host_does(json!({"do": "calls"}))["pending"].as_array().unwrap().is_empty());
    let mut screen = connect(&token(&daemon, id, "vnc"));
    hears(&mut screen, b"RFB 003.008\n");
    daemon.host_does(json!({"do": "release"}));
    hears(&mut waiting, b"early");
}

#[test]
fn a_read_only_mount_gives_no_console() {
    let mut daemon = Daemon::start(&["-o", "ro"]);
    let id = Uuid::new_v4();
    let xml = format!("<domain type='qemu'><name>a</name><uuid>{id}</uuid>{DEVICES}</domain>");
    daemon.host_does(json!({"do": "define", "xml": xml}));
    wait_until("it appears", || daemon.path(format!("instances/{id}/state")).exists());
    daemon.domain_does(id, "start", "active");
    assert_eq!(errno(fs::read(daemon.path(format!("instances/{id}/console/serial")))), libc::EROFS);
    assert!(daemon.stop());
}

#[test]
fn socat_speaks_to_a_console_by_the_line_of_the_manual() {
    let daemon = Daemon::start(&[]);
    let id = guest(&daemon, DEVICES);
    let line = "printf 'to and fro' | socat -t 5 -,ignoreeof UNIX-CONNECT:$(cat console/serial),readbytes=10";
    let socat = Command::new("sh").args(["-c", line]).current_dir(daemon.path(format!("instances/{id}"))).output();
    assert_eq!(String::from_utf8_lossy(&socat.expect("sh runs").stdout), "to and fro");
}
