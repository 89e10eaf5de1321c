//! The rig: every operation is disturbed at every step, in every way that matters.

mod campaign;
mod case;
mod devices;
mod memory;
mod points;
mod scene;
mod table;
mod wire;
mod wrappers;
