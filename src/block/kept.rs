//! Kept links: a second name of a disk's file on its own file system, so that whoever removes the disk by its path removes
//! a name and no content.
//!
//! They lie in a directory beside the disk that only we enter. A link is known by its inode number: while the link is
//! there, no other file of that file system can have it. (Device numbers are no part of that: they change from boot to
//! boot on btrfs and LVM. Two names are compared by both, at the same moment.)
//!
//! Nothing here follows a symlink in a last component, opens a file's content, or replaces a file.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, open, openat};
use nix::sys::stat::{FileStat, Mode, fstat, mkdirat};
use nix::sys::statfs::{self, FsType, fstatfs};
use nix::unistd::{UnlinkatFlags, geteuid, linkat, unlinkat};
use uuid::Uuid;

/// The directory beside a disk that holds its links.
pub const DIRECTORY: &str = ".instancefs-kept";

/// Longest name of a file, in bytes.
const NAME_MAX: usize = 255;

const OPEN_PARENT: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);
const OPEN_OURS: OFlag = OPEN_PARENT.union(OFlag::O_NOFOLLOW);
const OPEN_TO_NAME: OFlag = OFlag::O_PATH.union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// File systems on which a link is no copy that is there when the host is alone, or which have none.
const UNSUITABLE: [(FsType, &str); 10] = [
    (statfs::NFS_SUPER_MAGIC, "NFS"),
    (statfs::SMB_SUPER_MAGIC, "SMB"),
    (FsType(0xff53_4d42_u32 as _), "CIFS"),
    (FsType(0xfe53_4d42_u32 as _), "SMB"),
    (FsType(0x00c3_6400), "Ceph"),
    (statfs::AFS_SUPER_MAGIC, "AFS"),
    (statfs::CODA_SUPER_MAGIC, "Coda"),
    (FsType(0x0102_1997), "9P"),
    (statfs::FUSE_SUPER_MAGIC, "FUSE"),
    (statfs::MSDOS_SUPER_MAGIC, "FAT"),
];

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing.
    Nothing,
    /// A regular file.
    File {
        /// `st_dev`.
        device: u64,
        /// `st_ino`.
        inode: u64,
    },
    /// A symlink, a directory, a device.
    Other,
}

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// This file system is not one for links.
    #[error("{path} lies on {kind}, where no second link of a disk is kept")]
    Unsuitable {
        /// The disk.
        path: PathBuf,
        /// The file system.
        kind: &'static str,
    },
    /// The path leads to something else than was looked at.
    #[error("{} is not the file any more that it was a moment ago", .0.display())]
    Changed(PathBuf),
    /// Another file lies where a name is to be put.
    #[error("{} exists already and is another file", .0.display())]
    Exists(PathBuf),
    /// Somebody else's directory of our name.
    #[error("{} is not a directory that only this user can change; move it away", .0.display())]
    Foreign(PathBuf),
    /// The system's own words.
    #[error("{}: {source}", .path.display())]
    Failed {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What became of a link that was to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// It is not there any more.
    Gone,
    /// It is kept: the disk's path does not lead to its content, which it may hold alone.
    OnlyName,
}

/// What became of a disk that was to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restoration {
    /// It was.
    Present,
    /// It is again.
    Restored,
    /// Neither the disk is there nor its link.
    Lost,
}

/// The path of a link: `<directory>/.instancefs-kept/<instance>-<number>-<file name>`. `None` for a path that is none of
/// a file.
pub fn link_path(path: &Path, instance: Uuid, number: u32) -> Option<PathBuf> {
    let (parent, name) = (path.parent()?, path.file_name()?);
    let mut link = format!("{instance}-{number}-").into_bytes();
    link.extend_from_slice(name.as_bytes());
    link.truncate(NAME_MAX);
    Some(parent.join(DIRECTORY).join(OsString::from_vec(link)))
}

/// What lies at a path.
///
/// # Errors
///
/// [`KeptError::Failed`] if that cannot be found out.
pub fn look(path: &Path) -> Result<Found, KeptError> {
    let Some((parent, name)) = enter(path)? else { return Ok(Found::Nothing) };
    Ok(status(&parent, name).map_err(|error| failed(path, error))?.map_or(Found::Nothing, |(_, status)| found(&status)))
}

/// Gives the file at `path`, which has this inode number, the name `link`. One that it has already is success.
///
/// # Errors
///
/// [`KeptError`]; then there is no link that was not there before.
pub fn make(path: &Path, link: &Path, inode: u64) -> Result<(), KeptError> {
    let changed = || KeptError::Changed(path.to_owned());
    let (parent, name) = enter(path)?.ok_or_else(changed)?;
    suitable(&parent, path)?;
    let (file, status) = status(&parent, name).map_err(|error| failed(path, error))?.ok_or_else(changed)?;
    if !matches!(found(&status), Found::File { inode: present, .. } if present == inode) {
        return Err(changed());
    }
    let directory = ours(&parent, path)?;
    match name_file(&file, &directory, link) {
        Ok(()) => {}
        Err(Errno::EEXIST) if same(&directory, link, &status).map_err(|error| failed(link, error))? => {}
        Err(Errno::EEXIST) => return Err(KeptError::Exists(link.to_owned())),
        Err(error) => return Err(failed(link, error)),
    }
    sync(&directory, link)?;
    sync(&parent, path)
}

/// Removes a link if it is the one with this inode number, and only while `path` leads to the same file.
///
/// # Errors
///
/// [`KeptError::Failed`]; then the link is still there.
pub fn remove(path: &Path, link: &Path, inode: u64) -> Result<Removal, KeptError> {
    let Some((directory, name)) = enter(link)? else { return Ok(Removal::Gone) };
    let Some((_, status)) = status(&directory, name).map_err(|error| failed(link, error))? else {
        return Ok(Removal::Gone);
    };
    let kept = found(&status);
    if !matches!(kept, Found::File { inode: present, .. } if present == inode) || look(path)? != kept {
        return Ok(Removal::OnlyName);
    }
    match unlinkat(&directory, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => {}
        Err(error) => return Err(failed(link, error)),
    }
    sync(&directory, link)?;
    if let Some(parent) = path.parent()
        && let Ok(parent) = open(parent, OPEN_PARENT, Mode::empty())
    {
        // Other links of ours may be in it.
        let _not_empty = unlinkat(&parent, DIRECTORY, UnlinkatFlags::RemoveDir);
    }
    Ok(Removal::Gone)
}

/// Gives the file of a link its path back, if nothing lies there.
///
/// # Errors
///
/// [`KeptError::Exists`] if another file lies there; both are left as they are.
pub fn restore(path: &Path, link: &Path, inode: u64) -> Result<Restoration, KeptError> {
    let Some((parent, name)) = enter(path)? else { return Ok(Restoration::Lost) };
    let kept = match enter(link)? {
        Some((directory, name)) => status(&directory, name).map_err(|error| failed(link, error))?,
        None => None,
    };
    let kept = kept.filter(|(_, status)| matches!(found(status), Found::File { inode: i, .. } if i == inode));
    let present = status(&parent, name).map_err(|error| failed(path, error))?;
    match (present, kept) {
        (Some((_, present)), Some((_, kept))) if found(&present) == found(&kept) => Ok(Restoration::Present),
        (Some(_), Some(_)) => Err(KeptError::Exists(path.to_owned())),
        (Some(_), None) => Ok(Restoration::Present),
        (None, None) => Ok(Restoration::Lost),
        (None, Some((file, _))) => {
            name_file(&file, &parent, path).map_err(|error| match error {
                Errno::EEXIST => KeptError::Exists(path.to_owned()),
                error => failed(path, error),
            })?;
            sync(&parent, path)?;
            Ok(Restoration::Restored)
        }
    }
}

/// The open directory of a path, and the name in it; `None` if there is no such directory.
fn enter(path: &Path) -> Result<Option<(OwnedFd, &OsStr)>, KeptError> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(None) };
    match open(parent, OPEN_PARENT, Mode::empty()) {
        Ok(parent) => Ok(Some((parent, name))),
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
        Err(error) => Err(failed(parent, error)),
    }
}

/// What has this name, held so that its inode number stays its own.
fn status(directory: &OwnedFd, name: &OsStr) -> Result<Option<(OwnedFd, FileStat)>, Errno> {
    match openat(directory, name, OPEN_TO_NAME, Mode::empty()) {
        Ok(file) => {
            let status = fstat(&file)?;
            Ok(Some((file, status)))
        }
        Err(Errno::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

fn found(status: &FileStat) -> Found {
    if status.st_mode & libc::S_IFMT == libc::S_IFREG {
        Found::File { device: status.st_dev, inode: status.st_ino }
    } else {
        Found::Other
    }
}

fn same(directory: &OwnedFd, link: &Path, file: &FileStat) -> Result<bool, Errno> {
    let Some(name) = link.file_name() else { return Ok(false) };
    Ok(status(directory, name)?.is_some_and(|(_, status)| found(&status) == found(file)))
}

/// Names exactly this open file, whatever its former names lead to by now.
fn name_file(file: &OwnedFd, directory: &OwnedFd, path: &Path) -> Result<(), Errno> {
    let name = path.file_name().ok_or(Errno::EINVAL)?;
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(AT_FDCWD, own.as_str(), directory, name, AtFlags::AT_SYMLINK_FOLLOW)
}

fn suitable(directory: &OwnedFd, path: &Path) -> Result<(), KeptError> {
    let kind = fstatfs(directory).map_err(|error| failed(path, error))?.filesystem_type();
    match UNSUITABLE.iter().find(|(unsuitable, _)| *unsuitable == kind) {
        Some((_, kind)) => Err(KeptError::Unsuitable { path: path.to_owned(), kind }),
        None => Ok(()),
    }
}

/// Our directory beside a disk, made if there is none.
fn ours(parent: &OwnedFd, path: &Path) -> Result<OwnedFd, KeptError> {
    let place = path.with_file_name(DIRECTORY);
    match mkdirat(parent, DIRECTORY, Mode::S_IRWXU) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(error) => return Err(failed(&place, error)),
    }
    let directory = openat(parent, DIRECTORY, OPEN_OURS, Mode::empty()).map_err(|error| match error {
        Errno::ELOOP | Errno::ENOTDIR => KeptError::Foreign(place.clone()),
        error => failed(&place, error),
    })?;
    let status = fstat(&directory).map_err(|error| failed(&place, error))?;
    let others = Mode::S_IRWXG | Mode::S_IRWXO;
    if status.st_uid != geteuid().as_raw() || Mode::from_bits_truncate(status.st_mode).intersects(others) {
        return Err(KeptError::Foreign(place));
    }
    Ok(directory)
}

fn sync(directory: &OwnedFd, path: &Path) -> Result<(), KeptError> {
    let synced = directory.try_clone().and_then(|directory| File::from(directory).sync_all());
    synced.map_err(|source| KeptError::Failed { path: path.to_owned(), source })
}

fn failed(path: &Path, error: Errno) -> KeptError {
    KeptError::Failed { path: path.to_owned(), source: error.into() }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    struct Disk {
        directory: tempfile::TempDir,
        path: PathBuf,
        link: PathBuf,
        inode: u64,
    }

    fn disk() -> Disk {
        let directory = tempfile::TempDir::new().unwrap();
        let path = directory.path().join("disk.img");
        fs::write(&path, "content").unwrap();
        let link = link_path(&path, Uuid::from_u128(7), 0).unwrap();
        let inode = path.metadata().unwrap().ino();
        Disk { directory, path, link, inode }
    }

    #[test]
    fn a_link_keeps_the_content_of_a_disk_that_is_removed_and_gives_it_back() {
        let Disk { directory: _directory, path, link, inode } = disk();
        make(&path, &link, inode).unwrap();
        make(&path, &link, inode).unwrap();
        assert_eq!(link.parent().unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(restore(&path, &link, inode).unwrap(), Restoration::Present);
        fs::remove_file(&path).unwrap();
        assert_eq!(restore(&path, &link, inode).unwrap(), Restoration::Restored);
        assert_eq!(fs::read_to_string(&path).unwrap(), "content");
        assert_eq!(remove(&path, &link, inode).unwrap(), Removal::Gone);
        assert_eq!(remove(&path, &link, inode).unwrap(), Removal::Gone);
        assert_eq!(path.metadata().unwrap().nlink(), 1);
        assert!(!link.parent().unwrap().exists());
    }

    #[test]
    fn the_last_name_of_a_content_is_never_removed() {
        let Disk { directory: _directory, path, link, inode } = disk();
        make(&path, &link, inode).unwrap();
        fs::remove_file(&path).unwrap();
        assert_eq!(remove(&path, &link, inode).unwrap(), Removal::OnlyName);
        fs::write(&path, "another").unwrap();
        assert_eq!(remove(&path, &link, inode).unwrap(), Removal::OnlyName);
        assert_eq!(fs::read_to_string(&link).unwrap(), "content");
    }

    #[test]
    fn no_file_is_ever_replaced() {
        let Disk { directory: _directory, path, link, inode } = disk();
        make(&path, &link, inode).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "another").unwrap();
        assert!(matches!(restore(&path, &link, inode), Err(KeptError::Exists(there)) if there == path));
        assert!(matches!(make(&path, &link, inode), Err(KeptError::Changed(_))));
        let other = path.metadata().unwrap().ino();
        assert!(matches!(make(&path, &link, other), Err(KeptError::Exists(there)) if there == link));
        assert_eq!(
            (fs::read_to_string(&path).unwrap(), fs::read_to_string(&link).unwrap()),
            ("another".into(), "content".into())
        );
    }

    #[test]
    fn what_is_no_regular_file_gets_no_link() {
        let Disk { directory, link, inode, path } = disk();
        let pointer = directory.path().join("pointer");
        symlink(&path, &pointer).unwrap();
        assert_eq!(look(&pointer).unwrap(), Found::Other);
        assert!(make(&pointer, &link, inode).is_err());
        assert_eq!(look(directory.path()).unwrap(), Found::Other);
        assert_eq!(look(Path::new("/dev/null")).unwrap(), Found::Other);
        assert_eq!(look(&directory.path().join("a/b/c")).unwrap(), Found::Nothing);
        assert!(!link.exists());
    }

    #[test]
    fn a_directory_that_others_can_change_is_not_used() {
        let Disk { directory, link, inode, path } = disk();
        let elsewhere = directory.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        symlink(&elsewhere, directory.path().join(DIRECTORY)).unwrap();
        assert!(matches!(make(&path, &link, inode), Err(KeptError::Foreign(_))));
        fs::remove_file(directory.path().join(DIRECTORY)).unwrap();
        fs::create_dir(directory.path().join(DIRECTORY)).unwrap();
        fs::set_permissions(directory.path().join(DIRECTORY), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(make(&path, &link, inode), Err(KeptError::Foreign(_))));
        assert_eq!(path.metadata().unwrap().nlink(), 1);
    }

    #[test]
    fn names_are_as_long_as_a_file_system_takes_them() {
        let directory = tempfile::TempDir::new().unwrap();
        let path = directory.path().join("n".repeat(NAME_MAX));
        fs::write(&path, "content").unwrap();
        let link = link_path(&path, Uuid::from_u128(7), u32::MAX).unwrap();
        make(&path, &link, path.metadata().unwrap().ino()).unwrap();
        assert!(link.exists());
        assert_eq!(link_path(Path::new("/"), Uuid::nil(), 0), None);
    }
}
