//! `instancefs wait PATH...`: until objects have no task, or reached a state.
//!
//! Needs only the mounted tree, as any program would: it reads `task` and `state`, and sleeps in poll(2) until one of
//! them reads differently.

mod object;
mod progress;
mod verdict;

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::config::parse_duration;
use object::{Object, WaitError};
use progress::Progress;
use verdict::{Goal, Verdict, Wait};

/// As timeout(1).
const TIMED_OUT: u8 = 124;
/// A change that nobody announced is seen after this time at the latest.
const SAFETY: Duration = Duration::from_secs(1);
/// The same where poll cannot tell anything.
const SAFETY_WITHOUT_POLL: Duration = Duration::from_millis(20);

/// Between two looks at least.
const BREATH: Duration = Duration::from_millis(1);

/// The command line of `wait`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// An object's directory, a file in it, or a symlink to it (by-name, by-state)
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// Wait until `state` reads WORD; `deleted` is reached when the object is gone
    #[arg(long = "for", value_name = "WORD")]
    word: Option<String>,
    /// Give up after this time, with exit code 124
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    timeout: Option<Duration>,
}

struct Pending<'a> {
    path: &'a PathBuf,
    wait: Wait,
}

/// Waits for all of them; the exit code is the worst one.
pub fn run(arguments: &Arguments) -> Result<ExitCode, WaitError> {
    let begun = Instant::now();
    let deadline = arguments.timeout.and_then(|timeout| begun.checked_add(timeout));
    let goal = match arguments.word.as_deref() {
        None => Goal::Idle,
        Some("deleted") => Goal::Gone,
        Some(word) => Goal::State(word.to_owned()),
    };
    let mut worst = 0;
    let mut pending = Vec::new();
    for path in &arguments.paths {
        match Object::find(path, &goal) {
            Ok(Some(object)) => pending.push(Pending { path, wait: Wait::new(object, goal.clone()) }),
            Ok(None) => {}
            Err(error) => worst = worst.max(complain(path, &super::chain(&error))),
        }
    }
    let progress = Progress::new();
    let mut fresh = true;
    loop {
        pending.retain_mut(|Pending { path, wait }| match wait.look(fresh) {
            Ok(Verdict::Pending(percent)) => {
                progress.show(path, wait.task(), percent);
                true
            }
            Ok(Verdict::Reached) => {
                progress.hide(path);
                false
            }
            Ok(Verdict::Failed(reason)) => {
                progress.hide(path);
                worst = worst.max(complain(path, &reason));
                false
            }
            Err(error) => {
                progress.hide(path);
                worst = worst.max(complain(path, &super::chain(&error)));
                false
            }
        });
        if pending.is_empty() {
            return Ok(ExitCode::from(worst));
        }
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            break;
        }
        fresh = !sleep(&pending, left)?;
    }
    progress.clear();
    for Pending { path, wait } in &pending {
        complain(path, &format!("{} after {} s", wait.describe(), begun.elapsed().as_secs_f64().round()));
    }
    Ok(ExitCode::from(TIMED_OUT.max(worst)))
}

fn complain(path: &std::path::Path, reason: &str) -> u8 {
    eprintln!("instancefs: {}: {reason}", path.display());
    1
}

/// Sleeps until a file reads differently. False if nobody said so: then everything is opened anew, since files that
/// were moved or replaced say nothing.
fn sleep(pending: &[Pending<'_>], left: Option<Duration>) -> Result<bool, WaitError> {
    let mut descriptors = Vec::new();
    let mut limit = SAFETY;
    for Pending { wait, .. } in pending {
        let object = wait.object();
        if !object.has_poll() {
            limit = SAFETY_WITHOUT_POLL;
        }
        descriptors.extend(object.files().map(|file| PollFd::new(file.as_fd(), PollFlags::POLLPRI)));
    }
    let limit = left.map_or(limit, |left| left.min(limit));
    // Rounded up, so that a rest below a millisecond does not spin.
    let limit = PollTimeout::try_from(limit + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
    match poll(&mut descriptors, limit) {
        Ok(0) => Ok(false),
        Ok(_) => {
            // A file that is gone may report that for ever.
            std::thread::sleep(BREATH);
            Ok(true)
        }
        Err(Errno::EINTR) => Ok(false),
        Err(errno) => Err(WaitError::Poll(errno)),
    }
}
