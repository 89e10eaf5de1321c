//! The content of a volume at one moment, kept and removed.

use super::{copying, ending, examine, remove};
use crate::block::{NewData, Source};
use crate::inventory::Volume;
use crate::model::reason::Reason;
use crate::model::task::Creation;
use crate::model::volume::VolumeCreation;
use crate::model::volume::record::{SnapshotRecord, VolumeRecord};
use crate::workflow::operation::{Ending, Halt, Run};

/// What is in the record from the moment on in which a snapshot is accepted.
pub(super) fn begun(record: &VolumeRecord, now: u64) -> SnapshotRecord {
    SnapshotRecord { data: None, size_bytes: record.size_bytes, created_at: now }
}

/// Whether one could be taken now.
pub(super) fn can_begin(volume: &Volume, name: &str) -> Result<(), Reason> {
    let record = &volume.record;
    if !record.attachments.is_empty() || record.local.is_some() {
        return Err(Reason::InUse(
            "somebody may write to it, and the copy would be of many moments; detach it first".to_owned(),
        ));
    }
    // Whether there is room for one more.
    record.snapshots.clone().set(name, begun(record, 0))
}

/// Copies the volume as it is.
pub(super) fn take(run: &Run, name: &str) -> Result<Ending, Halt> {
    let (_volume, data, examined) = examine::look(run)?;
    remove::leftovers(run)?;
    let backend = run.shared.backend_of(&data).map_err(Halt::Failed)?;
    let source = Source::Volume(&data);
    let new = NewData {
        volume: run.object,
        snapshot: Some(run.id),
        operation: run.id,
        size_bytes: examined.size_bytes,
        format: Some(examined.format),
        source,
    };
    let planned = backend.plan_data(&new);
    let creation = VolumeCreation::Snapshot { name: name.to_owned(), data: planned.clone() };
    let made = copying::begin(run, &source, || run.step("copy", Some(Creation::Volume(creation)), |_| {}))?
        .create(backend, &new)?;
    let name = name.to_owned();
    Ok(ending(run, move |record| {
        let Some(snapshot) = record.snapshots.get(&name) else { return };
        let complete = SnapshotRecord { data: Some(planned.clone()), size_bytes: made.size_bytes, ..snapshot.clone() };
        let _room_is_needed_for_new_ones_only = record.snapshots.set(&name, complete);
    }))
}

/// Removes one for good.
pub(super) fn delete(run: &Run, name: &str) -> Result<Ending, Halt> {
    remove::leftovers(run)?;
    remove::snapshot(run, name, &|| remove::may_change(run))?;
    let name = name.to_owned();
    Ok(ending(run, move |record| drop(record.snapshots.remove(&name))))
}
