//! Loop devices: `linux/loop.h`, without a shell.
//!
//! One of ours bears the uuid of its volume where the kernel keeps the name of a backing file, set in the very call that
//! makes it. By that and by its backing file's inode it is known again, never by its number or by a path alone.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use uuid::Uuid;

use crate::model::volume::record::Backing;

/// The kernel's doorkeeper of loop devices.
pub(super) const CONTROL: &str = "/dev/loop-control";
/// All block devices.
pub(super) const DEVICES: &str = "/sys/block";

const LO_NAME_SIZE: usize = 64;
const LO_FLAGS_PARTSCAN: u32 = 8;
const LO_FLAGS_DIRECT_IO: u32 = 16;
/// What our mark begins with.
const MARK: &str = "instancefs:";

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; LO_NAME_SIZE],
    crypt_name: [u8; LO_NAME_SIZE],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    descriptor: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

const EMPTY: Info = Info {
    device: 0,
    inode: 0,
    rdevice: 0,
    offset: 0,
    size_limit: 0,
    number: 0,
    encrypt_type: 0,
    encrypt_key_size: 0,
    flags: 0,
    file_name: [0; LO_NAME_SIZE],
    crypt_name: [0; LO_NAME_SIZE],
    encrypt_key: [0; 32],
    init: [0; 2],
};

mod call {
    use super::{Config, Info};

    nix::ioctl_none_bad!(clear, 0x4C01);
    nix::ioctl_read_bad!(status, 0x4C05, Info);
    nix::ioctl_none_bad!(set_capacity, 0x4C07);
    nix::ioctl_write_ptr_bad!(configure, 0x4C0A, Config);
    nix::ioctl_none_bad!(get_free, 0x4C82);
}

/// So often another program may take the device that the kernel has just named as free.
const TRIES: usize = 64;

/// What the kernel says of a loop device that has a backing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Status {
    /// What is behind it.
    pub(super) backing: Backing,
    /// Of a backing block device its number.
    pub(super) of_device: u64,
    /// Whose device it is, if it is one of ours.
    pub(super) volume: Option<Uuid>,
}

/// How the backing file is read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Past the page cache where the file can be, so that nothing is cached twice.
    Direct,
    /// Through the page cache, which sends one write after the other.
    Cached,
}

/// Makes one with this backing file.
pub(super) fn make(volume: Uuid, backing: &File, access: Access) -> io::Result<PathBuf> {
    let control = OpenOptions::new().read(true).write(true).open(CONTROL)?;
    let mut info = EMPTY;
    info.flags = LO_FLAGS_PARTSCAN
        | match access {
            Access::Direct => LO_FLAGS_DIRECT_IO,
            Access::Cached => 0,
        };
    let mark = format!("{MARK}{volume}");
    for (place, byte) in info.file_name.iter_mut().zip(mark.bytes()) {
        *place = byte;
    }
    let descriptor = u32::try_from(backing.as_raw_fd()).map_err(io::Error::other)?;
    let config = Config { descriptor, block_size: 0, info, reserved: [0; 8] };
    for _ in 0..TRIES {
        // SAFETY: takes no argument; the descriptor is open.
        let number = unsafe { call::get_free(control.as_raw_fd()) }?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = open(&path)?;
        // SAFETY: the kernel reads a whole `struct loop_config` from a reference that lives; all bytes of it are set.
        match unsafe { call::configure(device.as_raw_fd(), &config) } {
            Ok(_) => return Ok(path),
            Err(Errno::EBUSY) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Errno::EBUSY.into())
}

/// Opens a device for asking about it and changing it.
pub(super) fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(path)
}

/// Opens a device so that nothing else in the kernel can claim it meanwhile; `EBUSY` if something has.
pub(super) fn open_alone(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL | libc::O_NOFOLLOW).open(path)
}

/// `None` of a device without a backing file.
pub(super) fn status(device: &File) -> io::Result<Option<Status>> {
    let mut info = EMPTY;
    // SAFETY: the kernel writes a whole `struct loop_info64` into a reference that lives; any bytes are valid in it.
    match unsafe { call::status(device.as_raw_fd(), &mut info) } {
        Ok(_) => {}
        Err(Errno::ENXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let name = info.file_name.split(|byte| *byte == 0).next().unwrap_or_default();
    let mark = std::str::from_utf8(name).ok().and_then(|name| name.strip_prefix(MARK));
    Ok(Some(Status {
        backing: Backing { device: info.device, inode: info.inode },
        of_device: info.rdevice,
        volume: mark.and_then(|mark| Uuid::try_parse(mark).ok()),
    }))
}

/// Takes the backing file from a device. While others have it open too it only goes when they close it.
pub(super) fn clear(device: &File) -> io::Result<()> {
    // SAFETY: takes no argument; the descriptor is open.
    match unsafe { call::clear(device.as_raw_fd()) } {
        Ok(_) | Err(Errno::ENXIO) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Lets a device see how long its backing file is now.
pub(super) fn set_capacity(device: &File) -> io::Result<()> {
    // SAFETY: takes no argument; the descriptor is open.
    unsafe { call::set_capacity(device.as_raw_fd()) }?;
    Ok(())
}

/// What is behind a file.
pub(super) fn backing_of(file: &File) -> io::Result<Backing> {
    let metadata = file.metadata()?;
    Ok(Backing { device: metadata.dev(), inode: metadata.ino() })
}

/// The path of a device's backing file as the kernel shows it, which asks no file system; `None` without one.
pub(super) fn backing_path(device: &Path) -> Option<PathBuf> {
    let name = device.file_name()?;
    let text = std::fs::read_to_string(Path::new(DEVICES).join(name).join("loop/backing_file")).ok()?;
    Some(PathBuf::from(text.strip_suffix('\n').unwrap_or(&text)))
}

/// All loop devices that have a backing file.
pub(super) fn all() -> io::Result<Vec<PathBuf>> {
    let names = std::fs::read_dir(DEVICES)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let devices = names.filter(|name| name.starts_with("loop")).map(|name| Path::new("/dev").join(name));
    Ok(devices.filter(|device| backing_path(device).is_some()).collect())
}

/// The device of this volume with this backing file, if there is one.
pub(super) fn find(volume: Uuid, backing: &File) -> io::Result<Option<PathBuf>> {
    let wanted = backing_of(backing)?;
    // A device of somebody else may hang in its file system, so only those that look like ours are asked.
    let path = std::fs::read_link(descriptor_path(backing))?;
    for device in all()? {
        if backing_path(&device).as_ref() != Some(&path) {
            continue;
        }
        let Ok(file) = open(&device) else { continue };
        let found = status(&file)?;
        if found.is_some_and(|found| found.volume == Some(volume) && found.backing == wanted) {
            return Ok(Some(device));
        }
    }
    Ok(None)
}

/// A name for an open file, whatever becomes of its others.
fn descriptor_path(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}
