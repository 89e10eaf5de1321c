//! Lock and termination protection: asked in one place by every word, verb, rename and job.

use serde::{Deserialize, Serialize};

use super::caller::Role;
use super::reason::Reason;

/// Who holds a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Owner or project member: whoever may write the object may unlock it.
    Owner,
    /// Root, or whose mount it is: only he unlocks it.
    Admin,
}

/// A lock and its companions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lock {
    /// Login name of who locked.
    pub by: String,
    /// Unix seconds.
    pub at: u64,
    /// `locked_level`.
    pub level: Level,
    /// `locked_reason`, may be empty.
    pub reason: String,
}

/// What protects an object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Protection {
    /// Refuses every change, for everybody.
    pub lock: Option<Lock>,
    /// Refuses every kind of deletion.
    pub disable_terminate: bool,
}

/// What a request would do to a protected object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Change it in any way.
    Change,
    /// Delete it, to the bin or for good.
    Delete,
    /// Open the lock.
    Unlock,
    /// Lock it, or change the lock's reason.
    Lock,
    /// Define it again as it was: no change, and what protection is for.
    DefineAgain,
}

/// The same question of an image, which has no lock: whether it may be deleted in any way, by anybody.
pub fn check_deletion(delete_protection: bool) -> Result<(), Reason> {
    if delete_protection { Err(Reason::DeleteProtected) } else { Ok(()) }
}

impl Protection {
    /// Whether there is any.
    pub fn protects(&self) -> bool {
        self.lock.is_some() || self.disable_terminate
    }

    /// The one judge: whether protection lets the action happen. Root is bound like everybody.
    pub fn check(&self, action: Action, role: Role) -> Result<(), Reason> {
        match (action, &self.lock) {
            (Action::Change | Action::Delete, Some(lock)) => Err(Reason::Locked(lock.clone())),
            (Action::Delete, None) if self.disable_terminate => Err(Reason::TerminateDisabled),
            (Action::Change | Action::Delete, None) => Ok(()),
            (Action::Unlock | Action::Lock, Some(lock)) => match (lock.level, role) {
                (Level::Owner, _) | (Level::Admin, Role::Root | Role::Mounter) => Ok(()),
                (Level::Admin, Role::Owner | Role::Member | Role::Stranger) => Err(Reason::AdminLock(lock.clone())),
            },
            (Action::Unlock | Action::Lock, None) | (Action::DefineAgain, _) => Ok(()),
        }
    }
}
