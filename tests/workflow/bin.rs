use std::fs::File;
use std::process::Command;
use std::sync::Arc;

use instancefs::block::BlockBackend;
use instancefs::block::directory::DirectoryBackend;
use instancefs::hypervisor::{Hypervisor, PowerState};
use instancefs::model::change::{ImageChange, InstanceChange};
use instancefs::model::image;
use instancefs::model::instance::{State, Word};
use instancefs::model::reason::Reason;
use instancefs::model::task::TaskState;
use instancefs::workflow::request::{Request, Wait};
use parking_lot::Mutex;
use serde_json::json;
use uuid::Uuid;

use crate::image::{filled, qcow2};
use crate::lab::{DEADLINE, Life, World, alice, root, until};
use crate::requests::Full;

const DELETED: InstanceChange = InstanceChange::State(Word::Deleted);

pub fn delete(life: &Life<'_>, id: Uuid) -> Result<(), Reason> {
    life.change(&alice(), id, DELETED)
}

fn restore(life: &Life<'_>, id: Uuid) -> Result<(), Reason> {
    life.change(&alice(), id, InstanceChange::Restore)
}

/// In the bin, and at rest.
pub fn binned(life: &Life<'_>, id: Uuid) -> Uuid {
    life.state(id, State::SoftDeleted).unwrap();
    life.wait_idle(id);
    assert!(life.instance(id).record.bin.as_ref().unwrap().is_settled);
    id
}

fn autostart(life: &Life<'_>, id: Uuid) -> bool {
    life.world.domain(id).unwrap().autostart
}

/// The last entry of this kind in `events`.
fn event(life: &Life<'_>, id: Uuid, what: &str) -> Option<serde_json::Value> {
    life.events.flush();
    let text = std::fs::read_to_string(life.world.directory.path().join("events")).unwrap();
    let mut entries = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    entries.rfind(|entry| entry["uuid"] == json!(id) && entry["what"] == what)
}

/// A domain that somebody else defined, on a disk of his.
pub fn foreign(world: &World, life: &Life<'_>, name: &str, disk: &str) -> Uuid {
    let xml = format!(
        "<domain type='kvm'><name>{name}</name><memory>1024</memory><vcpu>1</vcpu><os><type>hvm</type></os>\
         <devices><disk type='file' device='disk'><source file='{disk}'/><target dev='vda'/></disk></devices></domain>"
    );
    let id = world.control(json!({ "do": "define", "xml": xml }))["uuid"].as_str().unwrap().parse().unwrap();
    life.refresh(id);
    id
}

#[test]
fn a_running_guest_is_shut_down_in_the_bin_and_comes_back_as_it_was() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    life.change(&alice(), id, InstanceChange::Autostart(true)).unwrap();
    binned(&life, id);
    let instance = life.instance(id);
    assert_eq!((instance.observed().state, world.power(id)), (State::SoftDeleted, PowerState::ShutOff));
    assert_eq!((world.calls("shutdown"), world.calls("power_off")), (1, 0));
    assert_eq!(instance.record.bin.as_ref().unwrap().entry.deleted_by, "alice");
    assert!(!autostart(&life, id), "it would start with the host");
    restore(&life, id).unwrap();
    assert_eq!((life.observed(id), world.power(id)), (State::Active, PowerState::Running));
    assert!(autostart(&life, id));
    assert_eq!(world.disk_count(), 1);
}

#[test]
fn it_is_in_the_bin_before_its_guest_is_off_and_stays_there_whatever_becomes_of_that() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    world.control(json!({ "do": "fault", "call": "shutdown", "mode": "hang", "times": 1 }));
    let changes = vec![InstanceChange::State(Word::State(State::SoftDeleted))];
    let moved = life.submit(&alice(), Request::Instance { id, changes }, Wait::Accepted);
    moved.recv_timeout(DEADLINE).unwrap().unwrap();
    assert_eq!(life.observed(id), State::SoftDeleted);
    until("shutdown hangs", || world.is_pending("shutdown"));
    assert!(matches!(restore(&life, id), Err(Reason::Busy { task: "soft_deleting" })));
    life.change(&alice(), id, InstanceChange::Locked(true)).unwrap();
    world.control(json!({ "do": "release", "call": "shutdown" }));
    life.wait_idle(id);
    assert_eq!(life.last_task(id).record.state, TaskState::Failure);
    assert!(life.last_error(id).unwrap().contains("locked"));
    let instance = life.instance(id);
    assert_eq!(instance.observed().state, State::SoftDeleted);
    assert!(!instance.record.bin.as_ref().unwrap().is_settled);
    assert_eq!(world.calls("power_off"), 0);
}

#[test]
fn a_guest_that_ignores_acpi_is_powered_off_in_the_bin_after_its_timeout() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    world.control(json!({ "do": "guest", "uuid": id, "ignores_acpi": true }));
    life.change(&alice(), id, InstanceChange::StopTimeoutSeconds(1)).unwrap();
    binned(&life, id);
    assert_eq!((world.power(id), world.calls("power_off")), (PowerState::ShutOff, 1));
}

#[test]
fn a_paused_guest_is_woken_to_hear_that_it_is_to_shut_down() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    life.state(id, State::Paused).unwrap();
    binned(&life, id);
    assert_eq!((world.power(id), world.calls("power_off")), (PowerState::ShutOff, 0));
    restore(&life, id).unwrap();
    assert_eq!(life.observed(id), State::Active);
}

#[test]
fn saved_memory_survives_the_bin_and_is_not_thrown_away_by_stopped() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    life.state(id, State::Suspended).unwrap();
    binned(&life, id);
    assert!(world.domain(id).unwrap().has_managed_save);
    let refused = life.state(id, State::Stopped).unwrap_err();
    assert_eq!(refused.errno(), libc::EINVAL);
    restore(&life, id).unwrap();
    assert_eq!(life.observed(id), State::Suspended);
    binned(&life, id);
    life.state(id, State::Active).unwrap();
    let list = world.control(json!({ "do": "list" }));
    assert_eq!(list["guests"][0]["boots"], 1, "it was resumed, not booted");
}

#[test]
fn a_stopped_instance_comes_back_stopped_or_as_the_word_says() {
    let world = World::new();
    let life = world.live();
    let id = binned(&life, life.stopped());
    restore(&life, id).unwrap();
    assert_eq!(life.observed(id), State::Stopped);
    binned(&life, id);
    life.state(id, State::Active).unwrap();
    assert_eq!((life.observed(id), world.power(id)), (State::Active, PowerState::Running));
    binned(&life, id);
    life.state(id, State::Stopped).unwrap();
    assert_eq!(life.observed(id), State::Stopped);
    assert_eq!(restore(&life, id).unwrap_err().errno(), libc::EPERM);
}

#[test]
fn a_start_that_fails_during_restore_takes_no_disk_and_leaves_it_out_of_the_bin() {
    let world = World::new();
    let life = world.live();
    let id = binned(&life, life.active());
    let disks = world.disks.disks.lock().clone();
    world.fail("start");
    restore(&life, id).unwrap_err();
    assert_eq!((life.observed(id), life.instance(id).record.bin.clone()), (State::Stopped, None));
    assert_eq!(*world.disks.disks.lock(), disks, "a failed start took a disk");
    assert!(world.domain(id).is_some());
    assert!(life.last_error(id).unwrap().contains("a test says no"));
    life.state(id, State::Active).unwrap();
}

#[test]
fn a_locked_instance_refuses_root_every_way_into_the_bin_and_out_of_it() {
    let world = World::new();
    let life = world.live();
    let (outside, inside) = (life.stopped(), binned(&life, life.stopped()));
    for id in [outside, inside] {
        life.change(&alice(), id, InstanceChange::Locked(true)).unwrap();
    }
    let word = |state| InstanceChange::State(Word::State(state));
    let refused = |id, change| match life.change(&root(), id, change) {
        Err(Reason::Locked(_)) => {}
        other => panic!("{other:?}"),
    };
    refused(outside, word(State::SoftDeleted));
    refused(outside, DELETED);
    for change in [
        DELETED,
        InstanceChange::Restore,
        word(State::Active),
        word(State::Stopped),
        InstanceChange::ExpiresAt(Some(1)),
    ] {
        refused(inside, change);
    }
    assert_eq!((life.observed(outside), life.observed(inside)), (State::Stopped, State::SoftDeleted));
    assert_eq!(world.disk_count(), 2);
}

#[test]
fn disable_terminate_refuses_the_bin_and_deletion_but_not_restore() {
    let world = World::new();
    let life = world.live();
    let (outside, inside) = (life.stopped(), binned(&life, life.stopped()));
    for id in [outside, inside] {
        life.change(&alice(), id, InstanceChange::DisableTerminate(true)).unwrap();
    }
    assert_eq!(life.state(outside, State::SoftDeleted), Err(Reason::TerminateDisabled));
    assert_eq!(delete(&life, inside), Err(Reason::TerminateDisabled));
    assert_eq!(world.disk_count(), 2);
    restore(&life, inside).unwrap();
}

#[test]
fn only_what_is_in_the_bin_is_deleted_for_good_with_exactly_what_was_made_for_it() {
    let world = World::new();
    let life = world.live();
    let other = life.stopped();
    let id = life.draft_with_image();
    life.tell(id, "#cloud-config");
    life.state(id, State::Active).unwrap();
    assert_eq!((delete(&life, id), world.disk_count()), (Err(Reason::NotInBin), 3));
    binned(&life, id);
    let log = life.engine.console_path(id);
    for name in [log.clone(), log.with_extension("log.0"), life.engine.console_path(other)] {
        std::fs::write(name, "boot").unwrap();
    }
    delete(&life, id).unwrap();
    assert_eq!((life.inventory.instance(id), world.domain(id), world.disk_count()), (None, None, 1));
    assert!(!log.exists() && !log.with_extension("log.0").exists() && life.engine.console_path(other).exists());
    for key in ["instances", "definitions", "mirrors"] {
        assert_eq!(instancefs::store::Store::get(&*world.store, &format!("{key}/{id}")).unwrap(), None, "{key}");
    }
    assert_eq!(event(&life, id, "kept"), None);
    assert_eq!(life.observed(other), State::Stopped);
}

#[test]
fn a_disk_that_instancefs_did_not_make_is_kept_and_named() {
    let world = World::new();
    let life = world.live();
    let disk = world.directory.path().join("theirs.qcow2");
    std::fs::write(&disk, "data").unwrap();
    let id = foreign(&world, &life, "theirs", disk.to_str().unwrap());
    life.change(&root(), id, InstanceChange::State(Word::State(State::SoftDeleted))).unwrap();
    life.change(&root(), id, DELETED).unwrap();
    assert_eq!((life.inventory.instance(id), world.domain(id)), (None, None));
    assert_eq!(std::fs::read(&disk).unwrap(), b"data");
    assert_eq!(event(&life, id, "kept").unwrap()["to"], disk.to_str().unwrap());
}

#[test]
fn a_lock_in_the_middle_of_a_deletion_stops_it_and_the_rest_stays_in_the_bin() {
    let world = World::new();
    let life = world.live();
    let id = binned(&life, life.active());
    world.control(json!({ "do": "fault", "call": "undefine", "mode": "hang", "times": 1 }));
    let changes = vec![DELETED];
    let deleting = life.submit(&alice(), Request::Instance { id, changes }, Wait::Settle);
    until("undefine hangs", || world.is_pending("undefine"));
    life.change(&alice(), id, InstanceChange::Locked(true)).unwrap();
    world.control(json!({ "do": "release", "call": "undefine" }));
    assert!(matches!(deleting.recv_timeout(DEADLINE).unwrap(), Err(Reason::Locked(_))));
    assert_eq!((life.observed(id), world.disk_count()), (State::SoftDeleted, 1));
    life.change(&alice(), id, InstanceChange::Locked(false)).unwrap();
    delete(&life, id).unwrap();
    assert_eq!((life.inventory.instance(id), world.disk_count()), (None, 0));
}

#[test]
fn a_machine_that_was_started_behind_our_back_stays_in_the_bin_and_is_not_deleted() {
    let world = World::new();
    let life = world.live();
    let id = binned(&life, life.stopped());
    world.control(json!({ "do": "start", "uuid": id }));
    until("it is seen", || life.instance(id).observed().reason == "running");
    assert_eq!(life.observed(id), State::SoftDeleted);
    assert!(event(&life, id, "started").is_some());
    let refused = delete(&life, id).unwrap_err();
    assert_eq!((refused.errno(), world.disk_count()), (libc::EBUSY, 1));
    assert!(refused.to_string().contains("it runs"), "{refused}");
    life.state(id, State::Active).unwrap();
    assert_eq!(world.calls("start"), 0, "it was let run");
}

#[test]
fn what_was_undefined_outside_can_go_to_the_bin_and_does_not_vanish_there() {
    let world = World::new();
    let life = world.live();
    let (ours, theirs) = (life.stopped(), foreign(&world, &life, "theirs", "/nowhere/theirs"));
    world.hypervisor.undefine(ours).unwrap();
    until("it is seen", || life.observed(ours) == State::Error);
    binned(&life, ours);
    life.change(&root(), theirs, InstanceChange::State(Word::State(State::SoftDeleted))).unwrap();
    world.hypervisor.undefine(theirs).unwrap();
    until("it is seen", || life.instance(theirs).domain.is_none());
    life.reconciler.pass().unwrap();
    assert_eq!(life.observed(theirs), State::SoftDeleted);
    restore(&life, ours).unwrap();
    assert_eq!(life.observed(ours), State::Error);
    binned(&life, ours);
    delete(&life, ours).unwrap();
    assert_eq!((life.inventory.instance(ours), world.disk_count()), (None, 0));
}

#[test]
fn what_was_undefined_in_the_bin_is_defined_again_by_the_word_that_takes_it_out() {
    let world = World::new();
    let life = world.live();
    let (off, on) = (binned(&life, life.stopped()), binned(&life, life.active()));
    for (id, state) in [(off, State::Stopped), (on, State::Active)] {
        life.reconciler.refresh(id).unwrap();
        until("its definition was seen", || life.instance(id).record.definition.is_some());
        world.hypervisor.undefine(id).unwrap();
        until("it is seen", || life.instance(id).domain.is_none());
        life.state(id, state).unwrap();
        assert_eq!((life.observed(id), life.last_error(id)), (state, None));
    }
    assert_eq!(world.disk_count(), 2);
}

#[test]
fn a_disk_that_somebody_has_open_is_not_removed_and_he_is_named() {
    let world = World::new();
    let backend = Arc::new(DirectoryBackend::new(world.directory.path().join("disks"), None));
    let life = world.live_with(backend.clone());
    let image = filled(&life, &qcow2());
    life.change_image(&alice(), image, ImageChange::State(image::Word::State(image::State::Active))).unwrap();
    let id = life.draft();
    life.change(&alice(), id, InstanceChange::Image(image)).unwrap();
    life.state(id, State::Stopped).unwrap();
    binned(&life, id);
    let disk = backend.path(&life.instance(id).record.disks[0]);
    let mut reader = Command::new("sleep").arg("600").stdin(File::open(&disk).unwrap()).spawn().unwrap();
    let refused = delete(&life, id);
    reader.kill().unwrap();
    reader.wait().unwrap();
    let refused = refused.unwrap_err();
    assert_eq!(refused.errno(), libc::EBUSY);
    assert!(refused.to_string().contains(&format!("the process {} (sleep)", reader.id())), "{refused}");
    assert!(disk.exists() && world.domain(id).is_some());
    let bin_image = ImageChange::State(image::Word::State(image::State::SoftDeleted));
    life.change_image(&alice(), image, bin_image).unwrap();
    delete(&life, id).unwrap();
    assert!(!disk.parent().unwrap().exists());
    let data = life.engine.image_path(image);
    let mut reader = Command::new("sleep").arg("600").stdin(File::open(&data).unwrap()).spawn().unwrap();
    let deletion = || life.change_image(&alice(), image, ImageChange::State(image::Word::Deleted));
    let refused = deletion();
    reader.kill().unwrap();
    reader.wait().unwrap();
    assert_eq!(refused.unwrap_err().errno(), libc::EBUSY);
    assert!(data.exists());
    deletion().unwrap();
    assert!(!data.exists());
}

#[test]
fn a_disk_that_another_one_is_made_from_is_not_removed() {
    let world = World::new();
    let backend = Arc::new(DirectoryBackend::new(world.directory.path().join("disks"), None));
    let life = world.live_with(backend.clone());
    let image = filled(&life, &qcow2());
    life.change_image(&alice(), image, ImageChange::State(image::Word::State(image::State::Active))).unwrap();
    let id = life.draft();
    life.change(&alice(), id, InstanceChange::Image(image)).unwrap();
    life.state(id, State::Stopped).unwrap();
    binned(&life, id);
    let disk = backend.path(&life.instance(id).record.disks[0]);
    let child = world.directory.path().join("child.qcow2");
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]).args([&disk, &child]);
    assert!(command.status().unwrap().success());
    let xml = format!(
        "<domain type='kvm'><name>child</name><memory>1024</memory><vcpu>1</vcpu><os><type>hvm</type></os><devices>\
         <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/><target dev='vda'/></disk>\
         </devices></domain>",
        child.display()
    );
    let other = world.control(json!({ "do": "define", "xml": xml }))["uuid"].as_str().unwrap().parse().unwrap();
    let refused = delete(&life, id).unwrap_err();
    assert_eq!(refused.errno(), libc::EBUSY);
    assert!(refused.to_string().contains("child.qcow2 of child is made from it"), "{refused}");
    assert!(disk.exists());
    world.hypervisor.undefine(other).unwrap();
    delete(&life, id).unwrap();
    assert!(!disk.exists() && child.exists());
}

#[test]
fn a_full_disk_refuses_the_bin_and_leaves_everything_where_it_is() {
    let world = World::new();
    let store = Arc::new(Full { inner: world.store.clone(), full: Mutex::new(false) });
    let life = world.live_on(store.clone(), |_| {});
    let (outside, inside) = (life.active(), binned(&life, life.stopped()));
    *store.full.lock() = true;
    assert!(matches!(life.state(outside, State::SoftDeleted), Err(Reason::NoSpace(_))));
    assert!(matches!(restore(&life, inside), Err(Reason::NoSpace(_))));
    assert!(matches!(delete(&life, inside), Err(Reason::NoSpace(_))));
    assert_eq!((life.observed(outside), life.observed(inside)), (State::Active, State::SoftDeleted));
    assert_eq!((world.power(outside), world.disk_count()), (PowerState::Running, 2));
    *store.full.lock() = false;
    delete(&life, inside).unwrap();
    binned(&life, outside);
}

#[test]
fn a_disk_that_another_definition_names_is_not_removed() {
    let world = World::new();
    let life = world.live();
    let id = binned(&life, life.stopped());
    let disk = world.disks.path(&life.instance(id).record.disks[0]);
    let other = foreign(&world, &life, "thief", disk.to_str().unwrap());
    let refused = delete(&life, id).unwrap_err();
    assert_eq!((refused.errno(), world.disk_count()), (libc::EBUSY, 1));
    assert!(refused.to_string().contains("thief"), "{refused}");
    assert!(world.domain(id).is_some(), "it keeps its definition too");
    world.hypervisor.undefine(other).unwrap();
    delete(&life, id).unwrap();
}

#[test]
fn nothing_goes_into_the_bin_or_out_of_it_while_the_hypervisor_is_unreachable() {
    let world = World::new();
    let life = world.live();
    let (outside, inside) = (life.stopped(), binned(&life, life.stopped()));
    world.control(json!({ "do": "disconnect" }));
    until("it is known", || life.inventory.health().hypervisor.unreachable().is_some());
    let unreachable = |result: Result<(), Reason>| assert_eq!(result.unwrap_err().errno(), libc::ENODEV);
    unreachable(life.state(outside, State::SoftDeleted));
    unreachable(restore(&life, inside));
    unreachable(delete(&life, inside));
    world.control(json!({ "do": "reconnect" }));
    until("it is back", || life.inventory.health().hypervisor.unreachable().is_none());
    assert_eq!((life.observed(outside), life.observed(inside)), (State::Stopped, State::SoftDeleted));
}

#[test]
fn a_lost_connection_in_the_middle_of_a_deletion_is_waited_for() {
    let world = World::new();
    let life = world.live();
    let id = binned(&life, life.active());
    world.control(
        json!({ "do": "fault", "call": "undefine", "mode": "disconnect", "ms": 200, "times": 1, "applied": true }),
    );
    delete(&life, id).unwrap();
    assert_eq!((life.inventory.instance(id), world.domain(id), world.disk_count()), (None, None, 0));
}
