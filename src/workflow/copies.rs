//! The copies on the shelf, and the disks that they are of: made, proven, removed, brought back.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use uuid::Uuid;

use super::boot::of_block;
use super::journal::{UNDO_PAUSE, UNDO_TRIES, is_active, without_disk};
use super::kept;
use super::ledger::now;
use super::operation::{Halt, Run, WhenFull};
use super::power::existing;
use super::progress::Progress;
use super::shelve::{SHELVED, edit};
use super::{delete, lanes};
use crate::block::BlockError;
use crate::block::copy::{self, Content, Watch, fingerprint, settled_fingerprint};
use crate::inventory::Object;
use crate::model::reason::Reason;
use crate::model::record::{Copied, DiskRecord, DiskRole, Fingerprint, Shelf, ShelfCopy, ShelfStage};
use crate::model::task::Creation;

/// The steps of one disk.
struct Steps {
    copy: &'static str,
    prove: &'static str,
    remove: &'static str,
    restore: &'static str,
}

fn steps(role: DiskRole) -> Steps {
    match role {
        DiskRole::Root => Steps {
            copy: "copy_root_disk",
            prove: "prove_root_disk",
            remove: "remove_root_disk",
            restore: "restore_root_disk",
        },
        DiskRole::Seed => {
            Steps { copy: "copy_seed", prove: "prove_seed", remove: "remove_seed", restore: "restore_seed" }
        }
    }
}

/// The guest is off, and has no memory saved that fits only the disks as they are.
pub(super) fn is_off(run: &Run) -> Result<(), Halt> {
    let domain = existing(run)?;
    if is_active(&domain) || domain.has_managed_save {
        return Err(Halt::Failed(Reason::Failed(
            "somebody started the guest outside meanwhile; its disks are left alone".to_owned(),
        )));
    }
    Ok(())
}

/// Copies all disks that we made for the instance, and stores that it is shelved once all are proven. Returns the disks'
/// operations: what is proven now.
pub(super) fn make(run: &Run) -> Result<HashSet<Uuid>, Halt> {
    let disks = run.instance()?.record.disks.clone();
    let mut copies = Vec::new();
    {
        let _lane = lanes::enter(run)?;
        for disk in &disks {
            is_off(run)?;
            run.begin_creating(steps(disk.role).copy, Creation::ShelfCopy(disk.clone()))?;
            copies.push(copy_disk(run, disk)?);
        }
    }
    for copy in &copies {
        if current(run, &copy.of.disk)? != copy.fingerprint {
            return Err(Halt::Failed(changed(&copy.of.disk)));
        }
    }
    is_off(run)?;
    let (object, operation) = (run.object, run.id);
    run.step(SHELVED, None, move |batch| {
        edit(batch, object, |instance| {
            let former = instance.record.shelf.take().map(|shelf| {
                let copies = shelf.copies.into_iter().map(|copy| copy.of);
                shelf.former.into_iter().chain(copies.filter(|copy| copy.operation != operation)).collect()
            });
            instance.record.shelf = Some(Shelf {
                stage: ShelfStage::Shelved,
                shelved_at: now(),
                operation,
                copies: copies.clone(),
                former: former.unwrap_or_default(),
                ran_at: None,
            });
        });
    })?;
    Ok(disks.iter().map(|disk| disk.operation).collect())
}

fn copy_disk(run: &Run, disk: &DiskRecord) -> Result<ShelfCopy, Halt> {
    let block = &run.shared.parts.block;
    let source = block.open(disk).map_err(|error| halt(run, error))?;
    let before = settled_fingerprint(&source).map_err(|error| unreadable(disk, &error))?;
    let of = Copied { operation: run.id, disk: disk.clone() };
    let content = watched(run, |watch| run.shared.shelf.store(run.object, &of, &source, block.format(disk), watch))?;
    if current(run, disk)? != before {
        return Err(Halt::Failed(changed(disk)));
    }
    Ok(ShelfCopy { of, fingerprint: before, size_bytes: content.size_bytes, sha512: content.sha512 })
}

/// The disk's file as it is now, by its name.
fn current(run: &Run, disk: &DiskRecord) -> Result<Fingerprint, Halt> {
    let file = run.shared.parts.block.open(disk).map_err(|error| halt(run, error))?;
    fingerprint(&file).map_err(|error| unreadable(disk, &error))
}

fn changed(disk: &DiskRecord) -> Reason {
    Reason::Failed(format!("the disk {} changed while it was copied; see who uses it, and try again", disk.reference))
}

fn unreadable(disk: &DiskRecord, error: &std::io::Error) -> Halt {
    Halt::Failed(Reason::Failed(format!("the disk {} cannot be read: {error}", disk.reference)))
}

/// With progress, and an end when the operation or the engine ends.
fn watched<T>(run: &Run, work: impl FnOnce(&Watch<'_>) -> Result<T, BlockError>) -> Result<T, Halt> {
    let progress = Progress::new(run);
    let watch = Watch { cancelled: &|| run.proceed().is_err(), progress: &|percent| progress.show(percent) };
    work(&watch).map_err(|error| halt(run, error))
}

/// What a failing backend means to an operation.
pub(super) fn halt(run: &Run, error: BlockError) -> Halt {
    match error {
        BlockError::Cancelled => run.proceed().err().unwrap_or(Halt::Cancelled),
        error => Halt::Failed(of_block(error)),
    }
}

/// Whether a disk is another than the one that was copied: somebody started the guest from outside in between.
pub(super) fn are_stale(run: &Run) -> Result<bool, Halt> {
    if run.has_begun(SHELVED)? {
        return Ok(false);
    }
    let shelf = shelf(run)?;
    let disks = run.instance()?.record.disks.clone();
    for copy in shelf.copies.iter().filter(|copy| disks.contains(&copy.of.disk)) {
        if run.has_begun(steps(copy.of.disk.role).remove)? {
            continue;
        }
        match current(run, &copy.of.disk) {
            Ok(fingerprint) if fingerprint == copy.fingerprint => {}
            Ok(_) => return Ok(true),
            // An earlier removal took effect and was not told so.
            Err(Halt::Failed(Reason::NotFound(_))) => {}
            Err(halt) => return Err(halt),
        }
    }
    Ok(false)
}

/// Removes exactly the disks whose copies are proven, after they have been proven again; the guest is off.
pub(super) fn remove_disks(run: &Run, proven: &HashSet<Uuid>) -> Result<(), Halt> {
    let copies = shelf(run)?.copies;
    let disks = run.instance()?.record.disks.clone();
    let copies: Vec<_> = copies.into_iter().filter(|copy| disks.contains(&copy.of.disk)).collect();
    for copy in copies.iter().filter(|copy| !proven.contains(&copy.of.disk.operation)) {
        run.begin(steps(copy.of.disk.role).prove)?;
        prove(run, copy)?;
    }
    for copy in &copies {
        let disk = &copy.of.disk;
        let step = steps(disk.role).remove;
        delete::nobody_uses(run, &run.shared.parts.block.path(disk))?;
        is_off(run)?;
        match current(run, disk) {
            Ok(fingerprint) if fingerprint == copy.fingerprint => {}
            // It was removed before, and nobody came to store that. Its copy has been proven just now.
            Err(Halt::Failed(Reason::NotFound(_))) => {}
            Ok(_) => {
                return Err(Halt::Failed(Reason::Failed(format!(
                    "the disk {} changed after it was copied, so it is kept; write shelved_offloaded again to copy it anew",
                    disk.reference
                ))));
            }
            Err(halt) => return Err(halt),
        }
        run.guard()?;
        run.begin(step)?;
        run.guard()?;
        kept::release(run, disk)?;
        run.shared.parts.block.remove(disk).map_err(|error| halt(run, error))?;
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

/// Reads a copy and compares it with what was stored of it.
fn prove(run: &Run, shelved: &ShelfCopy) -> Result<(), Halt> {
    let path = run.shared.shelf.path(run.object, &shelved.of);
    let file = run.shared.shelf.open(run.object, &shelved.of).map_err(|error| halt(run, error))?;
    let _lane = lanes::enter(run)?;
    let content =
        watched(run, |watch| copy::read(&file, watch).map_err(|error| error.named(&path.display().to_string(), "")))?;
    if content == wanted(shelved) { Ok(()) } else { Err(Halt::Failed(damaged(run, shelved))) }
}

fn wanted(copy: &ShelfCopy) -> Content {
    Content { size_bytes: copy.size_bytes, sha512: copy.sha512.clone() }
}

fn damaged(run: &Run, copy: &ShelfCopy) -> Reason {
    Reason::Damaged(format!(
        "the copy {} is not what was written there any more; nothing was changed, so look at that disk, and bring back the \
         file from a backup of yours",
        run.shared.shelf.path(run.object, &copy.of).display()
    ))
}

/// Removes what newer copies have replaced. What cannot be removed now is left to time.
pub(super) fn drop_former(run: &Run) -> Result<(), Halt> {
    let former = shelf(run)?.former;
    if former.is_empty() {
        return Ok(());
    }
    run.begin("drop_former_copies")?;
    for copy in &former {
        run.guard()?;
        if let Err(error) = run.shared.shelf.remove(run.object, copy) {
            log::warn!("a former copy of {} is kept for now: {error}", run.object);
            return Ok(());
        }
    }
    let object = run.object;
    run.store(
        Arc::new(move |batch| {
            edit(batch, object, |instance| {
                if let Some(shelf) = &mut instance.record.shelf {
                    shelf.former.clear();
                }
            });
        }),
        WhenFull::Wait,
    )
}

/// Makes every disk again that is not there.
pub(super) fn bring_back(run: &Run) -> Result<(), Halt> {
    let Some(shelf) = run.instance()?.record.shelf.clone() else { return Ok(()) };
    match shelf.stage {
        ShelfStage::Shelved | ShelfStage::Offloaded => {}
        ShelfStage::Left => return Ok(()),
    }
    for copy in &shelf.copies {
        let disks = run.instance()?.record.disks.clone();
        let there = disks.iter().find(|disk| disk.reference == copy.of.disk.reference);
        if let Some(disk) = there.filter(|disk| disk.operation != run.id) {
            match run.shared.parts.block.open(disk) {
                Ok(_) => continue,
                // It was removed, and the removal, or the undo of an earlier return, could not say so.
                Err(BlockError::Missing(_)) => {}
                Err(error) => return Err(halt(run, error)),
            }
        }
        let _lane = lanes::enter(run)?;
        restore(run, copy)?;
    }
    Ok(())
}

fn restore(run: &Run, shelved: &ShelfCopy) -> Result<(), Halt> {
    let source = run.shared.shelf.open(run.object, &shelved.of).map_err(|error| halt(run, error))?;
    let disk = DiskRecord { operation: run.id, ..shelved.of.disk.clone() };
    run.begin_creating(steps(disk.role).restore, Creation::DiskAgain(disk.clone()))?;
    let from = run.shared.shelf.path(run.object, &shelved.of).display().to_string();
    watched(run, |watch| {
        run.shared.parts.block.create_again(&disk, &|file| {
            let content = copy::copy(&source, file, watch).map_err(|error| error.named(&from, &disk.reference))?;
            if content != wanted(shelved) {
                return Err(BlockError::Damaged(damaged(run, shelved).to_string()));
            }
            // By which the undo knows that nothing has written to it since.
            file.set_modified(modified(&shelved.fingerprint))
                .map_err(|error| BlockError::Failed(format!("{}: {error}", disk.reference)))
        })
    })
}

fn modified(fingerprint: &Fingerprint) -> SystemTime {
    let (seconds, nanoseconds) = fingerprint.modified;
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let time = if seconds < 0 { SystemTime::UNIX_EPOCH - whole } else { SystemTime::UNIX_EPOCH + whole };
    time + Duration::from_nanos(nanoseconds.unsigned_abs())
}

/// Removes a disk that this operation made of its copy, unless something may have written to it: the copy is there, and the
/// disk is as it is. Says whether it is gone.
pub(super) fn undo_disk(run: &Run, disk: &DiskRecord) -> Result<bool, Halt> {
    let shelf = run.instance()?.record.shelf.clone();
    let copies = shelf.iter().flat_map(|shelf| &shelf.copies);
    let copy = copies.into_iter().find(|copy| copy.of.disk.reference == disk.reference);
    let domain = run.look()?;
    let is_in_use = domain.is_some_and(|domain| is_active(&domain) || domain.has_managed_save);
    let is_as_made = match run.shared.parts.block.open(disk).map(|file| fingerprint(&file)) {
        Ok(Ok(now)) => {
            copy.is_some_and(|copy| (now.size_bytes, now.modified) == (copy.size_bytes, copy.fingerprint.modified))
        }
        Err(BlockError::Missing(_)) => true,
        Ok(Err(_)) | Err(_) => false,
    };
    if is_in_use || !is_as_made || run.is_locked() {
        log::warn!("the disk {} is kept: a guest may have used it, or it was locked meanwhile", disk.reference);
        return Ok(false);
    }
    for _ in 0..UNDO_TRIES {
        match run.shared.parts.block.remove(disk) {
            Ok(()) => return Ok(true),
            Err(error) => log::warn!("the disk {} cannot be undone: {error}", disk.reference),
        }
        run.shared.gate.sleep(UNDO_PAUSE, &|| false);
    }
    Ok(false)
}

/// Removes a copy that this operation made; where that fails it is left to time.
pub(super) fn undo_copy(run: &Run, disk: &DiskRecord) -> Result<(), Halt> {
    let copy = Copied { operation: run.id, disk: disk.clone() };
    for _ in 0..UNDO_TRIES {
        match run.shared.shelf.remove(run.object, &copy) {
            Ok(()) => return Ok(()),
            Err(error) => log::warn!("a copy of {} cannot be undone: {error}", run.object),
        }
        run.shared.gate.sleep(UNDO_PAUSE, &|| false);
    }
    let (object, operation) = (run.object, run.id);
    run.store(
        Arc::new(move |batch| {
            let copy = copy.clone();
            edit(batch, object, |instance| {
                let shelf = instance.record.shelf.get_or_insert_with(|| Shelf {
                    stage: ShelfStage::Left,
                    shelved_at: 0,
                    operation,
                    copies: Vec::new(),
                    former: Vec::new(),
                    ran_at: None,
                });
                if !shelf.former.contains(&copy) {
                    shelf.former.push(copy);
                }
            });
        }),
        WhenFull::Wait,
    )
}

/// For the deletion of an instance for good: removes everything that is on the shelf for it. `may_destroy` is asked right
/// before each.
pub(super) fn remove_all(run: &Run, may_destroy: &dyn Fn() -> Result<(), Halt>) -> Result<(), Halt> {
    let Some(shelf) = run.instance()?.record.shelf.clone() else { return Ok(()) };
    for copy in shelf.former.iter().chain(shelf.copies.iter().map(|copy| &copy.of)) {
        run.begin("remove_copies")?;
        may_destroy()?;
        run.shared.shelf.remove(run.object, copy).map_err(|error| halt(run, error))?;
    }
    let object = run.object;
    run.store(Arc::new(move |batch| edit(batch, object, |instance| instance.record.shelf = None)), WhenFull::Wait)
}

fn shelf(run: &Run) -> Result<Shelf, Halt> {
    let instance = run.instance()?;
    let shelf = instance.record.shelf.clone();
    shelf.ok_or_else(|| Halt::Failed(Reason::NotFound(format!("copy of {} on the shelf", run.object))))
}
