//! Who asks, and what he is to an object.

use serde::{Deserialize, Serialize};

/// The process behind a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// File system user id.
    pub uid: u32,
    /// File system group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// The person: the name behind the audit login uid where there is one (sudo makes everybody root), else behind
    /// [`Caller::uid`]; a number where the uid has no name.
    pub login: String,
    /// He is the ordinary user whose mount this is.
    pub is_mounter: bool,
}

impl Caller {
    /// The daemon itself, for what no request asked for.
    pub fn daemon() -> Caller {
        Caller { uid: 0, gid: 0, groups: Vec::new(), login: "instancefs".to_owned(), is_mounter: false }
    }

    /// Whether he is in the group, by primary or supplementary membership.
    pub fn in_group(&self, gid: u32) -> bool {
        self.gid == gid || self.groups.contains(&gid)
    }

    /// Whether he administers the tree, see [`Role::is_administrator`].
    pub fn is_administrator(&self) -> bool {
        self.uid == 0 || self.is_mounter
    }

    /// What he is to an object.
    pub fn role(&self, ownership: &Ownership) -> Role {
        if self.uid == 0 {
            Role::Root
        } else if self.is_mounter {
            Role::Mounter
        } else if self.uid == ownership.owner {
            Role::Owner
        } else if ownership.project != NO_PROJECT && self.in_group(ownership.project) {
            Role::Member
        } else {
            Role::Stranger
        }
    }
}

/// The gid of `nogroup`, which is no project: being in it gives no right.
pub const NO_PROJECT: u32 = 65534;

/// Whose an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ownership {
    /// User id of the owner.
    pub owner: u32,
    /// Group id of the project, [`NO_PROJECT`] for none.
    pub project: u32,
    /// Grows with each change of owner or project, so that handles opened before can be told apart.
    pub generation: u32,
}

/// What a caller is to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// uid 0.
    Root,
    /// The ordinary user whose mount it is: nobody else is in it, and he may do what root may, but give things away.
    Mounter,
    /// The object's owner.
    Owner,
    /// A member of its project.
    Member,
    /// Anybody else.
    Stranger,
}

impl Role {
    /// Whether he administers the tree: opens every lock, resets states.
    pub fn is_administrator(self) -> bool {
        match self {
            Role::Root | Role::Mounter => true,
            Role::Owner | Role::Member | Role::Stranger => false,
        }
    }
}
