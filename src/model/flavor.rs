//! Flavors: named sizes that root offers. Their values are copied, so that nothing depends on one.

use super::Class;
use super::caller::Role;
use super::change::Effect;
use super::reason::Reason;
use super::record::FlavorRecord;

/// The order is that of their directories' inodes; only ever appended to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Not offered: new, or taken out of use.
    Draft,
    /// Offered.
    Active,
}

impl State {
    /// All of them.
    pub const ALL: [State; 2] = [State::Draft, State::Active];

    /// The content of `state`.
    pub fn word(self) -> &'static str {
        match self {
            State::Draft => "draft",
            State::Active => "active",
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
    pub const REQUESTS: [Word; 3] = [Word::State(State::Active), Word::State(State::Draft), Word::Deleted];

    /// The written text.
    pub fn word(self) -> &'static str {
        match self {
            Word::State(state) => state.word(),
            Word::Deleted => "deleted",
        }
    }

    /// Reads a word.
    pub fn parse(text: &str) -> Result<Word, Reason> {
        Word::REQUESTS.into_iter().find(|word| word.word() == text).ok_or_else(|| {
            Reason::Malformed(format!("{text:?} is no state of a flavor; write active, draft or deleted"))
        })
    }
}

/// One attribute of a flavor, and the value that it is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FlavorChange {
    /// `description`.
    Description(String),
    /// `state`.
    State(Word),
    /// `vcpus`.
    Vcpus(u32),
    /// `memory_bytes`.
    MemoryBytes(u64),
    /// `root_disk_bytes`; `None`: the image's size.
    RootDiskBytes(Option<u64>),
    /// `is_public`.
    IsPublic(bool),
    /// `access`: group ids, in ascending order.
    Access(Vec<u32>),
}

/// What a flavor is in.
pub fn state(record: &FlavorRecord) -> State {
    if record.draft.is_some() { State::Draft } else { State::Active }
}

/// The words that a write to `state` would be allowed now.
pub fn available(state: State) -> Vec<&'static str> {
    let allowed = |word: &Word| match (state, word) {
        (State::Draft, Word::State(State::Active) | Word::Deleted) | (State::Active, Word::State(State::Draft)) => true,
        (State::Draft, Word::State(State::Draft)) | (State::Active, Word::State(State::Active) | Word::Deleted) => {
            false
        }
    };
    Word::REQUESTS.into_iter().filter(allowed).map(Word::word).collect()
}

/// Whether a caller may read a flavor and use it.
pub fn may_read(record: &FlavorRecord, caller: &super::caller::Caller) -> bool {
    match caller.role(&record.ownership) {
        Role::Root | Role::Mounter | Role::Owner => true,
        Role::Member | Role::Stranger => record.is_public || record.access.iter().any(|gid| caller.in_group(*gid)),
    }
}

/// Judges one change of a flavor, in the interface's order of refusals.
pub fn judge(record: &FlavorRecord, role: Role, change: &FlavorChange) -> Result<Effect, Reason> {
    let already = match change {
        FlavorChange::Description(text) => *text == record.description,
        FlavorChange::State(Word::State(word)) => *word == state(record),
        FlavorChange::State(Word::Deleted) => false,
        FlavorChange::Vcpus(count) => *count == record.vcpus,
        FlavorChange::MemoryBytes(bytes) => *bytes == record.memory_bytes,
        FlavorChange::RootDiskBytes(bytes) => *bytes == record.root_disk_bytes,
        FlavorChange::IsPublic(value) => *value == record.is_public,
        FlavorChange::Access(groups) => *groups == record.access,
    };
    if already {
        return Ok(Effect::AlreadyTrue);
    }
    by_root(role)?;
    match (change, state(record)) {
        (FlavorChange::State(Word::Deleted), State::Draft) => Ok(Effect::Remove),
        (FlavorChange::State(Word::Deleted), State::Active) => {
            Err(Reason::Policy("a flavor in use is not deleted in one step; write draft to state first".to_owned()))
        }
        (
            FlavorChange::Description(_)
            | FlavorChange::State(Word::State(_))
            | FlavorChange::Vcpus(_)
            | FlavorChange::MemoryBytes(_)
            | FlavorChange::RootDiskBytes(_)
            | FlavorChange::IsPublic(_)
            | FlavorChange::Access(_),
            State::Draft | State::Active,
        ) => Ok(Effect::Record),
    }
}

/// Flavors are the administrator's to make and change.
pub fn by_root(role: Role) -> Result<(), Reason> {
    if role.is_administrator() { Ok(()) } else { Err(Reason::RootOnly) }
}

/// The refusal of a flavor that somebody may not see.
pub fn not_yours() -> Reason {
    Reason::NotYours { class: Class::Flavor }
}
