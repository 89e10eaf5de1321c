//! Offers of a volume to somebody else.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::caller::{Caller, Ownership};
use super::record::{ErrorHistory, Expiry};
use super::secret::Secret;

/// The order is only ever appended to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Offered.
    Pending,
    /// Somebody took it.
    Accepted,
    /// Taken back.
    Cancelled,
    /// Nobody took it in time.
    Expired,
}

impl State {
    /// The content of `state`.
    pub fn word(self) -> &'static str {
        match self {
            State::Pending => "pending",
            State::Accepted => "accepted",
            State::Cancelled => "cancelled",
            State::Expired => "expired",
        }
    }
}

/// Who alone may take an offer, without a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recipient {
    /// A user id.
    User(u32),
    /// The members of a group, by its id.
    Group(u32),
}

impl Recipient {
    /// Whether this is he.
    pub fn is(self, caller: &Caller) -> bool {
        match self {
            Recipient::User(uid) => caller.uid == uid,
            Recipient::Group(gid) => caller.in_group(gid),
        }
    }
}

/// Who may take an offer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Taker {
    /// These alone, without a key.
    Named(Recipient),
    /// Whoever has the key, which is stored nowhere.
    Key {
        /// Random bytes, hexadecimal, that are hashed with the key.
        salt: String,
        /// SHA-256 of salt and key, hexadecimal.
        hash: String,
    },
}

/// An offer, under `transfers/<uuid>`. It stays for a while after its end, to say how it ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferRecord {
    /// The number behind its inodes; never reused.
    pub number: u64,
    /// The name, not unique.
    pub name: String,
    /// The volume.
    pub volume: Uuid,
    /// Whose the volume was when it was offered.
    pub ownership: Ownership,
    /// The user who made the offer: the volume's owner, or somebody else who may.
    pub offered_by: u32,
    /// Who may take it.
    pub taker: Taker,
    /// Unix seconds.
    pub created_at: u64,
    /// Until when it can be taken.
    pub expiry: Expiry,
    /// How it stands.
    pub state: State,
    /// Unix seconds of its end.
    pub ended_at: Option<u64>,
    /// Refusals.
    pub errors: ErrorHistory,
}

/// What can be written to an offer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TransferChange {
    /// `accept`: the key, or `1` of a named recipient.
    Accept(Secret),
    /// `cancelled` written to `state`.
    Cancel,
    /// The daemon's own: nobody took it in time.
    Expire,
}
