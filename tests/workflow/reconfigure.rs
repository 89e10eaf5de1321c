//! Hardware, disk and autostart of instances that exist already.

use instancefs::hypervisor::{Hypervisor, HypervisorError};
use instancefs::model::change::InstanceChange;
use instancefs::model::instance::{State, Word};
use instancefs::model::reason::Reason;
use instancefs::model::task::{Operation, TaskState, TaskWord};
use serde_json::json;
use uuid::Uuid;

use crate::lab::{DEADLINE, IMAGE_BYTES, Life, World, alice, root, until};

const GRAPHICS: &str = "<graphics type='vnc' passwd='secret'/>";

/// Somebody else's domain, that is off.
fn foreign(life: &Life<'_>) -> Uuid {
    let id = Uuid::new_v4();
    let xml = format!(
        "<domain type='qemu'><name>theirs</name><uuid>{id}</uuid><memory unit='MiB'>256</memory>\
         <currentMemory unit='MiB'>128</currentMemory><vcpu current='1'>2</vcpu><devices>{GRAPHICS}</devices></domain>"
    );
    life.world.hypervisor.define(&xml).unwrap();
    until("it was read", || life.inventory.instance(id).is_some_and(|instance| instance.record.vcpus == 2));
    id
}

fn xml(life: &Life<'_>, id: Uuid) -> String {
    life.world.hypervisor.definition(id).unwrap()
}

fn vcpus(count: u32) -> InstanceChange {
    InstanceChange::Vcpus(count)
}

fn to(state: State) -> InstanceChange {
    InstanceChange::State(Word::State(state))
}

fn is_unchanged(life: &Life<'_>, id: Uuid) {
    let definition = xml(life, id);
    assert!(definition.contains("<vcpu>1</vcpu>") && definition.contains(">524288</memory>"), "{definition}");
    assert!(!life.world.domain(id).unwrap().autostart);
    // The background may read the definition once more.
    until("the record says it", || life.instance(id).record.vcpus == 1);
    let instance = life.instance(id);
    assert_eq!((instance.record.vcpus, instance.observed().state, &instance.task), (1, State::Stopped, &None));
}

#[test]
fn what_one_change_set_asks_for_is_one_operation() {
    let world = World::new();
    let life = world.live();
    let id = life.stopped();
    let all = vec![
        vcpus(2),
        InstanceChange::MemoryBytes(1 << 30),
        InstanceChange::RootDiskBytes(3 << 30),
        InstanceChange::Autostart(true),
        to(State::Active),
    ];
    let before = life.inventory.tasks().len();
    life.change_all(id, all.clone()).unwrap();
    assert_eq!(life.inventory.tasks().len(), before + 1);
    let task = life.last_task(id);
    assert_eq!((task.record.state, task.record.operation.task_word()), (TaskState::Success, TaskWord::Reconfiguring));
    let definition = xml(&life, id);
    assert!(definition.contains("<vcpu>2</vcpu>") && definition.contains(">1048576</memory>"), "{definition}");
    assert_eq!(world.calls("set_hardware"), 1);
    let instance = life.instance(id);
    let record = &instance.record;
    assert_eq!((record.vcpus, record.memory_bytes, record.root_disk_bytes), (2, 1 << 30, Some(3 << 30)));
    assert_eq!(world.disks.grown.lock()[&record.disks[0].reference], 3 << 30);
    assert!(instance.autostart());
    assert_eq!(life.observed(id), State::Active);
    // Said twice.
    life.change_all(id, all).unwrap();
    assert_eq!(life.inventory.tasks().len(), before + 1);
}

#[test]
fn hardware_changes_only_while_stopped() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    for state in [State::Active, State::Paused, State::Active, State::Suspended] {
        life.state(id, state).unwrap();
        for change in [vcpus(2), InstanceChange::MemoryBytes(1 << 30), InstanceChange::RootDiskBytes(3 << 30)] {
            assert_eq!(life.change(&alice(), id, change), Err(Reason::StoppedOnly), "{state:?}");
        }
        // What is true already is no change.
        life.change(&alice(), id, vcpus(1)).unwrap();
    }
    assert_eq!(world.calls("set_hardware"), 0);
}

#[test]
fn autostart_changes_at_any_time_but_not_while_locked() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    for on in [true, false, true] {
        life.change(&alice(), id, InstanceChange::Autostart(on)).unwrap();
        assert_eq!((world.domain(id).unwrap().autostart, life.instance(id).autostart()), (on, on));
    }
    assert_eq!(life.observed(id), State::Active);
    life.change(&alice(), id, InstanceChange::Locked(true)).unwrap();
    assert!(matches!(life.change(&alice(), id, InstanceChange::Autostart(false)), Err(Reason::Locked(_))));
    assert!(matches!(life.change(&alice(), id, vcpus(2)), Err(Reason::Locked(_))));
    assert!(world.domain(id).unwrap().autostart);
}

#[test]
fn a_foreign_domain_keeps_all_that_was_not_asked_for() {
    let world = World::new();
    let life = world.live();
    let id = foreign(&life);
    life.change_all_by(&root(), id, vec![vcpus(4), InstanceChange::MemoryBytes(1 << 30)]).unwrap();
    let definition = xml(&life, id);
    assert!(definition.contains("<vcpu>4</vcpu>") && definition.contains(GRAPHICS), "{definition}");
    assert!(definition.contains("<currentMemory unit='KiB'>1048576</currentMemory>"), "{definition}");
    let grown = life.change(&root(), id, InstanceChange::RootDiskBytes(1 << 40));
    assert!(matches!(grown, Err(Reason::Unsupported(_))), "{grown:?}");
    world.control(json!({ "do": "autostart", "uuid": id, "on": true }));
    until("autostart from outside is shown", || life.instance(id).autostart());
}

#[test]
fn a_disk_only_grows() {
    let world = World::new();
    let life = world.live();
    let id = life.stopped();
    let smaller = life.change(&alice(), id, InstanceChange::RootDiskBytes(IMAGE_BYTES / 2)).unwrap_err();
    assert_eq!(smaller.errno(), libc::ERANGE);
    assert!(smaller.to_string().contains("only grows"), "{smaller}");
    assert!(world.disks.grown.lock().is_empty());
}

#[test]
fn a_failure_leaves_the_settings_as_they_were() {
    let world = World::new();
    let life = world.live();
    let id = life.stopped();
    let all = || vec![vcpus(2), InstanceChange::Autostart(true), InstanceChange::RootDiskBytes(3 << 30)];
    for call in ["set_hardware", "set_autostart"] {
        world.fail(call);
        life.change_all(id, all()).unwrap_err();
        is_unchanged(&life, id);
        assert!(life.last_error(id).unwrap().contains("a test says no"));
    }
    *world.disks.grow_fails.lock() = true;
    assert!(matches!(life.change_all(id, all()), Err(Reason::NoSpace(_))));
    is_unchanged(&life, id);
    assert_eq!(life.instance(id).record.root_disk_bytes, Some(IMAGE_BYTES));
    *world.disks.grow_fails.lock() = false;
    life.change_all(id, all()).unwrap();
    assert_eq!((life.instance(id).record.vcpus, life.last_error(id)), (2, None));
}

#[test]
fn a_start_that_fails_leaves_the_new_settings() {
    let world = World::new();
    let life = world.live();
    let id = life.stopped();
    world.fail("start");
    life.change_all(id, vec![vcpus(2), to(State::Active)]).unwrap_err();
    assert!(xml(&life, id).contains("<vcpu>2</vcpu>"));
    assert_eq!((life.instance(id).record.vcpus, life.observed(id)), (2, State::Stopped));
}

#[test]
fn an_answer_that_was_lost_is_no_failure() {
    let world = World::new();
    let life = world.live();
    for (call, applied) in [("set_hardware", true), ("set_hardware", false), ("start", true), ("start", false)] {
        let id = life.stopped();
        world.control(json!({
            "do": "fault", "call": call, "mode": "disconnect", "applied": applied, "ms": 200, "times": 1
        }));
        life.change_all(id, vec![vcpus(2), to(State::Active)]).unwrap();
        assert_eq!(life.observed(id), State::Active, "{call} {applied}");
        assert!(xml(&life, id).contains("<vcpu>2</vcpu>"));
    }
}

#[test]
fn the_same_request_joins_and_another_waits_its_turn() {
    let world = World::new();
    let life = world.live();
    let id = life.stopped();
    world.control(json!({ "do": "fault", "call": "set_hardware", "mode": "hang", "times": 1 }));
    let changes = vec![vcpus(2), to(State::Active)];
    let begin = |changes| {
        use instancefs::workflow::request::{Request, Wait};
        life.submit(&alice(), Request::Instance { id, changes }, Wait::Settle)
    };
    let first = begin(changes.clone());
    until("it hangs", || world.is_pending("set_hardware"));
    let again = begin(changes);
    for other in [vcpus(1), vcpus(3), to(State::Stopped), InstanceChange::MemoryBytes(1 << 30)] {
        assert!(matches!(life.change(&alice(), id, other), Err(Reason::Busy { task: "reconfiguring" })));
    }
    world.control(json!({ "do": "release" }));
    for answer in [first, again] {
        answer.recv_timeout(DEADLINE).unwrap().unwrap();
    }
    let task = life.last_task(id);
    assert!(matches!(task.record.operation, Operation::Reconfigure { .. }));
    assert_eq!((life.observed(id), world.calls("set_hardware")), (State::Active, 1));
}

#[test]
fn two_operations_in_one_change_set_are_refused_whole() {
    let world = World::new();
    let life = world.live();
    let id = life.stopped();
    let both = vec![InstanceChange::Name("web".to_owned()), to(State::Active)];
    assert!(matches!(life.change_all(id, both), Err(Reason::Busy { .. })));
    assert_eq!((life.instance(id).name(), life.observed(id)), (id.to_string().as_str(), State::Stopped));
    assert_eq!(world.hypervisor.reboot(id, instancefs::hypervisor::Reboot::Hard).unwrap_err(), not_running());
}

fn not_running() -> HypervisorError {
    HypervisorError::InvalidState("Requested operation is not valid: domain is not running".to_owned())
}
