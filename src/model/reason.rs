//! Why something is refused or failed: one variant per reason, with its errno and its sentence.

use std::fmt;

use super::Class;
use super::protection::{Level, Lock};

/// One refusal. Its `Display` is the text in `last_error`: one sentence that says what happened and what to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The object belongs to somebody else.
    NotYours {
        /// What it is.
        class: Class,
    },
    /// The handle was opened before the object changed hands.
    HandleOutlivedOwner,
    /// The file is read-only for everybody.
    ReadOnlyAttribute,
    /// The value is not of the kind that the file takes; the sentence says which it takes.
    Malformed(String),
    /// A number out of its range.
    OutOfRange {
        /// Smallest allowed.
        low: u64,
        /// Largest allowed.
        high: u64,
        /// The unit, plural; empty for none.
        unit: &'static str,
    },
    /// Only root may do it.
    RootOnly,
    /// Locked.
    Locked(Lock),
    /// Locked by an admin; only root unlocks.
    AdminLock(Lock),
    /// The instance that has the volume is locked.
    InstanceLocked(Lock),
    /// Protected by `disable_terminate`.
    TerminateDisabled,
    /// Protected by `delete_protection`.
    DeleteProtected,
    /// Only the member itself may say this.
    MemberOnly,
    /// Only a shared image has members.
    NotShared {
        /// What it is.
        visibility: &'static str,
    },
    /// An image demands more than an instance has.
    TooSmall {
        /// The instance's file.
        file: &'static str,
        /// What it has, in bytes.
        present: u64,
        /// The image's file.
        demand: &'static str,
        /// What it demands, in bytes.
        least: u64,
    },
    /// The image was taken out of use.
    Deactivated,
    /// Deleting for good is possible in the bin only.
    NotInBin,
    /// Refused by another rule of the tree; the sentence says which.
    Policy(String),
    /// This version cannot do it yet.
    NotBuilt {
        /// What it is.
        what: &'static str,
    },
    /// This backend or hypervisor cannot do it.
    Unsupported(String),
    /// No connection to the hypervisor.
    Unreachable(String),
    /// Another operation owns the object.
    Busy {
        /// Its task word.
        task: &'static str,
    },
    /// Somebody uses what is to be deleted; the sentence says who.
    InUse(String),
    /// Somebody still has a draft's data open for writing.
    DataOpen,
    /// The object's state does not allow it.
    State {
        /// What it is in.
        state: &'static str,
        /// What was asked.
        word: &'static str,
        /// What can be asked now.
        available: String,
    },
    /// It can be changed in a draft only.
    DraftOnly,
    /// It can be changed in a draft and while stopped.
    StoppedOnly,
    /// An instance of that name exists.
    NameTaken(String),
    /// An object of that uuid or name exists.
    Exists,
    /// The data of a new volume belongs to an object already; the sentence says to which.
    DataTaken(String),
    /// No such file or object.
    NotFound(String),
    /// The directory cannot be removed like this.
    NotEmpty,
    /// Too many drafts.
    DraftQuota {
        /// How many are allowed.
        limit: usize,
    },
    /// Too many keys in a directory of an object.
    KeyQuota {
        /// How many are allowed.
        limit: usize,
    },
    /// Too many temporary files.
    ScratchQuota,
    /// Mounted with `-o ro`.
    ReadOnlyMount,
    /// The disk is full.
    NoSpace(String),
    /// The disk's quota is used up.
    DiskQuota(String),
    /// Stored data is not what it was.
    Damaged(String),
    /// A document or temporary file over its limit.
    TooLarge,
    /// Several values of a document; its errno is the first refusal's in the interface's order.
    /// At least one, and not more than are worth reading.
    Document {
        /// Key and refusal, the one that decides first.
        refused: Vec<(String, Reason)>,
        /// How many there are beyond those.
        more: usize,
    },
    /// The file system has a limit on the length of a file.
    FileTooLarge,
    /// A handle that this daemon does not know, in the middle of a read or document.
    StaleHandle,
    /// The image is not one that we accept.
    Image(String),
    /// The key of an offer is another one.
    WrongKey,
    /// So many wrong keys came from this user that no more is looked at.
    ShutOut,
    /// It took too long.
    TimedOut(String),
    /// The hypervisor, a tool or the store failed, in its own words.
    Failed(String),
}

impl Reason {
    /// The refusals of a document's keys as one, the one that decides first; `None` if there are none.
    pub fn of_document(mut refused: Vec<(String, Reason)>) -> Option<Reason> {
        refused.sort_by_key(|(_, reason)| reason.precedence());
        let more = refused.len().saturating_sub(MOST_REFUSED);
        refused.truncate(MOST_REFUSED);
        for (key, _) in &mut refused {
            shorten(key, LONGEST_KEY);
        }
        if refused.is_empty() { None } else { Some(Reason::Document { refused, more }) }
    }

    /// The same of a move, which never answers `EINVAL`: mv takes that for a loop of directories.
    #[must_use]
    pub fn of_move(self) -> Reason {
        if self.errno() == libc::EINVAL { Reason::Policy(self.to_string()) } else { self }
    }

    /// The place in the interface's order of refusals, in which the first match decides.
    fn precedence(&self) -> u8 {
        match self {
            Reason::NotYours { .. } | Reason::HandleOutlivedOwner | Reason::ReadOnlyAttribute | Reason::ShutOut => 0,
            Reason::Malformed(_) | Reason::OutOfRange { .. } | Reason::NotFound(_) | Reason::TooLarge => 1,
            Reason::RootOnly | Reason::MemberOnly => 2,
            Reason::Locked(_)
            | Reason::AdminLock(_)
            | Reason::InstanceLocked(_)
            | Reason::TerminateDisabled
            | Reason::DeleteProtected
            | Reason::NotInBin
            | Reason::Policy(_)
            | Reason::ReadOnlyMount => 3,
            Reason::NotBuilt { .. } | Reason::Unsupported(_) => 4,
            Reason::Unreachable(_) => 5,
            Reason::Busy { .. } | Reason::InUse(_) | Reason::DataOpen => 6,
            Reason::State { .. }
            | Reason::DraftOnly
            | Reason::StoppedOnly
            | Reason::NotShared { .. }
            | Reason::Deactivated
            | Reason::TooSmall { .. }
            | Reason::Image(_) => 7,
            Reason::NameTaken(_)
            | Reason::Exists
            | Reason::DataTaken(_)
            | Reason::NotEmpty
            | Reason::DraftQuota { .. }
            | Reason::KeyQuota { .. }
            | Reason::ScratchQuota
            | Reason::NoSpace(_)
            | Reason::DiskQuota(_)
            | Reason::Damaged(_)
            | Reason::FileTooLarge
            | Reason::StaleHandle
            | Reason::WrongKey
            | Reason::TimedOut(_)
            | Reason::Failed(_) => 8,
            Reason::Document { refused, .. } => refused.first().map_or(8, |(_, reason)| reason.precedence()),
        }
    }

    /// The errno that the caller gets.
    pub fn errno(&self) -> i32 {
        match self {
            Reason::NotYours { .. } | Reason::HandleOutlivedOwner | Reason::ReadOnlyAttribute | Reason::ShutOut => {
                libc::EACCES
            }
            Reason::Malformed(_)
            | Reason::State { .. }
            | Reason::DraftOnly
            | Reason::StoppedOnly
            | Reason::NotShared { .. }
            | Reason::Deactivated
            | Reason::Image(_) => libc::EINVAL,
            Reason::OutOfRange { .. } | Reason::TooSmall { .. } => libc::ERANGE,
            Reason::RootOnly
            | Reason::Locked(_)
            | Reason::AdminLock(_)
            | Reason::InstanceLocked(_)
            | Reason::TerminateDisabled
            | Reason::DeleteProtected
            | Reason::MemberOnly
            | Reason::NotInBin
            | Reason::Policy(_) => libc::EPERM,
            Reason::NotBuilt { .. } | Reason::Unsupported(_) => libc::EOPNOTSUPP,
            Reason::Unreachable(_) => libc::ENODEV,
            Reason::Busy { .. } | Reason::InUse(_) | Reason::DataOpen => libc::EBUSY,
            Reason::NameTaken(_) | Reason::Exists | Reason::DataTaken(_) => libc::EEXIST,
            Reason::NotFound(_) => libc::ENOENT,
            Reason::NotEmpty => libc::ENOTEMPTY,
            Reason::DraftQuota { .. } | Reason::KeyQuota { .. } | Reason::ScratchQuota | Reason::DiskQuota(_) => {
                libc::EDQUOT
            }
            Reason::Damaged(_) => libc::EBADMSG,
            Reason::ReadOnlyMount => libc::EROFS,
            Reason::NoSpace(_) => libc::ENOSPC,
            Reason::TooLarge | Reason::FileTooLarge => libc::EFBIG,
            Reason::StaleHandle => libc::ESTALE,
            Reason::WrongKey => libc::EKEYREJECTED,
            Reason::TimedOut(_) => libc::ETIMEDOUT,
            Reason::Failed(_) => libc::EIO,
            Reason::Document { refused, .. } => refused.first().map_or(libc::EINVAL, |(_, reason)| reason.errno()),
        }
    }

    /// The errno's name, `EPERM`.
    pub fn errno_name(&self) -> &'static str {
        errno_name(self.errno())
    }
}

/// So many keys of a document are named: all that there are in any class, and some metadata.
const MOST_REFUSED: usize = 48;
/// Bytes of a key that are shown: of those that exist the longest names of metadata.
const LONGEST_KEY: usize = 240;
/// Bytes that are shown of why one key is refused.
const LONGEST_REFUSAL: usize = 400;

fn shorten(text: &mut String, length: usize) {
    if text.len() > length {
        let end = (0..=length).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
        text.push_str("...");
    }
}

/// Every errno that [`Reason::errno`] can give, and its name.
pub const ERRNO_NAMES: [(i32, &str); 19] = [
    (libc::EACCES, "EACCES"),
    (libc::EINVAL, "EINVAL"),
    (libc::ERANGE, "ERANGE"),
    (libc::EPERM, "EPERM"),
    (libc::EOPNOTSUPP, "EOPNOTSUPP"),
    (libc::ENODEV, "ENODEV"),
    (libc::EBUSY, "EBUSY"),
    (libc::EEXIST, "EEXIST"),
    (libc::ENOENT, "ENOENT"),
    (libc::ENOTEMPTY, "ENOTEMPTY"),
    (libc::EDQUOT, "EDQUOT"),
    (libc::EBADMSG, "EBADMSG"),
    (libc::EROFS, "EROFS"),
    (libc::ENOSPC, "ENOSPC"),
    (libc::EFBIG, "EFBIG"),
    (libc::ESTALE, "ESTALE"),
    (libc::EKEYREJECTED, "EKEYREJECTED"),
    (libc::ETIMEDOUT, "ETIMEDOUT"),
    (libc::EIO, "EIO"),
];

/// The name of an errno that [`Reason::errno`] can give.
pub fn errno_name(errno: i32) -> &'static str {
    ERRNO_NAMES.iter().find(|(number, _)| *number == errno).map_or("EIO", |(_, name)| name)
}

fn locked(formatter: &mut fmt::Formatter<'_>, lock: &Lock) -> fmt::Result {
    let when = humantime::format_rfc3339_seconds(std::time::UNIX_EPOCH + std::time::Duration::from_secs(lock.at));
    write!(formatter, "locked by {} ({}) since {when}", lock.by, lock.level.word())?;
    if lock.reason.is_empty() { write!(formatter, ", no reason given") } else { write!(formatter, ": {}", lock.reason) }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::NotYours { class } => {
                write!(f, "this {} belongs to somebody else; ask its owner or root", class.noun())
            }
            Reason::HandleOutlivedOwner => {
                write!(f, "the object changed hands after this file was opened; open it again")
            }
            Reason::ReadOnlyAttribute => write!(f, "this file is read-only for everybody"),
            Reason::WrongKey => write!(f, "this is not the key of this offer; ask who made it"),
            Reason::ShutOut => {
                write!(f, "five wrong keys came from you within an hour; try again when that is over, or ask root")
            }
            Reason::Malformed(sentence)
            | Reason::Policy(sentence)
            | Reason::Unsupported(sentence)
            | Reason::Image(sentence)
            | Reason::InUse(sentence)
            | Reason::DataTaken(sentence)
            | Reason::TimedOut(sentence)
            | Reason::Damaged(sentence)
            | Reason::Failed(sentence) => f.write_str(sentence),
            Reason::OutOfRange { low, high, unit } => {
                write!(f, "the number must be from {low} to {high}")?;
                if unit.is_empty() { Ok(()) } else { write!(f, " {unit}") }
            }
            Reason::RootOnly => write!(f, "only root may change this"),
            Reason::Locked(lock) => {
                locked(f, lock)?;
                write!(f, "; write 0 to locked first")
            }
            Reason::AdminLock(lock) => {
                locked(f, lock)?;
                write!(f, "; an admin's lock is opened by root only")
            }
            Reason::InstanceLocked(lock) => {
                write!(f, "the instance that has it is ")?;
                locked(f, lock)?;
                write!(f, "; write 0 to the instance's locked first")
            }
            Reason::TerminateDisabled => {
                write!(f, "disable_terminate is 1, which refuses every kind of deletion; write 0 to it first")
            }
            Reason::DeleteProtected => {
                write!(f, "delete_protection is 1, which refuses every kind of deletion; write 0 to it first")
            }
            Reason::MemberOnly => write!(f, "only the project that this file is named after may write it"),
            Reason::NotShared { visibility } => {
                write!(
                    f,
                    "the image is {visibility}, and only a shared one has members; write shared to visibility first"
                )
            }
            Reason::TooSmall { file, present, demand, least } => {
                write!(f, "{file} is {present}, but {demand} of the image is {least}; write at least that to {file}")
            }
            Reason::Deactivated => {
                write!(f, "its image is deactivated; write active to the image's state first, or another image")
            }
            Reason::NotInBin => {
                write!(f, "only what is in the bin can be deleted for good; write soft_deleted to state first")
            }
            Reason::NotBuilt { what } => write!(f, "this version of instancefs does not have {what} yet"),
            Reason::Unreachable(detail) => {
                write!(f, "no connection to the hypervisor ({detail}); see health, and try again when it is back")
            }
            Reason::Busy { task } => {
                write!(f, "the task {task} owns the object; try again after it (instancefs wait)")
            }
            Reason::DataOpen => write!(f, "its data is still open for writing; close it and try again"),
            Reason::State { state, word, available } => {
                write!(f, "{word} is not possible from {state}; possible now: {available}")
            }
            Reason::DraftOnly => write!(f, "this can be changed in a draft only"),
            Reason::StoppedOnly => {
                write!(f, "this can be changed in a draft or while stopped only; write stopped to state first")
            }
            Reason::NameTaken(name) => write!(f, "another instance is named {name:?} already; choose another name"),
            Reason::Exists => write!(f, "it exists already"),
            Reason::NotFound(what) => write!(f, "there is no {what}"),
            Reason::NotEmpty => {
                write!(f, "only a draft that was never written to can be removed like this; write to its state instead")
            }
            Reason::DraftQuota { limit } => {
                write!(f, "you have {limit} drafts already; boot or discard some first")
            }
            Reason::KeyQuota { limit } => {
                write!(f, "there are {limit} of them already; remove some first")
            }
            Reason::ScratchQuota => {
                write!(f, "too many temporary files of yours in this directory; remove some first")
            }
            Reason::ReadOnlyMount => write!(f, "mounted with -o ro: this instancefs only observes"),
            Reason::NoSpace(place) => write!(f, "no space left on {place}; free some and try again"),
            Reason::DiskQuota(place) => write!(f, "the disk quota for {place} is used up; raise it or free some space"),
            Reason::TooLarge => write!(f, "too large: at most 1 MiB"),
            Reason::Document { refused, more } => {
                for (index, (key, reason)) in refused.iter().enumerate() {
                    // It may quote what was written.
                    let mut reason = reason.to_string();
                    shorten(&mut reason, LONGEST_REFUSAL);
                    write!(f, "{}{key}: {reason}", if index == 0 { "" } else { "; " })?;
                }
                if *more == 0 { Ok(()) } else { write!(f, "; and {more} more") }
            }
            Reason::FileTooLarge => write!(f, "the disk of the images takes no file of this size; write less"),
            Reason::StaleHandle => write!(f, "the daemon was restarted meanwhile; open the file again"),
        }
    }
}

impl std::error::Error for Reason {}

impl Level {
    /// The content of `locked_level`.
    pub fn word(self) -> &'static str {
        match self {
            Level::Owner => "owner",
            Level::Admin => "admin",
        }
    }
}
