//! The files of a volume.

use super::account::{group, group_name, user, user_name};
use super::attribute::{KeyFile, Read, Row, Type, Write};
use super::rows::{document, read_only, row, verb, with_read, writable};
use super::value::{boolean, escape, filled, malformed, name, number, unescape};
use super::{bin, errors, offer, spec};
use crate::inventory::Volume;
use crate::model::Class;
use crate::model::caller::Caller;
use crate::model::image::Format;
use crate::model::reason::Reason;
use crate::model::volume::change::VolumeChange;
use crate::model::volume::record::{Origin, SnapshotRecord};
use crate::model::volume::{Word, available};
use crate::workflow::request::DOCUMENT;

/// The rows; ids are fixed for ever.
pub type VolumeRow = Row<Volume, VolumeChange>;

/// `attachments`
pub const ATTACHMENTS: u8 = 31;
/// `snapshots`
pub const SNAPSHOTS: u8 = 32;

/// The table.
pub static ROWS: &[VolumeRow] = &[
    writable(
        row(1, "name", 0o660, Type::Text, "Its name; need not be unique."),
        |volume| volume.record.name.clone(),
        |value, _| name(value).map(VolumeChange::Name),
    ),
    writable(
        row(2, "description", 0o660, Type::Text, "Free text of one line; empty clears it."),
        |volume| volume.record.description.clone(),
        |value, _| Ok(VolumeChange::Description(value.to_owned())),
    ),
    writable(
        row(
            3,
            "state",
            0o660,
            Type::Word,
            "draft, available, in_use, awaiting_transfer or error; soft_deleted in the bin. Writing available makes a \
             draft, and looks again at one in error.",
        ),
        |volume| volume.record.state().word().to_owned(),
        |value, _| Word::parse(filled(value)?).map(VolumeChange::State),
    ),
    read_only(
        row(4, "state_available", 0o440, Type::Word, "The words that a write to state would be allowed now."),
        |volume| available(&volume.situation(&Caller::daemon(), None)).join(" "),
    ),
    read_only(
        row(
            5,
            "task",
            0o440,
            Type::Word,
            "creating, extending, attaching, detaching, snapshotting, deleting_snapshot, examining or deleting; empty \
             when idle.",
        ),
        |volume| volume.task.as_ref().map_or("", |task| task.operation.task_word().word()).to_owned(),
    ),
    read_only(
        row(6, "progress", 0o440, Type::Number("percent"), "How far the operation is; empty when idle."),
        |volume| volume.task.as_ref().map_or_else(String::new, |task| task.progress.to_string()),
    ),
    with_read(
        row(7, "last_task", 0o777, Type::Link, "The latest operation. Absent until there was one."),
        Read::Link(|volume| volume.record.last_task.map(|id| format!("../../tasks/{id}"))),
    ),
    writable(
        row(8, "size_bytes", 0o660, Type::Number("bytes"), "What a guest sees of it; may grow, never shrink."),
        |volume| volume.record.size_bytes.to_string(),
        |value, _| number(filled(value)?, 1, i64::MAX as u64, "bytes").map(VolumeChange::SizeBytes),
    ),
    writable(
        row(9, "backend", 0o660, Type::Text, "Where its data is kept: a name in backends/. In a draft."),
        |volume| volume.record.backend.clone(),
        |value, _| Ok(VolumeChange::Backend(filled(value)?.to_owned())),
    ),
    writable(
        row(10, "disk_format", 0o660, Type::Word, "raw or qcow2. In a draft; unset: the backend's own choice."),
        |volume| volume.record.disk_format.map_or("", Format::word).to_owned(),
        |value, _| match filled(value)? {
            "qcow2" => Ok(VolumeChange::DiskFormat(Format::Qcow2)),
            "raw" => Ok(VolumeChange::DiskFormat(Format::Raw)),
            _ => Err(malformed("write qcow2 or raw")),
        },
    ),
    writable(
        row(11, "bootable", 0o660, Type::Boolean, "1: an instance may boot from it."),
        |volume| u8::from(volume.record.bootable).to_string(),
        |value, _| boolean(filled(value)?).map(VolumeChange::Bootable),
    ),
    writable(
        row(
            12,
            "multiattach",
            0o660,
            Type::Boolean,
            "1: several instances may have it at once, whose systems have to know how to share a disk.",
        ),
        |volume| u8::from(volume.record.multiattach).to_string(),
        |value, _| boolean(filled(value)?).map(VolumeChange::Multiattach),
    ),
    writable(
        row(13, "owner", 0o640, Type::User, "Whose it is; root may change it."),
        |volume| user_name(volume.record.ownership.owner),
        |value, _| user(value).map(VolumeChange::Owner),
    ),
    writable(
        row(14, "project", 0o640, Type::Group, "The group that shares it; nogroup for none. Root may change it."),
        |volume| group_name(volume.record.ownership.project),
        |value, _| group(value).map(VolumeChange::Project),
    ),
    read_only(row(15, "created_at", 0o440, Type::Time, "When it was made."), |volume| {
        volume.record.created_at.to_string()
    }),
    read_only(row(16, "updated_at", 0o440, Type::Time, "When it last changed."), |volume| {
        volume.record.updated_at.to_string()
    }),
    with_read(
        row(
            17,
            "last_error",
            0o440,
            Type::Text,
            "ok, or the last refusal or failure: time, login, file, errno, reason.",
        ),
        Read::Document(|volume| errors::last(&volume.record.errors)),
    ),
    with_read(
        row(18, "errors", 0o440, Type::Document("lines"), "The last 16 refusals and failures, the newest last."),
        Read::Document(|volume| errors::all(&volume.record.errors)),
    ),
    writable(
        row(
            19,
            "locked",
            0o660,
            Type::Boolean,
            "1 refuses every change, for everybody, root included, until somebody writes 0.",
        ),
        |volume| u8::from(volume.record.protection.lock.is_some()).to_string(),
        |value, _| boolean(filled(value)?).map(VolumeChange::Locked),
    ),
    read_only(row(20, "locked_by", 0o440, Type::User, "Login name of who locked it."), |volume| {
        volume.record.protection.lock.as_ref().map_or_else(String::new, |lock| lock.by.clone())
    }),
    read_only(row(21, "locked_at", 0o440, Type::Time, "When it was locked."), |volume| {
        volume.record.protection.lock.as_ref().map_or_else(String::new, |lock| lock.at.to_string())
    }),
    read_only(
        row(22, "locked_level", 0o440, Type::Word, "owner or admin: an admin's lock is opened by root only."),
        |volume| volume.record.protection.lock.as_ref().map_or("", |lock| lock.level.word()).to_owned(),
    ),
    writable(
        row(23, "locked_reason", 0o660, Type::Text, "Why; unlocking clears it."),
        |volume| volume.record.protection.lock.as_ref().map_or_else(String::new, |lock| lock.reason.clone()),
        |value, _| Ok(VolumeChange::LockedReason(value.to_owned())),
    ),
    writable(
        row(24, "delete_protection", 0o660, Type::Boolean, "1 refuses every kind of deletion, for everybody."),
        |volume| u8::from(volume.record.protection.disable_terminate).to_string(),
        |value, _| boolean(filled(value)?).map(VolumeChange::DeleteProtection),
    ),
    writable(
        row(
            25,
            "created_from",
            0o660,
            Type::Text,
            "In a draft: image:, volume: or snapshot: and an object, of which it is to be a copy; or \
             existing:BACKEND:REFERENCE, data that is there already and stays where it is (root).",
        ),
        |volume| volume.record.created_from.as_ref().map_or_else(String::new, Origin::to_string),
        |value, resolver| resolver.origin(filled(value)?).map(VolumeChange::CreatedFrom),
    ),
    verb(
        row(26, "attach", 0o220, Type::Object, "INSTANCE [DEVICE]: gives it to an instance, live if that runs."),
        |value, resolver| {
            let mut words = filled(value)?.split_ascii_whitespace();
            let instance = resolver.instance(words.next().unwrap_or_default())?;
            let device = words.next().map(str::to_owned);
            match words.next() {
                None => Ok(VolumeChange::Attach { instance, device }),
                Some(_) => Err(malformed("write an instance, and a device name such as vdb if it matters")),
            }
        },
    ),
    verb(
        row(
            27,
            "detach",
            0o220,
            Type::Object,
            "INSTANCE: takes it from an instance; 1 while there is one that has it.",
        ),
        |value, resolver| match filled(value)? {
            "1" => Ok(VolumeChange::Detach(None)),
            value => resolver.instance(value).map(|instance| VolumeChange::Detach(Some(instance))),
        },
    ),
    writable(
        row(
            28,
            "local_attach",
            0o640,
            Type::Boolean,
            "1 makes it a block device of this host, 0 takes that away; root only. It is made again when the host \
             restarts.",
        ),
        |volume| u8::from(volume.record.local.is_some()).to_string(),
        |value, _| boolean(filled(value)?).map(VolumeChange::LocalAttach),
    ),
    read_only(
        row(29, "local_device", 0o440, Type::Text, "That device, such as /dev/loop3; empty without one."),
        |volume| {
            let device = volume.record.local.as_ref().and_then(|local| local.device.as_ref());
            device.map_or_else(String::new, |device| device.display().to_string())
        },
    ),
    verb(
        row(30, "unmanage", 0o220, Type::Boolean, "1: forgets the volume and keeps its data as it lies; root only."),
        |value, _| match filled(value)? {
            "1" => Ok(VolumeChange::Unmanage),
            _ => Err(malformed("write 1")),
        },
    ),
    with_read(
        row(
            ATTACHMENTS,
            "attachments",
            0o550,
            Type::Directory,
            "The instances that have it: symlinks, named by their uuids.",
        ),
        Read::Links(attachments),
    ),
    with_read(
        row(
            SNAPSHOTS,
            "snapshots",
            0o770,
            Type::Directory,
            "Its contents at other moments, one directory each; mkdir takes one, of what nobody writes to. 128 at most.",
        ),
        Read::Nested(|volume| snapshots(volume, |_| String::new())),
    ),
    VolumeRow {
        write: Write::Key(|file_name, value, _| delete_snapshot(file_name, filled(value)?)),
        ..with_read(
            row(
                33,
                "snapshots/*/state",
                0o660,
                Type::Word,
                "creating or available. Writing deleted deletes it for good; rm and rmdir do not.",
            ),
            Read::Entries(|volume| snapshots(volume, |snapshot| snapshot_state(snapshot).to_owned())),
        )
    },
    with_read(
        row(34, "snapshots/*/size_bytes", 0o440, Type::Number("bytes"), "The volume's size at that moment."),
        Read::Entries(|volume| snapshots(volume, |snapshot| snapshot.size_bytes.to_string())),
    ),
    with_read(
        row(35, "snapshots/*/created_at", 0o440, Type::Time, "That moment."),
        Read::Entries(|volume| snapshots(volume, |snapshot| snapshot.created_at.to_string())),
    ),
    VolumeRow {
        read: Read::Value(|volume| volume.record.transfer.map(|id| id.to_string()).unwrap_or_default()),
        write: Write::Order(|value, _| offer::parse(filled(value)?)),
        ..row(
            36,
            "transfer",
            0o660,
            Type::Text,
            "NAME [to=USER or to=:GROUP] offers it: to whoever has the key that transfers/UUID/auth_key shows, or to \
             these alone. Reads the offer's uuid; empty without one. Nobody can use the volume meanwhile.",
        )
    },
    document(
        row(
            50,
            DOCUMENT,
            0o660,
            Type::Document("JSON"),
            "What can be written, as one document; see volumes.schema.json. Written, it is taken or refused as a whole; \
             keys that are absent stay.",
        ),
        spec::render,
        Write::Spec,
    ),
    with_read(
        row(70, "class", 0o440, Type::Word, bin::CLASS),
        Read::Sometimes(|volume| bin::class(Class::Volume, volume.record.bin.as_ref())),
    ),
    with_read(
        row(71, "deleted_at", 0o440, Type::Time, bin::DELETED_AT),
        Read::Sometimes(|volume| bin::deleted_at(volume.record.bin.as_ref())),
    ),
    with_read(
        row(72, "deleted_by", 0o440, Type::User, bin::DELETED_BY),
        Read::Sometimes(|volume| bin::deleted_by(volume.record.bin.as_ref())),
    ),
    VolumeRow {
        write: Write::Change(|value, _| bin::expiry(value).map(VolumeChange::ExpiresAt)),
        ..with_read(
            row(73, "expires_at", 0o660, Type::Time, bin::EXPIRES_AT),
            Read::Sometimes(|volume| bin::expires_at(volume.record.bin.as_ref())),
        )
    },
];

fn attachments(volume: &Volume) -> Vec<KeyFile> {
    let link = |(id, entry): (&str, &crate::model::keys::Entry<_>)| KeyFile {
        serial: entry.serial,
        name: id.to_owned(),
        value: id.to_owned(),
        writer: None,
    };
    volume.record.attachments.iter().map(link).collect()
}

/// One of the values of every snapshot.
fn snapshots(volume: &Volume, value: fn(&SnapshotRecord) -> String) -> Vec<KeyFile> {
    let file = |(name, entry): (&str, &crate::model::keys::Entry<SnapshotRecord>)| KeyFile {
        serial: entry.serial,
        name: escape(name),
        value: value(&entry.value),
        writer: None,
    };
    volume.record.snapshots.iter().map(file).collect()
}

fn snapshot_state(snapshot: &SnapshotRecord) -> &'static str {
    if snapshot.data.is_some() { "available" } else { "creating" }
}

/// The name of a snapshot whose directory is to be named so.
///
/// # Errors
///
/// [`Reason::Malformed`] where it is no name as a file name is written.
pub fn snapshot_name(file_name: &str) -> Result<String, Reason> {
    let wanted = unescape(file_name).and_then(|wanted| name(super::value::text(wanted.as_bytes()).ok()?).ok());
    wanted.filter(|wanted| escape(wanted) == file_name).ok_or_else(|| {
        malformed("a snapshot's name is one line without / in front or spaces behind, written as by-name does")
    })
}

fn delete_snapshot(file_name: &str, word: &str) -> Result<VolumeChange, Reason> {
    if word != "deleted" {
        return Err(malformed("write deleted"));
    }
    snapshot_name(file_name).map(VolumeChange::DeleteSnapshot)
}
