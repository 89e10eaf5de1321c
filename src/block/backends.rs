//! The backends of one mount, by name.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::BlockBackend;
use super::directory::DirectoryBackend;
use crate::model::backend::Kind;

/// A backend that the configuration names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configured {
    /// What it is.
    pub kind: Kind,
    /// Where it keeps volumes; of a directory its absolute path.
    pub path: PathBuf,
    /// Where data may lie that it takes over; of a directory absolute paths.
    pub manage: Vec<PathBuf>,
}

impl Configured {
    /// The backend itself. `guest_group` is the group that QEMU runs in.
    pub fn make(&self, name: &str, guest_group: Option<u32>) -> Arc<dyn BlockBackend> {
        match self.kind {
            Kind::Directory => Arc::new(
                DirectoryBackend::new(self.path.clone(), guest_group).named(name).managing(self.manage.clone()),
            ),
        }
    }
}

/// All of them. The first one makes the disks of instances, and is where new volumes go unless somebody says otherwise.
#[derive(Clone)]
pub struct Backends {
    first: String,
    all: BTreeMap<String, (Kind, Arc<dyn BlockBackend>)>,
}

impl Backends {
    /// One.
    pub fn new(kind: Kind, first: Arc<dyn BlockBackend>) -> Backends {
        let name = first.name().to_owned();
        Backends { first: name.clone(), all: BTreeMap::from([(name, (kind, first))]) }
    }

    /// One more; another one of its name is replaced.
    pub fn add(&mut self, kind: Kind, backend: Arc<dyn BlockBackend>) {
        self.all.insert(backend.name().to_owned(), (kind, backend));
    }

    /// The name of the first one.
    pub fn first(&self) -> &str {
        &self.first
    }

    /// The one of this name.
    pub fn named(&self, name: &str) -> Option<&Arc<dyn BlockBackend>> {
        self.all.get(name).map(|(_, backend)| backend)
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = (Kind, &Arc<dyn BlockBackend>)> {
        self.all.values().map(|(kind, backend)| (*kind, backend))
    }
}
