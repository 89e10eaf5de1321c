//! The table of cases: one row for each operation. A new operation does not compile without one.

use std::sync::Arc;

use instancefs::inventory::Object;
use instancefs::model::Class;
use instancefs::model::change::{ImageChange, InstanceChange};
use instancefs::model::image;
use instancefs::model::instance::{State, Word};
use instancefs::model::task::Operation;
use instancefs::model::volume::change::VolumeChange;
use instancefs::model::volume::record::Origin;
use instancefs::model::volume::{self, VolumeOperation};
use instancefs::workflow::request::Request;
use uuid::Uuid;

use super::campaign::{STOP_TIMEOUT, campaign, guests_write};
use super::case::{Asked, Case};
use super::scene::Scene;
use crate::lab::{Life, alice, root, until};
use crate::volumes;

macro_rules! table {
    ($($row:ident: $pattern:pat => $cases:expr;)*) => {
        /// The row of an operation.
        pub fn row(operation: &Operation) -> &'static str {
            match operation {
                $($pattern => stringify!($row),)*
            }
        }

        $(
            #[test]
            fn $row() {
                campaign(stringify!($row), &$cases);
            }
        )*
    };
}

table! {
    boot: Operation::Boot => [
        case(pristine, [to(State::Active)], ("draft", "active"), (0, 1)),
        case(seeded, [to(State::Active)], ("draft", "active"), (0, 2)),
    ];
    define: Operation::Define => [case(pristine, [to(State::Stopped)], ("draft", "stopped"), (0, 1))];
    start: Operation::Start => [case(stopped, [to(State::Active)], ("stopped", "active"), (1, 1))];
    stop: Operation::Stop => [case(impatient, [to(State::Stopped)], ("active", "stopped"), (1, 1))];
    pause: Operation::Pause => [case(active, [to(State::Paused)], ("active", "paused"), (1, 1))];
    unpause: Operation::Unpause => [case(paused, [to(State::Active)], ("paused", "active"), (1, 1))];
    suspend: Operation::Suspend => [case(active, [to(State::Suspended)], ("active", "suspended"), (1, 1))];
    resume: Operation::Resume => [case(suspended, [to(State::Active)], ("suspended", "active"), (1, 1))];
    reboot_soft: Operation::RebootSoft => [
        Case { settles: false, ..case(impatient, [InstanceChange::RebootSoft], ("active", "active"), (1, 1)) },
    ];
    reboot_hard: Operation::RebootHard => [
        Case { settles: false, ..case(impatient, [InstanceChange::RebootHard], ("active", "active"), (1, 1)) },
    ];
    rename: Operation::Rename { .. } => [
        case(stopped, [InstanceChange::Name("web".to_owned())], ("stopped", "stopped"), (1, 1)),
    ];
    reconfigure: Operation::Reconfigure { then: None, .. } => [Case {
        between: grown_unnoticed,
        parts: vec![Asked::Instance(vec![InstanceChange::RootDiskBytes(2 << 30)])],
        ..case(stopped, new_hardware(), ("stopped", "stopped"), (1, 1))
    }];
    reconfigure_and_start: Operation::Reconfigure { then: Some(_), .. } => [Case {
        between: grown_unnoticed,
        parts: vec![
            Asked::Instance(vec![InstanceChange::RootDiskBytes(2 << 30)]),
            Asked::Instance(new_hardware()),
        ],
        ..case(
            stopped,
            new_hardware().into_iter().chain([to(State::Active)]).collect::<Vec<_>>(),
            ("stopped", "active"),
            (1, 1),
        )
    }];
    commit_image: Operation::CommitImage => [case_of_image(filled, image::State::Active, ("draft", "active"))];
    import_image: Operation::ImportImage => [Case {
        between: empty_again,
        ..case_of_image(importable, image::State::Active, ("draft", "active"))
    }];
    discard_draft: Operation::DiscardDraft => [
        Case {
            between: half_gone,
            ..case(half_made, [InstanceChange::State(Word::Deleted)], ("draft", "gone"), (1, 0))
        },
        Case {
            asked: Asked::Image(vec![ImageChange::State(image::Word::Deleted)]),
            ..case_of_image(filled, image::State::Active, ("draft", "gone"))
        },
        case_of_volume(volume_draft, VolumeChange::State(volume::Word::Deleted), ("draft", "gone")),
    ];
    // The move itself is done at once, whatever becomes of the rest, which the keeper tries again.
    soft_delete: Operation::SoftDelete => [Case {
        between: moved,
        settles: false,
        ..case(impatient, [to(State::SoftDeleted)], ("active", "soft_deleted"), (1, 1))
    }];
    restore: Operation::Restore { .. } => [Case {
        between: restored,
        settles: false,
        ..case(binned, [to(State::Active)], ("soft_deleted", "active"), (2, 2))
    }];
    delete: Operation::Delete => [
        Case { between: half_gone, ..case(binned, [InstanceChange::State(Word::Deleted)], ("soft_deleted", "gone"), (2, 0)) },
        Case {
            asked: Asked::Image(vec![ImageChange::State(image::Word::Deleted)]),
            ..case_of_image(binned_image, image::State::Active, ("soft_deleted", "gone"))
        },
        Case {
            between: half_gone,
            ..case_of_volume(volumes::binned, VolumeChange::State(volume::Word::Deleted), ("soft_deleted", "gone"))
        },
    ];
    shelve: Operation::Shelve { offload: false } => [
        Case { counts_boots: false, ..case(impatient, [to(State::Shelved)], ("active", "shelved"), (1, 1)) },
    ];
    shelve_and_offload: Operation::Shelve { offload: true } => [Case {
        between: half_offloaded,
        parts: vec![Asked::Instance(vec![to(State::Shelved)])],
        counts_boots: false,
        ..case(impatient, [to(State::ShelvedOffloaded)], ("active", "shelved_offloaded"), (1, 0))
    }];
    offload: Operation::Offload => [Case {
        between: half_offloaded,
        ..case(shelved, [to(State::ShelvedOffloaded)], ("shelved", "shelved_offloaded"), (2, 0))
    }];
    unshelve: Operation::Unshelve { start: false } => [Case {
        between: back,
        settles: false,
        ..case(offloaded, [to(State::Stopped)], ("shelved_offloaded", "stopped"), (0, 2))
    }];
    unshelve_and_start: Operation::Unshelve { start: true } => [Case {
        between: back,
        settles: false,
        ..case(offloaded, [to(State::Active)], ("shelved_offloaded", "active"), (0, 2))
    }];
    volume_create: Operation::Volume(VolumeOperation::Create) => [
        case_of_volume(volume_draft, to_available(), ("draft", "available")),
        case_of_volume(volume_copy, to_available(), ("draft", "available")),
    ];
    volume_extend: Operation::Volume(VolumeOperation::Extend { .. }) => [Case {
        between: grown_unnoticed,
        ..case_of_volume(volumes::available, VolumeChange::SizeBytes(2 << 30), ("available", "available"))
    }];
    volume_attach: Operation::Volume(VolumeOperation::Attach { .. }) => [
        case_of_volume(available_beside_stopped, attach(), ("available", "in_use")),
        case_of_volume(available_beside_running, attach(), ("available", "in_use")),
        case_of_volume(available_beside_draft, attach(), ("available", "in_use")),
    ];
    volume_detach: Operation::Volume(VolumeOperation::Detach { .. }) => [
        Case { between: in_one_definition, ..case_of_volume(attached_to_stopped, detach(), ("in_use", "available")) },
        Case { between: in_one_definition, ..case_of_volume(attached_to_running, detach(), ("in_use", "available")) },
        case_of_volume(attached_to_draft, detach(), ("in_use", "available")),
    ];
    volume_attach_locally: Operation::Volume(VolumeOperation::AttachLocally) => [
        case_of_volume(raw_volume, VolumeChange::LocalAttach(true), ("available", "in_use")),
        case_of_volume(qcow2_volume, VolumeChange::LocalAttach(true), ("available", "in_use")),
    ];
    volume_detach_locally: Operation::Volume(VolumeOperation::DetachLocally) => [Case {
        between: half_detached,
        ..case_of_volume(local_device, VolumeChange::LocalAttach(false), ("in_use", "available"))
    }];
    volume_take_snapshot: Operation::Volume(VolumeOperation::TakeSnapshot { .. }) => [
        case_of_volume(volumes::available, VolumeChange::TakeSnapshot("monday".to_owned()), ("available", "available")),
    ];
    volume_delete_snapshot: Operation::Volume(VolumeOperation::DeleteSnapshot { .. }) => [Case {
        between: half_gone,
        ..case_of_volume(
            volumes::with_snapshot,
            VolumeChange::DeleteSnapshot("monday".to_owned()),
            ("available", "available"),
        )
    }];
    volume_examine: Operation::Volume(VolumeOperation::Examine) => [
        case_of_volume(faulty_volume, to_available(), ("error", "available")),
    ];
    define_again: Operation::DefineAgain => [case(undefined, [to(State::Stopped)], ("error", "stopped"), (1, 1))];
}

fn case(
    setup: fn(&Life<'_>) -> Uuid,
    changes: impl Into<Vec<InstanceChange>>,
    states: (&'static str, &'static str),
    disks: (usize, usize),
) -> Case {
    Case {
        setup,
        asked: Asked::Instance(changes.into()),
        states,
        disks,
        parts: Vec::new(),
        between: |_, _| false,
        counts_boots: true,
        settles: true,
    }
}

fn case_of_image(setup: fn(&Life<'_>) -> Uuid, state: image::State, states: (&'static str, &'static str)) -> Case {
    let asked = Asked::Image(vec![ImageChange::State(image::Word::State(state))]);
    Case {
        setup,
        asked,
        states,
        disks: (0, 0),
        parts: Vec::new(),
        between: |_, _| false,
        counts_boots: true,
        settles: true,
    }
}

fn case_of_volume(setup: fn(&Life<'_>) -> Uuid, change: VolumeChange, states: (&'static str, &'static str)) -> Case {
    Case { asked: Asked::Volume(vec![change]), ..case(setup, [], states, (0, 0)) }
}

fn attach() -> VolumeChange {
    VolumeChange::Attach { instance: HOLDER, device: None }
}

fn detach() -> VolumeChange {
    VolumeChange::Detach(None)
}

/// The guest has let it go, and the definition has it still, which says that it is attached.
fn in_one_definition(before: &Scene, now: &Scene) -> bool {
    now.state == before.state && now.record == before.record && now.keeps(before)
}

/// It is still to be a device of the host; some of what makes it one is gone, and nothing else.
fn half_detached(before: &Scene, now: &Scene) -> bool {
    now.state == before.state && before.contains(now)
}

/// The disk has grown, and the backend said that it has not: it is larger than recorded, which loses nothing.
fn grown_unnoticed(before: &Scene, now: &Scene) -> bool {
    let mut now = now.clone();
    for content in now.files.values_mut() {
        *content = content.replace("size 2147483648", "size 1073741824");
    }
    now == *before
}

/// A fetch that failed leaves an empty draft, and may leave its empty file.
fn empty_again(before: &Scene, now: &Scene) -> bool {
    let mut now = now.clone();
    now.files.retain(|path, content| !(path.starts_with("images/OBJECT/") && content.is_empty()));
    now == *before
}

/// Some of what was to be removed is, the rest is there and recorded.
fn half_gone(before: &Scene, now: &Scene) -> bool {
    now.state == before.state && before.contains(&Scene { record: before.record.clone(), ..now.clone() })
}

/// In the bin, and nothing is lost.
fn moved(before: &Scene, now: &Scene) -> bool {
    now.state == "soft_deleted" && now.keeps(before)
}

/// Out of the bin, and nothing is lost.
fn restored(before: &Scene, now: &Scene) -> bool {
    ["stopped", "active"].contains(&now.state.as_str()) && now.keeps(before)
}

/// The copies are there and all that is missing is on the shelf.
fn half_offloaded(_before: &Scene, now: &Scene) -> bool {
    let copies = now.files.iter().filter(|(path, _)| path.starts_with("shelf/OBJECT/UUID-"));
    now.state == "shelved" && copies.count() > 0
}

/// Back from the shelf with all disks; what comes after has failed, such as its autostart.
fn back(before: &Scene, now: &Scene) -> bool {
    let disks = now.files.keys().filter(|path| path.starts_with("disks/OBJECT/"));
    let is_back = now.state == "stopped" && disks.count() == 3;
    // What was made again is gone again, and the record could not be told.
    let is_still_there = now.state == before.state;
    (is_back || is_still_there) && now.keeps(before)
}

fn to(state: State) -> InstanceChange {
    InstanceChange::State(Word::State(state))
}

fn new_hardware() -> Vec<InstanceChange> {
    vec![
        InstanceChange::Vcpus(3),
        InstanceChange::MemoryBytes(1 << 30),
        InstanceChange::RootDiskBytes(2 << 30),
        InstanceChange::Autostart(true),
    ]
}

/// The instance of the cases of attaching and detaching.
pub const HOLDER: Uuid = Uuid::from_u128(0x0401_de12);

fn holder(life: &Life<'_>, state: Option<State>) {
    life.ask(&alice(), Request::MakeDraft { class: Class::Instance, id: HOLDER }).unwrap();
    life.change(&alice(), HOLDER, InstanceChange::Image(life.world.image)).unwrap();
    if let Some(state) = state {
        life.state(HOLDER, state).unwrap();
    }
}

fn available(life: &Life<'_>) -> Uuid {
    let id = Uuid::new_v4();
    life.ask(&alice(), Request::MakeDraft { class: Class::Volume, id }).unwrap();
    life.change_volume(&alice(), id, VolumeChange::SizeBytes(1 << 30)).unwrap();
    let state = VolumeChange::State(volume::Word::State(volume::State::Available));
    life.change_volume(&alice(), id, state).unwrap();
    id
}

fn available_beside_stopped(life: &Life<'_>) -> Uuid {
    holder(life, Some(State::Stopped));
    available(life)
}

fn available_beside_running(life: &Life<'_>) -> Uuid {
    holder(life, Some(State::Active));
    available(life)
}

fn available_beside_draft(life: &Life<'_>) -> Uuid {
    holder(life, None);
    available(life)
}

fn attached(life: &Life<'_>, id: Uuid) -> Uuid {
    life.change_volume(&alice(), id, attach()).unwrap();
    id
}

fn attached_to_stopped(life: &Life<'_>) -> Uuid {
    attached(life, available_beside_stopped(life))
}

fn attached_to_running(life: &Life<'_>) -> Uuid {
    attached(life, available_beside_running(life))
}

fn attached_to_draft(life: &Life<'_>) -> Uuid {
    attached(life, available_beside_draft(life))
}

fn pristine(life: &Life<'_>) -> Uuid {
    life.draft_with_image()
}

fn stopped(life: &Life<'_>) -> Uuid {
    life.stopped()
}

fn active(life: &Life<'_>) -> Uuid {
    life.active()
}

fn seeded(life: &Life<'_>) -> Uuid {
    let id = life.draft_with_image();
    life.tell(id, "#cloud-config");
    life.change(&alice(), id, InstanceChange::Autostart(true)).unwrap();
    id
}

/// One that is powered off soon, if it cannot be asked.
fn impatient(life: &Life<'_>) -> Uuid {
    let id = life.active();
    let seconds = u32::try_from(STOP_TIMEOUT.as_secs()).unwrap();
    life.change(&alice(), id, InstanceChange::StopTimeoutSeconds(seconds)).unwrap();
    id
}

fn paused(life: &Life<'_>) -> Uuid {
    let id = life.active();
    life.state(id, State::Paused).unwrap();
    id
}

fn suspended(life: &Life<'_>) -> Uuid {
    let id = life.active();
    life.state(id, State::Suspended).unwrap();
    id
}

/// A draft with a disk and a definition that a failed boot could not take back.
fn half_made(life: &Life<'_>) -> Uuid {
    let id = life.draft_with_image();
    life.world.fail("start");
    life.world.control(serde_json::json!({ "do": "fault", "call": "undefine", "mode": "fail" }));
    life.state(id, State::Active).unwrap_err();
    life.world.control(serde_json::json!({ "do": "release" }));
    id
}

fn binned(life: &Life<'_>) -> Uuid {
    let id = seeded(life);
    life.state(id, State::Active).unwrap();
    life.state(id, State::SoftDeleted).unwrap();
    id
}

fn shelved(life: &Life<'_>) -> Uuid {
    let id = seeded(life);
    life.state(id, State::Active).unwrap();
    guests_write(life);
    life.state(id, State::Shelved).unwrap();
    id
}

fn offloaded(life: &Life<'_>) -> Uuid {
    let id = shelved(life);
    life.state(id, State::ShelvedOffloaded).unwrap();
    id
}

fn undefined(life: &Life<'_>) -> Uuid {
    let id = life.stopped();
    until("its definition is known", || life.instance(id).record.definition.is_some());
    life.world.control(serde_json::json!({ "do": "undefine", "uuid": id }));
    until("it is seen to be gone", || life.instance(id).domain.is_none());
    id
}

fn raw_volume(life: &Life<'_>) -> Uuid {
    crate::local_attach::available(life, image::Format::Raw)
}

fn qcow2_volume(life: &Life<'_>) -> Uuid {
    crate::local_attach::available(life, image::Format::Qcow2)
}

fn local_device(life: &Life<'_>) -> Uuid {
    let id = qcow2_volume(life);
    life.change_volume(&root(), id, VolumeChange::LocalAttach(true)).unwrap();
    id
}

fn to_available() -> VolumeChange {
    VolumeChange::State(volume::Word::State(volume::State::Available))
}

fn volume_draft(life: &Life<'_>) -> Uuid {
    volumes::draft(life, vec![VolumeChange::SizeBytes(1 << 30)])
}

fn volume_copy(life: &Life<'_>) -> Uuid {
    let source = volumes::available(life);
    volumes::draft(life, vec![VolumeChange::CreatedFrom(Origin::Volume(source))])
}

/// One whose data is there again.
fn faulty_volume(life: &Life<'_>) -> Uuid {
    let id = volumes::available(life);
    life.ledger
        .transact(|batch| {
            let mut volume = (*batch.volume(id).unwrap()).clone();
            volume.record.fault = Some("a test wants it so".to_owned());
            batch.put(Object::Volume(Arc::new(volume)));
        })
        .unwrap();
    id
}

fn binned_image(life: &Life<'_>) -> Uuid {
    let id = filled(life);
    for state in [image::State::Active, image::State::SoftDeleted] {
        life.change_image(&alice(), id, ImageChange::State(image::Word::State(state))).unwrap();
    }
    id
}

fn filled(life: &Life<'_>) -> Uuid {
    crate::image::filled(life, crate::image::small_qcow2())
}

fn importable(life: &Life<'_>) -> Uuid {
    let directory = life.world.directory.path().join("import");
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("image.qcow2"), crate::image::small_qcow2()).unwrap();
    let id = crate::image::draft(life);
    let source = directory.join("image.qcow2").display().to_string();
    life.change_image(&alice(), id, ImageChange::ImportFrom(Some(source))).unwrap();
    id
}
