//! Who uses a block device of this host: asked right before it is taken away.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::loop_device::{self, DEVICES};

/// Who looks at a device for a moment only, as udev does with each new one, is waited for.
const PASSING: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(20);

/// Somebody who uses the device or a partition of it, in words for a sentence; `None`: nobody that can be seen.
///
/// # Errors
///
/// What the system says of the device.
pub(super) fn user(device: &Path) -> io::Result<Option<String>> {
    let deadline = Instant::now() + PASSING;
    loop {
        let user = user_now(device)?;
        if user.is_none() || Instant::now() >= deadline {
            return Ok(user);
        }
        thread::sleep(PAUSE);
    }
}

fn user_now(device: &Path) -> io::Result<Option<String>> {
    let parts = with_partitions(device)?;
    for part in &parts {
        let shown = part.path.display();
        if let Some(place) = mounted(part.number) {
            return Ok(Some(format!("{shown} is mounted on {place}; umount it first")));
        }
        if is_swap(part.number) {
            return Ok(Some(format!("{shown} is swap space; swapoff it first")));
        }
        if let Some(holder) = holder(&part.system) {
            return Ok(Some(format!("{shown} is part of /dev/{holder}; take that away first")));
        }
        if let Some(other) = behind(part.number)? {
            return Ok(Some(format!("{shown} is behind {}; detach that first", other.display())));
        }
    }
    for part in &parts {
        if let Some(process) = opener(part.number) {
            return Ok(Some(format!("{process} has {} open; end it first", part.path.display())));
        }
    }
    match loop_device::open_alone(device) {
        Ok(_) => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            Ok(Some(format!("something that cannot be looked at uses {}", device.display())))
        }
        Err(error) => Err(error),
    }
}

/// A device, or a partition of it.
struct Part {
    path: PathBuf,
    /// Its directory in sysfs.
    system: PathBuf,
    /// `st_rdev`.
    number: u64,
}

fn with_partitions(device: &Path) -> io::Result<Vec<Part>> {
    let name = device.file_name().unwrap_or_default();
    let system = Path::new(DEVICES).join(name);
    let entries = fs::read_dir(&system)?.filter_map(Result::ok).map(|entry| entry.path());
    let partitions = entries.filter(|path| path.join("partition").exists());
    let part = |system: PathBuf| -> Option<Part> {
        let path = Path::new("/dev").join(system.file_name()?);
        let text = fs::read_to_string(system.join("dev")).ok()?;
        let (major, minor) = text.trim().split_once(':')?;
        let number = libc::makedev(major.parse().ok()?, minor.parse().ok()?);
        Some(Part { path, system, number })
    };
    Ok([system.clone()].into_iter().chain(partitions).filter_map(part).collect())
}

/// Where a device is mounted, in any mount namespace that a process is in.
fn mounted(number: u64) -> Option<String> {
    let wanted = format!("{}:{}", libc::major(number), libc::minor(number));
    let mut seen = BTreeSet::new();
    for process in processes() {
        let directory = Path::new("/proc").join(process.to_string());
        // Of most processes it is the same one.
        let Ok(namespace) = fs::read_link(directory.join("ns/mnt")) else { continue };
        if !seen.insert(namespace) {
            continue;
        }
        let Ok(text) = fs::read_to_string(directory.join("mountinfo")) else { continue };
        let place = text.lines().find_map(|line| {
            let mut fields = line.split(' ');
            (fields.nth(2)? == wanted).then(|| fields.nth(1).map(plain)).flatten()
        });
        if place.is_some() {
            return place;
        }
    }
    None
}

/// A path of mountinfo(5) without its escapes.
fn plain(escaped: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .into_iter()
        .fold(escaped.to_owned(), |text, (from, to)| text.replace(from, to))
}

fn is_swap(number: u64) -> bool {
    let text = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let paths = text.lines().skip(1).filter_map(|line| line.split_ascii_whitespace().next());
    paths.map(|path| PathBuf::from(plain(path))).any(|path| is_device(&path, number))
}

/// A device that was made of this one, such as by the device mapper.
fn holder(system: &Path) -> Option<String> {
    let mut names = fs::read_dir(system.join("holders")).ok()?.filter_map(Result::ok);
    names.next()?.file_name().into_string().ok()
}

/// A loop device that this one is behind, which the kernel does not count as a holder.
fn behind(number: u64) -> io::Result<Option<PathBuf>> {
    for device in loop_device::all()? {
        // Asking one with a file behind it can hang in that file's system.
        if !loop_device::backing_path(&device).is_some_and(|path| path.starts_with("/dev")) {
            continue;
        }
        let Ok(file) = loop_device::open(&device) else { continue };
        if loop_device::status(&file)?.is_some_and(|status| status.of_device == number) {
            return Ok(Some(device));
        }
    }
    Ok(None)
}

/// A process that has the device open.
fn opener(number: u64) -> Option<String> {
    let has_it_open = |process: &u32| {
        let descriptors = fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().filter_map(Result::ok);
        descriptors.map(|entry| entry.path()).any(|descriptor| {
            // Only what lies where devices lie is asked: asking a file can hang where its server does.
            let looks = fs::read_link(&descriptor).is_ok_and(|link| link.starts_with("/dev"));
            looks && is_device(&descriptor, number)
        })
    };
    let process = processes().into_iter().filter(|process| *process != std::process::id()).find(has_it_open)?;
    let name = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
    Some(format!("the process {process} ({})", name.trim()))
}

fn is_device(path: &Path, number: u64) -> bool {
    fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device() && found.rdev() == number)
}

fn processes() -> Vec<u32> {
    let names = fs::read_dir("/proc").into_iter().flatten().filter_map(|entry| Some(entry.ok()?.file_name()));
    names.filter_map(|name| name.to_str()?.parse().ok()).collect()
}
