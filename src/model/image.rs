//! Images: their states and words.

use serde::{Deserialize, Serialize};

use super::Class;
use super::caller::{Caller, Role};
use super::change::Effect;
use super::protection::check_deletion;
use super::reason::Reason;
use super::task::Operation;

/// The formats that we accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// QEMU copy on write, version 2 or 3, self-contained.
    Qcow2,
    /// Plain bytes.
    Raw,
}

impl Format {
    /// The word in files and on qemu-img's command line.
    pub fn word(self) -> &'static str {
        match self {
            Format::Qcow2 => "qcow2",
            Format::Raw => "raw",
        }
    }
}

/// The order is that of their directories' inodes; only ever appended to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Being written.
    Draft,
    /// Verified; its data never changes.
    Active,
    /// Not to be used.
    Deactivated,
    /// Its data is missing or damaged.
    Error,
    /// In the bin.
    SoftDeleted,
}

impl State {
    /// All of them.
    pub const ALL: [State; 5] = [State::Draft, State::Active, State::Deactivated, State::Error, State::SoftDeleted];

    /// The content of `state`.
    pub fn word(self) -> &'static str {
        match self {
            State::Draft => "draft",
            State::Active => "active",
            State::Deactivated => "deactivated",
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
    pub const REQUESTS: [Word; 4] =
        [Word::State(State::Active), Word::State(State::Deactivated), Word::State(State::SoftDeleted), Word::Deleted];

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
                Reason::Malformed(format!(
                    "{text:?} is no state of an image; write active, deactivated, soft_deleted or deleted"
                ))
            },
        )
    }
}

/// Everything that a judgement needs to know of an image.
#[derive(Clone, Copy, Debug)]
pub struct Situation<'a> {
    /// Who asks.
    pub caller: &'a Caller,
    /// What the caller is to it.
    pub role: Role,
    /// What it is in.
    pub state: State,
    /// What runs on it.
    pub task: Option<&'a Operation>,
    /// Whether it refuses every kind of deletion.
    pub delete_protection: bool,
}

/// Judges a word written to an image's `state`.
pub fn decide(situation: &Situation<'_>, word: Word) -> Result<Effect, Reason> {
    access(situation)?;
    match situation.task.and_then(Operation::target) {
        Some(target) if target == word.word() => return Ok(Effect::Join),
        Some(_) => {}
        None if word == Word::State(situation.state) => return Ok(Effect::AlreadyTrue),
        None => {}
    }
    match word {
        Word::State(State::Draft | State::Error) => {
            return Err(Reason::Malformed(format!("{} cannot be asked for; it happens", word.word())));
        }
        Word::Deleted | Word::State(State::SoftDeleted) => check_deletion(situation.delete_protection)?,
        Word::State(State::Active | State::Deactivated) => {}
    }
    match word {
        Word::Deleted if !matches!(situation.state, State::Draft | State::SoftDeleted) => return Err(Reason::NotInBin),
        Word::State(_) | Word::Deleted => {}
    }
    super::instance::idle(situation.task)?;
    transition(situation.state, word).ok_or_else(|| Reason::State {
        state: situation.state.word(),
        word: word.word(),
        available: available(situation).join(" "),
    })
}

/// The words that [`decide`] would allow now.
pub fn available(situation: &Situation<'_>) -> Vec<&'static str> {
    let is_allowed = |word: &Word| {
        let is_open = match word {
            Word::Deleted | Word::State(State::SoftDeleted) => check_deletion(situation.delete_protection).is_ok(),
            Word::State(State::Draft | State::Active | State::Deactivated | State::Error) => true,
        };
        is_open && situation.task.is_none() && transition(situation.state, *word).is_some()
    };
    Word::REQUESTS.into_iter().filter(is_allowed).map(Word::word).collect()
}

/// Who is neither owner, member of the project nor root has no business here.
pub fn access(situation: &Situation<'_>) -> Result<(), Reason> {
    match situation.role {
        Role::Root | Role::Mounter | Role::Owner | Role::Member => Ok(()),
        Role::Stranger => Err(Reason::NotYours { class: Class::Image }),
    }
}

/// What a word does from a state; `None` where the state does not allow it. Taking an image out of use and back is a
/// record: guests that run on it go on.
pub fn transition(state: State, word: Word) -> Option<Effect> {
    match (state, word) {
        (State::Draft, Word::State(State::Active)) => Some(Effect::Start(Operation::CommitImage)),
        (State::Draft, Word::Deleted) => Some(Effect::Start(Operation::DiscardDraft)),
        (State::SoftDeleted, Word::Deleted) => Some(Effect::Start(Operation::Delete)),
        (State::Active, Word::State(State::Deactivated | State::SoftDeleted))
        | (State::Deactivated, Word::State(State::Active | State::SoftDeleted))
        | (State::Error, Word::State(State::SoftDeleted))
        | (State::SoftDeleted, Word::State(State::Active | State::Deactivated)) => Some(Effect::Record),
        (State::Draft, Word::State(State::Draft | State::Deactivated | State::Error | State::SoftDeleted))
        | (State::Active, Word::State(State::Draft | State::Active | State::Error))
        | (State::Deactivated, Word::State(State::Draft | State::Deactivated | State::Error))
        | (State::Error, Word::State(State::Draft | State::Active | State::Deactivated | State::Error))
        | (State::SoftDeleted, Word::State(State::Draft | State::Error | State::SoftDeleted))
        | (State::Active | State::Deactivated | State::Error, Word::Deleted) => None,
    }
}
