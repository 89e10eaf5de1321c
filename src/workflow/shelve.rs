//! The shelf: an instance's own disks are copied, may then be removed, and come back.
//!
//! Up to [`SHELVED`] a failed shelving is undone: its copies go, and the guest gets back the state that it had. From there
//! on the instance is shelved, whatever becomes of the rest. Up to [`LEFT`] a failed return is undone: the disks that it
//! made go. From there on the instance is back, whatever becomes of its start. The domain stays defined all the time.
//!
//! Disks that we did not make are neither copied nor removed.

use std::collections::HashSet;
use std::time::Duration;

use uuid::Uuid;

use super::copies::{self, is_off};
use super::engine::{Settings, Shared};
use super::journal::{UNDO_PAUSE, UNDO_TRIES, is_active};
use super::ledger::{Batch, now};
use super::operation::{Ending, Halt, Run};
use super::power::{self, existing, persist};
use crate::hypervisor::{Domain, HypervisorError, PowerState};
use crate::inventory::{Instance, Object};
use crate::model::reason::Reason;
use crate::model::record::{Shelf, ShelfStage};
use crate::model::task::Creation;

/// The step from which on the copies are the instance's.
pub(super) const SHELVED: &str = "shelved";
/// The step from which on the disks are the instance's again.
pub(super) const LEFT: &str = "left_the_shelf";

const PUT_AWAY: &str = "put_away";

/// Copies the disks, and removes them if it is to be offloaded at once.
pub(super) fn shelve(run: &Run, offload: bool) -> Result<Ending, Halt> {
    let mut proven = HashSet::new();
    if !run.has_begun(SHELVED)? {
        put_away(run)?;
        proven = copies::make(run)?;
    }
    copies::drop_former(run)?;
    let at_once = run.shared.settings.shelved_offload_time == Some(Duration::ZERO);
    if offload || at_once {
        return remove_disks(run, &proven);
    }
    run.refresh()?;
    Ok(stopped_at(None))
}

/// Removes the disks that are copied.
pub(super) fn offload(run: &Run) -> Result<Ending, Halt> {
    is_off(run)?;
    let mut proven = HashSet::new();
    if copies::are_stale(run)? {
        proven = copies::make(run)?;
    }
    copies::drop_former(run)?;
    remove_disks(run, &proven)
}

fn remove_disks(run: &Run, proven: &HashSet<Uuid>) -> Result<Ending, Halt> {
    copies::remove_disks(run, proven)?;
    run.refresh()?;
    Ok(stopped_at(Some(ShelfStage::Offloaded)))
}

fn stopped_at(stage: Option<ShelfStage>) -> Ending {
    Ending::Instance(Box::new(move |instance: &mut Instance| {
        instance.record.crashed = power::acknowledged(instance.domain.as_ref());
        if let (Some(shelf), Some(stage)) = (&mut instance.record.shelf, stage)
            && shelf.stage == ShelfStage::Shelved
        {
            shelf.stage = stage;
        }
    }))
}

/// Brings the disks back.
pub(super) fn unshelve(run: &Run, start: bool) -> Result<Ending, Halt> {
    existing(run)?;
    if !run.has_begun(LEFT)? {
        copies::bring_back(run)?;
        let object = run.object;
        run.step(LEFT, None, move |batch| {
            edit(batch, object, |instance| {
                if let Some(shelf) = &mut instance.record.shelf {
                    shelf.stage = ShelfStage::Left;
                }
            });
        })?;
    }
    if run.instance()?.record.autostart && !existing(run)?.autostart {
        run.hypervisor().set_autostart(run.object, true)?;
    }
    if start {
        power::start(run)?;
    }
    run.refresh()?;
    Ok(Ending::Instance(Box::new(move |instance: &mut Instance| {
        if start {
            let now = now();
            instance.record.crashed = None;
            instance.record.launched_at = Some(now);
            if let Some(shelf) = &mut instance.record.shelf {
                shelf.saw_start(now);
            }
        }
    })))
}

/// Off, and off when the host starts; what it was before is journaled.
fn put_away(run: &Run) -> Result<(), Halt> {
    let domain = existing(run)?;
    persist(run, &domain)?;
    if !run.has_begun(PUT_AWAY)? {
        can_be_put_away(&domain)?;
        run.guard()?;
        let (object, autostart) = (run.object, domain.autostart);
        let before = Creation::PutAway { autostart, was_running: is_active(&domain) };
        run.step(PUT_AWAY, Some(before), move |batch| {
            edit(batch, object, |instance| instance.record.autostart = autostart);
        })?;
    }
    if domain.autostart {
        run.hypervisor().set_autostart(run.object, false)?;
    }
    power::stop(run)?;
    is_off(run)
}

/// The memory of a guest that stands still, or lies on the disk, would not fit the disks any more.
fn can_be_put_away(domain: &Domain) -> Result<(), Halt> {
    let state = match domain.power {
        PowerState::Running | PowerState::Crashed => return Ok(()),
        PowerState::ShutOff if !domain.has_managed_save => return Ok(()),
        PowerState::ShutOff => "suspended",
        PowerState::Paused | PowerState::PmSuspended => "paused",
    };
    Err(Halt::Failed(Reason::State { state, word: "shelved", available: "active".to_owned() }))
}

/// Autostart as it was, and the guest running if it ran and nobody but us has stopped it.
pub(super) fn undo_put_away(run: &Run, autostart: bool, was_running: bool) -> Result<(), Halt> {
    let was_asked = run.has_begun(power::SHUTDOWN)?;
    let stopped_by_us = was_asked || run.has_begun(power::POWER_OFF)?;
    if was_running && was_asked {
        power::await_shutdown(run)?;
    }
    for _ in 0..UNDO_TRIES {
        let Some(domain) = run.look()? else { return Ok(()) };
        let mut undone = Ok(());
        if domain.autostart != autostart {
            undone = run.hypervisor().set_autostart(run.object, autostart);
        }
        if was_running && stopped_by_us && !is_active(&domain) {
            undone = undone.and_then(|()| run.hypervisor().start(run.object));
        }
        match undone {
            Ok(()) => return Ok(()),
            Err(HypervisorError::Unreachable(_)) => return Err(Halt::Lost),
            Err(error) => log::error!("{} does not get back the state that it had: {error}", run.object),
        }
        run.shared.gate.sleep(UNDO_PAUSE, &|| false);
    }
    Ok(())
}

/// What time brings to an instance with something on the shelf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// Its disks are to be removed: [`crate::model::task::Operation::Offload`].
    Offload,
    /// Its copies, or some of them: [`tidy`].
    Tidy,
    /// Something in so many seconds.
    Later(u64),
    /// Nothing.
    Never,
}

/// What is due at `now`, in Unix seconds. Nothing of a locked instance, of one in the bin, nor of one that an operation
/// owns.
pub(super) fn due(instance: &Instance, now: u64, settings: &Settings) -> Due {
    let record = &instance.record;
    let (Some(shelf), Some(domain)) = (&record.shelf, &instance.domain) else { return Due::Never };
    if record.operation.is_some() || record.bin.is_some() || record.protection.lock.is_some() {
        return Due::Never;
    }
    if !shelf.former.is_empty() {
        return Due::Tidy;
    }
    let (due, left) = match (shelf.stage, settings.shelved_offload_time) {
        (ShelfStage::Shelved, Some(after)) if domain.power == PowerState::ShutOff => {
            (Due::Offload, shelf.shelved_at.saturating_add(after.as_secs()).saturating_sub(now))
        }
        (ShelfStage::Left, _) => match seconds_until_over(shelf, domain, now, settings.shelf_grace) {
            Some(left) => (Due::Tidy, left),
            None => return Due::Never,
        },
        (ShelfStage::Shelved | ShelfStage::Offloaded, _) => return Due::Never,
    };
    if left == 0 { due } else { Due::Later(left) }
}

/// When the copies of an instance that left the shelf are needed no more: its guest ran for a while, or shut itself down.
fn seconds_until_over(shelf: &Shelf, domain: &Domain, now: u64, grace: Duration) -> Option<u64> {
    if shelf.copies.is_empty() {
        return Some(0);
    }
    let ran_at = shelf.ran_at?;
    match domain.power {
        PowerState::Running => Some(ran_at.saturating_add(grace.as_secs()).saturating_sub(now)),
        PowerState::ShutOff => (domain.reason == "shutdown").then_some(0),
        PowerState::Paused | PowerState::PmSuspended | PowerState::Crashed => None,
    }
}

/// Removes the copies that nobody needs any more at `now`, in Unix seconds. It may be interrupted anywhere, and done again.
pub(super) fn tidy(shared: &Shared, id: Uuid, now: u64) {
    let Some(instance) = shared.parts.ledger.inventory().instance(id) else { return };
    if due(&instance, now, &shared.settings) != Due::Tidy {
        return;
    }
    let (Some(shelf), Some(domain)) = (&instance.record.shelf, &instance.domain) else { return };
    let is_over = match shelf.stage {
        ShelfStage::Left => seconds_until_over(shelf, domain, now, shared.settings.shelf_grace) == Some(0),
        ShelfStage::Shelved | ShelfStage::Offloaded => false,
    };
    let copies = shelf.former.iter().chain(shelf.copies.iter().map(|copy| &copy.of).filter(|_| is_over));
    for copy in copies {
        if let Err(error) = shared.shelf.remove(id, copy) {
            log::warn!("a copy of {id} that nobody needs is kept for now: {error}");
            return;
        }
    }
    let stored = shared.parts.ledger.transact(|batch| {
        edit(batch, id, |instance| match &mut instance.record.shelf {
            // The same as was looked at: copies that were made meanwhile are others.
            Some(present) if present.operation == shelf.operation && present.former == shelf.former => {
                present.former.clear();
                if is_over {
                    instance.record.shelf = None;
                }
            }
            Some(_) | None => {}
        });
    });
    if let Err(error) = stored {
        log::warn!("the copies of {id} are gone, which is not stored yet: {error}");
    }
}

pub(super) fn edit(batch: &mut Batch<'_>, id: Uuid, change: impl FnOnce(&mut Instance)) {
    if let Some(instance) = batch.instance(id) {
        let mut instance = (*instance).clone();
        change(&mut instance);
        batch.put(Object::Instance(std::sync::Arc::new(instance)));
    }
}
