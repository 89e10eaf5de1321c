//! The backends as objects: known from the configuration, and asked now and then how much fits in them.
//!
//! Asking can hang for ever, where a file system's server is gone: each backend is asked by a thread of its own that nobody
//! waits for.

use std::sync::{Arc, Weak};
use std::time::Duration;

use uuid::Uuid;

use super::engine::Shared;
use crate::block::directory::BUILT_IN;
use crate::block::{BlockBackend, VolumeBackend};
use crate::inventory::{Backend, Object};
use crate::model::Class;
use crate::model::backend::{BackendRecord, Kind};
use crate::model::reason::Reason;
use crate::model::volume::record::VolumeData;
use crate::store::StoreError;

/// How often a backend is asked.
const EVERY: Duration = Duration::from_secs(30);

impl Shared {
    /// The volumes of the backend of this name.
    pub(super) fn backend(&self, name: &str) -> Result<&dyn VolumeBackend, Reason> {
        let backend = self.parts.backends.named(name);
        backend.map(|backend| backend.volumes()).ok_or_else(|| {
            Reason::NotFound(format!("backend named {name:?}: the configuration does not name it (any more)"))
        })
    }

    /// The volumes of the backend that keeps this data.
    pub(super) fn backend_of(&self, data: &VolumeData) -> Result<&dyn VolumeBackend, Reason> {
        self.backend(data.backend())
    }
}

/// Shows exactly the backends that there are. Those that were there before keep their numbers.
pub(super) fn register(shared: &Shared) -> Result<(), StoreError> {
    if shared.settings.read_only {
        return Ok(());
    }
    let ledger = &shared.parts.ledger;
    let known = ledger.inventory().backends();
    let is_wanted = |record: &BackendRecord| {
        shared.parts.backends.iter().any(|(kind, backend)| (kind, backend.name()) == (record.kind, &record.name))
    };
    let is_known = |kind: Kind, name: &str| {
        known.iter().any(|backend| (backend.record.kind, backend.record.name.as_str()) == (kind, name))
    };
    ledger.transact(|batch| {
        for backend in known.iter().filter(|backend| !is_wanted(&backend.record)) {
            batch.remove(Class::Backend, backend.id);
        }
        for (kind, backend) in shared.parts.backends.iter().filter(|(kind, backend)| !is_known(*kind, backend.name())) {
            let record = BackendRecord { number: batch.next_number(), name: backend.name().to_owned(), kind };
            batch.put(Object::Backend(Arc::new(Backend { id: Uuid::new_v4(), record, capacity: None })));
        }
    })
}

/// Has every backend asked from now on.
pub(super) fn start(shared: &Arc<Shared>) {
    for (_, backend) in shared.parts.backends.iter() {
        let (weak, backend) = (Arc::downgrade(shared), backend.clone());
        let spawned = std::thread::Builder::new().name("backend".to_owned()).spawn(move || ask(&weak, &*backend));
        if let Err(error) = spawned {
            log::error!("nobody asks a backend how much fits in it: {error}");
        }
    }
}

/// Until the engine ends. While the backend is asked, nothing of the engine is held.
fn ask(shared: &Weak<Shared>, backend: &dyn BlockBackend) {
    loop {
        let capacity = backend.volumes().capacity();
        let Some(shared) = shared.upgrade() else { return };
        if shared.gate.stopping() {
            return;
        }
        if let Err(error) = &capacity {
            log::debug!("the backend {} does not say how much fits in it: {error}", backend.name());
        }
        if backend.name() != BUILT_IN {
            let result = capacity.as_ref().map(|_| ()).map_err(ToString::to_string);
            shared.parts.reconciler.set_backend(backend.name(), result);
        }
        show(&shared, backend.name(), capacity.ok());
        shared.gate.sleep(EVERY, &|| false);
    }
}

fn show(shared: &Shared, name: &str, capacity: Option<(u64, u64)>) {
    let ledger = &shared.parts.ledger;
    let shown = ledger.transact(|batch| {
        let Some(backend) = ledger.inventory().backend_named(name) else { return };
        if backend.capacity != capacity {
            batch.show(Object::Backend(Arc::new(Backend { capacity, ..(*backend).clone() })));
        }
    });
    if let Err(error) = shown {
        log::debug!("how much fits in {name} is not shown: {error}");
    }
}
