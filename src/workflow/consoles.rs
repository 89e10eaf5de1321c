//! Consoles: who reads `console/serial` or `console/vnc` gets the path of a socket that nobody else can guess or open,
//! that takes one connection, and that is gone after use, after its time, and when the guest stops or changes hands. What
//! is connected ends with the guest's run, and when the instance changes hands.
//!
//! A token is offered by a reader's thread, which only makes the socket. One thread waits for connections; each
//! connection then has a thread of its own, since the hypervisor may hang.

mod session;

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{getsockopt, sockopt};
use openssl::sha::sha256;
use parking_lot::Mutex;
use uuid::Uuid;

use crate::hypervisor::{ConsoleDevice, Hypervisor, PowerState};
use crate::inventory::{Instance, Inventory};
use crate::model::reason::Reason;

use session::Sessions;

/// How long a token waits for its connection.
pub const TOKEN_LIFETIME: Duration = Duration::from_secs(600);

/// Unused tokens of one instance and device; one more takes the place of the oldest.
const TOKENS_PER_DEVICE: usize = 8;

/// Unused tokens of all instances.
const TOKENS_MAX: usize = 512;

/// While there are tokens or sessions, it is looked so often whether they still hold.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// Random bytes of a token's name.
const TOKEN_BYTES: usize = 16;

struct Token {
    instance: Uuid,
    /// Of the ownership under which it was offered.
    generation: u32,
    device: ConsoleDevice,
    uid: u32,
    path: PathBuf,
    listener: Arc<UnixListener>,
    until: Instant,
}

impl Drop for Token {
    fn drop(&mut self) {
        // We made it, under a name that nobody else has.
        if let Err(error) = fs::remove_file(&self.path) {
            log::warn!("the used console socket {} cannot be removed: {error}", self.path.display());
        }
    }
}

#[derive(Default)]
struct State {
    /// The oldest first.
    tokens: Vec<Token>,
    stopping: bool,
}

struct Shared {
    inventory: Arc<Inventory>,
    directory: PathBuf,
    lifetime: Duration,
    state: Mutex<State>,
    wake: EventFd,
    sessions: Arc<Sessions>,
}

/// See the module. Dropping it ends every token and session.
pub struct Consoles {
    shared: Arc<Shared>,
}

impl Consoles {
    /// Starts the thread that waits for connections. `directory` is ours alone; what an earlier life of the program
    /// left there is removed.
    ///
    /// # Errors
    ///
    /// What the file system reports of the directory, or that there is no thread.
    pub fn start(
        hypervisor: Arc<dyn Hypervisor>,
        inventory: Arc<Inventory>,
        directory: PathBuf,
        lifetime: Duration,
    ) -> io::Result<Consoles> {
        fs::DirBuilder::new().recursive(true).mode(0o711).create(&directory)?;
        sweep(&directory)?;
        let shared = Arc::new(Shared {
            inventory,
            directory,
            lifetime,
            state: Mutex::default(),
            wake: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            sessions: Arc::new(Sessions::new(hypervisor)),
        });
        let waiting = Arc::clone(&shared);
        std::thread::Builder::new().name("consoles".to_owned()).spawn(move || waiting.run())?;
        Ok(Consoles { shared })
    }

    /// The length of a token's path in bytes.
    pub fn path_length(&self) -> usize {
        self.shared.directory.as_os_str().len() + 1 + 2 * TOKEN_BYTES
    }

    /// A new token for this user: the path of its socket.
    ///
    /// # Errors
    ///
    /// Why there is none.
    pub fn offer(&self, instance: &Instance, device: ConsoleDevice, uid: u32) -> Result<PathBuf, Reason> {
        available(instance, device)?;
        let path = self.shared.directory.join(random_name());
        let listener = bind(&path, uid).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidInput => Reason::Unsupported(format!(
                "{} is too long for a socket; use a state directory with a shorter path",
                path.display()
            )),
            _ => Reason::Failed(format!("the console socket {} cannot be made: {error}", path.display())),
        })?;
        let token = Token {
            instance: instance.id,
            generation: instance.record.ownership.generation,
            device,
            uid,
            path: path.clone(),
            listener: Arc::new(listener),
            until: Instant::now() + self.shared.lifetime,
        };
        let mut state = self.shared.state.lock();
        if state.stopping {
            return Err(Reason::Failed("instancefs is ending; try again when it is back".to_owned()));
        }
        let same = |other: &Token| other.instance == token.instance && other.device == token.device;
        let oldest = if state.tokens.iter().filter(|other| same(other)).count() >= TOKENS_PER_DEVICE {
            state.tokens.iter().position(same)
        } else {
            (state.tokens.len() >= TOKENS_MAX).then_some(0)
        };
        let ended = oldest.map(|oldest| state.tokens.remove(oldest));
        state.tokens.push(token);
        drop(state);
        drop(ended);
        self.shared.wake();
        Ok(path)
    }

    /// Ends every token and session.
    pub fn stop(&self) {
        let mut state = self.shared.state.lock();
        state.stopping = true;
        let ended = std::mem::take(&mut state.tokens);
        drop(state);
        drop(ended);
        self.shared.sessions.stop();
        self.shared.wake();
    }
}

impl Drop for Consoles {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Whether a guest has this console now.
///
/// # Errors
///
/// Why it has none, and what to do.
pub fn available(instance: &Instance, device: ConsoleDevice) -> Result<(), Reason> {
    let power = instance.domain.as_ref().map(|domain| domain.power);
    match power {
        Some(PowerState::Running | PowerState::Paused | PowerState::PmSuspended) => {}
        Some(PowerState::ShutOff | PowerState::Crashed) | None => {
            return Err(Reason::Malformed("it does not run; write active to state first".to_owned()));
        }
    }
    let Some(definition) = &instance.record.definition else { return Ok(()) };
    match device {
        ConsoleDevice::Serial if !definition.has_serial => {
            Err(Reason::Unsupported("the definition has no serial console; add <serial type='pty'/> to it".to_owned()))
        }
        ConsoleDevice::Vnc if !definition.has_vnc => {
            Err(Reason::Unsupported("the definition has no VNC graphics; add <graphics type='vnc'/> to it".to_owned()))
        }
        ConsoleDevice::Serial | ConsoleDevice::Vnc => Ok(()),
    }
}

impl Shared {
    fn wake(&self) {
        // A counter that is full wakes as well.
        let _counted = self.wake.write(1);
    }

    fn run(self: Arc<Self>) {
        loop {
            let listeners: Vec<Arc<UnixListener>> = {
                let mut state = self.state.lock();
                if state.stopping {
                    return;
                }
                let (kept, ended) = std::mem::take(&mut state.tokens).into_iter().partition(|token| self.holds(token));
                state.tokens = kept;
                let listeners = state.tokens.iter().map(|token| Arc::clone(&token.listener)).collect();
                drop(state);
                drop::<Vec<Token>>(ended);
                listeners
            };
            let sessions = self.sessions.look(|instance, generation| self.is_owned(instance, generation));
            let patience = (sessions || !listeners.is_empty()).then_some(LOOK_INTERVAL);
            let ready = match self.wait(&listeners, patience) {
                Ok(ready) => ready,
                Err(error) => {
                    log::error!("console sockets are not served any more: {error}");
                    return;
                }
            };
            for index in ready {
                self.accept(&listeners[index]);
            }
        }
    }

    fn holds(&self, token: &Token) -> bool {
        let instance = self.inventory.instance(token.instance);
        Instant::now() < token.until
            && self.is_owned(token.instance, token.generation)
            && instance.is_some_and(|instance| available(&instance, token.device).is_ok())
    }

    /// Whether the instance has not changed hands since this generation.
    fn is_owned(&self, instance: Uuid, generation: u32) -> bool {
        self.inventory.instance(instance).is_some_and(|instance| instance.record.ownership.generation == generation)
    }

    /// The listeners that somebody connects to.
    fn wait(&self, listeners: &[Arc<UnixListener>], patience: Option<Duration>) -> nix::Result<Vec<usize>> {
        let descriptors = listeners.iter().map(|listener| listener.as_fd());
        let sources = std::iter::once(self.wake.as_fd()).chain(descriptors);
        let mut sources: Vec<PollFd<'_>> =
            sources.map(|fd: BorrowedFd<'_>| PollFd::new(fd, PollFlags::POLLIN)).collect();
        let timeout = patience.and_then(|patience| PollTimeout::try_from(patience).ok()).unwrap_or(PollTimeout::NONE);
        match poll(&mut sources, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
        // A counter that is empty says that a client or the time was first.
        let _counted = self.wake.read();
        let ready = sources[1..].iter().enumerate().filter(|(_, source)| source.any() == Some(true));
        Ok(ready.map(|(index, _)| index).collect())
    }

    fn accept(&self, listener: &Arc<UnixListener>) {
        let client = match listener.accept() {
            Ok((client, _)) => client,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                log::warn!("a console socket cannot accept: {error}");
                return;
            }
        };
        let mut state = self.state.lock();
        // Its time may be over meanwhile.
        let Some(index) = state.tokens.iter().position(|token| Arc::ptr_eq(&token.listener, listener)) else { return };
        if let Err(refusal) = may_connect(&client, state.tokens[index].uid) {
            log::warn!("{} was refused: {refusal}", state.tokens[index].path.display());
            return;
        }
        let token = state.tokens.remove(index);
        drop(state);
        if self.holds(&token) {
            self.sessions.begin(&token, client);
        }
    }
}

/// The mode of the socket lets nobody else in; this also holds where somebody changed it.
fn may_connect(client: &UnixStream, uid: u32) -> Result<(), String> {
    let peer = getsockopt(client, sockopt::PeerCredentials).map_err(|errno| format!("unknown client: {errno}"))?;
    if peer.uid() == uid || peer.uid() == 0 { Ok(()) } else { Err(format!("uid {} is not {uid}", peer.uid())) }
}

/// A socket that only this user can connect to.
fn bind(path: &Path, uid: u32) -> io::Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    let prepared = listener
        .set_nonblocking(true)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o600)))
        .and_then(|()| std::os::unix::fs::chown(path, Some(uid), None));
    match prepared {
        Ok(()) => Ok(listener),
        Err(error) => {
            // We made it a moment ago.
            let _removed = fs::remove_file(path);
            Err(error)
        }
    }
}

/// 128 random bits as hexadecimal digits. A random UUID has 122.
fn random_name() -> String {
    let digest = sha256(&[Uuid::new_v4().into_bytes(), Uuid::new_v4().into_bytes()].concat());
    digest.iter().take(TOKEN_BYTES).map(|byte| format!("{byte:02x}")).collect()
}

/// Removes the sockets that an earlier life of the program left in its own directory.
fn sweep(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let ours = name.len() == 2 * TOKEN_BYTES && name.as_encoded_bytes().iter().all(u8::is_ascii_hexdigit);
        if ours && entry.file_type()?.is_socket() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
