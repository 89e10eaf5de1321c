//! Reboots. A restart cannot be seen in a domain, only heard as an event: what happened while nobody listened, because
//! the connection or the program was gone, is never guessed, and no guest is restarted twice for one request.

use std::time::{Duration, Instant};

use super::operation::{Ending, Halt, Run};
use super::power::{ASK_AGAIN, SLICE, ended, existing, launch, persist, unchanged};
use crate::hypervisor::{Domain, HypervisorError, PowerState, Reboot};
use crate::model::reason::Reason;

/// From this step on the guest may have restarted.
const STEP: &str = "reboot";

/// How long the event of a reset is waited for, so that no later reboot takes it for its own.
const RESET_PATIENCE: Duration = Duration::from_secs(1);

/// Why the guest that was asked is no longer waited for.
enum Answer {
    Restarted,
    /// It turned itself off, as one does that knows no restart by ACPI.
    WentOff,
    Silent,
}

/// Presses the reset button, at most once.
pub(super) fn hard(run: &Run) -> Result<Ending, Halt> {
    prepare(run)?;
    run.begin(STEP)?;
    reset(run)
}

/// Asks the guest, again and again as a stop does, and presses the reset button when its time is over.
pub(super) fn soft(run: &Run) -> Result<Ending, Halt> {
    prepare(run)?;
    let time = Duration::from_secs(u64::from(run.instance()?.record.stop_timeout_seconds));
    let restarts = run.shared.parts.reconciler.reboots(run.object);
    run.begin(STEP)?;
    match ask(run, restarts, Instant::now() + time)? {
        Answer::Restarted => {
            // What is shown is brought up to date by the event as well.
            let _shown_later = run.refresh();
            Ok(unchanged())
        }
        Answer::WentOff => {
            run.guard()?;
            launch(run)?;
            run.refresh()?;
            Ok(unchanged())
        }
        Answer::Silent => {
            log::info!("{} did not restart within {} s and is reset", run.object, time.as_secs());
            reset(run)
        }
    }
}

/// Refuses to go on where an earlier run of this operation may have restarted the guest already.
fn prepare(run: &Run) -> Result<(), Halt> {
    let domain = existing(run)?;
    if run.has_begun(STEP)? {
        return Err(Halt::Failed(Reason::Failed(
            "the connection or instancefs ended during the reboot; see whether the guest restarted, and ask again"
                .to_owned(),
        )));
    }
    persist(run, &domain)?;
    run.guard()
}

fn reset(run: &Run) -> Result<Ending, Halt> {
    let reconciler = &run.shared.parts.reconciler;
    let restarts = reconciler.reboots(run.object);
    run.guard()?;
    run.hypervisor().reboot(run.object, Reboot::Hard)?;
    let _heard = reconciler.wait_for(run.object, RESET_PATIENCE, &|_| reconciler.reboots(run.object) != restarts);
    // The request is sent; events will tell what a broken connection does not.
    let _shown_later = run.refresh();
    Ok(unchanged())
}

fn ask(run: &Run, restarts: u64, deadline: Instant) -> Result<Answer, Halt> {
    let reconciler = &run.shared.parts.reconciler;
    let restarted = || reconciler.reboots(run.object) != restarts;
    loop {
        // Shown as it is, or the wait below would end at once for what is shown and no longer true.
        run.refresh()?;
        let domain = existing(run)?;
        if restarted() {
            return Ok(Answer::Restarted);
        }
        match (domain.power, domain.reason.as_str()) {
            (PowerState::ShutOff, "shutdown") => return Ok(Answer::WentOff),
            (PowerState::ShutOff | PowerState::Crashed, _) => return Err(ended()),
            (PowerState::Running | PowerState::Paused | PowerState::PmSuspended, _) => {}
        }
        if Instant::now() >= deadline {
            return Ok(Answer::Silent);
        }
        run.proceed()?;
        run.guard()?;
        match run.hypervisor().reboot(run.object, Reboot::Soft) {
            Ok(()) => {}
            Err(HypervisorError::Unreachable(_)) => return Err(Halt::Lost),
            // Asked again later, and reset at last.
            Err(error) => log::warn!("{} cannot be asked to restart: {error}", run.object),
        }
        let until = deadline.min(Instant::now() + ASK_AGAIN);
        loop {
            run.proceed()?;
            run.guard()?;
            let left = until.saturating_duration_since(Instant::now());
            let off = |domain: Option<&Domain>| domain.is_none_or(|domain| domain.power == PowerState::ShutOff);
            if left.is_zero() || reconciler.wait_for(run.object, left.min(SLICE), &|domain| restarted() || off(domain))
            {
                break;
            }
        }
    }
}
