//! Images: which bytes we accept as one, and how they come in.
//!
//! [`inspect`] is the only judge of a format, and no other program reads a byte of a draft before it agreed.

pub(crate) mod durable;
pub mod extent;
pub mod import;
pub mod ingest;
pub mod inspect;
pub mod qemu_img;
pub mod remove;

use serde::{Deserialize, Serialize};

pub use crate::model::image::Format;

/// What an inspection found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inspected {
    /// The format, which agrees with the claimed one if there was a claim.
    pub format: Format,
    /// The size that a guest sees, in bytes.
    pub virtual_size_bytes: u64,
}
