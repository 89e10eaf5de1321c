//! Block devices of this host between the operations: made again after a restart of the host, and if somebody took them
//! away.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use uuid::Uuid;

use crate::inventory::{Object, Volume};
use crate::model::caller::Caller;
use crate::model::volume::change::VolumeChange;
use crate::model::volume::record::LocalAttachment;
use crate::workflow::engine::Shared;
use crate::workflow::ledger::{Batch, now};
use crate::workflow::request::{Request, Submission, Wait};

/// Starts the thread, which ends with the engine. No volume says on return that it is a device which an earlier boot of
/// the host had: by now that name may be another's.
pub(in crate::workflow) fn start(shared: &Arc<Shared>) {
    forget_devices_of_other_boots(shared);
    let shared = shared.clone();
    // A device whose exporter hangs keeps whoever asks it: so this thread has nothing else to do.
    let look_after = move || {
        let mut unseen = BTreeSet::new();
        let mut wanted = recorded(&shared);
        while !shared.gate.stopping() {
            make_again(&shared, wanted, &mut unseen);
            shared.gate.sleep(shared.settings.device_interval, &|| false);
            wanted = recorded(&shared);
            // What could not be made again is not tried for ever.
            wanted.retain(|(_, local)| local.device.is_some());
        }
    };
    if let Err(error) = thread::Builder::new().name("devices".to_owned()).spawn(look_after) {
        log::error!("nobody looks after the block devices of volumes: {error}");
    }
}

/// The volumes that are recorded as block devices, and that no operation owns.
pub(super) fn recorded(shared: &Shared) -> Vec<(Arc<Volume>, LocalAttachment)> {
    let volumes = shared.parts.ledger.inventory().volumes();
    let at_rest = volumes.into_iter().filter(|volume| volume.task.is_none() && volume.record.fault.is_none());
    at_rest.filter_map(|volume| volume.record.local.clone().map(|local| (volume, local))).collect()
}

fn forget_devices_of_other_boots(shared: &Shared) {
    let boot = shared.settings.clock.boot();
    let gone: Vec<_> = recorded(shared).into_iter().filter(|(_, local)| local.boot_id != boot).collect();
    if gone.is_empty() {
        return;
    }
    let forget = move |batch: &mut Batch<'_>| {
        for (volume, local) in &gone {
            let _it_is_as_seen = edit(batch, volume.id, local, forget_device);
        }
    };
    if let Err(fault) = shared.edit(Arc::new(forget)) {
        log::warn!("the block devices of before the restart are still recorded: {}", fault.reason());
    }
}

/// It is to be made again.
fn forget_device(volume: &mut Volume) {
    if let Some(local) = &mut volume.record.local {
        local.device = None;
    }
}

/// Has each of these devices made again that is not there: the host has restarted, or somebody took it away. Those that
/// cannot be looked at are said once, and kept in `unseen`.
fn make_again(shared: &Arc<Shared>, recorded: Vec<(Arc<Volume>, LocalAttachment)>, unseen: &mut BTreeSet<Uuid>) {
    let boot = shared.settings.clock.boot();
    for (volume, local) in recorded {
        let id = volume.id;
        let is_of_this_boot = local.boot_id == boot;
        let is_there = match is_of_this_boot.then(|| shared.parts.local.is_there(id, &local)) {
            None => false,
            Some(Ok(is_there)) => {
                unseen.remove(&id);
                is_there
            }
            Some(Err(error)) => {
                if unseen.insert(id) {
                    log::warn!("the block device of {id} cannot be looked at, and is left as it is: {error}");
                }
                true
            }
        };
        if is_there {
            continue;
        }
        let has_died = |exporter| matches!(shared.parts.local.watch(exporter), Ok(None));
        if is_of_this_boot && local.exporter.as_ref().is_some_and(has_died) {
            // Which is a fault, and told as one.
            continue;
        }
        let is_as_seen = Arc::new(AtomicBool::new(false));
        let found = is_as_seen.clone();
        let forget =
            move |batch: &mut Batch<'_>| found.store(edit(batch, id, &local, forget_device), Ordering::Release);
        if let Err(fault) = shared.edit(Arc::new(forget)) {
            log::warn!("the block device of {id} is not made again: {}", fault.reason());
            continue;
        }
        // An operation has come in between, which may have taken it away.
        if !is_as_seen.load(Ordering::Acquire) {
            continue;
        }
        shared.submit(Submission {
            caller: Caller::daemon(),
            file: "local_attach".to_owned(),
            request: Request::Volume { id, changes: vec![VolumeChange::RenewLocalDevice] },
            wait: Wait::Settle,
            done: Box::new(move |result| {
                if let Err(reason) = result {
                    log::warn!("the block device of {id} is not made again: {reason}");
                }
            }),
        });
    }
}

/// Changes a volume whose device is still this one and that no operation owns; whether it does.
pub(super) fn edit(batch: &mut Batch<'_>, id: Uuid, local: &LocalAttachment, change: impl FnOnce(&mut Volume)) -> bool {
    let Some(volume) = batch.volume(id) else { return false };
    if volume.record.local.as_ref() != Some(local) || volume.record.operation.is_some() {
        return false;
    }
    let mut volume = (*volume).clone();
    change(&mut volume);
    volume.record.updated_at = now();
    batch.put(Object::Volume(Arc::new(volume)));
    true
}
