//! Keeps one connection up: a thread of its own connects, hears of the end, and connects again every second.
//!
//! Only that thread opens and closes it, so that nobody else hangs when a daemon is stopped in the middle of an answer.
//! Callers take what is present from a slot under a lock that nobody holds during a call.
//!
//! That connection is for events. Each call has a connection of its own, a lane: libvirt before 10.3 crashes its client
//! when one thread sends while another waits on the same connection (CVE-2024-4418), and a libvirtd works on five calls
//! of one connection at a time, so that five slow ones would stop all others. Drivers inside our process have no such
//! limits, and one connection.

use std::collections::HashSet;
use std::ffi::c_int;
use std::sync::Arc;
use std::sync::mpsc::Sender as EventSender;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use parking_lot::Mutex;
use uuid::Uuid;
use virt::connect::Connect;
use virt::error::Error;

use super::sys::events::{Lifecycle, Listener, Subscription, close_reason};
use super::{Target, embed};
use crate::hypervisor::{Event, HypervisorError};

/// How long to wait before the next attempt.
const RETRY: Duration = Duration::from_secs(1);
/// libvirt's keepalive for other hosts, as virsh has it: a connection that is silent for 5 s is asked, at most 6 times.
/// On this host the socket says when the daemon is gone, and one that hangs shall end no call: its outcome would be
/// unknown.
const KEEPALIVE_SECONDS: i32 = 5;
const KEEPALIVE_COUNT: u32 = 6;

/// How many lanes wait for the next call; more than these are closed after theirs.
const IDLE_LANES: usize = 64;

/// An open connection, and which one it is: numbers grow with each new one.
#[derive(Clone)]
pub(super) struct Current {
    connection: Arc<Connect>,
    generation: u64,
    /// None where callers share the connection.
    lanes: Option<Arc<Lanes>>,
}

/// The connections of calls that belong to one connection for events.
struct Lanes {
    target: Target,
    idle: Mutex<Vec<Connect>>,
}

impl Current {
    /// Runs one or more calls, on a connection that no other thread uses meanwhile. May hang, as each call may.
    pub(super) fn call<T>(&self, body: impl FnOnce(&Connect) -> Result<T, Error>) -> Result<T, Failure> {
        let Some(lanes) = &self.lanes else {
            return body(&self.connection).map_err(|error| Failure { error, alive: is_alive(&self.connection) });
        };
        let idle = lanes.idle.lock().pop();
        let lane = match idle {
            Some(lane) => lane,
            None => open(&lanes.target).map_err(|error| Failure { error, alive: false })?,
        };
        let result = body(&lane).map_err(|error| Failure { error, alive: is_alive(&lane) });
        if result.as_ref().err().is_none_or(|failure| failure.alive) {
            let mut idle = lanes.idle.lock();
            if idle.len() < IDLE_LANES {
                idle.push(lane);
            }
        }
        result
    }
}

impl Current {
    /// A connection for something that lasts: one of its own, or the one that all share.
    pub(super) fn lasting(&self) -> Result<Arc<Connect>, Failure> {
        match &self.lanes {
            None => Ok(Arc::clone(&self.connection)),
            Some(lanes) => open(&lanes.target).map(Arc::new).map_err(|error| Failure { error, alive: false }),
        }
    }
}

/// A call that failed, and whether its connection is still alive.
pub(super) struct Failure {
    pub(super) error: Error,
    pub(super) alive: bool,
}

fn is_alive(connection: &Connect) -> bool {
    connection.is_alive().unwrap_or(false)
}

/// Opens a connection; hangs as long as the daemon does.
fn open(target: &Target) -> Result<Connect, Error> {
    let connection = Connect::open(Some(target.uri()))?;
    if !target.is_in_process() && !target.is_local_qemu() {
        // A driver without keepalive says so, which is no reason to do without the driver.
        let _ = connection.set_keep_alive(KEEPALIVE_SECONDS, KEEPALIVE_COUNT);
    }
    Ok(connection)
}

enum Slot {
    Up(Current),
    Down(String),
}

enum Message {
    /// Connect now, and say how it went.
    Attempt(Sender<Result<(), HypervisorError>>),
    /// libvirt said that this connection ended.
    Lost { generation: u64, reason: String },
    /// A call on this connection failed in a way that a broken connection would explain.
    Suspect { generation: u64 },
    /// Close and end.
    Stop,
}

/// The connection of one [`super::Libvirt`].
pub(super) struct Keeper {
    slot: Arc<Mutex<Slot>>,
    inbox: Sender<Message>,
}

impl Keeper {
    /// Starts the thread, which connects when [`Keeper::connect`] says so.
    pub(super) fn start(target: Target, events: EventSender<Event>) -> Result<Self, HypervisorError> {
        let (inbox, messages) = unbounded();
        let slot = Arc::new(Mutex::new(Slot::Down("not connected yet".to_owned())));
        let thread = Thread {
            target,
            slot: Arc::clone(&slot),
            inbox: inbox.clone(),
            events,
            migrated: Arc::default(),
            link: None,
            generation: 0,
            attempted: false,
        };
        std::thread::Builder::new()
            .name("libvirt-connection".to_owned())
            .spawn(move || thread.run(&messages))
            .map_err(|error| HypervisorError::Failed(format!("cannot start the connection's thread: {error}")))?;
        Ok(Self { slot, inbox })
    }

    /// Connects, if it is not connected; after the first call the thread goes on trying by itself.
    pub(super) fn connect(&self) -> Result<(), HypervisorError> {
        let (reply, answer) = bounded(1);
        let _ = self.inbox.send(Message::Attempt(reply));
        answer
            .recv()
            .unwrap_or_else(|_| Err(HypervisorError::Unreachable("the connection's thread has ended".to_owned())))
    }

    /// The present connection.
    pub(super) fn current(&self) -> Result<Current, HypervisorError> {
        match &*self.slot.lock() {
            Slot::Up(current) => Ok(current.clone()),
            Slot::Down(reason) => Err(HypervisorError::Unreachable(reason.clone())),
        }
    }

    /// Has the thread look whether this connection is still alive.
    pub(super) fn suspect(&self, current: &Current) {
        let _ = self.inbox.send(Message::Suspect { generation: current.generation });
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let _ = self.inbox.send(Message::Stop);
    }
}

/// What an open connection consists of. The subscription is declared first, so that it ends first.
struct Link {
    _subscription: Subscription,
    current: Current,
}

struct Thread {
    target: Target,
    slot: Arc<Mutex<Slot>>,
    inbox: Sender<Message>,
    events: EventSender<Event>,
    migrated: Arc<Mutex<HashSet<Uuid>>>,
    link: Option<Link>,
    generation: u64,
    attempted: bool,
}

impl Thread {
    fn run(mut self, messages: &Receiver<Message>) {
        loop {
            let message = if self.attempted && self.link.is_none() {
                messages.recv_timeout(RETRY)
            } else {
                messages.recv().map_err(|_| RecvTimeoutError::Disconnected)
            };
            match message {
                Ok(Message::Attempt(reply)) => {
                    let _ = reply.send(self.attempt());
                }
                Ok(Message::Lost { generation, reason }) => self.lose(generation, &reason),
                Ok(Message::Suspect { generation }) => self.examine(generation),
                Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    let _ = self.attempt();
                }
            }
        }
        *self.slot.lock() = Slot::Down("the connection was closed".to_owned());
    }

    fn attempt(&mut self) -> Result<(), HypervisorError> {
        if self.link.is_some() {
            return Ok(());
        }
        self.attempted = true;
        match self.open() {
            Ok(link) => {
                log::info!("connected to {}", self.target.uri());
                *self.slot.lock() = Slot::Up(link.current.clone());
                self.link = Some(link);
                let _ = self.events.send(Event::Connected);
                Ok(())
            }
            Err(error) => {
                log::debug!("cannot connect to {}: {error}", self.target.uri());
                let reason = match &error {
                    HypervisorError::Unreachable(reason) => reason.clone(),
                    HypervisorError::NoDomain
                    | HypervisorError::InvalidState(_)
                    | HypervisorError::Exists(_)
                    | HypervisorError::Unsupported(_)
                    | HypervisorError::Failed(_) => error.to_string(),
                };
                *self.slot.lock() = Slot::Down(reason);
                Err(error)
            }
        }
    }

    fn open(&mut self) -> Result<Link, HypervisorError> {
        if let Some(root) = self.target.embed_root() {
            embed::prepare(root).map_err(HypervisorError::Failed)?;
        }
        let unreachable =
            |error: Error| HypervisorError::Unreachable(format!("{}: {}", self.target.uri(), error.message()));
        let connection = Arc::new(open(&self.target).map_err(unreachable)?);
        self.generation += 1;
        let listener: Arc<dyn Listener> = Arc::new(Messenger {
            generation: self.generation,
            inbox: self.inbox.clone(),
            events: self.events.clone(),
            migrated: Arc::clone(&self.migrated),
        });
        let subscription =
            Subscription::new(Arc::clone(&connection), &listener, !self.target.is_in_process()).map_err(unreachable)?;
        let lanes = Lanes { target: self.target.clone(), idle: Mutex::default() };
        let lanes = (!self.target.is_in_process()).then(|| Arc::new(lanes));
        Ok(Link { _subscription: subscription, current: Current { connection, generation: self.generation, lanes } })
    }

    fn examine(&mut self, generation: u64) {
        let dead = self
            .link
            .as_ref()
            .is_some_and(|link| link.current.generation == generation && !is_alive(&link.current.connection));
        if dead {
            self.lose(generation, "the connection to libvirt broke");
        }
    }

    fn lose(&mut self, generation: u64, reason: &str) {
        let Some(link) = self.link.take_if(|link| link.current.generation == generation) else {
            return;
        };
        log::warn!("lost {}: {reason}", self.target.uri());
        *self.slot.lock() = Slot::Down(reason.to_owned());
        let _ = self.events.send(Event::Disconnected(reason.to_owned()));
        drop(link);
    }
}

/// Carries events from libvirt's thread to the receiver; never calls libvirt.
struct Messenger {
    generation: u64,
    inbox: Sender<Message>,
    events: EventSender<Event>,
    /// Domains that were seen to migrate away: an undefine that follows is part of the migration.
    migrated: Arc<Mutex<HashSet<Uuid>>>,
}

impl Listener for Messenger {
    fn lifecycle(&self, uuid: Uuid, event: c_int, detail: c_int) {
        let event = match Lifecycle::of(event, detail) {
            Lifecycle::Undefined { renamed } => {
                let migrated = self.migrated.lock().remove(&uuid);
                Event::Undefined { uuid, kept: renamed || migrated }
            }
            Lifecycle::MigratedAway => {
                self.migrated.lock().insert(uuid);
                Event::Moved(uuid)
            }
            Lifecycle::Arrived => {
                self.migrated.lock().remove(&uuid);
                Event::Changed(uuid)
            }
            Lifecycle::Frozen => Event::Frozen(uuid),
            Lifecycle::Other => Event::Changed(uuid),
        };
        let _ = self.events.send(event);
    }

    fn changed(&self, uuid: Uuid) {
        let _ = self.events.send(Event::Changed(uuid));
    }

    fn rebooted(&self, uuid: Uuid) {
        let _ = self.events.send(Event::Rebooted(uuid));
    }

    fn device_removed(&self, uuid: Uuid) {
        let _ = self.events.send(Event::DeviceRemoved(uuid));
    }

    fn device_kept(&self, uuid: Uuid, alias: String) {
        let _ = self.events.send(Event::DeviceKept { uuid, device: alias });
    }

    fn closed(&self, reason: c_int) {
        let _ = self.inbox.send(Message::Lost { generation: self.generation, reason: close_reason(reason).to_owned() });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    // Numbers of libvirt's lifecycle events: DEFINED 0, UNDEFINED 1, STARTED 2, STOPPED 5.
    const UNDEFINED: c_int = 1;
    const STARTED: c_int = 2;
    const STOPPED: c_int = 5;

    fn messenger() -> (Messenger, Receiver<Event>) {
        let (events, received) = channel();
        let messenger = Messenger { generation: 1, inbox: unbounded().0, events, migrated: Arc::default() };
        (messenger, received)
    }

    fn undefined_after(before: &[(c_int, c_int)], detail: c_int) -> bool {
        let (messenger, received) = messenger();
        let uuid = Uuid::from_u128(7);
        for (event, detail) in before {
            messenger.lifecycle(uuid, *event, *detail);
        }
        messenger.lifecycle(uuid, UNDEFINED, detail);
        match received.try_iter().last() {
            Some(Event::Undefined { uuid: seen, kept }) if seen == uuid => kept,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_undefine_is_final_unless_libvirt_says_renamed_or_migrated() {
        assert!(!undefined_after(&[], 0));
        assert!(undefined_after(&[], 1));
        assert!(undefined_after(&[(STOPPED, 3)], 0));
        assert!(!undefined_after(&[(STOPPED, 0)], 0));
    }

    #[test]
    fn a_guest_that_leaves_is_told_of_before_its_definition_goes() {
        let (messenger, received) = messenger();
        messenger.lifecycle(Uuid::from_u128(7), STOPPED, 3);
        assert_eq!(received.try_iter().last(), Some(Event::Moved(Uuid::from_u128(7))));
    }

    #[test]
    fn a_domain_that_came_back_after_a_migration_can_be_undefined_for_good() {
        assert!(!undefined_after(&[(STOPPED, 3), (STARTED, 2), (STOPPED, 1)], 0));
    }
}
