//! Volumes as block devices of the host: who may, what is refused, and what restarts and deaths do to them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Duration;

use instancefs::inventory::{Object, Volume};
use instancefs::model::caller::{Caller, Ownership};
use instancefs::model::image::Format;
use instancefs::model::volume::State;
use instancefs::model::volume::Word;
use instancefs::model::volume::change::VolumeChange;
use instancefs::model::volume::record::{Attachment, ExistingData, VolumeData, VolumeRecord};
use instancefs::workflow::uptime::Clock;
use uuid::Uuid;

use crate::lab::{Life, TestClock, World, alice, root, until};

/// A volume of data that is there, and that nobody has.
pub fn available(life: &Life<'_>, format: Format) -> Uuid {
    let id = Uuid::new_v4();
    let path = life.world.directory.path().join("volumes").join(id.to_string());
    fs::create_dir_all(path.parent().expect("a directory")).unwrap();
    fs::write(&path, format!("size 1048576 {}\n", format.word())).unwrap();
    let metadata = fs::metadata(&path).unwrap();
    let data = VolumeData::Existing(ExistingData {
        backend: "memory".to_owned(),
        reference: path.display().to_string(),
        identity: metadata.ino().to_string(),
        format,
    });
    let put = |batch: &mut instancefs::workflow::ledger::Batch<'_>| {
        let ownership = Ownership { owner: alice().uid, project: alice().gid, generation: 0 };
        let record = VolumeRecord {
            size_bytes: 1 << 20,
            disk_format: Some(format),
            data: Some(data.clone()),
            ..VolumeRecord::new(batch.next_number(), "data".to_owned(), ownership, "memory".to_owned(), 1)
        };
        batch.put(Object::Volume(Arc::new(Volume { id, record, task: None })));
    };
    life.ledger.transact(put).unwrap();
    id
}

fn ask(life: &Life<'_>, id: Uuid, wanted: bool) -> i32 {
    life.change_volume(&root(), id, VolumeChange::LocalAttach(wanted)).err().map_or(0, |reason| reason.errno())
}

fn volume(life: &Life<'_>, id: Uuid) -> Arc<Volume> {
    life.inventory.volume(id).expect("it exists")
}

fn edit(life: &Life<'_>, id: Uuid, change: impl Fn(&mut Volume)) {
    let edit = |batch: &mut instancefs::workflow::ledger::Batch<'_>| {
        let mut volume = (*batch.volume(id).unwrap()).clone();
        change(&mut volume);
        batch.put(Object::Volume(Arc::new(volume)));
    };
    life.ledger.transact(edit).unwrap();
}

#[test]
fn only_root_makes_a_device_and_only_of_a_volume_that_no_instance_has() {
    let world = World::new();
    let life = world.live();
    let id = available(&life, Format::Raw);
    let refused = life.change_volume(&alice(), id, VolumeChange::LocalAttach(true)).unwrap_err();
    assert_eq!(refused.errno(), libc::EPERM);
    edit(&life, id, |volume| {
        let attached = Attachment { device: "vdb".to_owned(), attached_at: 1 };
        volume.record.attachments.set(&Uuid::new_v4().to_string(), attached).unwrap();
    });
    assert_eq!(ask(&life, id, true), libc::EBUSY);
    assert!(!world.devices.has_device(id));
}

#[test]
fn a_device_is_shown_until_it_is_taken_away_and_both_can_be_said_twice() {
    let world = World::new();
    let life = world.live();
    for format in [Format::Raw, Format::Qcow2] {
        let id = available(&life, format);
        assert_eq!((ask(&life, id, true), ask(&life, id, true)), (0, 0));
        let record = volume(&life, id).record.clone();
        assert_eq!(record.state(), State::InUse);
        let local = record.local.expect("it is a device");
        assert!(local.device.is_some() && local.exporter.is_some() == (format == Format::Qcow2), "{local:?}");
        assert_eq!((ask(&life, id, false), ask(&life, id, false)), (0, 0));
        assert_eq!((volume(&life, id).record.state(), &volume(&life, id).record.local), (State::Available, &None));
        assert!(!world.devices.has_device(id) && !world.devices.has_exporter(id));
    }
}

#[test]
fn a_device_that_was_taken_away_meanwhile_is_not_made_again() {
    let world = World::new();
    let life = world.live();
    let id = available(&life, Format::Qcow2);
    let renew = || life.change_volume(&Caller::daemon(), id, VolumeChange::RenewLocalDevice);
    assert_eq!(ask(&life, id, true), 0);
    edit(&life, id, |volume| volume.record.local.as_mut().expect("it is a device").device = None);
    assert_eq!((renew(), renew()), (Ok(()), Ok(())));
    assert!(volume(&life, id).record.local.as_ref().is_some_and(|local| local.device.is_some()));
    assert_eq!(ask(&life, id, false), 0);
    assert_eq!(renew(), Ok(()));
    assert_eq!(volume(&life, id).record.state(), State::Available, "whoever took it away has the last word");
    assert!(!world.devices.has_device(id) && !world.devices.has_exporter(id));
}

#[test]
fn a_device_that_somebody_uses_stays_and_last_error_says_who() {
    let world = World::new();
    let life = world.live();
    let id = available(&life, Format::Qcow2);
    assert_eq!(ask(&life, id, true), 0);
    *world.devices.user.lock() = Some("/dev/loop9 is mounted on /srv; umount it first".to_owned());
    assert_eq!(ask(&life, id, false), libc::EBUSY);
    let volume = volume(&life, id);
    assert!(volume.record.errors.last().expect("an error").reason.contains("/srv"));
    assert!(volume.record.state() == State::InUse && world.devices.has_device(id) && world.devices.has_exporter(id));
}

#[test]
fn a_locked_volume_is_made_no_device_and_stays_one() {
    let world = World::new();
    let life = world.live();
    let id = available(&life, Format::Raw);
    let lock = |wanted| life.change_volume(&root(), id, VolumeChange::Locked(wanted)).unwrap();
    lock(true);
    assert_eq!(ask(&life, id, true), libc::EPERM);
    lock(false);
    assert_eq!(ask(&life, id, true), 0);
    lock(true);
    assert_eq!(ask(&life, id, false), libc::EPERM);
    assert!(world.devices.has_device(id));
}

#[test]
fn where_the_host_cannot_it_says_what_would_help_and_nothing_is_begun() {
    let world = World::new();
    let life = world.live();
    let id = available(&life, Format::Raw);
    *world.devices.unsupported.lock() = Some("load the kernel module loop".to_owned());
    let refused = life.change_volume(&root(), id, VolumeChange::LocalAttach(true)).unwrap_err();
    assert_eq!((refused.errno(), refused.to_string().as_str()), (libc::EOPNOTSUPP, "load the kernel module loop"));
    assert_eq!(volume(&life, id).record.last_task, None);
}

#[test]
fn after_a_restart_of_the_host_the_device_is_made_again_also_of_a_locked_volume() {
    let world = World::new();
    let clock = TestClock::new();
    let live = || world.live_on(world.store.clone(), |settings| settings.clock = clock.clone());
    let (raw, qcow2) = {
        let life = live();
        let ids = (available(&life, Format::Raw), available(&life, Format::Qcow2));
        assert_eq!((ask(&life, ids.0, true), ask(&life, ids.1, true)), (0, 0));
        life.change_volume(&root(), ids.0, VolumeChange::Locked(true)).unwrap();
        ids
    };
    world.devices.lose_all();
    clock.reboot(Duration::from_secs(60));
    let life = live();
    for id in [raw, qcow2] {
        until("it is made again", || {
            let local = volume(&life, id).record.local.clone().expect("it is to be one");
            local.device.is_some() && local.boot_id == clock.boot()
        });
        assert!(world.devices.has_device(id));
    }
    assert!(world.devices.has_exporter(qcow2));
}

#[test]
fn a_device_of_a_former_boot_is_not_looked_for_in_this_one() {
    let world = World::new();
    let clock = TestClock::new();
    let live = || world.live_on(world.store.clone(), |settings| settings.clock = clock.clone());
    let id = {
        let life = live();
        let id = available(&life, Format::Raw);
        assert_eq!(ask(&life, id, true), 0);
        id
    };
    world.devices.lose_all();
    // Its number is somebody else's by now, who uses it.
    *world.devices.unsupported.lock() = Some("not now".to_owned());
    *world.devices.user.lock() = Some("somebody else uses it".to_owned());
    clock.reboot(Duration::from_secs(60));
    let life = live();
    until("its making again has failed", || {
        volume(&life, id).record.local.as_ref().is_some_and(|local| local.device.is_none())
    });
    assert_eq!(ask(&life, id, false), 0);
    assert!(volume(&life, id).record.local.is_none());
}

#[test]
fn a_dead_exporter_is_a_fault_until_its_device_is_taken_away_and_the_volume_looked_at() {
    let world = World::new();
    let id = {
        let life = world.live();
        let id = available(&life, Format::Qcow2);
        assert_eq!(ask(&life, id, true), 0);
        id
    };
    world.devices.kill_exporter(id);
    let life = world.live();
    until("its death is noticed", || volume(&life, id).record.state() == State::Error);
    let fault = volume(&life, id).record.fault.clone().expect("a fault");
    assert!(fault.contains("has died") && fault.contains("write 0 to local_attach"), "{fault}");
    // Neither forgotten nor hidden while there is still a device.
    for state in [State::Available, State::SoftDeleted] {
        let refused = life.change_volume(&root(), id, VolumeChange::State(Word::State(state))).unwrap_err();
        assert_eq!(refused.errno(), libc::EBUSY, "{refused}");
    }
    assert_eq!(life.change_volume(&root(), id, VolumeChange::Unmanage).unwrap_err().errno(), libc::EBUSY);
    assert_eq!(ask(&life, id, false), 0);
    assert!(!world.devices.has_device(id));
    assert_eq!(volume(&life, id).record.state(), State::Error);
}
