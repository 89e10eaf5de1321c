//! The files of an image.

use super::account::{group, group_name, user, user_name};
use super::attribute::{KeyFile, Read, Row, Type, Write};
use super::directory::metadata;
use super::rows::{directory, document, free_directory, read_only, row, verb, with_read, writable};
use super::value::{boolean, escape, filled, malformed, metadata_key, name, number as number_of, unescape};
use super::{bin, errors, spec};
use crate::inventory::Image;
use crate::model::Class;
use crate::model::caller::Caller;
use crate::model::change::ImageChange;
use crate::model::image::{Format, Word, available};
use crate::model::sharing::{Status, Visibility};
use crate::workflow::request::DOCUMENT;

/// The rows; ids are fixed for ever.
pub type ImageRow = Row<Image, ImageChange>;

/// The table.
pub static ROWS: &[ImageRow] = &[
    writable(
        row(1, "name", 0o660, Type::Text, "Its name; need not be unique."),
        |image| image.record.name.clone(),
        |value, _| name(value).map(ImageChange::Name),
    ),
    writable(
        row(2, "description", 0o660, Type::Text, "Free text of one line; empty clears it."),
        |image| image.record.description.clone(),
        |value, _| Ok(ImageChange::Description(value.to_owned())),
    ),
    writable(
        row(
            3,
            "state",
            0o660,
            Type::Word,
            "draft, active or deactivated. Writing active to a draft verifies and publishes it; a refused draft stays a \
             draft. Writing deactivated takes an active one out of use: only root reads its data, and nothing new boots \
             from it; guests that run on it go on. Writing deleted discards a draft.",
        ),
        |image| image.state().word().to_owned(),
        |value, _| Word::parse(filled(value)?).map(ImageChange::State),
    ),
    read_only(
        row(4, "state_available", 0o440, Type::Word, "The words that a write to state would be allowed now."),
        |image| available(&image.situation(&Caller::daemon())).join(" "),
    ),
    read_only(
        row(5, "task", 0o440, Type::Word, "saving while an image is verified, deleting; empty when idle."),
        |image| image.task.as_ref().map_or("", |task| task.operation.task_word().word()).to_owned(),
    ),
    read_only(
        row(6, "progress", 0o440, Type::Number("percent"), "How far the operation is; empty when idle."),
        |image| image.task.as_ref().map_or_else(String::new, |task| task.progress.to_string()),
    ),
    with_read(
        row(7, "last_task", 0o777, Type::Link, "The latest operation. Absent until there was one."),
        Read::Link(|image| image.record.last_task.map(|id| format!("../../tasks/{id}"))),
    ),
    writable(
        row(
            8,
            "disk_format",
            0o660,
            Type::Word,
            "qcow2 or raw. Unset: qcow2 by its magic, raw if no known magic is found; a written one must agree.",
        ),
        |image| image.record.disk_format.map_or("", Format::word).to_owned(),
        |value, _| match filled(value)? {
            "qcow2" => Ok(ImageChange::DiskFormat(Format::Qcow2)),
            "raw" => Ok(ImageChange::DiskFormat(Format::Raw)),
            _ => Err(malformed("write qcow2 or raw")),
        },
    ),
    Row {
        read: Read::Data,
        write: Write::Data,
        ..row(9, "data", 0o660, Type::Data, "The image itself: written in a draft, never changed (0440) once active.")
    },
    read_only(row(10, "size_bytes", 0o440, Type::Number("bytes"), "Length of data; empty until active."), |image| {
        number(image, image.record.size_bytes)
    }),
    read_only(
        row(11, "virtual_size_bytes", 0o440, Type::Number("bytes"), "What a guest sees; empty until active."),
        |image| number(image, image.record.virtual_size_bytes),
    ),
    read_only(row(12, "sha512", 0o440, Type::Text, "SHA-512 of data, hexadecimal; empty until active."), |image| {
        image.record.sha512.clone().unwrap_or_default()
    }),
    writable(
        row(13, "owner", 0o640, Type::User, "Whose it is; root may change it."),
        |image| user_name(image.record.ownership.owner),
        |value, _| user(value).map(ImageChange::Owner),
    ),
    writable(
        row(14, "project", 0o640, Type::Group, "The group that shares it; nogroup for none. Root may change it."),
        |image| group_name(image.record.ownership.project),
        |value, _| group(value).map(ImageChange::Project),
    ),
    read_only(row(15, "created_at", 0o440, Type::Time, "When it was made."), |image| {
        image.record.created_at.to_string()
    }),
    read_only(row(16, "updated_at", 0o440, Type::Time, "When it last changed."), |image| {
        image.record.updated_at.to_string()
    }),
    with_read(
        row(
            17,
            "last_error",
            0o440,
            Type::Text,
            "ok, or the last refusal or failure: time, login, file, errno, reason.",
        ),
        Read::Document(|image| errors::last(&image.record.errors)),
    ),
    with_read(
        row(18, "errors", 0o440, Type::Document("lines"), "The last 16 refusals and failures, the newest last."),
        Read::Document(|image| errors::all(&image.record.errors)),
    ),
    writable(
        row(
            19,
            "import_from",
            0o660,
            Type::Text,
            "In a draft: an http or https URL, or a path below the import directory; writing active to state imports it.",
        ),
        |image| image.record.import_from.clone().unwrap_or_default(),
        |value, _| Ok(ImageChange::ImportFrom(Some(value.to_owned()).filter(|value| !value.is_empty()))),
    ),
    free_directory(
        row(
            20,
            "metadata",
            0o770,
            Type::Directory,
            "Free text under keys of your own, one file each. Keys are made and removed through spec.json.",
        ),
        |image| metadata(&image.record.metadata),
        |key, value, _| metadata_key(key).map(|key| ImageChange::Metadata(key, Some(value.to_owned()))),
        |key| metadata_key(key).map(|key| ImageChange::Metadata(key, None)),
    ),
    writable(
        row(
            21,
            "visibility",
            0o660,
            Type::Word,
            "Who may read the image besides owner and project: private, nobody; shared, its members; public, everybody \
             in the access group (root alone writes that). A draft is read by nobody else.",
        ),
        |image| image.record.sharing.visibility.word().to_owned(),
        |value, _| Visibility::parse(filled(value)?).map(ImageChange::Visibility),
    ),
    verb(
        row(
            22,
            "share",
            0o220,
            Type::Group,
            "A project that is to be a member of a shared image, by name or number; 128 at most.",
        ),
        |value, _| group(value).map(ImageChange::Share),
    ),
    verb(
        row(23, "unshare", 0o220, Type::Group, "A project that is to be a member no more; its next open is refused."),
        |value, _| group(value).map(ImageChange::Unshare),
    ),
    directory(
        row(
            24,
            "members",
            0o770,
            Type::Directory,
            "The projects that a shared image is shared with, one file each: pending, accepted or rejected, which the \
             member alone writes. It gives and takes no right: a member reads the image whatever it says here.",
        ),
        members,
        |file_name, value, _| {
            let project = unescape(file_name).ok_or_else(|| malformed("this is no project"))?;
            Ok(ImageChange::Member { project: group(&project)?, status: Status::parse(filled(value)?)? })
        },
    ),
    writable(
        row(
            25,
            "delete_protection",
            0o660,
            Type::Boolean,
            "1 refuses every kind of deletion, for everybody. It stops no other change.",
        ),
        |image| u8::from(image.record.delete_protection).to_string(),
        |value, _| boolean(filled(value)?).map(ImageChange::DeleteProtection),
    ),
    writable(
        row(
            26,
            "min_disk_bytes",
            0o660,
            Type::Number("bytes"),
            "What the root disk of a guest made from it must have at least; 0 for no demand.",
        ),
        |image| image.record.min_disk_bytes.to_string(),
        |value, _| number_of(filled(value)?, 0, LARGEST, "bytes").map(ImageChange::MinDiskBytes),
    ),
    writable(
        row(
            27,
            "min_memory_bytes",
            0o660,
            Type::Number("bytes"),
            "What the memory of a guest made from it must have at least; 0 for no demand.",
        ),
        |image| image.record.min_memory_bytes.to_string(),
        |value, _| number_of(filled(value)?, 0, LARGEST, "bytes").map(ImageChange::MinMemoryBytes),
    ),
    document(
        row(
            50,
            DOCUMENT,
            0o660,
            Type::Document("JSON"),
            "What can be written, as one document; see images.schema.json. Written, it is taken or refused as a whole; \
             keys that are absent stay.",
        ),
        spec::render,
        Write::Spec,
    ),
    with_read(
        row(70, "class", 0o440, Type::Word, bin::CLASS),
        Read::Sometimes(|image| bin::class(Class::Image, image.record.bin.as_ref())),
    ),
    with_read(
        row(71, "deleted_at", 0o440, Type::Time, bin::DELETED_AT),
        Read::Sometimes(|image| bin::deleted_at(image.record.bin.as_ref())),
    ),
    with_read(
        row(72, "deleted_by", 0o440, Type::User, bin::DELETED_BY),
        Read::Sometimes(|image| bin::deleted_by(image.record.bin.as_ref())),
    ),
    ImageRow {
        write: Write::Change(|value, _| bin::expiry(value).map(ImageChange::ExpiresAt)),
        ..with_read(
            row(73, "expires_at", 0o660, Type::Time, bin::EXPIRES_AT),
            Read::Sometimes(|image| bin::expires_at(image.record.bin.as_ref())),
        )
    },
];

/// The files of `members/`.
fn members(image: &Image) -> Vec<KeyFile> {
    let file = |(project, serial, status): (u32, u32, Status)| KeyFile {
        serial,
        name: escape(&group_name(project)),
        value: status.word().to_owned(),
        writer: Some(project),
    };
    image.record.sharing.members.iter().map(file).collect()
}

/// The largest demand: what a disk can have.
const LARGEST: u64 = i64::MAX as u64;

fn number(image: &Image, bytes: u64) -> String {
    if image.record.draft.is_some() { String::new() } else { bytes.to_string() }
}
