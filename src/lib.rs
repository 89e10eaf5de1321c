//! instancefs: the virtual machines of a libvirt host as files.
#![warn(missing_docs)]

pub mod block;
pub mod hypervisor;
pub mod image;
pub mod store;
