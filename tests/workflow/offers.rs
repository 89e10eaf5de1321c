//! Offers over time: when they end by themselves, what a key is good for then, and when they are forgotten.

use std::sync::Arc;
use std::time::Duration;

use instancefs::inventory::{Object, Volume};
use instancefs::model::caller::{Caller, NO_PROJECT, Ownership};
use instancefs::model::reason::Reason;
use instancefs::model::secret::Secret;
use instancefs::model::transfer::{State, TransferChange};
use instancefs::model::volume::change::VolumeChange;
use instancefs::model::volume::record::VolumeRecord;
use instancefs::model::volume::{self, Word};
use instancefs::workflow::request::Request;
use uuid::Uuid;

use crate::lab::{Life, TestClock, World, alice, bob, until};

const HOUR: Duration = Duration::from_secs(3600);

fn live<'a>(world: &'a World, clock: &Arc<TestClock>) -> Life<'a> {
    let clock = clock.clone();
    world.live_on(world.store.clone(), |settings| settings.clock = clock)
}

/// An available volume of alice's, and the offer of it.
fn offered(life: &Life<'_>) -> (Uuid, Uuid, Secret) {
    let id = Uuid::new_v4();
    life.ledger
        .transact(|batch| {
            let ownership = Ownership { owner: alice().uid, project: NO_PROJECT, generation: 0 };
            let record = VolumeRecord::new(batch.next_number(), "data".into(), ownership, "memory".into(), 1);
            batch.put(Object::Volume(Arc::new(Volume { id, record, task: None })));
        })
        .unwrap();
    let offer = Uuid::new_v4();
    let change = VolumeChange::Offer { transfer: offer, name: "gift".into(), recipient: None };
    life.change_volume(&alice(), id, change).unwrap();
    let line = life.engine.offer_key(offer, alice().uid).unwrap();
    let key = std::str::from_utf8(line.bytes()).unwrap().trim_end().to_owned();
    (id, offer, Secret::new(key))
}

fn accept(life: &Life<'_>, caller: &Caller, id: Uuid, key: &Secret) -> Result<(), Reason> {
    life.ask(caller, Request::Transfer { id, change: TransferChange::Accept(key.clone()) })
}

fn state(life: &Life<'_>, offer: Uuid) -> State {
    life.inventory.transfer(offer).unwrap().record.state
}

fn volume_state(life: &Life<'_>, id: Uuid) -> volume::State {
    life.inventory.volume(id).unwrap().record.state()
}

#[test]
fn an_offer_ends_after_a_day_by_both_clocks_and_frees_its_volume_and_is_forgotten_two_days_later() {
    let (world, clock) = (World::new(), TestClock::new());
    let life = live(&world, &clock);
    let (id, offer, key) = offered(&life);
    clock.set(|now| now + 365 * 24 * 3600);
    life.engine.keep();
    // Whoever sets the clock hurries nothing: the later offer is looked at after it, and ends.
    assert_eq!(volume_state(&life, id), volume::State::AwaitingTransfer);
    clock.set(|now| now - 365 * 24 * 3600);
    clock.pass(24 * HOUR - Duration::from_secs(1));
    assert_eq!((state(&life, offer), volume_state(&life, id)), (State::Pending, volume::State::AwaitingTransfer));
    clock.pass(Duration::from_secs(1));
    assert_eq!(accept(&life, &bob(), offer, &key).map_err(|reason| reason.errno()), Err(libc::EINVAL), "too late");
    life.engine.keep();
    until("it has ended", || state(&life, offer) == State::Expired);
    assert_eq!(volume_state(&life, id), volume::State::Available);
    assert_eq!(life.inventory.volume(id).unwrap().record.ownership.owner, alice().uid);
    assert_eq!(accept(&life, &bob(), offer, &key).map_err(|reason| reason.errno()), Err(libc::EINVAL));
    clock.pass(48 * HOUR - Duration::from_secs(1));
    life.engine.expire();
    assert_eq!(accept(&life, &bob(), offer, &key).map_err(|reason| reason.errno()), Err(libc::EINVAL), "it is there");
    clock.pass(Duration::from_secs(1));
    life.engine.expire();
    until("it is forgotten", || life.inventory.transfer(offer).is_none());
    assert_eq!(accept(&life, &bob(), offer, &key).map_err(|reason| reason.errno()), Err(libc::ENOENT));
}

#[test]
fn a_key_is_shown_for_ten_minutes_and_in_one_life_only_and_is_good_for_a_day() {
    let (world, clock) = (World::new(), TestClock::new());
    let (id, offer, key) = {
        let life = live(&world, &clock);
        let (id, offer, key) = offered(&life);
        assert_eq!(life.engine.offer_key(offer, bob().uid).unwrap_err().errno(), libc::EACCES);
        clock.pass(Duration::from_secs(599));
        assert!(life.engine.offer_key(offer, alice().uid).is_ok());
        clock.pass(Duration::from_secs(1));
        assert_eq!(life.engine.offer_key(offer, alice().uid).unwrap_err().errno(), libc::ENOENT);
        (id, offer, key)
    };
    let life = live(&world, &clock);
    let (_, later, _) = offered(&life);
    assert!(life.engine.offer_key(later, alice().uid).is_ok());
    drop(life);
    let life = live(&world, &clock);
    assert_eq!(life.engine.offer_key(later, alice().uid).unwrap_err().errno(), libc::ENOENT, "another life");
    clock.pass(23 * HOUR);
    accept(&life, &bob(), offer, &key).unwrap();
    assert_eq!(life.inventory.volume(id).unwrap().record.ownership.owner, bob().uid);
}

#[test]
fn who_is_shut_out_may_try_again_after_an_hour() {
    let (world, clock) = (World::new(), TestClock::new());
    let life = live(&world, &clock);
    let (id, offer, key) = offered(&life);
    let wrong = Secret::new("0".repeat(32));
    for _ in 0..5 {
        assert_eq!(accept(&life, &bob(), offer, &wrong), Err(Reason::WrongKey));
    }
    let (_, other, _) = offered(&life);
    for offer in [offer, other] {
        assert_eq!(accept(&life, &bob(), offer, &key), Err(Reason::ShutOut), "of all offers");
    }
    clock.pass(HOUR);
    accept(&life, &bob(), offer, &key).unwrap();
    assert_eq!(life.inventory.volume(id).unwrap().record.ownership.owner, bob().uid);
}

#[test]
fn taking_an_offer_asks_again_whether_the_volume_can_be_had() {
    let world = World::new();
    let life = world.live();
    let (id, offer, key) = offered(&life);
    life.change_volume(&alice(), id, VolumeChange::Locked(true)).unwrap();
    assert_eq!(accept(&life, &bob(), offer, &key).map_err(|reason| reason.errno()), Err(libc::EPERM));
    life.change_volume(&alice(), id, VolumeChange::Locked(false)).unwrap();
    // What no word can do while it is offered, a store that was put back can have done.
    let edit = |edit: &dyn Fn(&mut VolumeRecord)| {
        let edited = life.ledger.transact(|batch| {
            let mut volume = (*batch.volume(id).unwrap()).clone();
            edit(&mut volume.record);
            batch.put(Object::Volume(Arc::new(volume)));
        });
        edited.unwrap();
    };
    edit(&|record| record.transfer = None);
    assert_eq!(accept(&life, &bob(), offer, &key).map_err(|reason| reason.errno()), Err(libc::EINVAL));
    life.change_volume(&alice(), id, VolumeChange::State(Word::State(volume::State::SoftDeleted))).unwrap();
    edit(&|record| record.transfer = Some(offer));
    assert_eq!(accept(&life, &bob(), offer, &key).map_err(|reason| reason.errno()), Err(libc::EINVAL));
    life.ledger.transact(|batch| batch.remove(instancefs::model::Class::Volume, id)).unwrap();
    assert_eq!(accept(&life, &bob(), offer, &key).map_err(|reason| reason.errno()), Err(libc::ENOENT));
    assert_eq!(state(&life, offer), State::Pending);
    life.ask(&alice(), Request::Transfer { id: offer, change: TransferChange::Cancel }).unwrap();
    assert_eq!(state(&life, offer), State::Cancelled);
}
