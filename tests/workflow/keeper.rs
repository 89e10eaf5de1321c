use std::sync::Arc;
use std::time::Duration;

use instancefs::hypervisor::{Hypervisor, PowerState};
use instancefs::inventory::Object;
use instancefs::model::change::{ImageChange, InstanceChange};
use instancefs::model::image;
use instancefs::model::instance::State;
use instancefs::model::reason::Reason;
use instancefs::model::record::BinEntry;
use instancefs::model::task::TaskState;
use serde_json::json;
use uuid::Uuid;

use crate::lab::{DEADLINE, Life, RETENTION, TestClock, World, active_image, alice, until};

const DAY: Duration = Duration::from_secs(24 * 3600);

fn live<'a>(world: &'a World, clock: &Arc<TestClock>) -> Life<'a> {
    let clock = clock.clone();
    world.live_on(world.store.clone(), |settings| settings.clock = clock)
}

fn binned(life: &Life<'_>) -> Uuid {
    let id = life.stopped();
    life.state(id, State::SoftDeleted).unwrap();
    life.wait_idle(id);
    id
}

fn binned_image(life: &Life<'_>) -> Uuid {
    let id = Uuid::new_v4();
    life.ledger
        .transact(|batch| {
            let image = active_image(id, batch.next_number());
            batch.put(Object::Image(Arc::new(image)));
        })
        .unwrap();
    life.change_image(&alice(), id, ImageChange::State(image::Word::State(image::State::SoftDeleted))).unwrap();
    id
}

/// Returns when the keeper has looked at everything at least once from now on: an image that is due now is looked at
/// after all instances, and gone.
pub fn looked(life: &Life<'_>) {
    let last = binned_image(life);
    life.engine.keep();
    life.change_image(&alice(), last, ImageChange::ExpiresAt(Some(1))).unwrap();
    until("what is due is deleted", || life.inventory.image(last).is_none());
}

fn is_there(life: &Life<'_>, id: Uuid) -> bool {
    life.inventory.contains(id)
}

/// Changes what is known of an instance in the bin.
fn edit(life: &Life<'_>, id: Uuid, edit: impl Fn(&mut BinEntry)) {
    life.ledger
        .transact(|batch| {
            let mut instance = (*batch.instance(id).unwrap()).clone();
            edit(&mut instance.record.bin.as_mut().unwrap().entry);
            batch.put(Object::Instance(Arc::new(instance)));
        })
        .unwrap();
}

#[test]
fn what_has_expired_is_deleted_for_good_and_nothing_before() {
    let (world, clock) = (World::new(), TestClock::new());
    let life = live(&world, &clock);
    let (id, image, outside) = (binned(&life), binned_image(&life), life.stopped());
    clock.pass(RETENTION - Duration::from_secs(1));
    looked(&life);
    assert!(is_there(&life, id) && is_there(&life, image));
    clock.pass(Duration::from_secs(1));
    life.engine.keep();
    until("they are gone", || !is_there(&life, id) && !is_there(&life, image));
    assert_eq!((world.domain(id), world.disk_count()), (None, 1));
    assert_eq!(life.observed(outside), State::Stopped);
}

#[test]
fn a_clock_that_is_set_a_year_forward_or_back_hurries_nothing() {
    let (world, clock) = (World::new(), TestClock::new());
    let life = live(&world, &clock);
    let id = binned(&life);
    let (by_hand, soon) = (binned(&life), clock_now(&clock) + DAY.as_secs());
    life.change(&alice(), by_hand, InstanceChange::ExpiresAt(Some(soon))).unwrap();
    clock.set(|now| now + 365 * DAY.as_secs());
    looked(&life);
    assert!(is_there(&life, id) && is_there(&life, by_hand));
    clock.set(|now| now - 2 * 365 * DAY.as_secs());
    clock.pass(RETENTION);
    looked(&life);
    assert!(is_there(&life, id), "the move into the bin lies in the future: nobody knows when it was");
    clock.set(|now| now + 365 * DAY.as_secs());
    life.engine.keep();
    until("both clocks say so", || !is_there(&life, id));
}

fn clock_now(clock: &TestClock) -> u64 {
    instancefs::workflow::uptime::Clock::now(clock)
}

#[test]
fn the_time_that_the_host_was_off_does_not_count() {
    let (world, clock) = (World::new(), TestClock::new());
    let id = {
        let life = live(&world, &clock);
        let id = binned(&life);
        clock.pass(RETENTION / 2);
        id
    };
    clock.reboot(30 * DAY);
    let life = live(&world, &clock);
    looked(&life);
    assert!(is_there(&life, id), "it was not on for that long");
    clock.pass(RETENTION / 2 - Duration::from_secs(2));
    looked(&life);
    assert!(is_there(&life, id));
    drop(life);
    clock.pass(Duration::from_secs(2));
    let life = live(&world, &clock);
    until("it was on for that long, with us or without", || !is_there(&life, id));
}

#[test]
fn without_a_time_that_makes_sense_nothing_expires() {
    let (world, clock) = (World::new(), TestClock::new());
    let life = live(&world, &clock);
    let far = clock_now(&clock) + 10_000 * DAY.as_secs();
    let (without, unknown, future) = (binned(&life), binned(&life), binned(&life));
    edit(&life, without, |entry| entry.expiry = None);
    edit(&life, unknown, |entry| entry.deleted_at = 0);
    edit(&life, future, |entry| entry.deleted_at = far);
    clock.pass(3650 * DAY);
    looked(&life);
    assert!([without, unknown, future].iter().all(|id| is_there(&life, *id)));
    assert_eq!(world.disk_count(), 3);
}

#[test]
fn retention_can_be_never_and_expires_at_can_be_now() {
    let (world, clock) = (World::new(), TestClock::new());
    let life = world.live_on(world.store.clone(), |settings| {
        settings.clock = clock.clone();
        settings.retention = None;
    });
    let (kept, due) = (binned(&life), binned(&life));
    clock.pass(3650 * DAY);
    looked(&life);
    assert!(is_there(&life, kept));
    let at = clock_now(&clock);
    life.change(&alice(), due, InstanceChange::ExpiresAt(Some(at))).unwrap();
    until("it is gone", || !is_there(&life, due));
    life.change(&alice(), kept, InstanceChange::ExpiresAt(Some(at + 60))).unwrap();
    life.change(&alice(), kept, InstanceChange::ExpiresAt(None)).unwrap();
    clock.pass(DAY);
    looked(&life);
    assert!(is_there(&life, kept));
}

#[test]
fn what_is_protected_is_not_reclaimed_which_is_shown_once() {
    let (world, clock) = (World::new(), TestClock::new());
    let life = live(&world, &clock);
    let (locked, protected) = (binned(&life), binned(&life));
    let both = [(locked, InstanceChange::Locked(true)), (protected, InstanceChange::DisableTerminate(true))];
    for (id, change) in both {
        life.change(&alice(), id, change).unwrap();
    }
    clock.pass(RETENTION);
    for _ in 0..3 {
        looked(&life);
    }
    for id in [locked, protected] {
        let record = &life.instance(id).record;
        assert_eq!(record.errors.lines.len(), 1, "{:?}", record.errors);
        assert_eq!(
            (record.errors.lines[0].login.as_str(), record.errors.lines[0].errno.as_str()),
            ("instancefs", "EPERM")
        );
    }
    assert_eq!(world.disk_count(), 2);
    life.change(&alice(), locked, InstanceChange::Locked(false)).unwrap();
    until("it is gone", || !is_there(&life, locked));
    assert!(is_there(&life, protected));
}

#[test]
fn a_machine_that_was_started_outside_is_not_reclaimed_while_it_runs() {
    let (world, clock) = (World::new(), TestClock::new());
    let life = live(&world, &clock);
    let id = binned(&life);
    world.control(json!({ "do": "start", "uuid": id }));
    until("it is seen", || life.instance(id).observed().reason == "running");
    clock.pass(RETENTION);
    looked(&life);
    looked(&life);
    assert_eq!((life.observed(id), world.disk_count()), (State::SoftDeleted, 1));
    assert!(life.last_error(id).unwrap().contains("it runs"));
    assert_eq!(life.instance(id).record.errors.lines.len(), 1);
    world.control(json!({ "do": "stop", "uuid": id }));
    until("it is seen", || life.instance(id).observed().reason != "running");
    life.engine.keep();
    until("it is gone", || !is_there(&life, id));
}

#[test]
fn a_start_between_the_look_and_the_deletion_keeps_the_disks() {
    let (world, clock) = (World::new(), TestClock::new());
    let life = live(&world, &clock);
    let id = binned(&life);
    world.control(json!({ "do": "fault", "call": "domains", "mode": "hang", "times": 1 }));
    clock.pass(RETENTION);
    life.engine.keep();
    until("it is being deleted", || world.is_pending("domains"));
    world.control(json!({ "do": "start", "uuid": id }));
    world.control(json!({ "do": "release", "call": "domains" }));
    life.wait_idle(id);
    assert!(is_there(&life, id) && world.domain(id).is_some());
    assert_eq!((world.disk_count(), life.last_task(id).record.state), (1, TaskState::Failure));
}

#[test]
fn what_a_move_into_the_bin_left_to_do_is_tried_again_unless_it_is_locked() {
    let (world, clock) = (World::new(), TestClock::new());
    let life = live(&world, &clock);
    let id = life.active();
    life.change(&alice(), id, InstanceChange::Autostart(true)).unwrap();
    world.fail("set_autostart");
    life.state(id, State::SoftDeleted).unwrap_err();
    life.wait_idle(id);
    let is_settled = || life.instance(id).record.bin.as_ref().unwrap().is_settled;
    assert_eq!((life.observed(id), is_settled()), (State::SoftDeleted, false));
    life.change(&alice(), id, InstanceChange::Locked(true)).unwrap();
    looked(&life);
    assert!(!is_settled());
    assert!(matches!(life.change(&alice(), id, InstanceChange::Restore), Err(Reason::Locked(_))));
    life.change(&alice(), id, InstanceChange::Locked(false)).unwrap();
    life.engine.keep();
    until("it is settled", is_settled);
    assert!(!world.domain(id).unwrap().autostart);
    let bin = life.instance(id).record.bin.clone().unwrap();
    assert_eq!((bin.state, bin.entry.deleted_by.as_str()), (State::Active, "alice"));
    life.wait_idle(id);
    life.change(&alice(), id, InstanceChange::Restore).unwrap();
    assert!(world.domain(id).unwrap().autostart);
}

#[test]
fn what_expires_before_its_guest_was_shut_down_is_shut_down_first() {
    let (world, clock) = (World::new(), TestClock::new());
    let life = live(&world, &clock);
    let id = life.active();
    world.control(json!({ "do": "fault", "call": "shutdown", "mode": "hang", "times": 1 }));
    let moved = life.begin(id, State::SoftDeleted);
    until("shutdown hangs", || world.is_pending("shutdown"));
    life.change(&alice(), id, InstanceChange::Locked(true)).unwrap();
    world.control(json!({ "do": "guest", "uuid": id, "ignores_acpi": true }));
    world.control(json!({ "do": "release", "call": "shutdown" }));
    moved.recv_timeout(DEADLINE).unwrap().unwrap_err();
    clock.pass(RETENTION);
    looked(&life);
    assert_eq!((life.observed(id), world.power(id)), (State::SoftDeleted, PowerState::Running));
    world.control(json!({ "do": "guest", "uuid": id, "ignores_acpi": false }));
    life.change(&alice(), id, InstanceChange::Locked(false)).unwrap();
    until("it is gone", || {
        life.engine.keep();
        !is_there(&life, id)
    });
    assert_eq!((world.calls("power_off"), world.disk_count()), (0, 0));
}

#[test]
fn one_that_hangs_in_the_hypervisor_holds_up_nobody_else() {
    let (world, clock) = (World::new(), TestClock::new());
    let life = live(&world, &clock);
    let (hanging, other) = (binned(&life), binned(&life));
    world.control(json!({ "do": "fault", "call": "undefine", "uuid": hanging, "mode": "hang" }));
    clock.pass(RETENTION);
    life.engine.keep();
    until("the other is gone", || !is_there(&life, other));
    until("the first one hangs", || world.is_pending("undefine"));
    looked(&life);
    world.control(json!({ "do": "release", "call": "undefine" }));
    until("it is gone too", || !is_there(&life, hanging));
    assert!(world.hypervisor.domains().unwrap().is_empty());
}
