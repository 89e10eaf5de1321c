//! Volumes and offers through the mount.

mod keys;
mod links;
mod offers;
mod references;
mod stored;
#[path = "../support/mod.rs"]
mod support;
mod table;

use std::fs::File;
use std::path::Path;

use support::{Daemon, User, errno, gid, write};
use uuid::Uuid;

/// The access group.
const ACCESS: &str = "users";
/// A group that is a project.
const PROJECT: &str = "games";

fn daemon() -> Daemon {
    Daemon::start(&["-o", "access_group=users,projects=games"])
}

/// A member of the access group, of no project.
fn user(uid: u32) -> User {
    User { uid, gid: uid, groups: vec![gid(ACCESS)] }
}

fn opens(user: &User, path: &Path) -> i32 {
    user.act(|| errno(File::open(path)))
}

fn writes(user: &User, path: &Path, value: &str) -> i32 {
    user.act(|| errno(write(path, value.as_bytes())))
}

/// Offers a volume, as this user, and returns the offer.
fn offer(daemon: &Daemon, by: &User, volume: Uuid, value: &str) -> Uuid {
    assert_eq!(writes(by, &daemon.path(format!("volumes/{volume}/transfer")), value), 0);
    daemon.read(format!("volumes/{volume}/transfer")).parse().expect("the offer's uuid")
}

/// The key of an offer, read by who made it.
fn key(daemon: &Daemon, by: &User, offer: Uuid) -> String {
    let path = daemon.path(format!("transfers/{offer}/auth_key"));
    let key = by.act(|| std::fs::read_to_string(path)).expect("his to read");
    let key = key.strip_suffix('\n').expect("a line").to_owned();
    assert!(key.len() == 32 && key.bytes().all(|byte| byte.is_ascii_hexdigit()), "128 bits, hexadecimal");
    key
}
