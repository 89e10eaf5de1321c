//! The files of a backend.

use std::convert::Infallible;

use super::attribute::{Read, Row, Type, Write};
use crate::inventory::Backend;

/// The rows; ids are fixed for ever.
pub type BackendRow = Row<Backend, Infallible>;

const fn row(
    id: u8,
    name: &'static str,
    kind: Type,
    read: fn(&Backend) -> String,
    description: &'static str,
) -> BackendRow {
    Row { id, name, mode: 0o440, kind, read: Read::Value(read), write: Write::Never, description }
}

/// The table.
pub static ROWS: &[BackendRow] = &[
    row(
        1,
        "type",
        Type::Word,
        |backend| backend.record.kind.word().to_owned(),
        "directory: files below one directory.",
    ),
    row(
        2,
        "total_bytes",
        Type::Number("bytes"),
        |backend| backend.capacity.map_or_else(String::new, |(total, _)| total.to_string()),
        "How much fits in it, as last asked; empty if it does not say.",
    ),
    row(
        3,
        "free_bytes",
        Type::Number("bytes"),
        |backend| backend.capacity.map_or_else(String::new, |(_, free)| free.to_string()),
        "How much of that is free, as last asked; empty if it does not say.",
    ),
];
