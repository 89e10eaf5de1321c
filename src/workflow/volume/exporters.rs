//! Block devices of this host between the operations: made again after a restart of the host and if somebody took them
//! away, and watched for the death of what exports them.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use uuid::Uuid;

use crate::inventory::{Object, Volume};
use crate::model::Class;
use crate::model::caller::Caller;
use crate::model::volume::change::VolumeChange;
use crate::model::volume::record::{Exporter, LocalAttachment};
use crate::workflow::engine::Shared;
use crate::workflow::events::Entry;
use crate::workflow::ledger::{Batch, now};
use crate::workflow::request::{Request, Submission, Wait};

/// Calls for the thread that watches. Without one nobody hears.
pub(in crate::workflow) struct Calls(Option<EventFd>);

impl Calls {
    pub(in crate::workflow) fn new() -> Calls {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        Calls(event.map_err(|error| log::error!("nobody watches over exporters of volumes: {error}")).ok())
    }

    /// Has the records looked at again. Returns at once.
    pub(in crate::workflow) fn look_again(&self) {
        if let Some(event) = &self.0 {
            // Full means that somebody has called already.
            let _already_called = event.write(1);
        }
    }
}

/// Starts the thread, which ends with the engine. No volume says on return that it is a device which an earlier boot of
/// the host had: by now that name may be another's.
pub(in crate::workflow) fn start(shared: &Arc<Shared>) {
    forget_devices_of_other_boots(shared);
    let shared = shared.clone();
    let spawned = thread::Builder::new().name("exporters".to_owned()).spawn(move || {
        let mut unseen = BTreeSet::new();
        make_again(&shared, recorded(&shared), &mut unseen);
        watch(&shared, unseen);
    });
    if let Err(error) = spawned {
        log::error!("no thread watches over exporters of volumes: {error}");
    }
}

/// The volumes that are recorded as block devices, and that no operation owns.
fn recorded(shared: &Shared) -> Vec<(Arc<Volume>, LocalAttachment)> {
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
            request: Request::Volume { id, changes: vec![VolumeChange::LocalAttach(true)] },
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
fn edit(batch: &mut Batch<'_>, id: Uuid, local: &LocalAttachment, change: impl FnOnce(&mut Volume)) -> bool {
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

/// Waits for the end of exporters, and tells of those that nobody asked to end; looks after the devices meanwhile.
fn watch(shared: &Arc<Shared>, mut unseen: BTreeSet<Uuid>) {
    let Some(calls) = &shared.exporters.0 else { return };
    let mut watched: BTreeMap<Uuid, (Exporter, OwnedFd)> = BTreeMap::new();
    while !shared.gate.stopping() {
        let boot = shared.settings.clock.boot();
        let recorded = recorded(shared);
        // What could not be made again is not tried for ever.
        let shown: Vec<_> = recorded.iter().filter(|(_, local)| local.device.is_some()).cloned().collect();
        let patience = PollTimeout::try_from(shared.settings.device_interval).ok().filter(|_| !shown.is_empty());
        let wanted: BTreeMap<_, _> = recorded
            .into_iter()
            .filter(|(_, local)| local.boot_id == boot)
            .filter_map(|(volume, local)| local.exporter.clone().map(|exporter| (volume.id, (exporter, volume, local))))
            .collect();
        watched.retain(|id, (exporter, _)| wanted.get(id).is_some_and(|(wanted, ..)| wanted == exporter));
        for (id, (exporter, volume, local)) in wanted {
            if watched.contains_key(&id) {
                continue;
            }
            match shared.parts.local.watch(&exporter) {
                Ok(Some(descriptor)) => drop(watched.insert(id, (exporter, descriptor))),
                Ok(None) => tell(shared, &volume, local, &exporter),
                Err(error) => log::warn!("the exporter of {id} cannot be watched: {error}"),
            }
        }
        let ended = {
            let descriptors = watched.values().map(|(_, descriptor)| descriptor.as_fd());
            let mut polled: Vec<_> = [calls.as_fd()]
                .into_iter()
                .chain(descriptors)
                .map(|descriptor| PollFd::new(descriptor, PollFlags::POLLIN))
                .collect();
            match poll(&mut polled, patience.unwrap_or(PollTimeout::NONE)) {
                Ok(0) => make_again(shared, shown, &mut unseen),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => {
                    log::error!("nobody watches over exporters of volumes any more: {error}");
                    return;
                }
            }
            let ended = polled.iter().skip(1).map(|polled| polled.any().unwrap_or(false));
            watched.keys().copied().zip(ended).filter(|(_, ended)| *ended).map(|(id, _)| id).collect::<Vec<_>>()
        };
        // It may be a call, or not.
        let _nobody_called = calls.read();
        for id in ended {
            watched.remove(&id);
        }
    }
}

/// Records that an exporter has died.
fn tell(shared: &Arc<Shared>, volume: &Volume, local: LocalAttachment, exporter: &Exporter) {
    let device = local.device.as_ref().map(|device| device.display().to_string()).unwrap_or_default();
    let fault = format!(
        "the program that makes {device} of it (process {}) has died, and what was written last may be lost; umount \
         {device}, write 0 to local_attach, then available to state",
        exporter.pid
    );
    let id = volume.id;
    log::error!("volume {id}: {fault}");
    let told = fault.clone();
    let record = move |batch: &mut Batch<'_>| {
        let _it_is_as_seen = edit(batch, id, &local, |volume| volume.record.fault = Some(told.clone()));
    };
    if let Err(error) = shared.edit(Arc::new(record)) {
        log::error!("the fault of {id} is not recorded: {}", error.reason());
    }
    let caller = Caller::daemon();
    shared.parts.events.record(Entry {
        class: Some(Class::Volume),
        id: Some(id),
        name: volume.record.name.clone(),
        uid: caller.uid,
        login: caller.login,
        what: "state".to_owned(),
        from: volume.record.state().word().to_owned(),
        to: crate::model::volume::State::Error.word().to_owned(),
        errno: "EIO".to_owned(),
        reason: fault,
    });
}
