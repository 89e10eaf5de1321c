//! Records and the journal: one key-value store with compare-and-set transactions.
//!
//! Keys are `/`-separated paths (`instances/<uuid>`); values are JSON documents. Every key carries the store-wide
//! revision at which it was last written, so that a transaction can state what it believes and fail as a whole when
//! that is no longer true. [`conformance`] is the contract: every engine passes it.

pub mod conformance;
pub mod power_loss;
pub mod sqlite;

use std::sync::Arc;
use std::sync::mpsc::Receiver;

/// The store-wide counter; it grows by one with each committed transaction and is never reused.
pub type Revision = u64;

/// One stored value and the revision that wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The full key.
    pub key: String,
    /// The value, a JSON document.
    pub value: Vec<u8>,
    /// The transaction that wrote it.
    pub revision: Revision,
}

/// What a transaction believes about one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    /// The key does not exist.
    Absent(String),
    /// The key was last written by exactly this revision.
    At(String, Revision),
}

/// One change of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Write the value, whether the key exists or not.
    Put(String, Vec<u8>),
    /// Remove the key; removing an absent one is no error.
    Delete(String),
}

/// What a watcher receives: the changes of one committed transaction that fall under its prefix, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// The transaction.
    pub revision: Revision,
    /// Its changes below the watched prefix.
    pub changes: Vec<Change>,
}

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A comparison failed; nothing was changed.
    #[error("the record {key} was changed by somebody else meanwhile")]
    Conflict {
        /// The first key whose comparison failed.
        key: String,
    },
    /// The disk below the store is full; nothing was changed.
    #[error("the disk of the state directory is full; free some space and try again")]
    Full,
    /// The store was written by a newer instancefs.
    #[error(
        "the state directory has schema version {found}, this instancefs knows up to {known}; use the newer instancefs"
    )]
    TooNew {
        /// The version on disk.
        found: u32,
        /// The newest that this program understands.
        known: u32,
    },
    /// The file exists and is not ours, or is damaged.
    #[error("{path} is not a store of instancefs: {detail}; move it away or name another --state-dir")]
    Foreign {
        /// The file.
        path: String,
        /// What is wrong with it.
        detail: String,
    },
    /// Anything else that the engine reports; nothing was changed.
    #[error("the store failed: {0}")]
    Failed(String),
}

/// A key-value store whose transactions are atomic, durable when they return, and serialisable.
pub trait Store: Send + Sync {
    /// The record of a key.
    fn get(&self, key: &str) -> Result<Option<Record>, StoreError>;
    /// All records whose key begins with `prefix`, in the order of their keys, from one snapshot.
    fn list(&self, prefix: &str) -> Result<Vec<Record>, StoreError>;
    /// Checks all comparisons, then applies all changes, or nothing. Returns the new revision; it is durable.
    fn transact(&self, compares: &[Compare], changes: &[Change]) -> Result<Revision, StoreError>;
    /// Everything committed from now on under `prefix`. The channel closes with the store.
    fn watch(&self, prefix: &str) -> Receiver<Committed>;
}

impl<S: Store + ?Sized> Store for Arc<S> {
    fn get(&self, key: &str) -> Result<Option<Record>, StoreError> {
        (**self).get(key)
    }

    fn list(&self, prefix: &str) -> Result<Vec<Record>, StoreError> {
        (**self).list(prefix)
    }

    fn transact(&self, compares: &[Compare], changes: &[Change]) -> Result<Revision, StoreError> {
        (**self).transact(compares, changes)
    }

    fn watch(&self, prefix: &str) -> Receiver<Committed> {
        (**self).watch(prefix)
    }
}
