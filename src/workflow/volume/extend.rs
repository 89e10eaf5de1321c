//! A volume becomes larger.

use super::{edit, examine, grow, local};
use crate::model::reason::Reason;
use crate::workflow::boot::of_block;
use crate::workflow::operation::{Ending, Halt, Run};

/// Makes it larger, at least to `size_bytes`, whoever has it.
pub(super) fn extend(run: &Run, size_bytes: u64) -> Result<Ending, Halt> {
    let (volume, data, _present) = examine::look(run)?;
    let is_local = volume.record.local.as_ref().is_some_and(|local| local.device.is_some());
    // Before anything grows: a suspended guest forbids it.
    let has_guest = grow::has_guest(run, &volume)?;
    run.begin("grow")?;
    let backend = run.shared.backend_of(&data).map_err(Halt::Failed)?;
    let failed = |error| Halt::Failed(of_block(error));
    // Whoever has it open grows it himself; of a file that is plain bytes he only learns the size.
    let mut grown = backend.grow_data(&data, size_bytes, has_guest || is_local).map_err(failed)?;
    // A guest may have ended meanwhile.
    if has_guest && !grow::grow_in_guest(run, &volume, size_bytes)? && !is_local {
        backend.grow_data(&data, size_bytes, false).map_err(failed)?;
    }
    if is_local {
        local::grow_local_device(run, &volume, size_bytes)?;
    }
    if has_guest || is_local {
        grown = backend.examine(&data).map_err(failed)?.size_bytes;
    }
    if grown < size_bytes {
        return Err(Halt::Failed(Reason::Failed(format!("it still has {grown} bytes; see who has it open"))));
    }
    let object = run.object;
    Ok(Ending::Edit(Box::new(move |batch| {
        edit(batch, object, |record| record.size_bytes = grown);
        grow::record_grown(batch, object, grown);
    })))
}
