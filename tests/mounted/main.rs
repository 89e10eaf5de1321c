//! The tree through a real mount, subject by subject.

mod building;
mod data;
mod handles;
mod images;
mod renames;
mod rights;
mod waiting;

#[path = "../support/mod.rs"]
mod support;
