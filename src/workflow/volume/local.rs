//! Volumes as block devices of this host: made, taken away, and made again when the host has restarted.
//!
//! The order is that of what stands on what: exporter, then loop device; taken away the other way round. Nothing is taken
//! from under somebody who uses it.

use std::sync::Arc;

use super::disks::format;
use super::{edit, ending, examine};
use crate::block::local::{LocalData, LocalDevice, LocalDevices, LocalError};
use crate::inventory::Volume;
use crate::model::image::Format;
use crate::model::reason::Reason;
use crate::model::task::Creation;
use crate::model::volume::VolumeCreation;
use crate::model::volume::record::{Exporter, LocalAttachment, VolumeData};
use crate::workflow::boot::of_block;
use crate::workflow::engine::Shared;
use crate::workflow::ledger::Batch;
use crate::workflow::operation::{Ending, Halt, Run, WhenFull};

/// The step in which the exporter comes or goes.
const EXPORT: &str = "export";
/// The step in which the block device comes or goes.
const DEVICE: &str = "device";

/// What a failure means to the caller.
fn of_local(error: LocalError) -> Reason {
    match error {
        LocalError::Unsupported(words) => Reason::Unsupported(words),
        LocalError::InUse(words) => Reason::InUse(words),
        LocalError::Damaged(words) => Reason::Damaged(words),
        LocalError::Failed(words) => Reason::Failed(words),
    }
}

fn failed(error: LocalError) -> Halt {
    Halt::Failed(of_local(error))
}

/// What the first step would find out, said at once.
pub(super) fn can_begin(shared: &Shared, volume: &Volume) -> Result<(), Reason> {
    shared.parts.local.can_attach(format(volume)).map_err(of_local)
}

fn data_of(volume: &Volume) -> Result<VolumeData, Halt> {
    let data = volume.record.data.clone();
    data.ok_or_else(|| Halt::Failed(Reason::NotFound("data of this volume; it was never made".to_owned())))
}

/// Calls `act` with the data, opened.
fn with_data<T>(run: &Run, volume: &Volume, act: impl FnOnce(&LocalData<'_>) -> Result<T, Halt>) -> Result<T, Halt> {
    let data = data_of(volume)?;
    let backend = run.shared.backend_of(&data).map_err(Halt::Failed)?;
    backend.prepare(&data).map_err(|error| Halt::Failed(of_block(error)))?;
    let file = backend.open_data(&data).map_err(|error| Halt::Failed(of_block(error)))?;
    act(&LocalData { volume: run.object, file: &file, format: format(volume) })
}

fn devices(run: &Run) -> &dyn LocalDevices {
    &*run.shared.parts.local
}

/// A device of this boot that is still to be made.
fn planned(run: &Run, exporter: Option<Exporter>) -> LocalAttachment {
    LocalAttachment { device: None, boot_id: run.shared.settings.clock.boot(), exporter, backing: None }
}

fn made(run: &Run, exporter: Option<Exporter>, found: LocalDevice) -> LocalAttachment {
    LocalAttachment { device: Some(found.device), backing: Some(found.backing), ..planned(run, exporter) }
}

fn creation(local: LocalAttachment) -> Creation {
    Creation::Volume(VolumeCreation::LocalDevice(local))
}

/// Makes a volume a block device of this host.
pub(super) fn attach(run: &Run) -> Result<Ending, Halt> {
    let (volume, data, _present) = examine::look(run)?;
    can_begin(&run.shared, &volume).map_err(Halt::Failed)?;
    let backend = run.shared.backend_of(&data).map_err(Halt::Failed)?;
    // Once this operation has begun to make them, an exporter or a device may be what has it open.
    let is_begun = run.has_begun(EXPORT)? || run.has_begun(DEVICE)?;
    let is_exported = volume.record.local.is_some() && devices(run).exporter(run.object).map_err(failed)?.is_some();
    // Asked before we open it ourselves, which would hide what cannot be told from us.
    if !is_begun
        && !is_exported
        && let Some(holder) = backend.holder(&data).map_err(|error| Halt::Failed(of_block(error)))?
    {
        return Err(Halt::Failed(Reason::InUse(format!("{holder} has its data open; end that first"))));
    }
    with_data(run, &volume, |local| {
        let exporter = match local.format {
            Format::Raw => None,
            Format::Qcow2 => {
                run.begin_creating(EXPORT, creation(planned(run, None)))?;
                Some(devices(run).export(local).map_err(failed)?)
            }
        };
        run.begin_creating(DEVICE, creation(planned(run, exporter.clone())))?;
        let found = devices(run).attach(local, exporter.as_ref()).map_err(failed)?;
        let local = made(run, exporter, found);
        Ok(ending(run, move |record| record.local = Some(local.clone())))
    })
}

/// Takes the device away.
pub(super) fn detach(run: &Run) -> Result<Ending, Halt> {
    let volume = run.volume()?;
    let Some(local) = volume.record.local.clone() else { return Ok(ending(run, |record| record.local = None)) };
    // Neither devices nor processes outlive their boot; the device of that name is another one by now.
    if local.boot_id == run.shared.settings.clock.boot() {
        if let Some(user) = devices(run).user(run.object, &local).map_err(failed)? {
            return Err(Halt::Failed(Reason::InUse(user)));
        }
        run.guard()?;
        run.begin(DEVICE)?;
        devices(run).detach(run.object, &local).map_err(failed)?;
    }
    let (object, remaining) = (run.object, planned(run, None));
    run.step(EXPORT, None, move |batch| {
        // It is to be a device until all of it is gone, but that the exporter ends is no fault from here on.
        edit(batch, object, |record| record.local = Some(remaining.clone()));
    })?;
    devices(run).end_export(run.object).map_err(failed)?;
    Ok(ending(run, |record| record.local = None))
}

/// Takes away what an operation made that goes no further. Where somebody uses it by now, it stays and is recorded.
pub(super) fn undo(run: &Run, creation: &LocalAttachment) -> Result<bool, Halt> {
    let volume = run.volume()?;
    // The device was kept, so what it stands on is kept too.
    if volume.record.local.as_ref().is_some_and(|local| local.device.is_some()) {
        return Ok(true);
    }
    if creation.boot_id != run.shared.settings.clock.boot() {
        devices(run).end_export(run.object).map_err(failed)?;
        return Ok(true);
    }
    match (format(&volume), &creation.exporter) {
        (Format::Raw, None) | (_, Some(_)) => {
            let exporter = creation.exporter.clone();
            let find = |data: &LocalData<'_>| devices(run).find(data, exporter.as_ref()).map_err(failed);
            let Some(found) = with_data(run, &volume, find)? else { return Ok(true) };
            let local = made(run, exporter, found);
            match devices(run).detach(run.object, &local) {
                Ok(()) => {}
                Err(LocalError::InUse(words)) => {
                    log::warn!("the block device of {} stays: {words}", run.object);
                    let object = run.object;
                    let keep = move |batch: &mut Batch<'_>| {
                        edit(batch, object, |record| record.local = Some(local.clone()));
                    };
                    run.store(Arc::new(keep), WhenFull::Wait)?;
                }
                Err(error) => return Err(failed(error)),
            }
        }
        (Format::Qcow2, None) => devices(run).end_export(run.object).map_err(failed)?,
    }
    Ok(true)
}

/// Lets the block device of a volume have this size, in bytes; a raw file has it already, what is exported grows with it.
/// Without a device nothing happens to it: it will have the size when it is made again.
pub(super) fn grow_local_device(run: &Run, volume: &Volume, size_bytes: u64) -> Result<(), Halt> {
    match &volume.record.local {
        Some(local) if local.device.is_some() => devices(run).grow(volume.id, local, size_bytes).map_err(failed),
        Some(_) | None => Ok(()),
    }
}
