//! The addresses of running guests: asked for in the background, soon after a start and then more and more rarely.
//!
//! A guest's agent may take a question and never answer it, and nothing can end such a call. So agents are asked by a few
//! threads of their own, each guest by one at a time; what the host knows is asked by another thread, which no guest can
//! keep.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use uuid::Uuid;

use super::Reconciler;
use crate::hypervisor::{AddressSource, HypervisorError, PowerState};
use crate::inventory::{Instance, Object};

/// So many agents are asked at once.
pub(super) const AGENT_THREADS: usize = 4;

/// The first question comes so long after the start, or after something was heard of the guest.
const FIRST: Duration = Duration::from_secs(1);

/// No two questions are further apart.
const LAST: Duration = Duration::from_secs(300);

/// When each guest is asked next, by one kind of source.
#[derive(Default)]
pub(super) struct Schedule {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    guests: HashMap<Uuid, Guest>,
    /// The guests that nobody asks at the moment.
    due: BTreeSet<(Instant, Uuid)>,
    closed: bool,
}

struct Guest {
    /// When it is to be asked; `None` while it is being asked.
    at: Option<Instant>,
    /// How often it was asked.
    asked: u32,
    /// Something was heard of it while it was being asked.
    again: bool,
}

impl Schedule {
    /// Asks this guest soon.
    fn watch(&self, id: Uuid) {
        let soon = Instant::now() + FIRST;
        let State { guests, due, .. } = &mut *self.state.lock();
        let guest = guests.entry(id).or_insert(Guest { at: Some(soon), asked: 0, again: false });
        guest.asked = 0;
        match guest.at {
            None => guest.again = true,
            Some(at) => {
                due.remove(&(at, id));
                // Never later than it was to be, however often something is heard of it.
                let at = at.min(soon);
                guest.at = Some(at);
                due.insert((at, id));
            }
        }
        self.changed.notify_one();
    }

    fn forget(&self, id: Uuid) {
        let State { guests, due, .. } = &mut *self.state.lock();
        if let Some(Guest { at: Some(at), .. }) = guests.remove(&id) {
            due.remove(&(at, id));
        }
    }

    /// Waits for the next guest to ask; `None` at the end. [`Schedule::asked`] has to follow.
    fn next(&self) -> Option<Uuid> {
        let mut state = self.state.lock();
        loop {
            if state.closed {
                return None;
            }
            match state.due.first().copied() {
                None => self.changed.wait(&mut state),
                Some((at, _)) if at > Instant::now() => {
                    self.changed.wait_until(&mut state, at);
                }
                Some(entry) => {
                    state.due.remove(&entry);
                    if let Some(guest) = state.guests.get_mut(&entry.1) {
                        guest.at = None;
                        return Some(entry.1);
                    }
                }
            }
        }
    }

    fn asked(&self, id: Uuid) {
        let State { guests, due, .. } = &mut *self.state.lock();
        // One that stopped and started meanwhile is planned already.
        let Some(guest) = guests.get_mut(&id).filter(|guest| guest.at.is_none()) else { return };
        let pause = if std::mem::take(&mut guest.again) { FIRST } else { pause(guest.asked) };
        guest.asked = guest.asked.saturating_add(1);
        let at = Instant::now() + pause;
        guest.at = Some(at);
        due.insert((at, id));
        self.changed.notify_one();
    }

    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.changed.notify_all();
    }
}

/// After so many questions: 1 s, 1.5 s, 2.25 s, ... Each is about half of the time since the start, so the address of a
/// guest that took long to boot is shown after half as long again at most.
fn pause(asked: u32) -> Duration {
    // After 20 it is LAST anyway.
    let steps = asked.min(20);
    (FIRST * 3u32.pow(steps) / 2u32.pow(steps)).min(LAST)
}

/// The schedules of both kinds of source.
#[derive(Default)]
pub(super) struct Schedules {
    agent: Schedule,
    host: Schedule,
}

impl Schedules {
    fn of(&self, source: AddressSource) -> &Schedule {
        match source {
            AddressSource::Agent => &self.agent,
            AddressSource::Host => &self.host,
        }
    }

    pub(super) fn close(&self) {
        self.agent.close();
        self.host.close();
    }
}

impl Reconciler {
    /// Asks the guest soon if it runs, else never.
    pub(super) fn watch_addresses(&self, instance: &Instance) {
        for schedule in [&self.addresses.agent, &self.addresses.host] {
            if runs(instance) {
                schedule.watch(instance.id);
            } else {
                schedule.forget(instance.id);
            }
        }
    }

    /// Something was heard of these guests.
    pub(super) fn look_for_addresses<'a>(&self, ids: impl IntoIterator<Item = &'a Uuid>) {
        for id in ids {
            if let Some(instance) = self.ledger.inventory().instance(*id) {
                self.watch_addresses(&instance);
            }
        }
    }

    pub(super) fn forget_addresses(&self, id: Uuid) {
        self.addresses.agent.forget(id);
        self.addresses.host.forget(id);
    }

    /// A thread that asks.
    pub(super) fn ask_for_addresses(&self, source: AddressSource) {
        let schedule = self.addresses.of(source);
        while let Some(id) = schedule.next() {
            match self.hypervisor.addresses(id, source) {
                Ok(found) => self.show_addresses(id, source, presentable(found)),
                // Most guests have no agent, and some connections cannot ask at all.
                Err(
                    error @ (HypervisorError::Unreachable(_)
                    | HypervisorError::NoDomain
                    | HypervisorError::InvalidState(_)
                    | HypervisorError::Exists(_)
                    | HypervisorError::Unsupported(_)
                    | HypervisorError::Failed(_)),
                ) => log::debug!("no addresses of {id} by {source:?}: {error}"),
            }
            schedule.asked(id);
        }
    }

    fn show_addresses(&self, id: Uuid, source: AddressSource, found: Vec<IpAddr>) {
        let with = |instance: &Instance| {
            let mut instance = instance.clone();
            match source {
                AddressSource::Agent => instance.addresses.agent.clone_from(&found),
                AddressSource::Host => instance.addresses.host.clone_from(&found),
            }
            instance
        };
        let is_news = |instance: &Instance| runs(instance) && with(instance) != *instance;
        if !self.ledger.inventory().instance(id).is_some_and(|instance| is_news(&instance)) {
            return;
        }
        let shown = self.ledger.transact(|batch| {
            if let Some(instance) = batch.instance(id).filter(|instance| is_news(instance)) {
                batch.show(Object::Instance(Arc::new(with(&instance))));
            }
        });
        if let Err(error) = shown {
            log::warn!("the addresses of {id} are not shown: {error}");
        }
    }
}

/// Whether a guest is there that can have addresses.
pub(super) fn runs(instance: &Instance) -> bool {
    match instance.domain.as_ref().map(|domain| domain.power) {
        Some(PowerState::Running | PowerState::Paused | PowerState::PmSuspended) => true,
        Some(PowerState::ShutOff | PowerState::Crashed) | None => false,
    }
}

/// The addresses at which others can reach the guest, each once. One that it gave itself (169.254.0.0/16) is better than
/// none; fe80::/10 means nothing without the name of an interface.
fn presentable(found: Vec<IpAddr>) -> Vec<IpAddr> {
    let mut shown: Vec<IpAddr> = Vec::new();
    for address in found {
        let useless = match address {
            IpAddr::V4(address) => address.is_loopback() || address.is_unspecified() || address.is_multicast(),
            IpAddr::V6(address) => {
                address.is_loopback()
                    || address.is_unspecified()
                    || address.is_multicast()
                    || address.is_unicast_link_local()
            }
        };
        if !useless && !shown.contains(&address) {
            shown.push(address);
        }
    }
    let is_own = |address: &IpAddr| matches!(address, IpAddr::V4(address) if address.is_link_local());
    if shown.iter().any(|address| !is_own(address)) {
        shown.retain(|address| !is_own(address));
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_that_others_can_use_are_shown_each_once() {
        let parse = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpAddr>>();
        let found = parse(&["127.0.0.1", "10.0.0.2", "fe80::1", "169.254.7.7", "10.0.0.2", "::1", "fd00::2"]);
        assert_eq!(presentable(found), parse(&["10.0.0.2", "fd00::2"]));
        assert_eq!(presentable(parse(&["169.254.7.7", "fe80::1"])), parse(&["169.254.7.7"]));
    }

    #[test]
    fn questions_come_soon_and_then_ever_more_rarely() {
        let pauses: Vec<_> = (0..16).map(|asked| pause(asked).as_secs()).collect();
        assert_eq!(pauses, [1, 1, 2, 3, 5, 7, 11, 17, 25, 38, 57, 86, 129, 194, 291, 300]);
        assert_eq!(pause(u32::MAX), LAST);
    }

    #[test]
    fn a_guest_is_asked_by_one_at_a_time_and_again_if_something_was_heard_meanwhile() {
        let schedule = Schedule::default();
        let id = Uuid::from_u128(1);
        schedule.watch(id);
        assert_eq!(schedule.next(), Some(id));
        schedule.watch(id);
        assert!(schedule.state.lock().due.is_empty());
        schedule.asked(id);
        let State { guests, due, .. } = &*schedule.state.lock();
        assert_eq!((due.len(), guests[&id].asked), (1, 1));
    }

    #[test]
    fn a_guest_that_stopped_while_it_was_asked_is_not_asked_again() {
        let schedule = Schedule::default();
        let id = Uuid::from_u128(1);
        schedule.watch(id);
        assert_eq!(schedule.next(), Some(id));
        schedule.forget(id);
        schedule.asked(id);
        assert!(schedule.state.lock().due.is_empty());
        schedule.close();
        assert_eq!(schedule.next(), None);
    }
}
