//! The program that shows a qcow2 file's content as a file of raw bytes, which a loop device can be made of:
//! `qemu-storage-daemon` with an export by FUSE.
//!
//! It runs on when this program ends. It is known again by a file with its process id, which it holds locked as long as it
//! lives, and then by process id and start time. It is ended by SIGTERM, upon which it writes what it has and unmounts.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, setrlimit};
use serde_json::json;

use super::process;
use crate::model::volume::record::Exporter;

/// The program.
pub(super) const PROGRAM: &str = "qemu-storage-daemon";

/// The exported file in an exporter's directory.
const DISK: &str = "disk";
/// Its process id, which it keeps locked.
const PID: &str = "pid";

/// One request of the largest size. Measured: what the disk has takes half of the time that the kernel's own 128 KiB need,
/// and that 4 MiB do, since the reader then waits for what it does not need yet.
const READ_AHEAD_KIB: &str = "1024";

/// How long what a guest wrote may take to be written when it ends.
const ENDING: Duration = Duration::from_secs(60);

/// `CAP_DAC_OVERRIDE` and `CAP_SYS_ADMIN`, `linux/capability.h`: to open the file whoever owns it, and to mount.
const CAPABILITIES: [libc::c_ulong; 2] = [1, 21];
/// More than any kernel has.
const MOST_CAPABILITIES: libc::c_ulong = 64;

/// The file on which the exporter of this directory is mounted.
pub(super) fn mountpoint(directory: &Path) -> PathBuf {
    directory.join(DISK)
}

/// The exporter that runs in this directory, if one does.
pub(super) fn find(directory: &Path) -> io::Result<Option<Exporter>> {
    let mut file = match OpenOptions::new().read(true).write(true).open(directory.join(PID)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if !is_locked(&file)? {
        return Ok(None);
    }
    let text = io::read_to_string(&mut file)?;
    let Ok(pid) = text.trim().parse() else { return Ok(None) };
    let Some(started_at) = process::started_at(pid) else { return Ok(None) };
    Ok(Some(Exporter { pid, started_at, mountpoint: mountpoint(directory) }))
}

/// Has the kernel read ahead in what an exporter shows as far as that pays: the exporter takes one request at a time. A file
/// that is open already goes on as it was when it was opened, so this comes first.
pub(super) fn read_ahead(exporter: &Exporter) {
    let set = |metadata: fs::Metadata| {
        let device = metadata.dev();
        let place = format!("/sys/class/bdi/{}:{}/read_ahead_kb", libc::major(device), libc::minor(device));
        fs::write(place, READ_AHEAD_KIB)
    };
    if let Err(error) = fs::symlink_metadata(&exporter.mountpoint).and_then(set) {
        log::debug!("what is exported is read ahead as little as anything else: {error}");
    }
}

/// Whether another process holds a lock on it. QEMU locks by open file description.
fn is_locked(file: &File) -> io::Result<bool> {
    let mut lock =
        libc::flock { l_type: libc::F_WRLCK as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(lock.l_type != libc::F_UNLCK as i16)
}

/// Exports a qcow2 file that was checked, and returns when that can be used. Errors are sentences.
pub(super) fn start(directory: &Path, image: File) -> Result<Exporter, String> {
    let failed = |what: &str, error: io::Error| format!("{what} {}: {error}", directory.display());
    DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(|error| failed("cannot make", error))?;
    // What an exporter that was killed has left.
    unmount(directory).map_err(|error| failed("cannot unmount what is mounted in", error))?;
    let disk = mountpoint(directory);
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&disk)
        .map_err(|error| failed("cannot make a file in", error))?;
    let disk = disk.to_str().ok_or_else(|| format!("{} is no text, which {PROGRAM} needs", disk.display()))?;
    let image = OwnedFd::from(image);
    // Its own name of the descriptor that it inherits, so that whatever bears the file's name now is not opened.
    let file = json!({
        "driver": "file", "node-name": "file", "filename": format!("/proc/self/fd/{}", image.as_raw_fd()),
        "locking": "on", "discard": "unmap",
    });
    // Nothing that a header names is opened.
    let node = json!({ "driver": "qcow2", "node-name": "disk", "file": "file", "backing": null, "discard": "unmap" });
    let export = json!({
        "type": "fuse", "id": "disk", "node-name": "disk", "mountpoint": disk, "writable": true, "growable": true,
        "allow-other": "off",
    });
    let mut command = Command::new(PROGRAM);
    for (option, value) in [("--blockdev", file), ("--blockdev", node), ("--export", export)] {
        command.arg(option).arg(value.to_string());
    }
    command
        .arg("--pidfile")
        .arg(directory.join(PID))
        .arg("--daemonize")
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .env("LANG", "C")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    // SAFETY: `confine` makes system calls only; it neither allocates nor takes a lock, as required after fork.
    unsafe { command.pre_exec(move || confine(&image)) };
    let ended = command.output().map_err(|error| format!("cannot run {PROGRAM}: {error}"))?;
    if !ended.status.success() {
        let words = String::from_utf8_lossy(&ended.stderr).trim().replace('\n', "; ");
        return Err(if words.is_empty() { format!("{PROGRAM} failed: {}", ended.status) } else { words });
    }
    let found = find(directory).map_err(|error| failed("cannot look into", error))?;
    found.ok_or_else(|| format!("{PROGRAM} ended as soon as it had begun"))
}

/// Between fork and exec: the image and no other descriptor, no network, and no more rights than it needs.
fn confine(image: &OwnedFd) -> io::Result<()> {
    // SAFETY: takes three integers. Old kernels lack it (ENOSYS), then O_CLOEXEC is what there is.
    unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    fcntl(image, FcntlArg::F_SETFD(FdFlag::empty()))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    // Where there are no network namespaces it has those rights less that need one.
    let _without_namespaces = unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC);
    for capability in (0..MOST_CAPABILITIES).filter(|capability| !CAPABILITIES.contains(capability)) {
        // SAFETY: takes integers; EINVAL says that this kernel does not have that one.
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
    }
    nix::sys::prctl::set_no_new_privs()?;
    Ok(())
}

/// Ends the exporter of this directory, waits for its end, and removes what it leaves. Without one nothing happens.
/// Errors are sentences.
pub(super) fn end(directory: &Path) -> Result<(), String> {
    let failed = |what: &str, error: io::Error| format!("{what} {}: {error}", directory.display());
    if !directory.exists() {
        return Ok(());
    }
    if let Some(exporter) = find(directory).map_err(|error| failed("cannot look into", error))? {
        process::end(&exporter, ENDING)?;
    }
    unmount(directory).map_err(|error| failed("cannot unmount what is mounted in", error))?;
    for name in [DISK, PID] {
        match fs::remove_file(directory.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("cannot remove a file in", error));
            }
            Ok(()) | Err(_) => {}
        }
    }
    fs::remove_dir(directory).map_err(|error| failed("cannot remove", error))
}

/// Unmounts what an exporter that is gone has left mounted on its file.
fn unmount(directory: &Path) -> io::Result<()> {
    let disk = mountpoint(directory);
    loop {
        match umount2(&disk, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // There may be several, one above the other.
            Ok(()) => {}
            // Nothing is mounted, or nothing is there.
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}
