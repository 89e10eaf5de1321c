//! Root, or an ordinary user who mounts the tree for his own machines: the one place that asks who we are.
//!
//! Root gives rights away (guests and whoever reads untrusted bytes run as somebody else) and lets others into the tree.
//! An ordinary user can do neither: everything runs as himself, and nobody else enters, root included.

use nix::unistd::{User, getegid, geteuid};

/// The user that this process acts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Privilege {
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
}

impl Privilege {
    /// Who we are.
    pub fn of_this_process() -> Privilege {
        Privilege { uid: geteuid().as_raw(), gid: getegid().as_raw() }
    }

    /// Whether rights can be given away, and others be let in.
    pub fn is_root(self) -> bool {
        self.uid == 0
    }

    /// His entry in the user database, if he has one.
    pub fn account(self) -> Option<User> {
        User::from_uid(self.uid.into()).ok().flatten()
    }
}
