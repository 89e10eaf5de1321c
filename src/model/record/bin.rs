//! What is recorded of an object in the bin.

use serde::{Deserialize, Serialize};

use crate::model::instance::State;

/// What is known of an object in the bin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BinEntry {
    /// Unix seconds of the move; 0 where it is not known, and then it never expires.
    pub deleted_at: u64,
    /// Login name of who moved it.
    pub deleted_by: String,
    /// When it may be removed for good; `None`: never by itself.
    pub expiry: Option<Expiry>,
}

impl BinEntry {
    /// So far in the future a move into the bin can lie, in seconds, where somebody has set the clock back since. One
    /// that lies farther is no time at all.
    const CLOCK_SET_BACK: u64 = 24 * 3600;

    /// When it may be removed for good; `now` is in Unix seconds. `None` also where the times make no sense.
    pub fn expires(&self, now: u64) -> Option<Expiry> {
        let is_absurd = self.deleted_at == 0 || self.deleted_at > now.saturating_add(Self::CLOCK_SET_BACK);
        self.expiry.filter(|_| !is_absurd)
    }
}

/// A moment that has come when both clocks say so: one that people set, and one that nobody can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expiry {
    /// Unix seconds.
    pub at: u64,
    /// Seconds that the host was up since instancefs knows it.
    pub at_uptime: u64,
}

impl Expiry {
    /// Seconds until it comes at the earliest; 0 when it has come. `now` is in Unix seconds, `uptime` in seconds.
    pub fn left(self, now: u64, uptime: u64) -> u64 {
        self.at.saturating_sub(now).max(self.at_uptime.saturating_sub(uptime))
    }
}

/// An instance in the bin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceBin {
    /// When, by whom, until when.
    pub entry: BinEntry,
    /// The state that it had.
    pub state: State,
    /// The guest was stopped and autostart turned off; until then that is tried again.
    pub is_settled: bool,
}
