//! The bin: what follows the move in, the move out, and deletion for good.

use super::operation::{Ending, Halt, Run};
use crate::model::instance::State;
use crate::model::reason::Reason;

/// Stops the guest and turns autostart off.
pub(super) fn soft_delete(_run: &Run) -> Result<Ending, Halt> {
    Err(Halt::Failed(Reason::NotBuilt { what: "the bin" }))
}

/// Brings back autostart and the state.
pub(super) fn restore(_run: &Run, _state: State) -> Result<Ending, Halt> {
    Err(Halt::Failed(Reason::NotBuilt { what: "the bin" }))
}

/// Removes an object for good.
pub(super) fn delete(_run: &Run) -> Result<Ending, Halt> {
    Err(Halt::Failed(Reason::NotBuilt { what: "the bin" }))
}
