//! instancefs: the virtual machines of a libvirt host as files.
#![warn(missing_docs)]

pub mod block;
pub mod cli;
pub mod config;
pub mod fuse;
pub mod hypervisor;
pub mod image;
pub mod inventory;
pub mod model;
pub mod store;
pub mod tree;
pub mod workflow;
