//! The files of an offer.

use super::attribute::{Read, Row, Type, Write};
use super::errors;
use super::rows::verb;
use super::value::{filled, malformed};
use crate::inventory::Transfer;
use crate::model::Class;
use crate::model::secret::Secret;
use crate::model::transfer::{State, TransferChange};

/// The rows; ids are fixed for ever.
pub type TransferRow = Row<Transfer, TransferChange>;

const fn row(
    id: u8,
    name: &'static str,
    mode: u16,
    kind: Type,
    read: Read<Transfer>,
    description: &'static str,
) -> TransferRow {
    Row { id, name, mode, kind, read, write: Write::Never, description }
}

/// `accept`
pub const ACCEPT: u8 = 6;

/// The table.
pub static ROWS: &[TransferRow] = &[
    row(
        1,
        "name",
        0o440,
        Type::Text,
        Read::Value(|transfer| transfer.record.name.clone()),
        "Its name, as the offer said.",
    ),
    row(
        2,
        "volume",
        0o440,
        Type::Object,
        Read::Place(|transfer| Some((Class::Volume, transfer.record.volume))),
        "What is offered.",
    ),
    row(
        3,
        "created_at",
        0o440,
        Type::Time,
        Read::Value(|transfer| transfer.record.created_at.to_string()),
        "When it was made.",
    ),
    row(
        4,
        "expires_at",
        0o440,
        Type::Time,
        Read::Value(|transfer| transfer.record.expiry.at.to_string()),
        "Until when it can be taken.",
    ),
    verb(
        row(
            5,
            "state",
            0o660,
            Type::Word,
            Read::Value(|transfer| transfer.record.state.word().to_owned()),
            "pending, accepted, cancelled or expired. Writing cancelled takes it back.",
        ),
        |value, _| {
            if filled(value)? == State::Cancelled.word() {
                Ok(TransferChange::Cancel)
            } else {
                Err(malformed("write cancelled"))
            }
        },
    ),
    verb(
        row(
            ACCEPT,
            "accept",
            0o222,
            Type::Text,
            Read::Nothing,
            "The key; a named recipient writes 1. Whoever writes the right one owns the volume, once. Five wrong keys \
             within an hour shut out who wrote them.",
        ),
        |value, _| Ok(TransferChange::Accept(Secret::new(filled(value)?.to_owned()))),
    ),
    row(
        7,
        "auth_key",
        0o400,
        Type::Text,
        Read::OfferKey,
        "The key, for who made the offer and nobody else, and for ten minutes or until the daemon restarts; it is stored \
         nowhere. Size 0, not cached.",
    ),
    row(
        8,
        "last_error",
        0o440,
        Type::Text,
        Read::Document(|transfer| errors::last(&transfer.record.errors)),
        "ok, or the last refusal: time, login, file, errno, reason.",
    ),
];
