//! Where the simulated host lives: a directory, so that its guests outlive whoever connects to them.
//!
//! `domains/<uuid>.json` is one domain each, `daemon.json` whether the daemon answers, `host_uuid` the host's UUID,
//! `lock` is held while somebody has the host open, `control` is the control socket.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::guest::Guest;
use crate::hypervisor::HypervisorError;

/// What of the daemon survives those who connect to it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct DaemonState {
    /// Why it is unreachable, if it is.
    pub(super) down: Option<String>,
    /// It takes calls and answers none.
    pub(super) hung: bool,
}

/// The directory, held exclusively.
pub(super) struct Disk {
    directory: PathBuf,
    lock: Option<Flock<File>>,
}

impl Disk {
    /// Opens the directory and makes what is missing in it.
    pub(super) fn open(directory: &Path) -> Result<Disk, HypervisorError> {
        let domains = directory.join("domains");
        std::fs::create_dir_all(&domains).map_err(|error| failed(&domains, &error))?;
        let directory = directory.canonicalize().map_err(|error| failed(directory, &error))?;
        let path = directory.join("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|error| failed(&path, &error))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| {
            HypervisorError::Unreachable(format!("{} is in use by another process ({error})", directory.display()))
        })?;
        Ok(Disk { directory, lock: Some(lock) })
    }

    /// Lets somebody else open the directory; nothing may be written afterwards.
    pub(super) fn release(&mut self) {
        self.lock = None;
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The host's UUID, made up at the first time.
    pub(super) fn host_uuid(&self) -> Result<String, HypervisorError> {
        let path = self.directory.join("host_uuid");
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(text.trim().to_owned()),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let uuid = Uuid::new_v4().to_string();
                replace(&path, format!("{uuid}\n").as_bytes())?;
                Ok(uuid)
            }
            Err(error) => Err(failed(&path, &error)),
        }
    }

    pub(super) fn daemon(&self) -> Result<DaemonState, HypervisorError> {
        let path = self.directory.join("daemon.json");
        if path.exists() { read(&path) } else { Ok(DaemonState::default()) }
    }

    pub(super) fn write_daemon(&self, state: &DaemonState) -> Result<(), HypervisorError> {
        write(&self.directory.join("daemon.json"), state)
    }

    /// All guests. A file that a kill left half-written has another extension and is passed over.
    pub(super) fn guests(&self) -> Result<Vec<Guest>, HypervisorError> {
        let domains = self.directory.join("domains");
        let mut guests = Vec::new();
        for entry in domains.read_dir().map_err(|error| failed(&domains, &error))? {
            let path = entry.map_err(|error| failed(&domains, &error))?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                guests.push(read(&path)?);
            }
        }
        Ok(guests)
    }

    pub(super) fn write_guest(&self, guest: &Guest) -> Result<(), HypervisorError> {
        write(&self.guest(guest.domain.uuid), guest)
    }

    pub(super) fn remove_guest(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        let path = self.guest(uuid);
        std::fs::remove_file(&path).map_err(|error| failed(&path, &error))
    }

    /// The path of the control socket, free to bind: a socket that a former process left is removed.
    pub(super) fn control_socket(&self) -> Result<PathBuf, HypervisorError> {
        let path = self.directory.join("control");
        match path.symlink_metadata() {
            Ok(metadata) if metadata.file_type().is_socket() => {
                // We hold the lock, so nobody listens there.
                std::fs::remove_file(&path).map_err(|error| failed(&path, &error))?;
            }
            Ok(_) => {
                return Err(HypervisorError::Failed(format!("{} is no socket; move it away", path.display())));
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(failed(&path, &error)),
        }
        Ok(path)
    }

    fn guest(&self, uuid: Uuid) -> PathBuf {
        self.directory.join("domains").join(format!("{uuid}.json"))
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T, HypervisorError> {
    let text = std::fs::read(path).map_err(|error| failed(path, &error))?;
    serde_json::from_slice(&text)
        .map_err(|error| HypervisorError::Failed(format!("{} cannot be read: {error}", path.display())))
}

fn write<T: Serialize>(path: &Path, value: &T) -> Result<(), HypervisorError> {
    let text = serde_json::to_vec_pretty(value)
        .map_err(|error| HypervisorError::Failed(format!("{} cannot be written: {error}", path.display())))?;
    replace(path, &text)
}

/// Replaces the file as a whole. Not synced: it has to survive the process, not the machine.
fn replace(path: &Path, content: &[u8]) -> Result<(), HypervisorError> {
    let partial = path.with_extension("partial");
    std::fs::write(&partial, content)
        .and_then(|()| std::fs::rename(&partial, path))
        .map_err(|error| failed(path, &error))
}

pub(super) fn failed(path: &Path, error: &std::io::Error) -> HypervisorError {
    HypervisorError::Failed(format!("{}: {error}", path.display()))
}
