//! Mounting without being root: by `fusermount3`, a program that is setuid root and belongs to libfuse.
//!
//! It mounts in its caller's name, where its caller may write, and hands the connection to the kernel back over a socket
//! whose number it finds in its environment.

use std::io::{self, IoSliceMut, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};

const PROGRAM: &str = "fusermount3";
/// Where it looks for the socket's number.
const SOCKET: &str = "_FUSE_COMMFD";
/// Its standard input is the socket: the only descriptor that is passed on without further ado.
const STANDARD_INPUT: &str = "0";
/// Enough of what it says.
const MOST_WORDS: u64 = 4096;

/// Mounts at a directory that the user may write, and returns the connection to the kernel.
pub fn mount(path: &Path, options: &str) -> io::Result<OwnedFd> {
    let (ours, its) = UnixStream::pair()?;
    let mut command = Command::new(PROGRAM);
    command.args(["-o", options, "--"]).arg(path).env(SOCKET, STANDARD_INPUT).stdin(OwnedFd::from(its));
    run(command)?;
    receive(&ours)
}

/// Takes the mount that is on top at this path out of everybody's sight, also while files in it are open. The connection
/// lives on until the last of these is closed, or its server ends.
pub fn unmount(path: &Path) -> io::Result<()> {
    let mut command = Command::new(PROGRAM);
    command.args(["-u", "-z", "--"]).arg(path).stdin(Stdio::null());
    run(command)
}

fn run(mut command: Command) -> io::Result<()> {
    command.current_dir("/").stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| {
        let words = match error.kind() {
            io::ErrorKind::NotFound => format!(
                "{PROGRAM} is missing, which mounts for ordinary users; have root install it (Debian: apt install fuse3)"
            ),
            _ => format!("{PROGRAM} cannot be run: {error}"),
        };
        io::Error::new(error.kind(), words)
    })?;
    // The command holds our copy of its end of the socket.
    drop(command);
    let mut words = Vec::new();
    if let Some(errors) = child.stderr.take() {
        errors.take(MOST_WORDS).read_to_end(&mut words)?;
    }
    let status = child.wait()?;
    if status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&words);
    let words = words.trim().replace('\n', "; ");
    Err(io::Error::other(match words.as_str() {
        "" => format!("{PROGRAM} ended with {status}"),
        words if words.ends_with("Operation not permitted") => {
            format!("{words}; it has to be setuid root, on a file system that allows that (as root: chmod u+s)")
        }
        words => words.to_owned(),
    }))
}

/// The descriptor that came with the one byte of the message.
fn receive(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut byte = [0];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; 1]);
    let message = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control
            && let Some(descriptor) = descriptors.first()
        {
            // SAFETY: the kernel has just made this descriptor for us; there is room for one, and nobody else owns it.
            return Ok(unsafe { OwnedFd::from_raw_fd(*descriptor) });
        }
    }
    Err(io::Error::other(format!("{PROGRAM} has mounted, but handed over no connection")))
}
