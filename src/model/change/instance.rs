//! The judge of an instance's changes.

use super::{Effect, FlavorChoice, InstanceChange, expiry_already, may_give_away};
use crate::model::instance::{self, Situation, State};
use crate::model::protection::{Action, Level};
use crate::model::reason::Reason;
use crate::model::reconfiguration::Reconfiguration;
use crate::model::record::{DiskRole, InstanceRecord};
use crate::model::task::Operation;
use crate::model::volume::device;

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
fn reconfigure(situation: &Situation<'_>, record: &InstanceRecord, change: Reconfiguration) -> Result<Effect, Reason> {
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
    if let Some(volume) = record.volumes.get(device::ROOT) {
        return Err(Reason::Unsupported(format!(
            "the instance boots from the volume {volume}, whose size its disk has; write the size to size_bytes of that \
             volume"
        )));
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
