//! Offers of a volume: made with a key, taken once, taken back.

use uuid::Uuid;

use super::judge::{Accepted, Judge};
use crate::model::caller::Caller;
use crate::model::reason::Reason;
use crate::model::transfer::TransferChange;

impl Judge<'_, '_> {
    /// Takes an offer, or takes it back.
    pub(super) fn transfer(
        &mut self,
        _caller: &Caller,
        _id: Uuid,
        change: &TransferChange,
    ) -> Result<Accepted, Reason> {
        match change {
            TransferChange::Accept(_) => Err(Reason::NotBuilt { what: "taking an offer" }),
            TransferChange::Cancel => Err(Reason::NotBuilt { what: "taking back an offer" }),
        }
    }
}
