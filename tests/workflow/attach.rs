//! Volumes as disks of instances: attached and detached, live and at rest, and what instances' operations do with them.

use std::sync::Arc;

use instancefs::block::{BlockBackend, NewData, Source, VolumeData};
use instancefs::hypervisor::definition::Definition;
use instancefs::hypervisor::{Hypervisor, PowerState};
use instancefs::inventory::{Object, Volume};
use instancefs::model::caller::{Caller, NO_PROJECT, Ownership};
use instancefs::model::change::InstanceChange;
use instancefs::model::image::Format;
use instancefs::model::instance::{State, Word};
use instancefs::model::volume;
use instancefs::model::volume::change::VolumeChange;
use instancefs::model::volume::record::VolumeRecord;
use instancefs::workflow::request::{Request, Wait};
use serde_json::json;
use uuid::Uuid;

use crate::lab::{Life, World, alice, bob, root, until};

/// What a volume is like.
fn raw(_: &mut VolumeRecord) {}

fn bootable(record: &mut VolumeRecord) {
    record.bootable = true;
}

fn shared(record: &mut VolumeRecord) {
    record.multiattach = true;
}

/// An available volume of alice's.
fn volume(life: &Life<'_>, block: &dyn BlockBackend, format: Format, set: fn(&mut VolumeRecord)) -> Uuid {
    let id = Uuid::new_v4();
    let new = NewData {
        volume: id,
        snapshot: None,
        operation: Uuid::new_v4(),
        size_bytes: 1 << 30,
        format: Some(format),
        source: Source::Empty,
    };
    let data = block.volumes().plan_data(&new);
    block.volumes().create_data(&new, &|_| Ok(())).unwrap();
    life.ledger
        .transact(|batch| {
            let owner = Ownership { owner: alice().uid, project: NO_PROJECT, generation: 0 };
            let mut record = VolumeRecord::new(batch.next_number(), "data".to_owned(), owner, "memory".to_owned(), 1);
            record.size_bytes = 1 << 30;
            record.disk_format = Some(format);
            record.data = Some(VolumeData::Ours(data.clone()));
            set(&mut record);
            batch.put(Object::Volume(Arc::new(Volume { id, record, task: None })));
        })
        .unwrap();
    id
}

pub struct Bed {
    pub world: World,
}

impl Bed {
    pub fn new() -> Bed {
        Bed { world: World::new() }
    }
}

pub fn plain(life: &Life<'_>) -> Uuid {
    volume(life, &*life.world.disks, Format::Raw, raw)
}

pub fn attach(life: &Life<'_>, volume: Uuid, instance: Uuid) -> Result<(), instancefs::model::reason::Reason> {
    attach_as(life, volume, instance, None)
}

fn attach_as(
    life: &Life<'_>,
    volume: Uuid,
    instance: Uuid,
    device: Option<&str>,
) -> Result<(), instancefs::model::reason::Reason> {
    let device = device.map(str::to_owned);
    life.change_volume(&alice(), volume, VolumeChange::Attach { instance, device })
}

pub fn detach(life: &Life<'_>, volume: Uuid) -> Result<(), instancefs::model::reason::Reason> {
    life.change_volume(&alice(), volume, VolumeChange::Detach(None))
}

/// The devices as which the domain has this volume: in its definition, and in its guest.
pub fn devices(life: &Life<'_>, volume: Uuid, instance: Uuid) -> (Option<String>, Option<String>) {
    let suffix = format!("{volume}/data");
    let device = |xml: String| {
        let disks = Definition::parse(&xml).unwrap().disks;
        let is_it = |path: &std::path::Path| path.ends_with(&suffix);
        disks.into_iter().find(|disk| disk.path.as_deref().is_some_and(is_it)).map(|disk| disk.device)
    };
    let hypervisor = &life.world.hypervisor;
    (device(hypervisor.definition(instance).unwrap()), hypervisor.live_definition(instance).unwrap().and_then(device))
}

pub fn some(device: &str) -> Option<String> {
    Some(device.to_owned())
}

/// What both records say of it.
pub fn recorded(life: &Life<'_>, volume: Uuid, instance: Uuid) -> Option<String> {
    let one = life.inventory.volume(volume).unwrap().record.attachments.get(&instance.to_string()).cloned();
    let other = life.inventory.instance(instance).map(|instance| instance.record.volumes.clone());
    let device = one.map(|attachment| attachment.device);
    let of_instance = other.and_then(|volumes| {
        volumes.iter().find(|(_, entry)| entry.value == volume).map(|(device, _)| device.to_owned())
    });
    assert_eq!(device, of_instance, "the records differ");
    device
}

pub fn state(life: &Life<'_>, volume: Uuid) -> volume::State {
    life.inventory.volume(volume).unwrap().record.state()
}

pub fn last_error(life: &Life<'_>, volume: Uuid) -> String {
    life.inventory.volume(volume).unwrap().record.errors.last().map(|line| line.reason.clone()).unwrap_or_default()
}

#[test]
fn a_stopped_instance_has_it_in_its_definition_and_a_running_one_in_its_guest_too() {
    let bed = Bed::new();
    let life = bed.world.live();
    for (id, in_guest) in [(life.stopped(), false), (life.active(), true)] {
        let volume = plain(&life);
        attach(&life, volume, id).unwrap();
        assert_eq!(devices(&life, volume, id), (some("vdb"), in_guest.then(|| "vdb".to_owned())));
        assert_eq!(recorded(&life, volume, id), some("vdb"));
        assert_eq!(state(&life, volume), volume::State::InUse);
        attach(&life, volume, id).unwrap();
        let another = plain(&life);
        attach_as(&life, another, id, Some("vdb")).unwrap_err();
        attach(&life, another, id).unwrap();
        assert_eq!(devices(&life, another, id).0, some("vdc"));
        detach(&life, volume).unwrap();
        assert_eq!(devices(&life, volume, id), (None, None));
        assert_eq!((recorded(&life, volume, id), state(&life, volume)), (None, volume::State::Available));
        assert_eq!(recorded(&life, another, id), some("vdc"));
    }
}

#[test]
fn one_that_an_instance_has_goes_to_no_other_unless_it_is_shared_and_raw() {
    let bed = Bed::new();
    let life = bed.world.live();
    let (one, two) = (life.stopped(), life.stopped());
    let volume = plain(&life);
    attach(&life, volume, one).unwrap();
    assert_eq!(attach(&life, volume, two).unwrap_err().errno(), libc::EBUSY);
    let both = self::volume(&life, &*bed.world.disks, Format::Raw, shared);
    attach(&life, both, one).unwrap();
    attach(&life, both, two).unwrap();
    assert!(bed.world.hypervisor.definition(two).unwrap().contains("<shareable/>"));
    assert_eq!(detach(&life, both).unwrap_err().errno(), libc::EINVAL);
    life.change_volume(&alice(), both, VolumeChange::Detach(Some(one))).unwrap();
    assert_eq!((recorded(&life, both, one), recorded(&life, both, two)), (None, some("vdb")));
    let tables = self::volume(&life, &*bed.world.disks, Format::Qcow2, shared);
    assert_eq!(attach(&life, tables, one).unwrap_err().errno(), libc::EOPNOTSUPP);
}

#[test]
fn who_attaches_needs_both_and_a_lock_on_either_refuses() {
    let bed = Bed::new();
    let life = bed.world.live();
    let id = life.stopped();
    let volume = plain(&life);
    let by =
        |caller: &Caller, instance| life.change_volume(caller, volume, VolumeChange::Attach { instance, device: None });
    assert_eq!(by(&bob(), id).unwrap_err().errno(), libc::EACCES);
    life.ask(&root(), Request::Instance { id, changes: vec![InstanceChange::Owner(bob().uid)] }).unwrap();
    assert_eq!(by(&alice(), id).unwrap_err().errno(), libc::EACCES);
    assert_eq!(by(&bob(), id).unwrap_err().errno(), libc::EACCES);
    life.ask(&root(), Request::Instance { id, changes: vec![InstanceChange::Owner(alice().uid)] }).unwrap();
    life.change(&alice(), id, InstanceChange::Locked(true)).unwrap();
    assert_eq!(by(&root(), id).unwrap_err().errno(), libc::EPERM);
    life.change(&alice(), id, InstanceChange::Locked(false)).unwrap();
    life.change_volume(&alice(), volume, VolumeChange::Locked(true)).unwrap();
    assert_eq!(by(&root(), id).unwrap_err().errno(), libc::EPERM);
    life.change_volume(&alice(), volume, VolumeChange::Locked(false)).unwrap();
    by(&alice(), id).unwrap();
    life.change(&alice(), id, InstanceChange::Locked(true)).unwrap();
    assert_eq!(detach(&life, volume).unwrap_err().errno(), libc::EPERM);
    assert_eq!(recorded(&life, volume, id), some("vdb"));
}

#[test]
fn a_suspended_instance_keeps_the_disks_that_its_memory_knows() {
    let bed = Bed::new();
    let life = bed.world.live();
    let id = life.active();
    let (there, new) = (plain(&life), plain(&life));
    attach(&life, there, id).unwrap();
    life.state(id, State::Suspended).unwrap();
    assert_eq!(attach(&life, new, id).unwrap_err().errno(), libc::EBUSY);
    assert_eq!(detach(&life, there).unwrap_err().errno(), libc::EBUSY);
    assert_eq!((devices(&life, there, id).0, devices(&life, new, id).0), (some("vdb"), None));
    life.state(id, State::Active).unwrap();
    detach(&life, there).unwrap();
}

#[test]
fn a_guest_that_does_not_let_go_keeps_it_and_last_error_says_so() {
    let bed = Bed::new();
    let life = bed.world.live();
    let id = life.active();
    let volume = plain(&life);
    attach(&life, volume, id).unwrap();
    bed.world.control(json!({ "do": "guest", "uuid": id, "refuses_detach": true }));
    assert_eq!(detach(&life, volume).unwrap_err().errno(), libc::EBUSY);
    assert!(last_error(&life, volume).contains("refused to let vdb go"), "{}", last_error(&life, volume));
    life.change(&alice(), id, InstanceChange::StopTimeoutSeconds(1)).unwrap();
    bed.world.control(json!({ "do": "guest", "uuid": id, "refuses_detach": false, "detach_delay_ms": 3_600_000 }));
    assert_eq!(detach(&life, volume).unwrap_err().errno(), libc::EBUSY);
    assert!(last_error(&life, volume).contains("did not let vdb go"), "{}", last_error(&life, volume));
    assert_eq!(devices(&life, volume, id), (some("vdb"), some("vdb")));
    assert_eq!(recorded(&life, volume, id), some("vdb"));
    // At rest nobody is asked.
    life.state(id, State::Stopped).unwrap();
    detach(&life, volume).unwrap();
    assert_eq!(devices(&life, volume, id), (None, None));
}

#[test]
fn a_guest_that_takes_its_time_is_waited_for() {
    let bed = Bed::new();
    let life = bed.world.live();
    let id = life.active();
    let volume = plain(&life);
    attach(&life, volume, id).unwrap();
    bed.world.control(json!({ "do": "guest", "uuid": id, "detach_delay_ms": 700 }));
    let asked = bed.world.calls("detach_disk");
    detach(&life, volume).unwrap();
    assert_eq!(devices(&life, volume, id), (None, None));
    assert_eq!(bed.world.calls("detach_disk") - asked, 2, "the guest was asked once, and the definition");
}

#[test]
fn a_paused_guest_gets_one_and_keeps_it_until_it_runs() {
    let bed = Bed::new();
    let life = bed.world.live();
    let id = life.active();
    life.state(id, State::Paused).unwrap();
    let volume = plain(&life);
    attach(&life, volume, id).unwrap();
    assert_eq!(devices(&life, volume, id), (some("vdb"), some("vdb")));
    assert_eq!(detach(&life, volume).unwrap_err().errno(), libc::EBUSY);
    life.state(id, State::Active).unwrap();
    detach(&life, volume).unwrap();
}

#[test]
fn a_draft_has_it_in_its_record_and_in_its_definition_once_it_boots() {
    let bed = Bed::new();
    let life = bed.world.live();
    let id = life.draft_with_image();
    let volume = plain(&life);
    attach_as(&life, volume, id, Some("vdd")).unwrap();
    assert!(bed.world.domain(id).is_none());
    assert_eq!((recorded(&life, volume, id), state(&life, volume)), (some("vdd"), volume::State::InUse));
    let discard = Request::DiscardUnwritten { class: instancefs::model::Class::Instance, id };
    assert_eq!(life.ask(&alice(), discard).unwrap_err().errno(), libc::ENOTEMPTY);
    let (other, second) = (life.draft_with_image(), plain(&life));
    attach(&life, second, other).unwrap();
    detach(&life, second).unwrap();
    assert_eq!(state(&life, second), volume::State::Available);
    life.state(id, State::Active).unwrap();
    assert_eq!(devices(&life, volume, id), (some("vdd"), some("vdd")));
}

#[test]
fn a_draft_that_is_discarded_leaves_its_volumes() {
    let bed = Bed::new();
    let life = bed.world.live();
    let id = life.draft();
    let volume = plain(&life);
    attach(&life, volume, id).unwrap();
    life.change(&alice(), id, InstanceChange::State(Word::Deleted)).unwrap();
    assert!(life.inventory.instance(id).is_none());
    assert_eq!(state(&life, volume), volume::State::Available);
}

#[test]
fn an_instance_boots_from_a_bootable_volume_that_is_its_first_disk() {
    let bed = Bed::new();
    let life = bed.world.live();
    let (with_image, id) = (life.draft_with_image(), life.draft());
    let plain = plain(&life);
    assert_eq!(attach_as(&life, plain, id, Some("vda")).unwrap_err().errno(), libc::EINVAL);
    let root = self::volume(&life, &*bed.world.disks, Format::Qcow2, bootable);
    assert_eq!(attach_as(&life, root, with_image, Some("vda")).unwrap_err().errno(), libc::EBUSY);
    attach_as(&life, root, id, Some("vda")).unwrap();
    attach(&life, plain, id).unwrap();
    life.state(id, State::Active).unwrap();
    assert_eq!((devices(&life, root, id).1, devices(&life, plain, id).1), (some("vda"), some("vdb")));
    let xml = bed.world.hypervisor.definition(id).unwrap();
    assert_eq!(xml.matches("<boot order='1'/>").count(), 1, "{xml}");
    assert_eq!(life.instance(id).record.root_disk_bytes, Some(1 << 30));
    assert!(life.instance(id).record.disks.is_empty() && bed.world.disk_count() == 0);
    life.state(id, State::Stopped).unwrap();
    assert_eq!(detach(&life, root).unwrap_err().errno(), libc::EBUSY);
}

#[test]
fn a_boot_from_a_volume_that_fails_leaves_the_draft_and_the_volume_as_they_were() {
    let bed = Bed::new();
    let life = bed.world.live();
    let id = life.draft();
    let root = self::volume(&life, &*bed.world.disks, Format::Raw, bootable);
    attach_as(&life, root, id, Some("vda")).unwrap();
    bed.world.fail("start");
    bed.world.control(json!({ "do": "fault", "call": "undefine", "mode": "fail" }));
    life.state(id, State::Active).unwrap_err();
    bed.world.control(json!({ "do": "release" }));
    // The definition could not be taken back, and belongs to the draft nevertheless.
    assert!(bed.world.domain(id).is_some());
    assert_eq!(recorded(&life, root, id), some("vda"));
    life.state(id, State::Active).unwrap();
    assert_eq!(devices(&life, root, id), (some("vda"), some("vda")));
}

#[test]
fn what_is_deleted_for_good_frees_its_volumes_and_the_bin_keeps_them() {
    let bed = Bed::new();
    let life = bed.world.live();
    let id = life.active();
    let volume = plain(&life);
    attach(&life, volume, id).unwrap();
    life.state(id, State::SoftDeleted).unwrap();
    life.wait_idle(id);
    assert_eq!((recorded(&life, volume, id), devices(&life, volume, id).0), (some("vdb"), some("vdb")));
    assert_eq!(detach(&life, volume).unwrap_err().errno(), libc::EPERM);
    let binned = VolumeChange::State(volume::Word::State(volume::State::SoftDeleted));
    assert_eq!(life.change_volume(&alice(), volume, binned).unwrap_err().errno(), libc::EINVAL);
    life.change(&alice(), id, InstanceChange::State(Word::Deleted)).unwrap();
    assert!(life.inventory.instance(id).is_none());
    assert_eq!(state(&life, volume), volume::State::Available);
    let path = bed.world.disks.volumes.directory.join(format!("{volume}/data"));
    assert!(path.exists(), "the volume's data stays");
    attach(&life, volume, life.stopped()).unwrap();
}

#[test]
fn a_shelved_instance_keeps_its_volumes_and_nobody_copies_them() {
    let bed = Bed::new();
    let life = bed.world.live();
    let id = life.active();
    let volume = plain(&life);
    attach(&life, volume, id).unwrap();
    life.state(id, State::ShelvedOffloaded).unwrap();
    assert_eq!(bed.world.shelf().len(), 1);
    assert_eq!((recorded(&life, volume, id), state(&life, volume)), (some("vdb"), volume::State::InUse));
    life.state(id, State::Active).unwrap();
    assert_eq!(devices(&life, volume, id), (some("vdb"), some("vdb")));
}

#[test]
fn a_lost_connection_and_a_death_in_the_middle_lead_to_the_end() {
    for applied in [false, true] {
        for (call, ends_attached) in [("attach_disk", true), ("detach_disk", false)] {
            let bed = Bed::new();
            let (id, volume) = {
                let life = bed.world.live();
                let (id, volume) = (life.active(), plain(&life));
                if !ends_attached {
                    attach(&life, volume, id).unwrap();
                }
                bed.world.control(
                    json!({ "do": "fault", "call": call, "mode": "disconnect", "applied": applied, "times": 1 }),
                );
                let change = match ends_attached {
                    true => VolumeChange::Attach { instance: id, device: None },
                    false => VolumeChange::Detach(None),
                };
                life.submit(&alice(), Request::Volume { id: volume, changes: vec![change] }, Wait::Accepted);
                until("the connection is lost", || life.inventory.health().hypervisor.unreachable().is_some());
                (id, volume)
            };
            let life = bed.world.live();
            bed.world.control(json!({ "do": "reconnect" }));
            life.wait_idle(id);
            let device = ends_attached.then(|| "vdb".to_owned());
            assert_eq!(devices(&life, volume, id), (device.clone(), device.clone()), "{call} applied {applied}");
            assert_eq!(recorded(&life, volume, id), device);
        }
    }
}

#[test]
fn one_that_is_asked_to_give_up_takes_it_back() {
    let bed = Bed::new();
    let life = bed.world.live();
    let id = life.active();
    let volume = plain(&life);
    bed.world.control(json!({ "do": "fault", "call": "attach_disk", "mode": "hang" }));
    let request = Request::Volume { id: volume, changes: vec![VolumeChange::Attach { instance: id, device: None }] };
    let answered = life.submit(&alice(), request, Wait::Settle);
    until("it hangs", || bed.world.is_pending("attach_disk"));
    assert_eq!(life.state(id, State::Stopped).unwrap_err().errno(), libc::EBUSY);
    let reset = Request::Instance { id, changes: vec![InstanceChange::ResetState] };
    let cancelled = life.submit(&root(), reset, Wait::Settle);
    // Judged in their order: when this one is answered, the attachment has been asked to give up.
    assert_eq!(life.state(id, State::Stopped).unwrap_err().errno(), libc::EBUSY);
    bed.world.control(json!({ "do": "release" }));
    answered.recv_timeout(crate::lab::DEADLINE).unwrap().unwrap_err();
    cancelled.recv_timeout(crate::lab::DEADLINE).unwrap().unwrap();
    assert_eq!(devices(&life, volume, id), (None, None));
    assert_eq!((recorded(&life, volume, id), state(&life, volume)), (None, volume::State::Available));
    assert!(life.instance(id).task.is_none());
    assert_eq!(bed.world.power(id), PowerState::Running);
}

/// The size that a guest was told of a disk.
fn told_size(life: &Life<'_>, instance: Uuid, device: &str) -> Option<u64> {
    let list = life.world.control(json!({ "do": "list" }));
    let guests = list["guests"].as_array().unwrap();
    let guest = guests.iter().find(|guest| guest["domain"]["uuid"] == json!(instance)).unwrap();
    guest["disk_bytes"][device].as_u64()
}

#[test]
fn one_that_a_guest_has_grows_there_and_a_suspended_guest_forbids_it() {
    let bed = Bed::new();
    let life = bed.world.live();
    let (running, off) = (life.active(), life.stopped());
    let volume = self::volume(&life, &*bed.world.disks, Format::Raw, shared);
    attach(&life, volume, running).unwrap();
    attach(&life, volume, off).unwrap();
    let size = || life.inventory.volume(volume).unwrap().record.size_bytes;
    life.change_volume(&alice(), volume, VolumeChange::SizeBytes(2 << 30)).unwrap();
    assert_eq!(
        (size(), told_size(&life, running, "vdb"), told_size(&life, off, "vdb")),
        (2 << 30, Some(2 << 30), None)
    );
    life.state(running, State::Paused).unwrap();
    life.change_volume(&alice(), volume, VolumeChange::SizeBytes(3 << 30)).unwrap();
    assert_eq!(told_size(&life, running, "vdb"), Some(3 << 30));
    life.state(running, State::Active).unwrap();
    life.state(running, State::Suspended).unwrap();
    let refused = life.change_volume(&alice(), volume, VolumeChange::SizeBytes(4 << 30)).unwrap_err();
    assert_eq!(refused.errno(), libc::EBUSY);
    assert_eq!(size(), 3 << 30);
}

#[test]
fn the_root_disk_of_an_instance_that_boots_from_a_volume_grows_with_it() {
    let bed = Bed::new();
    let life = bed.world.live();
    let id = life.draft();
    let root = self::volume(&life, &*bed.world.disks, Format::Raw, bootable);
    attach_as(&life, root, id, Some("vda")).unwrap();
    life.state(id, State::Stopped).unwrap();
    let refused = life.change(&alice(), id, InstanceChange::RootDiskBytes(2 << 30)).unwrap_err();
    assert_eq!(refused.errno(), libc::EOPNOTSUPP);
    assert!(refused.to_string().contains(&format!("the volume {root}")), "{refused}");
    life.change_volume(&alice(), root, VolumeChange::SizeBytes(2 << 30)).unwrap();
    assert_eq!(life.instance(id).record.root_disk_bytes, Some(2 << 30));
}
