//! What libvirt cannot say, mirrored into the domains so that `virsh metadata` and `virsh desc` show it.
//!
//! The store is the truth, the mirror follows in the background. Domains that are neither locked nor protected, and
//! never were, are left as they are.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write;

use nix::unistd::{Gid, Group, Uid, User};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Reconciler;
use crate::hypervisor::HypervisorError;
use crate::hypervisor::definition::escape;
use crate::model::record::InstanceRecord;
use crate::store::{Change, Store, StoreError};

const PREFIX: &str = "mirrors/";

/// The store's key of what was mirrored last.
pub(super) fn key(id: Uuid) -> String {
    format!("{PREFIX}{id}")
}

/// What was mirrored into a domain last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mirrored {
    /// Our metadata element.
    pub(super) metadata: Option<String>,
    /// The description; `None` also after somebody else changed it.
    pub(super) description: Option<String>,
}

/// What was mirrored last into every domain that has a mirror; owned by the one thread that fetches and mirrors.
pub(super) type Mirrors = HashMap<Uuid, Mirrored>;

/// What was mirrored before this start. What cannot be read is mirrored anew.
pub(super) fn load(store: &dyn Store) -> Mirrors {
    let records = store.list(PREFIX).unwrap_or_else(|error| {
        log::warn!("what was mirrored into the domains cannot be read and is mirrored anew: {error}");
        Vec::new()
    });
    records
        .into_iter()
        .filter_map(|record| {
            let id = Uuid::try_parse(record.key.strip_prefix(PREFIX)?).ok()?;
            Some((id, serde_json::from_slice(&record.value).ok()?))
        })
        .collect()
}

/// Our element in a domain's metadata, without its namespace: `set_metadata` adds that.
fn metadata_element(record: &InstanceRecord) -> String {
    let mut element = "<instance".to_owned();
    let mut attribute = |name: &str, value: &str| {
        // Writing into a string cannot fail.
        let _written = write!(element, " {name}=\"{}\"", escape(value));
    };
    match &record.protection.lock {
        Some(lock) => {
            attribute("locked", "1");
            attribute("locked_by", &lock.by);
            attribute("locked_at", &lock.at.to_string());
            attribute("locked_level", lock.level.word());
            attribute("locked_reason", &lock.reason);
        }
        None => attribute("locked", "0"),
    }
    attribute("disable_terminate", if record.protection.disable_terminate { "1" } else { "0" });
    attribute("owner", &user_name(record.ownership.owner));
    attribute("project", &group_name(record.ownership.project));
    if record.metadata.is_empty() {
        element.push_str("/>");
        return element;
    }
    element.push('>');
    for (key, entry) in record.metadata.iter() {
        let _written = write!(element, "<metadata key=\"{}\">{}</metadata>", escape(key), escape(&entry.value));
    }
    element.push_str("</instance>");
    element
}

fn user_name(uid: u32) -> String {
    User::from_uid(Uid::from_raw(uid)).ok().flatten().map_or_else(|| uid.to_string(), |user| user.name)
}

fn group_name(gid: u32) -> String {
    Group::from_gid(Gid::from_raw(gid)).ok().flatten().map_or_else(|| gid.to_string(), |group| group.name)
}

impl Reconciler {
    /// Mirrors what changed of these instances.
    ///
    /// # Errors
    ///
    /// [`StoreError`] when it could not be remembered; then it is mirrored again after the next start.
    pub(super) fn mirror_all(&self, ids: &BTreeSet<Uuid>, mirrors: &mut Mirrors) -> Result<(), StoreError> {
        if self.settings.read_only {
            return Ok(());
        }
        let mut changed = Vec::new();
        for &id in ids {
            if self.stopping() {
                break;
            }
            let before = mirrors.get(&id).cloned().unwrap_or_default();
            let mut mirrored = before.clone();
            match self.mirror_one(id, &mut mirrored) {
                // What waits for a resume, a domain or a connection is queued again when that comes.
                Ok(()) | Err(HypervisorError::NoDomain) => {}
                Err(HypervisorError::Unreachable(detail)) => {
                    log::debug!("the mirror of {id} waits for the connection: {detail}");
                }
                Err(
                    error @ (HypervisorError::InvalidState(_)
                    | HypervisorError::Exists(_)
                    | HypervisorError::Unsupported(_)
                    | HypervisorError::Failed(_)),
                ) => log::warn!("lock and description of {id} cannot be mirrored into its domain: {error}"),
            }
            if mirrored != before {
                mirrors.insert(id, mirrored.clone());
                changed.push((id, mirrored));
            }
        }
        self.ledger.transact(|batch| {
            for (id, mirrored) in changed {
                if batch.instance(id).is_some() {
                    match serde_json::to_vec(&mirrored) {
                        Ok(value) => batch.store(Change::Put(key(id), value)),
                        Err(error) => log::error!("the mirror of {id} cannot be written as JSON: {error}"),
                    }
                } else {
                    mirrors.remove(&id);
                }
            }
        })
    }

    fn mirror_one(&self, id: Uuid, mirrored: &mut Mirrored) -> Result<(), HypervisorError> {
        let Some(instance) = self.ledger.inventory().instance(id) else { return Ok(()) };
        let record = &instance.record;
        let Some(domain) = &instance.domain else { return Ok(()) };
        // A suspended guest resumes with the definition that its saved memory holds.
        if record.draft.is_some() || domain.has_managed_save {
            return Ok(());
        }
        let protection = &record.protection;
        let has_something = protection.lock.is_some() || protection.disable_terminate || !record.metadata.is_empty();
        if has_something || mirrored.metadata.is_some() {
            let element = metadata_element(record);
            if mirrored.metadata.as_ref() != Some(&element) {
                self.hypervisor.set_metadata(id, Some(&element))?;
                mirrored.metadata = Some(element);
            }
        }
        // Before the first sight of its definition nobody knows whose description is newer.
        let Some(definition) = &record.definition else { return Ok(()) };
        let says = mirrored.description.as_deref().or(definition.description.as_deref()).unwrap_or_default();
        if record.description != says {
            let text = (!record.description.is_empty()).then_some(record.description.as_str());
            self.hypervisor.set_description(id, text)?;
            mirrored.description = Some(record.description.clone());
        }
        Ok(())
    }
}
