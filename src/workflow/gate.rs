//! The end of the engine: who runs, and that nobody begins anything any more.

use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

#[derive(Default)]
struct State {
    stopping: bool,
    inside: usize,
}

/// Operations pass it; the engine closes it at its end.
#[derive(Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    /// Whether the engine ends: then everything is left as it is.
    pub(super) fn stopping(&self) -> bool {
        self.state.lock().stopping
    }

    /// Wakes everyone in [`Gate::sleep`] to look again.
    pub(super) fn wake(&self) {
        // Whoever has looked and does not sleep yet holds the lock.
        drop(self.state.lock());
        self.changed.notify_all();
    }

    /// Lets nobody begin anything any more.
    pub(super) fn close(&self) {
        self.state.lock().stopping = true;
        self.changed.notify_all();
    }

    /// Sleeps until the time is over, `enough` holds after a [`Gate::wake`], or the engine ends.
    pub(super) fn sleep(&self, time: Duration, enough: &dyn Fn() -> bool) {
        let deadline = Instant::now() + time;
        let mut state = self.state.lock();
        while !state.stopping && !enough() {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                return;
            }
        }
    }

    /// Counts a thread until [`Gate::leave`].
    pub(super) fn enter(&self) {
        self.state.lock().inside += 1;
    }

    /// See [`Gate::enter`].
    pub(super) fn leave(&self) {
        self.state.lock().inside -= 1;
        self.changed.notify_all();
    }

    /// Waits until all who entered have left; false if some are still inside (in a call that cannot be cancelled).
    pub(super) fn drained(&self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        let mut state = self.state.lock();
        while state.inside > 0 {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                return state.inside == 0;
            }
        }
        true
    }
}
