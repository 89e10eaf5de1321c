//! What exports volumes as block devices of this host, watched for its death.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use uuid::Uuid;

use super::devices::{edit, recorded};
use crate::inventory::Volume;
use crate::model::Class;
use crate::model::caller::Caller;
use crate::model::volume::record::{Exporter, LocalAttachment};
use crate::workflow::engine::Shared;
use crate::workflow::events::Entry;
use crate::workflow::ledger::Batch;

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

/// Starts the thread, which ends with the engine.
pub(in crate::workflow) fn start(shared: &Arc<Shared>) {
    let shared = shared.clone();
    let spawned = thread::Builder::new().name("exporters".to_owned()).spawn(move || watch(&shared));
    if let Err(error) = spawned {
        log::error!("no thread watches over exporters of volumes: {error}");
    }
}

/// Waits for the end of exporters, and tells of those that nobody asked to end.
fn watch(shared: &Arc<Shared>) {
    let Some(calls) = &shared.exporters.0 else { return };
    let mut watched: BTreeMap<Uuid, (Exporter, OwnedFd)> = BTreeMap::new();
    while !shared.gate.stopping() {
        let boot = shared.settings.clock.boot();
        let wanted: BTreeMap<_, _> = recorded(shared)
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
            match poll(&mut polled, PollTimeout::NONE) {
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
