//! Images in the bin.

use std::time::Duration;

use instancefs::hypervisor::Hypervisor;
use instancefs::model::change::{ImageChange, InstanceChange};
use instancefs::model::image;
use instancefs::model::instance::State;
use instancefs::model::reason::Reason;

use crate::bin::{binned, delete, foreign};
use crate::lab::{Life, World, alice, until};

fn image_word(life: &Life<'_>, word: image::Word) -> Result<(), Reason> {
    life.change_image(&alice(), life.world.image, ImageChange::State(word))
}

fn bin_image(life: &Life<'_>) {
    image_word(life, image::Word::State(image::State::SoftDeleted)).unwrap();
}

#[test]
fn an_image_goes_into_the_bin_and_comes_back_or_is_deleted_with_its_file_alone() {
    let world = World::new();
    let life = world.live();
    let file = life.engine.image_path(world.image);
    std::fs::create_dir(file.parent().unwrap()).unwrap();
    std::fs::write(&file, "data").unwrap();
    let state = || life.inventory.image(world.image).map(|image| image.state());
    assert_eq!(image_word(&life, image::Word::Deleted), Err(Reason::NotInBin));
    let draft = life.draft_with_image();
    bin_image(&life);
    assert_eq!(state(), Some(image::State::SoftDeleted));
    let late = life.draft();
    assert!(life.change(&alice(), late, InstanceChange::Image(world.image)).is_err());
    assert!(life.state(draft, State::Active).is_err(), "nothing is made from what is in the bin");
    life.change_image(&alice(), world.image, ImageChange::Restore).unwrap();
    assert_eq!(state(), Some(image::State::Active));
    image_word(&life, image::Word::State(image::State::Deactivated)).unwrap();
    bin_image(&life);
    life.change_image(&alice(), world.image, ImageChange::Restore).unwrap();
    assert_eq!(state(), Some(image::State::Deactivated));
    bin_image(&life);
    image_word(&life, image::Word::State(image::State::Active)).unwrap();
    assert_eq!(state(), Some(image::State::Active));
    life.change_image(&alice(), world.image, ImageChange::DeleteProtection(true)).unwrap();
    assert_eq!(image_word(&life, image::Word::State(image::State::SoftDeleted)), Err(Reason::DeleteProtected));
    life.change_image(&alice(), world.image, ImageChange::DeleteProtection(false)).unwrap();
    bin_image(&life);
    assert_eq!(std::fs::read(&file).unwrap(), b"data");
    image_word(&life, image::Word::Deleted).unwrap();
    assert_eq!(state(), None);
    assert!(!file.parent().unwrap().exists());
}

#[test]
fn what_else_lies_in_an_images_directory_or_in_its_place_is_kept() {
    let world = World::new();
    let life = world.live();
    let file = life.engine.image_path(world.image);
    std::fs::create_dir(file.parent().unwrap()).unwrap();
    let theirs = world.directory.path().join("theirs");
    std::fs::write(&theirs, "data").unwrap();
    std::os::unix::fs::symlink(&theirs, &file).unwrap();
    bin_image(&life);
    image_word(&life, image::Word::Deleted).unwrap_err();
    assert!(file.is_symlink() && life.inventory.image(world.image).is_some());
    std::fs::remove_file(&file).unwrap();
    std::fs::write(&file, "data").unwrap();
    let beside = file.with_file_name("beside");
    std::fs::write(&beside, "data").unwrap();
    image_word(&life, image::Word::Deleted).unwrap();
    assert!(!file.exists() && beside.exists() && theirs.exists());
}

#[test]
fn an_image_is_kept_while_disks_are_made_from_it() {
    let world = World::new();
    let life = world.live();
    let id = life.stopped();
    bin_image(&life);
    let refused = image_word(&life, image::Word::Deleted).unwrap_err();
    assert_eq!(refused.errno(), libc::EBUSY);
    assert!(refused.to_string().contains(&id.to_string()), "{refused}");
    life.state(id, State::Active).unwrap();
    binned(&life, id);
    assert_eq!(image_word(&life, image::Word::Deleted).unwrap_err().errno(), libc::EBUSY, "it can be restored");
    delete(&life, id).unwrap();
    let file = life.engine.image_path(world.image);
    let other = foreign(&world, &life, "reader", file.to_str().unwrap());
    let refused = image_word(&life, image::Word::Deleted).unwrap_err();
    assert_eq!(refused.errno(), libc::EBUSY);
    assert!(refused.to_string().contains("reader"), "{refused}");
    world.hypervisor.undefine(other).unwrap();
    until("it is gone", || life.inventory.instance(other).is_none());
    image_word(&life, image::Word::Deleted).unwrap();
}

#[test]
fn a_draft_is_not_moved_into_the_bin() {
    let world = World::new();
    let life = world.live_on(world.store.clone(), |settings| settings.settle = Duration::from_millis(50));
    let id = life.draft_with_image();
    assert_eq!(life.state(id, State::SoftDeleted).unwrap_err().errno(), libc::EINVAL);
    assert_eq!(life.observed(id), State::Draft);
}
