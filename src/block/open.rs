//! Who has a file open: asked right before it is removed.
//!
//! The kernel answers with a lease, which it gives only if nobody else has the file open in any way, a loop device
//! included. Who it is, and on file systems without leases whether it is anybody, is looked for in `/proc`, where an
//! ordinary user sees his own processes only.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// fcntl(2), of `asm-generic/fcntl.h`; libc does not have it.
const F_SETSIG: libc::c_int = 10;

/// Somebody who has a file open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// A process.
    Process {
        /// Its id.
        id: u32,
        /// Its name.
        name: String,
    },
    /// Something in the kernel, or a process that we may not look at.
    Unknown,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Holder::Process { id, name } => write!(f, "the process {id} ({name})"),
            Holder::Unknown => write!(f, "a process or device that cannot be looked at"),
        }
    }
}

/// Who has it open for a moment only is waited for: a child of ours between fork and exec has all our files, and indexers
/// look at everything.
const PASSING: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(20);

/// Somebody else than this process who has the file open, and not in passing: that is waited for, a second at most. Nobody
/// has an absent one open, nor what is no regular file.
///
/// # Errors
///
/// What the system says of the file.
pub fn holder(path: &Path) -> io::Result<Option<Holder>> {
    wait_for(path, Opened::InAnyWay)
}

/// The same of whoever can write to it.
///
/// # Errors
///
/// What the system says of the file.
pub fn writer(path: &Path) -> io::Result<Option<Holder>> {
    wait_for(path, Opened::ForWriting)
}

/// Whom a question is about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Opened {
    InAnyWay,
    ForWriting,
}

fn wait_for(path: &Path, opened: Opened) -> io::Result<Option<Holder>> {
    let deadline = Instant::now() + PASSING;
    loop {
        let holder = holder_now(path, opened)?;
        if holder.is_none() || Instant::now() >= deadline {
            return Ok(holder);
        }
        thread::sleep(PAUSE);
    }
}

fn holder_now(path: &Path, opened: Opened) -> io::Result<Option<Holder>> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => return Ok(None),
        Err(error) => return Err(error),
    };
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    let leased = takes_lease(&file, opened);
    if leased == Some(true) {
        return Ok(None);
    }
    let mut by_us = 0;
    for id in processes()? {
        let count = count_open(id, &file, path, opened);
        if id == std::process::id() {
            by_us = count;
        } else if count > 0 {
            let name = fs::read_to_string(format!("/proc/{id}/comm")).unwrap_or_default();
            return Ok(Some(Holder::Process { id, name: name.trim().to_owned() }));
        }
    }
    // This function has it open itself, for reading.
    let own = usize::from(opened == Opened::InAnyWay);
    Ok((leased == Some(false) && by_us <= own).then_some(Holder::Unknown))
}

/// Whether the kernel grants that nobody else has the file open like this; `None` if it does not say.
fn takes_lease(file: &File, opened: Opened) -> Option<bool> {
    let control = |command: libc::c_int, argument: libc::c_int| {
        // SAFETY: F_SETSIG and F_SETLEASE take an integer and touch no memory; the descriptor is open.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), command, argument) };
        if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // Whoever opens it while we hold the lease has us told by a signal: by this one, which is ignored unless asked for.
    control(F_SETSIG, libc::SIGURG).ok()?;
    let lease = match opened {
        Opened::InAnyWay => libc::F_WRLCK,
        Opened::ForWriting => libc::F_RDLCK,
    };
    match control(libc::F_SETLEASE, lease) {
        Ok(()) => {
            // It ends with the file at the latest.
            let _ends_anyway = control(libc::F_SETLEASE, libc::F_UNLCK);
            Some(true)
        }
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Some(false),
        Err(_) => None,
    }
}

fn processes() -> io::Result<Vec<u32>> {
    let names = fs::read_dir("/proc")?.filter_map(|entry| Some(entry.ok()?.file_name()));
    Ok(names.filter_map(|name| name.to_str()?.parse().ok()).collect())
}

/// How often a process has it open. A process that ends meanwhile has nothing open.
fn count_open(process: u32, file: &File, path: &Path, opened: Opened) -> usize {
    let Ok(wanted) = file.metadata() else { return 0 };
    let Ok(descriptors) = fs::read_dir(format!("/proc/{process}/fd")) else { return 0 };
    let is_it = |entry: fs::DirEntry| {
        // Asking a file for its number can hang where its server does, so only those that look like it are asked.
        let link = fs::read_link(entry.path()).ok()?;
        let number = entry.file_name();
        let looks = link.file_name() == path.file_name()
            || inode_of(process, number.to_str()?).is_some_and(|inode| inode == wanted.ino());
        if !looks {
            return None;
        }
        let found = fs::metadata(entry.path()).ok()?;
        let is_it = (found.dev(), found.ino()) == (wanted.dev(), wanted.ino());
        Some(is_it && (opened == Opened::InAnyWay || can_write(process, number.to_str()?)))
    };
    descriptors.filter_map(|entry| is_it(entry.ok()?)).filter(|is_it| *is_it).count()
}

/// The inode number of an open file, which no file system is asked for (since Linux 5.14).
fn inode_of(process: u32, descriptor: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/fdinfo/{descriptor}")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("ino:")?.trim().parse().ok())
}

/// Whether an open file was opened for writing; one that is closed by now was not.
fn can_write(process: u32, descriptor: &str) -> bool {
    let text = fs::read_to_string(format!("/proc/{process}/fdinfo/{descriptor}")).unwrap_or_default();
    let flags = text.lines().find_map(|line| i32::from_str_radix(line.strip_prefix("flags:")?.trim(), 8).ok());
    flags.is_some_and(|flags| flags & libc::O_ACCMODE != libc::O_RDONLY)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_file_that_nobody_has_open_has_no_holder() {
        let directory = tempfile::TempDir::new().unwrap();
        let path = directory.path().join("disk");
        assert_eq!(holder(&path).unwrap(), None);
        fs::write(&path, "data").unwrap();
        assert_eq!(holder(&path).unwrap(), None);
        std::os::unix::fs::symlink(&path, directory.path().join("link")).unwrap();
        assert_eq!(holder(&directory.path().join("link")).unwrap(), None);
    }

    #[test]
    fn who_reads_a_file_is_named_under_whichever_name_he_has_opened_it() {
        let directory = tempfile::TempDir::new().unwrap();
        let (path, other) = (directory.path().join("disk"), directory.path().join("other"));
        fs::write(&path, "data").unwrap();
        fs::hard_link(&path, &other).unwrap();
        let reader = |path: &Path| {
            let file = File::open(path).unwrap();
            Command::new("sleep").arg("60").stdin(Stdio::from(file)).spawn().unwrap()
        };
        for name in [&path, &other] {
            let mut child = reader(name);
            let found = holder(&path);
            child.kill().unwrap();
            child.wait().unwrap();
            assert_eq!(found.unwrap(), Some(Holder::Process { id: child.id(), name: "sleep".to_owned() }));
        }
        assert_eq!(holder(&path).unwrap(), None);
    }

    #[test]
    fn who_only_reads_is_no_writer() {
        let directory = tempfile::TempDir::new().unwrap();
        let path = directory.path().join("disk");
        fs::write(&path, "data").unwrap();
        for (writes, expected) in [(false, None), (true, Some("sleep"))] {
            let file = OpenOptions::new().read(true).write(writes).open(&path).unwrap();
            let mut child = Command::new("sleep").arg("60").stdin(Stdio::from(file)).spawn().unwrap();
            let found = writer(&path);
            child.kill().unwrap();
            child.wait().unwrap();
            let found = found.unwrap().map(|holder| match holder {
                Holder::Process { name, .. } => name,
                Holder::Unknown => String::new(),
            });
            assert_eq!(found.as_deref(), expected);
        }
    }

    #[test]
    fn this_process_itself_does_not_count() {
        let directory = tempfile::TempDir::new().unwrap();
        let path = directory.path().join("disk");
        fs::write(&path, "data").unwrap();
        let _open = File::open(&path).unwrap();
        assert_eq!(holder(&path).unwrap(), None);
    }
}
