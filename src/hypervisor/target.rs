//! Which hypervisor `--connect` or a state directory's record means.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::simulated::SimulatedHypervisor;
use super::{Hypervisor, HypervisorError, libvirt};

/// The scheme of the simulated hypervisor, followed by its directory; for tests.
const SIMULATED: &str = "simulated:";

/// A hypervisor to open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// One that libvirt drives.
    Libvirt(libvirt::Target),
    /// The simulated one in this directory.
    Simulated(PathBuf),
}

impl Target {
    /// Reads `--connect`: see [`libvirt::Target::parse`], and `simulated:DIR`. The error is a sentence.
    pub fn parse(text: &str, state_directory: &Path) -> Result<Target, String> {
        match text.strip_prefix(SIMULATED) {
            Some(directory) => simulated(directory),
            None => libvirt::Target::parse(text, state_directory).map(Target::Libvirt),
        }
    }

    /// The target that an earlier mount recorded.
    pub fn from_recorded(uri: &str) -> Result<Target, String> {
        match uri.strip_prefix(SIMULATED) {
            Some(directory) => simulated(directory),
            None => libvirt::Target::from_recorded(uri).map(Target::Libvirt),
        }
    }

    /// The URI to record.
    pub fn uri(&self) -> String {
        match self {
            Target::Libvirt(target) => target.uri().to_owned(),
            Target::Simulated(directory) => format!("{SIMULATED}{}", directory.display()),
        }
    }

    /// Saves the first connection of the embedded driver from probing more than once; may take seconds. See
    /// [`libvirt::capabilities`], also for `program`.
    pub fn learn(&self, program: &Path) {
        match self {
            Target::Libvirt(target) => {
                if let Some(root) = target.embed_root() {
                    libvirt::capabilities::learn(program, root);
                }
            }
            Target::Simulated(_) => {}
        }
    }

    /// Makes it, not connected yet.
    pub fn open(self, state_directory: &Path) -> Result<Arc<dyn Hypervisor>, HypervisorError> {
        match self {
            Target::Libvirt(target) => libvirt::open(target, state_directory, None),
            Target::Simulated(directory) => Ok(Arc::new(SimulatedHypervisor::open(&directory)?)),
        }
    }
}

fn simulated(directory: &str) -> Result<Target, String> {
    if Path::new(directory).is_absolute() {
        Ok(Target::Simulated(directory.into()))
    } else {
        Err(format!("'{SIMULATED}{directory}' names no absolute directory"))
    }
}
