//! Power: start, stop, pause, unpause, suspend, resume, and the rename of a stopped domain.

use std::time::{Duration, Instant};

use super::boot::not_started;
use super::journal::is_active;
use super::ledger::now;
use super::operation::{Ending, Halt, Run};
use crate::hypervisor::{Domain, HypervisorError, PowerState};
use crate::inventory::Instance;
use crate::model::reason::Reason;

/// The steps that end a guest.
pub(super) const SHUTDOWN: &str = "shutdown";
pub(super) const POWER_OFF: &str = "power_off";

/// The guest is asked to shut down again after this time, as Nova does.
pub(super) const ASK_AGAIN: Duration = Duration::from_secs(10);

/// How long a wait goes on without looking whether it still makes sense.
pub(super) const SLICE: Duration = Duration::from_millis(500);

/// How often a call is refused for a state that the domain is not in, before we believe it.
const REFUSALS: u32 = 3;

/// Starts a stopped or crashed domain, or lets one run again that QEMU paused for an error.
pub(super) fn start(run: &Run) -> Result<Ending, Halt> {
    let domain = existing(run)?;
    persist(run, &domain)?;
    match (domain.power, domain.reason.as_str()) {
        (PowerState::Running, _) => {}
        (PowerState::Paused, "crashed") | (PowerState::Crashed, _) => {
            run.guard()?;
            run.begin(POWER_OFF)?;
            tolerate_state(run.hypervisor().power_off(run.object))?;
            launch(run)?;
        }
        (PowerState::Paused | PowerState::PmSuspended, _) => {
            run.show_step("unpause")?;
            settle(run, run.hypervisor().unpause(run.object), |domain| domain.power == PowerState::Running)?;
        }
        (PowerState::ShutOff, _) => launch(run)?,
    }
    run.refresh()?;
    Ok(started())
}

/// Starts from saved memory.
pub(super) fn resume(run: &Run) -> Result<Ending, Halt> {
    let domain = existing(run)?;
    if !is_active(&domain) {
        launch(run)?;
    }
    // Whoever saved a paused guest outside gets it back paused.
    if run.look()?.is_some_and(|domain| domain.power == PowerState::Paused) {
        run.show_step("unpause")?;
        settle(run, run.hypervisor().unpause(run.object), |domain| domain.power == PowerState::Running)?;
    }
    run.refresh()?;
    Ok(started())
}

pub(super) fn launch(run: &Run) -> Result<(), Halt> {
    run.begin("start")?;
    match run.hypervisor().start(run.object) {
        Ok(()) => Ok(()),
        Err(HypervisorError::Unreachable(_)) => Err(Halt::Lost),
        Err(error) => match run.look()? {
            Some(domain) if is_active(&domain) => Ok(()),
            Some(_) | None => Err(not_started(run, error)),
        },
    }
}

fn started() -> Ending {
    Ending::Instance(Box::new(|instance: &mut Instance| {
        instance.record.crashed = None;
        instance.record.launched_at = Some(now());
    }))
}

/// ACPI shutdown, repeated, then power off. A guest that cannot hear ACPI is powered off at once.
pub(super) fn stop(run: &Run) -> Result<Ending, Halt> {
    let deadline = deadline(run)?;
    let mut refusals = 0;
    while let Some(domain) = run.look()? {
        if !is_active(&domain) {
            break;
        }
        run.proceed()?;
        persist(run, &domain)?;
        run.guard()?;
        if cannot_hear(&domain) || Instant::now() >= deadline {
            run.begin(POWER_OFF)?;
            run.guard()?;
            match run.hypervisor().power_off(run.object) {
                Ok(()) => {}
                Err(HypervisorError::InvalidState(_) | HypervisorError::NoDomain) if refusals < REFUSALS => {
                    refusals += 1;
                }
                Err(error) => return Err(error.into()),
            }
            continue;
        }
        if domain.power == PowerState::Running {
            run.begin(SHUTDOWN)?;
            run.guard()?;
            match run.hypervisor().shutdown(run.object) {
                Ok(()) => {}
                Err(HypervisorError::Unreachable(_)) => return Err(Halt::Lost),
                // Asked again later, and powered off at last.
                Err(error) => log::warn!("{} cannot be asked to shut down: {error}", run.object),
            }
        }
        wait_while(run, domain.power, deadline.min(Instant::now() + ASK_AGAIN))?;
    }
    run.refresh()?;
    Ok(Ending::Instance(Box::new(|instance: &mut Instance| {
        instance.record.crashed = acknowledged(instance.domain.as_ref());
    })))
}

/// Until when a guest may take to shut down. Counted from the beginning of the operation, which may have been in an earlier
/// life of the program.
fn deadline(run: &Run) -> Result<Instant, Halt> {
    let timeout = u64::from(run.instance()?.record.stop_timeout_seconds);
    let left = timeout.saturating_sub(now().saturating_sub(run.started_at));
    Ok(Instant::now() + Duration::from_secs(left))
}

/// Waits while a guest that was asked to shut down may yet do so: that cannot be taken back.
pub(super) fn await_shutdown(run: &Run) -> Result<(), Halt> {
    let deadline = deadline(run)?;
    let is_off = |domain: Option<&Domain>| domain.is_none_or(|domain| !is_active(domain));
    loop {
        if run.shared.gate.stopping() {
            return Err(Halt::Stopped);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || run.shared.parts.reconciler.wait_for(run.object, left.min(SLICE), &is_off) {
            return Ok(());
        }
    }
}

/// Guests whose CPUs stand still because of an error never hear of a shutdown.
pub(super) fn cannot_hear(domain: &Domain) -> bool {
    match domain.power {
        PowerState::Crashed => true,
        PowerState::Paused => ["ioerror", "crashed", "watchdog"].contains(&domain.reason.as_str()),
        PowerState::Running | PowerState::PmSuspended | PowerState::ShutOff => false,
    }
}

/// What is remembered of a crash that somebody has answered with `stopped` or `reset_state`.
pub(super) fn acknowledged(domain: Option<&Domain>) -> Option<String> {
    domain
        .filter(|domain| domain.power == PowerState::ShutOff && domain.reason == "crashed")
        .map(|_| crate::model::record::CRASH_ACKNOWLEDGED.to_owned())
}

fn wait_while(run: &Run, power: PowerState, until: Instant) -> Result<(), Halt> {
    loop {
        run.proceed()?;
        run.guard()?;
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        let changed = |domain: Option<&Domain>| domain.is_none_or(|domain| domain.power != power);
        if run.shared.parts.reconciler.wait_for(run.object, left.min(SLICE), &changed) {
            return Ok(());
        }
    }
}

/// Freezes a running guest.
pub(super) fn pause(run: &Run) -> Result<Ending, Halt> {
    if is_shown(run, PowerState::Running)? {
        run.show_step("pause")?;
        settle(run, run.hypervisor().pause(run.object), |domain| domain.power == PowerState::Paused)?;
        return told(run, PowerState::Paused, "user");
    }
    let domain = existing(run)?;
    persist(run, &domain)?;
    match domain.power {
        PowerState::Paused => {}
        PowerState::Running | PowerState::PmSuspended | PowerState::Crashed => {
            run.show_step("pause")?;
            settle(run, run.hypervisor().pause(run.object), |domain| domain.power == PowerState::Paused)?;
        }
        PowerState::ShutOff => return Err(ended()),
    }
    run.refresh()?;
    Ok(unchanged())
}

/// Lets a frozen guest run again.
pub(super) fn unpause(run: &Run) -> Result<Ending, Halt> {
    if is_shown(run, PowerState::Paused)? {
        run.show_step("unpause")?;
        settle(run, run.hypervisor().unpause(run.object), |domain| domain.power == PowerState::Running)?;
        return told(run, PowerState::Running, "unpaused");
    }
    let domain = existing(run)?;
    persist(run, &domain)?;
    match domain.power {
        PowerState::Running => {}
        PowerState::Paused | PowerState::PmSuspended | PowerState::Crashed => {
            run.show_step("unpause")?;
            settle(run, run.hypervisor().unpause(run.object), |domain| domain.power == PowerState::Running)?;
        }
        PowerState::ShutOff => return Err(ended()),
    }
    run.refresh()?;
    Ok(unchanged())
}

/// Whether what is shown makes it one call and nothing else. Whether it is still so, the call tells: asking first, and
/// again after it, would take longer than the call.
fn is_shown(run: &Run, power: PowerState) -> Result<bool, Halt> {
    Ok(run.instance()?.domain.as_ref().is_some_and(|domain| domain.persistent && domain.power == power))
}

/// The hypervisor has said so by doing what was asked.
fn told(run: &Run, power: PowerState, reason: &str) -> Result<Ending, Halt> {
    if run.shared.parts.reconciler.told(run.object, power, reason).is_err() {
        run.refresh()?;
    }
    Ok(unchanged())
}

/// Saves the memory to disk.
pub(super) fn suspend(run: &Run) -> Result<Ending, Halt> {
    let domain = existing(run)?;
    persist(run, &domain)?;
    match domain.power {
        PowerState::ShutOff if domain.has_managed_save => {}
        PowerState::ShutOff => return Err(ended()),
        PowerState::Running | PowerState::Paused | PowerState::PmSuspended | PowerState::Crashed => {
            run.begin("save")?;
            settle(run, run.hypervisor().save(run.object), |domain| domain.has_managed_save)?;
        }
    }
    run.refresh()?;
    Ok(unchanged())
}

/// Changes the libvirt name. There is nothing to undo: the name is one or the other.
pub(super) fn rename(run: &Run, to: &str) -> Result<Ending, Halt> {
    let domain = existing(run)?;
    if domain.name != to {
        persist(run, &domain)?;
        run.guard()?;
        run.begin("rename")?;
        match run.hypervisor().rename(run.object, to) {
            Ok(()) => {}
            Err(HypervisorError::Exists(_)) => return Err(Halt::Failed(Reason::NameTaken(to.to_owned()))),
            Err(HypervisorError::Unreachable(_)) => return Err(Halt::Lost),
            Err(error) => match run.look()? {
                Some(domain) if domain.name == to => {}
                Some(_) | None => return Err(error.into()),
            },
        }
    }
    run.refresh()?;
    let to = to.to_owned();
    Ok(Ending::Instance(Box::new(move |instance: &mut Instance| instance.record.name.clone_from(&to))))
}

pub(super) fn unchanged() -> Ending {
    Ending::Instance(Box::new(|_: &mut Instance| {}))
}

pub(super) fn ended() -> Halt {
    Halt::Failed(Reason::Failed("the guest ended by itself meanwhile; see state and state_reason".to_owned()))
}

pub(super) fn existing(run: &Run) -> Result<Domain, Halt> {
    run.look()?.ok_or_else(|| HypervisorError::NoDomain.into())
}

/// A transient domain is defined before the first word, so that it outlives its run.
pub(super) fn persist(run: &Run, domain: &Domain) -> Result<(), Halt> {
    if domain.persistent {
        return Ok(());
    }
    run.begin("make_persistent")?;
    let xml = run.hypervisor().definition(domain.uuid)?;
    match run.hypervisor().define(&xml) {
        Ok(()) => Ok(()),
        Err(HypervisorError::Unreachable(_)) => Err(Halt::Lost),
        Err(error) => Err(Halt::Failed(Reason::Unsupported(format!(
            "the domain is transient and cannot be defined ({error}); define it with virsh first"
        )))),
    }
}

/// A refusal for a state is success where the domain is there already: somebody else, or an earlier call, was first.
fn settle(run: &Run, result: Result<(), HypervisorError>, reached: fn(&Domain) -> bool) -> Result<(), Halt> {
    match result {
        Ok(()) => Ok(()),
        Err(HypervisorError::Unreachable(_)) => Err(Halt::Lost),
        Err(error) => match run.look()? {
            Some(domain) if reached(&domain) => Ok(()),
            Some(domain) if domain.power == PowerState::ShutOff => Err(ended()),
            Some(_) | None => Err(error.into()),
        },
    }
}

fn tolerate_state(result: Result<(), HypervisorError>) -> Result<(), Halt> {
    match result {
        Ok(()) | Err(HypervisorError::InvalidState(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
