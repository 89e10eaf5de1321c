//! What comes in: events are received by one thread, and another asks about what they named, and about everything at each
//! interval and reconnection.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Instant;

use uuid::Uuid;

use super::{CHANNEL_PATIENCE, DeviceNews, RETRY, Reconciler};
use crate::hypervisor::{self, HypervisorError};
use crate::model::record::Departure;

/// More domains than this are asked about by a pass over all, which takes a constant number of round trips.
const BURST: usize = 64;

/// What events ask for.
#[derive(Default)]
pub(super) struct Pending {
    pub(super) changed: BTreeSet<Uuid>,
    /// Only their CPUs, as far as is known.
    frozen: BTreeSet<Uuid>,
    departed: Vec<(Uuid, Departure)>,
    /// The connection came back: everything may have changed.
    connected: bool,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.changed.is_empty() && self.frozen.is_empty() && !self.connected
    }
}

impl Reconciler {
    /// The thread that receives events: it calls nobody, so that no event waits for a call.
    pub(super) fn receive(&self, incoming: &Receiver<hypervisor::Event>) {
        loop {
            let first = match incoming.recv_timeout(CHANNEL_PATIENCE) {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) if self.stopping() => return,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            if self.stopping() {
                return;
            }
            let mut pending = self.pending.lock();
            for event in std::iter::once(first).chain(incoming.try_iter().take(BURST * BURST)) {
                match event {
                    hypervisor::Event::Changed(uuid) => {
                        pending.changed.insert(uuid);
                    }
                    hypervisor::Event::Frozen(uuid) => {
                        pending.frozen.insert(uuid);
                    }
                    hypervisor::Event::Moved(uuid) => {
                        pending.departed.push((uuid, Departure::Moved));
                        pending.changed.insert(uuid);
                    }
                    hypervisor::Event::Undefined { uuid, kept } => {
                        pending.departed.push((uuid, if kept { Departure::Moved } else { Departure::Told }));
                        pending.changed.insert(uuid);
                    }
                    hypervisor::Event::Rebooted(uuid) => {
                        *self.reboots.lock().entry(uuid).or_default() += 1;
                        *self.batches.lock() += 1;
                        self.published.notify_all();
                        pending.changed.insert(uuid);
                    }
                    hypervisor::Event::DeviceRemoved(uuid) => {
                        self.heard_of_devices(uuid, |news| news.removed += 1);
                        pending.changed.insert(uuid);
                    }
                    hypervisor::Event::DeviceKept { uuid, device } => {
                        self.heard_of_devices(uuid, |news| *news.kept.entry(device).or_default() += 1);
                    }
                    hypervisor::Event::Connected => {
                        pending.connected = true;
                        self.board.connected();
                    }
                    hypervisor::Event::Disconnected(reason) => self.board.disconnected(reason),
                }
            }
            drop(pending);
            self.pending_wake.notify_all();
        }
    }

    fn heard_of_devices(&self, uuid: Uuid, note: impl FnOnce(&mut DeviceNews)) {
        note(self.devices.lock().entry(uuid).or_default());
        *self.batches.lock() += 1;
        self.published.notify_all();
    }

    /// The thread that asks: about what events named, and about everything at each interval and reconnection.
    pub(super) fn reconcile(&self) {
        let mut next_pass = Instant::now();
        // Definitions and mirrors as a whole are due after the first pass of each connection.
        let mut details_due = true;
        loop {
            let mut pending = self.pending.lock();
            while !self.stopping() && pending.is_empty() && Instant::now() < next_pass {
                self.pending_wake.wait_until(&mut pending, next_pass);
            }
            let Pending { mut changed, frozen, departed, connected } = std::mem::take(&mut *pending);
            drop(pending);
            if !departed.is_empty() {
                let serial = self.next_question.load(Ordering::Relaxed);
                let mut stamps = self.stamps.lock();
                departed.into_iter().for_each(|(id, departure)| stamps.departed(id, departure, serial));
            }
            if self.stopping() {
                return;
            }
            details_due |= connected;
            if frozen.len() > BURST {
                changed.extend(&frozen);
            }
            if connected || changed.len() > BURST || Instant::now() >= next_pass {
                let outcome = self.pass();
                next_pass = Instant::now() + self.settings.interval;
                if outcome.is_ok() && std::mem::take(&mut details_due) {
                    self.queue_all_details();
                }
                if !reconciled(outcome) {
                    next_pass = next_pass.min(Instant::now() + RETRY);
                }
            } else {
                for id in frozen.difference(&changed) {
                    if !reconciled(self.refresh_power(*id)) {
                        next_pass = next_pass.min(Instant::now() + RETRY);
                    }
                }
                for id in &changed {
                    if !reconciled(self.refresh(*id)) {
                        next_pass = next_pass.min(Instant::now() + RETRY);
                    }
                }
            }
            if !changed.is_empty() {
                self.look_for_addresses(&changed);
                self.details.lock().fetch.extend(changed);
                self.details_wake.notify_all();
            }
        }
    }

    fn queue_all_details(&self) {
        let ids: Vec<Uuid> = self.ledger.inventory().instances().iter().map(|instance| instance.id).collect();
        let mut details = self.details.lock();
        details.fetch.extend(&ids);
        details.mirror.extend(&ids);
        drop(details);
        self.look_for_addresses(&ids);
        self.details_wake.notify_all();
    }
}

/// Whether it was; if not, and nothing else says why, says why.
fn reconciled(outcome: Result<(), HypervisorError>) -> bool {
    match outcome {
        Ok(()) => return true,
        // Health says so, and the connection's return brings a pass.
        Err(HypervisorError::Unreachable(detail)) => log::debug!("not reconciled: {detail}"),
        Err(
            error @ (HypervisorError::NoDomain
            | HypervisorError::InvalidState(_)
            | HypervisorError::Exists(_)
            | HypervisorError::Unsupported(_)
            | HypervisorError::Failed(_)),
        ) => log::warn!("not reconciled and tried again: {error}"),
    }
    false
}
