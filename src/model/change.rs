//! Changes to an object's attributes; a write is a change set of one. The judge of an instance's is in
//! `change/instance.rs`, of an image's in `change/image.rs`.

mod image;
mod instance;

use std::sync::Arc;

use uuid::Uuid;

use super::caller::Role;
use super::image::{Format, Word as ImageWord};
use super::instance::{Verdict, Word, not_in_bin};
use super::network::Network;
use super::reason::Reason;
use super::record::BinEntry;
use super::sharing::{Status, Visibility};
use super::task::Operation;
pub use image::judge_image;
pub use instance::judge_instance;

/// One attribute of an instance, and the value that it is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InstanceChange {
    /// `name`.
    Name(String),
    /// `description`.
    Description(String),
    /// `state`.
    State(Word),
    /// `locked`.
    Locked(bool),
    /// `locked_reason`.
    LockedReason(String),
    /// `disable_terminate`.
    DisableTerminate(bool),
    /// `owner`, a user id.
    Owner(u32),
    /// `project`, a group id.
    Project(u32),
    /// `image`.
    Image(Uuid),
    /// `flavor`.
    Flavor(FlavorChoice),
    /// `user_data`; `None` clears it.
    UserData(Option<Arc<str>>),
    /// `vcpus`.
    Vcpus(u32),
    /// `memory_bytes`.
    MemoryBytes(u64),
    /// `root_disk_bytes`.
    RootDiskBytes(u64),
    /// `network`.
    Network(Network),
    /// `autostart`.
    Autostart(bool),
    /// `stop_timeout_seconds`.
    StopTimeoutSeconds(u32),
    /// `reboot` `soft`.
    RebootSoft,
    /// `reboot` `hard`.
    RebootHard,
    /// `reset_state`.
    ResetState,
    /// A move out of the bin.
    Restore,
    /// Another try at what a move into the bin left to do.
    SettleBin,
    /// `expires_at` in the bin, Unix seconds; `None`: never.
    ExpiresAt(Option<u64>),
    /// `metadata/<key>` and its text; `None` removes it.
    Metadata(String, Option<String>),
}

/// A flavor that an instance is to have, with the values that it has at that moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlavorChoice {
    /// Its name.
    pub name: String,
    /// What is copied; or why it cannot be, which matters only if the instance has another flavor: what it has already
    /// may have been deleted meanwhile.
    pub sizes: Result<Sizes, Reason>,
}

/// What a flavor gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Size of the root disk in bytes; `None`: as it is.
    pub root_disk_bytes: Option<u64>,
}

/// One attribute of an image, and the value that it is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageChange {
    /// `name`.
    Name(String),
    /// `description`.
    Description(String),
    /// `state`.
    State(ImageWord),
    /// `disk_format`.
    DiskFormat(Format),
    /// `visibility`.
    Visibility(Visibility),
    /// `share`, a group id.
    Share(u32),
    /// `unshare`, a group id.
    Unshare(u32),
    /// `members/<project>`.
    Member {
        /// A group id.
        project: u32,
        /// What it says.
        status: Status,
    },
    /// `delete_protection`.
    DeleteProtection(bool),
    /// `min_disk_bytes`.
    MinDiskBytes(u64),
    /// `min_memory_bytes`.
    MinMemoryBytes(u64),
    /// `owner`, a user id.
    Owner(u32),
    /// `project`, a group id.
    Project(u32),
    /// `metadata/<key>` and its text; `None` removes it.
    Metadata(String, Option<String>),
    /// `import_from`, an http(s) URL or a path; `None` clears it.
    ImportFrom(Option<String>),
    /// A move out of the bin.
    Restore,
    /// `expires_at` in the bin, Unix seconds; `None`: never.
    ExpiresAt(Option<u64>),
}

/// What to do about an allowed change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It is true already: success, and nothing happens.
    AlreadyTrue,
    /// Write it into the record.
    Record,
    /// The running operation does just this: wait for it like its first caller.
    Join,
    /// Start this operation.
    Start(Operation),
    /// Give up a stuck operation and look at the hypervisor again.
    Reset,
    /// The object is gone at once: nothing of it is on any disk, or what is there is left as it lies.
    Remove,
}

impl From<Verdict> for Effect {
    fn from(verdict: Verdict) -> Effect {
        match verdict {
            Verdict::AlreadyTrue => Effect::AlreadyTrue,
            Verdict::Join => Effect::Join,
            Verdict::Start(operation) => Effect::Start(operation),
        }
    }
}

/// Whether an object in the bin expires at this time already.
pub(super) fn expiry_already(entry: Option<&BinEntry>, wanted: Option<u64>) -> Result<bool, Reason> {
    match entry {
        Some(entry) => Ok(entry.expiry.map(|expiry| expiry.at) == wanted),
        None => Err(not_in_bin()),
    }
}

/// As with chown(2): root only. In an ordinary user's mount nobody could come and take it.
pub(super) fn may_give_away(role: Role) -> Result<(), Reason> {
    match role {
        Role::Root => Ok(()),
        Role::Mounter => Err(Reason::Policy(
            "everything in an ordinary user's mount is his; only in root's can things belong to others".to_owned(),
        )),
        Role::Owner | Role::Member | Role::Stranger => Err(Reason::RootOnly),
    }
}
