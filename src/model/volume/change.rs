//! Changes to a volume's attributes, and the judge of each.

use uuid::Uuid;

use super::record::Origin;
use super::{Situation, State, VolumeOperation, Word, access, decide, device};
use crate::model::change::{Effect, expiry_already, may_give_away};
use crate::model::image::Format;
use crate::model::instance::{idle, not_in_bin};
use crate::model::protection::{Action, Level};
use crate::model::reason::Reason;
use crate::model::task::Operation;
use crate::model::transfer::Recipient;

/// One attribute of a volume, and the value that it is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumeChange {
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
    /// `delete_protection`.
    DeleteProtection(bool),
    /// `owner`, a user id.
    Owner(u32),
    /// `project`, a group id.
    Project(u32),
    /// `size_bytes`.
    SizeBytes(u64),
    /// `backend`, by name.
    Backend(String),
    /// `disk_format`.
    DiskFormat(Format),
    /// `bootable`.
    Bootable(bool),
    /// `multiattach`.
    Multiattach(bool),
    /// `created_from`.
    CreatedFrom(Origin),
    /// `attach`, or a link in an instance's `volumes/`.
    Attach {
        /// Whom to.
        instance: Uuid,
        /// The device name; `None`: the first that is free.
        device: Option<String>,
    },
    /// `detach`; `None`: from the one that has it.
    Detach(Option<Uuid>),
    /// `local_attach`.
    LocalAttach(bool),
    /// The daemon's own: its block device, which is gone, is made again. Nothing, if by now it is to have none.
    RenewLocalDevice,
    /// A directory made in `snapshots/`, by its name.
    TakeSnapshot(String),
    /// `deleted` written to a snapshot's `state`.
    DeleteSnapshot(String),
    /// `transfer`.
    Offer {
        /// The new offer's uuid.
        transfer: Uuid,
        /// Its name.
        name: String,
        /// Who alone may take it; `None`: whoever has the key.
        recipient: Option<Recipient>,
    },
    /// `unmanage`.
    Unmanage,
    /// A move out of the bin.
    Restore,
    /// `expires_at` in the bin, Unix seconds; `None`: never.
    ExpiresAt(Option<u64>),
}

/// Judges one change of a volume, in the interface's order of refusals.
pub fn judge(situation: &Situation<'_>, change: &VolumeChange) -> Result<Effect, Reason> {
    access(situation.role)?;
    let record = situation.record;
    let lock = record.protection.lock.as_ref();
    match change {
        VolumeChange::State(word) => decide(situation, *word),
        VolumeChange::Locked(true) => {
            let raises = |level| level == Level::Owner && situation.role.is_administrator();
            let already = lock.is_some_and(|lock| !raises(lock.level));
            guarded(situation, already, Action::Lock)
        }
        VolumeChange::Locked(false) => guarded(situation, lock.is_none(), Action::Unlock),
        VolumeChange::LockedReason(text) => match lock {
            Some(lock) => guarded(situation, lock.reason == *text, Action::Lock),
            None if text.is_empty() => Ok(Effect::AlreadyTrue),
            None => Err(Reason::Malformed("it is not locked; write 1 to locked first".to_owned())),
        },
        VolumeChange::DeleteProtection(value) => {
            guarded(situation, *value == record.protection.disable_terminate, Action::Change)
        }
        VolumeChange::Description(text) => guarded(situation, *text == record.description, Action::Change),
        VolumeChange::Name(name) => {
            guarded(situation, *name == record.name, Action::Change).and_then(when_idle(situation))
        }
        VolumeChange::Bootable(value) => {
            guarded(situation, *value == record.bootable, Action::Change).and_then(when_idle(situation))
        }
        VolumeChange::Multiattach(value) => {
            let effect = guarded(situation, *value == record.multiattach, Action::Change)?;
            if effect == Effect::Record && !value && record.attachments.len() > 1 {
                return Err(Reason::InUse("several instances have it; detach all but one first".to_owned()));
            }
            when_idle(situation)(effect)
        }
        VolumeChange::Owner(uid) => given_away(situation, *uid == record.ownership.owner),
        VolumeChange::Project(gid) => given_away(situation, *gid == record.ownership.project),
        VolumeChange::Backend(name) => draft_only(situation, *name == record.backend),
        VolumeChange::DiskFormat(format) => draft_only(situation, record.disk_format == Some(*format)),
        VolumeChange::CreatedFrom(origin) => {
            let already = record.created_from.as_ref() == Some(origin);
            if !already && matches!(origin, Origin::Existing { .. }) && !situation.role.is_administrator() {
                return Err(Reason::RootOnly);
            }
            draft_only(situation, already)
        }
        VolumeChange::SizeBytes(bytes) => size(situation, *bytes),
        VolumeChange::Attach { instance, device } => attach(situation, *instance, device.as_deref()),
        VolumeChange::Detach(instance) => detach(situation, *instance),
        VolumeChange::LocalAttach(wanted) => local_attach(situation, *wanted),
        VolumeChange::RenewLocalDevice => match &record.local {
            Some(local) if local.device.is_none() => local_attach(situation, true),
            Some(_) | None => Ok(Effect::AlreadyTrue),
        },
        VolumeChange::TakeSnapshot(name) => {
            if record.snapshots.get(name).is_some() {
                return Err(Reason::Exists);
            }
            record.snapshots.room()?;
            let operation = VolumeOperation::TakeSnapshot { name: name.clone() };
            start(situation, "snapshot", &[State::Available, State::InUse], Action::Change, operation)
        }
        VolumeChange::DeleteSnapshot(name) => {
            let operation = VolumeOperation::DeleteSnapshot { name: name.clone() };
            if situation.task == Some(&Operation::Volume(operation.clone())) {
                return Ok(Effect::Join);
            }
            if record.snapshots.get(name).is_none() {
                return Err(Reason::NotFound(format!("snapshot {name:?}")));
            }
            let states = [State::Available, State::InUse, State::Error];
            start(situation, "delete a snapshot", &states, Action::Delete, operation)
        }
        VolumeChange::Offer { .. } => {
            situation.check_use(Action::Change)?;
            idle(situation.task)?;
            match situation.state {
                State::Available => Ok(Effect::Record),
                State::Draft | State::InUse | State::AwaitingTransfer | State::Error | State::SoftDeleted => {
                    Err(situation.wrong_state("transfer"))
                }
            }
        }
        VolumeChange::Unmanage => {
            if !situation.role.is_administrator() {
                return Err(Reason::RootOnly);
            }
            situation.check_use(Action::Delete)?;
            idle(situation.task)?;
            if !record.snapshots.is_empty() {
                return Err(Reason::InUse(
                    "it has snapshots, which nobody would know any more; delete them first".to_owned(),
                ));
            }
            situation.check_no_device()?;
            match situation.state {
                State::Available | State::Error => Ok(Effect::Remove),
                State::Draft | State::InUse | State::AwaitingTransfer | State::SoftDeleted => {
                    Err(situation.wrong_state("unmanage"))
                }
            }
        }
        VolumeChange::Restore => {
            situation.check(Action::Change)?;
            idle(situation.task)?;
            if record.bin.is_some() { Ok(Effect::Record) } else { Err(not_in_bin()) }
        }
        VolumeChange::ExpiresAt(at) => guarded(situation, expiry_already(record.bin.as_ref(), *at)?, Action::Change),
    }
}

fn guarded(situation: &Situation<'_>, already: bool, action: Action) -> Result<Effect, Reason> {
    if already {
        return Ok(Effect::AlreadyTrue);
    }
    situation.check(action)?;
    Ok(Effect::Record)
}

fn when_idle<'a>(situation: &'a Situation<'_>) -> impl Fn(Effect) -> Result<Effect, Reason> + 'a {
    |effect| match effect {
        Effect::AlreadyTrue => Ok(effect),
        Effect::Record | Effect::Join | Effect::Start(_) | Effect::Reset | Effect::Remove => {
            idle(situation.task).map(|()| effect)
        }
    }
}

fn given_away(situation: &Situation<'_>, already: bool) -> Result<Effect, Reason> {
    if already {
        return Ok(Effect::AlreadyTrue);
    }
    may_give_away(situation.role)?;
    situation.check_use(Action::Change)?;
    idle(situation.task)?;
    // Who offers it has to be the one who takes the offer back.
    match situation.state {
        State::AwaitingTransfer => Err(situation.wrong_state("give away")),
        State::Draft | State::Available | State::InUse | State::Error | State::SoftDeleted => Ok(Effect::Record),
    }
}

fn draft_only(situation: &Situation<'_>, already: bool) -> Result<Effect, Reason> {
    if already {
        return Ok(Effect::AlreadyTrue);
    }
    situation.check(Action::Change)?;
    idle(situation.task)?;
    if situation.state == State::Draft { Ok(Effect::Record) } else { Err(Reason::DraftOnly) }
}

fn start(
    situation: &Situation<'_>,
    what: &'static str,
    states: &[State],
    action: Action,
    operation: VolumeOperation,
) -> Result<Effect, Reason> {
    let operation = Operation::Volume(operation);
    if situation.task == Some(&operation) {
        return Ok(Effect::Join);
    }
    situation.check(action)?;
    idle(situation.task)?;
    if states.contains(&situation.state) { Ok(Effect::Start(operation)) } else { Err(situation.wrong_state(what)) }
}

fn size(situation: &Situation<'_>, bytes: u64) -> Result<Effect, Reason> {
    let present = situation.record.size_bytes;
    if situation.state == State::Draft {
        return draft_only(situation, present == bytes);
    }
    if present == bytes && situation.task.is_none() {
        return Ok(Effect::AlreadyTrue);
    }
    situation.check(Action::Change)?;
    if bytes < present {
        return Err(Reason::OutOfRange { low: present, high: i64::MAX as u64, unit: "bytes (a volume only grows)" });
    }
    let states = [State::Available, State::InUse];
    start(situation, "extend", &states, Action::Change, VolumeOperation::Extend { size_bytes: bytes })
}

fn attach(situation: &Situation<'_>, instance: Uuid, device: Option<&str>) -> Result<Effect, Reason> {
    device.map_or(Ok(()), device::check)?;
    let record = situation.record;
    if let Some(Operation::Volume(VolumeOperation::Attach { instance: coming, device: at })) = situation.task
        && *coming == instance
        && (device.is_none() || at.as_deref() == device)
    {
        return Ok(Effect::Join);
    }
    if let Some((_, attachment)) = record.attached_to().find(|(id, _)| *id == instance)
        && situation.task.is_none()
    {
        return match device {
            Some(device) if device != attachment.device => Err(Reason::InUse(format!(
                "it is attached to that instance as {} already; detach it first",
                attachment.device
            ))),
            Some(_) | None => Ok(Effect::AlreadyTrue),
        };
    }
    situation.check(Action::Change)?;
    idle(situation.task)?;
    match situation.state {
        State::InUse if record.local.is_some() => {
            Err(Reason::InUse("it is a block device of this host; write 0 to local_attach first".to_owned()))
        }
        State::InUse if !record.multiattach => {
            Err(Reason::InUse("another instance has it; detach it there, or write 1 to multiattach, first".to_owned()))
        }
        State::Available | State::InUse => Ok(Effect::Start(Operation::Volume(VolumeOperation::Attach {
            instance,
            device: device.map(str::to_owned),
        }))),
        State::Draft | State::AwaitingTransfer | State::Error | State::SoftDeleted => {
            Err(situation.wrong_state("attach"))
        }
    }
}

fn detach(situation: &Situation<'_>, wanted: Option<Uuid>) -> Result<Effect, Reason> {
    if let Some(Operation::Volume(VolumeOperation::Detach { instance })) = situation.task
        && wanted.is_none_or(|wanted| wanted == *instance)
    {
        return Ok(Effect::Join);
    }
    let holders: Vec<_> = situation.record.attached_to().map(|(id, _)| id).collect();
    let instance = match (wanted, holders.as_slice()) {
        (Some(wanted), holders) if holders.contains(&wanted) => wanted,
        (None, [one]) => *one,
        (Some(_), _) | (None, []) => {
            idle(situation.task)?;
            return Ok(Effect::AlreadyTrue);
        }
        (None, _) => {
            return Err(Reason::Malformed(
                "several instances have it; write which one it is to be taken from".to_owned(),
            ));
        }
    };
    situation.check_use(Action::Change)?;
    idle(situation.task)?;
    Ok(Effect::Start(Operation::Volume(VolumeOperation::Detach { instance })))
}

fn local_attach(situation: &Situation<'_>, wanted: bool) -> Result<Effect, Reason> {
    let operation =
        Operation::Volume(if wanted { VolumeOperation::AttachLocally } else { VolumeOperation::DetachLocally });
    if situation.task == Some(&operation) {
        return Ok(Effect::Join);
    }
    let local = situation.record.local.as_ref();
    // One that is to be made again is asked for already, and no lock is in its way.
    let is_again = wanted && local.is_some_and(|local| local.device.is_none());
    if local.is_some() == wanted && !is_again && situation.task.is_none() {
        return Ok(Effect::AlreadyTrue);
    }
    if !situation.role.is_administrator() {
        return Err(Reason::RootOnly);
    }
    if !is_again {
        situation.check(Action::Change)?;
    }
    idle(situation.task)?;
    match (situation.state, wanted) {
        (State::Available, true) | (State::InUse, false) => Ok(Effect::Start(operation)),
        (State::InUse, true) if is_again => Ok(Effect::Start(operation)),
        (State::Error, false) if local.is_some() => Ok(Effect::Start(operation)),
        (State::InUse, true) => Err(Reason::InUse(
            "an instance has it, and two that write to one disk destroy it; detach it there first".to_owned(),
        )),
        (State::Available | State::Draft | State::AwaitingTransfer | State::Error | State::SoftDeleted, _) => {
            Err(situation.wrong_state("local_attach"))
        }
    }
}
