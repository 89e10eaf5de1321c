//! How many copy a lot of data at once: more would only make each other slower, and the host with them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::operation::{Halt, Run};

/// The step, and the content of `phase`, while an operation waits for its turn.
pub(super) const WAITING: &str = "waiting";

/// How long a wait goes on without looking, should the wake-up get lost.
const SLICE: Duration = Duration::from_millis(200);

/// So many at once.
pub(super) struct Lanes {
    free: AtomicUsize,
}

/// The right to copy, until it is dropped.
pub(super) struct Lane<'a>(&'a Run);

impl Lanes {
    pub(super) fn new(count: usize) -> Lanes {
        Lanes { free: AtomicUsize::new(count.max(1)) }
    }

    fn try_enter(&self) -> bool {
        self.free.fetch_update(Ordering::AcqRel, Ordering::Acquire, |free| free.checked_sub(1)).is_ok()
    }
}

impl Drop for Lane<'_> {
    fn drop(&mut self) {
        self.0.shared.lanes.free.fetch_add(1, Ordering::AcqRel);
        self.0.shared.gate.wake();
    }
}

/// Waits until it is this operation's turn to copy; ends with the engine or the operation.
pub(super) fn enter(run: &Run) -> Result<Lane<'_>, Halt> {
    let lanes = &run.shared.lanes;
    if !lanes.try_enter() {
        run.begin(WAITING)?;
        while !lanes.try_enter() {
            run.proceed()?;
            // Asked with the gate's lock held, so without the gate.
            run.shared
                .gate
                .sleep(SLICE, &|| lanes.free.load(Ordering::Acquire) > 0 || run.cancel.load(Ordering::Acquire));
        }
    }
    Ok(Lane(run))
}
