use std::fs;

use instancefs::hypervisor::{Hypervisor, PowerState};
use instancefs::model::change::InstanceChange;
use instancefs::model::instance::State;
use instancefs::model::record::ShelfStage;
use instancefs::model::task::TaskState;
use serde_json::json;
use uuid::Uuid;

use crate::lab::{Life, World, alice, until};

/// The bytes of an instance's disks, by role.
fn disks(life: &Life<'_>, id: Uuid) -> Vec<Vec<u8>> {
    use instancefs::block::BlockBackend;
    let disks = &life.instance(id).record.disks;
    disks.iter().map(|disk| fs::read(life.world.disks.path(disk)).unwrap()).collect()
}

fn stage(life: &Life<'_>, id: Uuid) -> Option<ShelfStage> {
    life.instance(id).record.shelf.as_ref().map(|shelf| shelf.stage)
}

#[test]
fn a_guest_goes_to_the_shelf_loses_its_disks_and_comes_back_with_every_byte() {
    let world = World::new();
    let life = world.live();
    let id = life.draft_with_image();
    life.tell(id, "#cloud-config");
    life.change(&alice(), id, InstanceChange::Autostart(true)).unwrap();
    life.state(id, State::Active).unwrap();
    let bytes = disks(&life, id);
    assert_eq!(bytes.len(), 2);

    life.state(id, State::Shelved).unwrap();
    assert_eq!((life.observed(id), world.power(id)), (State::Shelved, PowerState::ShutOff));
    assert_eq!((world.shelf().len(), world.disk_count()), (2, 2));
    assert!(!world.domain(id).unwrap().autostart, "the host would start it");
    assert_eq!(life.last_task(id).record.state, TaskState::Success);

    life.state(id, State::ShelvedOffloaded).unwrap();
    assert_eq!((life.observed(id), stage(&life, id)), (State::ShelvedOffloaded, Some(ShelfStage::Offloaded)));
    assert_eq!((world.shelf().len(), world.disk_count()), (2, 0));
    assert!(world.domain(id).is_some(), "its definition stays");
    life.state(id, State::Shelved).unwrap();
    assert_eq!(life.observed(id), State::ShelvedOffloaded, "that is shelved enough");

    life.state(id, State::Active).unwrap();
    assert_eq!((life.observed(id), stage(&life, id)), (State::Active, Some(ShelfStage::Left)));
    assert_eq!(disks(&life, id), bytes);
    assert!(world.domain(id).unwrap().autostart);
    assert_eq!(world.shelf().len(), 2, "the copies stay until the guest has run for a while");
    assert_eq!(life.last_error(id), None);
}

#[test]
fn a_shelved_instance_comes_back_stopped_without_a_byte_being_copied() {
    let world = World::new();
    let life = world.live();
    let id = life.stopped();
    life.state(id, State::Shelved).unwrap();
    let before = life.instance(id).record.disks.clone();
    life.state(id, State::Stopped).unwrap();
    assert_eq!((life.observed(id), world.calls("start")), (State::Stopped, 0));
    assert_eq!(life.instance(id).record.disks, before);
}

#[test]
fn a_start_that_fails_after_the_return_keeps_disks_and_copies() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    let bytes = disks(&life, id);
    life.state(id, State::ShelvedOffloaded).unwrap();
    world.fail("start");
    life.state(id, State::Active).unwrap_err();
    assert_eq!((life.observed(id), stage(&life, id)), (State::Stopped, Some(ShelfStage::Left)));
    assert_eq!((disks(&life, id), world.shelf().len()), (bytes, 1));
    assert!(life.last_error(id).is_some());
    life.state(id, State::Active).unwrap();
    assert_eq!(life.observed(id), State::Active);
}

#[test]
fn a_start_from_outside_counts_as_the_return() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    life.state(id, State::Shelved).unwrap();
    world.control(json!({ "do": "start", "uuid": id }));
    until("it is seen", || life.observed(id) == State::Active);
    assert_eq!(stage(&life, id), Some(ShelfStage::Left));
    world.hypervisor.power_off(id).unwrap();
    until("its end is seen", || life.observed(id) == State::Stopped);
}
