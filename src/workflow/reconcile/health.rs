//! Health of the parts: a ping a second in a thread of its own, and a second thread that notices when it hangs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::hypervisor::{Hypervisor, HypervisorError};
use crate::inventory::{Health, Inventory, Part, Update};
use crate::workflow::ledger::now;

/// How often the hypervisor is asked whether it answers.
const PING_INTERVAL: Duration = Duration::from_secs(1);

/// How long it may take before it counts as hung.
const PATIENCE: Duration = Duration::from_millis(1500);

/// Who writes to the store here; it works when it works for all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Writer {
    /// What the hypervisor reported.
    Pass,
    /// What was shown and not stored yet.
    Saver,
    /// Definitions and mirrors.
    Details,
}

/// The present health, written here only.
pub(super) struct Board {
    inventory: Arc<Inventory>,
    current: Mutex<Current>,
    ping: Mutex<Ping>,
    wake: Condvar,
}

struct Current {
    health: Health,
    /// What fails for each [`Writer`].
    store: [Option<String>; 3],
}

#[derive(Default)]
struct Ping {
    /// When the ping under way began: for the clock, and in Unix seconds.
    began: Option<(Instant, u64)>,
    /// It was noticed that this ping hangs.
    noticed: bool,
    /// The hostname was asked on this connection.
    identified: bool,
    /// The connection was lost during this ping, so its answer is not news.
    lost: bool,
    /// Ping again at once.
    again: bool,
    stopping: bool,
}

impl Board {
    pub(super) fn new(inventory: Arc<Inventory>) -> Board {
        let health = inventory.health();
        Board {
            inventory,
            current: Mutex::new(Current { health, store: [None, None, None] }),
            ping: Mutex::default(),
            wake: Condvar::new(),
        }
    }

    fn update(&self, edit: impl FnOnce(&mut Current)) {
        let mut current = self.current.lock();
        edit(&mut current);
        // Published under the lock, so that the last one published is the present one.
        self.inventory.apply(vec![Update::Health(current.health.clone())]);
    }

    pub(super) fn set_announcer(&self, part: Part) {
        self.update(|current| current.health.announcer = part);
    }

    pub(super) fn directory(&self, result: Result<(), String>) {
        self.update(|current| apply(&mut current.health.directory, result));
    }

    pub(super) fn backend(&self, name: &str, result: Result<(), String>) {
        self.update(|current| apply(current.health.backends.entry(name.to_owned()).or_default(), result));
    }

    pub(super) fn store(&self, writer: Writer, result: Result<(), String>) {
        self.update(|current| {
            current.store[writer as usize] = result.err();
            let failure = current.store.iter().flatten().next().cloned();
            apply(&mut current.health.store, failure.map_or(Ok(()), Err));
        });
    }

    /// The connection is lost.
    pub(super) fn disconnected(&self, reason: String) {
        let mut ping = self.ping.lock();
        ping.lost = true;
        self.update(|current| apply(&mut current.health.hypervisor, Err(reason)));
    }

    /// The connection is up again; whether it answers too is asked at once.
    pub(super) fn connected(&self) {
        let mut ping = self.ping.lock();
        ping.identified = false;
        ping.again = true;
        self.wake.notify_all();
    }

    pub(super) fn stop(&self) {
        self.ping.lock().stopping = true;
        self.wake.notify_all();
    }

    /// The pinging thread: the only one that waits for the answers.
    pub(super) fn ping(&self, hypervisor: &dyn Hypervisor) {
        loop {
            let began = Instant::now();
            let identified = {
                let mut ping = self.ping.lock();
                if ping.stopping {
                    return;
                }
                ping.again = false;
                ping.lost = false;
                ping.noticed = false;
                ping.began = Some((began, now()));
                self.wake.notify_all();
                ping.identified
            };
            let answer = hypervisor.ping().and_then(|()| {
                if identified { Ok(None) } else { hypervisor.identity().map(|identity| Some(identity.hostname)) }
            });
            let mut ping = self.ping.lock();
            ping.began = None;
            // After a new connection during this ping the name is asked once more.
            ping.identified |= !ping.again && matches!(answer, Ok(Some(_)));
            let answer = answer.or_else(|error| match error {
                HypervisorError::Unreachable(detail) => Err(detail),
                // A refusal is an answer.
                error @ (HypervisorError::NoDomain
                | HypervisorError::InvalidState(_)
                | HypervisorError::Exists(_)
                | HypervisorError::Unsupported(_)
                | HypervisorError::Failed(_)) => {
                    log::debug!("the hypervisor answers a ping with: {error}");
                    Ok(None)
                }
            });
            if answer.is_ok() {
                self.inventory.metrics().hypervisor_answered();
            }
            if answer.is_err() || !ping.lost {
                self.update(|current| {
                    if let Ok(Some(hostname)) = &answer {
                        current.health.hostname.clone_from(hostname);
                    }
                    apply(&mut current.health.hypervisor, answer.map(drop));
                });
            }
            while !ping.stopping && !ping.again {
                if self.wake.wait_until(&mut ping, began + PING_INTERVAL).timed_out() {
                    break;
                }
            }
        }
    }

    /// The watching thread: notices a ping that is not answered.
    pub(super) fn watch(&self) {
        let mut ping = self.ping.lock();
        while !ping.stopping {
            match ping.began {
                Some((began, since)) if !ping.noticed => {
                    if began.elapsed() < PATIENCE {
                        self.wake.wait_until(&mut ping, began + PATIENCE);
                        continue;
                    }
                    ping.noticed = true;
                    self.update(|current| match current.health.hypervisor {
                        Part::Ok => current.health.hypervisor = Part::Hung { since },
                        Part::Hung { .. } | Part::Down { .. } => {}
                    });
                }
                Some(_) | None => self.wake.wait(&mut ping),
            }
        }
    }
}

/// A part that stays down keeps the time since when it is.
fn apply(part: &mut Part, result: Result<(), String>) {
    *part = match (&*part, result) {
        (_, Ok(())) => Part::Ok,
        (Part::Down { since, .. }, Err(detail)) => Part::Down { since: *since, detail },
        (Part::Ok | Part::Hung { .. }, Err(detail)) => Part::Down { since: now(), detail },
    };
}
