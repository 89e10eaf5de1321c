use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::channel;

use instancefs::block::BlockBackend;
use instancefs::block::directory::DirectoryBackend;
use instancefs::model::Class;
use instancefs::model::change::{ImageChange, InstanceChange};
use instancefs::model::image::{Format, State, Word};
use instancefs::model::reason::Reason;
use instancefs::store::power_loss::{Moment, PowerLoss};
use instancefs::workflow::Writer;
use instancefs::workflow::drafts_data::Leave;
use instancefs::workflow::request::{Request, Wait};
use uuid::Uuid;

use crate::lab::{DEADLINE, Life, World, alice, bob, root, until};

const ACTIVE: ImageChange = ImageChange::State(Word::State(State::Active));
const DELETED: ImageChange = ImageChange::State(Word::Deleted);

/// A qcow2 of 16 MiB.
pub fn qcow2() -> Vec<u8> {
    let directory = tempfile::TempDir::new().unwrap();
    let path = directory.path().join("image");
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("16M").status().unwrap();
    assert!(made.success());
    std::fs::read(path).unwrap()
}

/// The same one for everybody.
pub fn small_qcow2() -> &'static [u8] {
    static BYTES: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    BYTES.get_or_init(qcow2)
}

pub fn draft(life: &Life<'_>) -> Uuid {
    let id = Uuid::new_v4();
    life.ask(&alice(), Request::MakeDraft { class: Class::Image, id }).unwrap();
    id
}

fn write(writer: &Writer, offset: u64, bytes: &[u8]) -> Result<(), Reason> {
    let (answer, answered) = channel();
    writer.write_at(
        offset,
        bytes,
        Leave { early: true, here: true },
        Box::new(move |result| drop(answer.send(result))),
    );
    answered.recv_timeout(DEADLINE).expect("answered")
}

fn read(writer: &Writer, offset: u64, size: usize) -> Vec<u8> {
    let (answer, answered) = channel();
    writer.read_at(offset, size, Box::new(move |result| drop(answer.send(result))));
    answered.recv_timeout(DEADLINE).expect("answered").unwrap()
}

fn open(life: &Life<'_>, id: Uuid) -> Writer {
    life.engine.draft_data(id).expect("a draft").open_writer(&alice()).unwrap()
}

pub fn filled(life: &Life<'_>, bytes: &[u8]) -> Uuid {
    let id = draft(life);
    write(&open(life, id), 0, bytes).unwrap();
    id
}

#[test]
fn what_was_written_becomes_an_image() {
    let world = World::new();
    let life = world.live();
    let bytes = qcow2();
    let id = filled(&life, &bytes);
    assert!(life.inventory.image(id).unwrap().record.draft.unwrap().written);
    until("its length is shown", || life.inventory.image(id).unwrap().data_bytes == bytes.len() as u64);
    life.change_image(&alice(), id, ACTIVE).unwrap();
    let image = life.inventory.image(id).unwrap();
    assert_eq!((image.state(), image.record.disk_format), (State::Active, Some(Format::Qcow2)));
    assert_eq!((image.record.size_bytes, image.record.virtual_size_bytes), (bytes.len() as u64, 16 << 20));
    assert_eq!(image.record.sha512.as_ref().unwrap().len(), 128);
    let path = life.engine.image_path(id);
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o440);
    assert!(!path.with_extension("part").exists());
    assert!(life.engine.draft_data(id).is_none());
}

#[test]
fn the_first_byte_makes_a_draft_written_before_it_is_answered() {
    let world = World::new();
    let id = {
        let life = world.live();
        let id = draft(&life);
        let writer = open(&life, id);
        assert_eq!(read(&writer, 0, 10), b"");
        let rmdir = |id| life.ask(&alice(), Request::DiscardUnwritten { class: Class::Image, id });
        let other = draft(&life);
        drop(open(&life, other));
        rmdir(other).unwrap();
        write(&writer, 0, b"x").unwrap();
        assert_eq!(read(&writer, 0, 10), b"x");
        assert_eq!(rmdir(id), Err(Reason::NotEmpty));
        id
    };
    let life = world.live();
    let image = life.inventory.image(id).unwrap();
    assert!(image.record.draft.unwrap().written);
    assert_eq!(image.data_bytes, 1);
}

#[test]
fn a_refused_draft_stays_a_draft_and_says_why() {
    let world = World::new();
    let life = world.live();
    let id = filled(&life, b"VMDK is not what we take, and this is too short anyway");
    let refused = life.change_image(&alice(), id, ACTIVE).unwrap_err();
    assert!(matches!(refused, Reason::Image(_)), "{refused}");
    let image = life.inventory.image(id).unwrap();
    assert_eq!((image.state(), image.record.sha512.as_ref()), (State::Draft, None));
    assert_eq!(image.record.errors.last().unwrap().reason, refused.to_string());
    let writer = open(&life, id);
    write(&writer, 0, &qcow2()).unwrap();
    drop(writer);
    life.change_image(&alice(), id, ACTIVE).unwrap();
    assert_eq!(life.inventory.image(id).unwrap().record.errors.last(), None);
    let empty = draft(&life);
    assert!(matches!(life.change_image(&alice(), empty, ACTIVE), Err(Reason::Image(_))));
}

#[test]
fn a_commit_waits_for_writers_and_then_refuses() {
    let world = World::new();
    let life = world.live();
    let id = draft(&life);
    let writer = open(&life, id);
    write(&writer, 0, &qcow2()).unwrap();
    let refused = life.change_image(&alice(), id, ACTIVE).unwrap_err();
    assert_eq!((&refused, refused.errno()), (&Reason::DataOpen, libc::EBUSY));
    write(&writer, 0, &qcow2()).unwrap();
    let changes = vec![ACTIVE];
    let committing = life.submit(&alice(), Request::Image { id, changes }, Wait::Settle);
    until("it is being committed", || life.inventory.image(id).unwrap().task.is_some());
    drop(writer);
    committing.recv_timeout(DEADLINE).unwrap().unwrap();
}

#[test]
fn who_may_not_write_a_draft_gets_no_handle_and_loses_the_one_he_had() {
    let world = World::new();
    let life = world.live();
    let id = draft(&life);
    let data = life.engine.draft_data(id).unwrap();
    assert!(matches!(data.open_writer(&bob()), Err(Reason::NotYours { .. })));
    let writer = open(&life, id);
    life.change_image(&root(), id, ImageChange::Owner(bob().uid)).unwrap();
    assert_eq!(write(&writer, 0, b"x"), Err(Reason::HandleOutlivedOwner));
    assert!(data.open_writer(&bob()).is_ok());
}

#[test]
fn a_discarded_draft_takes_its_data_and_nothing_else() {
    let world = World::new();
    let life = world.live();
    let id = filled(&life, b"something");
    let beside = life.engine.image_path(id).with_file_name("not-ours");
    std::fs::write(&beside, b"").unwrap();
    life.change_image(&alice(), id, DELETED).unwrap();
    assert_eq!(life.inventory.image(id), None);
    assert!(beside.exists() && !life.engine.image_path(id).with_extension("part").exists());
    let id = filled(&life, b"something");
    life.change_image(&alice(), id, DELETED).unwrap();
    assert!(!life.engine.image_path(id).parent().unwrap().exists());
}

#[test]
fn a_commit_survives_a_crash_at_each_commit_and_in_the_recovery() {
    let bytes = qcow2();
    let mut crashes = 0;
    for (moment, again) in [Moment::Before, Moment::After]
        .into_iter()
        .flat_map(|moment| [Moment::Before, Moment::After].map(|again| (moment, again)))
    {
        for at in 1.. {
            let world = World::new();
            let id = filled(&world.live(), &bytes);
            if !lost(&world, at, moment, id, Some(ACTIVE)) {
                break;
            }
            crashes += 1;
            // The recovery loses its power too, at its first, second, ... commit, each life beginning where it died.
            for recovery_at in 1.. {
                if !lost(&world, recovery_at, again, id, None) {
                    break;
                }
            }
            let life = world.live();
            until("it is idle", || life.inventory.image(id).unwrap().task.is_none());
            let image = life.inventory.image(id).unwrap();
            let (part, data) = (life.engine.image_path(id).with_extension("part"), life.engine.image_path(id));
            match image.state() {
                State::Active => {
                    assert_eq!(std::fs::read(data).unwrap(), bytes);
                    assert_eq!(image.record.virtual_size_bytes, 16 << 20);
                    assert!(image.record.sha512.is_some() && !part.exists());
                }
                _ => {
                    assert_eq!(std::fs::read(part).unwrap(), bytes);
                    assert!(!data.exists());
                    life.change_image(&alice(), id, ACTIVE).unwrap();
                }
            }
        }
    }
    assert!(crashes >= 12, "only {crashes} crashes");
}

fn lost(world: &World, at: u64, moment: Moment, id: Uuid, change: Option<ImageChange>) -> bool {
    let store = Arc::new(PowerLoss::new(world.store.clone(), at, moment));
    let life = world.live_on(store.clone(), |_| {});
    let answered =
        change.map(|change| life.submit(&alice(), Request::Image { id, changes: vec![change] }, Wait::Settle));
    until("the work is done, or the power gone", || {
        store.lost()
            || (answered.as_ref().is_none_or(|answered| answered.try_recv().is_ok())
                && life.inventory.image(id).unwrap().task.is_none())
    });
    store.lost()
}

#[test]
fn a_committed_image_boots_from_a_disk_in_the_directory() {
    let world = World::new();
    let disks = world.directory.path().join("disks");
    let backend = Arc::new(DirectoryBackend::new(disks.clone(), None));
    let life = world.live_with(backend.clone());
    let image = filled(&life, &qcow2());
    life.change_image(&alice(), image, ACTIVE).unwrap();
    let id = life.draft();
    life.change(&alice(), id, InstanceChange::Image(image)).unwrap();
    world.fail("start");
    life.state(id, instancefs::model::instance::State::Active).unwrap_err();
    assert_eq!(std::fs::read_dir(&disks).unwrap().count(), 0);
    life.state(id, instancefs::model::instance::State::Active).unwrap();
    let disk = backend.path(&life.instance(id).record.disks[0]);
    assert!(disk.metadata().unwrap().len() > 0);
}
