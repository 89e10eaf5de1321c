//! Every example of `mount-examples`, on a mount, twice: with the usual settle window and with none.

mod administration;
mod configuration;
mod editing;
mod giving;
mod stage;
#[path = "../support/mod.rs"]
mod support;
mod taking;
mod watching;
