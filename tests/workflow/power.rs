use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use instancefs::hypervisor::{ConsoleDevice, Hypervisor, PowerState};
use instancefs::model::change::InstanceChange;
use instancefs::model::instance::{State, Word};
use instancefs::model::reason::Reason;
use instancefs::model::task::TaskState;
use instancefs::workflow::request::{Request, Wait};
use serde_json::json;
use uuid::Uuid;

use crate::lab::{DEADLINE, World, alice, root, until};

#[test]
fn every_power_state_is_reached_by_its_word() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    for (state, power) in [
        (State::Paused, PowerState::Paused),
        (State::Active, PowerState::Running),
        (State::Suspended, PowerState::ShutOff),
        (State::Active, PowerState::Running),
        (State::Stopped, PowerState::ShutOff),
        (State::Active, PowerState::Running),
    ] {
        life.state(id, state).unwrap();
        assert_eq!((life.observed(id), world.power(id)), (state, power));
        assert_eq!(life.instance(id).task, None);
        assert_eq!(life.last_task(id).record.state, TaskState::Success);
        assert_eq!(life.last_task(id).record.progress, 100);
    }
    life.change(&alice(), id, InstanceChange::RebootSoft).unwrap();
    life.change(&alice(), id, InstanceChange::RebootHard).unwrap();
    assert_eq!(world.calls("reboot"), 2);
}

#[test]
fn a_guest_that_ignores_acpi_is_powered_off_after_its_timeout() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    world.control(json!({ "do": "guest", "uuid": id, "ignores_acpi": true }));
    life.change(&alice(), id, InstanceChange::StopTimeoutSeconds(1)).unwrap();
    let began = Instant::now();
    life.state(id, State::Stopped).unwrap();
    assert!(began.elapsed() < Duration::from_secs(5));
    assert_eq!((life.observed(id), world.calls("shutdown"), world.calls("power_off")), (State::Stopped, 1, 1));
}

#[test]
fn a_guest_that_obeys_is_not_powered_off() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    world.control(json!({ "do": "guest", "uuid": id, "acpi_delay_ms": 300 }));
    life.state(id, State::Stopped).unwrap();
    assert_eq!((life.observed(id), world.calls("power_off")), (State::Stopped, 0));
}

#[test]
fn a_guest_that_cannot_hear_acpi_is_powered_off_at_once() {
    let world = World::new();
    let life = world.live();
    for fault in ["ioerror", "watchdog"] {
        let id = life.active();
        world.control(json!({ "do": fault, "uuid": id }));
        life.refresh(id);
        assert_eq!(life.observed(id), State::Error);
        life.state(id, State::Stopped).unwrap();
        assert_eq!(life.observed(id), State::Stopped);
    }
    assert_eq!((world.calls("shutdown"), world.calls("power_off")), (0, 2));
}

#[test]
fn an_io_error_is_left_by_writing_active() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    world.control(json!({ "do": "ioerror", "uuid": id }));
    life.refresh(id);
    life.state(id, State::Active).unwrap();
    assert_eq!((life.observed(id), world.calls("unpause")), (State::Active, 1));
}

#[test]
fn a_crash_is_answered_by_stopped_and_by_reset_state() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    for answer in [InstanceChange::State(Word::State(State::Stopped)), InstanceChange::ResetState] {
        world.control(json!({ "do": "crash", "uuid": id }));
        life.refresh(id);
        assert_eq!(life.observed(id), State::Error);
        life.change(&root(), id, answer).unwrap();
        assert_eq!(life.observed(id), State::Stopped);
        life.refresh(id);
        assert_eq!(life.observed(id), State::Stopped);
        life.state(id, State::Active).unwrap();
        assert_eq!(life.instance(id).record.crashed, None);
    }
}

#[test]
fn a_hung_call_keeps_the_claim_and_answers_the_writer_when_the_window_is_over() {
    let world = World::new();
    let settle = Duration::from_millis(300);
    let life = world.live_on(world.store.clone(), |settings| settings.settle = settle);
    let id = life.stopped();
    world.control(json!({ "do": "fault", "call": "start", "mode": "hang", "times": 1 }));
    let began = Instant::now();
    life.state(id, State::Active).unwrap();
    assert!(began.elapsed() >= settle && began.elapsed() < DEADLINE);
    until("start hangs", || world.is_pending("start"));
    assert_eq!(life.state(id, State::Stopped), Err(Reason::Busy { task: "starting" }));
    // The same joins, and its window is the first one's: over.
    let began = Instant::now();
    life.state(id, State::Active).unwrap();
    assert!(began.elapsed() < settle);
    assert_eq!(life.observed(id), State::Stopped);
    world.control(json!({ "do": "release", "call": "start" }));
    life.wait_idle(id);
    assert_eq!(life.observed(id), State::Active);
    assert_eq!(world.calls("start"), 1);
}

#[test]
fn the_same_request_joins_and_hears_the_same_outcome() {
    let world = World::new();
    let life = world.live();
    let id = life.stopped();
    world.control(json!({ "do": "fault", "call": "start", "mode": "hang", "times": 1 }));
    let first = life.begin(id, State::Active);
    until("start hangs", || world.is_pending("start"));
    let second = life.begin(id, State::Active);
    let third = life.submit(
        &alice(),
        Request::Instance { id, changes: vec![InstanceChange::State(Word::State(State::Active))] },
        Wait::Accepted,
    );
    third.recv_timeout(DEADLINE).unwrap().unwrap();
    assert_eq!(second.try_recv().ok(), None);
    world.control(json!({ "do": "release", "call": "start" }));
    assert_eq!(first.recv_timeout(DEADLINE).unwrap(), Ok(()));
    assert_eq!(second.recv_timeout(DEADLINE).unwrap(), Ok(()));
    assert_eq!(world.calls("start"), 1);
}

#[test]
fn a_failure_is_the_writers_and_stays_in_last_error_until_something_succeeds() {
    let world = World::new();
    let life = world.live();
    let id = life.stopped();
    world.fail("start");
    let refused = life.state(id, State::Active).unwrap_err();
    assert_eq!(refused.errno(), libc::EIO);
    assert!(life.last_error(id).unwrap().contains("a test says no"));
    let task = life.last_task(id).record.clone();
    assert_eq!((task.state, task.errno), (TaskState::Failure, libc::EIO));
    assert_eq!(life.observed(id), State::Stopped);
    life.state(id, State::Active).unwrap();
    assert_eq!(life.last_error(id), None);
}

#[test]
fn every_operation_that_fails_leaves_the_instance_where_it_was() {
    let world = World::new();
    let life = world.live();
    for (from, to, call) in [
        (State::Stopped, State::Active, "start"),
        (State::Active, State::Paused, "pause"),
        (State::Active, State::Suspended, "save"),
        (State::Paused, State::Active, "unpause"),
        (State::Suspended, State::Active, "start"),
    ] {
        let id = life.active();
        if from != State::Active {
            life.state(id, from).unwrap();
        }
        world.fail(call);
        assert!(life.state(id, to).is_err(), "{call}");
        assert_eq!(life.observed(id), from, "{call}");
        life.state(id, to).unwrap();
        assert_eq!(life.observed(id), to, "{call}");
    }
}

#[test]
fn a_lock_during_a_stop_holds() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    world.control(json!({ "do": "guest", "uuid": id, "ignores_acpi": true }));
    life.change(&alice(), id, InstanceChange::StopTimeoutSeconds(2)).unwrap();
    let stopping = life.begin(id, State::Stopped);
    until("it was asked", || world.calls("shutdown") == 1);
    life.change(&alice(), id, InstanceChange::Locked(true)).unwrap();
    assert!(matches!(stopping.recv_timeout(DEADLINE).unwrap(), Err(Reason::Locked(_))));
    assert_eq!((world.power(id), world.calls("power_off")), (PowerState::Running, 0));
}

#[test]
fn a_lost_connection_is_waited_for_and_nothing_is_done_twice() {
    let world = World::new();
    let life = world.live();
    for applied in [true, false] {
        let id = life.stopped();
        let before = world.calls("start");
        world.control(json!({
            "do": "fault", "call": "start", "mode": "disconnect", "applied": applied, "ms": 400, "times": 1
        }));
        life.state(id, State::Active).unwrap();
        assert_eq!(life.observed(id), State::Active);
        assert_eq!(world.calls("start") - before, if applied { 1 } else { 2 });
    }
}

fn boots(world: &World, id: Uuid) -> u64 {
    let list = world.control(json!({ "do": "list" }));
    let guests = list["guests"].as_array().unwrap();
    let guest = guests.iter().find(|guest| guest["domain"]["uuid"] == json!(id)).expect("the guest exists");
    guest["boots"].as_u64().unwrap()
}

#[test]
fn a_soft_reboot_ends_when_the_guest_has_restarted() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    world.control(json!({ "do": "guest", "uuid": id, "acpi_delay_ms": 300 }));
    life.change(&alice(), id, InstanceChange::RebootSoft).unwrap();
    assert_eq!((boots(&world, id), world.calls("reboot")), (2, 1));
    assert_eq!((life.observed(id), life.last_task(id).record.state), (State::Active, TaskState::Success));
}

#[test]
fn a_guest_that_ignores_a_soft_reboot_is_reset_after_its_timeout() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    world.control(json!({ "do": "guest", "uuid": id, "ignores_acpi": true }));
    life.change(&alice(), id, InstanceChange::StopTimeoutSeconds(1)).unwrap();
    life.change(&alice(), id, InstanceChange::RebootSoft).unwrap();
    // Asked once, reset once.
    assert_eq!((boots(&world, id), world.calls("reboot")), (2, 2));
}

#[test]
fn a_lock_during_a_soft_reboot_keeps_the_guest_from_the_reset() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    world.control(json!({ "do": "guest", "uuid": id, "ignores_acpi": true }));
    life.change(&alice(), id, InstanceChange::StopTimeoutSeconds(2)).unwrap();
    let changes = vec![InstanceChange::RebootSoft];
    let rebooting = life.submit(&alice(), Request::Instance { id, changes }, Wait::Settle);
    until("it was asked", || world.calls("reboot") == 1);
    life.change(&alice(), id, InstanceChange::Locked(true)).unwrap();
    assert!(matches!(rebooting.recv_timeout(DEADLINE).unwrap(), Err(Reason::Locked(_))));
    assert_eq!((boots(&world, id), world.calls("reboot")), (1, 1));
}

#[test]
fn a_guest_that_turns_itself_off_for_a_soft_reboot_is_started_again() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    world.control(json!({ "do": "guest", "uuid": id, "ignores_acpi": true }));
    let changes = vec![InstanceChange::RebootSoft];
    let rebooting = life.submit(&alice(), Request::Instance { id, changes }, Wait::Settle);
    until("it was asked", || world.calls("reboot") == 1);
    world.control(json!({ "do": "halt", "uuid": id }));
    rebooting.recv_timeout(DEADLINE).unwrap().unwrap();
    assert_eq!((boots(&world, id), world.power(id)), (2, PowerState::Running));
}

#[test]
fn a_guest_that_somebody_stops_during_a_soft_reboot_stays_off() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    world.control(json!({ "do": "guest", "uuid": id, "ignores_acpi": true }));
    let changes = vec![InstanceChange::RebootSoft];
    let rebooting = life.submit(&alice(), Request::Instance { id, changes }, Wait::Settle);
    until("it was asked", || world.calls("reboot") == 1);
    world.control(json!({ "do": "stop", "uuid": id }));
    assert!(rebooting.recv_timeout(DEADLINE).unwrap().is_err());
    assert_eq!((boots(&world, id), world.power(id)), (1, PowerState::ShutOff));
}

#[test]
fn a_soft_reboot_that_was_interrupted_is_neither_repeated_nor_followed_by_a_reset() {
    let world = World::new();
    let life = world.live_on(world.store.clone(), |settings| settings.settle = Duration::from_millis(50));
    let id = life.active();
    life.wait_idle(id);
    world.control(json!({ "do": "guest", "uuid": id, "acpi_delay_ms": 500 }));
    life.change(&alice(), id, InstanceChange::RebootSoft).unwrap();
    until("it was asked", || world.calls("reboot") == 1);
    drop(life);
    until("it restarts while nobody listens", || boots(&world, id) == 2);
    let life = world.live();
    life.wait_idle(id);
    assert_eq!((boots(&world, id), world.calls("reboot")), (2, 1));
    assert!(life.last_error(id).unwrap().contains("ask again"));
}

#[test]
fn a_reboot_whose_outcome_is_unknown_is_not_sent_again() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    world.control(json!({ "do": "fault", "call": "reboot", "mode": "disconnect", "ms": 200, "times": 1 }));
    let unknown = life.change(&alice(), id, InstanceChange::RebootHard).unwrap_err();
    assert!(unknown.to_string().contains("ask again"), "{unknown}");
    assert_eq!(world.calls("reboot"), 1);
    life.change(&alice(), id, InstanceChange::RebootHard).unwrap();
}

#[test]
fn reset_state_gives_up_a_stop_once_its_call_has_returned() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    world.control(json!({ "do": "guest", "uuid": id, "ignores_acpi": true }));
    world.control(json!({ "do": "fault", "call": "shutdown", "mode": "hang", "times": 1 }));
    let stopping = life.begin(id, State::Stopped);
    until("shutdown hangs", || world.is_pending("shutdown"));
    assert_eq!(life.change(&alice(), id, InstanceChange::ResetState), Err(Reason::RootOnly));
    let reset = life.submit(&root(), Request::Instance { id, changes: vec![InstanceChange::ResetState] }, Wait::Settle);
    assert_eq!(reset.recv_timeout(Duration::from_millis(200)), Err(RecvTimeoutError::Timeout));
    assert!(life.instance(id).task.is_some());
    world.control(json!({ "do": "release", "call": "shutdown" }));
    assert_eq!(reset.recv_timeout(DEADLINE).unwrap(), Ok(()));
    assert!(stopping.recv_timeout(DEADLINE).unwrap().is_err());
    assert_eq!(life.last_task(id).record.state, TaskState::Cancelled);
    assert_eq!((life.observed(id), world.calls("power_off")), (State::Active, 0));
}

#[test]
fn a_console_token_ends_when_its_time_is_over() {
    let world = World::new();
    let life = world.live_on(world.store.clone(), |settings| settings.console_token_lifetime = Duration::ZERO);
    let id = life.active();
    let path = life.engine.offer_console(&life.instance(id), ConsoleDevice::Serial, 0).unwrap();
    until("it is gone", || !path.exists());
}

#[test]
fn a_stopped_instance_is_renamed_and_the_name_is_free_again() {
    let world = World::new();
    let life = world.live();
    let (id, other) = (life.stopped(), life.stopped());
    let name = |id, name: &str| life.change(&alice(), id, InstanceChange::Name(name.to_owned()));
    name(id, "web").unwrap();
    assert_eq!(world.domain(id).unwrap().name, "web");
    assert_eq!(name(other, "web"), Err(Reason::NameTaken("web".to_owned())));
    world.fail("rename");
    assert!(name(id, "mail").is_err());
    assert_eq!(life.instance(id).name(), "web");
    name(other, "mail").unwrap();
    name(id, "mail").unwrap_err();
    name(id, "web-2").unwrap();
    name(other, "web").unwrap();
    life.state(id, State::Active).unwrap();
    assert_eq!(name(id, "late"), Err(Reason::StoppedOnly));
}

#[test]
fn a_transient_domain_is_defined_before_it_is_stopped() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    world.hypervisor.undefine(id).unwrap();
    life.refresh(id);
    assert!(!world.domain(id).unwrap().persistent);
    life.state(id, State::Stopped).unwrap();
    let domain = world.domain(id).expect("it outlives its run");
    assert!(domain.persistent);
    assert_eq!(domain.power, PowerState::ShutOff);
}

#[test]
fn the_engine_ends_while_a_call_hangs_and_the_next_life_finishes_the_operation() {
    let world = World::new();
    let life = world.live_on(world.store.clone(), |settings| settings.settle = Duration::from_millis(50));
    let id = life.stopped();
    life.wait_idle(id);
    world.control(json!({ "do": "fault", "call": "start", "mode": "hang", "times": 1 }));
    life.state(id, State::Active).unwrap();
    until("start hangs", || world.is_pending("start"));
    drop(life);
    let life = world.live();
    life.wait_idle(id);
    assert_eq!(life.observed(id), State::Active);
    world.control(json!({ "do": "release", "call": "start" }));
    assert_eq!(life.observed(id), State::Active);
}
