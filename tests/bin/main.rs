//! The bin as people meet it: moves with ordinary tools, views that follow, watchers that hear of it, and who may.

mod moves;
mod places;
mod rights;
#[path = "../support/mod.rs"]
mod support;
mod watchers;
