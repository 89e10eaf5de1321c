//! Drafts become real: root disk, definition, and start if it is to boot.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::sync::Arc;

use uuid::Uuid;

use super::journal::{has_run, is_active, without_disk};
use super::ledger::now;
use super::operation::{Ending, Halt, Run, WhenFull};
use super::{network, seed, volume};
use crate::block::{BlockError, NewDisk, NewSeed};
use crate::hypervisor::HypervisorError;
use crate::hypervisor::definition::{AttachedDisk, BackingImage, METADATA_NAMESPACE, NewDomain};
use crate::inventory::{Image, Instance, Object, Volume};
use crate::model::image::State;
use crate::model::reason::Reason;
use crate::model::record::{DiskRecord, InstanceRecord};
use crate::model::task::Creation;
use crate::model::volume::device;

/// The step after which the guest may have run.
pub(super) const START: &str = "start";

const ROOT_DISK: &str = "root_disk";
const SEED: &str = "seed";
const DEFINE: &str = "define";
const LEFTOVERS: &str = "leftovers";

/// What follows the definition.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    Start,
    StayOff,
}

/// Makes a draft real.
pub(super) fn boot(run: &Run, then: Then) -> Result<Ending, Halt> {
    let instance = run.instance()?;
    let root = root(run, &instance.record)?;
    let size_bytes = root.size_bytes(&instance.record).map_err(Halt::Failed)?;
    match run.look()? {
        Some(domain) => {
            let ours = run.maker()?;
            if run.has_begun(START)? && has_run(&domain) {
                return ran(run);
            }
            if ours != Some(run.id) {
                if is_active(&domain) || !made_by_us(run, &instance, ours) {
                    return Err(Halt::Failed(Reason::Failed(
                        "a domain of this uuid exists already and was defined outside; undefine or keep it, and make \
                         a draft with another uuid"
                            .to_owned(),
                    )));
                }
                clear_leftovers(run)?;
                make(run, &root, size_bytes)?;
            }
        }
        None => {
            clear_leftovers(run)?;
            make(run, &root, size_bytes)?;
        }
    }
    set_autostart(run)?;
    match then {
        Then::StayOff => {}
        Then::Start => {
            run.begin(START)?;
            start(run)?;
        }
    }
    run.refresh()?;
    Ok(real(then, Some(size_bytes)))
}

/// The end of a boot whose guest turned out to have run.
pub(super) fn ran(run: &Run) -> Result<Ending, Halt> {
    let instance = run.instance()?;
    let size_bytes = instance.record.root_disk_bytes.or_else(|| {
        let root = root(run, &instance.record).ok()?;
        root.size_bytes(&instance.record).ok()
    });
    // A connection that is lost again does not change what happened.
    let _shown_later = run.refresh();
    Ok(real(Then::Start, size_bytes))
}

fn real(then: Then, size_bytes: Option<u64>) -> Ending {
    Ending::Instance(Box::new(move |instance: &mut Instance| {
        instance.record.draft = None;
        instance.record.root_disk_bytes = size_bytes;
        instance.record.crashed = None;
        match then {
            Then::Start => instance.record.launched_at = Some(now()),
            Then::StayOff => {}
        }
    }))
}

/// What a draft is to boot from.
enum Root {
    /// A disk that is made of this image.
    Image(Arc<Image>),
    /// The volume that it has as its first disk.
    Volume(Arc<Volume>),
}

impl Root {
    fn size_bytes(&self, record: &InstanceRecord) -> Result<u64, Reason> {
        match self {
            Root::Image(image) => disk_size(record, image),
            Root::Volume(volume) => Ok(volume.record.size_bytes),
        }
    }
}

fn root(run: &Run, record: &InstanceRecord) -> Result<Root, Halt> {
    match root_volume(record) {
        Some(id) => {
            let volume = run.shared.parts.ledger.inventory().volume(id);
            volume.map(Root::Volume).ok_or_else(|| Halt::Failed(Reason::NotFound(format!("volume {id}"))))
        }
        None => usable_image(run, record).map(Root::Image),
    }
}

/// The volume that an instance boots from.
pub(super) fn root_volume(record: &InstanceRecord) -> Option<Uuid> {
    record.volumes.get(device::ROOT).copied()
}

/// Whether a draft can boot from the volume that it has as its first disk.
pub(super) fn can_boot_from(record: &InstanceRecord, volume: &Volume) -> Result<(), Reason> {
    if record.image.is_some() {
        return Err(Reason::Malformed(
            "it has an image and a volume to boot from; detach the volume, or make a draft without an image".to_owned(),
        ));
    }
    if !volume.record.bootable {
        return Err(Reason::Malformed(format!(
            "the volume {} that it is to boot from is not bootable; write 1 to its bootable first",
            volume.id
        )));
    }
    Ok(())
}

fn make(run: &Run, root: &Root, size_bytes: u64) -> Result<(), Halt> {
    let root_disk = match root {
        Root::Image(image) => Some(make_root_disk(run, image, size_bytes)?),
        Root::Volume(_) => None,
    };
    let seed = make_seed(run)?;
    define(run, root_disk, seed.as_ref())
}

fn make_root_disk(run: &Run, image: &Image, size_bytes: u64) -> Result<(DiskRecord, BackingImage), Halt> {
    let image_path = run.shared.image_path(image.id);
    let format = image.record.disk_format.ok_or_else(|| Halt::Failed(not_active()))?;
    let disk =
        NewDisk { instance: run.object, operation: run.id, image: &image_path, image_format: format, size_bytes };
    let record = run.shared.parts.block.plan(&disk);
    run.begin_creating(ROOT_DISK, Creation::Disk(record.clone()))?;
    run.shared.parts.block.create(&disk).map_err(|error| Halt::Failed(of_block(error)))?;
    run.proceed()?;
    Ok((record, BackingImage { path: image_path.clone(), format }))
}

/// Makes the disk that tells the guest its `user_data`, if it has some.
fn make_seed(run: &Run) -> Result<Option<DiskRecord>, Halt> {
    let instance = run.instance()?;
    let Some(user_data) = &instance.record.user_data else { return Ok(None) };
    let meta_data = seed::meta_data(run.object, &instance.record.name);
    let documents = [("user-data", user_data.as_bytes()), ("meta-data", meta_data.as_bytes())];
    let new = NewSeed { instance: run.object, operation: run.id, documents: &documents };
    let record = run.shared.parts.block.plan_seed(&new);
    run.begin_creating(SEED, Creation::Disk(record.clone()))?;
    run.shared.parts.block.create_seed(&new).map_err(|error| Halt::Failed(of_block(error)))?;
    run.proceed()?;
    Ok(Some(record))
}

/// Part of the definition: its removal takes this back.
fn set_autostart(run: &Run) -> Result<(), Halt> {
    if run.instance()?.record.autostart && !run.look()?.is_some_and(|domain| domain.autostart) {
        run.hypervisor().set_autostart(run.object, true)?;
    }
    Ok(())
}

fn define(run: &Run, root_disk: Option<(DiskRecord, BackingImage)>, seed: Option<&DiskRecord>) -> Result<(), Halt> {
    let accelerator = run.hypervisor().accelerator()?;
    let console_log = run.shared.console_path(run.object);
    make_directory_of(&console_log).map_err(|error| {
        Halt::Failed(Reason::Failed(format!("the directory of {} cannot be made: {error}", console_log.display())))
    })?;
    run.begin_creating(DEFINE, Creation::Definition)?;
    // Read after the journal, so that what was written before the claim is in it.
    let record = &run.instance()?.record;
    let (root_disk, image) = root_disk.unzip();
    let domain = NewDomain {
        uuid: run.object,
        name: record.name.clone(),
        description: record.description.clone(),
        vcpus: record.vcpus,
        memory_bytes: record.memory_bytes,
        network: record.network.clone().unwrap_or_else(|| run.hypervisor().networks().default),
        root_disk: root_disk.map(|disk| run.shared.parts.block.path(&disk)),
        image,
        volumes: volumes(run, record)?,
        seed: seed.map(|seed| run.shared.parts.block.path(seed)),
        console_log,
        accelerator,
        metadata: mark(run.id),
    };
    let xml = domain.to_xml(&run.hypervisor().definition_profile());
    match run.hypervisor().define(&xml) {
        Ok(()) => Ok(()),
        Err(HypervisorError::Exists(_)) => Err(Halt::Failed(Reason::NameTaken(record.name.clone()))),
        Err(error) => Err(error.into()),
    }
}

/// The volumes that a draft has, as the disks that it is to have.
fn volumes(run: &Run, record: &InstanceRecord) -> Result<Vec<AttachedDisk>, Halt> {
    let disks = record.volumes.iter().map(|(device, entry)| {
        let volume = run.shared.parts.ledger.inventory().volume(entry.value);
        let volume = volume.ok_or_else(|| Halt::Failed(Reason::NotFound(format!("volume {}", entry.value))))?;
        volume::disk(run, &volume, device)
    });
    disks.collect()
}

fn start(run: &Run) -> Result<(), Halt> {
    match run.hypervisor().start(run.object) {
        Ok(()) => Ok(()),
        Err(HypervisorError::Unreachable(_)) => Err(Halt::Lost),
        Err(error) => match run.look()? {
            // An earlier call, or another client, was first.
            Some(domain) if has_run(&domain) => Ok(()),
            Some(_) | None => Err(not_started(run, error)),
        },
    }
}

/// Why a guest did not start: its network may have gone since it was last looked for.
pub(super) fn not_started(run: &Run, error: HypervisorError) -> Halt {
    let networks = run.hypervisor().networks();
    let network = run.instance().ok().and_then(|instance| instance.record.network.clone());
    match network::exists(network.as_ref(), &networks) {
        Ok(()) => error.into(),
        Err(reason) => Halt::Failed(reason),
    }
}

/// Removes what a failed undo of an earlier operation left of this draft: exactly the disks in its record, and a
/// definition that was made by the same operation.
pub(super) fn clear_leftovers(run: &Run) -> Result<(), Halt> {
    let instance = run.instance()?;
    clear_definition(run, &instance)?;
    for disk in instance.record.disks.iter().filter(|disk| disk.operation != run.id) {
        run.guard()?;
        run.begin(LEFTOVERS)?;
        if let Some(domain) = run.look()? {
            if is_active(&domain) || run.maker()? != Some(disk.operation) {
                return Err(Halt::Failed(Reason::Failed(format!(
                    "a domain of this uuid exists and may use the disk {}; it is kept",
                    disk.reference
                ))));
            }
            run.guard()?;
            run.hypervisor().undefine(run.object)?;
        }
        run.guard()?;
        run.shared.parts.block.remove(disk).map_err(|error| Halt::Failed(of_block(error)))?;
        let (object, disk) = (run.object, disk.clone());
        run.store(
            Arc::new(move |batch| {
                if let Some(instance) = batch.instance(object) {
                    batch.put(Object::Instance(Arc::new(without_disk(&instance, &disk))));
                }
            }),
            WhenFull::Wait,
        )?;
    }
    Ok(())
}

/// Of a draft without disks of its own only the definition can have stayed.
fn clear_definition(run: &Run, instance: &Instance) -> Result<(), Halt> {
    if !instance.record.disks.is_empty() || instance.record.draft.is_none() {
        return Ok(());
    }
    let Some(domain) = run.look()? else { return Ok(()) };
    let maker = run.maker()?;
    if is_active(&domain) || maker == Some(run.id) || !made_by_us(run, instance, maker) {
        return Ok(());
    }
    run.guard()?;
    run.begin(LEFTOVERS)?;
    run.guard()?;
    Ok(run.hypervisor().undefine(run.object)?)
}

/// Whether an earlier operation of ours made the domain, of which a disk or the finished task tells.
fn made_by_us(run: &Run, instance: &Instance, maker: Option<Uuid>) -> bool {
    let Some(maker) = maker else { return false };
    let task = run.shared.parts.ledger.inventory().task(maker);
    instance.record.disks.iter().any(|disk| disk.operation == maker)
        || task.is_some_and(|task| task.record.object == run.object)
}

/// The image that a draft names, if a disk can be made of it.
fn usable_image(run: &Run, record: &InstanceRecord) -> Result<Arc<Image>, Halt> {
    let id = record.image.ok_or_else(|| Halt::Failed(no_image()))?;
    let image = run.shared.parts.ledger.inventory().image(id);
    let image = image.ok_or_else(|| Halt::Failed(Reason::NotFound(format!("image {id}"))))?;
    // One that was deactivated since the boot was accepted is still used: the guest may run on it already.
    if image.record.draft.is_some() { Err(Halt::Failed(not_active())) } else { Ok(image) }
}

/// Whether the image's state lets new disks be made of it.
pub(super) fn can_make_disks(image: &Image) -> Result<(), Reason> {
    match image.state() {
        State::Active => Ok(()),
        State::Draft => Err(not_active()),
        State::Deactivated => Err(Reason::Deactivated),
        state @ (State::Error | State::SoftDeleted) => {
            Err(Reason::Image(format!("its image is {}; write another image first", state.word())))
        }
    }
}

/// Whether a draft has what its image demands of a guest.
pub(super) fn demands(record: &InstanceRecord, image: &Image) -> Result<(), Reason> {
    let demand = |file, present, demand, least| match present < least {
        true => Err(Reason::TooSmall { file, present, demand, least }),
        false => Ok(()),
    };
    let disk_bytes = disk_size(record, image)?;
    demand("root_disk_bytes", disk_bytes, "min_disk_bytes", image.record.min_disk_bytes)?;
    demand("memory_bytes", record.memory_bytes, "min_memory_bytes", image.record.min_memory_bytes)
}

/// The size of the root disk in bytes: the wanted one, which the image has to fit in, or the image's.
pub(super) fn disk_size(record: &InstanceRecord, image: &Image) -> Result<u64, Reason> {
    let least = image.record.virtual_size_bytes;
    match record.root_disk_bytes {
        None => Ok(least),
        Some(bytes) if bytes >= least => Ok(bytes),
        Some(_) => Err(Reason::OutOfRange { low: least, high: i64::MAX as u64, unit: "bytes (the image's size)" }),
    }
}

/// A draft without an image cannot boot.
pub(super) fn no_image() -> Reason {
    Reason::Malformed("it has no image; write an image first".to_owned())
}

/// Neither can one whose image is a draft.
pub(super) fn not_active() -> Reason {
    Reason::Malformed("its image is still a draft; write active to the image's state first".to_owned())
}

/// What a failing block backend means to the caller.
pub(super) fn of_block(error: BlockError) -> Reason {
    match error {
        BlockError::NoSpace(place) => Reason::NoSpace(place),
        BlockError::Quota(place) => Reason::DiskQuota(place),
        BlockError::Missing(what) => Reason::NotFound(what),
        BlockError::Damaged(words) => Reason::Damaged(words),
        BlockError::InUse(words) => Reason::InUse(words),
        BlockError::Refused(words) => Reason::Image(words),
        error @ (BlockError::Exists(_) | BlockError::NotOurs(_) | BlockError::Cancelled | BlockError::Failed(_)) => {
            Reason::Failed(error.to_string())
        }
    }
}

/// Our element in the metadata of a new definition, which tells it from others' until it is mirrored.
fn mark(operation: Uuid) -> String {
    format!("<instancefs:instance xmlns:instancefs=\"{METADATA_NAMESPACE}\" operation=\"{operation}\"/>")
}

/// The operation in [`mark`].
pub(super) fn maker(xml: &str) -> Option<Uuid> {
    let document = roxmltree::Document::parse(xml).ok()?;
    let metadata = document.root_element().children().find(|node| node.has_tag_name("metadata"))?;
    let ours = metadata.children().find(|node| node.tag_name().namespace() == Some(METADATA_NAMESPACE))?;
    Uuid::try_parse(ours.attribute("operation")?).ok()
}

/// Makes the directory that a file is to lie in, passable for QEMU.
fn make_directory_of(path: &std::path::Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => fs::DirBuilder::new().recursive(true).mode(0o711).create(parent),
        None => Ok(()),
    }
}
