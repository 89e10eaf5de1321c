//! `-o ro`: a mount that shows everything and changes nothing.

mod support;

use std::fs;
use std::os::unix::fs::symlink;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde_json::json;
use support::{Daemon, User, errno, gid, wait_until};
use uuid::Uuid;

/// Calls of the hypervisor that only look.
const LOOKING: [&str; 7] = ["ping", "identity", "domains", "domain", "definition", "connect", "events"];

fn changing_calls(daemon: &Daemon) -> Vec<String> {
    let answer = daemon.host_does(json!({"do": "calls"}));
    let calls = answer["calls"].as_object().expect("counters");
    calls
        .iter()
        .filter(|(call, count)| !LOOKING.contains(&call.as_str()) && count.as_u64() != Some(0))
        .map(|(call, count)| format!("{call}: {count}"))
        .collect()
}

#[test]
fn everything_that_changes_is_refused_for_everybody_and_changes_from_outside_are_seen_and_announced() {
    let daemon = Daemon::start(&["-o", "ro"]);
    let id = daemon.domain("shown");
    daemon.domain_does(id, "start", "active");
    let home = daemon.path(format!("instances/{id}"));
    let root = daemon.root();
    let places = [format!("by-state/instances/active/{id}"), "by-name/instances/shown".to_owned()];
    wait_until("its names are published", || places.iter().all(|place| root.join(place).exists()));
    let refused_for_all = || {
        for name in ["state", "description", "locked", "reboot", "reset_state", "name"] {
            assert_eq!(errno(fs::OpenOptions::new().write(true).open(home.join(name))), libc::EROFS, "{name}");
            assert_eq!(errno(support::write(&home.join(name), b"1")), libc::EROFS, "{name}");
        }
        assert_eq!(errno(fs::create_dir(root.join(format!("instances/{}", Uuid::new_v4())))), libc::EROFS);
        assert_eq!(errno(fs::create_dir(root.join(format!("images/{}", Uuid::new_v4())))), libc::EROFS);
        assert_eq!(errno(fs::remove_dir(&home)), libc::EROFS);
        assert_eq!(errno(fs::remove_file(home.join("state"))), libc::EROFS);
        assert_eq!(errno(symlink("x", root.join("by-name/instances/x"))), libc::EROFS);
        let links = root.join("by-state/instances");
        let (from, to) = (links.join(format!("active/{id}")), links.join(format!("stopped/{id}")));
        assert_eq!(errno(fs::rename(from, to)), libc::EROFS);
        let names = root.join("by-name/instances");
        assert_eq!(errno(fs::rename(names.join("shown"), names.join("other"))), libc::EROFS);
        let temporary = fs::OpenOptions::new().write(true).create_new(true).open(home.join(".state.tmp"));
        assert_eq!(errno(temporary), libc::EROFS);
    };
    refused_for_all();
    assert_eq!(errno(fs::set_permissions(home.join("state"), mode(0o600))), libc::EROFS);
    User { uid: 2001, gid: gid("libvirt"), groups: Vec::new() }.act(|| {
        assert_eq!(errno(fs::create_dir(root.join(format!("instances/{}", Uuid::new_v4())))), libc::EROFS);
    });

    let inotify = Inotify::init(InitFlags::IN_NONBLOCK).expect("inotify");
    inotify.add_watch(&home.join("state"), AddWatchFlags::IN_CLOSE_WRITE).expect("a watch");
    daemon.domain_does(id, "pause", "paused");
    wait_until("the change is announced", || inotify.read_events().is_ok_and(|events| !events.is_empty()));

    wait_until("the definition is there", || home.join("domain.xml").exists());
    assert_eq!(changing_calls(&daemon), [] as [String; 0], "the hypervisor was only looked at");
}

#[test]
fn a_read_only_mount_remembers_what_it_saw() {
    let mut daemon = Daemon::start(&["-o", "ro"]);
    let id = daemon.domain("remembered");
    let number = |daemon: &Daemon| inode(daemon, id);
    let before = number(&daemon);
    assert!(daemon.stop(), "a clean end");
    daemon.spawn();
    assert_eq!(number(&daemon), before, "its inode number was stored");
    assert!(daemon.read("health").contains("store ok"));
    assert_eq!(changing_calls(&daemon), [] as [String; 0]);
}

fn inode(daemon: &Daemon, id: Uuid) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(daemon.path(format!("instances/{id}"))).expect("stat").ino()
}

fn mode(bits: u32) -> fs::Permissions {
    use std::os::unix::fs::PermissionsExt;
    fs::Permissions::from_mode(bits)
}
