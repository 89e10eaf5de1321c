//! What the hypervisor is asked of its domains, and that its answers are shown.

use std::sync::atomic::Ordering;

use uuid::Uuid;

use super::Reconciler;
use super::absorb::{self, Answer, Answers, Extent};
use super::health::Writer;
use crate::hypervisor::HypervisorError;
use crate::model::domain::PowerState;

impl Reconciler {
    /// One full pass now: all domains are asked for, in a constant number of round trips, and shown; new ones are
    /// stored, and those that are gone leave.
    ///
    /// # Errors
    ///
    /// What the hypervisor reports, and [`HypervisorError::Failed`] if the store did not take what is new; what needs
    /// no store is shown then nevertheless.
    pub fn pass(&self) -> Result<(), HypervisorError> {
        let serial = self.next_question.fetch_add(1, Ordering::Relaxed);
        let at_rest = self.ledger.inventory().instances().into_iter().filter(|instance| {
            instance.record.operation.is_none() && (instance.record.draft.is_none() || instance.domain.is_some())
        });
        let at_rest = Some(at_rest.map(|instance| instance.id).collect());
        let domains =
            self.hypervisor.domains()?.into_iter().map(|domain| (domain.uuid, Answer::Domain(domain))).collect();
        self.absorb(&Answers { serial, domains, at_rest })
    }

    /// Asks for one domain and shows it.
    ///
    /// # Errors
    ///
    /// As for [`Reconciler::pass`].
    pub fn refresh(&self, id: Uuid) -> Result<(), HypervisorError> {
        let serial = self.next_question.fetch_add(1, Ordering::Relaxed);
        let domain = self.hypervisor.domain(id)?;
        self.absorb(&Answers { serial, domains: vec![(id, domain.into())], at_rest: None })
    }

    /// Asks only whether the CPUs of a guest run, which is all that an event told of, and shows it.
    pub(super) fn refresh_power(&self, id: Uuid) -> Result<(), HypervisorError> {
        let serial = self.next_question.fetch_add(1, Ordering::Relaxed);
        match self.hypervisor.power(id)? {
            Some((power @ (PowerState::Running | PowerState::Paused), reason)) => {
                let answer = Answer::Power(power, reason);
                self.absorb(&Answers { serial, domains: vec![(id, answer)], at_rest: None })
            }
            Some((PowerState::ShutOff | PowerState::PmSuspended | PowerState::Crashed, _)) | None => self.refresh(id),
        }
    }

    /// Shows what follows from a call that the hypervisor has just carried out, and has it asked in the background: what
    /// somebody else did at the same moment may have come after.
    ///
    /// # Errors
    ///
    /// As for [`Reconciler::pass`].
    pub fn told(&self, id: Uuid, power: PowerState, reason: &str) -> Result<(), HypervisorError> {
        let serial = self.next_question.fetch_add(1, Ordering::Relaxed);
        let answer = Answer::Power(power, reason.to_owned());
        let result = self.absorb(&Answers { serial, domains: vec![(id, answer)], at_rest: None });
        self.pending.lock().changed.insert(id);
        self.pending_wake.notify_all();
        result
    }

    fn absorb(&self, answers: &Answers) -> Result<(), HypervisorError> {
        // Held over both tries, so that nobody takes what the first one failed to bring in for known.
        let mut stamps = self.stamps.lock();
        let owner = self.settings.owner;
        let mut absorb =
            |extent| self.ledger.transact(|batch| absorb::absorb(batch, &mut stamps, answers, owner, extent));
        let (entries, failure) = match absorb(Extent::Everything) {
            Ok(entries) => (entries, None),
            // What the hypervisor says of known domains is shown even so.
            Err(error) => (absorb(Extent::ShownOnly).unwrap_or_default(), Some(error.to_string())),
        };
        if answers.at_rest.is_some() && failure.is_none() {
            stamps.passed(answers.serial);
        }
        self.board.store(Writer::Pass, failure.clone().map_or(Ok(()), Err));
        drop(stamps);
        for entry in entries {
            self.events.record(entry);
        }
        failure.map_or(Ok(()), |failure| Err(HypervisorError::Failed(failure)))
    }
}
