//! What follows from changes of the inventory: who waits is woken, definitions are fetched, consoles watched, locks
//! mirrored.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};

use super::addresses::runs;
use super::console::Log;
use super::{CHANNEL_PATIENCE, Reconciler};
use crate::hypervisor::PowerState;
use crate::inventory::{Change, Instance, Object};

impl Reconciler {
    /// The thread that listens to the inventory: it wakes who waits, and sees what the background has to do.
    pub(super) fn listen(&self, changes: &Receiver<Arc<Vec<Change>>>) {
        loop {
            let batch = match changes.recv_timeout(CHANNEL_PATIENCE) {
                Ok(batch) => batch,
                Err(RecvTimeoutError::Timeout) if self.stopping() => return,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            *self.batches.lock() += 1;
            self.published.notify_all();
            if self.stopping() {
                return;
            }
            for change in batch.iter() {
                match change {
                    Change::Object { old: Some(Object::Instance(old)), new: Some(Object::Instance(new)) } => {
                        self.follow(Some(old), new);
                    }
                    Change::Object { old: _, new: Some(Object::Instance(new)) } => self.follow(None, new),
                    Change::Object { old: Some(Object::Instance(old)), new: None } => {
                        self.reboots.lock().remove(&old.id);
                        self.devices.lock().remove(&old.id);
                        if let Some(console) = &self.console {
                            console.watch(old.id, None);
                        }
                        self.forget_addresses(old.id);
                    }
                    Change::Object { .. }
                    | Change::Health
                    | Change::Events(_)
                    | Change::Console(..)
                    | Change::Moved(..) => {}
                }
            }
        }
    }

    fn follow(&self, old: Option<&Arc<Instance>>, new: &Arc<Instance>) {
        if old.is_none_or(|old| console_log(self, old) != console_log(self, new)) {
            self.watch_console(new);
        }
        if old.is_none_or(|old| runs(old) != runs(new) || old.record.launched_at != new.record.launched_at) {
            self.watch_addresses(new);
        }
        let record = &new.record;
        if record.draft.is_some() || new.domain.is_none() {
            return;
        }
        if record.definition.is_none() {
            self.details.lock().fetch.insert(new.id);
            self.details_wake.notify_all();
        }
        let mirrored = |instance: &Instance| {
            let record = &instance.record;
            (
                record.draft,
                record.protection.clone(),
                record.ownership,
                record.description.clone(),
                record.definition.as_ref().map(|definition| definition.description.clone()),
                instance.domain.as_ref().map(|domain| domain.has_managed_save),
            )
        };
        if old.is_some_and(|old| mirrored(old) != mirrored(new)) {
            self.mirror(new.id);
        }
    }

    pub(super) fn watch_console(&self, instance: &Instance) {
        if let Some(console) = &self.console {
            console.watch(instance.id, console_log(self, instance));
        }
    }
}

/// The console log of a running instance: the one that its definition names, else where those of ours are.
fn console_log(reconciler: &Reconciler, instance: &Instance) -> Option<Log> {
    match instance.domain.as_ref()?.power {
        PowerState::Running | PowerState::Paused | PowerState::PmSuspended => {}
        PowerState::ShutOff | PowerState::Crashed => return None,
    }
    let usual = reconciler.settings.state_directory.join("consoles").join(format!("{}.log", instance.id));
    let named = instance.record.definition.as_ref().and_then(|definition| definition.console_log.clone());
    let path = named.unwrap_or_else(|| usual.clone());
    // Whose disk we made, his definition we wrote.
    Some(Log { is_ours: path == usual && !instance.record.disks.is_empty(), path })
}
