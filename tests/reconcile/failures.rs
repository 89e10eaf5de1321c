//! A hypervisor that hangs or is away, events that are lost, a store that refuses.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use instancefs::hypervisor::PowerState;
use instancefs::hypervisor::simulated::SimulatedHypervisor;
use instancefs::inventory::Part;
use instancefs::model::instance::State;
use instancefs::model::record::InstanceRecord;
use instancefs::store::Store;
use instancefs::workflow::ledger::now;
use serde_json::json;
use uuid::Uuid;

use crate::world::World;

#[test]
fn what_changed_during_a_lost_connection_is_found_after_it() {
    let world = World::new();
    let (stays, goes) = (world.define("stays"), world.define("goes"));
    world.until("health is ok", || world.health().hypervisor == Part::Ok && world.health().hostname == "simulated");
    let before = now();
    world.control(json!({ "do": "disconnect", "reason": "the socket closed" }));
    world.until("health is down", || matches!(world.health().hypervisor, Part::Down { .. }));
    let Part::Down { since, detail } = world.health().hypervisor else { panic!("back already") };
    assert!((before..=now()).contains(&since));
    assert_eq!(detail, "the socket closed");

    world.on_domain("start", stays);
    world.on_domain("undefine", goes);
    let made = world.control(json!({ "do": "define", "xml": "<domain><name>comes</name></domain>" }));
    let comes: Uuid = made["uuid"].as_str().unwrap().parse().unwrap();
    assert!(world.reconciler.pass().is_err());
    assert_eq!(world.state(stays).0, State::Stopped);
    assert!(world.instance(goes).is_some() && world.instance(comes).is_none());

    world.control(json!({ "do": "reconnect" }));
    world.is(stays, State::Active);
    world.until("the others came and went", || world.instance(goes).is_none() && world.instance(comes).is_some());
    world.until("health is ok", || world.health().hypervisor == Part::Ok);
}

#[test]
fn passes_find_what_no_event_told() {
    let directory = Arc::new(tempfile::tempdir().unwrap());
    let hypervisor = Arc::new(SimulatedHypervisor::open(&directory.path().join("host")).unwrap());
    let world = World::on(directory, hypervisor, Duration::from_millis(50), false);
    let id = world.define("web");
    // The event's question fails, and nothing else tells.
    world.control(json!({ "do": "fault", "call": "domain", "mode": "fail", "times": 1 }));
    world.on_domain("start", id);
    world.is(id, State::Active);
}

#[test]
fn a_hung_hypervisor_shows_in_health_and_hangs_nobody() {
    let world = World::new();
    let id = world.define("web");
    world.until("health is ok", || world.health().hypervisor == Part::Ok && world.health().hostname == "simulated");
    world.reconciler.set_announcer(Part::Hung { since: 3 });
    let began = Instant::now();
    let before = now();
    world.control(json!({ "do": "hang_all" }));
    world.reconciler.mirror(id);
    world.until("health is hung", || matches!(world.health().hypervisor, Part::Hung { .. }));
    assert!(began.elapsed() >= Duration::from_millis(1400), "{:?}", began.elapsed());
    let Part::Hung { since } = world.health().hypervisor else { panic!("answers already") };
    assert!((before..=now()).contains(&since));
    assert_eq!(world.health().announcer, Part::Hung { since: 3 });

    assert_eq!(world.state(id).0, State::Stopped);
    assert!(world.reconciler.definition(id).unwrap().contains("<name>web</name>"));
    assert!(!world.reconciler.wait_for(id, Duration::from_millis(50), &|domain| domain.is_none()));
    world.lock(id, "");

    world.control(json!({ "do": "release_all" }));
    world.until("health is ok", || world.health().hypervisor == Part::Ok);
    world.until("what waited is done", || world.xml(id).contains("locked_by=\"alice\""));
}

#[test]
fn it_stops_although_the_hypervisor_hangs_and_saves_what_was_shown() {
    let world = World::new();
    let id = world.define("web");
    world.on_domain("start", id);
    world.is(id, State::Active);
    world.control(json!({ "do": "hang_all" }));
    world.until("a call hangs", || !world.control(json!({ "do": "calls" }))["pending"].as_array().unwrap().is_empty());
    let began = Instant::now();
    world.reconciler.stop();
    assert!(began.elapsed() < Duration::from_secs(5));
    let stored = world.store.get(&format!("instances/{id}")).unwrap().unwrap();
    let record: InstanceRecord = serde_json::from_slice(&stored.value).unwrap();
    assert_eq!(record.seen.unwrap().power, PowerState::Running);
}

#[test]
fn a_full_disk_hides_no_state_and_shows_in_health() {
    let world = World::new();
    let id = world.define("web");
    world.until("the store is ok", || world.health().store == Part::Ok);
    world.store.full.store(true, Ordering::Release);
    world.on_domain("start", id);
    world.is(id, State::Active);
    world.until(
        "health says so",
        || matches!(&world.health().store, Part::Down { detail, .. } if detail.contains("full")),
    );
    let made = world.control(json!({ "do": "define", "xml": "<domain><name>new</name></domain>" }));
    let new: Uuid = made["uuid"].as_str().unwrap().parse().unwrap();
    assert!(world.reconciler.pass().is_err());
    assert!(world.instance(new).is_none(), "it has no number yet");

    world.store.full.store(false, Ordering::Release);
    world.reconciler.pass().unwrap();
    world.until("the new one is here", || world.instance(new).is_some());
    world.until("health is ok", || world.health().store == Part::Ok);
    assert_eq!(world.health().directory, Part::Ok);
}
