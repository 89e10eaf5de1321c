//! Instances: their states, the words that can be written, and what each word does from each state.
//!
//! ```text
//!            active            stopped
//!   draft ----------> active <---------> stopped        deleted: draft only
//!     |                 |  ^
//!     |          paused |  | active
//!     |       suspended v  |
//!     |          paused, suspended
//!     +--stopped--> stopped           error --active, stopped--> out of it
//!
//!   active, stopped --shelved--> shelved --shelved_offloaded--> shelved_offloaded --active, stopped--> out of it
//!   all but a draft --soft_deleted--> soft_deleted --active, stopped, a move--> out of it
//!                                     soft_deleted --deleted--> gone
//! ```
//! A state changes at the end of an operation; during it `task` says what goes on.

use serde::{Deserialize, Serialize};

use super::Class;
use super::caller::Role;
use super::domain::{Domain, PowerState};
use super::protection::{Action, Protection};
use super::reason::Reason;
use super::record::{CRASH_ACKNOWLEDGED, InstanceBin, InstanceRecord, ShelfStage};
use super::task::Operation;

/// Nova's vm_state words. The order is that of their directories' inodes; only ever appended to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Made by mkdir; libvirt knows nothing of it.
    Draft,
    /// Reserved for scheduling; on one host the task `building` says it.
    Building,
    /// Running.
    Active,
    /// Frozen.
    Paused,
    /// Memory on disk.
    Suspended,
    /// Off.
    Stopped,
    /// Runs a rescue image.
    Rescued,
    /// Waits for a resize to be confirmed.
    Resized,
    /// In the image store, resources kept.
    Shelved,
    /// In the image store only.
    ShelvedOffloaded,
    /// Crashed, a disk missing or failing, a definition that cannot be read.
    Error,
    /// In the bin.
    SoftDeleted,
}

impl State {
    /// All of them.
    pub const ALL: [State; 12] = [
        State::Draft,
        State::Building,
        State::Active,
        State::Paused,
        State::Suspended,
        State::Stopped,
        State::Rescued,
        State::Resized,
        State::Shelved,
        State::ShelvedOffloaded,
        State::Error,
        State::SoftDeleted,
    ];

    /// The content of `state`.
    pub fn word(self) -> &'static str {
        match self {
            State::Draft => "draft",
            State::Building => "building",
            State::Active => "active",
            State::Paused => "paused",
            State::Suspended => "suspended",
            State::Stopped => "stopped",
            State::Rescued => "rescued",
            State::Resized => "resized",
            State::Shelved => "shelved",
            State::ShelvedOffloaded => "shelved_offloaded",
            State::Error => "error",
            State::SoftDeleted => "soft_deleted",
        }
    }
}

/// A word written to `state`: any state, or `deleted`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Word {
    /// Become this.
    State(State),
    /// Be gone for good.
    Deleted,
}

impl Word {
    /// The words that can be asked for, in the order of `state_available`.
    pub const REQUESTS: [Word; 9] = [
        Word::State(State::Active),
        Word::State(State::Stopped),
        Word::State(State::Paused),
        Word::State(State::Suspended),
        Word::State(State::Rescued),
        Word::State(State::Shelved),
        Word::State(State::ShelvedOffloaded),
        Word::State(State::SoftDeleted),
        Word::Deleted,
    ];

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
            || {
                let words: Vec<_> = Word::REQUESTS.iter().map(|word| word.word()).collect();
                Reason::Malformed(format!("{text:?} is no state; write one of {}", words.join(", ")))
            },
        )
    }
}

/// What a record and a domain add up to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    /// The state.
    pub state: State,
    /// The content of `state_reason`.
    pub reason: String,
}

/// The `state_reason` of an instance whose domain is gone.
pub const UNDEFINED_OUTSIDE: &str = "undefined_outside";

/// The state of an instance: libvirt's word where libvirt can say it, ours for the rest.
pub fn observe(record: &InstanceRecord, domain: Option<&Domain>) -> Observed {
    let observed = |state, reason: &str| Observed { state, reason: reason.to_owned() };
    if record.draft.is_some() {
        return observed(State::Draft, "new");
    }
    let is_on = domain.is_some_and(|domain| domain.power.is_on());
    if record.bin.is_some() {
        return observed(State::SoftDeleted, if is_on { "running" } else { "deleted" });
    }
    let Some(domain) = domain else { return observed(State::Error, UNDEFINED_OUTSIDE) };
    match record.shelf.as_ref().map(|shelf| shelf.stage) {
        // Somebody started it outside: its disks are ahead of the copies.
        Some(ShelfStage::Shelved | ShelfStage::Offloaded) if is_on => {}
        Some(ShelfStage::Shelved) => return observed(State::Shelved, "shelved"),
        Some(ShelfStage::Offloaded) => return observed(State::ShelvedOffloaded, "offloaded"),
        Some(ShelfStage::Left) | None => {}
    }
    match domain.power {
        PowerState::Running => observed(State::Active, &domain.reason),
        PowerState::Paused => match domain.reason.as_str() {
            "ioerror" | "crashed" | "watchdog" => observed(State::Error, &domain.reason),
            reason => observed(State::Paused, reason),
        },
        PowerState::PmSuspended => observed(State::Paused, "pmsuspended"),
        PowerState::Crashed => observed(State::Error, "crashed"),
        PowerState::ShutOff => match &record.crashed {
            Some(reason) if reason != CRASH_ACKNOWLEDGED => observed(State::Error, reason),
            None if domain.reason == "crashed" => observed(State::Error, "crashed"),
            Some(_) | None if domain.has_managed_save => observed(State::Suspended, "saved"),
            Some(_) | None if record.undefined.is_some() => observed(State::Stopped, UNDEFINED_OUTSIDE),
            Some(_) | None => observed(State::Stopped, &domain.reason),
        },
    }
}

/// Everything that a judgement needs to know of an instance.
#[derive(Clone, Copy, Debug)]
pub struct Situation<'a> {
    /// What the caller is to it.
    pub role: Role,
    /// What it is in.
    pub state: State,
    /// The hypervisor knows it, or it is a draft.
    pub is_defined: bool,
    /// The state that it had before it was moved into the bin, if it is there.
    pub before_bin: Option<State>,
    /// What runs on it.
    pub task: Option<&'a Operation>,
    /// What protects it.
    pub protection: &'a Protection,
    /// Why the hypervisor is not reachable, if it is not. A hung one counts as reachable.
    pub unreachable: Option<&'a str>,
}

/// What to do about an allowed request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is true already: success, and nothing happens.
    AlreadyTrue,
    /// The running operation does just this: wait for it like its first caller.
    Join,
    /// Start this operation.
    Start(Operation),
}

/// Judges a word written to `state`.
pub fn decide(situation: &Situation<'_>, word: Word) -> Result<Verdict, Reason> {
    access(situation)?;
    let current = match situation.task.and_then(Operation::target) {
        Some(target) => {
            if State::ALL.into_iter().any(|state| state.word() == target && satisfies(state, word))
                || target == word.word()
            {
                return Ok(Verdict::Join);
            }
            None
        }
        None => Some(situation.state),
    };
    if current.is_some_and(|state| satisfies(state, word)) {
        return Ok(Verdict::AlreadyTrue);
    }
    match word {
        Word::State(State::Draft | State::Building | State::Resized | State::Error) => {
            return Err(Reason::Malformed(format!("{} cannot be asked for; it happens", word.word())));
        }
        Word::State(
            State::Active
            | State::Paused
            | State::Suspended
            | State::Stopped
            | State::Rescued
            | State::Shelved
            | State::ShelvedOffloaded
            | State::SoftDeleted,
        )
        | Word::Deleted => {}
    }
    situation.protection.check(action(situation, word), situation.role)?;
    match (word, situation.state) {
        (Word::Deleted, State::Draft) => {}
        (Word::Deleted, State::SoftDeleted) => reachable(situation.unreachable)?,
        (Word::Deleted, _) => return Err(Reason::NotInBin),
        (Word::State(_), _) => {
            built(word)?;
            reachable(situation.unreachable)?;
        }
    }
    idle(situation.task)?;
    possible(situation, word).map(Verdict::Start).ok_or_else(|| Reason::State {
        state: situation.state.word(),
        word: word.word(),
        available: available(situation).join(" "),
    })
}

/// The words that [`decide`] would allow this caller now, for `state_available` and refusals.
pub fn available(situation: &Situation<'_>) -> Vec<&'static str> {
    Word::REQUESTS
        .into_iter()
        .filter(|word| {
            let allowed = situation.task.is_none() && built(*word).is_ok() && possible(situation, *word).is_some();
            allowed && situation.protection.check(action(situation, *word), situation.role).is_ok()
        })
        .map(Word::word)
        .collect()
}

/// What protection has to say about a word.
fn action(situation: &Situation<'_>, word: Word) -> Action {
    match (word, possible(situation, word)) {
        (Word::Deleted | Word::State(State::SoftDeleted), _) => Action::Delete,
        (Word::State(_), Some(Operation::DefineAgain)) => Action::DefineAgain,
        (Word::State(_), _) => Action::Change,
    }
}

/// Who is neither owner, member nor root has no business here.
pub fn access(situation: &Situation<'_>) -> Result<(), Reason> {
    match situation.role {
        Role::Root | Role::Mounter | Role::Owner | Role::Member => Ok(()),
        Role::Stranger => Err(Reason::NotYours { class: Class::Instance }),
    }
}

/// The hypervisor has to be there for what needs it.
pub fn reachable(unreachable: Option<&str>) -> Result<(), Reason> {
    unreachable.map_or(Ok(()), |detail| Err(Reason::Unreachable(detail.to_owned())))
}

/// One operation per object.
pub fn idle(task: Option<&Operation>) -> Result<(), Reason> {
    task.map_or(Ok(()), |operation| Err(Reason::Busy { task: operation.task_word().word() }))
}

fn built(word: Word) -> Result<(), Reason> {
    let what = match word {
        Word::State(State::Rescued) => "rescue",
        Word::State(
            State::Draft
            | State::Building
            | State::Active
            | State::Paused
            | State::Suspended
            | State::Stopped
            | State::Resized
            | State::Shelved
            | State::ShelvedOffloaded
            | State::Error
            | State::SoftDeleted,
        )
        | Word::Deleted => return Ok(()),
    };
    Err(Reason::NotBuilt { what })
}

/// What a word does to an instance that is in this situation.
fn possible(situation: &Situation<'_>, word: Word) -> Option<Operation> {
    match (transition(situation.state, word)?, word) {
        // Its domain is gone: there is nothing to start or stop, but something to define.
        (Operation::Start, _) if !situation.is_defined => None,
        (Operation::Stop, _) if !situation.is_defined => Some(Operation::DefineAgain),
        // Its saved memory is not thrown away for a word that does not say so.
        (Operation::Restore { state: State::Stopped }, _) if situation.before_bin == Some(State::Suspended) => None,
        (operation, _) => Some(operation),
    }
}

/// Whether a state is as good as the word that asks for one.
fn satisfies(state: State, word: Word) -> bool {
    Word::State(state) == word || (state == State::ShelvedOffloaded && word == Word::State(State::Shelved))
}

/// Judges a move out of the bin, which brings back the state that the instance had.
pub fn restore(situation: &Situation<'_>) -> Result<Verdict, Reason> {
    access(situation)?;
    if let Some(Operation::Restore { .. }) = situation.task {
        return Ok(Verdict::Join);
    }
    situation.protection.check(Action::Change, situation.role)?;
    reachable(situation.unreachable)?;
    idle(situation.task)?;
    match situation.before_bin {
        Some(_) if !situation.is_defined => Ok(Verdict::Start(Operation::Restore { state: State::Error })),
        Some(state) => Ok(Verdict::Start(Operation::Restore { state: restored(state) })),
        None => Err(not_in_bin()),
    }
}

/// Judges another try to stop the guest of an instance that is in the bin already.
pub fn settle(situation: &Situation<'_>, bin: Option<&InstanceBin>) -> Result<Verdict, Reason> {
    access(situation)?;
    match bin {
        None => return Err(not_in_bin()),
        Some(bin) if bin.is_settled => return Ok(Verdict::AlreadyTrue),
        Some(_) => {}
    }
    situation.protection.check(Action::Change, situation.role)?;
    reachable(situation.unreachable)?;
    idle(situation.task)?;
    Ok(Verdict::Start(Operation::SoftDelete))
}

/// What is asked makes sense in the bin only.
pub fn not_in_bin() -> Reason {
    Reason::Policy("it is not in the bin".to_owned())
}

/// The state that comes back from the bin, of one that is defined. The memory of a paused guest is gone, and an error is none any more.
fn restored(before: State) -> State {
    match before {
        State::Active | State::Paused | State::Building | State::Resized => State::Active,
        State::Stopped | State::Error | State::Rescued | State::Draft | State::SoftDeleted => State::Stopped,
        State::Suspended => State::Suspended,
        State::Shelved => State::Shelved,
        State::ShelvedOffloaded => State::ShelvedOffloaded,
    }
}

/// What a word does from a state; `None` where the state does not allow it.
pub fn transition(state: State, word: Word) -> Option<Operation> {
    match word {
        Word::State(State::Active) => match state {
            State::Draft => Some(Operation::Boot),
            State::Stopped | State::Error => Some(Operation::Start),
            State::Paused => Some(Operation::Unpause),
            State::Suspended => Some(Operation::Resume),
            State::Shelved | State::ShelvedOffloaded => Some(Operation::Unshelve { start: true }),
            State::SoftDeleted => Some(Operation::Restore { state: State::Active }),
            State::Active | State::Building | State::Rescued | State::Resized => None,
        },
        Word::State(State::Stopped) => match state {
            State::Draft => Some(Operation::Define),
            State::Active | State::Error => Some(Operation::Stop),
            State::Shelved | State::ShelvedOffloaded => Some(Operation::Unshelve { start: false }),
            State::SoftDeleted => Some(Operation::Restore { state: State::Stopped }),
            State::Stopped | State::Building | State::Paused | State::Suspended | State::Rescued | State::Resized => {
                None
            }
        },
        Word::State(State::Paused) => from_active(state, Operation::Pause),
        Word::State(State::Suspended) => from_active(state, Operation::Suspend),
        Word::State(State::Shelved) => match state {
            State::Active | State::Stopped => Some(Operation::Shelve { offload: false }),
            State::Draft
            | State::Building
            | State::Paused
            | State::Suspended
            | State::Rescued
            | State::Resized
            | State::Shelved
            | State::ShelvedOffloaded
            | State::Error
            | State::SoftDeleted => None,
        },
        Word::State(State::ShelvedOffloaded) => match state {
            State::Active | State::Stopped => Some(Operation::Shelve { offload: true }),
            State::Shelved => Some(Operation::Offload),
            State::Draft
            | State::Building
            | State::Paused
            | State::Suspended
            | State::Rescued
            | State::Resized
            | State::ShelvedOffloaded
            | State::Error
            | State::SoftDeleted => None,
        },
        Word::State(State::SoftDeleted) => match state {
            State::Active
            | State::Paused
            | State::Suspended
            | State::Stopped
            | State::Rescued
            | State::Resized
            | State::Shelved
            | State::ShelvedOffloaded
            | State::Error => Some(Operation::SoftDelete),
            State::Draft | State::Building | State::SoftDeleted => None,
        },
        Word::Deleted => match state {
            State::Draft => Some(Operation::DiscardDraft),
            State::SoftDeleted => Some(Operation::Delete),
            State::Building
            | State::Active
            | State::Paused
            | State::Suspended
            | State::Stopped
            | State::Rescued
            | State::Resized
            | State::Shelved
            | State::ShelvedOffloaded
            | State::Error => None,
        },
        Word::State(State::Draft | State::Building | State::Rescued | State::Resized | State::Error) => None,
    }
}

fn from_active(state: State, operation: Operation) -> Option<Operation> {
    match state {
        State::Active => Some(operation),
        State::Draft
        | State::Building
        | State::Paused
        | State::Suspended
        | State::Stopped
        | State::Rescued
        | State::Resized
        | State::Shelved
        | State::ShelvedOffloaded
        | State::Error
        | State::SoftDeleted => None,
    }
}
