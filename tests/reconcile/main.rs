//! The reconciler between the simulated hypervisor and a real store: what happens to domains, what is shown of it,
//! stored, mirrored, logged and announced.

mod addresses;
mod console;
mod domains;
mod failures;
mod mirror;
mod world;
