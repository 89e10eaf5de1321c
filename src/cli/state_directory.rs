//! The state directory: made, recognised and locked before anything is read from it.
//!
//! A directory is ours if it holds the store, or nothing but what a mount leaves that ended before there was one. Any
//! other directory that is not empty is refused and left as it is.

use std::fs::{DirBuilder, File, Metadata, OpenOptions, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::mountpoint;
use crate::privilege::Privilege;

/// Guests pass through to their disks, nobody lists.
const MODE: u32 = 0o711;
/// An ordinary user's guests run as himself.
const PRIVATE_MODE: u32 = 0o700;
const LOCK: &str = "lock";
const LOG: &str = "log";
const STORE: &str = "instancefs.db";
/// What may lie in a directory that is otherwise empty; the last one stands at the top of an ext4 file system.
const HARMLESS: [&str; 3] = [LOCK, LOG, "lost+found"];
/// Ends the names of a store that is being made beside its place, and of its journal.
const UNFINISHED: [&str; 2] = [".new", ".new-journal"];
/// How long a daemon may take to end after its mount is gone, and how often we look.
const ENDING: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(20);
/// Begins the name of a file that tries, for a moment, whether names can be linked here.
pub const TRIAL_PREFIX: &str = ".instancefs-trial-";

/// Why a state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateDirectoryError {
    /// The parent does not exist: perhaps a file system is not mounted.
    #[error("{0} does not exist; create it, or mount the file system that the state directory lives on")]
    NoParent(PathBuf),
    /// Something else has this name.
    #[error("{0} is not a directory; name another --state-dir")]
    NotDirectory(PathBuf),
    /// Not empty, and no store in it.
    #[error(
        "{path} is not empty and is no state directory of instancefs ({entry} lies there); it was left as it is, name \
         another --state-dir"
    )]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// The first thing in it that is not ours.
        entry: String,
    },
    /// Others could plant a store there.
    #[error(
        "{path} can be written by others (owner {owner}, mode {mode:04o}); it must belong to the user who mounts, and \
         only that user may write there"
    )]
    Unsafe {
        /// The directory.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Its permission bits.
        mode: u32,
    },
    /// Another daemon has it.
    #[error("another instancefs ({pid}) uses {path}; unmount that one, or name another --state-dir")]
    InUse {
        /// The directory.
        path: PathBuf,
        /// `pid N`, as far as known.
        pid: String,
    },
    /// The disk is full.
    #[error("the disk of the state directory {0} is full; free some space and try again")]
    Full(PathBuf),
    /// It cannot be created, read or written.
    #[error("the state directory {path} cannot be {what}")]
    Failed {
        /// The directory.
        path: PathBuf,
        /// What did not work.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// A mount that the last daemon of this directory left, or has, as `lock` remembers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RememberedMount {
    /// `major:minor` as in mountinfo.
    pub device: String,
    /// The mount point.
    pub path: PathBuf,
}

/// What a state directory is before anybody opens it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Examined {
    /// The store, if there is one.
    pub store: Option<PathBuf>,
    /// The file that daemons lock, if there is one.
    pub lock: Option<PathBuf>,
    /// The pid and the mount in it, as far as this user may read it.
    pub last_pid: Option<i32>,
    /// The mount of the last daemon.
    pub last_mount: Option<RememberedMount>,
}

/// Looks at an existing directory as [`StateDirectory::open`] would, and changes nothing.
pub fn examine(path: &Path) -> Result<Examined, StateDirectoryError> {
    let metadata = path.metadata().map_err(|source| failed(path, "read", source))?;
    check_owner(path, &metadata, Privilege::of_this_process())?;
    let store = is_ours(path)?.then(|| path.join(STORE));
    let lock = Some(path.join(LOCK)).filter(|lock| lock.symlink_metadata().is_ok());
    let text = lock.as_ref().and_then(|lock| File::open(lock).ok()).map(|mut file| content(&mut file));
    let text = text.unwrap_or_default();
    let last_pid = text.lines().next().and_then(|line| line.parse().ok());
    Ok(Examined { store, lock, last_pid, last_mount: remembered(&text) })
}

/// A locked state directory. The lock ends with this value or the process.
#[derive(Debug)]
pub struct StateDirectory {
    path: PathBuf,
    lock: Flock<File>,
    last_mount: Option<RememberedMount>,
}

impl StateDirectory {
    /// Creates the directory if its parent exists, checks whose it is, and locks it.
    pub fn open(path: &Path) -> Result<StateDirectory, StateDirectoryError> {
        let privilege = Privilege::of_this_process();
        let mode = if privilege.is_root() { MODE } else { PRIVATE_MODE };
        let path = std::path::absolute(path).map_err(|source| failed(path, "found", source))?;
        match DirBuilder::new().mode(mode).create(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(StateDirectoryError::NoParent(path.parent().unwrap_or(&path).to_owned()));
            }
            Err(error) => return Err(failed(&path, "created", error)),
        }
        let path = path.canonicalize().map_err(|source| failed(&path, "read", source))?;
        let metadata = path.metadata().map_err(|source| failed(&path, "read", source))?;
        check_owner(&path, &metadata, privilege)?;
        let fresh = !is_ours(&path)?;

        let lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(nix::libc::O_NOFOLLOW)
            .open(path.join(LOCK))
            .map_err(|source| failed(&path, "written", source))?;
        let mut lock = lock_patiently(&path, lock)?;
        if fresh {
            // mkdir's mode is subject to the umask, and an empty directory may have been made by anybody's mkdir.
            std::fs::set_permissions(&path, Permissions::from_mode(mode))
                .map_err(|source| failed(&path, "written", source))?;
        }
        let last_mount = remembered(&content(&mut lock));
        let mut directory = StateDirectory { path, lock, last_mount };
        directory.remember(None)?;
        Ok(directory)
    }

    /// Makes the directories above the usual place in a user's home, for him alone as the XDG base directory
    /// specification wants it.
    pub fn make_parents(path: &Path) -> Result<(), StateDirectoryError> {
        let Some(parent) = path.parent() else { return Ok(()) };
        let made = DirBuilder::new().recursive(true).mode(PRIVATE_MODE).create(parent);
        made.map_err(|source| failed(parent, "created", source))
    }

    /// The directory, canonical.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The store.
    pub fn store(&self) -> PathBuf {
        self.path.join(STORE)
    }

    /// Where a background daemon's messages go.
    pub fn log(&self) -> PathBuf {
        self.path.join(LOG)
    }

    /// What the daemon before us had mounted; nobody serves it while we hold the lock.
    pub fn last_mount(&self) -> Option<&RememberedMount> {
        self.last_mount.as_ref()
    }

    /// Writes our pid, and the mount point that we serve from now on, into the lock file. Until there is one, the last
    /// daemon's stays there: we may die before we have swept it.
    pub fn remember(&mut self, mount: Option<RememberedMount>) -> Result<(), StateDirectoryError> {
        if mount.is_some() {
            self.last_mount = mount;
        }
        let mut text = format!("{}\n", std::process::id());
        if let Some(mount) = &self.last_mount {
            text.push_str(&format!("{} {}\n", mount.device, mount.path.display()));
        }
        let file: &mut File = &mut self.lock;
        let written = file.rewind().and_then(|()| file.write_all(text.as_bytes()));
        written.and_then(|()| file.set_len(text.len() as u64)).map_err(|source| failed(&self.path, "written", source))
    }
}

fn failed(path: &Path, what: &'static str, source: io::Error) -> StateDirectoryError {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StateDirectoryError::Full(path.to_owned()),
        io::ErrorKind::NotADirectory => StateDirectoryError::NotDirectory(path.to_owned()),
        _ => StateDirectoryError::Failed { path: path.to_owned(), what, source },
    }
}

fn check_owner(path: &Path, metadata: &Metadata, privilege: Privilege) -> Result<(), StateDirectoryError> {
    if !metadata.is_dir() {
        return Err(StateDirectoryError::NotDirectory(path.to_owned()));
    }
    let mode = metadata.mode() & 0o7777;
    if metadata.uid() != privilege.uid || mode & 0o022 != 0 {
        return Err(StateDirectoryError::Unsafe { path: path.to_owned(), owner: metadata.uid(), mode });
    }
    Ok(())
}

/// Whether the store is there; a directory without it must be empty.
fn is_ours(path: &Path) -> Result<bool, StateDirectoryError> {
    if path.join(STORE).symlink_metadata().is_ok_and(|metadata| metadata.is_file()) {
        return Ok(true);
    }
    for entry in path.read_dir().map_err(|source| failed(path, "read", source))? {
        let entry = entry.map_err(|source| failed(path, "read", source))?.file_name();
        let entry = entry.to_string_lossy().into_owned();
        let unfinished = entry.starts_with(STORE) && UNFINISHED.iter().any(|end| entry.ends_with(end));
        if !HARMLESS.contains(&entry.as_str()) && !entry.starts_with(TRIAL_PREFIX) && !unfinished {
            return Err(StateDirectoryError::Foreign { path: path.to_owned(), entry });
        }
    }
    Ok(false)
}

/// Locks the file. A daemon whose mount is gone is about to end, and is waited for: thus `umount` and `mount` in a row work.
fn lock_patiently(path: &Path, mut file: File) -> Result<Flock<File>, StateDirectoryError> {
    let deadline = Instant::now() + ENDING;
    loop {
        let errno;
        (file, errno) = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err(refused) => refused,
        };
        if errno != Errno::EWOULDBLOCK {
            return Err(failed(path, "locked", errno.into()));
        }
        let text = content(&mut file);
        let is_ending = match remembered(&text) {
            Some(mount) => !mountpoint::is_mounted(&mount).map_err(|source| failed(path, "locked", source))?,
            None => false,
        };
        if !is_ending || Instant::now() >= deadline {
            let pid = text.lines().next().unwrap_or_default();
            let pid = if pid.is_empty() { "starting up".to_owned() } else { format!("pid {pid}") };
            return Err(StateDirectoryError::InUse { path: path.to_owned(), pid });
        }
        sleep(PAUSE);
    }
}

/// An unreadable lock file is as good as an empty one: it only explains.
fn content(lock: &mut File) -> String {
    let mut bytes = Vec::new();
    let _ = lock.rewind().and_then(|()| lock.take(64 * 1024).read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

fn remembered(lock: &str) -> Option<RememberedMount> {
    let (device, path) = lock.split_once('\n')?.1.strip_suffix('\n')?.split_once(' ')?;
    Some(RememberedMount { device: device.to_owned(), path: path.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_directory_lets_guests_pass_and_nobody_list() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("state");
        let directory = StateDirectory::open(&path).unwrap();
        assert_eq!(directory.path().metadata().unwrap().mode() & 0o7777, MODE);
    }

    #[test]
    fn a_directory_is_used_by_one_daemon_at_a_time() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("state");
        let first = StateDirectory::open(&path).unwrap();
        let error = StateDirectory::open(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("another instancefs (pid {})", std::process::id())), "{error}");
        drop(first);
        StateDirectory::open(&path).unwrap();
    }

    #[test]
    fn a_daemon_whose_mount_is_gone_is_waited_for() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("state");
        let mut first = StateDirectory::open(&path).unwrap();
        first.remember(Some(RememberedMount { device: "0:47".to_owned(), path: path.join("nowhere") })).unwrap();
        let holders = || {
            let links =
                std::fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| entry.unwrap().path().read_link().ok());
            links.filter(|link| *link == path.join(LOCK)).count()
        };
        std::thread::scope(|scope| {
            let second = scope.spawn(|| StateDirectory::open(&path));
            while holders() < 2 && !second.is_finished() {
                sleep(PAUSE);
            }
            drop(first);
            second.join().unwrap().unwrap();
        });
    }

    #[test]
    fn the_last_mount_is_remembered_until_there_is_another() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("state");
        let mount = |name: &str| RememberedMount { device: "0:47".to_owned(), path: name.into() };
        let mut directory = StateDirectory::open(&path).unwrap();
        assert_eq!(directory.last_mount(), None);
        directory.remember(Some(mount("/run/a rather long mount point"))).unwrap();
        drop(directory);
        let mut directory = StateDirectory::open(&path).unwrap();
        assert_eq!(directory.last_mount(), Some(&mount("/run/a rather long mount point")));
        directory.remember(Some(mount("/run/b"))).unwrap();
        drop(directory);
        assert_eq!(StateDirectory::open(&path).unwrap().last_mount(), Some(&mount("/run/b")));
    }

    #[test]
    fn a_foreign_directory_is_refused_and_left_as_it_is() {
        let parent = tempfile::tempdir().unwrap();
        std::fs::write(parent.path().join("photos"), "dear").unwrap();
        let mode = parent.path().metadata().unwrap().mode();
        let error = StateDirectory::open(parent.path()).unwrap_err().to_string();
        assert!(error.contains("photos"), "{error}");
        assert_eq!(parent.path().read_dir().unwrap().count(), 1);
        assert_eq!(parent.path().metadata().unwrap().mode(), mode);
    }

    #[test]
    fn a_mount_that_was_killed_while_it_made_the_store_is_no_obstacle() {
        let parent = tempfile::tempdir().unwrap();
        for end in [".new", ".new-journal"] {
            std::fs::write(parent.path().join(format!("{STORE}.{}{end}", uuid::Uuid::new_v4())), "half").unwrap();
        }
        StateDirectory::open(parent.path()).unwrap();
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        std::fs::set_permissions(parent.path(), Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(StateDirectory::open(parent.path()), Err(StateDirectoryError::Unsafe { .. })));
    }

    #[test]
    fn the_top_of_an_empty_file_system_is_empty() {
        let parent = tempfile::tempdir().unwrap();
        std::fs::create_dir(parent.path().join("lost+found")).unwrap();
        StateDirectory::open(parent.path()).unwrap();
    }
}
