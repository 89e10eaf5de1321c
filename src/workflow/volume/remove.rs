//! What is removed of a volume: by deletion for good, by discarding a draft, by undoing. Only ever data that instancefs
//! made, by the mark of the operation that is recorded.

use std::sync::Arc;

use super::{edit, nobody_uses};
use crate::block::{DataRecord, VolumeData};
use crate::model::Class;
use crate::model::caller::Caller;
use crate::model::protection::Action;
use crate::model::reason::Reason;
use crate::workflow::copies::halt;
use crate::workflow::events::Entry;
use crate::workflow::journal::{UNDO_PAUSE, UNDO_TRIES};
use crate::workflow::operation::{Ending, Halt, Run, WhenFull};

/// Removes a volume in the bin for good: snapshots first, so that what is left of one that could not be removed completely
/// is the volume itself.
pub(in crate::workflow) fn delete(run: &Run) -> Result<Ending, Halt> {
    let may_destroy = || {
        let record = &run.volume()?.record;
        if record.bin.is_none() {
            return Err(Halt::Failed(Reason::NotInBin));
        }
        if !record.attachments.is_empty() || record.local.is_some() {
            return Err(Halt::Failed(Reason::InUse("it is attached; detach it first".to_owned())));
        }
        may_change(run)
    };
    may_destroy()?;
    let volume = run.volume()?;
    let record = &volume.record;
    let snapshots = record.snapshots.iter().filter_map(|(_, entry)| entry.value.data.clone());
    // All of them before the first is gone.
    for data in snapshots.map(VolumeData::Ours).chain(record.data.clone()) {
        nobody_uses(run, &data)?;
    }
    for (name, _) in record.snapshots.iter() {
        snapshot(run, name, &may_destroy)?;
        let (object, name) = (run.object, name.to_owned());
        run.store(
            Arc::new(move |batch| edit(batch, object, |record| drop(record.snapshots.remove(&name)))),
            WhenFull::Wait,
        )?;
    }
    for left in &record.leftovers {
        data(run, left, "remove_leftovers", &may_destroy)?;
    }
    match &record.data {
        Some(VolumeData::Ours(own)) => data(run, own, "remove_data", &may_destroy)?,
        Some(VolumeData::Existing(existing)) => {
            may_destroy()?;
            tell_of_kept(run, &record.name, &existing.reference);
        }
        None => {}
    }
    Ok(Ending::Removed)
}

/// Removes a draft, with the data that a failed creation could not take back.
pub(in crate::workflow) fn discard(run: &Run) -> Result<Ending, Halt> {
    leftovers_of_draft(run)?;
    leftovers(run)?;
    Ok(Ending::Removed)
}

/// Removes what an earlier operation made for a draft. Data that was there before is only forgotten.
pub(super) fn leftovers_of_draft(run: &Run) -> Result<(), Halt> {
    let left = run.volume()?.record.data.clone();
    match left {
        None => return Ok(()),
        Some(VolumeData::Ours(record)) if record.operation == run.id => return Ok(()),
        Some(VolumeData::Ours(record)) => data(run, &record, "leftovers", &|| run.guard())?,
        Some(VolumeData::Existing(_)) if run.has_begun(super::create::ADOPT)? => return Ok(()),
        Some(VolumeData::Existing(_)) => {}
    }
    let object = run.object;
    run.store(Arc::new(move |batch| edit(batch, object, |record| record.data = None)), WhenFull::Wait)
}

/// Removes what earlier operations could not take back.
pub(super) fn leftovers(run: &Run) -> Result<(), Halt> {
    for left in &run.volume()?.record.leftovers {
        data(run, left, "leftovers", &|| run.guard())?;
        let (object, gone) = (run.object, left.clone());
        run.store(
            Arc::new(move |batch| edit(batch, object, |record| record.leftovers.retain(|other| *other != gone))),
            WhenFull::Wait,
        )?;
    }
    Ok(())
}

/// Removes a snapshot's data. `may_destroy` is asked right before.
pub(super) fn snapshot(run: &Run, name: &str, may_destroy: &dyn Fn() -> Result<(), Halt>) -> Result<(), Halt> {
    let volume = run.volume()?;
    match volume.record.snapshots.get(name).and_then(|snapshot| snapshot.data.as_ref()) {
        Some(own) => data(run, own, "remove_snapshot", may_destroy),
        None => Ok(()),
    }
}

fn data(
    run: &Run,
    record: &DataRecord,
    step: &'static str,
    may_destroy: &dyn Fn() -> Result<(), Halt>,
) -> Result<(), Halt> {
    nobody_uses(run, &VolumeData::Ours(record.clone()))?;
    run.begin(step)?;
    may_destroy()?;
    let backend = run.shared.backend(&record.backend).map_err(Halt::Failed)?;
    backend.remove_data(record).map_err(|error| halt(run, error))
}

/// Lock and protection, which take hold during an operation: asked right before each step that destroys.
pub(super) fn may_change(run: &Run) -> Result<(), Halt> {
    run.volume()?.situation(&Caller::daemon(), None).check(Action::Delete).map_err(Halt::Failed)
}

/// Removes data that this operation made. Says whether it is gone.
pub(super) fn undo(run: &Run, record: &DataRecord) -> Result<bool, Halt> {
    let is_locked = run.volume()?.record.protection.lock.is_some();
    let backend = match run.shared.backend(&record.backend) {
        Ok(backend) if !is_locked => backend,
        Ok(_) | Err(_) => {
            log::warn!(
                "the data {} is kept: the volume was locked meanwhile, or its backend is gone",
                record.reference
            );
            return Ok(false);
        }
    };
    for _ in 0..UNDO_TRIES {
        match backend.remove_data(record) {
            Ok(()) => return Ok(true),
            Err(error) => log::warn!("the data {} cannot be undone: {error}", record.reference),
        }
        run.shared.gate.sleep(UNDO_PAUSE, &|| false);
    }
    Ok(false)
}

/// The same of a snapshot; what cannot be removed now is left to the next operation, or to the volume's end.
pub(super) fn undo_snapshot(run: &Run, record: &DataRecord) -> Result<(), Halt> {
    if undo(run, record)? {
        return Ok(());
    }
    let (object, left) = (run.object, record.clone());
    run.store(
        Arc::new(move |batch| {
            edit(batch, object, |record| {
                if !record.leftovers.contains(&left) {
                    record.leftovers.push(left.clone());
                }
            });
        }),
        WhenFull::Wait,
    )
}

/// Data that instancefs did not make stays where it is, which one line of `events` says.
fn tell_of_kept(run: &Run, name: &str, reference: &str) {
    run.shared.parts.events.record(Entry {
        class: Some(Class::Volume),
        id: Some(run.object),
        name: name.to_owned(),
        uid: run.uid,
        login: run.login.clone(),
        what: "kept".to_owned(),
        from: String::new(),
        to: reference.to_owned(),
        errno: String::new(),
        reason: "this data was not made by instancefs, which never deletes it".to_owned(),
    });
}
