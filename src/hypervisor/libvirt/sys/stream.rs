//! libvirt's streams as sockets: what waits in a stream is carried by a thread of its own.
//!
//! The stream never blocks: libvirt holds its lock during a blocking read, and nothing could be sent meanwhile.

use std::ffi::{c_char, c_int, c_void};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::ptr;
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt::stream::Stream;
use virt::sys;

use super::guard;

/// How much is on its way in one direction, in bytes.
const BUFFER: usize = 64 << 10;

/// libvirt's answer of a stream that would have to wait.
const WOULD_BLOCK: c_int = -2;

/// Opens the first serial console of a running domain, unless somebody else has it, and carries its bytes until either
/// end closes.
pub(in super::super) fn open_console(connection: Arc<Connect>, domain: &Domain) -> Result<UnixStream, Error> {
    let stream = Stream::new(&connection, sys::VIR_STREAM_NONBLOCK)?;
    domain.open_console(None, &stream, 0)?;
    let failed = |error: std::io::Error| {
        log::warn!("a console's bytes cannot be carried: {error}");
        Error::last_error()
    };
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    ours.set_nonblocking(true).map_err(failed)?;
    let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map_err(|errno| failed(std::io::Error::from(errno)))?;
    let carrier = Carrier { socket: ours, stream, wake: Arc::new(wake), _connection: connection };
    std::thread::Builder::new().name("console-stream".to_owned()).spawn(move || carrier.run()).map_err(failed)?;
    Ok(theirs)
}

/// Whether a stream took part in what was asked of it.
enum Moved {
    Bytes(usize),
    Later,
    Ended,
}

struct Carrier {
    socket: UnixStream,
    stream: Stream,
    wake: Arc<EventFd>,
    /// Declared last: the stream ends before its connection.
    _connection: Arc<Connect>,
}

impl Carrier {
    fn run(mut self) {
        if self.subscribe() {
            if let Err(error) = self.carry() {
                log::debug!("a console's stream: {error}");
            }
            // SAFETY: the stream is alive and has our callback.
            unsafe { sys::virStreamEventRemoveCallback(self.stream.as_ptr()) };
        }
        // SAFETY: the stream is alive. One that has ended by itself says so, which changes nothing.
        unsafe { sys::virStreamAbort(self.stream.as_ptr()) };
    }

    /// Has the eventfd count whenever the stream is ready; each time the callback is disarmed until [`Carrier::arm`].
    fn subscribe(&self) -> bool {
        let opaque: *mut c_void = Box::into_raw(Box::new(Arc::clone(&self.wake))).cast();
        // SAFETY: the stream is alive; `opaque` owns one reference, which `free_wake` frees exactly once: libvirt calls it
        // when the callback is removed, and only if it was added.
        let result = unsafe {
            sys::virStreamEventAddCallback(
                self.stream.as_ptr(),
                sys::VIR_STREAM_EVENT_READABLE as c_int,
                Some(on_ready),
                opaque,
                Some(free_wake),
            )
        };
        if result < 0 {
            log::warn!("a console's stream cannot be waited for: {}", Error::last_error().message());
            // SAFETY: the registration failed, so libvirt neither kept nor freed it.
            unsafe { free_wake(opaque) };
        }
        result >= 0
    }

    fn arm(&self, events: sys::virStreamEventType) {
        // SAFETY: the stream is alive. A failure means that it has ended, which the next transfer tells.
        unsafe { sys::virStreamEventUpdateCallback(self.stream.as_ptr(), events as c_int) };
    }

    fn carry(&mut self) -> std::io::Result<()> {
        let (mut printed, mut typed) = (Vec::new(), Vec::new());
        let mut buffer = vec![0; BUFFER];
        let mut ended = false;
        loop {
            while !ended && printed.len() < BUFFER {
                match self.receive(&mut buffer) {
                    Moved::Bytes(count) => printed.extend_from_slice(&buffer[..count]),
                    Moved::Later => break,
                    Moved::Ended => ended = true,
                }
            }
            while !printed.is_empty() {
                match self.socket.write(&printed) {
                    Ok(count) => drop(printed.drain(..count)),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            if ended && printed.is_empty() {
                return Ok(());
            }
            while typed.is_empty() {
                match self.socket.read(&mut buffer) {
                    Ok(0) => return Ok(()),
                    Ok(count) => typed.extend_from_slice(&buffer[..count]),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            while !typed.is_empty() && !ended {
                match self.send(&typed) {
                    Moved::Bytes(count) => drop(typed.drain(..count)),
                    Moved::Later => break,
                    Moved::Ended => ended = true,
                }
            }
            if !self.wait(!printed.is_empty(), !typed.is_empty(), ended)? {
                ended = true;
            }
        }
    }

    /// Waits until there is something to do. Returns false when nobody is left to wait for.
    fn wait(&self, printing: bool, typing: bool, ended: bool) -> std::io::Result<bool> {
        if !ended {
            let mut events = 0;
            if !printing {
                events |= sys::VIR_STREAM_EVENT_READABLE;
            }
            if typing {
                events |= sys::VIR_STREAM_EVENT_WRITABLE;
            }
            self.arm(events);
        }
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::POLLIN, !typing);
        flags.set(PollFlags::POLLOUT, printing);
        let mut sources = [PollFd::new(self.socket.as_fd(), flags), PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
        match poll(&mut sources, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        // A counter that is empty says that the socket was first.
        let _counted = self.wake.read();
        let hung_up = sources[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR));
        Ok(!hung_up)
    }

    fn receive(&self, buffer: &mut [u8]) -> Moved {
        // SAFETY: the stream is alive, and the buffer has as many bytes as we say.
        let result =
            unsafe { sys::virStreamRecv(self.stream.as_ptr(), buffer.as_mut_ptr().cast::<c_char>(), buffer.len()) };
        moved(result)
    }

    fn send(&self, bytes: &[u8]) -> Moved {
        // SAFETY: the stream is alive, and there are as many bytes as we say, which libvirt only reads.
        let result = unsafe { sys::virStreamSend(self.stream.as_ptr(), bytes.as_ptr().cast::<c_char>(), bytes.len()) };
        moved(result)
    }
}

fn moved(result: c_int) -> Moved {
    match usize::try_from(result) {
        Ok(0) => Moved::Ended,
        Ok(count) => Moved::Bytes(count),
        Err(_) if result == WOULD_BLOCK => Moved::Later,
        Err(_) => Moved::Ended,
    }
}

unsafe extern "C" fn on_ready(stream: sys::virStreamPtr, _events: c_int, opaque: *mut c_void) {
    // SAFETY: libvirt passes the opaque of the registration, not freed yet.
    let wake = unsafe { &*opaque.cast::<Arc<EventFd>>() };
    // SAFETY: libvirt passes a valid stream, and allows this call in its callback. Until it is armed again, what is not
    // fetched yet would call us without end.
    unsafe { sys::virStreamEventUpdateCallback(stream, 0) };
    guard(|| {
        // A counter that is full wakes as well.
        let _counted = wake.write(1);
    });
}

unsafe extern "C" fn free_wake(opaque: *mut c_void) {
    debug_assert!(!ptr::eq(opaque, ptr::null()));
    // SAFETY: `opaque` comes from `Carrier::subscribe` and is freed once (see there).
    let wake = unsafe { Box::from_raw(opaque.cast::<Arc<EventFd>>()) };
    guard(|| drop(wake));
}
