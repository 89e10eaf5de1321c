//! Accepted changes, written into records; and the words in which events tell of them.

use std::borrow::Cow;

use super::judge::Judge;
use super::{bin, network};
use crate::inventory::{Flavor, Image, Instance};
use crate::model::caller::{Caller, Ownership};
use crate::model::change::{ImageChange, InstanceChange};
use crate::model::flavor::{self, FlavorChange, State, Word};
use crate::model::image;
use crate::model::instance;
use crate::model::keys::Keys;
use crate::model::protection::{Level, Lock};
use crate::model::reason::Reason;
use crate::model::record::{BinEntry, Draft};
use crate::model::sharing::Status;

/// What changed, in words.
pub(super) struct Words {
    /// The attribute.
    pub(super) what: Cow<'static, str>,
    /// What it read before.
    pub(super) from: String,
    /// What was asked for.
    pub(super) to: String,
}

pub(super) fn words(what: impl Into<Cow<'static, str>>, from: impl ToString, to: impl ToString) -> Words {
    Words { what: what.into(), from: from.to_string(), to: to.to_string() }
}

/// Tells of a change of an instance, before it is made.
pub(super) fn describe_instance(instance: &Instance, change: &InstanceChange) -> Words {
    let record = &instance.record;
    let lock = record.protection.lock.as_ref();
    match change {
        InstanceChange::Name(name) => words("name", instance.name(), name),
        InstanceChange::Description(text) => words("description", &record.description, text),
        InstanceChange::State(word) => words("state", instance.observed().state.word(), word.word()),
        InstanceChange::Locked(value) => words("locked", u8::from(lock.is_some()), u8::from(*value)),
        InstanceChange::LockedReason(text) => {
            words("locked_reason", lock.map_or("", |lock| lock.reason.as_str()), text)
        }
        InstanceChange::DisableTerminate(value) => {
            words("disable_terminate", u8::from(record.protection.disable_terminate), u8::from(*value))
        }
        InstanceChange::Owner(uid) => words("owner", record.ownership.owner, uid),
        InstanceChange::Project(gid) => words("project", record.ownership.project, gid),
        InstanceChange::Image(image) => {
            words("image", record.image.map(|image| image.to_string()).unwrap_or_default(), image)
        }
        // It may hold secrets.
        InstanceChange::UserData(_) => words("user_data", "", ""),
        InstanceChange::Flavor(choice) => words("flavor", record.flavor.as_deref().unwrap_or_default(), &choice.name),
        InstanceChange::Vcpus(count) => words("vcpus", record.vcpus, count),
        InstanceChange::MemoryBytes(bytes) => words("memory_bytes", record.memory_bytes, bytes),
        InstanceChange::RootDiskBytes(bytes) => {
            let present = record.root_disk_bytes.map(|bytes| bytes.to_string()).unwrap_or_default();
            words("root_disk_bytes", present, bytes)
        }
        InstanceChange::Network(network) => {
            let present = record.network.as_ref().map(|network| network.to_string()).unwrap_or_default();
            words("network", present, network)
        }
        InstanceChange::Autostart(value) => words("autostart", u8::from(instance.autostart()), u8::from(*value)),
        InstanceChange::StopTimeoutSeconds(seconds) => {
            words("stop_timeout_seconds", record.stop_timeout_seconds, seconds)
        }
        InstanceChange::RebootSoft => words("reboot", "", "soft"),
        InstanceChange::RebootHard => words("reboot", "", "hard"),
        InstanceChange::ResetState => words("reset_state", "", "1"),
        InstanceChange::Restore => words("state", instance.observed().state.word(), "restored"),
        InstanceChange::SettleBin => {
            words("state", instance.observed().state.word(), instance::State::SoftDeleted.word())
        }
        InstanceChange::ExpiresAt(at) => expires_at(record.bin.as_ref().map(|bin| &bin.entry), *at),
        InstanceChange::Metadata(key, text) => metadata(&record.metadata, key, text.as_ref()),
    }
}

/// Tells of a change of an image, before it is made.
pub(super) fn describe_image(image: &Image, change: &ImageChange) -> Words {
    let record = &image.record;
    match change {
        ImageChange::Name(name) => words("name", &record.name, name),
        ImageChange::Description(text) => words("description", &record.description, text),
        ImageChange::State(word) => words("state", image.state().word(), word.word()),
        ImageChange::DiskFormat(format) => {
            words("disk_format", record.disk_format.map_or("", |format| format.word()), format.word())
        }
        ImageChange::Owner(uid) => words("owner", record.ownership.owner, uid),
        ImageChange::Project(gid) => words("project", record.ownership.project, gid),
        ImageChange::Metadata(key, text) => metadata(&record.metadata, key, text.as_ref()),
        ImageChange::ImportFrom(source) => words(
            "import_from",
            record.import_from.as_deref().unwrap_or_default(),
            source.as_deref().unwrap_or_default(),
        ),
        ImageChange::Restore => words("state", image.state().word(), "restored"),
        ImageChange::ExpiresAt(at) => expires_at(record.bin.as_ref(), *at),
        ImageChange::Visibility(wanted) => words("visibility", record.sharing.visibility.word(), wanted.word()),
        ImageChange::Share(project) => words("share", "", project),
        ImageChange::Unshare(project) => words("unshare", project, ""),
        ImageChange::Member { project, status } => {
            let present = record.sharing.members.get(*project).map_or("", Status::word);
            words(format!("members/{project}"), present, status.word())
        }
        ImageChange::DeleteProtection(value) => {
            words("delete_protection", u8::from(record.delete_protection), u8::from(*value))
        }
        ImageChange::MinDiskBytes(bytes) => words("min_disk_bytes", record.min_disk_bytes, bytes),
        ImageChange::MinMemoryBytes(bytes) => words("min_memory_bytes", record.min_memory_bytes, bytes),
    }
}

pub(super) fn expires_at(entry: Option<&BinEntry>, wanted: Option<u64>) -> Words {
    let shown = |at: Option<u64>| at.map_or_else(|| "never".to_owned(), |at| at.to_string());
    words("expires_at", shown(entry.and_then(|entry| entry.expiry).map(|expiry| expiry.at)), shown(wanted))
}

fn metadata(keys: &Keys<String>, key: &str, text: Option<&String>) -> Words {
    let shown = |text: Option<&String>| text.cloned().unwrap_or_default();
    words(format!("metadata/{key}"), shown(keys.get(key)), shown(text))
}

fn set_metadata(keys: &mut Keys<String>, key: &str, text: Option<&String>) -> Result<(), Reason> {
    match text {
        Some(text) => keys.set(key, text.clone()),
        None => {
            keys.remove(key);
            Ok(())
        }
    }
}

/// Tells of a change of a flavor, before it is made.
pub(super) fn describe_flavor(flavor: &Flavor, change: &FlavorChange) -> Words {
    let record = &flavor.record;
    let size = |bytes: Option<u64>| bytes.map(|bytes| bytes.to_string()).unwrap_or_default();
    let list = |groups: &[u32]| groups.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
    match change {
        FlavorChange::Description(text) => words("description", &record.description, text),
        FlavorChange::State(word) => words("state", flavor::state(record).word(), word.word()),
        FlavorChange::Vcpus(count) => words("vcpus", record.vcpus, count),
        FlavorChange::MemoryBytes(bytes) => words("memory_bytes", record.memory_bytes, bytes),
        FlavorChange::RootDiskBytes(bytes) => words("root_disk_bytes", size(record.root_disk_bytes), size(*bytes)),
        FlavorChange::IsPublic(value) => words("is_public", u8::from(record.is_public), u8::from(*value)),
        FlavorChange::Access(groups) => words("access", list(&record.access), list(groups)),
    }
}

/// Whether the domain's metadata tells of this attribute.
pub(super) fn is_mirrored(change: &InstanceChange) -> bool {
    match change {
        InstanceChange::Description(_)
        | InstanceChange::Locked(_)
        | InstanceChange::LockedReason(_)
        | InstanceChange::DisableTerminate(_)
        | InstanceChange::Owner(_)
        | InstanceChange::Project(_)
        | InstanceChange::Metadata(..) => true,
        InstanceChange::Name(_)
        | InstanceChange::State(_)
        | InstanceChange::Image(_)
        | InstanceChange::Flavor(_)
        | InstanceChange::UserData(_)
        | InstanceChange::Vcpus(_)
        | InstanceChange::MemoryBytes(_)
        | InstanceChange::RootDiskBytes(_)
        | InstanceChange::Network(_)
        | InstanceChange::Autostart(_)
        | InstanceChange::StopTimeoutSeconds(_)
        | InstanceChange::RebootSoft
        | InstanceChange::RebootHard
        | InstanceChange::ResetState
        | InstanceChange::Restore
        | InstanceChange::SettleBin
        | InstanceChange::ExpiresAt(_) => false,
    }
}

impl Judge<'_, '_> {
    /// Writes an attribute that is nothing but a record.
    pub(super) fn record_instance(
        &self,
        instance: &mut Instance,
        caller: &Caller,
        change: &InstanceChange,
    ) -> Result<(), Reason> {
        let role = caller.role(&instance.record.ownership);
        let id = instance.id;
        let record = &mut instance.record;
        match change {
            InstanceChange::Name(name) => {
                self.name_is_free(name, id)?;
                record.name.clone_from(name);
            }
            InstanceChange::Description(text) => record.description.clone_from(text),
            InstanceChange::Locked(true) => {
                let reason = record.protection.lock.take().map(|lock| lock.reason).unwrap_or_default();
                let level = if role.is_administrator() { Level::Admin } else { Level::Owner };
                record.protection.lock = Some(Lock { by: caller.login.clone(), at: self.now, level, reason });
            }
            InstanceChange::Locked(false) => record.protection.lock = None,
            InstanceChange::LockedReason(text) => {
                if let Some(lock) = &mut record.protection.lock {
                    lock.reason.clone_from(text);
                }
            }
            InstanceChange::DisableTerminate(value) => record.protection.disable_terminate = *value,
            InstanceChange::Owner(uid) => hand_over(&mut record.ownership, |ownership| ownership.owner = *uid),
            InstanceChange::Project(gid) => hand_over(&mut record.ownership, |ownership| ownership.project = *gid),
            InstanceChange::Image(image) => {
                let found = self.batch.image(*image);
                let found = found.ok_or_else(|| Reason::NotFound(format!("image {image}")))?;
                if found.record.bin.is_some() {
                    return Err(Reason::Policy(format!(
                        "this image is in the bin; bring it back first: mv trash/{image} images/{image}"
                    )));
                }
                record.image = Some(*image);
            }
            InstanceChange::UserData(text) => record.user_data.clone_from(text),
            InstanceChange::Flavor(choice) => {
                let sizes = choice.sizes.clone()?;
                record.flavor = Some(choice.name.clone());
                record.vcpus = sizes.vcpus;
                record.memory_bytes = sizes.memory_bytes;
                record.root_disk_bytes = sizes.root_disk_bytes.or(record.root_disk_bytes);
            }
            InstanceChange::Vcpus(count) => record.vcpus = *count,
            InstanceChange::MemoryBytes(bytes) => record.memory_bytes = *bytes,
            InstanceChange::RootDiskBytes(bytes) => record.root_disk_bytes = Some(*bytes),
            InstanceChange::Network(network) => {
                network::supported(network, &self.shared.parts.hypervisor.networks())?;
                record.network = Some(network.clone());
            }
            InstanceChange::Autostart(value) => record.autostart = *value,
            InstanceChange::StopTimeoutSeconds(seconds) => record.stop_timeout_seconds = *seconds,
            InstanceChange::Metadata(key, text) => set_metadata(&mut record.metadata, key, text.as_ref())?,
            InstanceChange::ExpiresAt(at) => {
                if let Some(bin) = &mut record.bin {
                    bin.entry.expiry = at.map(|at| bin::expiry(self.shared, self.now, at));
                }
            }
            // These are operations.
            InstanceChange::State(_)
            | InstanceChange::Restore
            | InstanceChange::SettleBin
            | InstanceChange::RebootSoft
            | InstanceChange::RebootHard
            | InstanceChange::ResetState => {}
        }
        Ok(())
    }

    /// Writes an attribute of an image that is nothing but a record.
    pub(super) fn record_image(&self, image: &mut Image, caller: &Caller, change: &ImageChange) -> Result<(), Reason> {
        let record = &mut image.record;
        match change {
            ImageChange::Name(name) => record.name.clone_from(name),
            ImageChange::Description(text) => record.description.clone_from(text),
            ImageChange::DiskFormat(format) => record.disk_format = Some(*format),
            ImageChange::Owner(uid) => hand_over(&mut record.ownership, |ownership| ownership.owner = *uid),
            ImageChange::Project(gid) => hand_over(&mut record.ownership, |ownership| ownership.project = *gid),
            ImageChange::Metadata(key, text) => set_metadata(&mut record.metadata, key, text.as_ref())?,
            ImageChange::ImportFrom(source) => record.import_from.clone_from(source),
            ImageChange::Visibility(wanted) => record.sharing.visibility = *wanted,
            ImageChange::Share(project) => {
                record.sharing.members.set(*project, Status::Pending)?;
            }
            ImageChange::Unshare(project) => record.sharing.members.remove(*project),
            ImageChange::Member { project, status } => record.sharing.members.set(*project, *status)?,
            ImageChange::DeleteProtection(value) => record.delete_protection = *value,
            ImageChange::MinDiskBytes(bytes) => record.min_disk_bytes = *bytes,
            ImageChange::MinMemoryBytes(bytes) => record.min_memory_bytes = *bytes,
            ImageChange::Restore => record.bin = None,
            ImageChange::ExpiresAt(at) => {
                if let Some(entry) = &mut record.bin {
                    entry.expiry = at.map(|at| bin::expiry(self.shared, self.now, at));
                }
            }
            ImageChange::State(image::Word::State(image::State::SoftDeleted)) => {
                record.bin = Some(bin::entry(self.shared, caller, self.now));
            }
            ImageChange::State(image::Word::State(state)) => {
                record.bin = None;
                record.deactivated = *state == image::State::Deactivated;
            }
            // An operation.
            ImageChange::State(image::Word::Deleted) => {}
        }
        Ok(())
    }
}

/// Writes an attribute of a flavor.
pub(super) fn record_flavor(flavor: &mut Flavor, change: &FlavorChange) {
    let record = &mut flavor.record;
    match change {
        FlavorChange::Description(text) => record.description.clone_from(text),
        FlavorChange::State(Word::State(State::Active)) => record.draft = None,
        FlavorChange::State(Word::State(State::Draft)) => record.draft = Some(Draft { written: true }),
        FlavorChange::Vcpus(count) => record.vcpus = *count,
        FlavorChange::MemoryBytes(bytes) => record.memory_bytes = *bytes,
        FlavorChange::RootDiskBytes(bytes) => record.root_disk_bytes = *bytes,
        FlavorChange::IsPublic(value) => record.is_public = *value,
        FlavorChange::Access(groups) => record.access.clone_from(groups),
        // Its removal.
        FlavorChange::State(Word::Deleted) => {}
    }
}

/// Handles that were opened before can tell.
pub(super) fn hand_over(ownership: &mut Ownership, change: impl FnOnce(&mut Ownership)) {
    change(ownership);
    ownership.generation += 1;
}
