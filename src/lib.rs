//! instancefs: the virtual machines of a libvirt host as files.
//!
//! The rooms of the house, from the kernel down; imports point down only:
//!
//! - [`cli`]: the commands. `mount` puts all parts together (`cli/daemon.rs`). [`config`] is what can be configured.
//! - [`fuse`]: the only room that knows FUSE. Requests in, replies out, and changes back to the kernel.
//! - [`tree`]: the interface, and the only room that knows names, modes and text: one row of a table for each file.
//! - [`workflow`]: requests are judged, recorded, and done in journaled steps; what the hypervisor reports comes in here.
//! - [`inventory`]: the live objects as one view. All reads end here, none asks the hypervisor.
//! - [`model`]: what things are and what is allowed. No I/O, no clock, no threads, nothing of the other rooms.
//!
//! And what [`workflow`] works with:
//!
//! - [`store`]: records and journals, durable when acknowledged.
//! - [`hypervisor`]: what is needed of one; libvirt, and a simulated host for tests.
//! - [`block`]: the disks of guests, each marked with the operation that made it.
//! - [`image`]: which bytes are accepted as an image, and how they come in.
//!
//! And [`privilege`]: whether we are root, which every room may ask and only it knows; [`memory`] is given back by whoever
//! needed much for a moment.
//!
//! A change goes from the store to the inventory to the kernel, in this order. Whatever deletes asks first whether the
//! very operation that deletes has created it. `docs/architecture.md` has the decisions and their reasons.
#![warn(missing_docs)]

pub mod block;
pub mod cli;
pub mod config;
pub mod fuse;
pub mod hypervisor;
pub mod image;
pub mod inventory;
pub mod memory;
pub mod model;
pub mod privilege;
pub mod store;
pub mod tree;
pub mod workflow;
