//! Hostile images: none is accepted, none makes anybody read what it names, and none harms the inspector.

mod allocation;
mod changing;
mod corpus;
mod foreign;
mod fuzz;
mod matrix;
mod mounted;
mod qcow2;
mod witness;

#[path = "../support/mod.rs"]
mod support;

use std::fs::File;
use std::io::Write;

use nix::sys::memfd::{MFdFlags, memfd_create};

/// A file in memory with these bytes.
fn file(bytes: &[u8]) -> File {
    let mut file = File::from(memfd_create("image", MFdFlags::MFD_CLOEXEC).expect("a file in memory"));
    file.write_all(bytes).expect("written");
    file
}
