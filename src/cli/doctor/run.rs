//! Children that may hang, and programs that may be absent.

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::cli::probe;

/// How long a program has to say its version.
pub const LIMIT: Duration = Duration::from_secs(5);
/// How long a killed child has to be collected.
const GRACE: Duration = Duration::from_millis(50);
/// More than anybody has to say.
const MAX_OUTPUT: u64 = 64 * 1024;

/// What a child did.
pub enum Ended {
    /// It succeeded and printed this.
    Well(String),
    /// It failed and complained so.
    Badly(String),
    /// It did not come back in time, and was given up.
    Never,
}

/// Runs a program until its end or the limit. Its output fits into a pipe, or it hangs.
pub fn output(command: &mut Command, limit: Duration) -> io::Result<Ended> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // A group of its own, so that its own children, such as an ssh, end with it.
    let mut child = command.process_group(0).spawn()?;
    let Some(status) = probe::wait_until(&mut child, Instant::now() + limit)? else {
        if let Ok(group) = i32::try_from(child.id()) {
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
        probe::wait_until(&mut child, Instant::now() + GRACE)?;
        return Ok(Ended::Never);
    };
    fn read(pipe: Option<impl Read>) -> String {
        let mut bytes = Vec::new();
        let _ = pipe.map(|pipe| pipe.take(MAX_OUTPUT).read_to_end(&mut bytes));
        String::from_utf8_lossy(&bytes).trim_end().to_owned()
    }
    let (stdout, stderr) = (read(child.stdout.take()), read(child.stderr.take()));
    Ok(if status.success() { Ended::Well(stdout) } else { Ended::Badly(stderr) })
}

/// Where a program lies in PATH, as the daemon would look for it.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|file| nix::unistd::access(file, nix::unistd::AccessFlags::X_OK).is_ok() && file.is_file())
}
