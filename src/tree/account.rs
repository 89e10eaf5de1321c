//! Users and groups by name. Names are remembered for a minute: rendering ten thousand owners must not ask the
//! directory service ten thousand times.

use std::collections::HashMap;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use nix::unistd::{Gid, Group, Uid, User};
use parking_lot::Mutex;

use super::value::{filled, malformed};
use crate::model::reason::Reason;

const REMEMBERED: Duration = Duration::from_secs(60);
/// How many names are remembered.
const MOST: usize = 16_384;

type Names = LazyLock<Mutex<HashMap<u32, (Instant, String)>>>;
static USERS: Names = LazyLock::new(Mutex::default);
static GROUPS: Names = LazyLock::new(Mutex::default);

/// A user by name or number.
pub fn user(value: &str) -> Result<u32, Reason> {
    let value = filled(value)?;
    if let Ok(Some(user)) = User::from_name(value) {
        return Ok(user.uid.as_raw());
    }
    value.parse().ok().filter(|uid| *uid != u32::MAX).ok_or_else(|| malformed("there is no such user on this host"))
}

/// A group by name or number.
pub fn group(value: &str) -> Result<u32, Reason> {
    let value = filled(value)?;
    if let Ok(Some(group)) = Group::from_name(value) {
        return Ok(group.gid.as_raw());
    }
    value.parse().ok().filter(|gid| *gid != u32::MAX).ok_or_else(|| malformed("there is no such group on this host"))
}

/// A uid's name, or its number where it has none.
pub fn user_name(uid: u32) -> String {
    remembered(&USERS, uid, || User::from_uid(Uid::from_raw(uid)).ok().flatten().map(|user| user.name))
}

/// A gid's name, or its number where it has none.
pub fn group_name(gid: u32) -> String {
    remembered(&GROUPS, gid, || Group::from_gid(Gid::from_raw(gid)).ok().flatten().map(|group| group.name))
}

fn remembered(names: &Names, id: u32, find: impl FnOnce() -> Option<String>) -> String {
    if let Some((when, name)) = names.lock().get(&id)
        && when.elapsed() < REMEMBERED
    {
        return name.clone();
    }
    let name = find().unwrap_or_else(|| id.to_string());
    let mut names = names.lock();
    if names.len() >= MOST {
        names.clear();
    }
    names.insert(id, (Instant::now(), name.clone()));
    name
}
