//! What an operation on an instance would find out with its first step, said before it begins.

use uuid::Uuid;

use super::judge::Judge;
use super::{boot, define_again, delete, network};
use crate::inventory::Instance;
use crate::model::Class;
use crate::model::caller::Caller;
use crate::model::reason::Reason;
use crate::model::sharing::may_read;
use crate::model::task::Operation;

impl Judge<'_, '_> {
    /// Whether its first step could be done as things are.
    pub(super) fn can_begin(&self, caller: &Caller, instance: &Instance, operation: &Operation) -> Result<(), Reason> {
        match operation {
            Operation::Boot | Operation::Define => {
                self.can_have_root(caller, instance)?;
                self.volumes_are_free(instance)?;
                network::exists(instance.record.network.as_ref(), &self.shared.parts.hypervisor.networks())?;
                self.name_is_free(&instance.record.name, instance.id)
            }
            Operation::Start | Operation::Resume | Operation::Unshelve { start: true } => {
                self.volumes_are_free(instance)?;
                network::exists(instance.record.network.as_ref(), &self.shared.parts.hypervisor.networks())
            }
            Operation::Rename { to, .. } => self.name_is_free(to, instance.id),
            Operation::Delete => delete::may_delete_instance(instance),
            Operation::DefineAgain => {
                define_again::can_be(instance)?;
                self.name_is_free(&instance.record.name, instance.id)
            }
            Operation::Stop
            | Operation::Pause
            | Operation::Unpause
            | Operation::Suspend
            | Operation::RebootSoft
            | Operation::RebootHard
            | Operation::Reconfigure { .. }
            | Operation::CommitImage
            | Operation::ImportImage
            | Operation::DiscardDraft
            | Operation::SoftDelete
            | Operation::Restore { .. }
            | Operation::Shelve { .. }
            | Operation::Offload
            | Operation::Unshelve { start: false }
            | Operation::Volume(_) => Ok(()),
        }
    }

    /// Whether a draft has something to boot from.
    fn can_have_root(&self, caller: &Caller, instance: &Instance) -> Result<(), Reason> {
        let record = &instance.record;
        if let Some(id) = boot::root_volume(record) {
            let volume = self.batch.volume(id).ok_or_else(|| Reason::NotFound(format!("volume {id}")))?;
            return boot::can_boot_from(record, &volume);
        }
        let id = record.image.ok_or_else(boot::no_image)?;
        let image = self.batch.image(id).ok_or_else(|| Reason::NotFound(format!("image {id}")))?;
        // It was checked when the image was named; the right may have been taken back since.
        if !may_read(&image.record, caller) {
            return Err(Reason::NotYours { class: Class::Image });
        }
        boot::can_make_disks(&image)?;
        boot::demands(record, &image)
    }

    /// Whether a guest may begin to write to the volumes of an instance: nothing runs on one of them, and this host has
    /// none as a block device.
    fn volumes_are_free(&self, instance: &Instance) -> Result<(), Reason> {
        for (_, entry) in instance.record.volumes.iter() {
            let Some(volume) = self.batch.volume(entry.value) else { continue };
            crate::model::instance::idle(volume.task.as_ref().map(|task| &task.operation))?;
            if volume.record.local.is_some() {
                return Err(Reason::InUse(format!(
                    "its volume {} is a block device of this host; write 0 to its local_attach first",
                    volume.id
                )));
            }
        }
        Ok(())
    }

    /// Names are unique among what is real and what is about to be.
    pub(super) fn name_is_free(&self, name: &str, id: Uuid) -> Result<(), Reason> {
        let holder = self.shared.parts.ledger.inventory().instance_named(name);
        let coming = self.names.get(name).map(|(instance, _)| *instance);
        match [holder, coming].into_iter().flatten().all(|other| other == id) {
            true => Ok(()),
            false => Err(Reason::NameTaken(name.to_owned())),
        }
    }
}

/// The name that an operation will give to an instance.
pub(super) fn wanted_name<'a>(instance: &'a Instance, operation: &'a Operation) -> Option<&'a str> {
    match operation {
        Operation::Boot | Operation::Define | Operation::DefineAgain => Some(&instance.record.name),
        Operation::Rename { to, .. } => Some(to),
        Operation::Start
        | Operation::Stop
        | Operation::Pause
        | Operation::Unpause
        | Operation::Suspend
        | Operation::Resume
        | Operation::RebootSoft
        | Operation::RebootHard
        | Operation::CommitImage
        | Operation::ImportImage
        | Operation::DiscardDraft
        | Operation::SoftDelete
        | Operation::Restore { .. }
        | Operation::Delete
        | Operation::Shelve { .. }
        | Operation::Offload
        | Operation::Unshelve { .. }
        | Operation::Volume(_) => None,
        Operation::Reconfigure { then, .. } => then.as_ref().and_then(|then| wanted_name(instance, then)),
    }
}
