//! Whether a mount answers, asked by a process that may hang.
//!
//! A cached stat succeeds on a dead mount, and statfs on a stuck one never returns; so a child process asks, and is
//! left behind if it does not come back.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::statfs::statfs;

/// How long a mount has for its answer.
pub const LIMIT: Duration = Duration::from_secs(1);
/// How long a killed child has to be collected.
const GRACE: Duration = Duration::from_millis(50);

/// What a mount says to statfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It answers.
    Alive,
    /// Its daemon is gone: `ENOTCONN` or `ECONNABORTED`.
    Dead,
    /// No answer within the limit.
    Silent,
    /// Another error: somebody answers.
    Failed(Errno),
}

/// Asks `path`. Returns after `limit` at the latest.
pub fn ask(path: &Path, limit: Duration) -> std::io::Result<Answer> {
    let mut child = Command::new("/proc/self/exe")
        .arg("probe")
        .arg(path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let Some(status) = wait_until(&mut child, Instant::now() + limit)? else {
        child.kill()?;
        // In D state it does not die before the mount does, so it is not waited for much longer.
        wait_until(&mut child, Instant::now() + GRACE)?;
        return Ok(Answer::Silent);
    };
    Ok(match status.code().map(Errno::from_raw) {
        Some(Errno::UnknownErrno) if status.success() => Answer::Alive,
        Some(Errno::ENOTCONN | Errno::ECONNABORTED) => Answer::Dead,
        Some(errno) => Answer::Failed(errno),
        None => {
            log::warn!("the probe of {} ended by signal {:?}", path.display(), status.signal());
            Answer::Silent
        }
    })
}

/// Collects a child's end, `None` if there is none by the deadline.
pub fn wait_until(child: &mut Child, deadline: Instant) -> std::io::Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// The child's side: its exit code is the errno, 0 for success.
pub fn answer(path: &Path) -> ExitCode {
    match statfs(path) {
        Ok(_) => ExitCode::SUCCESS,
        Err(errno) => ExitCode::from(u8::try_from(errno as i32).unwrap_or(u8::MAX)),
    }
}
