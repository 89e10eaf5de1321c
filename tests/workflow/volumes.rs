//! Volumes: what can be said of a draft and who may say it; made, grown, kept as snapshots, examined, deleted.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use instancefs::hypervisor::Hypervisor;
use instancefs::inventory::{Object, Volume};
use instancefs::model::caller::Caller;
use instancefs::model::change::ImageChange;
use instancefs::model::reason::Reason;
use instancefs::model::volume::change::VolumeChange;
use instancefs::model::volume::record::Origin;
use instancefs::model::volume::{State, Word};
use instancefs::model::{Class, image};
use instancefs::workflow::request::{Request, Wait};
use uuid::Uuid;

use crate::lab::{DEADLINE, IMAGE_BYTES, Life, RETENTION, TestClock, World, alice, bob, root, until};

#[test]
fn a_draft_takes_values_of_its_owner_and_is_locked_for_root_too() {
    let world = World::new();
    let life = world.live();
    let id = Uuid::new_v4();
    life.ask(&alice(), Request::MakeDraft { class: Class::Volume, id }).unwrap();
    life.change_volume(&alice(), id, VolumeChange::SizeBytes(1 << 30)).unwrap();
    let refused = life.change_volume(&bob(), id, VolumeChange::SizeBytes(2 << 30)).unwrap_err();
    assert_eq!(refused.errno(), libc::EACCES);
    let existing = Origin::Existing { backend: "memory".to_owned(), reference: "a".to_owned() };
    let refused = life.change_volume(&alice(), id, VolumeChange::CreatedFrom(existing)).unwrap_err();
    assert_eq!(refused.errno(), libc::EPERM);
    life.change_volume(&alice(), id, VolumeChange::Locked(true)).unwrap();
    let refused = life.change_volume(&root(), id, VolumeChange::SizeBytes(2 << 30)).unwrap_err();
    assert_eq!(refused.errno(), libc::EPERM);
    assert_eq!(life.inventory.volume(id).unwrap().record.size_bytes, 1 << 30);
}

const GIBIBYTE: u64 = 1 << 30;

/// A draft of alice's with these values, which root writes.
pub fn draft(life: &Life<'_>, changes: Vec<VolumeChange>) -> Uuid {
    let id = Uuid::new_v4();
    life.ask(&alice(), Request::MakeDraft { class: Class::Volume, id }).unwrap();
    if !changes.is_empty() {
        life.ask(&root(), Request::Volume { id, changes }).unwrap();
    }
    id
}

fn to(state: State) -> VolumeChange {
    VolumeChange::State(Word::State(state))
}

fn deleted() -> VolumeChange {
    VolumeChange::State(Word::Deleted)
}

fn make(life: &Life<'_>, caller: &Caller, id: Uuid) -> Result<(), Reason> {
    life.change_volume(caller, id, to(State::Available))
}

/// An available one of 1 GiB, alice's.
pub fn available(life: &Life<'_>) -> Uuid {
    let id = draft(life, vec![VolumeChange::SizeBytes(GIBIBYTE)]);
    make(life, &alice(), id).unwrap();
    id
}

/// The same in the bin, with a snapshot.
pub fn binned(life: &Life<'_>) -> Uuid {
    let id = with_snapshot(life);
    life.change_volume(&alice(), id, to(State::SoftDeleted)).unwrap();
    id
}

/// The same with a snapshot.
pub fn with_snapshot(life: &Life<'_>) -> Uuid {
    let id = available(life);
    life.change_volume(&alice(), id, VolumeChange::TakeSnapshot("monday".to_owned())).unwrap();
    id
}

fn volume(life: &Life<'_>, id: Uuid) -> Arc<Volume> {
    life.inventory.volume(id).expect("it exists")
}

fn state(life: &Life<'_>, id: Uuid) -> State {
    volume(life, id).record.state()
}

fn data(life: &Life<'_>, id: Uuid) -> PathBuf {
    life.world.disks.volumes.path(volume(life, id).record.data.as_ref().expect("data"))
}

fn references(life: &Life<'_>) -> usize {
    life.world.disks.volumes.references().len()
}

fn of(origin: Origin) -> Vec<VolumeChange> {
    vec![VolumeChange::CreatedFrom(origin)]
}

fn errno(result: Result<(), Reason>) -> i32 {
    result.err().map_or(0, |reason| reason.errno())
}

/// A new file in the place of data that is there.
fn existing(life: &Life<'_>, name: &str) -> Origin {
    let directory = &life.world.disks.volumes.directory;
    fs::create_dir_all(directory).unwrap();
    fs::write(directory.join(name), "size 4096 raw\nsomebody's\n").unwrap();
    Origin::Existing { backend: "memory".to_owned(), reference: name.to_owned() }
}

#[test]
fn volumes_are_made_of_nothing_an_image_a_volume_and_a_snapshot() {
    let world = World::new();
    let life = world.live();
    let first = with_snapshot(&life);
    let origins = [
        (Origin::Image(world.image), IMAGE_BYTES, true),
        (Origin::Volume(first), GIBIBYTE, false),
        (Origin::Snapshot { volume: first, name: "monday".to_owned() }, GIBIBYTE, false),
    ];
    for (origin, size, bootable) in origins {
        let id = draft(&life, of(origin));
        make(&life, &alice(), id).unwrap();
        let record = &volume(&life, id).record;
        assert_eq!((record.state(), record.size_bytes, record.bootable), (State::Available, size, bootable));
        assert!(data(&life, id).exists());
    }
    let unsaid = draft(&life, vec![]);
    assert_eq!(errno(make(&life, &alice(), unsaid)), libc::EINVAL);
    let small = draft(&life, vec![VolumeChange::CreatedFrom(Origin::Volume(first)), VolumeChange::SizeBytes(4096)]);
    assert_eq!(errno(make(&life, &alice(), small)), libc::ERANGE);
    let none = draft(&life, of(Origin::Snapshot { volume: first, name: "sunday".to_owned() }));
    assert_eq!(errno(make(&life, &alice(), none)), libc::ENOENT);
}

#[test]
fn the_right_to_what_is_copied_is_asked_for_again_when_it_is_copied() {
    let world = World::new();
    let life = world.live();
    let source = available(&life);
    let id = draft(&life, of(Origin::Volume(source)));
    life.change_volume(&root(), source, VolumeChange::Owner(bob().uid)).unwrap();
    assert_eq!(errno(make(&life, &alice(), id)), libc::EACCES);
    life.change_volume(&root(), source, VolumeChange::Owner(alice().uid)).unwrap();
    assert_eq!(errno(make(&life, &alice(), id)), 0);
    let existing = existing(&life, "file");
    let id = draft(&life, of(existing));
    assert_eq!(errno(make(&life, &alice(), id)), libc::EPERM);
}

#[test]
fn a_volume_that_is_copied_is_left_alone_until_the_copy_is_there() {
    let world = World::new();
    let life = world.live();
    let (source, instance) = (with_snapshot(&life), life.stopped());
    let copy = draft(&life, of(Origin::Volume(source)));
    *world.disks.volumes.holds.lock() = true;
    let changes = vec![to(State::Available)];
    let answer = life.submit(&alice(), Request::Volume { id: copy, changes }, Wait::Settle);
    until("it is being made", || volume(&life, copy).task.as_ref().is_some_and(|task| task.progress == 42));
    let image = life.change_volume(&alice(), copy, VolumeChange::Name("x".to_owned()));
    assert_eq!(errno(image), libc::EBUSY);
    let monday = || "monday".to_owned();
    for change in [
        VolumeChange::SizeBytes(2 * GIBIBYTE),
        VolumeChange::Attach { instance, device: None },
        VolumeChange::LocalAttach(true),
        VolumeChange::Unmanage,
    ] {
        let refused = life.change_volume(&root(), source, change.clone()).unwrap_err();
        assert_eq!(refused.errno(), libc::EBUSY, "{change:?}: {refused}");
    }
    assert_eq!(errno(life.change_volume(&alice(), source, VolumeChange::DeleteSnapshot(monday()))), 0);
    assert_eq!(errno(life.change_volume(&alice(), source, to(State::SoftDeleted))), 0);
    assert_eq!(errno(life.change_volume(&alice(), source, deleted())), libc::EBUSY);
    *world.disks.volumes.holds.lock() = false;
    answer.recv_timeout(DEADLINE).unwrap().unwrap();
    assert_eq!(errno(life.change_volume(&alice(), source, deleted())), 0);
    until("it is gone", || life.inventory.volume(source).is_none());
    assert_eq!((state(&life, copy), data(&life, copy).exists()), (State::Available, true));
}

#[test]
fn a_volume_that_somebody_may_write_to_is_not_copied() {
    let world = World::new();
    let life = world.live();
    let (source, instance) = (available(&life), life.stopped());
    life.change_volume(&alice(), source, VolumeChange::Attach { instance, device: None }).unwrap();
    let copy = draft(&life, of(Origin::Volume(source)));
    assert_eq!(errno(make(&life, &alice(), copy)), libc::EBUSY);
    assert_eq!(errno(life.change_volume(&alice(), source, VolumeChange::TakeSnapshot("a".to_owned()))), libc::EBUSY);
    assert!(volume(&life, source).record.snapshots.is_empty());
}

#[test]
fn what_fails_leaves_a_draft_and_nothing_else_and_one_that_is_asked_gives_up() {
    let world = World::new();
    let life = world.live();
    let id = draft(&life, vec![VolumeChange::SizeBytes(GIBIBYTE)]);
    *world.disks.volumes.create_fails.lock() = true;
    assert_eq!(errno(make(&life, &alice(), id)), libc::ENOSPC);
    assert_eq!((state(&life, id), &volume(&life, id).record.data, references(&life)), (State::Draft, &None, 0));
    *world.disks.volumes.create_fails.lock() = false;
    *world.disks.volumes.holds.lock() = true;
    let answer = life.submit(&alice(), Request::Volume { id, changes: vec![to(State::Available)] }, Wait::Settle);
    until("it is being made", || volume(&life, id).task.as_ref().is_some_and(|task| task.progress > 0));
    let task = volume(&life, id).task.as_ref().map(|task| task.id).unwrap();
    life.ask(&alice(), Request::Cancel { id: task, class: Class::Volume, object: id }).unwrap();
    answer.recv_timeout(DEADLINE).unwrap().unwrap_err();
    assert_eq!((state(&life, id), references(&life)), (State::Draft, 0));
    *world.disks.volumes.holds.lock() = false;
    assert_eq!(errno(make(&life, &alice(), id)), 0);
}

#[test]
fn what_could_not_be_taken_back_goes_with_the_next_try_or_with_the_draft() {
    let world = World::new();
    let life = world.live();
    let left = |discarded: bool| {
        let id = draft(&life, vec![VolumeChange::SizeBytes(GIBIBYTE)]);
        let volumes = &world.disks.volumes;
        *volumes.holds.lock() = true;
        let answer = life.submit(&alice(), Request::Volume { id, changes: vec![to(State::Available)] }, Wait::Settle);
        until("it is being made", || volume(&life, id).task.as_ref().is_some_and(|task| task.progress > 0));
        let task = volume(&life, id).task.as_ref().map(|task| task.id).unwrap();
        *volumes.remove_fails.lock() = true;
        life.ask(&alice(), Request::Cancel { id: task, class: Class::Volume, object: id }).unwrap();
        *volumes.holds.lock() = false;
        answer.recv_timeout(DEADLINE).unwrap().unwrap_err();
        assert!(volume(&life, id).record.data.is_some(), "it is known");
        *volumes.remove_fails.lock() = false;
        if discarded {
            life.change_volume(&alice(), id, deleted()).unwrap();
            until("it is gone", || life.inventory.volume(id).is_none());
        } else {
            make(&life, &alice(), id).unwrap();
        }
    };
    left(true);
    assert_eq!(references(&life), 0);
    left(false);
    assert_eq!(references(&life), 1);
}

#[test]
fn a_volume_grows_and_never_shrinks() {
    let world = World::new();
    let life = world.live();
    let id = available(&life);
    let grow = |size| errno(life.change_volume(&alice(), id, VolumeChange::SizeBytes(size)));
    assert_eq!((grow(2 * GIBIBYTE), grow(2 * GIBIBYTE), grow(GIBIBYTE)), (0, 0, libc::ERANGE));
    assert_eq!(volume(&life, id).record.size_bytes, 2 * GIBIBYTE);
    *world.disks.volumes.grow_fails.lock() = true;
    assert_eq!(grow(3 * GIBIBYTE), libc::ENOSPC);
    assert_eq!((state(&life, id), volume(&life, id).record.size_bytes), (State::Available, 2 * GIBIBYTE));
}

#[test]
fn a_volume_without_its_data_is_in_error_until_it_is_back() {
    let world = World::new();
    let life = world.live();
    let id = available(&life);
    let (path, away) = (data(&life, id), world.directory.path().join("away"));
    fs::rename(&path, &away).unwrap();
    assert_eq!(errno(life.change_volume(&alice(), id, VolumeChange::SizeBytes(2 * GIBIBYTE))), libc::ENOENT);
    assert_eq!(state(&life, id), State::Error);
    assert_eq!(errno(make(&life, &alice(), id)), libc::ENOENT);
    fs::rename(&away, &path).unwrap();
    assert_eq!((errno(make(&life, &alice(), id)), state(&life, id)), (0, State::Available));
    fs::write(&path, "size 4096 qcow2\n").unwrap();
    let name = "cut".to_owned();
    assert_eq!(errno(life.change_volume(&alice(), id, VolumeChange::TakeSnapshot(name))), libc::EBADMSG);
    assert_eq!((state(&life, id), volume(&life, id).record.snapshots.is_empty()), (State::Error, true));
}

#[test]
fn snapshots_are_taken_and_deleted_by_name() {
    let world = World::new();
    let life = world.live();
    let id = with_snapshot(&life);
    let (take, delete) = (
        |name: &str| errno(life.change_volume(&alice(), id, VolumeChange::TakeSnapshot(name.to_owned()))),
        |name: &str| errno(life.change_volume(&alice(), id, VolumeChange::DeleteSnapshot(name.to_owned()))),
    );
    let complete = || {
        let record = volume(&life, id).record.clone();
        record.snapshots.iter().map(|(name, entry)| (name.to_owned(), entry.value.data.is_some())).collect::<Vec<_>>()
    };
    assert_eq!((take("monday"), delete("sunday")), (libc::EEXIST, libc::ENOENT));
    *world.disks.volumes.create_fails.lock() = true;
    assert_eq!(take("tuesday"), libc::ENOSPC);
    assert_eq!(complete(), [("monday".to_owned(), true)]);
    *world.disks.volumes.create_fails.lock() = false;
    life.change_volume(&alice(), id, VolumeChange::DeleteProtection(true)).unwrap();
    assert_eq!(delete("monday"), libc::EPERM);
    life.change_volume(&alice(), id, VolumeChange::DeleteProtection(false)).unwrap();
    assert_eq!((references(&life), delete("monday"), references(&life)), (2, 0, 1));
    assert_eq!(complete(), []);
    assert!(data(&life, id).exists());
}

#[test]
fn what_is_deleted_for_good_takes_its_data_and_snapshots_along_and_only_from_the_bin() {
    let world = World::new();
    let life = world.live();
    let (id, other) = (with_snapshot(&life), available(&life));
    assert_eq!(errno(life.change_volume(&alice(), id, deleted())), libc::EPERM);
    life.change_volume(&alice(), id, to(State::SoftDeleted)).unwrap();
    life.change_volume(&alice(), id, VolumeChange::DeleteProtection(true)).unwrap();
    assert_eq!(errno(life.change_volume(&alice(), id, deleted())), libc::EPERM);
    life.change_volume(&alice(), id, VolumeChange::DeleteProtection(false)).unwrap();
    *world.disks.volumes.remove_fails.lock() = true;
    assert_eq!(errno(life.change_volume(&alice(), id, deleted())), libc::EIO);
    assert_eq!((state(&life, id), references(&life)), (State::SoftDeleted, 3));
    *world.disks.volumes.remove_fails.lock() = false;
    life.change_volume(&alice(), id, deleted()).unwrap();
    until("it is gone", || life.inventory.volume(id).is_none());
    assert_eq!((references(&life), data(&life, other).exists()), (1, true));
}

#[test]
fn a_volume_that_a_definition_names_is_not_deleted() {
    let world = World::new();
    let life = world.live();
    let (id, instance) = (available(&life), life.stopped());
    life.change_volume(&alice(), id, to(State::SoftDeleted)).unwrap();
    let xml = world.hypervisor.definition(instance).unwrap();
    let path = data(&life, id);
    let disk = format!("<disk type='file'><source file='{}'/><target dev='vdz'/></disk></devices>", path.display());
    world.hypervisor.define(&xml.replace("</devices>", &disk)).unwrap();
    let refused = life.change_volume(&alice(), id, deleted()).unwrap_err();
    assert_eq!(refused.errno(), libc::EBUSY, "{refused}");
    assert!(path.exists());
}

#[test]
fn data_that_was_there_is_taken_over_once_and_kept_for_ever() {
    let world = World::new();
    let life = world.live();
    let origin = existing(&life, "disk");
    let path = world.disks.volumes.directory.join("disk");
    let before = fs::read(&path).unwrap();
    let id = draft(&life, of(origin.clone()));
    make(&life, &root(), id).unwrap();
    assert_eq!((state(&life, id), volume(&life, id).record.size_bytes), (State::Available, 4096));
    let second = draft(&life, of(origin.clone()));
    let refused = make(&life, &root(), second).unwrap_err();
    assert_eq!(refused.errno(), libc::EEXIST, "{refused}");
    let other = available(&life);
    let reference = data(&life, other).display().to_string();
    let third = draft(&life, of(Origin::Existing { backend: "memory".to_owned(), reference }));
    let refused = make(&life, &root(), third).unwrap_err();
    assert!(refused.errno() == libc::EEXIST && refused.to_string().contains(&other.to_string()), "{refused}");
    let wrong = draft(&life, vec![VolumeChange::CreatedFrom(existing(&life, "larger")), VolumeChange::SizeBytes(8192)]);
    assert_eq!(errno(make(&life, &root(), wrong)), libc::ERANGE);
    life.change_volume(&root(), id, to(State::SoftDeleted)).unwrap();
    life.change_volume(&root(), id, deleted()).unwrap();
    until("it is forgotten", || life.inventory.volume(id).is_none());
    assert_eq!(fs::read(&path).unwrap(), before);
    let events = fs::read_to_string(life.events.path()).unwrap();
    assert!(events.lines().any(|line| line.contains("kept") && line.contains(path.to_str().unwrap())), "{events}");
    assert_eq!(errno(make(&life, &root(), second)), 0, "it is free again");
}

#[test]
fn an_image_is_kept_while_a_volume_is_made_of_it_and_not_longer() {
    let world = World::new();
    let life = world.live();
    let id = draft(&life, of(Origin::Image(world.image)));
    life.change_image(&alice(), world.image, ImageChange::State(image::Word::State(image::State::SoftDeleted)))
        .unwrap();
    assert_eq!(errno(make(&life, &alice(), id)), libc::EINVAL);
    life.change_image(&alice(), world.image, ImageChange::State(image::Word::State(image::State::Active))).unwrap();
    *world.disks.volumes.holds.lock() = true;
    let answer = life.submit(&alice(), Request::Volume { id, changes: vec![to(State::Available)] }, Wait::Settle);
    until("it is being made", || volume(&life, id).task.as_ref().is_some_and(|task| task.progress > 0));
    life.change_image(&alice(), world.image, ImageChange::State(image::Word::State(image::State::SoftDeleted)))
        .unwrap();
    let delete = || life.change_image(&alice(), world.image, ImageChange::State(image::Word::Deleted));
    assert_eq!(errno(delete()), libc::EBUSY);
    *world.disks.volumes.holds.lock() = false;
    answer.recv_timeout(DEADLINE).unwrap().unwrap();
    assert_eq!(errno(delete()), 0);
}

#[test]
fn what_has_expired_in_the_bin_is_deleted_and_what_is_offered_never() {
    let (world, clock) = (World::new(), TestClock::new());
    let set = clock.clone();
    let life = world.live_on(world.store.clone(), |settings| settings.clock = set);
    let (expired, offered) = (binned(&life), available(&life));
    life.ledger
        .transact(|batch| {
            let mut volume = (*batch.volume(offered).unwrap()).clone();
            volume.record.transfer = Some(Uuid::new_v4());
            batch.put(Object::Volume(Arc::new(volume)));
        })
        .unwrap();
    clock.pass(RETENTION - Duration::from_secs(1));
    crate::keeper::looked(&life);
    assert_eq!(state(&life, expired), State::SoftDeleted);
    clock.pass(RETENTION);
    life.engine.keep();
    until("it is gone", || life.inventory.volume(expired).is_none());
    assert_eq!((state(&life, offered), references(&life)), (State::AwaitingTransfer, 1));
}

#[test]
fn a_volume_is_made_by_the_next_life_if_the_first_ends_in_the_middle() {
    let world = World::new();
    let (id, source) = {
        let life = world.live();
        let source = available(&life);
        let id = draft(&life, of(Origin::Volume(source)));
        *world.disks.volumes.holds.lock() = true;
        let changes = vec![to(State::Available)];
        drop(life.submit(&alice(), Request::Volume { id, changes }, Wait::Accepted));
        until("it is being made", || volume(&life, id).task.as_ref().is_some_and(|task| task.progress > 0));
        (id, source)
    };
    *world.disks.volumes.holds.lock() = false;
    let life = world.live();
    until("it is made", || state(&life, id) == State::Available);
    assert_eq!((references(&life), state(&life, source)), (2, State::Available));
}
