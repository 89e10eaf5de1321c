//! Processes that are not our children, each known by its id and the moment of its start.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::model::volume::record::Exporter;

/// When a process started, in clock ticks after boot; `None` if there is none of this id, or it has ended.
pub(super) fn started_at(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may hold anything; state is the first field after it, the start the twentieth.
    let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
    match fields.next()? {
        "Z" | "X" => None,
        _ => fields.nth(18)?.parse().ok(),
    }
}

/// A descriptor that becomes readable when it ends; `None` if it has.
///
/// # Errors
///
/// What the kernel says.
pub fn watch(exporter: &Exporter) -> io::Result<Option<OwnedFd>> {
    // SAFETY: takes two integers.
    let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, exporter.pid, 0u32) };
    let descriptor = match Errno::result(descriptor) {
        Ok(descriptor) => descriptor,
        Err(Errno::ESRCH) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    // SAFETY: the kernel just made this descriptor for us, and nobody else knows it.
    let descriptor = unsafe { OwnedFd::from_raw_fd(descriptor as i32) };
    // Asked after the descriptor was made: the number cannot be another's from here on without its having ended.
    Ok((started_at(exporter.pid) == Some(exporter.started_at)).then_some(descriptor))
}

/// Asks it to end, and waits until it has. Errors are sentences.
pub(super) fn end(exporter: &Exporter, patience: Duration) -> Result<(), String> {
    let failed = |error: io::Error| format!("the process {} cannot be ended: {error}", exporter.pid);
    let Some(process) = watch(exporter).map_err(failed)? else { return Ok(()) };
    // SAFETY: takes integers and a null pointer, which stands for what kill(2) would send.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            libc::SIGTERM,
            std::ptr::null::<libc::siginfo_t>(),
            0u32,
        )
    };
    match Errno::result(sent) {
        Ok(_) | Err(Errno::ESRCH) => {}
        Err(error) => return Err(failed(error.into())),
    }
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) => {
                return Err(format!(
                    "the process {} does not end; it may still be writing what it has, so try again later",
                    exporter.pid
                ));
            }
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(failed(error.into())),
        }
    }
}
