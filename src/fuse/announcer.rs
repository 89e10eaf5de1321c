//! The announcer: a child process that repeats the daemon's changes as file operations through the mount.
//!
//! No FUSE notification raises inotify events, an operation through the mount does. It is a process of its own because a
//! daemon that waits for itself cannot be killed, and it holds no descriptor of `/dev/fuse`, so that the connection ends
//! with the daemon. Between jobs it holds nothing of the mount either: `umount` finds it idle.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::{BufRead, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, unbounded};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2, renameat};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, fstat, futimens, mkdirat};
use nix::sys::time::TimeSpec;
use nix::unistd::{UnlinkatFlags, symlinkat, unlinkat};
use parking_lot::{Condvar, Mutex};

use super::job::{self, Action, Job, Report};

/// The hidden subcommand of the program that runs this.
pub const SUBCOMMAND: &str = "announcer";

/// Workers that are not stuck.
const USABLE: usize = 4;
/// Workers in all. Each stuck one waits behind a user's inode lock.
const MOST: usize = 64;
/// A worker that has been at its job for so long is left behind.
const STUCK: Duration = Duration::from_secs(1);
/// How often busy workers are looked at.
const ROUND: Duration = Duration::from_millis(250);

/// The body of the subcommand; `arguments` are those after it: the mount point, and the mount's device number. Reads
/// jobs from standard input, reports on standard output, and ends with either of them or with its parent.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut arguments = arguments.into_iter();
    let (Some(mountpoint), Some(device)) = (arguments.next(), arguments.next()) else {
        eprintln!("the announcer is started by the daemon only");
        return ExitCode::from(2);
    };
    let Some(device) = device.to_str().and_then(|device| device.parse().ok()) else {
        eprintln!("the announcer needs the mount's device number");
        return ExitCode::from(2);
    };
    close_inherited();
    if let Err(errno) = set_pdeathsig(Signal::SIGKILL) {
        eprintln!("the announcer cannot tie itself to the daemon: {errno}");
        return ExitCode::FAILURE;
    }
    let (sender, jobs) = unbounded();
    let crew = Arc::new(Crew {
        mount: Mount { path: PathBuf::from(mountpoint), device },
        jobs,
        shift: Mutex::new(Shift::default()),
        busy: Condvar::new(),
        output: Mutex::new(()),
    });
    for _ in 0..USABLE {
        if let Err(error) = crew.hire() {
            eprintln!("the announcer cannot start its threads: {error}");
            return ExitCode::FAILURE;
        }
    }
    let overseer = crew.clone();
    if std::thread::Builder::new().name("overseer".into()).spawn(move || overseer.oversee()).is_err() {
        return ExitCode::FAILURE;
    }
    crew.report(&Report::Ready);
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        match serde_json::from_str::<Job>(&line) {
            Ok(job) => {
                if sender.send(job).is_err() {
                    break;
                }
            }
            Err(error) => {
                eprintln!("the announcer does not understand the daemon: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

/// Whatever a library of the daemon left open without close-on-exec, `/dev/fuse` foremost, must not live on in here.
fn close_inherited() {
    // SAFETY: called before this process has opened any descriptor; nothing owns those above standard error.
    unsafe {
        libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0u32);
    }
}

#[derive(Default)]
struct Shift {
    /// Since when a worker has been at its job.
    busy: HashMap<usize, Instant>,
    workers: usize,
    hired: usize,
}

impl Shift {
    fn usable(&self) -> usize {
        self.workers - self.busy.values().filter(|since| since.elapsed() > STUCK).count()
    }
}

struct Crew {
    mount: Mount,
    jobs: Receiver<Job>,
    shift: Mutex<Shift>,
    busy: Condvar,
    output: Mutex<()>,
}

impl Crew {
    fn hire(self: &Arc<Crew>) -> std::io::Result<()> {
        let number = {
            let mut shift = self.shift.lock();
            shift.workers += 1;
            shift.hired += 1;
            shift.hired
        };
        let crew = self.clone();
        let spawned = std::thread::Builder::new().name(format!("worker-{number}")).spawn(move || crew.work(number));
        if spawned.is_err() {
            self.shift.lock().workers -= 1;
        }
        spawned.map(drop)
    }

    fn work(&self, number: usize) {
        while let Ok(job) = self.jobs.recv() {
            self.shift.lock().busy.insert(number, Instant::now());
            self.busy.notify_one();
            let errno = match self.mount.perform(&job.action) {
                Ok(()) => 0,
                Err(errno) => errno as i32,
            };
            self.report(&Report::Done { id: job.id, errno });
            let mut shift = self.shift.lock();
            shift.busy.remove(&number);
            if shift.usable() > USABLE {
                shift.workers -= 1;
                return;
            }
        }
    }

    /// Replaces the workers that are stuck.
    fn oversee(self: &Arc<Crew>) {
        loop {
            let missing = {
                let mut shift = self.shift.lock();
                while shift.busy.is_empty() {
                    self.busy.wait(&mut shift);
                }
                USABLE.saturating_sub(shift.usable()).min(MOST.saturating_sub(shift.workers))
            };
            for _ in 0..missing {
                if self.hire().is_err() {
                    break;
                }
            }
            std::thread::sleep(ROUND);
        }
    }

    fn report(&self, report: &Report) {
        let Ok(line) = job::line(report) else { return };
        let _one_line_at_a_time = self.output.lock();
        let mut output = std::io::stdout().lock();
        if output.write_all(&line).and_then(|()| output.flush()).is_err() {
            // The daemon is gone.
            std::process::exit(0);
        }
    }
}

struct Mount {
    path: PathBuf,
    device: u64,
}

impl Mount {
    fn perform(&self, action: &Action) -> nix::Result<()> {
        let root = self.root()?;
        match action {
            Action::Touch { path } => {
                let flags = OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
                match beneath(&root, Path::new(path), flags) {
                    // In which entries came or went. Both times: of one alone the kernel says MODIFY, for which nobody
                    // watches directories.
                    Err(Errno::EISDIR) => {
                        let directory = beneath(&root, Path::new(path), OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
                        futimens(&directory, &TimeSpec::UTIME_NOW, &TimeSpec::UTIME_NOW)
                    }
                    file => futimens(&file?, &TimeSpec::UTIME_OMIT, &TimeSpec::UTIME_NOW),
                }
            }
            Action::MakeDirectory { path } => {
                let (parent, name) = parent(&root, path)?;
                mkdirat(&parent, name, Mode::from_bits_truncate(0o770))
            }
            Action::RemoveDirectory { path } => {
                let (parent, name) = parent(&root, path)?;
                unlinkat(&parent, name, UnlinkatFlags::RemoveDir)
            }
            Action::Symlink { path, target } => {
                let (parent, name) = parent(&root, path)?;
                symlinkat(target.as_str(), &parent, name)
            }
            Action::Unlink { path } => {
                let (parent, name) = parent(&root, path)?;
                unlinkat(&parent, name, UnlinkatFlags::NoRemoveDir)
            }
            Action::Rename { from, to } => {
                let (from_parent, from_name) = parent(&root, from)?;
                let (to_parent, to_name) = parent(&root, to)?;
                renameat(&from_parent, from_name, &to_parent, to_name)
            }
        }
    }

    /// The root of the mount, never that of another one that lies over it.
    fn root(&self) -> nix::Result<OwnedFd> {
        let root = open(&self.path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        if fstat(&root)?.st_dev == self.device { Ok(root) } else { Err(Errno::EXDEV) }
    }
}

/// Opens what lies below, without leaving the mount or following a link.
fn beneath(root: &OwnedFd, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    let inside = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_XDEV | ResolveFlag::RESOLVE_NO_SYMLINKS;
    openat2(root, path, OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(inside))
}

/// The directory of a path, and the name in it.
fn parent<'a>(root: &OwnedFd, path: &'a str) -> nix::Result<(OwnedFd, &'a str)> {
    let (directory, name) = path.rsplit_once('/').unwrap_or((".", path));
    Ok((beneath(root, Path::new(directory), OFlag::O_PATH | OFlag::O_DIRECTORY)?, name))
}
