//! libvirt as the hypervisor: one connection that is kept up, its events, and what its words mean to us.
//!
//! [`open`] is the door. [`target`] reads `--connect`; [`embed`] prepares libvirt's QEMU driver inside our own process;
//! [`connection`] keeps the connection up; [`backend`] is the [`Hypervisor`] on top of it; [`accelerator`] finds out
//! whether KVM really works; [`capabilities`] spares libvirt endless probes where guests may not have it;
//! `neighbours` knows guests' addresses where libvirt does not; [`greeting`] says who answers; `sys` is the only place
//! with unsafe calls.

pub mod accelerator;
pub mod backend;
pub mod capabilities;
pub mod connection;
pub mod embed;
mod error;
pub mod greeting;
mod neighbours;
mod power;
mod sys;
pub mod target;

use std::path::Path;
use std::sync::Arc;

use super::{Accelerator, Hypervisor, HypervisorError};
pub use backend::Libvirt;
pub use target::Target;

/// Makes the libvirt hypervisor that `target` names, not connected yet: take [`Hypervisor::events`], then call
/// [`Hypervisor::connect`].
///
/// `state_dir` keeps what was found out about this host. `accelerator` overrides the probe; without it, the environment
/// variable `INSTANCEFS_ACCELERATOR` (`kvm` or `tcg`) does.
///
/// # Errors
///
/// [`HypervisorError::Failed`] if libvirt's event loop cannot be started or the environment variable is no accelerator.
pub fn open(
    target: Target,
    state_dir: &Path,
    accelerator: Option<Accelerator>,
) -> Result<Arc<dyn Hypervisor>, HypervisorError> {
    let accelerator = match accelerator {
        Some(accelerator) => Some(accelerator),
        None => accelerator::from_environment().map_err(HypervisorError::Failed)?,
    };
    Ok(Arc::new(Libvirt::new(target, state_dir, accelerator)?))
}
