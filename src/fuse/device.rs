//! Mounting and unmounting. We mount ourselves, because fuser's own unmount is not lazy and may hit a foreign mount.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A mount of ours.
#[derive(Clone, Debug)]
pub struct Mounted {
    /// The mount point, canonical.
    pub path: PathBuf,
    /// `st_dev` of everything in it.
    pub device: u64,
    id: u64,
}

/// Mounts at a directory and returns the connection to the kernel.
pub fn mount_at(mountpoint: &Path, name: &str) -> io::Result<(OwnedFd, Mounted)> {
    let path = mountpoint.canonicalize()?;
    let connection = File::options().read(true).write(true).open("/dev/fuse").map_err(|error| {
        io::Error::new(error.kind(), format!("cannot open /dev/fuse ({error}); is the module fuse loaded?"))
    })?;
    let options = format!(
        "fd={},rootmode=40705,user_id={},group_id={},default_permissions,allow_other",
        connection.as_raw_fd(),
        nix::unistd::geteuid(),
        nix::unistd::getegid()
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    let kind = format!("fuse.{name}");
    mount(Some(name), &path, Some(kind.as_str()), flags, Some(options.as_str())).map_err(|errno| {
        let error = io::Error::from(errno);
        io::Error::new(error.kind(), format!("cannot mount at {} ({error}); only root may", path.display()))
    })?;
    match find(&path)? {
        Some((id, device)) => Ok((connection.into(), Mounted { path, device, id })),
        None => Err(io::Error::other(format!("what was mounted at {} is gone again", path.display()))),
    }
}

impl Mounted {
    /// Ends the connection and takes the mount away, also while files in it are open: whoever waits for an answer gets
    /// `ECONNABORTED`. What others mounted over it stays, and then this does nothing but say so.
    pub fn unmount(&self) -> io::Result<()> {
        let entries = entries()?;
        let Some(last) = entries.iter().rfind(|entry| entry.path == self.path) else { return Ok(()) };
        if last.id != self.id {
            if entries.iter().any(|entry| entry.id == self.id) {
                return Err(io::Error::new(
                    io::ErrorKind::ResourceBusy,
                    format!("something else is mounted over {}; unmount that first", self.path.display()),
                ));
            }
            return Ok(());
        }
        umount2(&self.path, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
        Ok(())
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
