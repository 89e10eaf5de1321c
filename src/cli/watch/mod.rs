//! `instancefs watch [PATH...]`: prints what changes.
//!
//! Two sources. `events` tells who did what, but only the admin group may read it, and it says nothing of single
//! values. Where it does not answer the question, files are read again whenever inotify says that they changed, and
//! what differs is printed. Nothing is held open between two looks: a watcher must not keep anybody from unmounting.

mod events;
mod line;
mod scope;
mod values;

use std::collections::HashSet;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::place::is_there;
use events::Events;
use line::Line;
use scope::Scope;
use values::Values;

/// A change that nobody announced, and the end of a daemon, are seen after this time at the latest.
const SAFETY_MILLISECONDS: u16 = 1000;
/// Changes that come together are looked at together.
const BREATH: Duration = Duration::from_millis(5);

/// The command line of `watch`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// A tree, a directory in it, an object, or one of its files [default: the tree of the current directory, or else
    /// the only one that is mounted]
    #[arg(value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// Print JSON objects, one a line, with the keys of the file `events`
    #[arg(long)]
    json: bool,
}

/// Why nothing can be watched, or no more.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// No mount at all.
    #[error("no instancefs is mounted here; mount one, or name a path in a tree")]
    NoTree,
    /// Which one is meant?
    #[error("several trees are mounted ({0}); name one of them")]
    SeveralTrees(String),
    /// Nothing of that name.
    #[error("{0}: there is no such file or object")]
    Absent(PathBuf),
    /// Somewhere else in the file system.
    #[error("{0}: this lies in no instancefs tree")]
    NotInTree(PathBuf),
    /// The tree went away.
    #[error("the tree {0} is not mounted any more")]
    TreeGone(PathBuf),
    /// Its daemon died.
    #[error("the daemon of the tree {0} is gone; start it again, and then this command")]
    DaemonGone(PathBuf),
    /// A file cannot be read.
    #[error("{file} cannot be read")]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// inotify or poll failed.
    #[error("the kernel's notification does not work")]
    Notification(#[source] Errno),
    /// The current directory, or the table of mounts.
    #[error("the tree to watch cannot be found out")]
    Searching(#[source] io::Error),
    /// The output cannot be written.
    #[error("the output cannot be written")]
    Output(#[source] io::Error),
}

/// Where changes are learned from.
enum Source {
    Events(Events),
    Values(Values),
}

/// What is watched of one tree.
struct Watched {
    root: PathBuf,
    device: u64,
    source: Source,
}

/// Prints until the tree is gone or nobody reads any more.
pub fn run(arguments: &Arguments) -> Result<ExitCode, WatchError> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).map_err(WatchError::Notification)?;
    let mut watched = begin(&arguments.paths, &inotify)?;
    let mut output = Output { json: arguments.json };
    loop {
        for Watched { root, device, source } in &mut watched {
            let looked = match source {
                Source::Events(events) => events.look(&inotify, &mut |line| output.print(line)),
                Source::Values(values) => values.look(&inotify, &mut |line| output.print(line)),
            };
            match looked {
                Ok(()) if is_there(root, *device) => {}
                Ok(()) => return Err(WatchError::TreeGone(root.clone())),
                Err(WatchError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
                    return Ok(ExitCode::SUCCESS);
                }
                Err(error) => return Err(explained(error, root, *device)),
            }
        }
        if !sleep(&inotify)? {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

/// The sources of what was asked for: one for everything of a tree that `events` answers.
fn begin(paths: &[PathBuf], inotify: &Inotify) -> Result<Vec<Watched>, WatchError> {
    let scopes = match paths {
        [] => vec![Scope::usual()?],
        paths => paths.iter().map(|path| Scope::find(path)).collect::<Result<_, _>>()?,
    };
    let mut watched: Vec<Watched> = Vec::new();
    let mut taken = HashSet::new();
    for Scope { root, device, part } in scopes {
        if !taken.insert((root.clone(), part.clone())) {
            continue;
        }
        if part.is_told_by_events() {
            let known = watched.iter_mut().find_map(|watched| match &mut watched.source {
                Source::Events(events) if watched.root == root => Some(events),
                Source::Events(_) | Source::Values(_) => None,
            });
            if let Some(events) = known {
                events.add(part);
                continue;
            }
            if let Some(events) = Events::begin(&root, part.clone(), inotify)? {
                watched.push(Watched { root, device, source: Source::Events(events) });
                continue;
            }
        }
        let values = Values::begin(&root, part, inotify).map_err(|error| explained(error, &root, device))?;
        watched.push(Watched { root, device, source: Source::Values(values) });
    }
    Ok(watched)
}

/// A file that cannot be read because there is no tree any more is not the file's fault.
fn explained(error: WatchError, root: &Path, device: u64) -> WatchError {
    let WatchError::Unreadable { source, .. } = &error else { return error };
    match source.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOTCONN | Errno::ECONNABORTED) => WatchError::DaemonGone(root.to_owned()),
        _ if !is_there(root, device) => WatchError::TreeGone(root.to_owned()),
        _ => error,
    }
}

/// Asks to be woken when a file, or an entry of a directory, changes. What is absent wakes by its directory.
fn wake_on(inotify: &Inotify, path: &Path) -> Result<(), WatchError> {
    let changes = AddWatchFlags::IN_MODIFY
        | AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_MOVE
        | AddWatchFlags::IN_MOVE_SELF
        | AddWatchFlags::IN_DELETE_SELF;
    match inotify.add_watch(path, changes) {
        Ok(_) | Err(Errno::ENOENT | Errno::ENOTDIR | Errno::EACCES) => Ok(()),
        Err(Errno::ENOTCONN | Errno::ECONNABORTED) => {
            Err(WatchError::Unreadable { file: path.to_owned(), source: Errno::ENOTCONN.into() })
        }
        Err(errno) => Err(WatchError::Notification(errno)),
    }
}

/// Sleeps until something may have changed; false when nobody reads our output any more.
fn sleep(inotify: &Inotify) -> Result<bool, WatchError> {
    let stdout = io::stdout();
    // No events are asked for: the end of a pipe's reader is reported anyway.
    let mut descriptors =
        [PollFd::new(inotify.as_fd(), PollFlags::POLLIN), PollFd::new(stdout.as_fd(), PollFlags::empty())];
    match poll(&mut descriptors, PollTimeout::from(SAFETY_MILLISECONDS)) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(WatchError::Notification(errno)),
    }
    let [changes, reader] = descriptors.map(|descriptor| descriptor.revents().unwrap_or(PollFlags::empty()));
    if reader.intersects(PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL) {
        return Ok(false);
    }
    if changes.contains(PollFlags::POLLIN) {
        std::thread::sleep(BREATH);
        // Before the look that follows: what comes during it wakes again. An overflowing queue is no loss, since
        // everything is looked at.
        while matches!(inotify.read_events(), Ok(events) if !events.is_empty()) {}
    }
    Ok(true)
}

/// Where lines go.
struct Output {
    json: bool,
}

impl Output {
    /// Each line is out before the next one is looked for.
    fn print(&mut self, line: &Line) -> Result<(), WatchError> {
        let text = if self.json { line.json() } else { line.readable() };
        let mut stdout = io::stdout().lock();
        stdout
            .write_all(text.as_bytes())
            .and_then(|()| stdout.write_all(b"\n"))
            .and_then(|()| stdout.flush())
            .map_err(WatchError::Output)
    }
}
