//! The bin: what a move in or out does at once, and what it leaves to do. Deletion for good is in [`super::delete`].
//!
//! The move itself is a record, made together with the claim of the operation that does the rest: whatever becomes of
//! the operation, the object stays where it was moved.

use super::engine::Shared;
use super::journal::is_active;
use super::operation::{Ending, Halt, Run};
use super::power;
use super::{define_again, shelve};
use crate::hypervisor::{Domain, HypervisorError, PowerState};
use crate::inventory::Instance;
use crate::model::caller::Caller;
use crate::model::instance::State;
use crate::model::record::{BinEntry, Expiry, InstanceBin, ShelfStage};
use crate::model::task::Operation;

/// What is known of an object that is moved into the bin at this time, in Unix seconds.
pub(super) fn entry(shared: &Shared, caller: &Caller, now: u64) -> BinEntry {
    let expiry =
        shared.settings.retention.map(|retention| expiry(shared, now, now.saturating_add(retention.as_secs())));
    BinEntry { deleted_at: now, deleted_by: caller.login.clone(), expiry }
}

/// The time `at`, by both clocks. What has passed already is due at once: somebody has asked for that.
pub(super) fn expiry(shared: &Shared, now: u64, at: u64) -> Expiry {
    let at_uptime = match at.saturating_sub(now) {
        0 => 0,
        left => shared.uptime.seconds().saturating_add(left),
    };
    Expiry { at, at_uptime }
}

/// What an operation changes at its acceptance.
pub(super) fn enter(instance: &mut Instance, operation: &Operation, entry: impl FnOnce() -> BinEntry) {
    match operation {
        Operation::SoftDelete if instance.record.bin.is_none() => {
            if !is_on_shelf(instance) {
                instance.record.autostart = instance.autostart();
            }
            let state = instance.observed().state;
            instance.record.bin = Some(InstanceBin { entry: entry(), state, is_settled: false });
        }
        Operation::Restore { .. } => instance.record.bin = None,
        Operation::SoftDelete
        | Operation::Boot
        | Operation::Define
        | Operation::Start
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
        | Operation::DiscardDraft
        | Operation::Delete
        | Operation::Shelve { .. }
        | Operation::Offload
        | Operation::Unshelve { .. }
        | Operation::DefineAgain
        | Operation::Volume(_) => {}
    }
}

/// Stops the guest as `stopped` does, and turns autostart off.
pub(super) fn soft_delete(run: &Run) -> Result<Ending, Halt> {
    // One that was undefined outside has nothing to stop.
    if let Some(domain) = run.look()? {
        wake(run, &domain)?;
        power::stop(run)?;
        set_autostart(run, false)?;
        run.refresh()?;
    }
    Ok(Ending::Instance(Box::new(|instance: &mut Instance| {
        if let Some(bin) = &mut instance.record.bin {
            bin.is_settled = true;
        }
    })))
}

/// A frozen or sleeping guest cannot hear that it is to shut down.
fn wake(run: &Run, domain: &Domain) -> Result<(), Halt> {
    match domain.power {
        PowerState::Paused | PowerState::PmSuspended if !power::cannot_hear(domain) => {}
        PowerState::Running
        | PowerState::Paused
        | PowerState::PmSuspended
        | PowerState::ShutOff
        | PowerState::Crashed => return Ok(()),
    }
    power::persist(run, domain)?;
    run.guard()?;
    run.begin("unpause")?;
    match run.hypervisor().unpause(run.object) {
        Ok(()) => {}
        Err(HypervisorError::Unreachable(_)) => return Err(Halt::Lost),
        // It is powered off at last.
        Err(error) => log::warn!("{} cannot be woken to shut down: {error}", run.object),
    }
    Ok(())
}

fn set_autostart(run: &Run, on: bool) -> Result<(), Halt> {
    if run.look()?.is_some_and(|domain| domain.autostart != on) {
        run.guard()?;
        run.begin("autostart")?;
        run.hypervisor().set_autostart(run.object, on)?;
    }
    Ok(())
}

/// Brings back autostart and the state.
pub(super) fn restore(run: &Run, state: State) -> Result<Ending, Halt> {
    let instance = run.instance()?;
    match state {
        State::Active | State::Stopped if is_on_shelf(&instance) => shelve::unshelve(run, state == State::Active),
        State::Active => {
            let again = define_if_gone(run)?;
            set_autostart(run, instance.record.autostart)?;
            let domain = power::existing(run)?;
            let saved = domain.has_managed_save && !is_active(&domain);
            Ok(both(again, if saved { power::resume(run)? } else { power::start(run)? }))
        }
        State::Stopped => {
            let again = define_if_gone(run)?;
            set_autostart(run, instance.record.autostart)?;
            Ok(both(again, power::stop(run)?))
        }
        State::Suspended => {
            set_autostart(run, instance.record.autostart)?;
            run.refresh()?;
            Ok(power::unchanged())
        }
        // It is as it was by being out of the bin.
        State::Shelved
        | State::ShelvedOffloaded
        | State::Error
        | State::Draft
        | State::Building
        | State::Paused
        | State::Rescued
        | State::Resized
        | State::SoftDeleted => {
            run.refresh()?;
            Ok(power::unchanged())
        }
    }
}

/// Defines the domain again if it was undefined outside.
fn define_if_gone(run: &Run) -> Result<Option<Ending>, Halt> {
    match run.look()? {
        Some(_) if !run.has_begun(define_again::DEFINE)? => Ok(None),
        // In an earlier life of the program perhaps.
        Some(_) | None => define_again::define_again(run).map(Some),
    }
}

fn both(first: Option<Ending>, then: Ending) -> Ending {
    match (first, then) {
        (Some(Ending::Instance(first)), Ending::Instance(then)) => Ending::Instance(Box::new(move |instance| {
            first(instance);
            then(instance);
        })),
        (Some(_) | None, then) => then,
    }
}

fn is_on_shelf(instance: &Instance) -> bool {
    instance.record.shelf.as_ref().is_some_and(|shelf| match shelf.stage {
        ShelfStage::Shelved | ShelfStage::Offloaded => true,
        ShelfStage::Left => false,
    })
}
