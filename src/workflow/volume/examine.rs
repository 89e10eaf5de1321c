//! Whether a volume's data is there, and what it was.

use std::sync::Arc;

use super::{edit, ending};
use crate::block::{BlockError, Examined, VolumeData};
use crate::inventory::Volume;
use crate::model::reason::Reason;
use crate::workflow::boot::of_block;
use crate::workflow::operation::{Ending, Halt, Run, WhenFull};

/// Looks again; what was wrong and is not any more is forgotten.
pub(super) fn examine(run: &Run) -> Result<Ending, Halt> {
    run.begin("examine")?;
    let (volume, _data, examined) = look(run)?;
    // Growing it may have been interrupted before that was recorded.
    let size_bytes = examined.size_bytes.max(volume.record.size_bytes);
    Ok(ending(run, move |record| {
        record.fault = None;
        record.size_bytes = size_bytes;
    }))
}

/// The volume with its data as it is. What is wrong with that is stored as its fault.
pub(super) fn look(run: &Run) -> Result<(Arc<Volume>, VolumeData, Examined), Halt> {
    let volume = run.volume()?;
    let data = volume.record.data.clone();
    let data = data.ok_or_else(|| Halt::Failed(Reason::NotFound(format!("data of volume {}", run.object))))?;
    let backend = run.shared.backend_of(&data).map_err(Halt::Failed)?;
    let examined = backend.examine(&data).and_then(|examined| {
        if examined.size_bytes < volume.record.size_bytes {
            return Err(BlockError::Damaged(format!(
                "its data ends after {} of {} bytes: something cut it short; bring back the file from a backup of yours",
                examined.size_bytes, volume.record.size_bytes
            )));
        }
        Ok(examined)
    });
    match examined {
        Ok(examined) => Ok((volume, data, examined)),
        Err(error) => Err(wrong(run, error)?),
    }
}

/// Stores what is wrong with the data, and fails with it. What may be over the next time is no fault of the volume.
fn wrong(run: &Run, error: BlockError) -> Result<Halt, Halt> {
    let is_fault = match &error {
        BlockError::Missing(_) | BlockError::Damaged(_) | BlockError::NotOurs(_) => true,
        BlockError::NoSpace(_)
        | BlockError::Exists(_)
        | BlockError::Quota(_)
        | BlockError::InUse(_)
        | BlockError::Refused(_)
        | BlockError::Cancelled
        | BlockError::Failed(_) => false,
    };
    let reason = of_block(error);
    if is_fault {
        let (object, fault) = (run.object, reason.to_string());
        run.store(
            Arc::new(move |batch| edit(batch, object, |record| record.fault = Some(fault.clone()))),
            WhenFull::Wait,
        )?;
    }
    Ok(Halt::Failed(reason))
}
