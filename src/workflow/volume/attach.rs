//! Gives a volume to an instance: into its definition and, if a guest is there, to that. A draft has it in its record
//! alone until it boots.
//!
//! It looks at both definitions before each call, so that one that was cut off leads to where it was going; what it
//! finds in one of them already, whoever put it there, stays, and the other follows.

use std::time::Instant;

use uuid::Uuid;

use super::detach::Removal;
use super::disks::{self, Seen};
use super::examine;
use crate::hypervisor::HypervisorError;
use crate::inventory::{Instance, Volume};
use crate::model::image::Format;
use crate::model::reason::Reason;
use crate::model::task::Creation;
use crate::model::volume::{VolumeCreation, device};
use crate::workflow::boot::of_block;
use crate::workflow::journal::{UNDO_PAUSE, UNDO_TRIES};
use crate::workflow::operation::{Ending, Halt, Run};
use crate::workflow::power::{ASK_AGAIN, persist};

const ATTACH: &str = "attach";

/// How often a call is refused for a state that the domain is not in, before we believe it.
const REFUSALS: u32 = 3;

/// Gives it to this instance, as this device or as the first that is free.
pub(super) fn attach(run: &Run, id: Uuid, wanted: Option<&str>) -> Result<Ending, Halt> {
    let volume = run.volume()?;
    let instance = disks::instance(run, id)?;
    can_be_shared(&volume).map_err(Halt::Failed)?;
    if instance.record.draft.is_some() {
        let device = choose(&volume, &instance, wanted, |_| false).map_err(Halt::Failed)?;
        return Ok(disks::attached(run.object, id, device));
    }
    let path = disks::path(run, &volume)?;
    let mut refusals = 0;
    loop {
        run.proceed()?;
        let seen = Seen::of(run, id)?.ok_or_else(disks::not_defined)?;
        let found = seen.find(&path)?;
        let Some(missing) = seen.missing(&found) else {
            run.shared.parts.reconciler.read_definition(id);
            let device = found.device().unwrap_or_default().to_owned();
            return Ok(disks::attached(run.object, id, device));
        };
        disks::has_no_saved_memory(&seen.domain)?;
        persist(run, &seen.domain)?;
        let device = match found.device() {
            Some(device) => device.to_owned(),
            None => {
                let (volume, ..) = examine::look(run)?;
                nobody_else_has(run, &volume)?;
                let taken = |device: &str| seen.is_taken(device);
                choose(&volume, &instance, wanted, taken).map_err(Halt::Failed)?
            }
        };
        let disk = disks::disk(run, &volume, &device)?;
        run.begin_creating(ATTACH, Creation::Volume(VolumeCreation::AttachedDisk { device }))?;
        match run.hypervisor().attach_disk(id, &disk, missing) {
            Ok(()) => {}
            Err(HypervisorError::Unreachable(_)) => return Err(Halt::Lost),
            // It stopped or started between the look and the call.
            Err(HypervisorError::InvalidState(_)) if refusals < REFUSALS => refusals += 1,
            Err(error) => match Seen::of(run, id)? {
                // An earlier call, or somebody else, was first.
                Some(seen) if seen.missing(&seen.find(&path)?).is_none() => {}
                Some(_) | None => return Err(error.into()),
            },
        }
    }
}

/// What the operation would find out, as far as the records say it.
pub(super) fn can_begin(volume: &Volume, instance: &Instance, wanted: Option<&str>) -> Result<(), Reason> {
    can_be_shared(volume)?;
    disks::can_change(instance)?;
    let definition = instance.record.definition.as_ref().filter(|_| instance.record.draft.is_none());
    let disks: Vec<_> = definition.into_iter().flat_map(|definition| &definition.disks).collect();
    let source_is_there = |device: &str| disks.iter().any(|disk| disk.device == device);
    choose(volume, instance, wanted, source_is_there).map(drop)
}

/// The device: free in the record, and by `is_taken` in the definitions.
pub(super) fn choose(
    volume: &Volume,
    instance: &Instance,
    wanted: Option<&str>,
    is_taken: impl Fn(&str) -> bool,
) -> Result<String, Reason> {
    let record = &instance.record;
    let is_root = wanted == Some(device::ROOT);
    if is_root && (record.draft.is_none() || record.image.is_some()) {
        return Err(Reason::InUse(format!(
            "{} is the disk that an instance boots from, which only a draft without an image can have of a volume; name \
             another device, or none",
            device::ROOT
        )));
    }
    if is_root && !volume.record.bootable {
        return Err(Reason::Malformed(
            "an instance boots from vda, and this volume is not bootable; write 1 to its bootable first".to_owned(),
        ));
    }
    device::choose(wanted, |device| is_taken(device) || record.volumes.get(device).is_some())
}

/// Several guests that write to the tables of one qcow2 file destroy it.
pub(super) fn can_be_shared(volume: &Volume) -> Result<(), Reason> {
    match disks::format(volume) {
        Format::Raw => Ok(()),
        Format::Qcow2 if volume.record.multiattach => Err(Reason::Unsupported(
            "several instances can have raw volumes only, and this one is qcow2; write 0 to multiattach".to_owned(),
        )),
        Format::Qcow2 => Ok(()),
    }
}

/// Whoever has it open would write to it together with the guest.
fn nobody_else_has(run: &Run, volume: &Volume) -> Result<(), Halt> {
    if volume.record.multiattach {
        return Ok(());
    }
    let data = disks::data(volume)?;
    let backend = run.shared.backend_of(data).map_err(Halt::Failed)?;
    match backend.holder(data).map_err(|error| Halt::Failed(of_block(error)))? {
        Some(holder) => {
            Err(Halt::Failed(Reason::InUse(format!("{holder} has it open; end that first, and try again"))))
        }
        None => Ok(()),
    }
}

/// Takes the disk out of both definitions again. `false`: it stays, and is shown as attached.
pub(super) fn undo(run: &Run, id: Uuid) -> Result<bool, Halt> {
    let volume = run.volume()?;
    let removal = Removal {
        run,
        id,
        path: &disks::path(run, &volume)?,
        deadline: Instant::now() + ASK_AGAIN,
        may_go_on: &|| {
            if run.shared.gate.stopping() {
                return Err(Halt::Stopped);
            }
            run.guard()?;
            match &disks::instance(run, id)?.record.protection.lock {
                Some(lock) => Err(Halt::Failed(Reason::InstanceLocked(lock.clone()))),
                None => Ok(()),
            }
        },
    };
    for _ in 0..UNDO_TRIES {
        match removal.remove() {
            Ok(_) => {
                run.shared.parts.reconciler.read_definition(id);
                return Ok(true);
            }
            Err(Halt::Failed(reason)) => log::warn!("the volume {} stays attached to {id}: {reason}", run.object),
            Err(halt) => return Err(halt),
        }
        run.shared.gate.sleep(UNDO_PAUSE, &|| false);
    }
    run.shared.parts.reconciler.read_definition(id);
    Ok(false)
}
