use std::time::Duration;

use instancefs::block::BlockBackend;
use instancefs::hypervisor::definition::mac_address;
use instancefs::hypervisor::{Hypervisor, PowerState};
use instancefs::model::change::InstanceChange;
use instancefs::model::instance::State;
use instancefs::model::network::Network;
use instancefs::model::reason::Reason;
use instancefs::model::record::DiskRole;
use instancefs::model::task::{StepState, TaskState};
use serde_json::json;
use uuid::Uuid;

use crate::lab::{DEADLINE, IMAGE_BYTES, Life, World, alice, until};

/// Nothing is left of a boot but the draft and its reason.
fn is_back(life: &Life<'_>, id: Uuid) {
    let instance = life.instance(id);
    assert_eq!((instance.observed().state, &instance.task), (State::Draft, &None));
    assert_eq!((life.world.disk_count(), instance.record.disks.len()), (0, 0));
    assert_eq!(life.world.domain(id), None);
    assert!(instance.record.errors.last().is_some());
    let task = life.last_task(id);
    assert_eq!(task.record.state, TaskState::Failure);
    assert!(task.record.steps.iter().all(|step| step.state == StepState::Undone), "{:?}", task.record.steps);
}

#[test]
fn a_draft_boots_with_a_disk_of_its_own() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    let instance = life.instance(id);
    assert_eq!(instance.observed().state, State::Active);
    assert_eq!(instance.record.root_disk_bytes, Some(IMAGE_BYTES));
    assert!(instance.record.launched_at.is_some());
    assert_eq!(instance.record.disks.len(), 1);
    assert_eq!(world.disks.disks.lock().get(&instance.record.disks[0].reference), Some(&life.last_task(id).id));
    assert_eq!(life.inventory.instance_named(&id.to_string()), Some(id));
    let xml = world.hypervisor.definition(id).unwrap();
    let disk = world.disks.path(&instance.record.disks[0]);
    assert!(xml.contains(disk.to_str().unwrap()), "{xml}");
}

#[test]
fn a_draft_is_defined_without_a_start() {
    let world = World::new();
    let life = world.live();
    let id = life.stopped();
    assert_eq!((life.observed(id), world.power(id), world.calls("start")), (State::Stopped, PowerState::ShutOff, 0));
    assert_eq!((world.disk_count(), life.instance(id).record.launched_at), (1, None));
}

#[test]
fn a_boot_that_fails_at_any_step_rolls_back_to_the_draft() {
    let world = World::new();
    let life = world.live();
    let id = life.draft_with_image();
    *world.disks.create_fails.lock() = Some("the disks' place".to_owned());
    assert!(matches!(life.state(id, State::Active), Err(Reason::NoSpace(_))));
    is_back(&life, id);
    *world.disks.create_fails.lock() = None;
    for call in ["accelerator", "define", "start"] {
        world.fail(call);
        let failure = life.state(id, State::Active).unwrap_err();
        assert!(failure.to_string().contains("a test says no"), "{call}: {failure}");
        assert!(life.last_error(id).unwrap().contains("a test says no"), "{call}");
        is_back(&life, id);
    }
    life.state(id, State::Active).unwrap();
    assert_eq!((life.observed(id), life.last_error(id)), (State::Active, None));
}

#[test]
fn user_data_comes_on_a_disk_of_its_own() {
    let world = World::new();
    let life = world.live();
    let id = life.draft_with_image();
    life.change(&alice(), id, InstanceChange::Name("Web <1>".to_owned())).unwrap();
    life.tell(id, "#cloud-config\npassword: secret\n");
    life.state(id, State::Active).unwrap();
    let instance = life.instance(id);
    let roles: Vec<_> = instance.record.disks.iter().map(|disk| disk.role).collect();
    assert_eq!(roles, [DiskRole::Root, DiskRole::Seed]);
    let seed = &instance.record.disks[1];
    let documents = world.disks.seeds.lock()[&seed.reference].clone();
    assert_eq!(
        documents,
        format!("user-data: #cloud-config\npassword: secret\nmeta-data: instance-id: {id}\nlocal-hostname: web--1\n")
    );
    let xml = world.hypervisor.definition(id).unwrap();
    assert!(xml.contains(&format!("/{id}-seed")) && !xml.contains("secret"), "{xml}");
}

#[test]
fn a_seed_that_cannot_be_made_leaves_no_disk() {
    let world = World::new();
    let life = world.live();
    let id = life.draft_with_image();
    life.tell(id, "#cloud-config");
    *world.disks.seed_fails.lock() = true;
    assert!(life.state(id, State::Active).unwrap_err().to_string().contains("a test wants it so"));
    is_back(&life, id);
    *world.disks.seed_fails.lock() = false;
    for call in ["define", "start"] {
        world.fail(call);
        life.state(id, State::Active).unwrap_err();
        is_back(&life, id);
    }
    life.state(id, State::Active).unwrap();
    assert_eq!((life.observed(id), world.disk_count()), (State::Active, 2));
}

#[test]
fn a_draft_has_the_hosts_usual_network_until_another_is_written() {
    let world = World::new();
    let life = world.live();
    let id = life.draft_with_image();
    let network = |life: &Life<'_>| life.instance(id).record.network.clone().map(|network| network.to_string());
    assert_eq!(network(&life).as_deref(), Some("network:default"));
    life.change(&alice(), id, InstanceChange::Network(Network::Bridge("br7".to_owned()))).unwrap();
    life.state(id, State::Stopped).unwrap();
    let xml = world.hypervisor.definition(id).unwrap();
    let card = format!("<mac address='{}'/>", mac_address(id));
    assert!(xml.contains("<source bridge='br7'/>") && xml.contains(&card), "{xml}");
    until("the definition was read", || life.instance(id).record.definition.is_some());
    assert_eq!(network(&life).as_deref(), Some("bridge:br7"));
    let other = InstanceChange::Network(Network::User);
    assert_eq!(life.change(&alice(), id, other), Err(Reason::DraftOnly));
}

#[test]
fn autostart_of_a_draft_is_set_when_it_is_defined_and_goes_with_the_definition() {
    let world = World::new();
    let life = world.live();
    let id = life.draft_with_image();
    life.change(&alice(), id, InstanceChange::Autostart(true)).unwrap();
    assert_eq!(world.calls("set_autostart"), 0);
    for call in ["set_autostart", "start"] {
        world.fail(call);
        life.state(id, State::Active).unwrap_err();
        is_back(&life, id);
    }
    life.state(id, State::Active).unwrap();
    assert!(world.domain(id).unwrap().autostart && life.instance(id).autostart());
}

#[test]
fn a_domain_that_somebody_else_defined_is_left_alone() {
    let world = World::new();
    let life = world.live();
    let id = life.draft_with_image();
    let xml = format!("<domain type='qemu'><name>theirs</name><uuid>{id}</uuid></domain>");
    world.hypervisor.define(&xml).unwrap();
    assert!(life.state(id, State::Active).unwrap_err().to_string().contains("defined outside"));
    assert_eq!(world.hypervisor.definition(id).unwrap(), xml);
    assert_eq!((life.observed(id), world.disk_count()), (State::Draft, 0));
}

#[test]
fn a_name_that_a_foreign_domain_took_meanwhile_rolls_back() {
    let world = World::new();
    let life = world.live();
    let id = life.draft_with_image();
    life.change(&alice(), id, InstanceChange::Name("web".to_owned())).unwrap();
    world.control(json!({ "do": "fault", "call": "accelerator", "mode": "hang", "times": 1 }));
    let booting = life.begin(id, State::Active);
    until("the boot is on its way", || world.is_pending("accelerator"));
    world.hypervisor.define("<domain type='qemu'><name>web</name></domain>").unwrap();
    world.control(json!({ "do": "release", "call": "accelerator" }));
    assert_eq!(booting.recv_timeout(DEADLINE).unwrap(), Err(Reason::NameTaken("web".to_owned())));
    is_back(&life, id);
}

#[test]
fn a_lock_during_a_boot_keeps_what_its_undo_would_destroy() {
    let world = World::new();
    let life = world.live();
    let id = life.draft_with_image();
    world.control(json!({ "do": "fault", "call": "start", "mode": "hang", "times": 1 }));
    let booting = life.begin(id, State::Active);
    until("start hangs", || world.is_pending("start"));
    life.change(&alice(), id, InstanceChange::Locked(true)).unwrap();
    // The hung start is refused when it goes on: the guest is saved memory of nothing.
    world.hypervisor.control(json!({ "do": "undefine", "uuid": id }));
    world.control(json!({ "do": "release", "call": "start" }));
    booting.recv_timeout(DEADLINE).unwrap().unwrap_err();
    let instance = life.instance(id);
    assert_eq!((instance.observed().state, world.disk_count(), instance.record.disks.len()), (State::Draft, 1, 1));
    life.change(&alice(), id, InstanceChange::Locked(false)).unwrap();
    life.state(id, State::Active).unwrap();
    assert_eq!((life.observed(id), world.disk_count()), (State::Active, 1));
    assert_eq!(life.instance(id).record.disks[0].operation, life.last_task(id).id);
}

#[test]
fn an_undo_that_fails_loses_track_of_nothing() {
    let world = World::new();
    let life = world.live();
    let id = life.draft_with_image();
    world.fail("start");
    world.control(json!({ "do": "fault", "call": "undefine", "mode": "fail" }));
    life.state(id, State::Active).unwrap_err();
    // The definition stayed, and so the disk that it names.
    assert_eq!((world.disk_count(), life.instance(id).record.disks.len()), (1, 1));
    assert!(world.domain(id).is_some());
    world.control(json!({ "do": "release" }));
    *world.disks.remove_fails.lock() = true;
    life.state(id, State::Active).unwrap_err();
    assert_eq!((world.disk_count(), life.instance(id).record.disks.len()), (1, 1));
    *world.disks.remove_fails.lock() = false;
    life.state(id, State::Active).unwrap();
    assert_eq!((life.observed(id), world.disk_count()), (State::Active, 1));
    assert_eq!(life.instance(id).record.disks[0].operation, life.last_task(id).id);
}

#[test]
fn what_a_failed_undo_left_goes_with_the_draft() {
    let world = World::new();
    let life = world.live();
    let id = life.draft_with_image();
    world.fail("start");
    world.control(json!({ "do": "fault", "call": "undefine", "mode": "fail" }));
    life.state(id, State::Active).unwrap_err();
    world.control(json!({ "do": "release" }));
    let deleted = InstanceChange::State(instancefs::model::instance::Word::Deleted);
    life.change(&alice(), id, deleted).unwrap();
    assert_eq!((life.inventory.instance(id), world.disk_count(), world.domain(id)), (None, 0, None));
}

#[test]
fn a_start_whose_answer_was_lost_is_no_failure_and_loses_no_disk() {
    let world = World::new();
    let life = world.live();
    for (call, applied) in [("start", true), ("start", false), ("define", true), ("define", false)] {
        let id = life.draft_with_image();
        world.control(json!({
            "do": "fault", "call": call, "mode": "disconnect", "applied": applied, "ms": 200, "times": 1
        }));
        life.state(id, State::Active).unwrap();
        assert_eq!((life.observed(id), world.power(id)), (State::Active, PowerState::Running), "{call} {applied}");
        assert_eq!(life.instance(id).record.disks.len(), 1);
    }
    assert_eq!(world.disk_count(), 4);
}

#[test]
fn nothing_is_undone_while_the_connection_is_away() {
    let world = World::new();
    let life = world.live_on(world.store.clone(), |settings| settings.settle = Duration::from_millis(100));
    let id = life.draft_with_image();
    world.control(json!({ "do": "fault", "call": "start", "mode": "disconnect", "applied": true, "times": 1 }));
    life.state(id, State::Active).unwrap();
    until("it asks whether the connection is back", || world.calls("ping") >= 2);
    assert_eq!(world.disk_count(), 1);
    assert!(life.instance(id).task.is_some());
    world.control(json!({ "do": "reconnect" }));
    life.wait_idle(id);
    assert_eq!((life.observed(id), world.calls("start"), world.disk_count()), (State::Active, 1, 1));
}

#[test]
fn a_guest_that_ended_at_once_has_booted() {
    let world = World::new();
    let life = world.live();
    let id = life.draft_with_image();
    world.control(json!({ "do": "fault", "call": "start", "mode": "hang", "times": 1 }));
    let booting = life.begin(id, State::Active);
    until("start hangs", || world.is_pending("start"));
    world.control(json!({ "do": "start", "uuid": id }));
    world.control(json!({ "do": "halt", "uuid": id }));
    world.control(json!({ "do": "start", "uuid": id }));
    // The call is refused, since the guest runs already.
    world.control(json!({ "do": "release", "call": "start" }));
    booting.recv_timeout(DEADLINE).unwrap().unwrap();
    assert_eq!((life.observed(id), world.disk_count()), (State::Active, 1));
}
