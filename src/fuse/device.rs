//! Mounting and unmounting. We mount ourselves, because fuser's own unmount is not lazy and may hit a foreign mount.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::fusermount;
use crate::privilege::Privilege;

const DEVICE: &str = "/dev/fuse";

/// A mount of ours.
#[derive(Clone, Debug)]
pub struct Mounted {
    /// The mount point, canonical.
    pub path: PathBuf,
    /// `st_dev` of everything in it.
    pub device: u64,
    id: u64,
    privilege: Privilege,
}

/// What became of the connection when the mount was taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connection {
    /// It has ended, or is about to.
    Ended,
    /// Somebody may hold a file open: it ends when he closes it, or with our process.
    Lingering,
}

/// Mounts at a directory and returns the connection to the kernel. Root lets others in, as far as modes allow; into an
/// ordinary user's mount nobody comes but he.
pub fn mount_at(mountpoint: &Path, name: &str, privilege: Privilege) -> io::Result<(OwnedFd, Mounted)> {
    let path = mountpoint.canonicalize()?;
    let connection = if privilege.is_root() {
        mount_as_root(&path, name)?
    } else {
        let options = format!("default_permissions,nosuid,nodev,noatime,fsname={name},subtype={name}");
        fusermount::mount(&path, &options)?
    };
    match find(&path)? {
        Some((id, device)) => Ok((connection, Mounted { path, device, id, privilege })),
        None => Err(io::Error::other(format!("what was mounted at {} is gone again", path.display()))),
    }
}

fn mount_as_root(path: &Path, name: &str) -> io::Result<OwnedFd> {
    let connection = open()?;
    let options =
        format!("fd={},rootmode=40705,user_id=0,group_id=0,default_permissions,allow_other", connection.as_raw_fd(),);
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    let kind = format!("fuse.{name}");
    mount(Some(name), path, Some(kind.as_str()), flags, Some(options.as_str())).map_err(|errno| {
        let error = io::Error::from(errno);
        io::Error::new(error.kind(), format!("cannot mount at {} ({error})", path.display()))
    })?;
    Ok(connection)
}

/// A new connection to the kernel. An ordinary user must be able to open it too, though `fusermount3` does it for him.
/// Errors are sentences.
pub fn open() -> io::Result<OwnedFd> {
    let opened = File::options().read(true).write(true).open(DEVICE);
    opened.map(OwnedFd::from).map_err(|error| {
        let words = match error.kind() {
            io::ErrorKind::NotFound => format!("there is no {DEVICE}; load the kernel module: modprobe fuse"),
            io::ErrorKind::PermissionDenied => {
                let mode = fs::metadata(DEVICE).map_or(0, |metadata| metadata.mode() & 0o7777);
                format!(
                    "{DEVICE} cannot be opened by you, its mode is {mode:04o}; as root: chmod 0666 {DEVICE} (udev does it)"
                )
            }
            _ => format!("{DEVICE} cannot be opened ({error}); is the kernel module fuse loaded?"),
        };
        io::Error::new(error.kind(), words)
    })
}

/// Takes away the mount on top at this path, also while files in it are open: whoever waits for an answer gets
/// `ECONNABORTED` when the connection ends.
pub fn take_away(path: &Path, privilege: Privilege) -> io::Result<()> {
    if !privilege.is_root() {
        return fusermount::unmount(path);
    }
    umount2(path, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
    Ok(())
}

impl Mounted {
    /// Takes the mount away, also while files in it are open. What others mounted over it stays, and then this does
    /// nothing but say so.
    pub fn unmount(&self) -> io::Result<Connection> {
        let entries = entries()?;
        let Some(last) = entries.iter().rfind(|entry| entry.path == self.path) else { return Ok(Connection::Ended) };
        if last.id != self.id {
            if entries.iter().any(|entry| entry.id == self.id) {
                return Err(io::Error::new(
                    io::ErrorKind::ResourceBusy,
                    format!("something else is mounted over {}; unmount that first", self.path.display()),
                ));
            }
            return Ok(Connection::Ended);
        }
        take_away(&self.path, self.privilege)?;
        // Only root's way to unmount ends the connection of a mount in which somebody has a file open.
        Ok(if self.privilege.is_root() { Connection::Ended } else { Connection::Lingering })
    }
}

struct Entry {
    id: u64,
    device: u64,
    path: PathBuf,
}

/// The topmost mount at a path: its id and device. Learned from the kernel's table, not from the mount itself.
fn find(path: &Path) -> io::Result<Option<(u64, u64)>> {
    Ok(entries()?.iter().rfind(|entry| entry.path == path).map(|entry| (entry.id, entry.device)))
}

fn entries() -> io::Result<Vec<Entry>> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    Ok(table.split(|byte| *byte == b'\n').filter_map(parse).collect())
}

/// `36 35 98:0 /root /mnt options ...`, see proc_pid_mountinfo(5).
fn parse(line: &[u8]) -> Option<Entry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let text = |field: &[u8]| std::str::from_utf8(field).ok().map(str::to_owned);
    let id = text(fields.next()?)?.parse().ok()?;
    let device = text(fields.nth(1)?)?;
    let (major, minor) = device.split_once(':')?;
    let device = libc::makedev(major.parse().ok()?, minor.parse().ok()?);
    let path = unescape(fields.nth(1)?);
    Some(Entry { id, device, path: PathBuf::from(OsStr::from_bytes(&path)) })
}

/// Blanks and backslashes in the table are three octal digits behind a backslash.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let escaped = tail.get(..3).filter(|_| *first == b'\\').and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        match escaped {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_with_blanks_is_found_in_the_kernels_table() {
        let line = br"36 35 0:52 / /mnt/my\040vms rw,nosuid shared:1 - fuse.instancefs instancefs rw";
        let entry = parse(line).expect("a line of the table");
        assert_eq!((entry.id, entry.device), (36, libc::makedev(0, 52)));
        assert_eq!(entry.path, Path::new("/mnt/my vms"));
    }
}
