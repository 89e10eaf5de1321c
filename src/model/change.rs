//! Changes to an object's attributes, and the judge of each; a write is a change set of one.

use std::sync::Arc;

use uuid::Uuid;

use super::caller::Role;
use super::image::{self, Format};
use super::instance::{self, Situation, State, Verdict, Word};
use super::network::Network;
use super::protection::{Action, Level};
use super::reason::Reason;
use super::reconfiguration::Reconfiguration;
use super::record::{BinEntry, DiskRole, ImageRecord, InstanceRecord};
use super::sharing::{self, Status, Visibility};
use super::task::Operation;

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
    State(image::Word),
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

/// Judges one change of an instance, in the interface's order of refusals. `name` is the present name.
pub fn judge_instance(
    situation: &Situation<'_>,
    record: &InstanceRecord,
    name: &str,
    change: &InstanceChange,
) -> Result<Effect, Reason> {
    instance::access(situation)?;
    let protection = situation.protection;
    match change {
        InstanceChange::State(word) => instance::decide(situation, *word).map(Effect::from),
        InstanceChange::Locked(true) => {
            let raises = |level| level == Level::Owner && situation.role.is_administrator();
            if protection.lock.as_ref().is_some_and(|lock| !raises(lock.level)) {
                return Ok(Effect::AlreadyTrue);
            }
            protection.check(Action::Lock, situation.role)?;
            Ok(Effect::Record)
        }
        InstanceChange::Locked(false) => {
            if protection.lock.is_none() {
                return Ok(Effect::AlreadyTrue);
            }
            protection.check(Action::Unlock, situation.role)?;
            Ok(Effect::Record)
        }
        InstanceChange::LockedReason(text) => {
            let present = protection.lock.as_ref().map_or("", |lock| lock.reason.as_str());
            if present == text {
                return Ok(Effect::AlreadyTrue);
            }
            if protection.lock.is_none() {
                return Err(Reason::Malformed("it is not locked; write 1 to locked first".to_owned()));
            }
            protection.check(Action::Lock, situation.role)?;
            Ok(Effect::Record)
        }
        InstanceChange::DisableTerminate(value) => {
            store_only(situation, *value == protection.disable_terminate, Busy::Never)
        }
        InstanceChange::Metadata(key, text) => {
            store_only(situation, record.metadata.get(key) == text.as_ref(), Busy::Never)
        }
        InstanceChange::Description(text) => store_only(situation, *text == record.description, Busy::Never),
        InstanceChange::Owner(uid) => by_root(situation, *uid == record.ownership.owner),
        InstanceChange::Project(gid) => by_root(situation, *gid == record.ownership.project),
        InstanceChange::StopTimeoutSeconds(seconds) => {
            store_only(situation, *seconds == record.stop_timeout_seconds, Busy::Refuses)
        }
        InstanceChange::Name(wanted) => rename(situation, name, wanted),
        InstanceChange::Image(image) => draft_only(situation, record.image == Some(*image)),
        InstanceChange::UserData(text) => draft_only(situation, record.user_data == *text),
        InstanceChange::Network(network) => draft_only(situation, record.network.as_ref() == Some(network)),
        InstanceChange::Flavor(choice) => choose_flavor(situation, record, choice),
        InstanceChange::Vcpus(count) => {
            let change = Reconfiguration { vcpus: Some(*count), ..Reconfiguration::default() };
            reconfigure(situation, record, change)
        }
        InstanceChange::MemoryBytes(bytes) => {
            let change = Reconfiguration { memory_bytes: Some(*bytes), ..Reconfiguration::default() };
            reconfigure(situation, record, change)
        }
        InstanceChange::RootDiskBytes(bytes) => {
            let change = Reconfiguration { root_disk_bytes: Some(*bytes), ..Reconfiguration::default() };
            reconfigure(situation, record, change)
        }
        InstanceChange::Autostart(value) => {
            let change = Reconfiguration { autostart: Some(*value), ..Reconfiguration::default() };
            reconfigure(situation, record, change)
        }
        InstanceChange::Restore => instance::restore(situation).map(Effect::from),
        InstanceChange::SettleBin => instance::settle(situation, record.bin.as_ref()).map(Effect::from),
        InstanceChange::ExpiresAt(at) => {
            let entry = record.bin.as_ref().map(|bin| &bin.entry);
            let already = expiry_already(entry, *at)?;
            store_only(situation, already, Busy::Never)
        }
        InstanceChange::RebootSoft => reboot(situation, Operation::RebootSoft),
        InstanceChange::RebootHard => reboot(situation, Operation::RebootHard),
        InstanceChange::ResetState => {
            if !situation.role.is_administrator() {
                return Err(Reason::RootOnly);
            }
            protection.check(Action::Change, situation.role)?;
            Ok(Effect::Reset)
        }
    }
}

/// Judges one change of an image.
pub fn judge_image(
    situation: &image::Situation<'_>,
    record: &ImageRecord,
    change: &ImageChange,
) -> Result<Effect, Reason> {
    // A member has no business in the other files.
    if !matches!(change, ImageChange::Member { .. }) {
        image::access(situation)?;
    }
    let (already, root_only) = match change {
        ImageChange::Member { project, status } => {
            return sharing::judge_status(situation, record, *project, *status);
        }
        ImageChange::Visibility(wanted) => return sharing::judge_visibility(situation, record, *wanted),
        ImageChange::Share(project) => return sharing::judge_share(record, *project),
        ImageChange::Unshare(project) => return Ok(sharing::judge_unshare(record, *project)),
        ImageChange::State(word) => {
            return image::decide(situation, *word).map(|effect| match effect {
                Effect::Start(Operation::CommitImage) if record.import_from.is_some() => {
                    Effect::Start(Operation::ImportImage)
                }
                effect => effect,
            });
        }
        ImageChange::Restore => {
            instance::idle(situation.task)?;
            return match &record.bin {
                Some(_) => Ok(Effect::Record),
                None => Err(instance::not_in_bin()),
            };
        }
        ImageChange::ExpiresAt(at) => return Ok(effect(expiry_already(record.bin.as_ref(), *at)?)),
        ImageChange::DeleteProtection(value) => return Ok(effect(*value == record.delete_protection)),
        ImageChange::DiskFormat(format) => return in_draft(situation, record.disk_format == Some(*format)),
        ImageChange::ImportFrom(source) => return in_draft(situation, record.import_from == *source),
        ImageChange::Name(name) => (*name == record.name, false),
        ImageChange::Metadata(key, text) => return Ok(effect(record.metadata.get(key) == text.as_ref())),
        ImageChange::Description(text) => return Ok(effect(*text == record.description)),
        ImageChange::MinDiskBytes(bytes) => (*bytes == record.min_disk_bytes, false),
        ImageChange::MinMemoryBytes(bytes) => (*bytes == record.min_memory_bytes, false),
        ImageChange::Owner(uid) => (*uid == record.ownership.owner, true),
        ImageChange::Project(gid) => (*gid == record.ownership.project, true),
    };
    if already {
        return Ok(Effect::AlreadyTrue);
    }
    if root_only {
        may_give_away(situation.role)?;
    }
    instance::idle(situation.task)?;
    Ok(Effect::Record)
}

fn in_draft(situation: &image::Situation<'_>, already: bool) -> Result<Effect, Reason> {
    if already {
        return Ok(Effect::AlreadyTrue);
    }
    instance::idle(situation.task)?;
    if situation.state == image::State::Draft { Ok(Effect::Record) } else { Err(Reason::DraftOnly) }
}

/// Whether an object in the bin expires at this time already.
pub(super) fn expiry_already(entry: Option<&BinEntry>, wanted: Option<u64>) -> Result<bool, Reason> {
    match entry {
        Some(entry) => Ok(entry.expiry.map(|expiry| expiry.at) == wanted),
        None => Err(instance::not_in_bin()),
    }
}

fn effect(already: bool) -> Effect {
    if already { Effect::AlreadyTrue } else { Effect::Record }
}

/// Whether a running operation refuses a change.
#[derive(PartialEq, Eq)]
enum Busy {
    Never,
    Refuses,
}

fn store_only(situation: &Situation<'_>, already: bool, busy: Busy) -> Result<Effect, Reason> {
    if already {
        return Ok(Effect::AlreadyTrue);
    }
    situation.protection.check(Action::Change, situation.role)?;
    if busy == Busy::Refuses {
        instance::idle(situation.task)?;
    }
    Ok(Effect::Record)
}

fn by_root(situation: &Situation<'_>, already: bool) -> Result<Effect, Reason> {
    if already {
        return Ok(Effect::AlreadyTrue);
    }
    may_give_away(situation.role)?;
    store_only(situation, already, Busy::Refuses)
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

fn rename(situation: &Situation<'_>, name: &str, wanted: &str) -> Result<Effect, Reason> {
    let present = match situation.task {
        Some(Operation::Rename { to, .. }) => to,
        _ => name,
    };
    if present == wanted {
        return Ok(if present == name { Effect::AlreadyTrue } else { Effect::Join });
    }
    situation.protection.check(Action::Change, situation.role)?;
    if situation.state == State::Draft {
        instance::idle(situation.task)?;
        return Ok(Effect::Record);
    }
    instance::reachable(situation.unreachable)?;
    instance::idle(situation.task)?;
    match situation.state {
        State::Stopped => Ok(Effect::Start(Operation::Rename { from: name.to_owned(), to: wanted.to_owned() })),
        State::Draft
        | State::Building
        | State::Active
        | State::Paused
        | State::Suspended
        | State::Rescued
        | State::Resized
        | State::Shelved
        | State::ShelvedOffloaded
        | State::Error
        | State::SoftDeleted => Err(Reason::StoppedOnly),
    }
}

/// What is decided with the draft.
fn draft_only(situation: &Situation<'_>, already: bool) -> Result<Effect, Reason> {
    if already {
        return Ok(Effect::AlreadyTrue);
    }
    situation.protection.check(Action::Change, situation.role)?;
    instance::idle(situation.task)?;
    if situation.state == State::Draft { Ok(Effect::Record) } else { Err(Reason::DraftOnly) }
}

/// Takes over what a flavor gives; its name alone says whether the instance has it.
fn choose_flavor(situation: &Situation<'_>, record: &InstanceRecord, choice: &FlavorChoice) -> Result<Effect, Reason> {
    let comes = matches!(situation.task, Some(Operation::Reconfigure { change, .. }) if change.flavor.is_some());
    if record.flavor.as_ref() == Some(&choice.name) && !comes {
        return Ok(Effect::AlreadyTrue);
    }
    let sizes = choice.sizes.as_ref().map_err(Reason::clone)?;
    let change = Reconfiguration {
        vcpus: Some(sizes.vcpus),
        memory_bytes: Some(sizes.memory_bytes),
        root_disk_bytes: sizes.root_disk_bytes,
        flavor: Some(choice.name.clone()),
        ..Reconfiguration::default()
    };
    reconfigure(situation, record, change)
}

/// Judges values that change in a draft and later; several at once are one operation.
pub fn reconfigure(
    situation: &Situation<'_>,
    record: &InstanceRecord,
    change: Reconfiguration,
) -> Result<Effect, Reason> {
    let running = match situation.task {
        Some(Operation::Reconfigure { change, .. }) => Some(change),
        Some(_) | None => None,
    };
    if running.is_some_and(|running| running.includes(&change)) {
        return Ok(Effect::Join);
    }
    if present(record).includes(&change) && !running.is_some_and(|running| running.overlaps(&change)) {
        return Ok(Effect::AlreadyTrue);
    }
    situation.protection.check(Action::Change, situation.role)?;
    if situation.state == State::Draft {
        instance::idle(situation.task)?;
        return Ok(Effect::Record);
    }
    grows(record, &change)?;
    instance::reachable(situation.unreachable)?;
    instance::idle(situation.task)?;
    let put_away = match situation.state {
        State::Shelved | State::ShelvedOffloaded | State::SoftDeleted => true,
        State::Error => !situation.is_defined,
        State::Draft
        | State::Building
        | State::Active
        | State::Paused
        | State::Suspended
        | State::Stopped
        | State::Rescued
        | State::Resized => false,
    };
    if put_away {
        return Err(Reason::State {
            state: situation.state.word(),
            word: "a new setting",
            available: instance::available(situation).join(" "),
        });
    }
    let stopped = match situation.state {
        State::Stopped => true,
        State::Draft
        | State::Building
        | State::Active
        | State::Paused
        | State::Suspended
        | State::Rescued
        | State::Resized
        | State::Shelved
        | State::ShelvedOffloaded
        | State::Error
        | State::SoftDeleted => false,
    };
    if change.needs_stopped() && !stopped {
        return Err(Reason::StoppedOnly);
    }
    Ok(Effect::Start(Operation::Reconfigure { change, then: None }))
}

/// The values as they are.
fn present(record: &InstanceRecord) -> Reconfiguration {
    let autostart = match (record.draft, &record.seen) {
        (None, Some(domain)) => domain.autostart,
        (Some(_), _) | (None, None) => record.autostart,
    };
    Reconfiguration {
        vcpus: Some(record.vcpus),
        memory_bytes: Some(record.memory_bytes),
        root_disk_bytes: record.root_disk_bytes,
        autostart: Some(autostart),
        flavor: record.flavor.clone(),
    }
}

/// A disk that we made can grow, and that is all.
fn grows(record: &InstanceRecord, change: &Reconfiguration) -> Result<(), Reason> {
    let Some(wanted) = change.root_disk_bytes else { return Ok(()) };
    // A flavor may give what is there already.
    if record.root_disk_bytes == Some(wanted) {
        return Ok(());
    }
    if !record.disks.iter().any(|disk| disk.role == DiskRole::Root) {
        return Err(Reason::Unsupported(
            "its disk was not made by instancefs, which leaves it as it is; grow it with virsh blockresize or qemu-img"
                .to_owned(),
        ));
    }
    match record.root_disk_bytes {
        Some(bytes) if wanted < bytes => {
            Err(Reason::OutOfRange { low: bytes, high: i64::MAX as u64, unit: "bytes: a disk only grows" })
        }
        Some(_) | None => Ok(()),
    }
}

fn reboot(situation: &Situation<'_>, operation: Operation) -> Result<Effect, Reason> {
    if situation.task == Some(&operation) {
        return Ok(Effect::Join);
    }
    situation.protection.check(Action::Change, situation.role)?;
    instance::reachable(situation.unreachable)?;
    instance::idle(situation.task)?;
    match situation.state {
        State::Active => Ok(Effect::Start(operation)),
        state @ (State::Draft
        | State::Building
        | State::Paused
        | State::Suspended
        | State::Stopped
        | State::Rescued
        | State::Resized
        | State::Shelved
        | State::ShelvedOffloaded
        | State::Error
        | State::SoftDeleted) => Err(Reason::State {
            state: state.word(),
            word: "reboot",
            available: instance::available(situation).join(" "),
        }),
    }
}
