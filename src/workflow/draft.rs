//! Drafts: who may make one, what a new one is, and how one without anything in it goes away.

use std::sync::Arc;

use uuid::Uuid;

use super::apply::Words;
use super::judge::{Accepted, Judge, entry};
use super::orders::may_write;
use crate::inventory::{Addresses, Flavor, Image, Instance, Object, Volume};
use crate::model::Class;
use crate::model::caller::{Caller, NO_PROJECT, Ownership};
use crate::model::protection::{Action, check_deletion};
use crate::model::reason::Reason;
use crate::model::record::{Draft, ErrorHistory, FlavorRecord, ImageRecord, InstanceRecord};
use crate::model::volume::record::VolumeRecord;

const DEFAULT_VCPUS: u32 = 1;
const DEFAULT_MEMORY_BYTES: u64 = 512 << 20;

impl Judge<'_, '_> {
    /// A flavor that is not offered yet, by root.
    pub(super) fn make_flavor(&mut self, caller: &Caller, id: Uuid, name: &str) -> Result<Accepted, Reason> {
        let ownership = Ownership { project: NO_PROJECT, ..self.ownership_for(caller) };
        crate::model::flavor::by_root(caller.role(&ownership))?;
        if self.batch.has_flavor_named(name) {
            return Err(Reason::Exists);
        }
        let flavor = self.flavor_draft(id, name, ownership);
        self.batch.put(Object::Flavor(Arc::new(flavor)));
        let told = Words { what: "draft".into(), from: String::new(), to: "draft".to_owned() };
        Ok(Accepted { entries: vec![entry(Class::Flavor, id, name, caller, told)], ..Accepted::default() })
    }

    /// As many at a time as a user may have.
    pub(super) fn make_draft(&mut self, caller: &Caller, class: Class, id: Uuid) -> Result<Accepted, Reason> {
        if self.batch.contains(id) {
            return Err(Reason::Exists);
        }
        let limit = self.shared.settings.drafts_per_user;
        if self.count_drafts(caller.uid) >= limit {
            return Err(Reason::DraftQuota { limit });
        }
        let object = match class {
            Class::Instance => Object::Instance(Arc::new(self.instance_draft(caller, id))),
            Class::Image => Object::Image(Arc::new(self.image_draft(caller, id))),
            Class::Task => Object::Task(Arc::new(self.task_draft(caller, id))),
            Class::Volume => Object::Volume(Arc::new(self.volume_draft(caller, id))),
            Class::Transfer => {
                return Err(Reason::Policy("an offer is made by writing to a volume's transfer".to_owned()));
            }
            Class::Backend => return Err(Reason::Policy("backends are named in the configuration".to_owned())),
            Class::Flavor => return Err(Reason::Policy("a flavor is made by its name".to_owned())),
        };
        self.batch.put(object);
        *self.drafts.entry(caller.uid).or_default() += 1;
        let told = Words { what: "draft".into(), from: String::new(), to: "draft".to_owned() };
        Ok(Accepted { entries: vec![entry(class, id, &id.to_string(), caller, told)], ..Accepted::default() })
    }

    /// A draft without anything in it has nothing on any disk: its record is all there is.
    pub(super) fn discard_unwritten(&mut self, caller: &Caller, class: Class, id: Uuid) -> Result<Accepted, Reason> {
        let missing = || Reason::NotFound(format!("{} {id}", class.noun()));
        let (owner, name) = match self.batch.get(class, id).ok_or_else(missing)? {
            Object::Instance(instance) => {
                let situation = instance.situation(caller, None);
                crate::model::instance::access(&situation)?;
                let record = &instance.record;
                let has_disks = !record.disks.is_empty() || !record.volumes.is_empty();
                if record.draft.is_none_or(|draft| draft.written) || has_disks {
                    return Err(Reason::NotEmpty);
                }
                record.protection.check(Action::Delete, situation.role)?;
                crate::model::instance::idle(situation.task)?;
                (record.ownership.owner, instance.name().to_owned())
            }
            Object::Image(image) => {
                let situation = image.situation(caller);
                crate::model::image::access(&situation)?;
                if image.record.draft.is_none_or(|draft| draft.written) {
                    return Err(Reason::NotEmpty);
                }
                check_deletion(situation.delete_protection)?;
                crate::model::instance::idle(situation.task)?;
                (image.record.ownership.owner, image.record.name.clone())
            }
            Object::Flavor(flavor) => {
                crate::model::flavor::by_root(caller.role(&flavor.record.ownership))?;
                if flavor.record.draft.is_none_or(|draft| draft.written) {
                    return Err(Reason::NotEmpty);
                }
                self.batch.remove(class, id);
                let told = Words { what: "draft".into(), from: "draft".to_owned(), to: "deleted".to_owned() };
                let entries = vec![entry(class, id, &flavor.record.name, caller, told)];
                return Ok(Accepted { entries, ..Accepted::default() });
            }
            Object::Volume(volume) => {
                let situation = volume.situation(caller, None);
                crate::model::volume::access(situation.role)?;
                if volume.record.draft.is_none_or(|draft| draft.written) || volume.record.data.is_some() {
                    return Err(Reason::NotEmpty);
                }
                situation.check(Action::Delete)?;
                crate::model::instance::idle(situation.task)?;
                (volume.record.ownership.owner, volume.record.name.clone())
            }
            Object::Transfer(_) | Object::Backend(_) => return Err(Reason::NotEmpty),
            Object::Task(task) => {
                may_write(&task, caller)?;
                if task.record.draft.is_none() {
                    return Err(Reason::NotEmpty);
                }
                (task.record.owner, String::new())
            }
        };
        self.batch.remove(class, id);
        let count = self.count_drafts(owner);
        self.drafts.insert(owner, count.saturating_sub(1));
        let told = Words { what: "draft".into(), from: "draft".to_owned(), to: "deleted".to_owned() };
        Ok(Accepted {
            entries: vec![entry(class, id, &name, caller, told)],
            forgotten: Some(id),
            ..Accepted::default()
        })
    }

    /// The drafts of a user, as this batch leaves them as far as it made and removed some.
    fn count_drafts(&mut self, uid: u32) -> usize {
        if let Some(count) = self.drafts.get(&uid) {
            return *count;
        }
        let inventory = self.shared.parts.ledger.inventory();
        let owned = |ownership: &Ownership, is_draft: bool| is_draft && ownership.owner == uid;
        let instances = inventory.instances();
        let images = inventory.images();
        let volumes = inventory.volumes();
        let count = instances.iter().filter(|i| owned(&i.record.ownership, i.record.draft.is_some())).count()
            + images.iter().filter(|i| owned(&i.record.ownership, i.record.draft.is_some())).count()
            + volumes.iter().filter(|v| owned(&v.record.ownership, v.record.draft.is_some())).count()
            + inventory.tasks().iter().filter(|task| task.record.draft.is_some() && task.record.owner == uid).count();
        self.drafts.insert(uid, count);
        count
    }

    /// Whose a thing is that somebody makes or takes.
    pub(super) fn ownership_for(&self, caller: &Caller) -> Ownership {
        let project = match self.shared.settings.projects.contains(&caller.gid) {
            true => caller.gid,
            false => NO_PROJECT,
        };
        Ownership { owner: caller.uid, project, generation: 0 }
    }

    /// A new instance draft, numbered.
    fn instance_draft(&mut self, caller: &Caller, id: Uuid) -> Instance {
        let (number, ownership) = (self.batch.next_number(), self.ownership_for(caller));
        let record = InstanceRecord {
            draft: Some(Draft { written: false }),
            vcpus: DEFAULT_VCPUS,
            memory_bytes: DEFAULT_MEMORY_BYTES,
            network: Some(self.shared.parts.hypervisor.networks().default),
            ..InstanceRecord::new(number, id.to_string(), ownership, self.now)
        };
        Instance { id, record, domain: None, addresses: Addresses::default(), task: None }
    }

    /// A new image draft, numbered.
    pub(super) fn image_draft(&mut self, caller: &Caller, id: Uuid) -> Image {
        let (number, ownership) = (self.batch.next_number(), self.ownership_for(caller));
        let record = ImageRecord {
            draft: Some(Draft { written: false }),
            ..ImageRecord::new(number, id.to_string(), ownership, self.now)
        };
        Image { id, record, task: None, data_bytes: 0 }
    }

    /// A new flavor draft, numbered.
    fn flavor_draft(&mut self, id: Uuid, name: &str, ownership: Ownership) -> Flavor {
        let record = FlavorRecord {
            number: self.batch.next_number(),
            name: name.to_owned(),
            description: String::new(),
            ownership,
            created_at: self.now,
            updated_at: self.now,
            draft: Some(Draft { written: false }),
            vcpus: DEFAULT_VCPUS,
            memory_bytes: DEFAULT_MEMORY_BYTES,
            root_disk_bytes: None,
            is_public: false,
            access: Vec::new(),
            errors: ErrorHistory::default(),
        };
        Flavor { id, record }
    }

    /// A new volume draft, numbered.
    fn volume_draft(&mut self, caller: &Caller, id: Uuid) -> Volume {
        let backend = self.shared.parts.backends.first().to_owned();
        let (number, ownership) = (self.batch.next_number(), self.ownership_for(caller));
        let record = VolumeRecord {
            draft: Some(Draft { written: false }),
            ..VolumeRecord::new(number, id.to_string(), ownership, backend, self.now)
        };
        Volume { id, record, task: None }
    }
}
