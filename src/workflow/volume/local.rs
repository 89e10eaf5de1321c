//! Volumes as block devices of this host: made, taken away, and made again when the host has restarted.
//!
//! The order is that of what stands on what: exporter, then loop device; taken away the other way round. Nothing is taken
//! from under somebody who uses it.

use std::sync::Arc;

use uuid::Uuid;

use crate::block::local::{LocalData, LocalDevice, LocalDevices, LocalError};
use crate::inventory::{Object, Volume};
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
    let format = volume.record.data.as_ref().map(|data| format_of(volume, data));
    shared.parts.local.can_attach(format.unwrap_or(Format::Raw)).map_err(of_local)
}

fn format_of(volume: &Volume, data: &VolumeData) -> Format {
    match data {
        VolumeData::Ours(record) => record.format,
        VolumeData::Existing(_) => volume.record.disk_format.unwrap_or(Format::Raw),
    }
}

fn data_of(volume: &Volume) -> Result<VolumeData, Halt> {
    let data = volume.record.data.clone();
    data.ok_or_else(|| Halt::Failed(Reason::NotFound("data of this volume; it was never made".to_owned())))
}

/// Calls `act` with where and what the data is.
fn with_data<T>(run: &Run, volume: &Volume, act: impl FnOnce(&LocalData<'_>) -> Result<T, Halt>) -> Result<T, Halt> {
    let data = data_of(volume)?;
    let backend = run.shared.backend_of(&data).map_err(Halt::Failed)?;
    backend.examine(&data).map_err(|error| Halt::Failed(of_block(error)))?;
    let source = backend.source(&data).map_err(|error| Halt::Failed(of_block(error)))?;
    act(&LocalData { volume: run.object, source: &source, format: format_of(volume, &data), expected: None })
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
    let volume = run.volume()?;
    let data = data_of(&volume)?;
    can_begin(&run.shared, &volume).map_err(Halt::Failed)?;
    let block = &run.shared.parts.block;
    block.examine(&data).map_err(|error| Halt::Failed(of_block(error)))?;
    with_data(run, &volume, |local| {
        // Once this operation has begun to make them, an exporter or a device may be what has it open.
        let is_begun = run.has_begun(EXPORT)? || run.has_begun(DEVICE)?;
        let is_exported = volume.record.local.is_some() && devices(run).exporter(run.object).map_err(failed)?.is_some();
        if !is_begun
            && !is_exported
            && let Some(holder) = block.holder(&data).map_err(|error| Halt::Failed(of_block(error)))?
        {
            return Err(Halt::Failed(Reason::InUse(format!("{holder} has its data open; end that first"))));
        }
        let exporter = match local.format {
            Format::Raw => None,
            Format::Qcow2 => {
                run.begin_creating(EXPORT, creation(planned(run, None)))?;
                Some(devices(run).export(local).map_err(failed)?)
            }
        };
        run.begin_creating(DEVICE, creation(planned(run, exporter.clone())))?;
        let found = devices(run).attach(local, exporter.as_ref()).map_err(failed)?;
        Ok(recorded(run.object, Some(made(run, exporter, found))))
    })
}

/// The end in which the record says so.
fn recorded(volume: Uuid, local: Option<LocalAttachment>) -> Ending {
    Ending::Edit(Box::new(move |batch| record(batch, volume, |present| present.clone_from(&local))))
}

fn record(batch: &mut Batch<'_>, volume: Uuid, change: impl FnOnce(&mut Option<LocalAttachment>)) {
    let Some(volume) = batch.volume(volume) else { return };
    let mut volume = (*volume).clone();
    change(&mut volume.record.local);
    batch.put(Object::Volume(Arc::new(volume)));
}

/// Takes the device away.
pub(super) fn detach(run: &Run) -> Result<Ending, Halt> {
    let volume = run.volume()?;
    let Some(local) = volume.record.local.clone() else { return Ok(recorded(run.object, None)) };
    // Neither devices nor processes outlive their boot; the device of that name is another one by now.
    if local.boot_id == run.shared.settings.clock.boot() {
        if let Some(user) = devices(run).user(run.object, &local).map_err(failed)? {
            return Err(Halt::Failed(Reason::InUse(user)));
        }
        run.guard()?;
        run.begin(DEVICE)?;
        devices(run).detach(run.object, &local).map_err(failed)?;
    }
    let (object, ending) = (run.object, planned(run, None));
    run.step(EXPORT, None, move |batch| {
        // It is to be a device until all of it is gone, but that the exporter ends is no fault from here on.
        record(batch, object, |present| *present = Some(ending.clone()));
    })?;
    devices(run).end_export(run.object).map_err(failed)?;
    Ok(recorded(run.object, None))
}

/// Takes away what an operation made that goes no further. Where somebody uses it by now, it stays and is recorded.
pub(super) fn undo(run: &Run, creation: &LocalAttachment) -> Result<bool, Halt> {
    let volume = run.volume()?;
    // The device was kept, so what it stands on is kept too.
    if volume.record.local.as_ref().is_some_and(|local| local.device.is_some()) {
        return Ok(true);
    }
    let format = format_of(&volume, &data_of(&volume)?);
    if creation.boot_id != run.shared.settings.clock.boot() {
        devices(run).end_export(run.object).map_err(failed)?;
        return Ok(true);
    }
    match (format, &creation.exporter) {
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
                        record(batch, object, |present| *present = Some(local.clone()));
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

/// Lets the block device of a volume have this size, in bytes; of a raw file that is larger already. Without a device
/// nothing happens: it will have the size when it is made.
pub(super) fn grow_local_device(run: &Run, volume: &Volume, size_bytes: u64) -> Result<(), Halt> {
    match &volume.record.local {
        Some(local) if local.device.is_some() => devices(run).grow(volume.id, local, size_bytes).map_err(failed),
        Some(_) | None => Ok(()),
    }
}
