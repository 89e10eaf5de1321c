//! The state directory: whether a mount could use it, and the file system that it lies on.

use std::fs;
use std::io;
use std::os::linux::fs::MetadataExt;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::statfs::{self, FUSE_SUPER_MAGIC, FsType, NFS_SUPER_MAGIC, SMB_SUPER_MAGIC, TMPFS_MAGIC};
use nix::unistd::{AccessFlags, access};

use super::{Finding, World, trial};
use crate::cli::identity;
use crate::cli::mountpoint::mounts_of_ours;
use crate::cli::probe::{self, Answer};
use crate::cli::state_directory::{Examined, StateDirectoryError, examine};
use crate::hypervisor::Identity;
use crate::hypervisor::libvirt::embed;

const DIRECTORY: &str = "state directory";
/// Below this there is hardly room for a guest.
const LITTLE_BYTES: u64 = 1 << 30;
const LITTLE_PERCENT: u64 = 5;
/// Below this the store cannot be made.
const NOTHING_BYTES: u64 = 4 << 20;
/// Network file systems that nix has no name for: 9P, CIFS and SMB2, AFS, Ceph, Lustre, GPFS.
const NETWORK: [i64; 7] = [0x0102_1997, 0xFF53_4D42, 0xFE53_4D42, 0x5346_414F, 0x00C3_6400, 0x0BD0_0BD0, 0x4750_4653];

/// All findings.
pub fn look(world: &World) -> Vec<Finding> {
    let path = &world.state_directory;
    if path.as_os_str().is_empty() {
        return vec![Finding::fail(
            DIRECTORY,
            "your home directory is not known, where the state would be kept",
            "set HOME, or name a directory: --state-dir DIR",
        )];
    }
    let existing = match existing(path) {
        Ok(existing) => existing,
        Err(finding) => return vec![finding],
    };
    let mut findings = Vec::new();
    match existing == path.as_path() {
        true => match examine(path) {
            Ok(examined) => findings.push(present(path, &examined)),
            Err(error) => findings.push(refused(path, &error)),
        },
        false => findings.push(absent(path, existing, world.is_in_home)),
    }
    findings.extend(way(world, existing));
    findings.extend(file_system(existing));
    findings.extend(space(existing));
    findings.extend(abilities(existing));
    findings
}

/// Which connection the first mount recorded, as far as can be seen without touching the store.
pub fn recorded(path: &Path) -> Result<Option<Identity>, String> {
    // What does not answer is reported by [`look`].
    let Ok(found) = existing(path) else { return Ok(None) };
    if found != path {
        return Ok(None);
    }
    match examine(path) {
        Ok(Examined { store: Some(store), .. }) => identity::peek(&store).map_err(|error| crate::cli::chain(&error)),
        Ok(_) | Err(_) => Ok(None),
    }
}

/// The directory, or the nearest one above it that exists; asked by children, since it may lie on what is dead.
fn existing(path: &Path) -> Result<&Path, Finding> {
    for place in path.ancestors() {
        let shown = place.display();
        match probe::ask(place, probe::LIMIT) {
            Ok(Answer::Alive) => return Ok(place),
            Ok(Answer::Failed(Errno::ENOENT)) => {}
            Ok(Answer::Silent | Answer::Dead) => {
                return Err(Finding::fail(
                    DIRECTORY,
                    format!("{shown} lies on a file system that does not answer"),
                    format!("see which one it is: findmnt -T '{shown}'"),
                ));
            }
            Ok(Answer::Failed(errno)) => {
                return Err(Finding::fail(
                    DIRECTORY,
                    format!("{shown} cannot be reached: {}", errno.desc()),
                    "name another one: --state-dir DIR",
                ));
            }
            Err(error) => return Err(Finding::fail(DIRECTORY, format!("nothing can be asked: {error}"), "try again")),
        }
    }
    Err(Finding::fail(
        DIRECTORY,
        format!("{} is no absolute path", path.display()),
        "name another one: --state-dir DIR",
    ))
}

fn present(path: &Path, examined: &Examined) -> Finding {
    let shown = path.display();
    if let Some(pid) = examined.lock.as_deref().and_then(|lock| holder(lock, examined.last_pid)) {
        let place =
            examined.last_mount.as_ref().map_or_else(String::new, |last| format!(" on {}", last.path.display()));
        return Finding::ok(DIRECTORY, format!("{shown} is served by the daemon {pid}{place}"));
    }
    match &examined.store {
        Some(_) => Finding::ok(DIRECTORY, format!("{shown} is one of instancefs, and nobody uses it now")),
        None => Finding::ok(DIRECTORY, format!("{shown} is empty and will be used")),
    }
}

/// The process that has locked the file. Taking the lock to see whether it is free would turn away a daemon that starts
/// at this moment.
fn holder(lock: &Path, last_pid: Option<i32>) -> Option<i32> {
    let metadata = lock.symlink_metadata().ok()?;
    let device = metadata.st_dev();
    let file =
        format!("{:02x}:{:02x}:{}", nix::sys::stat::major(device), nix::sys::stat::minor(device), metadata.st_ino());
    let inode = format!(":{}", metadata.st_ino());
    fs::read_to_string("/proc/locks").ok()?.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, "FLOCK", _, _, pid, locked, ..] = words[..] else { return None };
        let pid: i32 = pid.parse().ok()?;
        // Some file systems tell another device than the locks: there the pid in the file has to agree.
        (locked == file || locked.ends_with(&inode) && Some(pid) == last_pid).then_some(pid)
    })
}

fn refused(path: &Path, error: &StateDirectoryError) -> Finding {
    let shown = path.display();
    let other = "or name another one: --state-dir DIR";
    match error {
        StateDirectoryError::Unsafe { owner, mode, .. } => Finding::fail(
            DIRECTORY,
            format!("{shown} belongs to uid {owner} with mode {mode:04o}; it must be this user's alone to write"),
            format!(
                "chown {} '{shown}' && chmod go-w '{shown}', {other}",
                crate::privilege::Privilege::of_this_process().uid
            ),
        ),
        StateDirectoryError::Foreign { entry, .. } => Finding::fail(
            DIRECTORY,
            format!("{shown} is not empty and none of instancefs ({entry} lies there)"),
            "name another one: --state-dir DIR",
        ),
        StateDirectoryError::NotDirectory(_) => {
            Finding::fail(DIRECTORY, format!("{shown} is not a directory"), "name another one: --state-dir DIR")
        }
        StateDirectoryError::NoParent(_)
        | StateDirectoryError::InUse { .. }
        | StateDirectoryError::Full(_)
        | StateDirectoryError::Failed { .. } => {
            Finding::fail(DIRECTORY, crate::cli::chain(error), format!("repair it, {other}"))
        }
    }
}

fn absent(path: &Path, existing: &Path, is_in_home: bool) -> Finding {
    let (shown, above) = (path.display(), existing.display());
    if path.parent() != Some(existing) && !is_in_home {
        let parent = path.parent().unwrap_or(path).display();
        return Finding::fail(
            DIRECTORY,
            format!("{shown} cannot be made, since {parent} does not exist"),
            format!("mkdir -p '{parent}', or mount the file system that it lives on"),
        );
    }
    match access(existing, AccessFlags::W_OK | AccessFlags::X_OK) {
        Ok(()) if existing.is_dir() => Finding::ok(DIRECTORY, format!("{shown} does not exist and will be made")),
        Ok(()) => Finding::fail(DIRECTORY, format!("{above} is not a directory"), "name another one: --state-dir DIR"),
        Err(errno) => Finding::fail(
            DIRECTORY,
            format!("{shown} does not exist, and this user may not make it: {}", errno.desc()),
            "mount as root, or name another one: --state-dir DIR",
        ),
    }
}

/// Root's guests run as somebody else, who has to come to the disks.
fn way(world: &World, existing: &Path) -> Option<Finding> {
    const WHAT: &str = "way to the disks";
    if !world.privilege.is_root() {
        return None;
    }
    let user = embed::unprivileged_user().ok()?;
    Some(match embed::closed_to(existing, &user) {
        Ok(None) => Finding::ok(WHAT, format!("{} may pass through all directories above them", user.name)),
        Ok(Some(closed)) => Finding::fail(
            WHAT,
            format!("guests run as {}, who may not pass through {}", user.name, closed.display()),
            embed::opening(closed),
        ),
        Err(reason) => Finding::fail(WHAT, reason, "look at that directory"),
    })
}

fn file_system(existing: &Path) -> Option<Finding> {
    const WHAT: &str = "file system";
    let shown = existing.display();
    let kind = statfs::statfs(existing).ok()?.filesystem_type();
    let device = existing.metadata().map(|metadata| metadata.st_dev()).ok()?;
    let ours = mounts_of_ours()
        .unwrap_or_default()
        .into_iter()
        .any(|mount| mount.device == format!("{}:{}", nix::sys::stat::major(device), nix::sys::stat::minor(device)));
    if ours {
        return Some(Finding::fail(
            WHAT,
            format!("{shown} lies in a tree of instancefs itself"),
            "name another state directory: --state-dir DIR",
        ));
    }
    if is_network(kind) {
        return Some(Finding::warn(
            WHAT,
            format!("{shown} lies on a network file system, whose locks and syncs the store cannot rely on"),
            "keep the state directory on a local disk: --state-dir DIR",
        ));
    }
    if kind == TMPFS_MAGIC {
        return Some(Finding::warn(
            WHAT,
            format!("{shown} lies in memory (tmpfs): everything is gone at the next boot"),
            "keep the state directory on a disk: --state-dir DIR",
        ));
    }
    if kind == FUSE_SUPER_MAGIC {
        return Some(Finding::warn(
            WHAT,
            format!("{shown} lies on another FUSE file system, which may not sync what it says it did"),
            "keep the state directory on a local disk: --state-dir DIR",
        ));
    }
    Some(Finding::ok(WHAT, "is local"))
}

fn is_network(kind: FsType) -> bool {
    // The kernel's magic numbers have 32 bits, whatever the type of the field is.
    let number = i64::from(kind.0 as u32);
    [NFS_SUPER_MAGIC, SMB_SUPER_MAGIC].contains(&kind) || NETWORK.contains(&number)
}

fn space(existing: &Path) -> Option<Finding> {
    const WHAT: &str = "free space";
    let status = nix::sys::statvfs::statvfs(existing).ok()?;
    let unit = status.fragment_size();
    let (free, total) = (status.blocks_available() * unit, status.blocks() * unit);
    let percent = (free.saturating_mul(100)).checked_div(total).unwrap_or(100);
    let text = format!("{} MiB ({percent} %)", free >> 20);
    let advice = format!("free some; see what takes it: du -xh '{}' | sort -h | tail", existing.display());
    if free < NOTHING_BYTES || status.files() > 0 && status.files_available() == 0 {
        return Some(Finding::fail(WHAT, format!("{text}: the disk is full"), advice));
    }
    if free < LITTLE_BYTES || percent < LITTLE_PERCENT {
        return Some(Finding::warn(WHAT, format!("{text} is little for disks of guests"), advice));
    }
    Some(Finding::ok(WHAT, text))
}

/// Tried where this user may write; where not, that was said already.
fn abilities(existing: &Path) -> Vec<Finding> {
    const MARKS: &str = "extended attributes";
    const LINKS: &str = "hard links";
    let tried = match trial::attempt(existing) {
        Ok(tried) => tried,
        Err(error) if is_denied(&error) => return Vec::new(),
        Err(error) => {
            return vec![Finding::warn(
                MARKS,
                format!("not tried, since no file without a name can be made in {}: {error}", existing.display()),
                "use ext4, XFS or Btrfs for the state directory",
            )];
        }
    };
    let finding = |what, result: io::Result<()>, well: &str, badly: &str| match result {
        Ok(()) => Finding::ok(what, well),
        Err(error) => {
            Finding::fail(what, format!("{badly}: {error}"), "use ext4, XFS or Btrfs for the state directory")
        }
    };
    vec![
        finding(MARKS, tried.marks, "can be set", "cannot be set, and they say what made a disk"),
        finding(LINKS, tried.links, "can be made", "cannot be made, and they keep protected disks"),
    ]
}

fn is_denied(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::PermissionDenied | io::ErrorKind::StorageFull | io::ErrorKind::ReadOnlyFilesystem
    )
}
