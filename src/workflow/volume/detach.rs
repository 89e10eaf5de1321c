//! Takes a volume from an instance: from the guest first, which may refuse, and then from the definition. While the guest
//! keeps it, the definition says so too.
//!
//! How long the guest may take is the instance's `stop_timeout_seconds`, counted from the beginning of the operation.

use std::path::Path;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::disks::{self, Seen};
use crate::hypervisor::definition::disk_alias;
use crate::hypervisor::{Domain, HypervisorError, Places, PowerState};
use crate::inventory::Instance;
use crate::model::reason::Reason;
use crate::model::volume::device;
use crate::workflow::ledger::now;
use crate::workflow::operation::{Ending, Halt, Run};
use crate::workflow::power::{ASK_AGAIN, SLICE};
use crate::workflow::reconcile::DeviceNews;

const DETACH: &str = "detach";

/// How long the word of a guest that refused may take after the hypervisor's answer.
const NEWS_PATIENCE: Duration = Duration::from_secs(1);

/// How often a call is refused for a state that the domain is not in, before we believe it.
const REFUSALS: u32 = 3;

const PERSISTENT: Places = Places { persistent: true, live: false };
const LIVE: Places = Places { persistent: false, live: true };

/// Takes it from this instance.
pub(super) fn detach(run: &Run, id: Uuid) -> Result<Ending, Halt> {
    let volume = run.volume()?;
    let instance = disks::instance(run, id)?;
    can_be_detached(&instance, run.object).map_err(Halt::Failed)?;
    let timeout = u64::from(instance.record.stop_timeout_seconds);
    let left = timeout.saturating_sub(now().saturating_sub(run.started_at));
    let removal = Removal {
        run,
        id,
        path: &disks::path(run, &volume)?,
        deadline: Instant::now() + Duration::from_secs(left),
        may_go_on: &|| {
            run.begin(DETACH)?;
            // Last, since a lock can come while the journal is written.
            not_locked(run, id)
        },
    };
    // A draft has it in its record alone, unless it could not be taken back whole.
    if !removal.remove()? && instance.record.draft.is_none() {
        return Err(disks::not_defined());
    }
    run.shared.parts.reconciler.read_definition(id);
    Ok(disks::detached(run.object, id))
}

/// What the operation would find out, as far as the records say it.
pub(super) fn can_begin(instance: &Instance, volume: Uuid) -> Result<(), Reason> {
    disks::can_change(instance)?;
    can_be_detached(instance, volume)
}

fn can_be_detached(instance: &Instance, volume: Uuid) -> Result<(), Reason> {
    let record = &instance.record;
    if record.draft.is_none() && record.volumes.get(device::ROOT) == Some(&volume) {
        return Err(Reason::InUse("the instance boots from it; delete the instance for good to free it".to_owned()));
    }
    Ok(())
}

/// A lock on either side takes hold during the operation.
fn not_locked(run: &Run, id: Uuid) -> Result<(), Halt> {
    run.guard()?;
    match &disks::instance(run, id)?.record.protection.lock {
        Some(lock) => Err(Halt::Failed(Reason::InstanceLocked(lock.clone()))),
        None => Ok(()),
    }
}

/// A disk on its way out of both definitions of a domain.
pub(super) struct Removal<'a> {
    pub(super) run: &'a Run,
    /// The instance.
    pub(super) id: Uuid,
    /// The volume's path.
    pub(super) path: &'a Path,
    /// How long the guest may take.
    pub(super) deadline: Instant,
    /// Asked before each call, and while the guest takes its time.
    pub(super) may_go_on: &'a dyn Fn() -> Result<(), Halt>,
}

/// What asking a guest came to.
enum Answer {
    /// It has let go, as this look at the domain shows.
    LetGo(Option<Seen>),
    /// It may have let go.
    Heard,
    /// It will not.
    Refused,
}

impl Removal<'_> {
    /// Takes it out. `false`: there is no such domain.
    pub(super) fn remove(&self) -> Result<bool, Halt> {
        let mut refusals = 0;
        let mut asked = false;
        let mut looked = None;
        loop {
            let seen = match looked.take() {
                Some(seen) => seen,
                None => Seen::of(self.run, self.id)?,
            };
            let Some(seen) = seen else { return Ok(false) };
            let found = seen.find(self.path)?;
            let Some(device) = found.device().map(str::to_owned) else { return Ok(true) };
            disks::has_no_saved_memory(&seen.domain)?;
            let result = match (&found.live, &seen.live) {
                (Some(device), Some(xml)) => {
                    can_hear(seen.domain.power)?;
                    if asked && Instant::now() >= self.deadline {
                        return Err(Halt::Failed(silent(device)));
                    }
                    (self.may_go_on)()?;
                    let first = !std::mem::replace(&mut asked, true);
                    match self.ask(device, xml, first)? {
                        Ok(Answer::LetGo(seen)) => {
                            looked = Some(seen);
                            Ok(())
                        }
                        Ok(Answer::Heard) => Ok(()),
                        Ok(Answer::Refused) => return Err(Halt::Failed(refused(device))),
                        Err(error) => Err(error),
                    }
                }
                (Some(_) | None, _) => {
                    (self.may_go_on)()?;
                    self.run.hypervisor().detach_disk(self.id, &device, PERSISTENT)
                }
            };
            match result {
                Ok(()) => {}
                Err(HypervisorError::Unreachable(_)) => return Err(Halt::Lost),
                // It stopped or started between the look and the call.
                Err(HypervisorError::InvalidState(_)) if refusals < REFUSALS => refusals += 1,
                Err(error) => match Seen::of(self.run, self.id)? {
                    Some(seen) if seen.find(self.path)? == found => return Err(error.into()),
                    // Somebody else, or the guest, was first.
                    Some(_) | None => {}
                },
            }
        }
    }

    /// Asks the guest, and gives it time. What it has then is looked at by the caller, if it was not here.
    fn ask(&self, device: &str, xml: &str, first: bool) -> Result<Result<Answer, HypervisorError>, Halt> {
        let reconciler = &self.run.shared.parts.reconciler;
        let alias = disk_alias(xml, device).unwrap_or_else(|| device.to_owned());
        let refusals = |news: &DeviceNews| news.kept.get(&alias).copied().unwrap_or_default();
        let before = reconciler.device_news(self.id);
        let is_refused = || refusals(&reconciler.device_news(self.id)) > refusals(&before);
        match self.run.hypervisor().detach_disk(self.id, device, LIVE) {
            Ok(()) => {
                // The driver may have waited for the guest itself.
                let seen = Seen::of(self.run, self.id)?;
                if self.is_free(seen.as_ref())? {
                    return Ok(Ok(Answer::LetGo(seen)));
                }
            }
            Err(error @ HypervisorError::Failed(_)) => {
                // The guest's word comes another way than the answer.
                if reconciler.wait_for(self.id, NEWS_PATIENCE, &|_| is_refused()) {
                    return Ok(Ok(Answer::Refused));
                }
                if first {
                    return Ok(Err(error));
                }
                // It is on its way out already, and is not asked twice.
                log::info!("{} is not asked for {device} again: {error}", self.id);
            }
            Err(error) => return Ok(Err(error)),
        }
        let until = self.deadline.min(Instant::now() + ASK_AGAIN);
        loop {
            (self.may_go_on)()?;
            let left = until.saturating_duration_since(Instant::now()).min(SLICE);
            let has_news = |domain: Option<&Domain>| {
                reconciler.device_news(self.id) != before || domain.is_none_or(|domain| !domain.power.is_on())
            };
            if left.is_zero() || reconciler.wait_for(self.id, left, &has_news) {
                return Ok(Ok(if is_refused() { Answer::Refused } else { Answer::Heard }));
            }
        }
    }

    /// Whether the guest has it no more.
    fn is_free(&self, seen: Option<&Seen>) -> Result<bool, Halt> {
        seen.map_or(Ok(true), |seen| Ok(seen.find(self.path)?.live.is_none()))
    }
}

/// A guest whose CPUs stand still cannot let go of anything, and would do it at an unexpected moment.
fn can_hear(power: PowerState) -> Result<(), Halt> {
    match power {
        PowerState::Running | PowerState::ShutOff => Ok(()),
        PowerState::Paused | PowerState::PmSuspended | PowerState::Crashed => Err(Halt::Failed(Reason::InUse(
            "the guest stands still and cannot let it go; write active or stopped to the instance's state first"
                .to_owned(),
        ))),
    }
}

fn silent(device: &str) -> Reason {
    Reason::InUse(format!(
        "the guest did not let {device} go within the instance's stop_timeout_seconds, so it stays attached; unmount it \
         there, or stop the instance, and try again"
    ))
}

fn refused(device: &str) -> Reason {
    Reason::InUse(format!(
        "the guest refused to let {device} go, so it stays attached; unmount it there, or stop the instance, and try again"
    ))
}
