//! What somebody undefines outside comes back, or stays away for a reason.

use instancefs::hypervisor::{Hypervisor, PowerState};
use instancefs::model::change::InstanceChange;
use instancefs::model::instance::State;
use instancefs::model::record::Departure;
use instancefs::model::task::{Operation, TaskState};
use instancefs::store::{Change, Store};
use serde_json::json;
use uuid::Uuid;

use crate::lab::{Life, World, alice, root, until};

fn undefine(world: &World, id: Uuid) {
    world.control(json!({ "do": "undefine", "uuid": id }));
}

fn lock(life: &Life<'_>, id: Uuid) {
    life.change(&alice(), id, InstanceChange::Locked(true)).unwrap();
    is_mirrored(life, id);
}

fn is_mirrored(life: &Life<'_>, id: Uuid) {
    until("its definition is known and tells of the protection", || {
        life.reconciler.definition(id).is_some_and(|xml| xml.contains("locked="))
    });
}

fn has_definition(life: &Life<'_>, id: Uuid) {
    until("its definition was fetched", || life.instance(id).record.definition.is_some());
}

fn is_missing(life: &Life<'_>, id: Uuid) {
    until("it is seen to be gone", || life.instance(id).domain.is_none());
    let observed = life.instance(id).observed();
    assert_eq!((observed.state, observed.reason.as_str()), (State::Error, "undefined_outside"));
}

fn comes_back(life: &Life<'_>, id: Uuid) {
    until("it is defined again", || {
        let instance = life.instance(id);
        instance.task.is_none() && instance.domain.as_ref().is_some_and(|domain| domain.persistent)
    });
}

fn state_and_reason(life: &Life<'_>, id: Uuid) -> (State, String) {
    let observed = life.instance(id).observed();
    (observed.state, observed.reason)
}

/// Undefines another protected domain, and waits until that one is back: whatever else was to come back is back too.
fn wait_as_long_as_it_takes(life: &Life<'_>) {
    let other = life.stopped();
    lock(life, other);
    undefine(life.world, other);
    until("the other one is gone", || life.instance(other).record.undefined.is_some());
    comes_back(life, other);
}

#[test]
fn a_protected_domain_that_is_undefined_is_back_after_a_moment() {
    let world = World::new();
    let life = world.live();
    for change in [InstanceChange::Locked(true), InstanceChange::DisableTerminate(true)] {
        let id = life.stopped();
        life.change(&alice(), id, InstanceChange::Autostart(true)).unwrap();
        life.change(&alice(), id, change).unwrap();
        is_mirrored(&life, id);
        let before = world.hypervisor.definition(id).unwrap();
        undefine(&world, id);
        is_missing(&life, id);
        comes_back(&life, id);

        assert_eq!(state_and_reason(&life, id), (State::Stopped, "undefined_outside".to_owned()));
        let domain = world.domain(id).unwrap();
        assert_eq!((domain.power, domain.autostart, domain.persistent), (PowerState::ShutOff, false, true));
        let task = life.last_task(id);
        assert_eq!((&task.record.operation, task.record.state), (&Operation::DefineAgain, TaskState::Success));
        assert_eq!((task.record.uid, task.record.login.as_str()), (0, "instancefs"));
        let log = world.directory.path().join("events");
        let entries = || -> Vec<String> {
            let log = std::fs::read_to_string(&log).unwrap();
            let own = |line: &&str| line.contains(&id.to_string()) && line.contains("\"login\":\"instancefs\"");
            log.lines().filter(own).map(str::to_owned).collect()
        };
        until("it is in events", || !entries().is_empty());
        let entries = entries();
        assert!(entries.len() == 1 && entries[0].contains("\"what\":\"defining\""), "{entries:?}");
        until("it is as it was", || world.hypervisor.definition(id).unwrap() == before);
    }
}

#[test]
fn the_reason_lasts_until_something_else_happens() {
    let world = World::new();
    let life = world.live();
    let id = life.stopped();
    life.change(&alice(), id, InstanceChange::DisableTerminate(true)).unwrap();
    has_definition(&life, id);
    undefine(&world, id);
    is_missing(&life, id);
    comes_back(&life, id);
    drop(life);
    let life = world.live();
    life.refresh(id);
    assert_eq!(state_and_reason(&life, id), (State::Stopped, "undefined_outside".to_owned()));
    life.state(id, State::Active).unwrap();
    assert_eq!(state_and_reason(&life, id), (State::Active, "booted".to_owned()));
    world.control(json!({ "do": "stop", "uuid": id }));
    until("it is off", || life.observed(id) == State::Stopped);
    assert_eq!(state_and_reason(&life, id).1, "destroyed");
}

#[test]
fn a_running_guest_that_lost_its_definition_gets_it_back_and_runs_on() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    lock(&life, id);
    let before = world.hypervisor.definition(id).unwrap();
    undefine(&world, id);
    until("its definition is seen to be gone", || life.instance(id).record.undefined.is_some());
    comes_back(&life, id);
    assert_eq!(world.power(id), PowerState::Running);
    assert_eq!((world.calls("start"), world.calls("power_off"), world.calls("shutdown")), (1, 0, 0));
    assert_eq!(state_and_reason(&life, id), (State::Active, "booted".to_owned()));
    assert_eq!(life.instance(id).record.undefined, None);
    until("it is as it was", || world.hypervisor.definition(id).unwrap() == before);
}

#[test]
fn what_moved_to_another_host_is_never_defined_again() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    lock(&life, id);
    world.control(json!({ "do": "migrate", "uuid": id }));
    is_missing(&life, id);
    wait_as_long_as_it_takes(&life);
    assert_eq!(world.domain(id), None);
    let moved = || life.instance(id).record.undefined.map(|undefined| undefined.departure);
    assert_eq!(moved(), Some(Departure::Moved));
    let refusal = life.state(id, State::Stopped).unwrap_err();
    assert!(refusal.to_string().contains("another name or host"), "{refusal}");

    // Whoever knows better says so himself.
    let xml = life.reconciler.definition(id).unwrap();
    world.control(json!({ "do": "define", "xml": &*xml }));
    until("it is there", || life.observed(id) == State::Stopped);
    assert_eq!(moved(), None);
}

#[test]
fn a_guest_that_left_and_is_tidied_up_later_is_not_defined_again_either() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    lock(&life, id);
    // As after a migration without --undefinesource.
    let xml = life.reconciler.definition(id).unwrap();
    world.control(json!({ "do": "migrate", "uuid": id }));
    is_missing(&life, id);
    world.control(json!({ "do": "define", "xml": &*xml }));
    until("it is there", || life.observed(id) == State::Stopped);
    life.ledger
        .transact(|batch| {
            let mut instance = (*batch.instance(id).unwrap()).clone();
            instance.domain.as_mut().unwrap().reason = "migrated".to_owned();
            batch.show(instancefs::inventory::Object::Instance(instance.into()));
        })
        .unwrap();
    undefine(&world, id);
    is_missing(&life, id);
    wait_as_long_as_it_takes(&life);
    assert_eq!(world.domain(id), None);
}

#[test]
fn a_rename_outside_is_no_undefine() {
    let world = World::new();
    let life = world.live();
    let id = life.stopped();
    life.change(&alice(), id, InstanceChange::DisableTerminate(true)).unwrap();
    has_definition(&life, id);
    world.control(json!({ "do": "rename", "uuid": id, "name": "other" }));
    until("it has its name", || life.instance(id).name() == "other");
    wait_as_long_as_it_takes(&life);
    assert_eq!(world.domain(id).unwrap().name, "other");
    assert_eq!(life.inventory.tasks().iter().filter(|task| task.record.object == id).count(), 1, "none but its own");
    // And it is protected under its new name.
    until("its definition has the name", || life.reconciler.definition(id).unwrap().contains("<name>other</name>"));
    undefine(&world, id);
    is_missing(&life, id);
    comes_back(&life, id);
    assert_eq!(world.domain(id).unwrap().name, "other");
}

#[test]
fn a_name_that_another_domain_took_is_left_to_it() {
    let world = World::new();
    let life = world.live();
    let id = life.stopped();
    lock(&life, id);
    let name = life.instance(id).name().to_owned();
    undefine(&world, id);
    let xml = format!("<domain type='qemu'><name>{name}</name></domain>");
    let other = world.control(json!({ "do": "define", "xml": xml }))["uuid"].as_str().unwrap().parse().unwrap();
    is_missing(&life, id);
    until("it says why it stays away", || life.last_error(id).is_some());
    assert!(life.last_error(id).unwrap().contains(&name));
    assert_eq!(world.domain(id), None);
    assert!(world.domain(other).is_some());
    assert_eq!(life.state(id, State::Stopped).unwrap_err().errno(), libc::EEXIST);
}

#[test]
fn one_that_somebody_else_defined_again_is_left_alone() {
    let world = World::new();
    let life = world.live();
    let id = life.stopped();
    lock(&life, id);
    let xml = life.reconciler.definition(id).unwrap().replace("<devices>", "<title>anew</title><devices>");
    undefine(&world, id);
    is_missing(&life, id);
    world.control(json!({ "do": "define", "xml": xml }));
    until("it is back", || life.observed(id) == State::Stopped);
    wait_as_long_as_it_takes(&life);
    assert!(world.hypervisor.definition(id).unwrap().contains("anew"));
    assert_ne!(state_and_reason(&life, id).1, "undefined_outside");
}

#[test]
fn one_that_is_found_missing_waits_to_be_asked_for_however_it_is_locked() {
    let world = World::new();
    let id = {
        let life = world.live();
        let id = life.stopped();
        life.change(&root(), id, InstanceChange::Locked(true)).unwrap();
        has_definition(&life, id);
        id
    };
    undefine(&world, id);
    let life = world.live();
    life.reconciler.pass().unwrap();
    is_missing(&life, id);
    wait_as_long_as_it_takes(&life);
    assert_eq!(world.domain(id), None);
    let refusal = life.state(id, State::Active).unwrap_err();
    assert_eq!(refusal.errno(), libc::EPERM, "{refusal}");
    life.state(id, State::Stopped).unwrap();
    assert_eq!(state_and_reason(&life, id), (State::Stopped, "undefined_outside".to_owned()));
}

#[test]
fn an_unprotected_one_with_our_disks_waits_to_be_asked_for() {
    let world = World::new();
    let life = world.live();
    let id = life.stopped();
    has_definition(&life, id);
    undefine(&world, id);
    is_missing(&life, id);
    wait_as_long_as_it_takes(&life);
    assert_eq!(world.domain(id), None);
    let refusal = life.state(id, State::Active).unwrap_err().to_string();
    assert!(refusal.contains("stopped"), "{refusal}");
    life.state(id, State::Stopped).unwrap();
    assert!(world.domain(id).is_some());
    life.state(id, State::Active).unwrap();
}

#[test]
fn saved_memory_that_went_with_the_definition_is_told_of() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    life.change(&alice(), id, InstanceChange::DisableTerminate(true)).unwrap();
    has_definition(&life, id);
    life.state(id, State::Suspended).unwrap();
    undefine(&world, id);
    is_missing(&life, id);
    comes_back(&life, id);
    assert_eq!(life.observed(id), State::Stopped);
    assert!(life.last_error(id).unwrap().contains("saved memory"));
}

#[test]
fn without_a_definition_it_says_so() {
    let world = World::new();
    let life = world.live();
    let id = life.stopped();
    has_definition(&life, id);
    undefine(&world, id);
    is_missing(&life, id);
    world.store.transact(&[], &[Change::Delete(format!("definitions/{id}"))]).unwrap();
    let refusal = life.state(id, State::Stopped).unwrap_err();
    assert_eq!(refusal.errno(), libc::ENOENT);
    assert!(life.last_error(id).unwrap().contains("no definition"), "{refusal}");
}
