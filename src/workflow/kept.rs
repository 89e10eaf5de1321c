//! Second links of the disks of protected instances, made and removed with the protection in the background.
//!
//! A link is recorded before it is made and forgotten after it is gone. It is removed only while the disk's path leads to the
//! same file; else it is the last name of somebody's data, which is told once and left to people.

mod tend;

use std::collections::HashSet;
use std::path::{Component, Path};
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use uuid::Uuid;

use super::ledger::Batch;
use super::operation::{Halt, Run, WhenFull};
use crate::block::kept::{self as file, KeptError, Removal, Restoration};
use crate::inventory::{Instance, Object};
use crate::model::reason::Reason;
use crate::model::record::{DiskRecord, KeptLink};
use crate::model::task::Operation;

pub(super) use tend::start;

/// Which instances' links are being worked on: by the background, or by an operation.
#[derive(Default)]
pub(super) struct Holds {
    held: Mutex<HashSet<Uuid>>,
    freed: Condvar,
}

/// One instance's links, held.
struct Hold<'a> {
    holds: &'a Holds,
    id: Uuid,
}

impl Holds {
    /// Waits until nobody else holds them.
    fn hold(&self, id: Uuid) -> Hold<'_> {
        let mut held = self.held.lock();
        while !held.insert(id) {
            self.freed.wait(&mut held);
        }
        Hold { holds: self, id }
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.holds.held.lock().remove(&self.id);
        self.holds.freed.notify_all();
    }
}

/// Gives the disks of an undefined instance their paths back where they are missing and a link is there.
pub(super) fn restore(run: &Run) -> Result<(), Halt> {
    let _hold = run.shared.holds.hold(run.object);
    let instance = run.instance()?;
    for link in newest(&instance.record.kept) {
        match file::restore(&link.path, &link.link, link.inode) {
            Ok(Restoration::Present) => {}
            Ok(Restoration::Restored) => {
                log::warn!("the disk {} of {} was removed outside and is linked back", link.path.display(), run.object);
            }
            Ok(Restoration::Lost) => {
                log::warn!("the disk {} of {} is gone, and so is its link", link.path.display(), run.object);
            }
            // It was replaced while the domain was defined, which was told: the new file is the disk.
            Err(KeptError::Exists(_)) if link.is_told => {}
            Err(KeptError::Exists(path)) => {
                return Err(Halt::Failed(Reason::Failed(format!(
                    "another file lies at {}, and the disk that was there is kept as {}; move one of them away",
                    path.display(),
                    link.link.display()
                ))));
            }
            Err(
                error @ (KeptError::Unsuitable { .. }
                | KeptError::Changed(_)
                | KeptError::Foreign(_)
                | KeptError::Failed { .. }),
            ) => return Err(Halt::Failed(Reason::Failed(error.to_string()))),
        }
    }
    Ok(())
}

/// The latest link of each path.
fn newest(kept: &[KeptLink]) -> Vec<&KeptLink> {
    let mut paths = HashSet::new();
    kept.iter().rev().filter(|link| paths.insert(&link.path)).collect()
}

/// Removes the links of a disk that this operation is about to remove for good: they would hold its space.
pub(super) fn release(run: &Run, disk: &DiskRecord) -> Result<(), Halt> {
    let path = run.shared.parts.block.path(disk);
    release_those(run, |link| link.path == path)
}

/// Removes all links of an instance that is about to be removed for good: nobody would know them afterwards.
pub(super) fn release_all(run: &Run) -> Result<(), Halt> {
    release_those(run, |_| true)
}

fn release_those(run: &Run, which: impl Fn(&KeptLink) -> bool) -> Result<(), Halt> {
    let _hold = run.shared.holds.hold(run.object);
    let instance = run.instance()?;
    for link in instance.record.kept.iter().filter(|link| which(link)) {
        match file::remove(&link.path, &link.link, link.inode) {
            Ok(Removal::Gone) => run.store(forgetting(run.object, link), WhenFull::Wait)?,
            Ok(Removal::OnlyName) => log::warn!("{}", last_name(run.object, link)),
            Err(error) => return Err(Halt::Failed(Reason::Failed(error.to_string()))),
        }
    }
    Ok(())
}

fn last_name(id: Uuid, link: &KeptLink) -> String {
    format!(
        "the disk {} of {id} was removed or replaced outside; what it held is kept as {}: use it or remove it",
        link.path.display(),
        link.link.display()
    )
}

type Edit = Arc<dyn Fn(&mut Batch<'_>) + Send + Sync>;

fn editing(id: Uuid, edit: impl Fn(&mut Instance) + Send + Sync + 'static) -> Edit {
    Arc::new(move |batch| {
        if let Some(instance) = batch.instance(id) {
            let mut instance = (*instance).clone();
            edit(&mut instance);
            batch.put(Object::Instance(Arc::new(instance)));
        }
    })
}

fn forgetting(id: Uuid, link: &KeptLink) -> Edit {
    let link = link.link.clone();
    editing(id, move |instance| instance.record.kept.retain(|kept| kept.link != link))
}

/// Whether an operation makes, removes or restores the disks itself. What it leaves is looked at when it has ended.
fn moves_disks(instance: &Instance) -> bool {
    instance.task.as_ref().is_some_and(|task| match task.operation {
        Operation::Boot
        | Operation::Define
        | Operation::DiscardDraft
        | Operation::Delete
        | Operation::Shelve { .. }
        | Operation::Offload
        | Operation::Unshelve { .. }
        | Operation::Restore { .. }
        | Operation::DefineAgain => true,
        Operation::Start
        | Operation::Stop
        | Operation::Pause
        | Operation::Unpause
        | Operation::Suspend
        | Operation::Resume
        | Operation::RebootSoft
        | Operation::RebootHard
        | Operation::Rename { .. }
        | Operation::Reconfigure { .. }
        | Operation::CommitImage
        | Operation::ImportImage
        | Operation::SoftDelete
        | Operation::Volume(_) => false,
    })
}

/// A path that leads where it seems to: with `..` in it, it may lead elsewhere than it begins.
fn is_plain(path: &Path) -> bool {
    path.is_absolute() && path.components().all(|component| component != Component::ParentDir)
}
