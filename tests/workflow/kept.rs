//! Second links of protected disks: made, used, and never removed where they are the last name of somebody's data.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use instancefs::block::BlockBackend;
use instancefs::hypervisor::Hypervisor;
use instancefs::model::change::InstanceChange;
use instancefs::model::instance::{State, Word};
use serde_json::json;
use uuid::Uuid;

use crate::lab::{Life, World, root, until};

struct Disks {
    directory: PathBuf,
}

impl Disks {
    fn new(world: &World) -> Disks {
        let directory = world.directory.path().join("elsewhere");
        fs::create_dir(&directory).unwrap();
        Disks { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn make(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, format!("content of {name}")).unwrap();
        path
    }

    fn links(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(self.path(".instancefs-kept")) else { return Vec::new() };
        let mut links: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        links.sort();
        links
    }
}

fn disk(path: &Path, target: &str, extra: &str) -> String {
    format!("<disk type='file'><source file='{}'/><target dev='{target}'/>{extra}</disk>", path.display())
}

fn define(life: &Life<'_>, uuid: Uuid, disks: &str) {
    let xml = format!(
        "<domain type='qemu'><name>vm-{uuid}</name><uuid>{uuid}</uuid><vcpu>1</vcpu><devices>{disks}</devices></domain>"
    );
    life.world.control(json!({ "do": "define", "xml": xml }));
    until("its definition is known", || {
        life.reconciler.definition(uuid).is_some_and(|seen| seen.contains(disks))
            && life.inventory.instance(uuid).is_some_and(|instance| instance.record.definition.is_some())
    });
}

fn protect(life: &Life<'_>, id: Uuid, on: bool) {
    life.change(&root(), id, InstanceChange::DisableTerminate(on)).unwrap();
}

fn names(path: &Path) -> u64 {
    path.metadata().map_or(0, |metadata| metadata.nlink())
}

fn is_told(life: &Life<'_>, id: Uuid, words: &str) {
    until(&format!("it says: {words}"), || life.last_error(id).is_some_and(|line| line.contains(words)));
}

fn times_told(world: &World, words: &str) -> usize {
    let log = fs::read_to_string(world.directory.path().join("events")).unwrap();
    log.lines().filter(|line| line.contains("\"what\":\"kept\"") && line.contains(words)).count()
}

/// A protected domain with one disk, which has its link.
fn protected(life: &Life<'_>, disks: &Disks) -> (Uuid, PathBuf) {
    let (id, path) = (Uuid::new_v4(), disks.make("disk.img"));
    define(life, id, &disk(&path, "vda", ""));
    protect(life, id, true);
    until("it has a second name", || names(&path) == 2);
    until("the link is recorded", || life.instance(id).record.kept.len() == 1);
    (id, path)
}

#[test]
fn protection_gives_each_writable_file_a_second_name_and_takes_it_along() {
    let world = World::new();
    let (life, disks) = (world.live(), Disks::new(&world));
    let (written, other, read) = (disks.make("written.img"), disks.make("other.img"), disks.make("read.iso"));
    let id = Uuid::new_v4();
    let definition = [
        disk(&written, "vda", ""),
        disk(&other, "vdb", "<shareable/>"),
        disk(&read, "vdc", "<readonly/>"),
        disk(Path::new("/dev/null"), "vdd", ""),
        "<disk type='network'><source protocol='rbd' name='p/i'/><target dev='vde'/></disk>".to_owned(),
    ];
    define(&life, id, &definition.concat());
    life.change(&root(), id, InstanceChange::Locked(true)).unwrap();
    until("both have a second name", || (names(&written), names(&other)) == (2, 2));
    assert_eq!((names(&read), disks.links().len()), (1, 2));
    // Another kind of protection is the same promise.
    life.change(&root(), id, InstanceChange::Locked(false)).unwrap();
    protect(&life, id, true);
    until("both have a second name still", || (names(&written), names(&other)) == (2, 2));
    protect(&life, id, false);
    until("the links are gone", || (names(&written), names(&other), life.instance(id).record.kept.len()) == (1, 1, 0));
    assert!(!disks.path(".instancefs-kept").exists());
    assert_eq!(fs::read_to_string(&written).unwrap(), "content of written.img");
    assert_eq!(life.last_error(id), None);
}

#[test]
fn a_disk_that_went_with_its_definition_comes_back_with_it() {
    let world = World::new();
    let (life, disks) = (world.live(), Disks::new(&world));
    let (id, path) = protected(&life, &disks);
    world.control(json!({ "do": "undefine", "uuid": id }));
    fs::remove_file(&path).unwrap();
    until("it is defined again", || world.domain(id).is_some());
    assert_eq!(fs::read_to_string(&path).unwrap(), "content of disk.img");
    assert_eq!(names(&path), 2);
}

#[test]
fn a_disk_that_is_removed_only_after_its_domain_is_back_comes_back_too() {
    let world = World::new();
    let (life, disks) = (world.live(), Disks::new(&world));
    let (id, path) = protected(&life, &disks);
    world.control(json!({ "do": "undefine", "uuid": id }));
    until("it is defined again", || life.instance(id).record.undefined.is_some() && world.domain(id).is_some());
    fs::remove_file(&path).unwrap();
    until("the disk is there", || path.exists());
    assert_eq!(fs::read_to_string(&path).unwrap(), "content of disk.img");
}

#[test]
fn a_disk_that_went_while_nobody_looked_comes_back_when_its_domain_is_asked_for() {
    let world = World::new();
    let disks = Disks::new(&world);
    let (id, path) = protected(&world.live(), &disks);
    world.control(json!({ "do": "undefine", "uuid": id }));
    fs::remove_file(&path).unwrap();
    let life = world.live();
    life.reconciler.pass().unwrap();
    until("it is seen to be gone", || life.observed(id) == State::Error);
    life.change(&root(), id, InstanceChange::State(Word::State(State::Stopped))).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "content of disk.img");
}

#[test]
fn another_file_in_a_disks_place_is_left_and_so_is_the_link() {
    let world = World::new();
    let (life, disks) = (world.live(), Disks::new(&world));
    let (id, path) = protected(&life, &disks);
    world.control(json!({ "do": "undefine", "uuid": id }));
    fs::remove_file(&path).unwrap();
    fs::write(&path, "somebody else's").unwrap();
    is_told(&life, id, "another file lies at");
    let link = disks.links().remove(0);
    let told = life.last_error(id).unwrap();
    assert!(told.contains(path.to_str().unwrap()) && told.contains(link.to_str().unwrap()), "{told}");
    assert_eq!(world.domain(id), None);
    assert_eq!(fs::read_to_string(&path).unwrap(), "somebody else's");
    assert_eq!(fs::read_to_string(&link).unwrap(), "content of disk.img");

    fs::remove_file(&path).unwrap();
    life.change(&root(), id, InstanceChange::State(Word::State(State::Stopped))).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "content of disk.img");
}

#[test]
fn a_disk_that_was_replaced_is_told_of_once_and_kept_beside_the_new_one() {
    let world = World::new();
    let disks = Disks::new(&world);
    let (id, path) = {
        let life = world.live();
        let (id, path) = protected(&life, &disks);
        let new = disks.make("new.img");
        fs::rename(&new, &path).unwrap();
        protect(&life, id, true);
        // Something changes, so that it is looked at soon.
        define(&life, id, &(disk(&path, "vda", "") + &disk(&disks.make("second.img"), "vdb", "")));
        is_told(&life, id, "removed or replaced outside");
        until("the new one has a second name", || names(&path) == 2);
        (id, path)
    };
    let life = world.live();
    let second = disks.path("second.img");
    until("everything was looked at", || names(&second) == 2 && names(&path) == 2);
    assert_eq!(times_told(&world, "replaced outside"), 1);
    assert_eq!(disks.links().len(), 3);

    // What is restored is the new one.
    world.control(json!({ "do": "undefine", "uuid": id }));
    fs::remove_file(&path).unwrap();
    until("it is defined again", || world.domain(id).is_some());
    assert_eq!(fs::read_to_string(&path).unwrap(), "content of new.img");

    // The end of the protection removes what has another name, and leaves the old one.
    until("it is idle", || life.instance(id).task.is_none());
    protect(&life, id, false);
    until("only the old one is left", || disks.links().len() == 1 && life.instance(id).record.kept.len() == 1);
    assert_eq!(fs::read_to_string(disks.links().remove(0)).unwrap(), "content of disk.img");
    assert_eq!(times_told(&world, "replaced outside"), 1);
    fs::remove_file(disks.links().remove(0)).unwrap();
}

#[test]
fn the_last_name_of_a_disk_outlives_the_protection() {
    let world = World::new();
    let (life, disks) = (world.live(), Disks::new(&world));
    let (id, path) = protected(&life, &disks);
    fs::remove_file(&path).unwrap();
    protect(&life, id, false);
    is_told(&life, id, "removed or replaced outside");
    let link = disks.links().remove(0);
    assert_eq!(fs::read_to_string(&link).unwrap(), "content of disk.img");
    assert_eq!(life.instance(id).record.kept.len(), 1);
    // Whoever links it back gets rid of the second name, as the end of the protection would have.
    fs::hard_link(&link, &path).unwrap();
    protect(&life, id, true);
    protect(&life, id, false);
    until("the link is gone", || names(&path) == 1 && life.instance(id).record.kept.is_empty());
}

#[test]
fn links_follow_the_definition() {
    let world = World::new();
    let (life, disks) = (world.live(), Disks::new(&world));
    let (id, path) = protected(&life, &disks);
    let overlay = disks.make("overlay.img");
    define(&life, id, &disk(&overlay, "vda", ""));
    until("the new disk has a second name, the old one has none", || (names(&overlay), names(&path)) == (2, 1));
    assert_eq!(life.instance(id).record.kept.len(), 1);
}

#[test]
fn what_a_crash_left_undone_is_done_at_the_next_start() {
    let world = World::new();
    let disks = Disks::new(&world);
    let (id, path) = protected(&world.live(), &disks);
    // As if the crash had come between the record and the link.
    fs::remove_file(disks.links().remove(0)).unwrap();
    let life = world.live();
    until("it has a second name", || names(&path) == 2);
    until("once", || life.instance(id).record.kept.len() == 1 && disks.links().len() == 1);
}

#[test]
fn a_link_that_cannot_be_made_is_told_once() {
    let world = World::new();
    let (life, disks) = (world.live(), Disks::new(&world));
    let (id, path) = (Uuid::new_v4(), disks.make("disk.img"));
    fs::write(disks.path(".instancefs-kept"), "in the way").unwrap();
    define(&life, id, &disk(&path, "vda", ""));
    protect(&life, id, true);
    is_told(&life, id, ".instancefs-kept is not a directory");
    let second = disks.make("second.img");
    define(&life, id, &(disk(&path, "vda", "") + &disk(&second, "vdb", "")));
    until("the other trouble is told", || times_told(&world, "second.img") == 1);
    assert_eq!(times_told(&world, "disk.img is lost"), 1);
    fs::remove_file(disks.path(".instancefs-kept")).unwrap();
    protect(&life, id, false);
    protect(&life, id, true);
    until("both have a second name", || (names(&path), names(&second)) == (2, 2));
}

#[test]
fn a_running_guests_disk_is_never_linked_back_under_it() {
    let world = World::new();
    let (life, disks) = (world.live(), Disks::new(&world));
    let (id, path) = protected(&life, &disks);
    world.control(json!({ "do": "start", "uuid": id }));
    until("it runs", || life.observed(id) == State::Active);
    fs::rename(&path, disks.path("moved.img")).unwrap();
    world.control(json!({ "do": "undefine", "uuid": id }));
    until("it has its definition back", || {
        let instance = life.instance(id);
        instance.record.last_task.is_some() && instance.task.is_none()
    });
    assert!(world.hypervisor.domain(id).unwrap().unwrap().persistent);
    until("it is told", || times_told(&world, "removed or replaced outside") == 1);
    assert!(!path.exists());
}

/// An instance of ours whose disk has its link.
fn protected_one_of_ours(life: &Life<'_>) -> (Uuid, PathBuf) {
    let id = life.stopped();
    let path = life.world.disks.path(&life.instance(id).record.disks[0]);
    protect(life, id, true);
    until("it has a second name", || names(&path) == 2);
    (id, path)
}

#[test]
fn a_disk_that_is_on_the_shelf_is_held_by_no_link() {
    let world = World::new();
    let life = world.live();
    let (id, path) = protected_one_of_ours(&life);
    let state = |state| InstanceChange::State(Word::State(state));
    life.change(&root(), id, state(State::ShelvedOffloaded)).unwrap();
    assert_eq!(life.instance(id).record.kept, []);
    assert!(!path.exists() && !path.with_file_name(".instancefs-kept").exists());
    life.change(&root(), id, state(State::Stopped)).unwrap();
    until("the disk that is back has a second name", || names(&path) == 2);
}

#[test]
fn what_is_deleted_for_good_leaves_no_link() {
    let world = World::new();
    let (life, disks) = (world.live(), Disks::new(&world));
    let ours = protected_one_of_ours(&life);
    let other = protected(&life, &disks);
    for (id, _) in [&ours, &other] {
        // As one change, so that nothing can come between.
        let changes =
            vec![InstanceChange::DisableTerminate(false), InstanceChange::State(Word::State(State::SoftDeleted))];
        life.change_all_by(&root(), *id, changes).unwrap();
        life.change(&root(), *id, InstanceChange::State(Word::Deleted)).unwrap();
        assert!(life.inventory.instance(*id).is_none());
    }
    assert!(!ours.1.exists() && !ours.1.with_file_name(".instancefs-kept").exists());
    assert_eq!((names(&other.1), disks.links().len()), (1, 0));
}

#[test]
fn a_disk_on_our_own_mount_is_not_touched() {
    let world = World::new();
    let (life, disks) = (world.live(), Disks::new(&world));
    let mount = tempfile::TempDir::new_in("/dev/shm").unwrap();
    let device = mount.path().metadata().unwrap().dev();
    assert_ne!(device, world.directory.path().metadata().unwrap().dev(), "another file system is needed");
    life.reconciler.set_mount_device(device);
    let (own, path) = (Uuid::new_v4(), mount.path().join("disk.img"));
    fs::write(&path, "content").unwrap();
    define(&life, own, &disk(&path, "vda", ""));
    protect(&life, own, true);
    // Two more, since those of one batch are looked at in any order.
    for name in ["one.img", "two.img"] {
        let (id, other) = (Uuid::new_v4(), disks.make(name));
        define(&life, id, &disk(&other, "vda", ""));
        protect(&life, id, true);
        until("this one has a second name", || names(&other) == 2);
    }
    assert_eq!((names(&path), life.instance(own).record.kept.len()), (1, 0));
}
