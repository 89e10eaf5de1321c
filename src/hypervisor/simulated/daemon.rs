//! The simulated daemon between the caller and the host: it answers, fails, hangs, comes late, or is away, as tests
//! wish. A call that hangs is like one in libvirt: it cannot be taken back, and still takes effect when it goes on.

use std::collections::BTreeMap;
use std::sync::mpsc::Sender;
use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use super::disk::DaemonState;
use super::host::Host;
use crate::hypervisor::{Event, HypervisorError};

/// What a fault does to a call.
#[derive(Clone, Debug)]
pub(super) enum Mode {
    /// It is refused.
    Fail(HypervisorError),
    /// It hangs until it is released.
    Hang,
    /// It takes effect, and returns, after so many milliseconds.
    Late(u64),
    /// The connection breaks during the call.
    Disconnect {
        /// Why, as the caller hears it.
        reason: String,
        /// The call took effect before.
        applied: bool,
        /// The connection is back after so many milliseconds.
        back_after_ms: Option<u64>,
    },
}

/// A fault that waits for its call.
pub(super) struct Fault {
    pub(super) call: String,
    pub(super) uuid: Option<Uuid>,
    pub(super) mode: Mode,
    /// How many calls it will meet; for ever if `None`.
    pub(super) times: Option<u32>,
}

/// When a call that was taken goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wake {
    /// When its fault is released.
    Released,
    /// When the daemon runs again.
    Resumed,
    /// At this time, in milliseconds of the epoch.
    At(u64),
}

/// A call that was taken and not answered.
pub(super) struct Pending {
    pub(super) call: &'static str,
    pub(super) uuid: Option<Uuid>,
    pub(super) wake: Wake,
    /// Does it, and answers whoever still waits.
    pub(super) effect: Box<dyn FnOnce(&mut Host) + Send>,
    /// Tells who waits that the connection broke. The effect still happens.
    pub(super) abandon: Box<dyn Fn(HypervisorError) + Send>,
}

/// The daemon, the connection to it, and the host below.
pub(super) struct Daemon {
    pub(super) host: Host,
    state: DaemonState,
    /// Somebody has connected, or tried to: from then on the connection is kept up.
    wanted: bool,
    /// Everything has ended; the directory may be somebody else's.
    closed: bool,
    back_at: Option<u64>,
    pub(super) faults: Vec<Fault>,
    pending: Vec<Pending>,
    calls: BTreeMap<&'static str, u64>,
    subscribers: Vec<Sender<Event>>,
    /// Events that a hung daemon has not sent.
    held_back: Vec<Event>,
}

impl Daemon {
    pub(super) fn new(host: Host, state: DaemonState) -> Daemon {
        Daemon {
            host,
            state,
            wanted: false,
            closed: false,
            back_at: None,
            faults: Vec::new(),
            pending: Vec::new(),
            calls: BTreeMap::new(),
            subscribers: Vec::new(),
            held_back: Vec::new(),
        }
    }

    pub(super) fn subscribe(&mut self, subscriber: Sender<Event>) {
        self.subscribers.push(subscriber);
    }

    pub(super) fn count(&mut self, call: &'static str) {
        *self.calls.entry(call).or_default() += 1;
    }

    pub(super) fn counters(&self) -> &BTreeMap<&'static str, u64> {
        &self.calls
    }

    pub(super) fn reset_counters(&mut self) {
        self.calls.clear();
    }

    pub(super) fn pending(&self) -> impl Iterator<Item = &Pending> {
        self.pending.iter()
    }

    pub(super) fn hung(&self) -> bool {
        self.state.hung
    }

    pub(super) fn down(&self) -> Option<&str> {
        self.state.down.as_deref()
    }

    pub(super) fn closed(&self) -> bool {
        self.closed
    }

    /// Whether a call gets through at all.
    pub(super) fn reachable(&self) -> Result<(), HypervisorError> {
        if self.closed {
            return Err(unreachable("the simulated host was closed"));
        }
        if let Some(reason) = &self.state.down {
            return Err(unreachable(reason));
        }
        if !self.wanted {
            return Err(unreachable("not connected yet"));
        }
        Ok(())
    }

    /// The connection is wanted from now on.
    pub(super) fn want(&mut self) {
        self.wanted = true;
    }

    /// The mode of the first fault that meets this call.
    pub(super) fn meet_fault(&mut self, call: &str, uuid: Option<Uuid>) -> Option<Mode> {
        let index =
            self.faults.iter().position(|fault| fault.call == call && (fault.uuid.is_none() || fault.uuid == uuid))?;
        let fault = &mut self.faults[index];
        let mode = fault.mode.clone();
        if let Some(times) = &mut fault.times {
            *times -= 1;
            if *times == 0 {
                self.faults.remove(index);
            }
        }
        Some(mode)
    }

    pub(super) fn take(&mut self, pending: Pending) {
        self.pending.push(pending);
    }

    /// Sends what has happened on the host, in order; a hung daemon holds it back, without a connection it is lost.
    pub(super) fn publish(&mut self) {
        let events = self.host.take_events();
        if self.state.down.is_some() || !self.wanted {
            return;
        }
        if self.state.hung {
            self.held_back.extend(events);
            return;
        }
        for event in events {
            self.send(&event);
        }
    }

    pub(super) fn send(&mut self, event: &Event) {
        self.subscribers.retain(|subscriber| subscriber.send(event.clone()).is_ok());
    }

    /// Breaks the connection. Calls that were taken get no answer and happen later nevertheless.
    pub(super) fn disconnect(&mut self, reason: &str) -> Result<(), HypervisorError> {
        let state = DaemonState { down: Some(reason.to_owned()), hung: self.state.hung };
        self.host.disk.write_daemon(&state)?;
        self.state = state;
        self.back_at = None;
        self.held_back.clear();
        for pending in &self.pending {
            (pending.abandon)(unreachable(reason));
        }
        if self.wanted {
            self.send(&Event::Disconnected(reason.to_owned()));
        }
        Ok(())
    }

    /// Has the connection come back at this time, in milliseconds of the epoch.
    pub(super) fn come_back_at(&mut self, at_ms: u64) {
        self.back_at = Some(at_ms);
    }

    pub(super) fn reconnect(&mut self) -> Result<(), HypervisorError> {
        self.back_at = None;
        if self.state.down.is_none() {
            return Ok(());
        }
        let state = DaemonState { down: None, hung: self.state.hung };
        self.host.disk.write_daemon(&state)?;
        self.state = state;
        if self.wanted {
            self.send(&Event::Connected);
        }
        Ok(())
    }

    /// Stops the whole daemon, as SIGSTOP does.
    pub(super) fn hang(&mut self) -> Result<(), HypervisorError> {
        let state = DaemonState { down: self.state.down.clone(), hung: true };
        self.host.disk.write_daemon(&state)?;
        self.state = state;
        Ok(())
    }

    /// Lets it run again: events that it held back first, then the calls that it had taken.
    pub(super) fn resume(&mut self) -> Result<(), HypervisorError> {
        let state = DaemonState { down: self.state.down.clone(), hung: false };
        self.host.disk.write_daemon(&state)?;
        self.state = state;
        for event in std::mem::take(&mut self.held_back) {
            self.send(&event);
        }
        self.finish(|pending| pending.wake == Wake::Resumed);
        Ok(())
    }

    /// Removes the faults of this call and lets those go on that hang in them; all if `None`.
    pub(super) fn release(&mut self, call: Option<&str>, uuid: Option<Uuid>) -> usize {
        let meant = |its_call: &str, its_uuid: Option<Uuid>| {
            call.is_none_or(|call| call == its_call) && (uuid.is_none() || uuid == its_uuid)
        };
        self.faults.retain(|fault| !meant(&fault.call, fault.uuid));
        let mut released = 0;
        for pending in &mut self.pending {
            if pending.wake == Wake::Released && meant(pending.call, pending.uuid) {
                pending.wake = Wake::Resumed;
                released += 1;
            }
        }
        if !self.state.hung {
            self.finish(|pending| pending.wake == Wake::Resumed);
        }
        released
    }

    /// Does what is due, and says when the next thing will be, in milliseconds of the epoch.
    pub(super) fn run_due(&mut self) -> Option<u64> {
        let now = now_ms();
        // Guests live on while the daemon is stopped or away.
        if let Err(error) = self.host.run_due(now) {
            log::error!("simulated guests cannot go on: {error}");
            return None;
        }
        self.publish();
        if self.back_at.is_some_and(|at| at <= now)
            && let Err(error) = self.reconnect()
        {
            log::error!("the simulated daemon cannot come back: {error}");
        }
        let mut next: Vec<u64> = self.host.next_due().into_iter().chain(self.back_at).collect();
        if !self.state.hung {
            self.finish(|pending| match pending.wake {
                Wake::At(at) => at <= now,
                Wake::Released | Wake::Resumed => false,
            });
            next.extend(self.host.next_due());
            next.extend(self.pending.iter().filter_map(|pending| match pending.wake {
                Wake::At(at) => Some(at),
                Wake::Released | Wake::Resumed => None,
            }));
        }
        next.into_iter().min()
    }

    /// Ends everything. Calls that were taken, and whose callers have left, will not happen any more.
    pub(super) fn close(&mut self) {
        self.closed = true;
        self.pending.clear();
        self.subscribers.clear();
        self.host.disk.release();
    }

    fn finish(&mut self, due: impl Fn(&Pending) -> bool) {
        let (now, later): (Vec<Pending>, Vec<Pending>) =
            std::mem::take(&mut self.pending).into_iter().partition(|pending| due(pending));
        self.pending = later;
        for pending in now {
            (pending.effect)(&mut self.host);
            self.publish();
        }
    }
}

pub(super) fn unreachable(reason: &str) -> HypervisorError {
    HypervisorError::Unreachable(reason.to_owned())
}

/// Milliseconds of the epoch.
pub(super) fn now_ms() -> u64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
}
