//! The workflow room against the simulated hypervisor: requests, operations, failures, crashes.

mod attach;
mod attached_outside;
mod bin;
mod boot;
mod crash;
mod define_again;
mod devices;
mod disks;
mod image;
mod image_bin;
mod keeper;
mod kept;
mod lab;
mod local_attach;
mod offers;
mod power;
mod protection;
mod reconfigure;
mod requests;
mod rig;
mod shelve;
mod volume_files;
mod volumes;
