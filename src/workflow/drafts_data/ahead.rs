//! Writes that are acknowledged before they are carried out, so that a writer fetches its next bytes meanwhile.
//!
//! Only such a write is acknowledged early as goes on where the last one ended, at the end of the data, into space that is
//! reserved: it cannot fail for want of space. One handle of a draft at a time has that right. Every other change, through
//! whichever handle, ends it when it is queued, and is not begun before everything acknowledged is carried out; the right
//! is given again by a change that ends with no other one queued. So nothing comes between a promise and its keeping.
//! Whoever reads waits for what was acknowledged before he asked. And nobody waits for a thread that waits for him: each
//! waits for what was acknowledged before him only, and behind a queued change nothing is acknowledged.

use parking_lot::{Condvar, Mutex, MutexGuard};

/// Bytes that may be acknowledged and not be written yet: enough that a writer does not wait for one slow write, few
/// enough that they are soon in the file.
const MOST_AHEAD: u64 = 4 << 20;

/// What all handles of one draft know of each other.
#[derive(Default)]
pub(super) struct Ahead {
    state: Mutex<State>,
    kept: Condvar,
}

/// What becomes of a write that is queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// It is acknowledged now, and nothing that was acknowledged is before it.
    First,
    /// It is acknowledged now.
    Now,
    /// It is as good, but enough is ahead already: it is acknowledged when it is written.
    Enough,
    /// It is a change like any other.
    Change,
}

/// What was acknowledged until some moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark(u64);

/// The right to write on from the end of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Right {
    /// Whose.
    pub handle: u64,
    /// Where the next write has to begin.
    pub next: u64,
    /// Up to where space is reserved.
    pub end: u64,
}

/// As it is while it is locked: what is decided by it has to be queued before that ends.
#[derive(Default)]
pub(super) struct State {
    right: Option<Right>,
    /// Who has, or had last, the right.
    holder: u64,
    /// Where the last acknowledged write ends.
    length: u64,
    /// Bytes that were ever acknowledged early, and those of them that were carried out.
    acknowledged: u64,
    carried_out: u64,
    /// Other changes that are queued or being made.
    changes: usize,
    handles: u64,
}

impl State {
    /// A write is queued; `may` says whether it may be acknowledged early at all.
    pub(super) fn write(&mut self, handle: u64, offset: u64, length: u64, may: bool) -> Decision {
        let pending = self.pending();
        let fits = |right: &Right| offset.checked_add(length).is_some_and(|end| end <= right.end);
        match &mut self.right {
            Some(right) if may && right.handle == handle && right.next == offset && fits(right) => {
                right.next += length;
                self.length = right.next;
                self.acknowledged += length;
                match pending + length {
                    _ if pending == 0 => Decision::First,
                    ahead if ahead <= MOST_AHEAD => Decision::Now,
                    _ => Decision::Enough,
                }
            }
            Some(_) | None => {
                self.change();
                Decision::Change
            }
        }
    }

    /// Another change is queued.
    pub(super) fn change(&mut self) {
        self.right = None;
        self.changes += 1;
    }

    /// What is acknowledged by now.
    pub(super) fn mark(&self) -> Mark {
        Mark(self.acknowledged)
    }

    fn pending(&self) -> u64 {
        self.acknowledged - self.carried_out
    }
}

impl Ahead {
    /// A new handle's number.
    pub(super) fn handle(&self) -> u64 {
        let mut state = self.state.lock();
        state.handles += 1;
        state.handles
    }

    /// Held while something is queued, so that the queue has the order of the decisions.
    pub(super) fn order(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Returns when a queued change may begin.
    pub(super) fn begin_change(&self) {
        let mut state = self.state.lock();
        while state.pending() > 0 {
            self.kept.wait(&mut state);
        }
    }

    /// A change has ended. `right`: what it can give, which is given if no other change is queued.
    pub(super) fn end_change(&self, right: Option<Right>) {
        let mut state = self.state.lock();
        state.changes -= 1;
        if let Some(right) = right
            && state.changes == 0
        {
            (state.right, state.holder) = (Some(right), right.handle);
        }
    }

    /// An acknowledged write was carried out, or has failed.
    pub(super) fn carried_out(&self, length: u64) {
        self.state.lock().carried_out += length;
        self.kept.notify_all();
    }

    /// How much is left of a handle's right; `None`: it has none.
    pub(super) fn left(&self, handle: u64) -> Option<u64> {
        let right = self.state.lock().right.filter(|right| right.handle == handle)?;
        Some(right.end - right.next)
    }

    /// More is reserved for a handle, if it has the right still.
    pub(super) fn extend(&self, handle: u64, end: u64) {
        if let Some(right) = &mut self.state.lock().right
            && right.handle == handle
        {
            right.end = right.end.max(end);
        }
    }

    /// Nobody has the right any more.
    pub(super) fn end_right(&self) {
        self.state.lock().right = None;
    }

    /// Waits for what was acknowledged up to a mark; for a handle's thread, one that was taken before it was told to.
    pub(super) fn settle(&self, mark: Mark) {
        let mut state = self.state.lock();
        while state.carried_out < mark.0 {
            self.kept.wait(&mut state);
        }
    }

    /// What is acknowledged by now.
    pub(super) fn mark(&self) -> Mark {
        self.state.lock().mark()
    }

    /// How long the data is at least, for what was acknowledged.
    pub(super) fn length(&self) -> u64 {
        let state = self.state.lock();
        if state.pending() > 0 { state.length } else { 0 }
    }

    /// The thread of a handle ends; what it has not carried out it never will, and nobody is to wait for that.
    pub(super) fn abandon(&self, handle: u64) {
        let mut state = self.state.lock();
        if state.holder == handle {
            state.right = None;
            state.carried_out = state.acknowledged;
            self.kept.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(end: u64) -> Ahead {
        let ahead = Ahead::default();
        ahead.order().change();
        ahead.end_change(Some(Right { handle: 1, next: 100, end }));
        ahead
    }

    #[test]
    fn only_what_goes_on_into_reserved_space_is_acknowledged_early() {
        for (handle, offset, length, may) in
            [(2, 100, 10, true), (1, 90, 10, true), (1, 101, 10, true), (1, 100, 101, true), (1, 100, 10, false)]
        {
            let ahead = held(200);
            assert_eq!(
                ahead.order().write(handle, offset, length, may),
                Decision::Change,
                "{handle} {offset} {length}"
            );
            assert_eq!(ahead.order().write(1, 100, 10, true), Decision::Change, "a change ends the right");
        }
        let ahead = held(200);
        assert_eq!(ahead.order().write(1, 100, 60, true), Decision::First);
        assert_eq!(ahead.order().write(1, 160, 40, true), Decision::Now);
        assert_eq!((ahead.length(), ahead.left(1)), (200, Some(0)));
        ahead.carried_out(100);
        assert_eq!(ahead.length(), 0, "then the file says it");
    }

    #[test]
    fn no_more_is_ahead_than_is_allowed() {
        let ahead = held(u64::MAX);
        assert_eq!(ahead.order().write(1, 100, 1, true), Decision::First);
        assert_eq!(ahead.order().write(1, 101, MOST_AHEAD - 1, true), Decision::Now);
        assert_eq!(ahead.order().write(1, 100 + MOST_AHEAD, 1, true), Decision::Enough);
        ahead.carried_out(MOST_AHEAD);
        assert_eq!(ahead.order().write(1, 101 + MOST_AHEAD, 1, true), Decision::Now);
    }

    #[test]
    fn a_right_is_not_given_before_a_queued_change() {
        let ahead = Ahead::default();
        ahead.order().change();
        ahead.order().change();
        let right = Right { handle: 1, next: 0, end: 10 };
        ahead.end_change(Some(right));
        assert_eq!(ahead.left(1), None);
        ahead.end_change(Some(right));
        assert_eq!(ahead.left(1), Some(10));
    }
}
