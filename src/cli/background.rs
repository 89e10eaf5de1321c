//! `--background`: the same program again, in a session of its own, and a parent that leaves when the mount answers.
//!
//! The daemon is the re-executed child: its standard output is the pipe on which it says that it is ready, its standard
//! error a pipe whose content the parent passes on. It closes everything else that it inherits, so that nobody who reads
//! our caller's output waits for us.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{dup2_stderr, dup2_stdout, setsid};

/// The flag by which the child knows what it is.
pub const FLAG: &str = "--in-background";

const READY: &[u8] = b"ready";

/// Why there is no background daemon.
#[derive(Debug, thiserror::Error)]
pub enum BackgroundError {
    /// The child process cannot be started.
    #[error("the background process cannot be started")]
    Start(#[source] io::Error),
    /// The child cannot leave its terminal and caller.
    #[error("the background process cannot detach from its caller")]
    Detach(#[source] io::Error),
    /// The log cannot be written.
    #[error("the log {path} cannot be opened")]
    Log {
        /// The log.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The caller ended before the mount was there, so it is taken back.
    #[error("the process that asked for the mount is gone")]
    Abandoned(#[source] io::Error),
}

/// The parent's side: starts the daemon with the same arguments and returns when it is ready or has failed.
pub fn launch(arguments: &[OsString]) -> Result<ExitCode, BackgroundError> {
    let mut child = Command::new("/proc/self/exe")
        .args(["mount", FLAG])
        // The program's name and the subcommand are replaced.
        .args(arguments.iter().skip(2))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(BackgroundError::Start)?;
    let messages = child.stderr.take().map(|mut errors| {
        thread::spawn(move || {
            let _ = io::copy(&mut errors, &mut io::stderr());
        })
    });
    let mut said = Vec::new();
    if let Some(mut ready) = child.stdout.take() {
        ready.read_to_end(&mut said).map_err(BackgroundError::Start)?;
    }
    // The daemon closes both pipes at the same time, whether it serves or ends.
    if let Some(messages) = messages {
        let _ = messages.join();
    }
    if said == READY {
        return Ok(ExitCode::SUCCESS);
    }
    let status = child.wait().map_err(BackgroundError::Start)?;
    Ok(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).filter(|code| *code != 0).unwrap_or(1)))
}

/// The daemon's way to reach whoever waits for it.
#[derive(Debug)]
pub struct Caller {
    ready: File,
    messages: File,
    redirected: bool,
}

impl Caller {
    /// Leaves session and inherited descriptors; dies with the parent until [`Caller::ready`].
    pub fn detach() -> Result<Caller, BackgroundError> {
        close_inherited();
        let os = |errno: nix::Error| BackgroundError::Detach(errno.into());
        set_pdeathsig(Signal::SIGTERM).map_err(os)?;
        setsid().map_err(os)?;
        let duplicate = |descriptor: io::Result<OwnedFd>| descriptor.map(File::from).map_err(BackgroundError::Detach);
        Ok(Caller {
            ready: duplicate(io::stdout().as_fd().try_clone_to_owned())?,
            messages: duplicate(io::stderr().as_fd().try_clone_to_owned())?,
            redirected: false,
        })
    }

    /// From here on messages go to the log, and no child process inherits the caller's pipes.
    pub fn redirect(&mut self, log: &Path) -> Result<(), BackgroundError> {
        let cannot = |source| BackgroundError::Log { path: log.to_owned(), source };
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(nix::libc::O_NOFOLLOW)
            .open(log)
            .map_err(cannot)?;
        let null = OpenOptions::new().write(true).open("/dev/null").map_err(BackgroundError::Detach)?;
        dup2_stdout(&null).map_err(|errno| BackgroundError::Detach(errno.into()))?;
        dup2_stderr(&file).map_err(|errno| cannot(errno.into()))?;
        // Relative paths were resolved before; a daemon keeps no directory busy.
        std::env::set_current_dir("/").map_err(BackgroundError::Detach)?;
        self.redirected = true;
        Ok(())
    }

    /// Tells the caller why there is no mount, unless it reads our standard error anyway.
    pub fn failed(mut self, message: &str) {
        if self.redirected {
            let _ = writeln!(self.messages, "{message}");
        }
    }

    /// Lets the caller go: the mount answers.
    pub fn ready(mut self) -> Result<(), BackgroundError> {
        set_pdeathsig(None).map_err(|errno| BackgroundError::Detach(errno.into()))?;
        self.ready.write_all(READY).map_err(BackgroundError::Abandoned)
    }
}

/// Closes what the caller of our parent had open without knowing.
fn close_inherited() {
    // SAFETY: called first thing in the process's only thread, before anything here owns a descriptor above 2.
    // A kernel without the call (before 5.9) leaves them open, which harms nobody but a caller who waits for them.
    unsafe {
        nix::libc::close_range(3, nix::libc::c_uint::MAX, 0);
    }
}
