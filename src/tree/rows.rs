//! What the tables of the classes are written with: the usual kinds of rows.

use super::attribute::{KeyFile, Read, Row, Type, Write};
use super::reference::Resolver;
use crate::model::reason::Reason;

/// What reads the value that is written to a file.
type Parse<C> = fn(&str, &Resolver<'_>) -> Result<C, Reason>;
/// The same in a directory, with the file's name.
type ParseKey<C> = fn(&str, &str, &Resolver<'_>) -> Result<C, Reason>;

/// One that can neither be read nor written yet, which the others begin with.
pub(super) const fn row<O, C>(
    id: u8,
    name: &'static str,
    mode: u16,
    kind: Type,
    description: &'static str,
) -> Row<O, C> {
    Row { id, name, mode, kind, read: Read::Nothing, write: Write::Never, description }
}

/// Reads as said.
pub(super) const fn with_read<O, C>(mut row: Row<O, C>, read: Read<O>) -> Row<O, C> {
    row.read = read;
    row
}

/// A value.
pub(super) const fn read_only<O, C>(row: Row<O, C>, read: fn(&O) -> String) -> Row<O, C> {
    with_read(row, Read::Value(read))
}

/// A value that can be written.
pub(super) const fn writable<O, C>(row: Row<O, C>, read: fn(&O) -> String, write: Parse<C>) -> Row<O, C> {
    verb(read_only(row, read), write)
}

/// Writable, and nothing to read unless something else said so.
pub(super) const fn verb<O, C>(mut row: Row<O, C>, write: Parse<C>) -> Row<O, C> {
    row.write = Write::Change(write);
    row
}

/// A document that can be written.
pub(super) const fn document<O, C>(row: Row<O, C>, read: fn(&O) -> String, write: Write<C>) -> Row<O, C> {
    let mut row = with_read(row, Read::Document(read));
    row.write = write;
    row
}

/// A directory of files that are written.
pub(super) const fn directory<O, C>(row: Row<O, C>, read: fn(&O) -> Vec<KeyFile>, write: ParseKey<C>) -> Row<O, C> {
    let mut row = with_read(row, Read::Keys(read));
    row.write = Write::Key(write);
    row
}

/// A directory of files that are written, made and removed.
pub(super) const fn free_directory<O, C>(
    row: Row<O, C>,
    read: fn(&O) -> Vec<KeyFile>,
    write: ParseKey<C>,
    remove: fn(&str) -> Result<C, Reason>,
) -> Row<O, C> {
    let mut row = with_read(row, Read::Keys(read));
    row.write = Write::FreeKey { write, remove };
    row
}
