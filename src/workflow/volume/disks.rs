//! A volume as a disk of an instance: what both of the domain's definitions say of it. It is known there by its path, since
//! that says what a guest writes to.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use crate::hypervisor::definition::{self, AttachedDisk, Definition};
use crate::hypervisor::{Domain, Hypervisor, HypervisorError, Places};
use crate::inventory::{Instance, Object, Volume};
use crate::model::domain::DiskSource;
use crate::model::image::Format;
use crate::model::reason::Reason;
use crate::model::volume::device;
use crate::model::volume::record::{Attachment, VolumeData};
use crate::workflow::boot::of_block;
use crate::workflow::ledger::{Batch, now};
use crate::workflow::operation::{Ending, Halt, Run};

/// A domain as it was looked at for a disk.
pub(super) struct Seen {
    pub(super) domain: Domain,
    /// What outlives its run.
    persistent: String,
    /// What the guest has, if there is one.
    pub(super) live: Option<String>,
}

/// The devices as which a volume is in each definition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) persistent: Option<String>,
    pub(super) live: Option<String>,
}

impl Seen {
    /// `None`: there is no such domain.
    pub(super) fn of(run: &Run, instance: Uuid) -> Result<Option<Seen>, Halt> {
        let hypervisor = run.hypervisor();
        match look(hypervisor, instance) {
            Ok(seen) => Ok(seen),
            // It went between the questions.
            Err(HypervisorError::NoDomain) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Where the disk is.
    pub(super) fn find(&self, path: &Path) -> Result<Found, Halt> {
        let device = |xml: &str| -> Result<Option<String>, Halt> {
            let definition = Definition::parse(xml).map_err(|error| Halt::Failed(Reason::Failed(error)))?;
            let disk = definition.disks.into_iter().find(|disk| disk.path.as_deref() == Some(path));
            Ok(disk.map(|disk| disk.device))
        };
        Ok(Found {
            persistent: device(&self.persistent)?,
            live: self.live.as_deref().map(device).transpose()?.flatten(),
        })
    }

    /// Where it is still to be put.
    pub(super) fn missing(&self, found: &Found) -> Option<Places> {
        let missing =
            Places { persistent: found.persistent.is_none(), live: self.live.is_some() && found.live.is_none() };
        (missing.persistent || missing.live).then_some(missing)
    }

    /// Whether any disk has this device name, in either definition.
    pub(super) fn is_taken(&self, device: &str) -> bool {
        let xml = [Some(&self.persistent), self.live.as_ref()];
        xml.into_iter().flatten().any(|xml| definition::targets(xml).iter().any(|target| target == device))
    }
}

fn look(hypervisor: &dyn Hypervisor, instance: Uuid) -> Result<Option<Seen>, HypervisorError> {
    let Some(domain) = hypervisor.domain(instance)? else { return Ok(None) };
    let persistent = hypervisor.definition(instance)?;
    let live = if domain.power.is_on() { hypervisor.live_definition(instance)? } else { None };
    Ok(Some(Seen { domain, persistent, live }))
}

impl Found {
    /// The device, if it is anywhere.
    pub(super) fn device(&self) -> Option<&str> {
        self.persistent.as_deref().or(self.live.as_deref())
    }
}

/// A volume's data.
pub(super) fn data(volume: &Volume) -> Result<&VolumeData, Halt> {
    volume.record.data.as_ref().ok_or_else(|| Halt::Failed(Reason::NotFound("data of this volume".to_owned())))
}

/// The format of its bytes.
pub(super) fn format(volume: &Volume) -> Format {
    match &volume.record.data {
        Some(VolumeData::Ours(data)) => data.format,
        Some(VolumeData::Existing(data)) => data.format,
        // What is not known to be anything else is never read as anything else.
        None => volume.record.disk_format.unwrap_or(Format::Raw),
    }
}

/// A volume as a disk of a guest, which may open it from now on.
pub(in crate::workflow) fn disk(run: &Run, volume: &Volume, device: &str) -> Result<AttachedDisk, Halt> {
    let data = data(volume)?;
    let backend = run.shared.backend_of(data).map_err(Halt::Failed)?;
    backend.prepare(data).map_err(|error| Halt::Failed(of_block(error)))?;
    Ok(AttachedDisk {
        source: backend.source(data),
        format: format(volume),
        device: device.to_owned(),
        volume: volume.id,
        is_shared: volume.record.multiattach,
        boots: device == device::ROOT,
    })
}

/// How a guest reaches a volume.
fn source(run: &Run, volume: &Volume) -> Result<DiskSource, Halt> {
    let data = data(volume)?;
    let backend = run.shared.backend_of(data).map_err(Halt::Failed)?;
    Ok(backend.source(data))
}

/// The path of a volume, as definitions name it.
pub(super) fn path(run: &Run, volume: &Volume) -> Result<PathBuf, Halt> {
    Ok(match source(run, volume)? {
        DiskSource::File(path) | DiskSource::Block(path) => path,
    })
}

/// The instance that the operation owns beside its volume.
pub(super) fn instance(run: &Run, id: Uuid) -> Result<Arc<Instance>, Halt> {
    let instance = run.shared.parts.ledger.inventory().instance(id);
    instance.ok_or_else(|| Halt::Failed(Reason::NotFound(format!("instance {id}"))))
}

/// Whether disks of an instance can come and go, as far as its record says it.
pub(super) fn can_change(instance: &Instance) -> Result<(), Reason> {
    match (&instance.domain, &instance.record) {
        (_, record) if record.bin.is_some() => {
            Err(Reason::Policy("the instance is in the bin; bring it back first".to_owned()))
        }
        (_, record) if record.draft.is_some() => Ok(()),
        (None, _) => Err(undefined()),
        (Some(domain), _) if domain.has_managed_save && !domain.power.is_on() => Err(suspended()),
        (Some(_), _) => Ok(()),
    }
}

/// Its domain was undefined outside.
pub(super) fn not_defined() -> Halt {
    Halt::Failed(undefined())
}

fn undefined() -> Reason {
    Reason::InUse(
        "the instance's domain is not defined; write stopped to its state, or delete it for good, first".to_owned(),
    )
}

/// Memory on the disk fits only the disks that the guest had.
pub(super) fn has_no_saved_memory(domain: &Domain) -> Result<(), Halt> {
    if domain.has_managed_save && !domain.power.is_on() {
        return Err(Halt::Failed(suspended()));
    }
    Ok(())
}

/// See [`has_no_saved_memory`].
pub(super) fn suspended() -> Reason {
    Reason::InUse(
        "the instance is suspended, and its saved memory fits only the disks that it has; write active to its state first"
            .to_owned(),
    )
}

/// The end of an attachment: both records say it.
pub(super) fn attached(volume: Uuid, instance: Uuid, device: String) -> Ending {
    Ending::Edit(Box::new(move |batch| record_attached(batch, volume, instance, &device)))
}

/// The end of a detachment: neither does.
pub(super) fn detached(volume: Uuid, instance: Uuid) -> Ending {
    Ending::Edit(Box::new(move |batch| record_detached(batch, volume, instance)))
}

/// Says in both records that an instance has a volume, under this name and no other.
pub(in crate::workflow) fn record_attached(batch: &mut Batch<'_>, volume: Uuid, instance: Uuid, device: &str) {
    let (Some(volume), Some(instance)) = (batch.volume(volume), batch.instance(instance)) else { return };
    let (mut volume, mut instance) = ((*volume).clone(), (*instance).clone());
    let key = instance.id.to_string();
    let attached_at = volume.record.attachments.get(&key).map_or_else(now, |attachment| attachment.attached_at);
    let attachment = Attachment { device: device.to_owned(), attached_at };
    forget_devices(&mut instance, volume.id);
    let stored =
        volume.record.attachments.set(&key, attachment).and_then(|()| instance.record.volumes.set(device, volume.id));
    if let Err(reason) = stored {
        log::error!("that {} has the volume {} cannot be recorded: {reason}", instance.id, volume.id);
        return;
    }
    volume.record.updated_at = now();
    instance.record.updated_at = now();
    if let Some(draft) = &mut instance.record.draft {
        draft.written = true;
    }
    batch.put(Object::Volume(Arc::new(volume)));
    batch.put(Object::Instance(Arc::new(instance)));
}

/// Says in neither record that an instance has a volume.
pub(in crate::workflow) fn record_detached(batch: &mut Batch<'_>, volume: Uuid, instance: Uuid) {
    if let Some(volume) = batch.volume(volume) {
        let mut volume = (*volume).clone();
        volume.record.attachments.remove(&instance.to_string());
        volume.record.updated_at = now();
        batch.put(Object::Volume(Arc::new(volume)));
    }
    if let Some(instance) = batch.instance(instance) {
        let mut instance = (*instance).clone();
        forget_devices(&mut instance, volume);
        instance.record.updated_at = now();
        batch.put(Object::Instance(Arc::new(instance)));
    }
}

/// For an instance that leaves: its volumes stay, and nobody has them.
pub(in crate::workflow) fn record_all_detached(batch: &mut Batch<'_>, instance: Uuid) {
    let Some(leaving) = batch.instance(instance) else { return };
    for (_, entry) in leaving.record.volumes.iter() {
        record_detached(batch, entry.value, instance);
    }
}

fn forget_devices(instance: &mut Instance, volume: Uuid) {
    let volumes = &mut instance.record.volumes;
    let devices: Vec<_> =
        volumes.iter().filter(|(_, entry)| entry.value == volume).map(|(device, _)| device.to_owned()).collect();
    for device in devices {
        volumes.remove(&device);
    }
}
