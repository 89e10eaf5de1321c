//! Runs one program under limits and returns what it said.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;

use super::rights::{self, Rights};

/// How often it is looked whether a program is still wanted.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What a caged program may use at most.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Address space, in bytes.
    pub(crate) memory_bytes: u64,
    /// Processor time, in seconds.
    pub(crate) processor_seconds: u64,
    /// Open descriptors.
    pub(crate) descriptors: u64,
    /// Length of any file that it writes, in bytes.
    pub(crate) file_bytes: u64,
    /// Time on the wall until it is killed.
    pub(crate) wall_clock: Duration,
    /// Bytes on each of standard output and standard error until it is killed.
    pub(crate) output_bytes: usize,
}

impl Limits {
    /// For a program that only reads.
    pub(crate) fn reading() -> Limits {
        Limits {
            memory_bytes: 1 << 30,
            processor_seconds: 30,
            descriptors: 64,
            file_bytes: 0,
            wall_clock: Duration::from_secs(60),
            output_bytes: 256 << 10,
        }
    }

    /// For a program that makes an empty qcow2 file: header and tables, never data.
    pub(crate) fn creating() -> Limits {
        Limits { file_bytes: 256 << 20, ..Limits::reading() }
    }

    /// For a program that adds tables to a qcow2 file of any length.
    pub(crate) fn growing() -> Limits {
        Limits { file_bytes: u64::MAX, ..Limits::reading() }
    }

    /// For a program that copies a disk of any length.
    pub(crate) fn copying() -> Limits {
        const WEEK: u64 = 7 * 24 * 3600;
        Limits {
            memory_bytes: 4 << 30,
            processor_seconds: WEEK,
            file_bytes: u64::MAX,
            wall_clock: Duration::from_secs(WEEK),
            ..Limits::reading()
        }
    }

    /// For a program that reads the tables of a qcow2 file of any length.
    pub(crate) fn checking() -> Limits {
        Limits {
            memory_bytes: 4 << 30,
            processor_seconds: 3600,
            wall_clock: Duration::from_secs(3600),
            ..Limits::reading()
        }
    }

    /// For a program that puts documents of 1 MiB at most into an image on its standard output.
    pub(crate) fn imaging() -> Limits {
        Limits { output_bytes: 8 << 20, ..Limits::reading() }
    }
}

/// Runs `command`, whose program and standard input are set, with these rights.
/// Returns its standard output if it succeeded, else a sentence with the words from its standard error.
pub(crate) fn run(command: Command, limits: Limits, rights: Rights<'_>) -> Result<Vec<u8>, String> {
    let ended = run_to_end(command, limits, rights, &|_output| false)?;
    if ended.status.success() { Ok(ended.output) } else { Err(ended.words()) }
}

/// How a program ended.
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    /// Its standard output.
    pub(crate) output: Vec<u8>,
    program: String,
    errors: Vec<u8>,
}

impl Ended {
    /// The words from its standard error as one sentence.
    pub(crate) fn words(&self) -> String {
        let words = String::from_utf8_lossy(&self.errors);
        let words = words.trim().replace('\n', "; ");
        if words.is_empty() { format!("{} failed: {}", self.program, self.status) } else { words }
    }
}

/// Like [`run`] for a program whose exit status says more than success; killed once `cancelled`, which is asked now and then
/// with the standard output so far.
pub(crate) fn run_to_end(
    mut command: Command,
    limits: Limits,
    rights: Rights<'_>,
    cancelled: &dyn Fn(&[u8]) -> bool,
) -> Result<Ended, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    command
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .env("LANG", "C")
        .current_dir("/")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    match rights {
        // Run by root, this drops the supplementary groups too.
        Rights::Of(number) => drop(command.uid(number).gid(number)),
        Rights::Ours | Rights::SystemOnly | Rights::Files { .. } => {}
    }
    let ruleset = rights.ruleset().map_err(|error| format!("cannot take rights from {program}: {error}"))?;
    // SAFETY: `confine` makes system calls only; it neither allocates nor takes a lock, as required after fork.
    unsafe { command.pre_exec(move || confine(limits, ruleset.as_ref())) };
    let mut child = command.spawn().map_err(|error| format!("cannot run {program}: {error}"))?;
    let outcome = watch(&mut child, limits, cancelled);
    if outcome.is_err() {
        // Not reaped yet unless it ended by itself, so its number cannot be anybody else's; killing the dead is harmless.
        let _already_gone = child.kill();
        let _status_of_the_killed = child.wait();
    }
    let (status, output, errors) = outcome.map_err(|reason| format!("{program} {reason}"))?;
    Ok(Ended { status, output, program, errors })
}

/// Between fork and exec, already with the new identity.
fn confine(limits: Limits, ruleset: Option<&OwnedFd>) -> io::Result<()> {
    for (resource, most) in [
        (Resource::RLIMIT_AS, limits.memory_bytes),
        (Resource::RLIMIT_CPU, limits.processor_seconds),
        (Resource::RLIMIT_NOFILE, limits.descriptors),
        (Resource::RLIMIT_FSIZE, limits.file_bytes),
        (Resource::RLIMIT_CORE, 0),
    ] {
        setrlimit(resource, most, most)?;
    }
    // A library that forgot O_CLOEXEC must not hand its descriptors to the cage.
    // SAFETY: takes three integers. Old kernels lack it (ENOSYS), then O_CLOEXEC is what there is.
    unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    nix::sys::prctl::set_no_new_privs()?;
    ruleset.map_or(Ok(()), rights::restrict)?;
    // Changing identity clears it, so it comes after that. A recovery after our death must find no writer left over.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    Ok(())
}

/// Reads both outputs until the child has ended; an error is the second half of a sentence, and leaves it running.
fn watch(
    child: &mut Child,
    limits: Limits,
    cancelled: &dyn Fn(&[u8]) -> bool,
) -> Result<(ExitStatus, Vec<u8>, Vec<u8>), String> {
    let failed = |error: io::Error| format!("could not be watched: {error}");
    let deadline = Instant::now() + limits.wall_clock;
    let process = pidfd(child).map_err(failed)?;
    let mut output = Stream::new(child.stdout.take().map(OwnedFd::from), limits.output_bytes).map_err(failed)?;
    let mut errors = Stream::new(child.stderr.take().map(OwnedFd::from), limits.output_bytes).map_err(failed)?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(format!("did not finish within {} s and was killed", limits.wall_clock.as_secs()));
        }
        if cancelled(&output.bytes) {
            return Err("was given up".to_owned());
        }
        let mut watched = vec![PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        for stream in [&output, &errors] {
            watched.extend(stream.pipe.as_ref().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)));
        }
        let timeout = PollTimeout::try_from(left.min(LOOK_EVERY)).unwrap_or(PollTimeout::MAX);
        match poll(&mut watched, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(failed(error.into())),
        }
        let ended = watched.first().and_then(PollFd::any).unwrap_or(false);
        output.drain()?;
        errors.drain()?;
        if ended {
            let status = child.wait().map_err(failed)?;
            return Ok((status, output.bytes, errors.bytes));
        }
    }
}

/// One output of the child.
struct Stream {
    /// Absent after its end.
    pipe: Option<File>,
    bytes: Vec<u8>,
    most_bytes: usize,
}

impl Stream {
    fn new(pipe: Option<OwnedFd>, most_bytes: usize) -> io::Result<Stream> {
        let pipe = pipe.map(File::from);
        if let Some(pipe) = &pipe {
            fcntl(pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        }
        Ok(Stream { pipe, bytes: Vec::new(), most_bytes })
    }

    /// Takes what is there now.
    fn drain(&mut self) -> Result<(), String> {
        let mut buffer = [0u8; 4096];
        while let Some(pipe) = &mut self.pipe {
            match pipe.read(&mut buffer) {
                Ok(0) => self.pipe = None,
                Ok(count) => self.bytes.extend(buffer.iter().take(count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(format!("could not be heard: {error}")),
            }
            if self.bytes.len() > self.most_bytes {
                return Err(format!("said more than {} bytes and was killed", self.most_bytes));
            }
        }
        Ok(())
    }
}

/// A descriptor that becomes readable when the child ends.
fn pidfd(child: &Child) -> io::Result<OwnedFd> {
    let number = child.id() as libc::pid_t;
    // SAFETY: takes two integers; the child is not reaped, so its number is its own.
    let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, number, 0u32) };
    let descriptor = Errno::result(descriptor)?;
    // SAFETY: the kernel just made this descriptor for us, and nobody else knows it. It is close-on-exec by itself.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as i32) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(Stdio::null());
        command
    }

    #[test]
    fn a_program_that_does_not_end_is_killed_at_its_deadline() {
        let limits = Limits { wall_clock: Duration::from_millis(300), ..Limits::reading() };
        let begun = Instant::now();
        let error = run(shell("exec sleep 50"), limits, Rights::Ours).unwrap_err();
        assert!(error.contains("did not finish"), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_program_that_closes_its_outputs_and_stays_is_killed_too() {
        let limits = Limits { wall_clock: Duration::from_millis(300), ..Limits::reading() };
        let error = run(shell("exec sleep 50 >&- 2>&-"), limits, Rights::Ours).unwrap_err();
        assert!(error.contains("did not finish"), "{error}");
    }

    #[test]
    fn a_program_that_talks_without_end_is_killed() {
        let error = run(shell("exec yes"), Limits::reading(), Rights::Ours).unwrap_err();
        assert!(error.contains("said more than"), "{error}");
    }

    #[test]
    fn limits_environment_and_identity_are_those_of_the_cage() {
        let script = "ulimit -v; ulimit -t; ulimit -n; ulimit -f; env | grep -v -e ^PWD= -e ^_= -e ^SHLVL= -e ^OLDPWD= | sort; id -u; id -G; pwd; \
                      grep NoNewPrivs /proc/self/status; ls /proc/self/fd | wc -l";
        let output = run(shell(script), Limits::reading(), Rights::Of(65534)).unwrap();
        let expected =
            "1048576\n30\n64\n0\nLANG=C\nPATH=/usr/local/bin:/usr/bin:/bin\n65534\n65534\n/\nNoNewPrivs:\t1\n4\n";
        assert_eq!(String::from_utf8(output).unwrap(), expected);
    }

    #[test]
    fn the_words_of_a_failure_are_passed_on() {
        let error = run(shell("echo no such luck >&2; exit 3"), Limits::reading(), Rights::Ours).unwrap_err();
        assert_eq!(error, "no such luck");
    }
}
