//! The tree through a real mount, subject by subject.

mod data;
mod handles;
mod images;
mod renames;
mod rights;
mod waiting;

#[path = "../support/mod.rs"]
mod support;
