//! What keeps the promise of protection against those who do not ask here: a thread that sees protected domains go and
//! has them defined again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::define_again;
use super::engine::Shared;
use super::request::{Request, Submission, Wait};
use crate::inventory::{Change, Object};
use crate::model::caller::Caller;
use crate::model::reason::Reason;

/// Whoever undefines a domain to define it anew, as some tools do to change it, has this long.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often the thread looks whether it is to end.
const CHANNEL_PATIENCE: Duration = Duration::from_secs(1);

/// Starts the thread, which ends with the engine.
pub(super) fn start(shared: &Arc<Shared>) {
    let changes = shared.parts.ledger.inventory().subscribe();
    let shared = shared.clone();
    let spawned = thread::Builder::new().name("protector".to_owned()).spawn(move || {
        let (busy, refused) = channel();
        Keeping { shared, due: BTreeMap::new(), busy, refused }.run(&changes);
    });
    if let Err(error) = spawned {
        log::error!("no thread watches over protected domains: {error}");
    }
}

struct Keeping {
    shared: Arc<Shared>,
    /// When each is to be defined again.
    due: BTreeMap<Uuid, Instant>,
    /// Those that an operation still owned.
    busy: Sender<Uuid>,
    refused: Receiver<Uuid>,
}

impl Keeping {
    fn run(mut self, changes: &Receiver<Arc<Vec<Change>>>) {
        while !self.shared.gate.stopping() {
            let now = Instant::now();
            let wait = self.due.values().min().map_or(CHANNEL_PATIENCE, |due| due.saturating_duration_since(now));
            match changes.recv_timeout(wait.min(CHANNEL_PATIENCE)) {
                Ok(batch) => batch.iter().for_each(|change| self.see(change)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            for id in self.refused.try_iter() {
                self.due.insert(id, Instant::now() + PATIENCE);
            }
            self.define_what_is_due();
        }
    }

    fn see(&mut self, change: &Change) {
        match change {
            Change::Object { old: Some(Object::Instance(old)), new: Some(Object::Instance(new)) } => {
                // Only what was protected when it went, and went while we looked.
                if define_again::is_wanted(new) && !define_again::is_wanted(old) && old.record.protection.protects() {
                    self.due.entry(new.id).or_insert_with(|| Instant::now() + PATIENCE);
                }
            }
            Change::Object { .. } | Change::Health | Change::Events(_) | Change::Console(..) | Change::Moved(..) => {}
        }
    }

    fn define_what_is_due(&mut self) {
        let now = Instant::now();
        let due: Vec<Uuid> = self.due.iter().filter(|(_, at)| **at <= now).map(|(id, _)| *id).collect();
        for id in due {
            self.due.remove(&id);
            let instance = self.shared.parts.ledger.inventory().instance(id);
            if instance.is_some_and(|instance| define_again::is_wanted(&instance)) {
                self.define_again(id);
            }
        }
    }

    fn define_again(&self, id: Uuid) {
        let busy = self.busy.clone();
        self.shared.submit(Submission {
            caller: Caller::daemon(),
            file: "state".to_owned(),
            request: Request::DefineAgain { id },
            wait: Wait::Accepted,
            done: Box::new(move |result| match result {
                Ok(()) => {}
                // What owns it now may end without having defined it.
                Err(Reason::Busy { .. }) => drop(busy.send(id)),
                Err(reason) => log::warn!("the protected domain {id} stays undefined: {reason}"),
            }),
        });
    }
}
