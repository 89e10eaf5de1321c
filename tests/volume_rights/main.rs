//! Volumes, offers and backends through the mount: who may what, and what links and directories do.

mod keys;
mod links;
mod offers;
mod references;
#[path = "../support/mod.rs"]
mod support;
mod table;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use support::{Daemon, User, errno, gid, wait_until, write};
use uuid::Uuid;

/// The access group.
const ACCESS: &str = "users";
/// A group that is a project.
const PROJECT: &str = "games";
/// Whose the volumes are.
const OWNER: u32 = 2001;

fn daemon() -> Daemon {
    Daemon::start(&["-o", "access_group=users,projects=games"])
}

/// A member of the access group, of no project.
fn user(uid: u32) -> User {
    User { uid, gid: uid, groups: vec![gid(ACCESS)] }
}

fn owner() -> User {
    user(OWNER)
}

/// A member of the project.
fn member() -> User {
    User { uid: 2005, gid: gid(PROJECT), groups: vec![gid(ACCESS)] }
}

fn root() -> User {
    User { uid: 0, gid: 0, groups: vec![] }
}

fn opens(user: &User, path: &Path) -> i32 {
    user.act(|| match path.is_dir() {
        true => errno(fs::read_dir(path)),
        false => errno(File::open(path)),
    })
}

fn writes(user: &User, path: &Path, value: &str) -> i32 {
    user.act(|| errno(write(path, value.as_bytes())))
}

/// A draft of the owner's.
fn draft(daemon: &Daemon, class: &str) -> Uuid {
    let id = Uuid::new_v4();
    owner().act(|| fs::create_dir(daemon.path(format!("{class}/{id}"))).expect("a draft"));
    id
}

/// An available volume of the owner's.
fn volume(daemon: &Daemon) -> Uuid {
    let id = draft(daemon, "volumes");
    daemon.set(format!("volumes/{id}/size_bytes"), "1M");
    daemon.set(format!("volumes/{id}/state"), "available");
    wait_until("it is made", || daemon.read(format!("volumes/{id}/state")) == "available");
    id
}

/// Takes a snapshot as the owner, and waits until it is complete.
fn snapshot(daemon: &Daemon, volume: Uuid, name: &str) -> PathBuf {
    let directory = daemon.path(format!("volumes/{volume}/snapshots/{name}"));
    owner().act(|| fs::create_dir(&directory)).expect("accepted");
    wait_until("it is complete", || daemon.read(directory.join("state")) == "available");
    wait_until("it is free again", || daemon.read(format!("volumes/{volume}/task")).is_empty());
    directory
}

/// Offers a volume, as this user, and returns the offer.
fn offer(daemon: &Daemon, by: &User, volume: Uuid, value: &str) -> Uuid {
    assert_eq!(writes(by, &daemon.path(format!("volumes/{volume}/transfer")), value), 0);
    daemon.read(format!("volumes/{volume}/transfer")).parse().expect("the offer's uuid")
}

/// The key of an offer, read by who made it.
fn key(daemon: &Daemon, by: &User, offer: Uuid) -> String {
    let path = daemon.path(format!("transfers/{offer}/auth_key"));
    let key = by.act(|| fs::read_to_string(path)).expect("his to read");
    let key = key.strip_suffix('\n').expect("a line").to_owned();
    assert!(key.len() == 32 && key.bytes().all(|byte| byte.is_ascii_hexdigit()), "128 bits, hexadecimal");
    key
}
