//! The shelf: an instance's own disks are copied, and come back.

use super::operation::{Ending, Halt, Run};
use crate::model::reason::Reason;

/// Copies the disks, and removes them if it is to be offloaded at once.
pub(super) fn shelve(_run: &Run, _offload: bool) -> Result<Ending, Halt> {
    Err(Halt::Failed(Reason::NotBuilt { what: "the shelf" }))
}

/// Removes the disks that are copied.
pub(super) fn offload(_run: &Run) -> Result<Ending, Halt> {
    Err(Halt::Failed(Reason::NotBuilt { what: "the shelf" }))
}

/// Brings the disks back.
pub(super) fn unshelve(_run: &Run, _start: bool) -> Result<Ending, Halt> {
    Err(Halt::Failed(Reason::NotBuilt { what: "the shelf" }))
}
