//! Volumes: disks that exist by themselves, their states and words.

pub mod change;
pub mod device;
pub mod record;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Class;
use super::caller::Role;
use super::change::Effect;
use super::instance::idle;
use super::protection::{Action, Lock};
use super::reason::Reason;
use super::task::{Operation, TaskWord};
use record::{DataRecord, LocalAttachment, VolumeRecord};

/// The order is that of their directories' inodes; only ever appended to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Being described; there is no disk yet.
    Draft,
    /// There, and used by nobody.
    Available,
    /// Attached to an instance or to the host.
    InUse,
    /// Offered to somebody else; nobody can use it meanwhile.
    AwaitingTransfer,
    /// Its data is missing, damaged, or was replaced by other data.
    Error,
    /// In the bin.
    SoftDeleted,
}

impl State {
    /// All of them.
    pub const ALL: [State; 6] =
        [State::Draft, State::Available, State::InUse, State::AwaitingTransfer, State::Error, State::SoftDeleted];

    /// The content of `state`.
    pub fn word(self) -> &'static str {
        match self {
            State::Draft => "draft",
            State::Available => "available",
            State::InUse => "in_use",
            State::AwaitingTransfer => "awaiting_transfer",
            State::Error => "error",
            State::SoftDeleted => "soft_deleted",
        }
    }
}

/// A word written to `state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Word {
    /// Become this.
    State(State),
    /// Be gone for good.
    Deleted,
}

impl Word {
    /// The words that can be asked for, in the order of `state_available`.
    pub const REQUESTS: [Word; 3] = [Word::State(State::Available), Word::State(State::SoftDeleted), Word::Deleted];

    /// The written text.
    pub fn word(self) -> &'static str {
        match self {
            Word::State(state) => state.word(),
            Word::Deleted => "deleted",
        }
    }

    /// Reads a word.
    pub fn parse(text: &str) -> Result<Word, Reason> {
        State::ALL.into_iter().map(Word::State).chain([Word::Deleted]).find(|word| word.word() == text).ok_or_else(
            || Reason::Malformed(format!("{text:?} is no state of a volume; write available, soft_deleted or deleted")),
        )
    }
}

/// What an operation does on a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "volume")]
pub enum VolumeOperation {
    /// Draft to available: make the disk, or take over the one that is there already.
    Create,
    /// Make it larger, while it is attached too.
    Extend {
        /// The wanted size in bytes.
        size_bytes: u64,
    },
    /// Give it to an instance, which the operation owns too meanwhile; live if that runs.
    Attach {
        /// Which.
        instance: Uuid,
        /// The device name in the guest; `None`: the first that is free.
        device: Option<String>,
    },
    /// Take it from an instance, which the operation owns too meanwhile.
    Detach {
        /// Which.
        instance: Uuid,
    },
    /// Make it a block device of this host.
    AttachLocally,
    /// Take that device away.
    DetachLocally,
    /// Keep its present content as a snapshot. The snapshot is in the record already.
    TakeSnapshot {
        /// Its name.
        name: String,
    },
    /// Remove a snapshot for good.
    DeleteSnapshot {
        /// Its name.
        name: String,
    },
    /// Look whether what was wrong with it still is.
    Examine,
}

impl VolumeOperation {
    /// The word in `task`.
    pub fn task_word(&self) -> TaskWord {
        match self {
            VolumeOperation::Create => TaskWord::Creating,
            VolumeOperation::Extend { .. } => TaskWord::Extending,
            VolumeOperation::Attach { .. } | VolumeOperation::AttachLocally => TaskWord::Attaching,
            VolumeOperation::Detach { .. } | VolumeOperation::DetachLocally => TaskWord::Detaching,
            VolumeOperation::TakeSnapshot { .. } => TaskWord::Snapshotting,
            VolumeOperation::DeleteSnapshot { .. } => TaskWord::DeletingSnapshot,
            VolumeOperation::Examine => TaskWord::Examining,
        }
    }

    /// The state word that it works towards; `None` where it leaves the state alone, or it follows from other things.
    pub fn target(&self) -> Option<&'static str> {
        match self {
            VolumeOperation::Create | VolumeOperation::Examine => Some(State::Available.word()),
            VolumeOperation::Extend { .. }
            | VolumeOperation::Attach { .. }
            | VolumeOperation::Detach { .. }
            | VolumeOperation::AttachLocally
            | VolumeOperation::DetachLocally
            | VolumeOperation::TakeSnapshot { .. }
            | VolumeOperation::DeleteSnapshot { .. } => None,
        }
    }

    /// The file whose write asks for it.
    pub fn file(&self) -> &'static str {
        match self {
            VolumeOperation::Create | VolumeOperation::Examine => "state",
            VolumeOperation::Extend { .. } => "size_bytes",
            VolumeOperation::Attach { .. } => "attach",
            VolumeOperation::Detach { .. } => "detach",
            VolumeOperation::AttachLocally | VolumeOperation::DetachLocally => "local_attach",
            VolumeOperation::TakeSnapshot { .. } | VolumeOperation::DeleteSnapshot { .. } => "snapshots",
        }
    }

    /// The instance that it owns beside the volume.
    pub fn instance(&self) -> Option<Uuid> {
        match self {
            VolumeOperation::Attach { instance, .. } | VolumeOperation::Detach { instance } => Some(*instance),
            VolumeOperation::Create
            | VolumeOperation::Extend { .. }
            | VolumeOperation::AttachLocally
            | VolumeOperation::DetachLocally
            | VolumeOperation::TakeSnapshot { .. }
            | VolumeOperation::DeleteSnapshot { .. }
            | VolumeOperation::Examine => None,
        }
    }
}

/// What a step of such an operation brings into the world.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VolumeCreation {
    /// The volume's data; its undo removes exactly this.
    Data(DataRecord),
    /// The data of a snapshot; its undo removes exactly this.
    Snapshot {
        /// The snapshot's name.
        name: String,
        /// Its data.
        data: DataRecord,
    },
    /// The volume as a disk in its instance's definition, and in the guest if that runs; its undo takes it out of both.
    AttachedDisk {
        /// The device name in the guest.
        device: String,
    },
    /// A block device of this host, and what exports it; its undo takes both away.
    LocalDevice(LocalAttachment),
}

/// Everything that a judgement needs to know of a volume.
#[derive(Clone, Copy, Debug)]
pub struct Situation<'a> {
    /// What the caller is to it.
    pub role: Role,
    /// What it is in.
    pub state: State,
    /// What runs on it.
    pub task: Option<&'a Operation>,
    /// What is known of it.
    pub record: &'a VolumeRecord,
    /// The lock of an instance that it is attached to, which covers it too.
    pub instance_lock: Option<&'a Lock>,
}

impl Situation<'_> {
    /// Whether lock and protection, its own and its instances', let the action happen. Root is bound like everybody.
    pub fn check(&self, action: Action) -> Result<(), Reason> {
        self.record.protection.check(action, self.role).map_err(|reason| match reason {
            Reason::TerminateDisabled => Reason::DeleteProtected,
            reason => reason,
        })
    }

    /// The same of what an instance's lock forbids: attaching, detaching, handing over, deleting.
    pub fn check_use(&self, action: Action) -> Result<(), Reason> {
        self.check(action)?;
        match self.instance_lock {
            Some(lock) => Err(Reason::InstanceLocked(lock.clone())),
            None => Ok(()),
        }
    }

    /// What failed as a block device of this host still is one, until somebody takes that away.
    pub fn check_no_device(&self) -> Result<(), Reason> {
        match &self.record.local {
            Some(_) if self.state == State::Error => {
                Err(Reason::InUse("it is still a block device of this host; write 0 to local_attach first".to_owned()))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Why the state does not allow what `word` asks for.
    pub fn wrong_state(&self, word: &'static str) -> Reason {
        Reason::State { state: self.state.word(), word, available: available(self).join(" ") }
    }
}

/// Judges a word written to a volume's `state`.
pub fn decide(situation: &Situation<'_>, word: Word) -> Result<Effect, Reason> {
    match situation.task.and_then(Operation::target) {
        Some(target) if target == word.word() => return Ok(Effect::Join),
        Some(_) => {}
        None if word == Word::State(situation.state) => return Ok(Effect::AlreadyTrue),
        None => {}
    }
    match word {
        Word::State(State::Draft | State::InUse | State::AwaitingTransfer | State::Error) => {
            return Err(Reason::Malformed(format!("{} cannot be asked for; it happens", word.word())));
        }
        Word::Deleted | Word::State(State::SoftDeleted) => situation.check_use(Action::Delete)?,
        Word::State(State::Available) => situation.check(Action::Change)?,
    }
    match word {
        Word::Deleted if !matches!(situation.state, State::Draft | State::SoftDeleted) => return Err(Reason::NotInBin),
        Word::State(_) | Word::Deleted => {}
    }
    idle(situation.task)?;
    situation.check_no_device()?;
    transition(situation.state, word).ok_or_else(|| situation.wrong_state(word.word()))
}

/// The words that [`decide`] would allow now.
pub fn available(situation: &Situation<'_>) -> Vec<&'static str> {
    let is_allowed = |word: &Word| {
        let is_open = match word {
            Word::Deleted | Word::State(State::SoftDeleted) => situation.check_use(Action::Delete).is_ok(),
            Word::State(State::Draft | State::Available | State::InUse | State::AwaitingTransfer | State::Error) => {
                situation.check(Action::Change).is_ok()
            }
        };
        is_open
            && situation.task.is_none()
            && situation.check_no_device().is_ok()
            && transition(situation.state, *word).is_some()
    };
    Word::REQUESTS.into_iter().filter(is_allowed).map(Word::word).collect()
}

/// Who is neither owner, member of the project nor root has no business here.
pub fn access(role: Role) -> Result<(), Reason> {
    match role {
        Role::Root | Role::Mounter | Role::Owner | Role::Member => Ok(()),
        Role::Stranger => Err(Reason::NotYours { class: Class::Volume }),
    }
}

/// What a word does from a state; `None` where the state does not allow it.
pub fn transition(state: State, word: Word) -> Option<Effect> {
    match (state, word) {
        (State::Draft, Word::State(State::Available)) => {
            Some(Effect::Start(Operation::Volume(VolumeOperation::Create)))
        }
        (State::Error, Word::State(State::Available)) => {
            Some(Effect::Start(Operation::Volume(VolumeOperation::Examine)))
        }
        (State::Draft, Word::Deleted) => Some(Effect::Start(Operation::DiscardDraft)),
        (State::SoftDeleted, Word::Deleted) => Some(Effect::Start(Operation::Delete)),
        (State::Available | State::Error, Word::State(State::SoftDeleted))
        | (State::SoftDeleted, Word::State(State::Available)) => Some(Effect::Record),
        (
            State::Draft,
            Word::State(State::Draft | State::InUse | State::AwaitingTransfer | State::Error | State::SoftDeleted),
        )
        | (
            State::Available,
            Word::State(State::Draft | State::Available | State::InUse | State::AwaitingTransfer | State::Error),
        )
        | (State::InUse | State::AwaitingTransfer, Word::State(_))
        | (State::Error, Word::State(State::Draft | State::InUse | State::AwaitingTransfer | State::Error))
        | (
            State::SoftDeleted,
            Word::State(State::Draft | State::InUse | State::AwaitingTransfer | State::Error | State::SoftDeleted),
        )
        | (State::Available | State::InUse | State::AwaitingTransfer | State::Error, Word::Deleted) => None,
    }
}
