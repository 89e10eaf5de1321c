//! A store that loses power, for tests: after one chosen commit it answers nothing any more, as if the process had
//! died there. A test runs its work once for each `n` and both moments, opens the underlying store again, and looks
//! whether recovery finds a way.

use std::sync::mpsc::{Receiver, channel};

use parking_lot::Mutex;

use super::{Change, Committed, Compare, Record, Revision, Store, StoreError};

/// Where in the n-th [`Store::transact`] the power goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Before the transaction: it is not applied.
    Before,
    /// After it was made durable, before the caller hears of it.
    After,
}

/// A [`Store`] whose power goes in the n-th transaction; that one and everything after it answers
/// [`StoreError::Failed`].
pub struct PowerLoss<S: Store> {
    inner: S,
    at: u64,
    moment: Moment,
    progress: Mutex<Progress>,
}

#[derive(Default)]
struct Progress {
    transactions: u64,
    lost: bool,
}

impl<S: Store> PowerLoss<S> {
    /// The power goes in the `at`-th call of [`Store::transact`], counted from 1; 0 is never.
    pub fn new(inner: S, at: u64, moment: Moment) -> PowerLoss<S> {
        PowerLoss { inner, at, moment, progress: Mutex::default() }
    }

    /// Whether the power is gone: a run in which it stayed has met every commit, and ends the enumeration.
    pub fn lost(&self) -> bool {
        self.progress.lock().lost
    }

    /// How often [`Store::transact`] was called while there was power.
    pub fn transactions(&self) -> u64 {
        self.progress.lock().transactions
    }

    /// The store below, powered again.
    pub fn into_inner(self) -> S {
        self.inner
    }

    fn powered(&self) -> Result<(), StoreError> {
        if self.lost() { Err(gone()) } else { Ok(()) }
    }
}

fn gone() -> StoreError {
    StoreError::Failed("the power is gone (a test took it)".to_owned())
}

impl<S: Store> Store for PowerLoss<S> {
    fn get(&self, key: &str) -> Result<Option<Record>, StoreError> {
        self.powered()?;
        self.inner.get(key)
    }

    fn list(&self, prefix: &str) -> Result<Vec<Record>, StoreError> {
        self.powered()?;
        self.inner.list(prefix)
    }

    fn transact(&self, compares: &[Compare], changes: &[Change]) -> Result<Revision, StoreError> {
        // Held throughout, so that no other transaction slips in after the last one.
        let mut progress = self.progress.lock();
        if progress.lost {
            return Err(gone());
        }
        progress.transactions += 1;
        if progress.transactions != self.at {
            return self.inner.transact(compares, changes);
        }
        progress.lost = true;
        match self.moment {
            Moment::Before => {}
            Moment::After => {
                self.inner.transact(compares, changes)?;
            }
        }
        Err(gone())
    }

    /// Without power: a channel that is closed already. A channel made before stays that of the inner store.
    fn watch(&self, prefix: &str) -> Receiver<Committed> {
        if self.lost() { channel().1 } else { self.inner.watch(prefix) }
    }
}
