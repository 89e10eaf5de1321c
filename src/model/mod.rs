//! What things are and what is allowed: no I/O, no clock, no threads.
//!
//! A request is judged in one order, the one that the interface promises (first match decides):
//! access, malformed, already true, role, lock and protection, not built, hypervisor connection, running task, state.
//! [`instance::decide`], [`image::decide`] and [`volume::decide`] are those judges; everything that changes an object asks them.

pub mod backend;
pub mod caller;
pub mod change;
pub mod domain;
pub mod flavor;
pub mod image;
pub mod instance;
pub mod keys;
pub mod network;
pub mod protection;
pub mod reason;
pub mod reconfiguration;
pub mod record;
pub mod secret;
pub mod sharing;
pub mod task;
pub mod transfer;
pub mod volume;

use serde::{Deserialize, Serialize};

/// The classes of objects that have a directory of their own at the root of the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// Virtual machines.
    Instance,
    /// Disk images.
    Image,
    /// Operations under way or done.
    Task,
    /// Named sizes of virtual machines.
    Flavor,
    /// Disks that exist by themselves.
    Volume,
    /// Offers of a volume to somebody else.
    Transfer,
    /// Where disks are kept.
    Backend,
}

impl Class {
    /// All of them, in the order of their numbers in inodes; only ever appended to.
    pub const ALL: [Class; 7] =
        [Class::Instance, Class::Image, Class::Task, Class::Flavor, Class::Volume, Class::Transfer, Class::Backend];

    /// The name of the class directory.
    pub fn directory(self) -> &'static str {
        match self {
            Class::Instance => "instances",
            Class::Image => "images",
            Class::Task => "tasks",
            Class::Flavor => "flavors",
            Class::Volume => "volumes",
            Class::Transfer => "transfers",
            Class::Backend => "backends",
        }
    }

    /// One object of it, for sentences.
    pub fn noun(self) -> &'static str {
        match self {
            Class::Instance => "instance",
            Class::Image => "image",
            Class::Task => "task",
            Class::Flavor => "flavor",
            Class::Volume => "volume",
            Class::Transfer => "transfer",
            Class::Backend => "backend",
        }
    }
}
