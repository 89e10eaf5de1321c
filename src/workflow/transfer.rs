//! Offers of a volume: made with a key, taken once, taken back, or over. Each is one transaction of the offer and its
//! volume. What needs no store is in [`super::offers`].

use std::sync::Arc;

use openssl::sha::Sha256;
use subtle::ConstantTimeEq;
use uuid::Uuid;

use super::apply::{hand_over, words};
use super::engine::Shared;
use super::events::Entry;
use super::judge::{Accepted, Judge, entry};
use super::recovery::KEPT_SECONDS;
use crate::inventory::{Object, Transfer, Volume};
use crate::model::Class;
use crate::model::caller::{Caller, Role};
use crate::model::instance::idle;
use crate::model::protection::Action;
use crate::model::reason::Reason;
use crate::model::record::{ErrorHistory, Expiry};
use crate::model::secret::Secret;
use crate::model::transfer::{Recipient, State, Taker, TransferChange, TransferRecord};
use crate::model::volume;

/// How long an offer can be taken.
const OPEN_SECONDS: u64 = 24 * 3600;

/// Bytes of a key, and of a salt.
const KEY_BYTES: usize = 16;

/// What a named recipient writes.
const YES: &str = "1";

/// Makes an offer of a volume that is nobody's to use from now on.
pub(super) fn offer(
    judge: &mut Judge<'_, '_>,
    caller: &Caller,
    volume: &mut Volume,
    id: Uuid,
    name: &str,
    recipient: Option<Recipient>,
) -> Result<(), Reason> {
    let uptime = judge.shared.uptime.seconds();
    let taker = match recipient {
        Some(recipient) => Taker::Named(recipient),
        None => {
            let (key, salt) = (Secret::new(random()?), random()?);
            let hash = hash(&salt, &key);
            judge.shared.offers.show(id, key.line(), caller.uid, uptime);
            Taker::Key { salt, hash }
        }
    };
    let record = TransferRecord {
        number: judge.batch.next_number(),
        name: name.to_owned(),
        volume: volume.id,
        ownership: volume.record.ownership,
        offered_by: caller.uid,
        taker,
        created_at: judge.now,
        expiry: Expiry { at: judge.now.saturating_add(OPEN_SECONDS), at_uptime: uptime.saturating_add(OPEN_SECONDS) },
        state: State::Pending,
        ended_at: None,
        errors: ErrorHistory::default(),
    };
    judge.batch.put(Object::Transfer(Arc::new(Transfer { id, record })));
    volume.record.transfer = Some(id);
    Ok(())
}

/// Whether a volume is offered like this already.
pub(super) fn is_offered(judge: &Judge<'_, '_>, volume: &Volume, name: &str, recipient: Option<Recipient>) -> bool {
    let offer = volume.record.transfer.and_then(|id| judge.batch.transfer(id));
    offer.is_some_and(|offer| {
        let named = match &offer.record.taker {
            Taker::Named(recipient) => Some(*recipient),
            Taker::Key { .. } => None,
        };
        offer.record.name == name && named == recipient
    })
}

impl Judge<'_, '_> {
    /// Takes an offer, takes it back, or ends it.
    pub(super) fn transfer(&mut self, caller: &Caller, id: Uuid, change: &TransferChange) -> Result<Accepted, Reason> {
        let offer = self.batch.transfer(id).ok_or_else(|| Reason::NotFound(format!("transfer {id}")))?;
        match change {
            TransferChange::Accept(key) => self.accept(caller, &offer, key),
            TransferChange::Cancel => {
                if caller.role(&offer.record.ownership) == Role::Stranger {
                    return Err(Reason::NotYours { class: Class::Transfer });
                }
                match offer.record.state {
                    State::Cancelled => Ok(Accepted::default()),
                    State::Pending => Ok(self.end(caller, &offer, State::Cancelled, Vec::new())),
                    State::Accepted | State::Expired => Err(ended(offer.record.state, "cancelled")),
                }
            }
            TransferChange::Expire => match offer.record.state {
                State::Pending if self.is_over(&offer) => Ok(self.end(caller, &offer, State::Expired, Vec::new())),
                State::Pending => Err(Reason::Policy("its time is not over".to_owned())),
                State::Accepted | State::Cancelled | State::Expired => Ok(Accepted::default()),
            },
        }
    }

    fn is_over(&self, offer: &Transfer) -> bool {
        offer.record.expiry.left(self.now, self.shared.uptime.seconds()) == 0
    }

    /// Who has no key learns nothing of the offer but that the key is wrong.
    fn accept(&mut self, caller: &Caller, offer: &Transfer, key: &Secret) -> Result<Accepted, Reason> {
        let (offers, uptime) = (&self.shared.offers, self.shared.uptime.seconds());
        match &offer.record.taker {
            Taker::Named(recipient) if !recipient.is(caller) => {
                return Err(Reason::NotYours { class: Class::Transfer });
            }
            Taker::Named(_) if key.bytes() != YES.as_bytes() => {
                return Err(Reason::Malformed("this offer is for you and has no key; write 1".to_owned()));
            }
            Taker::Named(_) => {}
            Taker::Key { .. } if offers.is_shut_out(caller.uid, uptime) => return Err(Reason::ShutOut),
            Taker::Key { salt, hash: right } => {
                if !bool::from(hash(salt, key).as_bytes().ct_eq(right.as_bytes())) {
                    offers.wrong(caller.uid, uptime);
                    return Err(Reason::WrongKey);
                }
            }
        }
        match offer.record.state {
            State::Pending if self.is_over(offer) => return Err(ended(State::Expired, "accept")),
            State::Pending => {}
            State::Accepted | State::Cancelled | State::Expired => return Err(ended(offer.record.state, "accept")),
        }
        let volume = self.batch.volume(offer.record.volume);
        let volume = volume.ok_or_else(|| Reason::NotFound("such volume any more".to_owned()))?;
        let situation = volume.situation(caller, None);
        situation.check(Action::Change)?;
        idle(situation.task)?;
        match situation.state {
            volume::State::AwaitingTransfer if volume.record.transfer == Some(offer.id) => {}
            volume::State::AwaitingTransfer
            | volume::State::Draft
            | volume::State::Available
            | volume::State::InUse
            | volume::State::Error
            | volume::State::SoftDeleted => return Err(situation.wrong_state("accept")),
        }
        let mut taken = (*volume).clone();
        let (former, new) = (taken.record.ownership.owner, self.ownership_for(caller));
        hand_over(&mut taken.record.ownership, |ownership| {
            ownership.owner = new.owner;
            ownership.project = new.project;
        });
        taken.record.errors.current = false;
        let told = words("owner", former, new.owner);
        let told = entry(Class::Volume, taken.id, &taken.record.name, caller, told);
        self.batch.put(Object::Volume(Arc::new(taken)));
        Ok(self.end(caller, offer, State::Accepted, vec![told]))
    }

    /// Ends an offer; its volume can be used again.
    fn end(&mut self, caller: &Caller, offer: &Transfer, state: State, mut entries: Vec<Entry>) -> Accepted {
        if let Some(volume) = self.batch.volume(offer.record.volume)
            && volume.record.transfer == Some(offer.id)
        {
            let mut volume = (*volume).clone();
            volume.record.transfer = None;
            volume.record.updated_at = self.now;
            self.batch.put(Object::Volume(Arc::new(volume)));
        }
        let told = words("state", offer.record.state.word(), state.word());
        entries.push(entry(Class::Transfer, offer.id, &offer.record.name, caller, told));
        let mut ended = offer.clone();
        ended.record.state = state;
        ended.record.ended_at = Some(self.now);
        ended.record.errors.current = false;
        self.batch.put(Object::Transfer(Arc::new(ended)));
        self.shared.offers.forget(offer.id);
        Accepted { entries, ..Accepted::default() }
    }
}

fn ended(state: State, word: &'static str) -> Reason {
    Reason::State { state: state.word(), word, available: String::new() }
}

/// Removes offers that ended so long ago that nobody wants to know how.
pub(super) fn forget_ended(shared: &Shared) {
    let now = shared.settings.clock.now();
    let is_over =
        |offer: &Arc<Transfer>| offer.record.ended_at.is_some_and(|ended| ended.saturating_add(KEPT_SECONDS) <= now);
    let over: Vec<_> = shared.parts.ledger.inventory().transfers().into_iter().filter(is_over).collect();
    if over.is_empty() {
        return;
    }
    let removed = shared.parts.ledger.transact(|batch| {
        for offer in &over {
            batch.remove(Class::Transfer, offer.id);
        }
    });
    if let Err(error) = removed {
        log::warn!("{} ended offers are kept for now: {error}", over.len());
    }
}

/// 128 random bits, hexadecimal.
fn random() -> Result<String, Reason> {
    let mut bytes = [0; KEY_BYTES];
    getrandom::fill(&mut bytes)
        .map_err(|error| Reason::Failed(format!("the kernel gives no random numbers for a key: {error}")))?;
    Ok(hexadecimal(&bytes))
}

/// SHA-256 of salt and key, hexadecimal.
fn hash(salt: &str, key: &Secret) -> String {
    let mut sum = Sha256::new();
    sum.update(salt.as_bytes());
    sum.update(key.bytes());
    hexadecimal(&sum.finish())
}

/// In one allocation, so that no part of a key is left behind.
fn hexadecimal(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from_digit(value.into(), 16).unwrap_or_default();
    let mut text = String::with_capacity(2 * bytes.len());
    bytes.iter().for_each(|byte| text.extend([digit(byte >> 4), digit(byte & 0xf)]));
    text
}
