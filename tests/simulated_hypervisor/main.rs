//! The simulated hypervisor behaves as libvirt does, outlives its process, and misbehaves as told.

mod behaviour;
mod faults;
mod lab;
mod lives;
