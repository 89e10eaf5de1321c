//! The files of a flavor.

use super::account::{group, group_name};
use super::attribute::{Read, Row, Type, Write};
use super::rows::{document, read_only, row, with_read, writable};
use super::value::{boolean, filled, memory_bytes, root_disk_bytes, vcpus};
use super::{errors, spec};
use crate::inventory::Flavor;
use crate::model::caller::NO_PROJECT;
use crate::model::flavor::{FlavorChange, Word, available, state};
use crate::model::reason::Reason;
use crate::workflow::request::DOCUMENT;

/// The rows; ids are fixed for ever.
pub type FlavorRow = Row<Flavor, FlavorChange>;

/// The table.
pub static ROWS: &[FlavorRow] = &[
    writable(
        row(1, "description", 0o660, Type::Text, "Free text of one line; empty clears it."),
        |flavor| flavor.record.description.clone(),
        |value, _| Ok(FlavorChange::Description(value.to_owned())),
    ),
    writable(
        row(
            2,
            "state",
            0o660,
            Type::Word,
            "draft or active. Written by root: active offers it, draft takes it out of use, deleted removes a draft. \
             Instances keep the values that were copied.",
        ),
        |flavor| state(&flavor.record).word().to_owned(),
        |value, _| Word::parse(filled(value)?).map(FlavorChange::State),
    ),
    read_only(
        row(3, "state_available", 0o440, Type::Word, "The words that a write to state would be allowed now."),
        |flavor| available(state(&flavor.record)).join(" "),
    ),
    writable(
        row(4, "vcpus", 0o660, Type::Number(""), "Virtual CPUs; written by root."),
        |flavor| flavor.record.vcpus.to_string(),
        |value, _| vcpus(filled(value)?).map(FlavorChange::Vcpus),
    ),
    writable(
        row(5, "memory_bytes", 0o660, Type::Number("bytes"), "Memory; written by root."),
        |flavor| flavor.record.memory_bytes.to_string(),
        |value, _| memory_bytes(filled(value)?).map(FlavorChange::MemoryBytes),
    ),
    writable(
        row(
            6,
            "root_disk_bytes",
            0o660,
            Type::Number("bytes"),
            "Size of the root disk; written by root, empty means the image's size.",
        ),
        |flavor| flavor.record.root_disk_bytes.map_or_else(String::new, |bytes| bytes.to_string()),
        |value, _| match value {
            "" => Ok(FlavorChange::RootDiskBytes(None)),
            value => root_disk_bytes(value).map(|bytes| FlavorChange::RootDiskBytes(Some(bytes))),
        },
    ),
    writable(
        row(
            7,
            "is_public",
            0o660,
            Type::Boolean,
            "1: everybody in the access group may read and use it; 0: root and the members of access. Written by root.",
        ),
        |flavor| u8::from(flavor.record.is_public).to_string(),
        |value, _| boolean(value).map(FlavorChange::IsPublic),
    ),
    document(
        row(
            8,
            "access",
            0o660,
            Type::Groups,
            "The projects that may use it where it is not public, one per line. Root writes the whole list, \
             separated by whitespace; empty clears it.",
        ),
        |flavor| flavor.record.access.iter().map(|gid| group_name(*gid) + "\n").collect(),
        Write::Change(|value, _| groups(value).map(FlavorChange::Access)),
    ),
    read_only(row(9, "created_at", 0o440, Type::Time, "When it was made."), |flavor| {
        flavor.record.created_at.to_string()
    }),
    read_only(row(10, "updated_at", 0o440, Type::Time, "When it last changed."), |flavor| {
        flavor.record.updated_at.to_string()
    }),
    with_read(
        row(11, "last_error", 0o440, Type::Text, "ok, or the last refusal: time, login, file, errno, reason."),
        Read::Document(|flavor| errors::last(&flavor.record.errors)),
    ),
    with_read(
        row(12, "errors", 0o440, Type::Document("lines"), "The last 16 refusals, the newest last."),
        Read::Document(|flavor| errors::all(&flavor.record.errors)),
    ),
    document(
        row(
            50,
            DOCUMENT,
            0o660,
            Type::Document("JSON"),
            "What can be written, as one document; see flavors.schema.json. Written by root, it is taken or refused as a whole; \
             keys that are absent stay.",
        ),
        spec::render,
        Write::Spec,
    ),
];

/// Projects by name or number.
fn groups(value: &str) -> Result<Vec<u32>, Reason> {
    let mut groups = value.split_whitespace().map(group).collect::<Result<Vec<_>, _>>()?;
    if groups.contains(&NO_PROJECT) {
        return Err(Reason::Malformed("nogroup is no project".to_owned()));
    }
    groups.sort_unstable();
    groups.dedup();
    Ok(groups)
}
