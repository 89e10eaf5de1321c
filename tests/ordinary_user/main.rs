//! An ordinary user mounts the tree for his own machines.

mod guest;
#[path = "../support/mod.rs"]
mod support;
mod tree;
mod user;
