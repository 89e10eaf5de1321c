//! The mount point: found without touching what may be a dead mount, and swept if the mount on it is one of ours
//! whose daemon is gone.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::probe::{self, Answer};
use super::state_directory::{RememberedMount, StateDirectory};
use crate::fuse;
use crate::privilege::Privilege;

/// Enough symlinks for anybody, as in the kernel.
const MAX_SYMLINKS: usize = 40;
/// Dead mounts on top of each other that are swept in one go.
const MAX_STACKED: usize = 16;

/// Why a mount point cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MountpointError {
    /// Nothing there.
    #[error("the mount point {0} does not exist; create the directory first")]
    Missing(PathBuf),
    /// A file or something else.
    #[error("the mount point {0} is not a directory")]
    NotDirectory(PathBuf),
    /// Another file system is mounted there.
    #[error("{path} is a mount point already ({kind} from {source_name}); choose another directory")]
    Taken {
        /// The mount point.
        path: PathBuf,
        /// File system type.
        kind: String,
        /// The mount's source.
        source_name: String,
    },
    /// A living daemon serves it.
    #[error("{0} is mounted by a running instancefs already; unmount it first, or choose another directory")]
    Living(PathBuf),
    /// A daemon of another state directory may be stuck there.
    #[error(
        "{0} is mounted by an instancefs that does not answer and that belongs to another state directory; if its \
         daemon is gone, remove the mount with: umount -l {0}"
    )]
    Silent(PathBuf),
    /// A dead mount does not go away.
    #[error("the mount that a dead instancefs left on {path} cannot be removed; try: umount -l {path}")]
    Stuck {
        /// The mount point.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The state would disappear below the mount.
    #[error("the state directory {state} lies below the mount point {path}, which would hide it; move one of them")]
    HidesState {
        /// The mount point.
        path: PathBuf,
        /// The state directory.
        state: PathBuf,
    },
    /// A system call failed.
    #[error("the mount point {path} cannot be examined")]
    Failed {
        /// The mount point.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// One line of mountinfo (proc_pid_mountinfo(5)), as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// `major:minor`.
    pub device: String,
    /// The mount point.
    pub path: PathBuf,
    /// File system type.
    pub kind: String,
    /// The mount's source.
    pub source: String,
}

impl MountEntry {
    /// Whether instancefs made it. Mounted directly the type is `fuse`, by fusermount3 `fuse.instancefs`.
    fn is_ours(&self) -> bool {
        self.kind == "fuse.instancefs" || (self.kind == "fuse" && self.source == "instancefs")
    }
}

fn parse(line: &str) -> Option<MountEntry> {
    let (mount, file_system) = line.split_once(" - ")?;
    let mut mount = mount.split(' ');
    let device = mount.nth(2)?.to_owned();
    let path = PathBuf::from(std::ffi::OsStr::from_bytes(&unescape(mount.nth(1)?)));
    let mut file_system = file_system.split(' ');
    let kind = file_system.next()?.to_owned();
    let source = String::from_utf8_lossy(&unescape(file_system.next()?)).into_owned();
    Some(MountEntry { device, path, kind, source })
}

/// The kernel writes blanks and backslashes as three octal digits.
fn unescape(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    bytes
}

/// The mount that is visible at `path`: the last of those stacked there.
pub fn mounted_at(path: &Path) -> io::Result<Option<MountEntry>> {
    let table = fs::read("/proc/self/mountinfo")?;
    let table = String::from_utf8_lossy(&table);
    Ok(table.lines().filter_map(parse).rfind(|entry| entry.path == path))
}

/// Every instancefs mount that can be seen, each once however often it is bound.
pub fn mounts_of_ours() -> io::Result<Vec<MountEntry>> {
    let table = fs::read("/proc/self/mountinfo")?;
    let table = String::from_utf8_lossy(&table);
    let mut found: Vec<MountEntry> = Vec::new();
    for entry in table.lines().filter_map(parse).filter(MountEntry::is_ours) {
        if found.iter().all(|known| known.device != entry.device) {
            found.push(entry);
        }
    }
    Ok(found)
}

/// Whether this mount is still there, whatever lies on top of it.
pub fn is_mounted(mount: &RememberedMount) -> io::Result<bool> {
    let table = fs::read("/proc/self/mountinfo")?;
    let table = String::from_utf8_lossy(&table);
    Ok(table.lines().filter_map(parse).any(|entry| remembered(&entry) == *mount))
}

/// A canonical mount point; whether it can be used is [`Mountpoint::prepare`]'s to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mountpoint(PathBuf);

impl Mountpoint {
    /// Finds the canonical path without asking whatever is mounted on it.
    pub fn resolve(path: &Path) -> Result<Mountpoint, MountpointError> {
        let examine = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => MountpointError::Missing(path.to_owned()),
            io::ErrorKind::NotADirectory => MountpointError::NotDirectory(path.to_owned()),
            _ => MountpointError::Failed { path: path.to_owned(), source },
        };
        let mut absolute = std::path::absolute(path).map_err(examine)?;
        for _ in 0..MAX_SYMLINKS {
            let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name()) else {
                return absolute.canonicalize().map(Mountpoint).map_err(examine);
            };
            let resolved = parent.canonicalize().map_err(examine)?.join(name);
            // Only what is no mount itself may be looked at.
            if mounted_at(&resolved).map_err(examine)?.is_some() {
                return Ok(Mountpoint(resolved));
            }
            if !resolved.symlink_metadata().map_err(examine)?.is_symlink() {
                return Ok(Mountpoint(resolved));
            }
            let target = resolved.read_link().map_err(examine)?;
            absolute = resolved.parent().unwrap_or(Path::new("/")).join(target);
        }
        Err(examine(io::Error::from_raw_os_error(nix::libc::ELOOP)))
    }

    /// The canonical path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes sure that we can mount here: sweeps dead mounts of ours, refuses everything else that is in the way.
    pub fn prepare(&self, state: &StateDirectory) -> Result<(), MountpointError> {
        let path = &self.0;
        let examine = |source| MountpointError::Failed { path: path.clone(), source };
        if state.path().starts_with(path) {
            return Err(MountpointError::HidesState { path: path.clone(), state: state.path().to_owned() });
        }
        for _ in 0..MAX_STACKED {
            let Some(entry) = mounted_at(path).map_err(examine)? else { break };
            self.judge(&entry, state)?;
            log::warn!("{} was left behind by an instancefs that is gone; removing that mount", path.display());
            self.sweep()?;
        }
        if let Some(entry) = mounted_at(path).map_err(examine)? {
            return Err(taken(path, &entry));
        }
        if !path.metadata().map_err(examine)?.is_dir() {
            return Err(MountpointError::NotDirectory(path.clone()));
        }
        if path.read_dir().map_err(examine)?.next().is_some() {
            log::warn!("{} is not empty; what lies there is hidden while it is mounted", path.display());
        }
        Ok(())
    }

    /// Succeeds if this mount is ours and nobody serves it.
    fn judge(&self, entry: &MountEntry, state: &StateDirectory) -> Result<(), MountpointError> {
        let path = &self.0;
        if !entry.is_ours() {
            return Err(taken(path, entry));
        }
        let answer =
            probe::ask(path, probe::LIMIT).map_err(|source| MountpointError::Failed { path: path.clone(), source })?;
        match answer {
            Answer::Dead => Ok(()),
            // We hold the lock of the state directory whose daemon made it, so that daemon is gone.
            Answer::Silent if state.last_mount().is_some_and(|last| remembered(entry) == *last) => Ok(()),
            Answer::Silent => Err(MountpointError::Silent(path.clone())),
            Answer::Alive | Answer::Failed(_) => Err(MountpointError::Living(path.clone())),
        }
    }

    /// Aborts the connection, which ends everybody who hangs on it, then takes the mount away.
    fn sweep(&self) -> Result<(), MountpointError> {
        fuse::take_away(&self.0, Privilege::of_this_process())
            .map_err(|source| MountpointError::Stuck { path: self.0.clone(), source })
    }
}

/// What the state directory remembers of a mount.
pub fn remembered(entry: &MountEntry) -> RememberedMount {
    RememberedMount { device: entry.device.clone(), path: entry.path.clone() }
}

fn taken(path: &Path, entry: &MountEntry) -> MountpointError {
    MountpointError::Taken { path: path.to_owned(), kind: entry.kind.clone(), source_name: entry.source.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_read_with_its_escapes_and_optional_fields() {
        let line = r"36 35 0:47 / /run/a\040b rw,noatime shared:1 master:2 - fuse instancefs rw,user_id=0";
        let entry = parse(line).unwrap();
        assert_eq!(entry.device, "0:47");
        assert_eq!(entry.path, Path::new("/run/a b"));
        assert!(entry.is_ours());
        let other = parse("22 27 0:21 / /proc rw - proc proc rw").unwrap();
        assert!(!other.is_ours());
    }

    #[test]
    fn another_fuse_file_system_is_not_ours() {
        assert!(!parse("1 2 0:9 / /mnt rw - fuse sshfs rw").unwrap().is_ours());
        assert!(!parse("1 2 0:9 / /mnt rw - fuse.sshfs instancefs rw").unwrap().is_ours());
        assert!(parse("1 2 0:9 / /mnt rw - fuse.instancefs x rw").unwrap().is_ours());
    }

    #[test]
    fn a_mount_point_is_found_through_symlinks() {
        let directory = tempfile::tempdir().unwrap();
        let top = directory.path().canonicalize().unwrap();
        fs::create_dir(top.join("real")).unwrap();
        std::os::unix::fs::symlink("real", top.join("link")).unwrap();
        std::os::unix::fs::symlink("link/", top.join("twice")).unwrap();
        assert_eq!(Mountpoint::resolve(&top.join("twice")).unwrap().path(), top.join("real"));
        std::os::unix::fs::symlink("loop", top.join("loop")).unwrap();
        assert!(matches!(Mountpoint::resolve(&top.join("loop")), Err(MountpointError::Failed { .. })));
    }
}
