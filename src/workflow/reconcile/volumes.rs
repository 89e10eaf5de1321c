//! Volumes that somebody attached or detached outside, which the definitions tell: a domain has a volume where one of its
//! disks is that volume's data.
//!
//! Nothing is concluded while an operation owns the instance or the volume, of a definition that was read before one did,
//! and of a suspended instance, whose disks are those of its saved memory.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;

use uuid::Uuid;

use super::Reconciler;
use crate::hypervisor::HypervisorError;
use crate::hypervisor::definition::Definition;
use crate::inventory::{Instance, Volume};
use crate::model::Class;
use crate::workflow::events::Entry;
use crate::workflow::ledger::Batch;
use crate::workflow::volume::{record_attached, record_detached};

/// What the definitions of a domain say of its disks.
pub(super) struct Disks {
    /// The instance's latest task when they were read.
    last_task: Option<Uuid>,
    /// By path, with the device.
    found: HashMap<PathBuf, String>,
}

impl Reconciler {
    /// Which disks a domain has, if that is worth asking for: there are volumes.
    pub(super) fn disks(&self, instance: &Instance, persistent: &Definition) -> Result<Option<Disks>, HypervisorError> {
        let has_volumes = !self.ledger.inventory().volumes().is_empty();
        let is_saved = instance.domain.as_ref().is_none_or(|domain| domain.has_managed_save);
        if !has_volumes || is_saved || instance.record.operation.is_some() {
            return Ok(None);
        }
        let live = match instance.domain.as_ref().is_some_and(|domain| domain.power.is_on()) {
            true => self.hypervisor.live_definition(instance.id)?,
            false => None,
        };
        let live = live.and_then(|xml| Definition::parse(&xml).ok()).unwrap_or_default();
        // What outlives the run is the device that counts.
        let disks = live.disks.iter().chain(&persistent.disks);
        let found = disks.filter_map(|disk| Some((disk.path.clone()?, disk.device.clone()))).collect();
        Ok(Some(Disks { last_task: instance.record.last_task, found }))
    }

    /// The paths of all volumes, as definitions name them.
    pub(super) fn volume_paths(&self) -> HashMap<PathBuf, Uuid> {
        let Some(backends) = self.backends.get() else { return HashMap::new() };
        let volumes = self.ledger.inventory().volumes();
        let paths = volumes.iter().filter_map(|volume| {
            let data = volume.record.data.as_ref()?;
            let source = backends.named(data.backend())?.volumes().source(data);
            Some((source.path()?.to_owned(), volume.id))
        });
        paths.collect()
    }
}

/// Brings what the definitions say into the records; `paths` are those of all volumes. Returns what is worth an entry in
/// `events`.
pub(super) fn absorb(batch: &mut Batch<'_>, paths: &HashMap<PathBuf, Uuid>, id: Uuid, disks: &Disks) -> Vec<Entry> {
    let mut entries = Vec::new();
    let Some(instance) = batch.instance(id) else { return entries };
    let record = &instance.record;
    if record.operation.is_some() || record.last_task != disks.last_task || record.draft.is_some() {
        return entries;
    }
    let found: BTreeMap<Uuid, &str> =
        disks.found.iter().filter_map(|(path, device)| Some((*paths.get(path)?, device.as_str()))).collect();
    let known: BTreeSet<Uuid> = paths.values().copied().collect();
    let recorded: BTreeMap<Uuid, &str> = record.volumes.iter().map(|(device, entry)| (entry.value, device)).collect();
    let concerned: BTreeSet<Uuid> = found.keys().chain(recorded.keys()).copied().collect();
    for id in concerned {
        let Some(volume) = batch.volume(id).filter(|volume| volume.record.operation.is_none()) else { continue };
        match (found.get(&id), recorded.get(&id)) {
            (Some(device), Some(before)) if device == before => {}
            (Some(device), before) => {
                record_attached(batch, id, instance.id, device);
                entries.push(entry(
                    &volume,
                    "attached_outside",
                    before.copied().unwrap_or_default(),
                    device,
                    &instance,
                ));
            }
            // Of one whose place is not known nothing can be said.
            (None, Some(before)) if known.contains(&id) => {
                record_detached(batch, id, instance.id);
                entries.push(entry(&volume, "detached_outside", before, "", &instance));
            }
            (None, Some(_) | None) => {}
        }
    }
    entries
}

fn entry(volume: &Volume, what: &str, from: &str, to: &str, instance: &Instance) -> Entry {
    Entry {
        class: Some(Class::Volume),
        id: Some(volume.id),
        name: volume.record.name.clone(),
        uid: 0,
        login: "libvirt".to_owned(),
        what: what.to_owned(),
        from: from.to_owned(),
        to: to.to_owned(),
        errno: String::new(),
        reason: format!("the domain of {} ({})", instance.id, instance.name()),
    }
}
