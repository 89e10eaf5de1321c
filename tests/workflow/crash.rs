//! The power goes at each commit, and again at each commit of the recovery, on SQLite: of a boot, and of operations that
//! fail beside it. What every operation does without that is enumerated in [`crate::rig`].

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use instancefs::block::{BlockBackend, DiskRole};
use instancefs::hypervisor::Hypervisor;
use instancefs::hypervisor::definition::Definition;
use instancefs::inventory::Instance;
use instancefs::model::change::InstanceChange;
use instancefs::model::instance::{State, Word};
use instancefs::model::task::TaskState;
use instancefs::store::power_loss::{Moment, PowerLoss};
use instancefs::store::{Change, Store};
use instancefs::workflow::request::{Request, Wait};
use serde_json::json;
use uuid::Uuid;

use crate::lab::{IMAGE_BYTES, Life, World, alice, until};

const MOMENTS: [Moment; 2] = [Moment::Before, Moment::After];

struct Case {
    /// Makes the object.
    setup: fn(&Life<'_>) -> Uuid,
    changes: Vec<InstanceChange>,
    /// Looks at the end: fully done or fully back.
    check: fn(&Life<'_>, Uuid),
}

fn to(state: State) -> InstanceChange {
    InstanceChange::State(Word::State(state))
}

/// Runs a life until its power goes or its work is done; true if the power went.
fn run_until_lost(world: &World, at: u64, moment: Moment, id: Uuid, changes: Option<&[InstanceChange]>) -> bool {
    let store: Arc<PowerLoss<Arc<dyn Store>>> = Arc::new(PowerLoss::new(world.store.clone(), at, moment));
    let life = world.live_on(store.clone(), |_| {});
    let answered =
        changes.map(|changes| life.submit(&alice(), Request::Instance { id, changes: changes.to_vec() }, Wait::Settle));
    until("the work is done, or the power gone", || {
        store.lost()
            || (answered.as_ref().is_none_or(|answered| answered.try_recv().is_ok())
                && life.inventory.instance(id).is_none_or(|instance| instance.task.is_none()))
    });
    store.lost()
}

fn everywhere(case: &Case) {
    let mut crashes = 0;
    for moment in MOMENTS {
        for at in 1.. {
            let mut lost = false;
            for again in MOMENTS {
                for recovery_at in 1.. {
                    let world = World::new();
                    let id = (case.setup)(&world.live());
                    lost = run_until_lost(&world, at, moment, id, Some(&case.changes));
                    if !lost {
                        break;
                    }
                    crashes += 1;
                    let lost_again = run_until_lost(&world, recovery_at, again, id, None);
                    let life = world.live();
                    life.wait_idle(id);
                    is_tidy(&life);
                    (case.check)(&life, id);
                    if !lost_again {
                        break;
                    }
                }
            }
            if !lost {
                break;
            }
        }
    }
    assert!(crashes >= 6, "only {crashes} crashes: the power never went where it matters");
}

/// No claim, no unfinished task, and each disk recorded by who has it.
fn is_tidy(life: &Life<'_>) {
    for task in life.inventory.tasks() {
        assert!(task.record.state.is_final(), "{task:?}");
    }
    let mut recorded = 0;
    for instance in life.inventory.instances() {
        assert_eq!((&instance.task, instance.record.operation), (&None, None));
        for disk in &instance.record.disks {
            assert_eq!(life.world.disks.disks.lock().get(&disk.reference), Some(&disk.operation), "a disk is lost");
            recorded += 1;
        }
    }
    assert_eq!(life.world.disk_count(), recorded, "a disk leaked");
    let mut copies: Vec<_> = life.inventory.instances().iter().flat_map(|instance| copies_of(instance)).collect();
    let mut there: Vec<_> = life.world.shelf();
    copies.sort();
    there.sort();
    let directory = life.world.directory.path().join("shelf");
    let copies: Vec<_> = copies.into_iter().map(|copy| directory.join(copy)).collect();
    assert_eq!(there, copies, "a copy is lost, or leaked");
}

/// The copies that an instance's record tells of.
fn copies_of(instance: &Instance) -> Vec<String> {
    let shelf = instance.record.shelf.iter();
    let copies = shelf.flat_map(|shelf| shelf.copies.iter().map(|copy| &copy.of).chain(&shelf.former));
    copies.map(|copy| format!("{}/{}-{}", instance.id, copy.operation, copy.disk.reference)).collect()
}

fn boots(world: &World, id: Uuid) -> u64 {
    let list = world.control(json!({ "do": "list" }));
    let guests = list["guests"].as_array().unwrap();
    let guest = guests.iter().find(|guest| guest["domain"]["uuid"] == json!(id)).expect("the guest exists");
    guest["boots"].as_u64().unwrap()
}

fn is_draft_without_traces(life: &Life<'_>, id: Uuid) {
    assert_eq!(life.observed(id), State::Draft);
    assert_eq!((life.world.disk_count(), life.world.domain(id)), (0, None));
}

#[test]
fn booting() {
    everywhere(&Case {
        setup: |life| life.draft_with_image(),
        changes: vec![to(State::Active)],
        check: |life, id| match life.observed(id) {
            State::Active => {
                assert_eq!((life.world.disk_count(), boots(life.world, id)), (1, 1));
                assert_eq!(life.instance(id).record.draft, None);
            }
            _ => is_draft_without_traces(life, id),
        },
    });
}

#[test]
fn booting_in_vain() {
    everywhere(&Case {
        setup: |life| {
            life.world.control(json!({ "do": "fault", "call": "start", "mode": "fail" }));
            life.draft_with_image()
        },
        changes: vec![to(State::Active)],
        check: |life, id| {
            is_draft_without_traces(life, id);
            if life.instance(id).record.last_task.is_some() {
                assert_eq!(life.last_task(id).record.state, TaskState::Failure);
                assert!(life.last_error(id).is_some());
            }
        },
    });
}

fn new_hardware() -> Vec<InstanceChange> {
    vec![
        InstanceChange::Vcpus(3),
        InstanceChange::MemoryBytes(1 << 30),
        InstanceChange::RootDiskBytes(2 << 30),
        InstanceChange::Autostart(true),
    ]
}

/// All of the definition is as before, or all of it as wanted; the record says what is true.
fn all_or_nothing(life: &Life<'_>, id: Uuid) -> bool {
    until("the definition is known", || {
        let xml = life.world.hypervisor.definition(id).unwrap();
        let definition = Definition::parse(&xml).unwrap();
        let record = &life.instance(id).record;
        (definition.vcpus, definition.memory_bytes) == (Some(record.vcpus), Some(record.memory_bytes))
    });
    let instance = life.instance(id);
    let disk = instance.record.disks[0].reference.clone();
    let grown = life.world.disks.grown.lock().get(&disk).copied().unwrap_or(IMAGE_BYTES);
    assert_eq!(instance.record.root_disk_bytes, Some(grown));
    assert_eq!(life.world.domain(id).unwrap().autostart, instance.autostart());
    let values = (instance.record.vcpus, instance.record.memory_bytes, instance.autostart());
    if values == (1, 512 << 20, false) {
        return false;
    }
    assert_eq!((values, grown), ((3, 1 << 30, true), 2 << 30));
    true
}

#[test]
fn reconfiguring_in_vain() {
    everywhere(&Case {
        setup: |life| {
            *life.world.disks.grow_fails.lock() = true;
            life.stopped()
        },
        changes: new_hardware(),
        check: |life, id| assert!(!all_or_nothing(life, id), "half of it is left"),
    });
}

fn done_or_back(life: &Life<'_>, id: Uuid, from: State, to: State) {
    let state = life.observed(id);
    assert!(state == from || state == to, "{state:?}");
    let done = life
        .inventory
        .tasks()
        .iter()
        .filter(|task| task.record.object == id)
        .max_by_key(|task| task.record.number)
        .unwrap()
        .record
        .clone();
    // The first operation of each case is the one that made it real.
    if done.number != life.inventory.tasks().iter().map(|task| task.record.number).min().unwrap() {
        assert_eq!((done.state, state), (TaskState::Success, to));
    }
}

/// The file of its own disk.
fn root_disk(life: &Life<'_>, id: Uuid) -> std::path::PathBuf {
    life.world.disks.path(&life.instance(id).record.disks[0])
}

#[test]
fn defining_again_with_a_disk_that_was_removed() {
    everywhere(&Case {
        setup: |life| {
            let id = life.stopped();
            life.change(&alice(), id, InstanceChange::DisableTerminate(true)).unwrap();
            let disk = root_disk(life, id);
            until("its definition is known and its disk kept", || {
                life.instance(id).record.definition.is_some() && disk.metadata().unwrap().nlink() == 2
            });
            life.world.control(json!({ "do": "undefine", "uuid": id }));
            std::fs::remove_file(disk).unwrap();
            until("it is seen to be gone", || life.instance(id).domain.is_none());
            id
        },
        changes: vec![to(State::Stopped)],
        check: |life, id| {
            let is_there = life.world.domain(id).is_some();
            done_or_back(life, id, State::Error, State::Stopped);
            let disk = root_disk(life, id);
            if is_there {
                until("the disk has both names", || disk.metadata().is_ok_and(|metadata| metadata.nlink() == 2));
            }
            let linked = life.instance(id).record.kept.iter().all(|kept| kept.link.exists());
            assert_eq!((linked, life.instance(id).record.kept.len()), (true, 1));
        },
    });
}

#[test]
fn resuming_keeps_the_saved_memory() {
    everywhere(&Case {
        setup: |life| {
            let id = life.active();
            life.state(id, State::Suspended).unwrap();
            id
        },
        changes: vec![to(State::Active)],
        check: |life, id| {
            assert!([State::Suspended, State::Active].contains(&life.observed(id)));
            assert_eq!(boots(life.world, id), 1);
        },
    });
}

#[test]
fn rebooting_happens_once_at_most() {
    for change in [InstanceChange::RebootHard, InstanceChange::RebootSoft] {
        everywhere(&Case {
            setup: |life| life.active(),
            changes: vec![change],
            check: |life, id| {
                assert_eq!(life.observed(id), State::Active);
                assert!(boots(life.world, id) <= 2);
            },
        });
    }
}

/// An instance with two disks, started with the host.
fn with_seed(life: &Life<'_>) -> Uuid {
    let id = life.draft_with_image();
    life.tell(id, "#cloud-config");
    life.change(&alice(), id, InstanceChange::Autostart(true)).unwrap();
    life.state(id, State::Active).unwrap();
    id
}

/// Both disks are there with the bytes that the boot gave them.
fn has_its_disks(life: &Life<'_>, id: Uuid) {
    let disks = life.instance(id).record.disks.clone();
    assert_eq!(disks.len(), 2);
    for disk in disks {
        let bytes = std::fs::read_to_string(life.world.disks.path(&disk)).unwrap();
        assert!(bytes.starts_with(&format!("{} made by ", disk.reference)), "{bytes}");
    }
}

/// Running as before, with nothing on the shelf.
fn was_never_shelved(life: &Life<'_>, id: Uuid) {
    assert_eq!((life.observed(id), life.world.shelf().len()), (State::Active, 0));
    assert!(life.world.domain(id).unwrap().autostart);
    has_its_disks(life, id);
}

fn is_put_away(life: &Life<'_>, id: Uuid) {
    assert_eq!(life.world.shelf().len(), 2);
    assert!(!life.world.domain(id).unwrap().autostart);
    assert!(life.instance(id).record.autostart);
    match life.observed(id) {
        State::Shelved => has_its_disks(life, id),
        _ => assert_eq!(life.instance(id).record.disks, []),
    }
}

#[test]
fn shelving_in_vain_at_the_second_disk_leaves_no_copy() {
    everywhere(&Case {
        setup: |life| {
            let id = with_seed(life);
            *life.world.disks.open_fails.lock() = Some(DiskRole::Seed);
            id
        },
        changes: vec![to(State::Shelved)],
        check: was_never_shelved,
    });
}

#[test]
fn unshelving_in_vain_keeps_the_copies_and_leaves_no_disk() {
    everywhere(&Case {
        setup: |life| {
            let id = with_seed(life);
            life.state(id, State::ShelvedOffloaded).unwrap();
            let seed = life.world.shelf().into_iter().find(|copy| copy.to_str().unwrap().ends_with("-seed")).unwrap();
            std::fs::write(seed, "damaged").unwrap();
            id
        },
        changes: vec![to(State::Active)],
        check: |life, id| {
            assert_eq!(life.observed(id), State::ShelvedOffloaded);
            is_put_away(life, id);
        },
    });
}

#[test]
fn shelving_again_replaces_the_copies() {
    everywhere(&Case {
        setup: |life| {
            let id = with_seed(life);
            life.state(id, State::Shelved).unwrap();
            life.state(id, State::Active).unwrap();
            assert_eq!(life.world.shelf().len(), 2);
            id
        },
        changes: vec![to(State::Shelved)],
        check: |life, id| match life.observed(id) {
            State::Active => {
                has_its_disks(life, id);
                assert_eq!(life.world.shelf().len(), 2);
            }
            _ => is_put_away(life, id),
        },
    });
}

/// Changes a stored record behind everybody's back.
fn edit_record(world: &World, key: &str, edit: impl FnOnce(&mut serde_json::Value)) {
    let mut value = serde_json::from_slice(&world.store.get(key).unwrap().unwrap().value).unwrap();
    edit(&mut value);
    world.store.transact(&[], &[Change::Put(key.to_owned(), value.to_string().into_bytes())]).unwrap();
}

#[test]
fn finished_tasks_go_after_their_time() {
    let world = World::new();
    let (id, old, new) = {
        let life = world.live();
        let id = life.stopped();
        let old = life.last_task(id).id;
        let other = life.stopped();
        (id, old, life.last_task(other).id)
    };
    edit_record(&world, &format!("tasks/{old}"), |task| task["ended_at"] = json!(1));
    let life = world.live();
    until("the old one is gone", || life.inventory.task(old).is_none());
    assert!(life.inventory.task(new).is_some());
    assert_eq!(life.instance(id).record.last_task, None);
    assert_eq!(world.store.get(&format!("tasks/{old}")).unwrap(), None);
}

#[test]
fn a_task_whose_object_is_gone_is_ended() {
    let world = World::new();
    let (id, task) = {
        let life = world.live();
        let id = life.draft_with_image();
        life.world.fail("start");
        life.state(id, State::Active).unwrap_err();
        (id, life.last_task(id).id)
    };
    edit_record(&world, &format!("tasks/{task}"), |task| {
        task["state"] = json!("processing");
        task["ended_at"] = json!(null);
    });
    world.store.transact(&[], &[Change::Delete(format!("instances/{id}"))]).unwrap();
    let life = world.live();
    let task = life.inventory.task(task).unwrap();
    assert_eq!((task.record.state, task.record.errno), (TaskState::Failure, libc::ENOENT));
    assert!(task.record.ended_at.is_some());
}

fn is_binned(life: &Life<'_>, id: Uuid) -> bool {
    life.instance(id).record.bin.is_some()
}

/// A running guest, started with the host, in the bin.
fn binned(life: &Life<'_>) -> Uuid {
    let id = life.active();
    life.change(&alice(), id, InstanceChange::Autostart(true)).unwrap();
    life.state(id, State::SoftDeleted).unwrap();
    life.wait_idle(id);
    id
}

#[test]
fn restoring_in_vain() {
    everywhere(&Case {
        setup: |life| {
            let id = binned(life);
            life.world.control(json!({ "do": "fault", "call": "start", "mode": "fail" }));
            id
        },
        changes: vec![InstanceChange::Restore],
        check: |life, id| {
            assert!(!life.world.domain(id).unwrap().power.is_on());
            assert_eq!(life.world.disk_count(), 1, "a failed start took a disk");
            if !is_binned(life, id) {
                assert_eq!(life.observed(id), State::Stopped);
                assert!(life.last_error(id).is_some());
            }
        },
    });
}
