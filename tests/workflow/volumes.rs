//! Volumes: what can be said of a draft, and who may say it.

use instancefs::model::Class;
use instancefs::model::volume::change::VolumeChange;
use instancefs::model::volume::record::Origin;
use instancefs::workflow::request::Request;
use uuid::Uuid;

use crate::lab::{World, alice, bob, root};

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
