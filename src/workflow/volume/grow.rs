//! Makes a volume larger that guests have: they are told, and their QEMU grows the file.

use std::sync::Arc;

use uuid::Uuid;

use super::disks::{self, Seen};
use crate::hypervisor::HypervisorError;
use crate::inventory::{Object, Volume};
use crate::model::reason::Reason;
use crate::model::volume::device;
use crate::workflow::ledger::Batch;
use crate::workflow::operation::{Halt, Run};

/// The step that does it.
const GROW: &str = "grow_in_guest";

/// How often a call is refused for a state that the domain is not in, before we believe it.
const REFUSALS: u32 = 3;

/// Whether a guest is there that has the volume.
///
/// # Errors
///
/// [`Reason::InUse`] where one is suspended: it would find another disk than it knows.
pub(super) fn has_guest(run: &Run, volume: &Volume) -> Result<bool, Halt> {
    let path = disks::path(run, volume)?;
    let mut found = false;
    for (id, _) in volume.record.attached_to() {
        // One that is not defined has no guest.
        let Some(seen) = Seen::of(run, id)? else { continue };
        if seen.domain.has_managed_save && !seen.domain.power.is_on() {
            return Err(Halt::Failed(Reason::InUse(format!(
                "the instance {id} that has it is suspended, and its saved memory knows the present size; write active to \
                 its state first"
            ))));
        }
        found |= seen.find(&path)?.live.is_some();
    }
    Ok(found)
}

/// Has every guest that is there and has the volume make it as large as this, in bytes. `false`: there is none any more.
pub(super) fn grow_in_guest(run: &Run, volume: &Volume, size_bytes: u64) -> Result<bool, Halt> {
    let path = disks::path(run, volume)?;
    let mut grown = false;
    for (id, _) in volume.record.attached_to() {
        let mut refusals = 0;
        while let Some(seen) = Seen::of(run, id)? {
            let Some(device) = seen.find(&path)?.live else { break };
            run.begin(GROW)?;
            match run.hypervisor().resize_disk(id, &device, size_bytes) {
                Ok(()) => {
                    grown = true;
                    break;
                }
                Err(HypervisorError::Unreachable(_)) => return Err(Halt::Lost),
                // It stopped between the look and the call.
                Err(HypervisorError::InvalidState(_) | HypervisorError::NoDomain) if refusals < REFUSALS => {
                    refusals += 1;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(grown)
}

/// Shows the size where an instance boots from the volume.
pub(super) fn record_grown(batch: &mut Batch<'_>, volume: Uuid, size_bytes: u64) {
    let Some(grown) = batch.volume(volume) else { return };
    for (id, _) in grown.record.attached_to() {
        let Some(instance) = batch.instance(id) else { continue };
        let record = &instance.record;
        if record.draft.is_none() && record.volumes.get(device::ROOT) == Some(&volume) {
            let mut instance = (*instance).clone();
            instance.record.root_disk_bytes = Some(size_bytes);
            batch.put(Object::Instance(Arc::new(instance)));
        }
    }
}
