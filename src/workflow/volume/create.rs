//! A volume is made: empty, as a copy, or of data that is there already.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use super::{copying, edit, ending, nobody_uses, remove};
use crate::block::{DataRecord, DiskSource, ExistingData, Format, NewData, Source, VolumeData};
use crate::inventory::{Image, Inventory, Volume};
use crate::model::Class;
use crate::model::caller::{Caller, Role};
use crate::model::image;
use crate::model::instance::{idle, reachable};
use crate::model::reason::Reason;
use crate::model::sharing::may_read;
use crate::model::task::Creation;
use crate::model::volume::record::{Origin, VolumeRecord};
use crate::model::volume::{self, VolumeCreation};
use crate::workflow::boot::{can_make_disks, of_block};
use crate::workflow::engine::Shared;
use crate::workflow::judge::Judge;
use crate::workflow::ledger::Batch;
use crate::workflow::operation::{Ending, Halt, Run};

/// The step that makes the data.
const DATA: &str = "data";
/// The step that takes over data that is there.
pub(super) const ADOPT: &str = "adopt";

/// What a copy is made of.
enum Of {
    Nothing,
    Image {
        path: PathBuf,
        format: Format,
    },
    Volume(VolumeData),
    Snapshot(DataRecord),
    /// Of another backend.
    Elsewhere(DiskSource, Format),
}

impl Of {
    fn source(&self) -> Source<'_> {
        match self {
            Of::Nothing => Source::Empty,
            Of::Image { path, format } => Source::Image(path, *format),
            Of::Volume(data) => Source::Volume(data),
            Of::Snapshot(data) => Source::Snapshot(data),
            Of::Elsewhere(source, format) => Source::Elsewhere(source, *format),
        }
    }
}

/// What the first step would find out.
pub(super) fn can_begin(judge: &Judge<'_, '_>, caller: &Caller, volume: &Volume) -> Result<(), Reason> {
    let record = &volume.record;
    judge.shared.backend(&record.backend)?;
    match &record.created_from {
        None => size(record, 0).map(drop),
        Some(Origin::Image(id)) => {
            let image = judge.batch.image(*id).ok_or_else(|| Reason::NotFound(format!("image {id}")))?;
            // It was checked when it was named; the right may have been taken back since.
            if !may_read(&image.record, caller) {
                return Err(Reason::NotYours { class: Class::Image });
            }
            can_make_disks(&image)?;
            size_of_image(record, &image).map(drop)
        }
        Some(Origin::Volume(id)) => {
            let source = readable(judge.batch, *id, caller)?;
            is_unused(&source)?;
            size(record, source.record.size_bytes).map(drop)
        }
        Some(Origin::Snapshot { volume, name }) => {
            let source = readable(judge.batch, *volume, caller)?;
            let snapshot = source.record.snapshots.get(name).filter(|snapshot| snapshot.data.is_some());
            let snapshot = snapshot.ok_or_else(|| Reason::NotFound(format!("snapshot {name:?} of {volume}")))?;
            idle(source.task.as_ref().map(|task| &task.operation))?;
            size(record, snapshot.size_bytes).map(drop)
        }
        Some(Origin::Existing { backend, .. }) => {
            if !caller.role(&record.ownership).is_administrator() {
                return Err(Reason::RootOnly);
            }
            reachable(judge.unreachable.as_deref())?;
            judge.shared.backend(backend).map(drop)
        }
    }
}

fn readable(batch: &Batch<'_>, id: Uuid, caller: &Caller) -> Result<Arc<Volume>, Reason> {
    let volume = batch.volume(id).ok_or_else(|| Reason::NotFound(format!("volume {id}")))?;
    match caller.role(&volume.record.ownership) {
        Role::Stranger => Err(Reason::NotYours { class: Class::Volume }),
        Role::Root | Role::Mounter | Role::Owner | Role::Member => Ok(volume),
    }
}

/// Whether nobody writes to the volume that a copy is to be made of, and nothing runs on it that could.
fn is_unused(volume: &Volume) -> Result<(), Reason> {
    idle(volume.task.as_ref().map(|task| &task.operation))?;
    match volume.record.state() {
        volume::State::Available => Ok(()),
        volume::State::InUse => Err(Reason::InUse(
            "somebody may write to the volume that it is to be a copy of; detach that first, or name a snapshot of it"
                .to_owned(),
        )),
        state @ (volume::State::Draft
        | volume::State::AwaitingTransfer
        | volume::State::Error
        | volume::State::SoftDeleted) => Err(Reason::Malformed(format!(
            "the volume that it is to be a copy of is {}; it has to be available",
            state.word()
        ))),
    }
}

/// The size in bytes: the wanted one, which the origin has to fit in, or the origin's.
fn size(record: &VolumeRecord, least: u64) -> Result<u64, Reason> {
    match record.size_bytes {
        0 if least == 0 => Err(Reason::Malformed(
            "it has no size, and nothing that it is to be a copy of; write size_bytes or created_from first".to_owned(),
        )),
        0 => Ok(least),
        bytes if bytes >= least => Ok(bytes),
        _ => Err(Reason::OutOfRange {
            low: least,
            high: i64::MAX as u64,
            unit: "bytes (the size of what it is to be a copy of)",
        }),
    }
}

fn size_of_image(record: &VolumeRecord, image: &Image) -> Result<u64, Reason> {
    let (image_bytes, demanded) = (image.record.virtual_size_bytes, image.record.min_disk_bytes);
    let present = size(record, image_bytes)?;
    match record.size_bytes {
        0 => Ok(present.max(demanded)),
        _ if present >= demanded => Ok(present),
        _ => Err(Reason::TooSmall { file: "size_bytes", present, demand: "min_disk_bytes", least: demanded }),
    }
}

/// Makes a draft real.
pub(super) fn create(run: &Run) -> Result<Ending, Halt> {
    remove::leftovers_of_draft(run)?;
    let volume = run.volume()?;
    let record = &volume.record;
    if let Some(Origin::Existing { backend, reference }) = &record.created_from {
        return adopt(run, record, backend, reference);
    }
    let backend = run.shared.backend(&record.backend).map_err(Halt::Failed)?;
    let (of, size_bytes, bootable) = origin(&run.shared, record).map_err(Halt::Failed)?;
    let source = of.source();
    let new = NewData {
        volume: run.object,
        snapshot: None,
        operation: run.id,
        size_bytes,
        format: record.disk_format,
        source,
    };
    let data = backend.plan_data(&new);
    let object = run.object;
    let begin = || {
        let creation = Creation::Volume(VolumeCreation::Data(data.clone()));
        run.step(DATA, Some(creation), move |batch| {
            edit(batch, object, |record| record.data = Some(VolumeData::Ours(data.clone())));
        })
    };
    let made = copying::begin(run, &source, begin)?.create(backend, &new)?;
    Ok(ending(run, move |record| {
        record.draft = None;
        record.size_bytes = made.size_bytes;
        record.disk_format = Some(made.format);
        record.bootable |= bootable;
        record.fault = None;
    }))
}

/// What is copied, how large the volume becomes, and whether an instance can boot from that.
fn origin(shared: &Shared, record: &VolumeRecord) -> Result<(Of, u64, bool), Reason> {
    let inventory = shared.parts.ledger.inventory();
    let of_volume = |id: Uuid| inventory.volume(id).ok_or_else(|| Reason::NotFound(format!("volume {id}")));
    match &record.created_from {
        None | Some(Origin::Existing { .. }) => Ok((Of::Nothing, size(record, 0)?, false)),
        Some(Origin::Image(id)) => {
            let image = inventory.image(*id).ok_or_else(|| Reason::NotFound(format!("image {id}")))?;
            // One that was deactivated since this was accepted is still used.
            let format = match image.state() {
                image::State::Active | image::State::Deactivated => image.record.disk_format,
                image::State::Draft | image::State::Error | image::State::SoftDeleted => None,
            };
            let format = format.ok_or_else(|| Reason::NotFound(format!("active image {id} any more")))?;
            let path = shared.image_path(*id);
            Ok((Of::Image { path, format }, size_of_image(record, &image)?, true))
        }
        Some(Origin::Volume(id)) => {
            let source = of_volume(*id)?;
            is_unused(&source)?;
            let data = source.record.data.clone().ok_or_else(|| Reason::NotFound(format!("data of volume {id}")))?;
            let size = size(record, source.record.size_bytes)?;
            Ok((near(shared, record, data, Of::Volume)?, size, source.record.bootable))
        }
        Some(Origin::Snapshot { volume, name }) => {
            let source = of_volume(*volume)?;
            let missing = || Reason::NotFound(format!("snapshot {name:?} of {volume}"));
            let snapshot = source.record.snapshots.get(name).ok_or_else(missing)?;
            let data = snapshot.data.clone().ok_or_else(missing)?;
            let size = size(record, snapshot.size_bytes)?;
            let of = |_| Of::Snapshot(data.clone());
            Ok((near(shared, record, VolumeData::Ours(data.clone()), of)?, size, source.record.bootable))
        }
    }
}

/// Data of the backend that makes the copy, which may have better ways than to read all of it; or of another one.
fn near(
    shared: &Shared,
    record: &VolumeRecord,
    data: VolumeData,
    of: impl FnOnce(VolumeData) -> Of,
) -> Result<Of, Reason> {
    let backend = shared.backend_of(&data)?;
    if data.backend() == record.backend {
        return Ok(of(data));
    }
    backend.prepare(&data).map_err(of_block)?;
    Ok(Of::Elsewhere(backend.source(&data), data.format()))
}

/// Takes over data that is there. Nothing is written to it.
fn adopt(run: &Run, record: &VolumeRecord, name: &str, reference: &str) -> Result<Ending, Halt> {
    let backend = run.shared.backend(name).map_err(Halt::Failed)?;
    let (existing, examined) =
        backend.adopt(reference, record.disk_format).map_err(|error| Halt::Failed(of_block(error)))?;
    if ![0, examined.size_bytes].contains(&record.size_bytes) {
        let (low, high) = (examined.size_bytes, examined.size_bytes);
        return Err(Halt::Failed(Reason::OutOfRange { low, high, unit: "bytes (the size that it has)" }));
    }
    let data = VolumeData::Existing(existing.clone());
    if let Some(owner) = backend.source(&data).path().and_then(|path| owner_of(run, path)) {
        return Err(Halt::Failed(taken(reference, &owner)));
    }
    nobody_uses(run, &data)?;
    let object = run.object;
    let of_step = data.clone();
    // Two that want the same are decided here, one after the other.
    run.step(ADOPT, None, move |batch| {
        if !is_taken(batch, object, &existing) {
            edit(batch, object, |record| record.data = Some(of_step.clone()));
        }
    })?;
    if run.volume()?.record.data.as_ref() != Some(&data) {
        return Err(Halt::Failed(taken(reference, "another volume")));
    }
    let name = name.to_owned();
    Ok(ending(run, move |record| {
        record.draft = None;
        record.backend.clone_from(&name);
        record.size_bytes = examined.size_bytes;
        record.disk_format = Some(examined.format);
        record.fault = None;
    }))
}

fn taken(reference: &str, owner: &str) -> Reason {
    Reason::DataTaken(format!("{reference} belongs to {owner} already; name another one"))
}

fn is_taken(batch: &Batch<'_>, object: Uuid, wanted: &ExistingData) -> bool {
    batch.volumes().iter().filter(|volume| volume.id != object).any(|volume| match &volume.record.data {
        Some(VolumeData::Existing(other)) => other.reference == wanted.reference || other.identity == wanted.identity,
        Some(VolumeData::Ours(_)) | None => false,
    })
}

/// Which object of ours has a file already, under whatever name.
fn owner_of(run: &Run, path: &Path) -> Option<String> {
    let wanted = path.metadata().ok()?;
    let is_it = |path: &Path| {
        let found = path.metadata();
        found.is_ok_and(|found| (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()))
    };
    let shared = &run.shared;
    let inventory: &Inventory = shared.parts.ledger.inventory();
    let is_data = |data: &VolumeData| {
        let backend = shared.backend_of(data);
        backend.is_ok_and(|backend| backend.source(data).path().is_some_and(is_it))
    };
    let of_volumes = inventory.volumes().into_iter().filter(|volume| volume.id != run.object).find(|volume| {
        let record = &volume.record;
        let snapshots = record.snapshots.iter().filter_map(|(_, entry)| entry.value.data.clone());
        let ours = snapshots.chain(record.leftovers.iter().cloned()).map(VolumeData::Ours);
        record.data.clone().into_iter().chain(ours).any(|data| is_data(&data))
    });
    if let Some(volume) = of_volumes {
        return Some(format!("the volume {}", volume.id));
    }
    if let Some(image) = inventory.images().into_iter().find(|image| is_it(&shared.image_path(image.id))) {
        return Some(format!("the image {}", image.id));
    }
    let of_instances = inventory
        .instances()
        .into_iter()
        .find(|instance| instance.record.disks.iter().any(|disk| is_it(&shared.parts.block.path(disk))));
    of_instances.map(|instance| format!("the instance {}", instance.id))
}
