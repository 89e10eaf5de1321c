//! Volumes that somebody attaches or detaches past instancefs.

use instancefs::model::instance::State;
use instancefs::model::volume;
use serde_json::json;
use uuid::Uuid;

use crate::attach::{Bed, attach, detach, devices, plain, recorded, some, state};
use crate::lab::{Life, until};

/// What a volume is like.
/// What `events` tells of a volume.
fn told(life: &Life<'_>, volume: Uuid, what: &str) -> bool {
    life.events.flush();
    let text = std::fs::read_to_string(life.world.directory.path().join("events")).unwrap_or_default();
    let id = volume.to_string();
    text.lines().any(|line| line.contains(&id) && line.contains(what))
}

#[test]
fn what_somebody_detaches_outside_is_free_once_no_definition_has_it() {
    let bed = Bed::new();
    let life = bed.world.live();
    let id = life.active();
    let volume = plain(&life);
    attach(&life, volume, id).unwrap();
    let detach = |persistent: bool, live: bool| {
        bed.world.control(
            json!({ "do": "detach_disk", "uuid": id, "device": "vdb", "persistent": persistent, "live": live }),
        );
    };
    until("its definition is known", || {
        let definition = life.instance(id).record.definition.clone();
        definition.is_some_and(|definition| definition.disks.iter().any(|disk| disk.device == "vdb"))
    });
    detach(true, false);
    until("the definition was read", || {
        let definition = life.instance(id).record.definition.clone();
        definition.is_some_and(|definition| definition.disks.iter().all(|disk| disk.device != "vdb"))
    });
    assert_eq!(recorded(&life, volume, id), some("vdb"), "the guest has it still");
    detach(false, true);
    until("it is free", || state(&life, volume) == volume::State::Available);
    assert_eq!(recorded(&life, volume, id), None);
    until("it is told", || told(&life, volume, "detached_outside"));
}

#[test]
fn what_somebody_attaches_outside_is_in_use_by_that_instance() {
    let bed = Bed::new();
    let life = bed.world.live();
    let (id, other) = (life.active(), life.stopped());
    let volume = plain(&life);
    let path = bed.world.disks.volumes.directory.join(format!("{volume}/data"));
    let xml = format!("<disk type='file'><source file='{}'/><target dev='vdk'/></disk>", path.display());
    let attach_outside = |persistent: bool| {
        bed.world.control(
            json!({ "do": "attach_disk", "uuid": id, "xml": xml, "persistent": persistent, "live": !persistent }),
        );
    };
    attach_outside(false);
    until("it is seen", || recorded(&life, volume, id) == some("vdk"));
    assert_eq!(attach(&life, volume, other).unwrap_err().errno(), libc::EBUSY);
    until("it is told", || told(&life, volume, "attached_outside"));
    // The other half follows when somebody asks for it.
    detach(&life, volume).unwrap();
    assert_eq!(devices(&life, volume, id), (None, None));
    attach_outside(true);
    until("it is seen again", || recorded(&life, volume, id) == some("vdk"));
}

#[test]
fn an_instance_that_is_undefined_outside_keeps_its_volumes_until_it_leaves() {
    let bed = Bed::new();
    let life = bed.world.live();
    let id = life.stopped();
    let volume = plain(&life);
    attach(&life, volume, id).unwrap();
    until("its definition is known", || {
        let definition = life.instance(id).record.definition.clone();
        definition.is_some_and(|definition| definition.disks.len() == 2)
    });
    bed.world.control(json!({ "do": "undefine", "uuid": id }));
    until("it is gone", || life.instance(id).domain.is_none());
    assert_eq!(recorded(&life, volume, id), some("vdb"));
    assert_eq!(detach(&life, volume).unwrap_err().errno(), libc::EBUSY);
    life.state(id, State::Stopped).unwrap();
    assert_eq!(devices(&life, volume, id).0, some("vdb"));
    detach(&life, volume).unwrap();
}
