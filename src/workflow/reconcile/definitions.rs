//! Definitions: fetched in the background, kept in the store as recovery copies, read into the instances' records.

use std::sync::Arc;

use uuid::Uuid;

use super::mirror::{Mirrored, Mirrors};
use super::volumes::{self, Disks};
use crate::hypervisor::HypervisorError;
use crate::hypervisor::definition::Definition;
use crate::inventory::{Instance, Object};
use crate::store::{Change, StoreError};
use crate::workflow::ledger::now;

use super::Reconciler;

/// The store's key of a definition; its value is the XML as a JSON string.
pub(super) fn key(id: Uuid) -> String {
    format!("definitions/{id}")
}

/// A definition that was fetched.
struct Fetched {
    id: Uuid,
    xml: String,
    parsed: Definition,
    disks: Option<Disks>,
    /// It is not what the store holds.
    new: bool,
}

impl Reconciler {
    /// The definition last seen, as XML; never asks the hypervisor. May read the disk.
    pub fn definition(&self, id: Uuid) -> Option<Arc<str>> {
        match self.stored_definition(id) {
            Ok(xml) => xml.map(Arc::from),
            Err(error) => {
                log::warn!("the definition of {id} cannot be read: {error}");
                None
            }
        }
    }

    fn stored_definition(&self, id: Uuid) -> Result<Option<String>, StoreError> {
        let Some(record) = self.store.get(&key(id))? else { return Ok(None) };
        serde_json::from_slice(&record.value)
            .map(Some)
            .map_err(|error| StoreError::Failed(format!("{} is no JSON string: {error}", record.key)))
    }

    /// Fetches these definitions and brings what they say into the records, in one transaction.
    ///
    /// # Errors
    ///
    /// [`StoreError`] when they could not be stored; then nothing changed.
    pub(super) fn fetch_definitions(&self, ids: &[Uuid], mirrors: &mut Mirrors) -> Result<(), StoreError> {
        let mut fetched = Vec::new();
        for &id in ids {
            if self.stopping() {
                return Ok(());
            }
            let instance = self.ledger.inventory().instance(id);
            let Some(instance) = instance.filter(|instance| has_definition(instance)) else { continue };
            match self.hypervisor.definition(id) {
                Ok(xml) => {
                    let new = self.stored_definition(id)?.as_ref() != Some(&xml);
                    let parsed = Definition::parse(&xml).unwrap_or_else(|error| {
                        log::warn!("the definition of {id} cannot be read: {error}");
                        Definition::default()
                    });
                    let disks = self.disks(&instance, &parsed).unwrap_or_else(|error| {
                        log::debug!("the disks of the guest {id} are looked at later: {error}");
                        None
                    });
                    fetched.push(Fetched { id, xml, parsed, disks, new });
                }
                // It went meanwhile; the event of that is on its way.
                Err(HypervisorError::NoDomain) => {}
                // All definitions are fetched again after a reconnection.
                Err(HypervisorError::Unreachable(_)) => break,
                Err(
                    error @ (HypervisorError::InvalidState(_)
                    | HypervisorError::Exists(_)
                    | HypervisorError::Unsupported(_)
                    | HypervisorError::Failed(_)),
                ) => log::warn!("the definition of {id} cannot be fetched: {error}"),
            }
        }
        let paths = self.volume_paths();
        let entries = self.ledger.transact(|batch| {
            let mut entries = Vec::new();
            for Fetched { id, xml, parsed, disks, new } in fetched {
                if let Some(disks) = disks {
                    entries.extend(volumes::absorb(batch, &paths, id, &disks));
                }
                let Some(before) = batch.instance(id) else { continue };
                if before.record.draft.is_some() {
                    continue;
                }
                let mut after = (*before).clone();
                if read_into(&mut after, parsed, mirrors.get(&id)) {
                    // What we mirrored last is no longer what the domain says.
                    if let Some(mirrored) = mirrors.get_mut(&id) {
                        mirrored.description = None;
                    }
                }
                if new {
                    after.record.definition_revision += 1;
                    batch.store(Change::Put(key(id), serde_json::Value::String(xml).to_string().into_bytes()));
                }
                if new || after != *before {
                    after.record.updated_at = now();
                    batch.put(Object::Instance(Arc::new(after)));
                }
            }
            entries
        })?;
        for entry in entries {
            self.events.record(entry);
        }
        Ok(())
    }
}

/// Whether there is a definition to be fetched. Of a guest that was undefined while it runs the stored one is worth more:
/// that is what it is defined from again.
fn has_definition(instance: &Instance) -> bool {
    let record = &instance.record;
    let is_kept = record.undefined.is_some() && record.definition.is_some();
    record.draft.is_none() && instance.domain.as_ref().is_some_and(|domain| domain.persistent || !is_kept)
}

/// Brings a definition into the record. Returns whether the domain's description was adopted: it is when somebody else
/// changed it, that is when it says neither what it said before nor what we mirrored into it last. At first sight that
/// is not known, and a description that was written here already is the newer one.
fn read_into(instance: &mut Instance, parsed: Definition, mirrored: Option<&Mirrored>) -> bool {
    let record = &mut instance.record;
    let said = |definition: &Definition| definition.description.clone().unwrap_or_default();
    let says = said(&parsed);
    let told = match &record.definition {
        Some(before) => says != said(before),
        None => record.description.is_empty(),
    };
    let echo = mirrored.and_then(|mirrored| mirrored.description.as_ref()) == Some(&says);
    let adopted = told && !echo && says != record.description;
    if adopted {
        record.description = says;
    }
    if let Some(vcpus) = parsed.vcpus {
        record.vcpus = vcpus;
    }
    if let Some(bytes) = parsed.memory_bytes {
        record.memory_bytes = bytes;
    }
    record.network.clone_from(&parsed.network);
    record.definition = Some(parsed);
    adopted
}
