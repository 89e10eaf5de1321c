//! Which hypervisor a state directory belongs to: recorded at its first mount, asked for at each later one.

use std::path::Path;

use crate::hypervisor::target::Target;
use crate::hypervisor::{Hypervisor, HypervisorError, Identity};
use crate::store::{Change, Compare, Store, StoreError, sqlite};

/// Where the record lies.
const KEY: &str = "meta/identity";

/// Why a state directory and a connection do not fit together.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Another connection was asked for than the recorded one.
    #[error(
        "this state directory belongs to {recorded} (host {hostname}), not to {asked}; mount it without --connect, or \
         name another --state-dir for {asked}"
    )]
    Other {
        /// The recorded URI.
        recorded: String,
        /// The recorded host's name.
        hostname: String,
        /// The URI asked for.
        asked: String,
    },
    /// `--connect` cannot be understood, or the record not be used.
    #[error("{0}")]
    Target(String),
    /// The record is damaged.
    #[error("the record {KEY} of the state directory cannot be read; restore the state directory from a backup")]
    Damaged(#[source] serde_json::Error),
    /// The store failed.
    #[error("the state directory's connection cannot be looked up")]
    Store(#[source] StoreError),
    /// The hypervisor answers for another host than it did at the first mount.
    #[error(
        "{uri} answers for the host {found}, but this state directory belongs to host {expected} ({hostname}); nothing \
         is read from it until the right host is back"
    )]
    OtherHost {
        /// The URI.
        uri: String,
        /// UUID of the host that answered.
        found: String,
        /// UUID of the recorded host.
        expected: String,
        /// Name of the recorded host.
        hostname: String,
    },
    /// The hypervisor does not say who it is.
    #[error("the hypervisor does not say which host it is")]
    Silent(#[source] HypervisorError),
}

/// What the first mount recorded.
pub fn load(store: &dyn Store) -> Result<Option<Identity>, IdentityError> {
    let Some(record) = store.get(KEY).map_err(IdentityError::Store)? else { return Ok(None) };
    serde_json::from_slice(&record.value).map(Some).map_err(IdentityError::Damaged)
}

/// The same of a store that somebody may have open, without touching it.
pub fn peek(store: &Path) -> Result<Option<Identity>, IdentityError> {
    let Some(value) = sqlite::peek(store, KEY).map_err(IdentityError::Store)? else { return Ok(None) };
    serde_json::from_slice(&value).map(Some).map_err(IdentityError::Damaged)
}

/// The connection to open: the recorded one, which `asked` must not contradict, else what is asked for, else `auto`.
pub fn choose(
    recorded: Option<&Identity>,
    asked: Option<&str>,
    state_directory: &Path,
) -> Result<Target, IdentityError> {
    let parse = |text| Target::parse(text, state_directory).map_err(IdentityError::Target);
    let Some(recorded) = recorded else { return parse(asked.unwrap_or("auto")) };
    if let Some(asked) = asked
        && asked != recorded.uri
        && parse(asked)?.uri() != recorded.uri
    {
        return Err(IdentityError::Other {
            recorded: recorded.uri.clone(),
            hostname: recorded.hostname.clone(),
            asked: asked.to_owned(),
        });
    }
    Target::from_recorded(&recorded.uri).map_err(IdentityError::Target)
}

/// Records who answered at the first mount.
pub fn record(store: &dyn Store, hypervisor: &dyn Hypervisor) -> Result<Identity, IdentityError> {
    let identity = hypervisor.identity().map_err(IdentityError::Silent)?;
    let value = serde_json::to_vec(&identity).map_err(IdentityError::Damaged)?;
    store
        .transact(&[Compare::Absent(KEY.to_owned())], &[Change::Put(KEY.to_owned(), value)])
        .map_err(IdentityError::Store)?;
    Ok(identity)
}

/// Whether the host that answers is the recorded one. Names may change, the UUID does not.
pub fn verify(recorded: &Identity, answered: &Identity) -> Result<(), IdentityError> {
    if recorded.host_uuid == answered.host_uuid {
        return Ok(());
    }
    Err(IdentityError::OtherHost {
        uri: recorded.uri.clone(),
        found: answered.host_uuid.clone(),
        expected: recorded.host_uuid.clone(),
        hostname: recorded.hostname.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(uri: &str) -> Identity {
        Identity { uri: uri.to_owned(), host_uuid: "1-2-3".to_owned(), hostname: "one".to_owned() }
    }

    #[test]
    fn a_state_directory_stays_with_its_connection() {
        let recorded = identity("test:///default");
        let choose = |asked| choose(Some(&recorded), asked, Path::new("/s"));
        assert_eq!(choose(None).unwrap().uri(), "test:///default");
        assert_eq!(choose(Some("test:///default")).unwrap().uri(), "test:///default");
        let error = choose(Some("qemu:///system")).unwrap_err().to_string();
        assert!(error.contains("belongs to test:///default (host one)") && error.contains("qemu:///system"), "{error}");
    }

    #[test]
    fn the_first_mount_may_choose() {
        assert_eq!(choose(None, Some("test:///default"), Path::new("/s")).unwrap().uri(), "test:///default");
    }

    #[test]
    fn another_host_behind_the_same_uri_is_refused() {
        let recorded = identity("qemu:///system");
        let mut answered = identity("qemu:///system");
        answered.hostname = "renamed".to_owned();
        verify(&recorded, &answered).unwrap();
        answered.host_uuid = "4-5-6".to_owned();
        let error = verify(&recorded, &answered).unwrap_err().to_string();
        assert!(error.contains("4-5-6") && error.contains("1-2-3"), "{error}");
    }

    #[test]
    fn the_record_is_written_once_and_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let store = crate::store::sqlite::SqliteStore::open(&directory.path().join("store")).unwrap();
        assert_eq!(load(&store).unwrap(), None);
        let target = Target::parse("test:///default", directory.path()).unwrap();
        let hypervisor = target.open(directory.path()).unwrap();
        hypervisor.connect().unwrap();
        let written = record(&store, hypervisor.as_ref()).unwrap();
        assert_eq!(load(&store).unwrap(), Some(written));
        assert!(matches!(record(&store, hypervisor.as_ref()), Err(IdentityError::Store(_))));
    }
}
