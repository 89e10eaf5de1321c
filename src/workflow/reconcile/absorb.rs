//! What an answer of the hypervisor does to the instances, decided inside the ledger's batch.
//!
//! Answers come from several threads and can arrive in another order than their questions were asked. Each carries the
//! serial number of its question; one that was asked before the last that was absorbed is stale and dropped.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use uuid::Uuid;

use crate::inventory::{Addresses, Instance, Object};
use crate::model::Class;
use crate::model::caller::{NO_PROJECT, Ownership};
use crate::model::domain::{Domain, PowerState};
use crate::model::record::{Departure, InstanceRecord, Undefined};
use crate::workflow::events::Entry;
use crate::workflow::ledger::{Batch, now};

/// What the hypervisor said.
pub(super) struct Answers {
    /// The question's number.
    pub(super) serial: u64,
    /// One domain each.
    pub(super) domains: Vec<(Uuid, Answer)>,
    /// They are all domains there are. Then these instances were at rest when the question was asked; if they are not
    /// among the domains, they are gone.
    pub(super) at_rest: Option<HashSet<Uuid>>,
}

/// What it said of one domain.
pub(super) enum Answer {
    /// There is none.
    Gone,
    /// All there is to know.
    Domain(Domain),
    /// What it does, with the reason; of the rest nothing is new.
    Power(PowerState, String),
}

impl From<Option<Domain>> for Answer {
    fn from(domain: Option<Domain>) -> Answer {
        domain.map_or(Answer::Gone, Answer::Domain)
    }
}

/// What may be done about them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extent {
    /// All that follows.
    Everything,
    /// Only what needs no store: the store fails.
    ShownOnly,
}

/// Which questions the present view is from.
#[derive(Default)]
pub(super) struct Stamps {
    pass: u64,
    single: HashMap<Uuid, u64>,
    /// What events said of definitions that went, each with the number that the next question had then.
    departures: HashMap<Uuid, (u64, Departure)>,
}

impl Stamps {
    /// Whether an answer to this question is news of that domain; remembers it if so.
    fn admit(&mut self, id: Uuid, serial: u64) -> bool {
        if self.pass > serial || self.single.get(&id).is_some_and(|stamp| *stamp > serial) {
            return false;
        }
        self.single.insert(id, serial);
        true
    }

    /// The answer could not be brought in after all.
    fn forget(&mut self, id: Uuid, serial: u64) {
        if self.single.get(&id) == Some(&serial) {
            self.single.remove(&id);
        }
    }

    /// An event said so, before this question was asked.
    pub(super) fn departed(&mut self, id: Uuid, departure: Departure, serial: u64) {
        self.departures.insert(id, (serial, departure));
    }

    /// The domain is defined, as of this question.
    fn is_back(&mut self, id: Uuid, serial: u64) {
        if self.departures.get(&id).is_some_and(|(before, _)| *before <= serial) {
            self.departures.remove(&id);
        }
    }

    fn departure(&self, id: Uuid) -> Departure {
        self.departures.get(&id).map_or(Departure::Missing, |(_, departure)| *departure)
    }

    /// All domains are known as of this question.
    pub(super) fn passed(&mut self, serial: u64) {
        self.pass = self.pass.max(serial);
        self.single.retain(|_, stamp| *stamp > serial);
    }
}

/// Brings the answers into the batch, new domains as `owner`'s. Returns what is worth an entry in `events`.
pub(super) fn absorb(
    batch: &mut Batch<'_>,
    stamps: &mut Stamps,
    answers: &Answers,
    owner: u32,
    extent: Extent,
) -> Vec<Entry> {
    let mut entries = Vec::new();
    for (id, answer) in &answers.domains {
        if stamps.admit(*id, answers.serial) {
            match (batch.instance(*id), answer) {
                (Some(instance), Answer::Domain(domain)) => {
                    if domain.persistent {
                        stamps.is_back(*id, answers.serial);
                    }
                    change(batch, &instance, domain, stamps.departure(*id), &mut entries);
                }
                (Some(instance), Answer::Power(power, reason)) => {
                    if let Some(domain) = &instance.domain {
                        let domain = Domain { power: *power, reason: reason.clone(), ..domain.clone() };
                        change(batch, &instance, &domain, stamps.departure(*id), &mut entries);
                    }
                }
                (Some(instance), Answer::Gone) => gone(batch, &instance, stamps.departure(*id), extent, &mut entries),
                (None, Answer::Domain(domain)) => match extent {
                    Extent::Everything => appear(batch, domain, owner, &mut entries),
                    Extent::ShownOnly => stamps.forget(*id, answers.serial),
                },
                (None, Answer::Gone | Answer::Power(..)) => {}
            }
        }
    }
    if let Some(at_rest) = &answers.at_rest {
        let present: HashSet<Uuid> = answers.domains.iter().map(|(id, _)| *id).collect();
        for id in at_rest.difference(&present) {
            // What an operation has claimed meanwhile is left to it.
            if let Some(instance) = batch.instance(*id)
                && instance.record.operation.is_none()
                && stamps.admit(*id, answers.serial)
            {
                gone(batch, &instance, stamps.departure(*id), extent, &mut entries);
            }
        }
    }
    entries
}

fn appear(batch: &mut Batch<'_>, domain: &Domain, owner: u32, entries: &mut Vec<Entry>) {
    let ownership = Ownership { owner, project: NO_PROJECT, generation: 0 };
    let record = InstanceRecord {
        autostart: domain.autostart,
        crashed: has_crashed(domain).then(|| "crashed".to_owned()),
        seen: Some(domain.clone()),
        ..InstanceRecord::new(batch.next_number(), domain.name.clone(), ownership, now())
    };
    let addresses = Addresses::default();
    let instance = Instance { id: domain.uuid, record, domain: Some(domain.clone()), addresses, task: None };
    entries.push(entry(&instance, "appeared", "", instance.observed().state.word()));
    batch.put(Object::Instance(Arc::new(instance)));
}

fn change(batch: &mut Batch<'_>, before: &Instance, domain: &Domain, departure: Departure, entries: &mut Vec<Entry>) {
    if before.domain.as_ref() == Some(domain) {
        return;
    }
    let mut after = before.clone();
    let record = &mut after.record;
    let past = before.domain.as_ref();
    let was_off = past.map_or(record.draft.is_some(), is_off);
    if was_off && !is_off(domain) {
        record.launched_at = Some(now());
        if let Some(shelf) = &mut record.shelf {
            shelf.saw_start(now());
        }
    }
    let same_power = past.is_some_and(|past| past.power == domain.power && past.reason == domain.reason);
    if domain.power == PowerState::Running {
        record.crashed = None;
    } else if has_crashed(domain) && !same_power {
        record.crashed = Some("crashed".to_owned());
    }
    if record.draft.is_none() {
        record.name.clone_from(&domain.name);
        record.undefined = undefined(before, domain, departure);
    }
    record.updated_at = now();
    record.seen = Some(domain.clone());
    after.domain = Some(domain.clone());
    if is_off(domain) {
        after.addresses = Addresses::default();
    }
    if after.record.draft.is_none() && after.record.operation.is_none() {
        let (from, to) = (before.observed().state.word(), after.observed().state.word());
        if past.is_none() {
            entries.push(entry(&after, "appeared", from, to));
        } else if from != to {
            entries.push(entry(&after, "state", from, to));
        }
        // Its state is the bin's whatever it does, but this nobody expects there.
        if was_off && !is_off(domain) && after.record.bin.is_some() {
            entries.push(entry(&after, "started", "", domain.power.word()));
        }
        if past.is_some_and(|past| past.name != domain.name) {
            entries.push(entry(&after, "name", before.name(), &domain.name));
        }
    }
    batch.show(Object::Instance(Arc::new(after)));
}

/// What is known of the definition's fate when the domain is there.
fn undefined(before: &Instance, domain: &Domain, departure: Departure) -> Option<Undefined> {
    let present = before.record.undefined;
    let was_persistent = before.domain.as_ref().is_some_and(|past| past.persistent);
    if !domain.persistent {
        let news = Undefined { at: now(), departure, had_saved_memory: false };
        return if was_persistent { Some(news) } else { present };
    }
    // Who defines it again is an operation; anybody else's definition, and a run, are something else that happened.
    let again = before.record.operation.is_some() || before.domain.is_some();
    present.filter(|_| is_off(domain) && !domain.has_managed_save && again)
}

fn gone(batch: &mut Batch<'_>, before: &Instance, departure: Departure, extent: Extent, entries: &mut Vec<Entry>) {
    let record = &before.record;
    let ours_to_forget = record.draft.is_none()
        && record.operation.is_none()
        && record.disks.is_empty()
        && record.volumes.is_empty()
        // The bin keeps what somebody put there until it is deleted for good.
        && record.bin.is_none()
        && record.shelf.is_none()
        && record.kept.is_empty()
        && !record.protection.protects();
    if ours_to_forget {
        if extent == Extent::Everything {
            entries.push(entry(before, "disappeared", before.observed().state.word(), ""));
            super::forget(batch, before.id);
        }
        return;
    }
    let Some(past) = &before.domain else {
        // The event can come after the look that found nothing.
        if let Some(known) = record.undefined
            && known.departure == Departure::Missing
            && departure != Departure::Missing
        {
            let mut after = before.clone();
            after.record.undefined = Some(Undefined { departure, ..known });
            batch.show(Object::Instance(Arc::new(after)));
        }
        return;
    };
    let mut after = before.clone();
    if record.draft.is_none() {
        // A guest that has left runs elsewhere, whoever tidies up behind it.
        let departure = if past.reason == "migrated" { Departure::Moved } else { departure };
        after.record.undefined = Some(Undefined { at: now(), departure, had_saved_memory: past.has_managed_save });
    }
    after.domain = None;
    after.addresses = Addresses::default();
    after.record.seen = None;
    after.record.updated_at = now();
    if record.draft.is_none() && record.operation.is_none() {
        let (from, to) = (before.observed().state.word(), after.observed().state.word());
        entries.push(entry(&after, "disappeared", from, to));
    }
    batch.show(Object::Instance(Arc::new(after)));
}

fn is_off(domain: &Domain) -> bool {
    match domain.power {
        PowerState::ShutOff | PowerState::Crashed => true,
        PowerState::Running | PowerState::Paused | PowerState::PmSuspended => false,
    }
}

fn has_crashed(domain: &Domain) -> bool {
    match domain.power {
        PowerState::Crashed => true,
        PowerState::ShutOff => domain.reason == "crashed",
        PowerState::Running | PowerState::Paused | PowerState::PmSuspended => false,
    }
}

fn entry(instance: &Instance, what: &str, from: &str, to: &str) -> Entry {
    Entry {
        class: Some(Class::Instance),
        id: Some(instance.id),
        name: instance.name().to_owned(),
        uid: 0,
        login: "libvirt".to_owned(),
        what: what.to_owned(),
        from: from.to_owned(),
        to: to.to_owned(),
        errno: String::new(),
        reason: instance.observed().reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_to_an_older_question_is_dropped() {
        let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let mut stamps = Stamps::default();
        assert!(stamps.admit(one, 5));
        assert!(!stamps.admit(one, 4));
        assert!(stamps.admit(two, 4));
        // A failed store has the same answer absorbed twice.
        assert!(stamps.admit(one, 5));
        stamps.passed(6);
        assert!(!stamps.admit(two, 5));
        assert!(stamps.admit(two, 7));
        stamps.passed(3);
        assert!(!stamps.admit(one, 5));
    }
}
