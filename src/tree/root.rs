//! The files of the root and of `summary/`.

use std::time::{Duration, UNIX_EPOCH};

use super::account::{group_name, user_name};
use super::attribute::Type;
use super::node::Directory;
use super::value::escape;
use crate::inventory::{Health, Image, Instance, Part, Volume};
use crate::model::image::Format;

/// The version of the interface; it grows when a file changes its meaning, which none ever should.
pub const ABI_VERSION: u32 = 1;

/// Whose group may read a fixed file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// Everybody, also outside the access group.
    Everybody,
    /// The access group.
    Access,
    /// The admin group.
    Admin,
}

/// A fixed file.
pub struct FixedRow {
    /// Fixed for ever: part of the inode number.
    pub id: u8,
    /// Its name.
    pub name: &'static str,
    /// Who may read it.
    pub audience: Audience,
    /// Its type.
    pub kind: Type,
    /// One paragraph for the documentation.
    pub description: &'static str,
}

impl FixedRow {
    /// Whether each read gives something else: such a file has size 0, and the kernel caches nothing of it.
    pub fn is_volatile(&self, directory: Directory) -> bool {
        directory == Directory::Root && [LAST_ERROR, METRICS].contains(&self.id)
    }

    /// Permission bits.
    pub fn mode(&self) -> u16 {
        match self.audience {
            Audience::Everybody => 0o444,
            Audience::Access | Audience::Admin => 0o440,
        }
    }
}

const fn row(id: u8, name: &'static str, audience: Audience, kind: Type, description: &'static str) -> FixedRow {
    FixedRow { id, name, audience, kind, description }
}

/// `README`
pub const README: u8 = 1;
/// `abi_version`
pub const ABI: u8 = 2;
/// `health`
pub const HEALTH: u8 = 3;
/// `last_error`
pub const LAST_ERROR: u8 = 4;
/// `events`
pub const EVENTS: u8 = 5;
/// `events.1`
pub const EVENTS_OLD: u8 = 6;

/// `metrics`
pub const METRICS: u8 = 7;

/// The files of the root.
pub static ROOT: &[FixedRow] = &[
    row(README, "README", Audience::Everybody, Type::Document("text"), "What this tree is, in one page."),
    row(ABI, "abi_version", Audience::Access, Type::Number(""), "The version of the interface."),
    row(
        HEALTH,
        "health",
        Audience::Everybody,
        Type::Document("flat-keyed"),
        "One line per part (hypervisor, store, directory, announcer, backends of the configuration): ok, or what is wrong and since when.",
    ),
    row(
        LAST_ERROR,
        "last_error",
        Audience::Access,
        Type::Text,
        "The caller's last refusal that belongs to no object. Size 0, not cached, not announced.",
    ),
    row(
        EVENTS,
        "events",
        Audience::Admin,
        Type::Document("JSON lines"),
        "Everything that happened: seq time class uuid name uid login what from to errno reason. Only grows; a full \
         file (16 MiB) is renamed to events.1.",
    ),
    row(
        EVENTS_OLD,
        "events.1",
        Audience::Admin,
        Type::Document("JSON lines"),
        "The events before those; absent until there were so many.",
    ),
    row(
        METRICS,
        "metrics",
        Audience::Admin,
        Type::Document("Prometheus text"),
        "What is counted: objects by state, operations, refusals, the parts. As of each read. Size 0, not cached, not \
         announced.",
    ),
];

/// `summary/instances`
pub const SUMMARY_INSTANCES: u8 = 1;
/// `summary/images`
pub const SUMMARY_IMAGES: u8 = 2;

/// `summary/volumes`
pub const SUMMARY_VOLUMES: u8 = 3;

/// The files of `summary/`.
pub static SUMMARY: &[FixedRow] = &[
    row(
        SUMMARY_INSTANCES,
        "instances",
        Audience::Access,
        Type::Document("tab-separated"),
        "All instances: uuid name state task locked disable_terminate owner project. Columns are only ever appended.",
    ),
    row(
        SUMMARY_IMAGES,
        "images",
        Audience::Access,
        Type::Document("tab-separated"),
        "All images: uuid name state task disk_format size_bytes owner project. Columns are only ever appended.",
    ),
    row(
        SUMMARY_VOLUMES,
        "volumes",
        Audience::Access,
        Type::Document("tab-separated"),
        "All volumes: uuid name state task locked delete_protection size_bytes backend owner project. Columns are only \
         ever appended.",
    ),
];

/// The table of a directory with fixed files.
pub fn table(directory: Directory) -> &'static [FixedRow] {
    match directory {
        Directory::Root => ROOT,
        Directory::Summary => SUMMARY,
        Directory::Class(_)
        | Directory::Trash
        | Directory::ByName
        | Directory::ByNameClass(_)
        | Directory::ByNameTrash
        | Directory::ByState
        | Directory::ByStateClass(_)
        | Directory::ByStateWord(..) => &[],
    }
}

/// The content of `README`.
pub const README_TEXT: &str = "\
instancefs: the virtual machines of this host as files.

  cat instances/$u/state                          what it is
  echo stopped > instances/$u/state               what it should become
  echo 1 > instances/$u/locked                    nobody stops or deletes it through here, root included
  mv by-state/instances/active/$u by-state/instances/stopped/
  instancefs wait instances/$u --for stopped      waits until it is so
  cat instances/$u/last_error                     why something was refused, and what to do next
  cat instances/$u/state_available                what can be written now
  cat summary/instances                           all of them in one read

  mv instances/$u trash/$u                        the bin: shut down and put away, with everything it has
  mv trash/$u instances/$u                        back again; trash/$u/expires_at says until when
  echo deleted > trash/$u/state                   gone for good, with the disks that instancefs made for it

  ln -s ../../../volumes/$v instances/$u/volumes/vdb   gives a volume to an instance, live if that runs
  echo 1 > volumes/$v/detach                      takes it away again
  mkdir volumes/$v/snapshots/before               keeps its present content; deleted written to its state deletes that
  echo gift > volumes/$v/transfer                 offers it: to whoever writes the key of transfers/$t to its accept

  echo 1 > instances/$u/last_task/cancel          gives up what runs on it, and undoes what that did

A value is one line. One write is one command; writing what is already true succeeds and changes nothing.
rm, rmdir and the like never delete a machine. Every change raises inotify and poll events.
Moves that mean something: an object into trash/ and back (also from by-name/), a link in by-state/ to another state, a
name in by-name/ to another name. Every other one is refused.
Making one: mkdir instances/$(uuidgen), write image, memory_bytes, ... and then active to state; a volume likewise, with
size_bytes or created_from, and available.
";

/// The content of `health`.
pub fn health(health: &Health) -> String {
    let parts = [
        ("hypervisor", &health.hypervisor),
        ("store", &health.store),
        ("directory", &health.directory),
        ("announcer", &health.announcer),
    ];
    let backends = health.backends.iter().map(|(name, part)| (name.as_str(), part));
    parts.into_iter().chain(backends).map(|(name, part)| format!("{name} {}\n", describe(part))).collect()
}

fn describe(part: &Part) -> String {
    let time = |since: u64| humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(since));
    match part {
        Part::Ok => "ok".to_owned(),
        Part::Hung { since } => format!("does not answer since {}", time(*since)),
        Part::Down { since, detail } => {
            format!("down since {}: {}", time(*since), detail.replace(|character: char| character.is_control(), " "))
        }
    }
}

/// The header of `summary/instances`.
pub const INSTANCES_HEADER: &str = "uuid\tname\tstate\ttask\tlocked\tdisable_terminate\towner\tproject\n";

/// One line of `summary/instances`. Names are written as in `by-name`, so that a line is a line.
pub fn instance_line(instance: &Instance) -> String {
    let record = &instance.record;
    format!(
        "{}\t{}\t{}\t{}\t{}\t{}\t{}\t{}\n",
        instance.id,
        escape(instance.name()),
        instance.observed().state.word(),
        instance.task.as_ref().map_or("", |task| task.operation.task_word().word()),
        u8::from(record.protection.lock.is_some()),
        u8::from(record.protection.disable_terminate),
        user_name(record.ownership.owner),
        group_name(record.ownership.project),
    )
}

/// The header of `summary/images`.
pub const IMAGES_HEADER: &str = "uuid\tname\tstate\ttask\tdisk_format\tsize_bytes\towner\tproject\n";

/// One line of `summary/images`.
pub fn image_line(image: &Image) -> String {
    let record = &image.record;
    format!(
        "{}\t{}\t{}\t{}\t{}\t{}\t{}\t{}\n",
        image.id,
        escape(&record.name),
        image.state().word(),
        image.task.as_ref().map_or("", |task| task.operation.task_word().word()),
        record.disk_format.map_or("", Format::word),
        record.size_bytes,
        user_name(record.ownership.owner),
        group_name(record.ownership.project),
    )
}

/// The header of `summary/volumes`.
pub const VOLUMES_HEADER: &str =
    "uuid\tname\tstate\ttask\tlocked\tdelete_protection\tsize_bytes\tbackend\towner\tproject\n";

/// One line of `summary/volumes`.
pub fn volume_line(volume: &Volume) -> String {
    let record = &volume.record;
    format!(
        "{}\t{}\t{}\t{}\t{}\t{}\t{}\t{}\t{}\t{}\n",
        volume.id,
        escape(&record.name),
        record.state().word(),
        volume.task.as_ref().map_or("", |task| task.operation.task_word().word()),
        u8::from(record.protection.lock.is_some()),
        u8::from(record.protection.disable_terminate),
        record.size_bytes,
        escape(&record.backend),
        user_name(record.ownership.owner),
        group_name(record.ownership.project),
    )
}
