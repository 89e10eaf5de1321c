//! The kernel's edge with a fake tree behind it, mounted for real and used by real tools.

mod announcing;
mod fake;
mod serving;
mod world;
