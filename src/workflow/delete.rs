//! Deletion for good: what is in the bin, with exactly what instancefs made for it.
//!
//! It rolls forward. What is gone stays gone; whatever stops it in the middle leaves the rest in the bin. Before each
//! step that destroys everything is asked again: lock, protection, and who uses it.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use super::boot::of_block;
use super::events::Entry;
use super::journal::{is_active, without_disk};
use super::operation::{Ending, Halt, Run, WhenFull};
use super::{console_log, copies, drafts_data, kept};
use crate::block::{backing, open};
use crate::hypervisor::definition::{Definition, names};
use crate::hypervisor::{Domain, HypervisorError};
use crate::image;
use crate::inventory::{Image, Instance, Inventory, Object};
use crate::model::Class;
use crate::model::caller::Role;
use crate::model::protection::{Action, check_deletion};
use crate::model::reason::Reason;
use crate::model::task::Operation;
use crate::model::volume::VolumeOperation;
use crate::model::volume::record::Origin;

const VOLUME_CREATION: Operation = Operation::Volume(VolumeOperation::Create);

/// Removes an object for good.
pub(super) fn delete(run: &Run) -> Result<Ending, Halt> {
    match run.class {
        Class::Instance => instance(run),
        Class::Image => image(run),
        Class::Volume => super::volume::delete(run),
        // They have no bin.
        Class::Task | Class::Flavor | Class::Transfer | Class::Backend => Err(Halt::Failed(Reason::NotInBin)),
    }
}

/// Whether an instance looks as if it could be deleted now; asked again by the operation.
pub(super) fn may_delete_instance(instance: &Instance) -> Result<(), Reason> {
    match &instance.domain {
        Some(domain) if is_active(domain) => Err(running()),
        Some(_) | None => Ok(()),
    }
}

/// Whether an image does.
pub(super) fn may_delete_image(inventory: &Inventory, image: &Image, file: &Path) -> Result<(), Reason> {
    for volume in inventory.volumes() {
        let is_made = volume.task.as_ref().map(|task| &task.operation) == Some(&VOLUME_CREATION);
        if is_made && volume.record.created_from == Some(Origin::Image(image.id)) {
            return Err(Reason::InUse(format!("the volume {} is being made of it; try again after that", volume.id)));
        }
    }
    for instance in inventory.instances() {
        let record = &instance.record;
        // A draft that nothing was made for has only its name.
        let is_made = record.draft.is_none() || !record.disks.is_empty() || instance.task.is_some();
        if record.image == Some(image.id) && is_made {
            return Err(Reason::InUse(format!(
                "the disks of the instance {} ({}) are made from it; delete that for good first",
                instance.id,
                instance.name()
            )));
        }
        let definition = record.definition.as_ref();
        if definition.is_some_and(|definition| definition.disks.iter().any(|disk| disk.path.as_deref() == Some(file))) {
            return Err(named(instance.name()));
        }
    }
    Ok(())
}

fn running() -> Reason {
    Reason::InUse("it runs: somebody started it outside; stop it first, or write active to its state".to_owned())
}

fn named(domain: &str) -> Reason {
    Reason::InUse(format!("the definition of {domain} names it; delete that for good, or change it, first"))
}

fn instance(run: &Run) -> Result<Ending, Halt> {
    undefine(run)?;
    kept::release_all(run)?;
    for disk in &run.instance()?.record.disks {
        let path = run.shared.parts.block.path(disk);
        nobody_uses(run, &path)?;
        run.begin("remove_disk")?;
        may_destroy(run)?;
        run.shared.parts.block.remove(disk).map_err(|error| Halt::Failed(of_block(error)))?;
        let (object, disk) = (run.object, disk.clone());
        run.store(
            Arc::new(move |batch| {
                let Some(instance) = batch.instance(object) else { return };
                let mut instance = without_disk(&instance, &disk);
                // What is left in the definition at the end is what was not ours.
                if let Some(definition) = &mut instance.record.definition {
                    definition.disks.retain(|disk| disk.path.as_ref() != Some(&path));
                }
                batch.put(Object::Instance(Arc::new(instance)));
            }),
            WhenFull::Wait,
        )?;
    }
    copies::remove_all(run, &|| may_destroy(run).map(drop))?;
    may_destroy(run)?;
    let log = run.shared.console_path(run.object);
    if let Err(error) = console_log::remove(&log) {
        log::warn!("the console log {} stays: {error}", log.display());
    }
    tell_of_kept(run, &*run.instance()?);
    Ok(Ending::Removed)
}

/// Undefines the domain, which drops its saved memory. Its disks are asked about before, so that an instance whose
/// disks cannot go keeps its definition too.
fn undefine(run: &Run) -> Result<(), Halt> {
    if run.look()?.is_none() {
        return Ok(());
    }
    for disk in &run.instance()?.record.disks {
        nobody_uses(run, &run.shared.parts.block.path(disk))?;
    }
    let definition = match run.hypervisor().definition(run.object) {
        Ok(xml) => Definition::parse(&xml).ok(),
        Err(HypervisorError::NoDomain) => None,
        Err(error) => return Err(error.into()),
    };
    let object = run.object;
    // Which disks are kept is told at the end, when nobody can be asked any more.
    run.step("undefine", None, move |batch| {
        if let (Some(instance), Some(definition)) = (batch.instance(object), &definition) {
            let mut instance = (*instance).clone();
            instance.record.definition = Some(definition.clone());
            batch.put(Object::Instance(Arc::new(instance)));
        }
    })?;
    may_destroy(run)?;
    match run.hypervisor().undefine(run.object) {
        Ok(()) | Err(HypervisorError::NoDomain) => {}
        Err(error) => return Err(error.into()),
    }
    run.refresh()
}

/// Asked right before each step that destroys something of an instance.
fn may_destroy(run: &Run) -> Result<Option<Domain>, Halt> {
    let domain = run.look()?;
    let instance = run.instance()?;
    if instance.record.bin.is_none() {
        return Err(Halt::Failed(Reason::NotInBin));
    }
    instance.record.protection.check(Action::Delete, Role::Root).map_err(Halt::Failed)?;
    match &domain {
        Some(domain) if is_active(domain) => Err(Halt::Failed(running())),
        Some(_) | None => Ok(domain),
    }
}

/// Whether a file is needed by any other domain, or open.
pub(super) fn nobody_uses(run: &Run, path: &Path) -> Result<(), Halt> {
    // A definition may name the place as it is, or as it is reached.
    let mut paths = vec![path.to_owned()];
    paths.extend(path.canonicalize().ok().filter(|real| real != path));
    let file = fs::symlink_metadata(path).ok();
    for domain in run.hypervisor().domains()? {
        if domain.uuid == run.object {
            continue;
        }
        let xml = match run.hypervisor().definition(domain.uuid) {
            Ok(xml) => xml,
            Err(HypervisorError::NoDomain) => continue,
            Err(error) => return Err(error.into()),
        };
        if paths.iter().any(|path| names(&xml, path)) {
            return Err(Halt::Failed(named(&domain.name)));
        }
        let disks = Definition::parse(&xml).map(|definition| definition.disks).unwrap_or_default();
        for disk in disks {
            let (Some(file), Some(disk_path)) = (&file, &disk.path) else { continue };
            if backing::needs(disk_path, disk.format.as_deref() == Some("qcow2"), file) {
                return Err(Halt::Failed(Reason::InUse(format!(
                    "the disk {} of {} is made from it; delete that for good first",
                    disk_path.display(),
                    domain.name
                ))));
            }
        }
    }
    match open::holder(path) {
        Ok(None) => Ok(()),
        Ok(Some(holder)) => Err(Halt::Failed(Reason::InUse(format!(
            "{holder} has {} open; end that first, and ask again",
            path.display()
        )))),
        Err(error) => Err(Halt::Failed(Reason::Failed(format!(
            "whether anybody has {} open cannot be found out: {error}",
            path.display()
        )))),
    }
}

fn image(run: &Run) -> Result<Ending, Halt> {
    let path = run.shared.image_path(run.object);
    let ask = || {
        let image = run.image()?;
        if image.record.bin.is_none() {
            return Err(Halt::Failed(Reason::NotInBin));
        }
        check_deletion(image.record.delete_protection).map_err(Halt::Failed)?;
        may_delete_image(run.shared.parts.ledger.inventory(), &image, &path).map_err(Halt::Failed)
    };
    ask()?;
    nobody_uses(run, &path)?;
    run.begin("remove_data")?;
    ask()?;
    image::remove::remove(&path).map_err(|error| Halt::Failed(drafts_data::of_io(&error)))?;
    Ok(Ending::Removed)
}

/// Disks that instancefs did not make stay where they are, which one line of `events` says.
fn tell_of_kept(run: &Run, instance: &Instance) {
    // Its volumes are there, and known.
    let is_volume = |device: &str| instance.record.volumes.get(device).is_some();
    let disks = instance.record.definition.iter().flat_map(|definition| &definition.disks);
    let disks = disks.filter(|disk| !is_volume(&disk.device));
    let kept: Vec<_> = disks.filter_map(|disk| disk.path.as_ref()).map(|path| path.display().to_string()).collect();
    if kept.is_empty() {
        return;
    }
    run.shared.parts.events.record(Entry {
        class: Some(Class::Instance),
        id: Some(run.object),
        name: instance.name().to_owned(),
        uid: run.uid,
        login: run.login.clone(),
        what: "kept".to_owned(),
        from: String::new(),
        to: kept.join(" "),
        errno: String::new(),
        reason: "these disks were not made by instancefs, which never deletes them".to_owned(),
    });
}
