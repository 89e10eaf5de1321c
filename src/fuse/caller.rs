//! Who is behind a request.

use crate::model::caller::Caller;
use crate::privilege::Privilege;
use crate::tree::account::user_name;

/// `loginuid` of a process that nobody logged in for.
const NO_LOGIN: u32 = u32::MAX;

/// Looks callers up in `/proc`. Only to be asked while the request is unanswered: then its thread still exists.
pub struct Callers {
    /// The ordinary user whose mount this is.
    mounter: Option<u32>,
}

impl Callers {
    /// Of a mount of this user's.
    pub fn new(privilege: Privilege) -> Callers {
        Callers { mounter: (!privilege.is_root()).then_some(privilege.uid) }
    }

    /// The caller with his supplementary groups and his login name. A thread of another pid namespace has number 0 and
    /// no groups that we could learn.
    pub fn resolve(&self, uid: u32, gid: u32, thread: u32) -> Caller {
        let read = |file: &str| match thread {
            0 => None,
            thread => std::fs::read_to_string(format!("/proc/{thread}/{file}")).ok(),
        };
        let groups = read("status").map(|status| groups(&status)).unwrap_or_default();
        let login = read("loginuid").and_then(|text| text.trim().parse().ok()).filter(|login| *login != NO_LOGIN);
        Caller { uid, gid, groups, login: user_name(login.unwrap_or(uid)), is_mounter: self.mounter == Some(uid) }
    }

    /// The caller as far as the request itself names him: enough to read.
    pub fn plain(&self, uid: u32, gid: u32) -> Caller {
        let is_mounter = self.mounter == Some(uid);
        Caller { uid, gid, groups: Vec::new(), login: uid.to_string(), is_mounter }
    }
}

/// The `Groups:` line of `/proc/<tid>/status`.
fn groups(status: &str) -> Vec<u32> {
    status
        .lines()
        .find_map(|line| line.strip_prefix("Groups:"))
        .map(|groups| groups.split_whitespace().filter_map(|group| group.parse().ok()).collect())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn supplementary_groups_are_read_from_the_status_of_the_thread() {
        assert_eq!(groups("Name:\tsh\nUid:\t1\nGroups:\t4 27 1000 \nNStgid:\t9\n"), [4, 27, 1000]);
        assert_eq!(groups("Name:\tsh\nGroups:\t \n"), [] as [u32; 0]);
    }

    #[test]
    fn a_thread_that_cannot_be_seen_has_no_groups_and_a_uid_without_a_name_is_a_number() {
        let callers = Callers::new(Privilege { uid: 0, gid: 0 });
        let caller = callers.resolve(3_999_999_999, 7, 0);
        assert_eq!(caller.groups, [] as [u32; 0]);
        assert_eq!(caller.login, "3999999999");
        assert_eq!(callers.resolve(0, 0, 0).login, "root");
    }

    #[test]
    fn an_ordinary_users_mount_knows_its_user() {
        let callers = Callers::new(Privilege { uid: 1000, gid: 100 });
        assert!(callers.resolve(1000, 100, 0).is_mounter && callers.plain(1000, 100).is_mounter);
        assert!(!callers.resolve(1001, 100, 0).is_mounter);
        assert!(!Callers::new(Privilege { uid: 0, gid: 0 }).resolve(0, 0, 0).is_mounter);
    }
}
