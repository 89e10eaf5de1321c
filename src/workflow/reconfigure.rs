//! Reconfiguration of an instance that exists: hardware, root disk, autostart; and what the same change set asked for.
//!
//! The definition comes first, since libvirt is the one that refuses; its undo writes the former values. The disk comes
//! last, since a disk that has grown cannot be made smaller again without risk: it stays as it is, and the record says its
//! size. Once all is set nothing is undone any more, whatever becomes of the start that may follow.

use std::sync::Arc;

use super::boot::of_block;
use super::journal::is_active;
use super::ledger::Batch;
use super::operation::{Ending, Halt, Run, WhenFull};
use crate::hypervisor::definition::Definition;
use crate::hypervisor::{Domain, HypervisorError};
use crate::inventory::{Instance, Object};
use crate::model::reason::Reason;
use crate::model::reconfiguration::Reconfiguration;
use crate::model::record::DiskRole;
use crate::model::task::{Creation, Operation};

/// The step after which nothing is undone.
pub(super) const SET: &str = "set";

const SETTINGS: &str = "settings";
const ROOT_DISK: &str = "grow_root_disk";

/// Changes all of it, then does what is to follow.
pub(super) fn reconfigure(run: &Run, change: &Reconfiguration, then: Option<&Operation>) -> Result<Ending, Halt> {
    if !run.has_begun(SET)? {
        let domain = run.look()?.ok_or_else(|| Halt::from(HypervisorError::NoDomain))?;
        if change.needs_stopped() && (is_active(&domain) || domain.has_managed_save) {
            return Err(Halt::Failed(Reason::StoppedOnly));
        }
        set_definition(run, change, &domain)?;
        if let Some(bytes) = change.root_disk_bytes {
            grow(run, bytes)?;
        }
        let (object, change) = (run.object, change.clone());
        run.step(SET, None, move |batch| edit(batch, object, |instance| show(instance, &change)))?;
    }
    run.refresh()?;
    match then {
        Some(operation) => run.perform(operation),
        None => Ok(Ending::Instance(Box::new(|_: &mut Instance| {}))),
    }
}

fn set_definition(run: &Run, change: &Reconfiguration, domain: &Domain) -> Result<(), Halt> {
    let has_hardware = change.vcpus.is_some() || change.memory_bytes.is_some();
    if !has_hardware && change.autostart.is_none() {
        return Ok(());
    }
    // What an earlier life of the program journaled is what it was before; what it is now may be ours.
    if !run.has_begun(SETTINGS)? {
        let (vcpus, memory_bytes) = hardware(run)?;
        let former = Creation::Settings { vcpus, memory_bytes, autostart: domain.autostart };
        run.begin_creating(SETTINGS, former)?;
    }
    if has_hardware {
        run.hypervisor().set_hardware(run.object, change.vcpus, change.memory_bytes)?;
        let (vcpus, memory_bytes) = hardware(run)?;
        let kib = |bytes: u64| bytes.div_ceil(1024);
        let taken = change.vcpus.is_none_or(|wanted| wanted == vcpus)
            && change.memory_bytes.is_none_or(|wanted| kib(wanted) == kib(memory_bytes));
        if !taken {
            return Err(Halt::Failed(Reason::Failed(format!(
                "libvirt made {vcpus} vcpus and {memory_bytes} bytes of memory of it, which was not asked for; see \
                 domain.xml for what else decides them"
            ))));
        }
    }
    if let Some(on) = change.autostart {
        run.hypervisor().set_autostart(run.object, on)?;
    }
    Ok(())
}

/// Virtual CPUs and bytes of memory as the definition says.
fn hardware(run: &Run) -> Result<(u32, u64), Halt> {
    let xml = run.hypervisor().definition(run.object)?;
    let unreadable = |words: String| Halt::Failed(Reason::Failed(words));
    let definition = Definition::parse(&xml).map_err(unreadable)?;
    let memory =
        definition.memory_bytes.ok_or_else(|| unreadable("the definition does not say its memory".to_owned()))?;
    // libvirt's default.
    Ok((definition.vcpus.unwrap_or(1), memory))
}

fn grow(run: &Run, bytes: u64) -> Result<(), Halt> {
    let instance = run.instance()?;
    let disk = instance.record.disks.iter().find(|disk| disk.role == DiskRole::Root);
    let disk = disk.ok_or_else(|| {
        Halt::Failed(Reason::Unsupported("its disk was not made by instancefs, which leaves it as it is".to_owned()))
    })?;
    run.begin(ROOT_DISK)?;
    run.shared.parts.block.grow(disk, bytes).map_err(|error| Halt::Failed(of_block(error)))?;
    // It stays so, whatever becomes of the rest.
    let object = run.object;
    run.store(
        Arc::new(move |batch| edit(batch, object, |instance| instance.record.root_disk_bytes = Some(bytes))),
        WhenFull::Wait,
    )
}

fn edit(batch: &mut Batch<'_>, object: uuid::Uuid, change: impl FnOnce(&mut Instance)) {
    if let Some(instance) = batch.instance(object) {
        let mut instance = (*instance).clone();
        change(&mut instance);
        batch.put(Object::Instance(Arc::new(instance)));
    }
}

/// Shows what the definition, which is fetched in the background, will say too.
fn show(instance: &mut Instance, change: &Reconfiguration) {
    let record = &mut instance.record;
    record.vcpus = change.vcpus.unwrap_or(record.vcpus);
    record.memory_bytes = change.memory_bytes.unwrap_or(record.memory_bytes);
    record.autostart = change.autostart.unwrap_or(record.autostart);
    if let Some(flavor) = &change.flavor {
        record.flavor = Some(flavor.clone());
    }
}
