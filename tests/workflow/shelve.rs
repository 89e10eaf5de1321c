use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use instancefs::block::{BlockBackend, DiskRole};
use instancefs::hypervisor::{Hypervisor, PowerState};
use instancefs::model::change::InstanceChange;
use instancefs::model::instance::{State, Word};
use instancefs::model::record::ShelfStage;
use instancefs::model::task::TaskState;
use instancefs::workflow::request::{Request, Wait};
use serde_json::json;
use uuid::Uuid;

use crate::lab::{Life, World, alice, root, until};

/// The bytes of an instance's disks, by role.
fn disks(life: &Life<'_>, id: Uuid) -> Vec<Vec<u8>> {
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

/// Makes a disk so large that its copy can be watched.
fn enlarge(life: &Life<'_>, id: Uuid, bytes: u64) {
    let path = life.world.disks.path(&life.instance(id).record.disks[0]);
    File::options().write(true).open(path).unwrap().set_len(bytes).unwrap();
}

/// Asks as root, and does not wait for the end.
fn ask(life: &Life<'_>, id: Uuid, change: InstanceChange) {
    let answered = life.submit(&root(), Request::Instance { id, changes: vec![change] }, Wait::Accepted);
    answered.recv().unwrap().unwrap();
}

fn begin_copying(life: &Life<'_>, id: Uuid, state: State) {
    ask(life, id, InstanceChange::State(Word::State(state)));
    until("it copies", || life.instance(id).task.as_ref().is_some_and(|task| task.progress > 0));
}

/// Running as before, and nothing on the shelf.
fn is_as_before(life: &Life<'_>, id: Uuid, bytes: &[Vec<u8>]) {
    assert_eq!((life.observed(id), life.world.power(id)), (State::Active, PowerState::Running));
    assert_eq!((disks(life, id), life.world.shelf()), (bytes.to_vec(), Vec::<PathBuf>::new()));
    assert!(life.world.domain(id).unwrap().autostart);
    assert_eq!(life.instance(id).record.shelf, None);
}

/// A running guest that is started with the host.
fn running(life: &Life<'_>) -> (Uuid, Vec<Vec<u8>>) {
    let id = life.active();
    life.change(&alice(), id, InstanceChange::Autostart(true)).unwrap();
    (id, disks(life, id))
}

#[test]
fn a_copy_that_cannot_be_made_leaves_the_guest_running() {
    let world = World::new();
    let life = world.live();
    let (id, bytes) = running(&life);
    fs::write(world.directory.path().join("shelf"), "in the way").unwrap();
    life.state(id, State::ShelvedOffloaded).unwrap_err();
    is_as_before(&life, id, &bytes);
    fs::remove_file(world.directory.path().join("shelf")).unwrap();
    *world.disks.open_fails.lock() = Some(DiskRole::Root);
    life.state(id, State::ShelvedOffloaded).unwrap_err();
    is_as_before(&life, id, &bytes);
}

#[test]
fn a_guest_that_somebody_else_stopped_is_not_started_by_a_failure() {
    let world = World::new();
    let life = world.live();
    let (id, _) = running(&life);
    life.change(&alice(), id, InstanceChange::StopTimeoutSeconds(600)).unwrap();
    world.control(json!({ "do": "fault", "call": "set_autostart", "mode": "fail", "message": "no", "times": 1 }));
    life.state(id, State::Shelved).unwrap_err();
    is_as_before(&life, id, &disks(&life, id));
    world.control(json!({ "do": "fault", "call": "set_autostart", "mode": "hang", "times": 1 }));
    let answered = life.begin(id, State::Shelved);
    until("it hangs", || world.is_pending("set_autostart"));
    world.hypervisor.power_off(id).unwrap();
    *world.disks.open_fails.lock() = Some(DiskRole::Root);
    world.control(json!({ "do": "release" }));
    answered.recv().unwrap().unwrap_err();
    assert_eq!(life.observed(id), State::Stopped);
    assert!(world.domain(id).unwrap().autostart);
}

#[test]
fn a_lock_during_the_shelving_stops_the_removal_of_the_disks() {
    let world = World::new();
    let life = world.live();
    let (id, bytes) = running(&life);
    // What is asked right before a removal.
    world.control(json!({ "do": "fault", "call": "domains", "mode": "hang", "times": 1 }));
    let answered = life.begin(id, State::ShelvedOffloaded);
    until("it hangs", || world.is_pending("domains"));
    life.change(&root(), id, InstanceChange::Locked(true)).unwrap();
    world.control(json!({ "do": "release" }));
    assert_eq!(answered.recv().unwrap().unwrap_err().errno(), libc::EPERM);
    assert_eq!((life.observed(id), disks(&life, id), world.shelf().len()), (State::Shelved, bytes, 1));
    assert!(life.last_error(id).unwrap().contains("locked"));
    assert_eq!(life.state(id, State::Active).unwrap_err().errno(), libc::EPERM);
}

#[test]
fn a_cancelled_shelving_ends_at_once_and_the_guest_runs_again() {
    let world = World::new();
    let life = world.live();
    let (id, _) = running(&life);
    enlarge(&life, id, 64 << 30);
    begin_copying(&life, id, State::Shelved);
    life.change(&root(), id, InstanceChange::ResetState).unwrap();
    life.wait_idle(id);
    assert_eq!((life.observed(id), world.shelf().len()), (State::Active, 0));
    assert_eq!(life.last_task(id).record.state, TaskState::Cancelled);
    assert!(world.domain(id).unwrap().autostart);
}

#[test]
fn a_shelving_cancelled_while_its_guest_shuts_down_starts_the_guest_again() {
    let world = World::new();
    let life = world.live();
    let (id, bytes) = running(&life);
    world.control(json!({ "do": "guest", "uuid": id, "acpi_delay_ms": 700 }));
    let (asked, started) = (world.calls("shutdown"), world.calls("start"));
    let _answer = life.begin(id, State::Shelved);
    until("the guest is asked to shut down", || world.calls("shutdown") > asked);
    assert_eq!(world.power(id), PowerState::Running, "it takes its time");
    life.change(&root(), id, InstanceChange::ResetState).unwrap();
    life.wait_idle(id);
    assert_eq!(life.last_task(id).record.state, TaskState::Cancelled);
    assert_eq!(world.calls("start"), started + 1, "what was asked of it could not be taken back");
    assert_eq!((world.power(id), life.observed(id)), (PowerState::Running, State::Active));
    assert_eq!((disks(&life, id), world.shelf().len()), (bytes, 0));
    assert!(world.domain(id).unwrap().autostart);
}

#[test]
fn an_engine_that_ends_during_the_copy_goes_on_at_its_next_start() {
    let world = World::new();
    let id = {
        let life = world.live();
        let (id, _) = running(&life);
        enlarge(&life, id, 64 << 30);
        begin_copying(&life, id, State::ShelvedOffloaded);
        id
    };
    let [(reference, _)] = &world.disks.disks.lock().clone().into_iter().collect::<Vec<_>>()[..] else {
        panic!("it is not done, so there is a disk");
    };
    // So that it does not take long.
    File::options().write(true).open(world.disks.file(reference)).unwrap().set_len(100).unwrap();
    let life = world.live();
    life.wait_idle(id);
    assert_eq!((life.observed(id), world.disk_count(), world.shelf().len()), (State::ShelvedOffloaded, 0, 1));
}

#[test]
fn holes_stay_holes_in_a_copy_that_only_its_owner_reads() {
    let world = World::new();
    let life = world.live();
    let id = life.stopped();
    enlarge(&life, id, 256 << 20);
    life.state(id, State::Shelved).unwrap();
    let copy = world.shelf().remove(0);
    let metadata = fs::metadata(&copy).unwrap();
    assert_eq!((metadata.len(), metadata.permissions().mode() & 0o777), (256 << 20, 0o600));
    let allocated = std::os::unix::fs::MetadataExt::blocks(&metadata) * 512;
    assert!(allocated <= 64 << 10, "{allocated} bytes are allocated");
    assert_eq!(fs::read(&copy).unwrap(), disks(&life, id)[0]);
}

#[test]
fn a_damaged_copy_is_noticed_before_a_disk_is_removed_and_before_one_is_made() {
    let world = World::new();
    let life = world.live();
    let id = life.stopped();
    life.state(id, State::Shelved).unwrap();
    let copy = world.shelf().remove(0);
    let bytes = fs::read(&copy).unwrap();
    let mut damaged = bytes.clone();
    damaged[0] ^= 1;
    fs::write(&copy, &damaged).unwrap();
    assert_eq!(life.state(id, State::ShelvedOffloaded).unwrap_err().errno(), libc::EBADMSG);
    assert_eq!((life.observed(id), world.disk_count()), (State::Shelved, 1));
    fs::write(&copy, &bytes).unwrap();
    life.state(id, State::ShelvedOffloaded).unwrap();

    for damaged in [damaged, bytes[1..].to_vec()] {
        fs::write(&copy, &damaged).unwrap();
        assert_eq!(life.state(id, State::Active).unwrap_err().errno(), libc::EBADMSG);
        assert_eq!((life.observed(id), world.disk_count()), (State::ShelvedOffloaded, 0));
        assert_eq!(fs::read(&copy).unwrap(), damaged, "the copy is evidence");
    }
    fs::write(&copy, &bytes).unwrap();
    life.state(id, State::Active).unwrap();
    assert_eq!(disks(&life, id), [bytes]);
}

#[test]
fn a_missing_copy_is_said_and_the_instance_stays_where_it_is() {
    let world = World::new();
    let life = world.live();
    let id = life.stopped();
    life.state(id, State::ShelvedOffloaded).unwrap();
    let copy = world.shelf().remove(0);
    let aside = world.directory.path().join("aside");
    fs::rename(&copy, &aside).unwrap();
    assert_eq!(life.state(id, State::Active).unwrap_err().errno(), libc::ENOENT);
    assert_eq!(life.observed(id), State::ShelvedOffloaded);
    fs::write(&copy, "another file").unwrap();
    life.state(id, State::Active).unwrap_err();
    assert_eq!((life.observed(id), fs::read(&copy).unwrap()), (State::ShelvedOffloaded, b"another file".to_vec()));
    fs::rename(&aside, &copy).unwrap();
    life.state(id, State::Active).unwrap();
}

#[test]
fn a_disk_that_changed_since_it_was_copied_is_copied_anew_before_it_is_removed() {
    let world = World::new();
    let life = world.live();
    let id = life.stopped();
    life.state(id, State::Shelved).unwrap();
    let first = world.shelf();
    let disk = world.disks.path(&life.instance(id).record.disks[0]);
    fs::write(disk, "what the guest wrote when somebody ran it").unwrap();
    life.state(id, State::ShelvedOffloaded).unwrap();
    assert_eq!((life.observed(id), world.disk_count()), (State::ShelvedOffloaded, 0));
    assert!(world.shelf().len() == 1 && world.shelf() != first, "the old copy has gone");
    life.state(id, State::Stopped).unwrap();
    assert_eq!(disks(&life, id), [b"what the guest wrote when somebody ran it".to_vec()]);
}

#[test]
fn a_full_disk_at_the_return_leaves_no_disk_and_the_copies() {
    let world = World::new();
    let life = world.live();
    let id = life.stopped();
    life.state(id, State::ShelvedOffloaded).unwrap();
    *world.disks.create_fails.lock() = Some("the disks' place".to_owned());
    assert_eq!(life.state(id, State::Active).unwrap_err().errno(), libc::ENOSPC);
    assert_eq!((life.observed(id), world.disk_count(), world.shelf().len()), (State::ShelvedOffloaded, 0, 1));
}

#[test]
fn paused_and_suspended_guests_cannot_be_shelved() {
    let world = World::new();
    let life = world.live();
    for state in [State::Paused, State::Suspended] {
        let id = life.active();
        life.state(id, state).unwrap();
        assert_eq!(life.state(id, State::Shelved).unwrap_err().errno(), libc::EINVAL);
        assert_eq!((life.observed(id), world.shelf().len()), (state, 0));
    }
}

#[test]
fn a_second_shelving_replaces_the_copies_of_the_first() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    life.state(id, State::Shelved).unwrap();
    let first = world.shelf();
    life.state(id, State::Active).unwrap();
    life.state(id, State::Shelved).unwrap();
    let second = world.shelf();
    assert!(second.len() == 1 && second != first);
}

#[test]
fn what_is_deleted_for_good_leaves_nothing_on_the_shelf() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    life.state(id, State::ShelvedOffloaded).unwrap();
    life.state(id, State::SoftDeleted).unwrap();
    assert_eq!(world.shelf().len(), 1, "the bin keeps it");
    life.change(&alice(), id, InstanceChange::State(Word::Deleted)).unwrap();
    assert!(life.inventory.instance(id).is_none());
    assert_eq!(world.shelf().len(), 0);
    assert!(!world.directory.path().join("shelf").join(id.to_string()).exists());
}

#[test]
fn an_offloaded_instance_comes_back_from_the_bin_with_its_disks() {
    let world = World::new();
    let life = world.live();
    let (id, bytes) = running(&life);
    life.state(id, State::ShelvedOffloaded).unwrap();
    life.state(id, State::SoftDeleted).unwrap();
    life.state(id, State::Active).unwrap();
    assert_eq!((life.observed(id), disks(&life, id)), (State::Active, bytes));
    assert!(world.domain(id).unwrap().autostart);
}

#[test]
fn disks_are_removed_at_once_where_that_is_configured() {
    let world = World::new();
    let life = world.live_on(world.store.clone(), |settings| settings.shelved_offload_time = Some(Duration::ZERO));
    let id = life.active();
    life.state(id, State::Shelved).unwrap();
    assert_eq!((life.observed(id), world.disk_count()), (State::ShelvedOffloaded, 0));
}

#[test]
fn only_so_many_copy_at_once_and_who_waits_says_so() {
    let world = World::new();
    let life = world.live_on(world.store.clone(), |settings| settings.copies_at_once = 1);
    let (first, second) = (life.stopped(), life.stopped());
    enlarge(&life, first, 64 << 30);
    begin_copying(&life, first, State::Shelved);
    ask(&life, second, InstanceChange::State(Word::State(State::Shelved)));
    let waits = || life.last_task(second).record.steps.last().is_some_and(|step| step.name == "waiting");
    until("the other waits", waits);
    ask(&life, first, InstanceChange::ResetState);
    until("its turn has come", || life.observed(second) == State::Shelved);
}

#[test]
fn the_copies_go_when_the_guest_has_run_for_a_while() {
    let world = World::new();
    let life = world.live_on(world.store.clone(), |settings| settings.shelf_grace = Duration::ZERO);
    let id = life.active();
    life.state(id, State::ShelvedOffloaded).unwrap();
    life.state(id, State::Stopped).unwrap();
    life.engine.keep();
    life.state(id, State::Active).unwrap();
    until("they go", || world.shelf().is_empty() && life.instance(id).record.shelf.is_none());
    assert_eq!((life.observed(id), world.disk_count()), (State::Active, 1));
}

#[test]
fn the_copies_of_a_guest_that_never_ran_or_crashed_stay_and_those_of_one_that_shut_down_go() {
    let world = World::new();
    let life = world.live();
    let [stopped, crashed, done] = [(); 3].map(|()| {
        let id = life.active();
        life.state(id, State::ShelvedOffloaded).unwrap();
        id
    });
    life.state(stopped, State::Stopped).unwrap();
    for id in [crashed, done] {
        life.state(id, State::Active).unwrap();
    }
    world.control(json!({ "do": "crash", "uuid": crashed }));
    until("the crash is seen", || life.observed(crashed) == State::Error);
    life.state(done, State::Stopped).unwrap();
    life.engine.keep();
    until("what is done with goes", || life.instance(done).record.shelf.is_none());
    life.engine.keep();
    assert_eq!(world.shelf().len(), 2);
    assert!([stopped, crashed].iter().all(|id| stage(&life, *id) == Some(ShelfStage::Left)));
}

#[test]
fn a_locked_instance_keeps_its_copies_and_its_disks() {
    let world = World::new();
    let life = world.live_on(world.store.clone(), |settings| {
        settings.shelf_grace = Duration::ZERO;
        settings.shelved_offload_time = Some(Duration::from_secs(3600));
    });
    let (back, shelved, other) = (life.active(), life.active(), life.active());
    for id in [back, shelved, other] {
        life.state(id, State::Shelved).unwrap();
    }
    for id in [back, shelved] {
        life.change(&alice(), id, InstanceChange::Locked(true)).unwrap();
    }
    // Started from outside, so that the lock is there before it is back.
    world.control(json!({ "do": "start", "uuid": back }));
    until("it is back", || stage(&life, back) == Some(ShelfStage::Left));
    drop(life);
    let life = world.live_on(world.store.clone(), |settings| {
        settings.shelf_grace = Duration::ZERO;
        settings.shelved_offload_time = Some(Duration::from_secs(1));
    });
    until("the one that is not locked is offloaded", || life.observed(other) == State::ShelvedOffloaded);
    life.engine.keep();
    assert_eq!((life.observed(shelved), world.shelf().len(), world.disk_count()), (State::Shelved, 3, 2));
    for id in [back, shelved] {
        life.change(&alice(), id, InstanceChange::Locked(false)).unwrap();
    }
    life.engine.keep();
    until("both are looked after", || {
        life.engine.keep();
        life.observed(shelved) == State::ShelvedOffloaded && life.instance(back).record.shelf.is_none()
    });
    assert_eq!((world.shelf().len(), world.disk_count()), (2, 1));
}
