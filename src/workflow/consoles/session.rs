//! Sessions: one client of one console, from its connection to its end.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use uuid::Uuid;

use super::Token;
use crate::hypervisor::{ConsoleDevice, Hypervisor, HypervisorError};

/// Sessions of one instance at a time; those that hang in the hypervisor count.
const SESSIONS_PER_INSTANCE: usize = 8;

/// How long, and how often in between, it is tried to open a console that somebody else has.
const LEAVING_PATIENCE: Duration = Duration::from_secs(1);
const LEAVING_PAUSE: Duration = Duration::from_millis(100);

/// How long a refused client has for taking the sentence.
const REFUSAL_PATIENCE: Duration = Duration::from_secs(1);

/// RFC 6143, 7.1.1.
const RFB_VERSION: &[u8; 12] = b"RFB 003.008\n";

struct Session {
    instance: Uuid,
    generation: u32,
    client: UnixStream,
}

/// All sessions.
pub(super) struct Sessions {
    hypervisor: Arc<dyn Hypervisor>,
    current: Mutex<HashMap<u64, Session>>,
    stopping: AtomicBool,
}

impl Sessions {
    pub(super) fn new(hypervisor: Arc<dyn Hypervisor>) -> Sessions {
        Sessions { hypervisor, current: Mutex::default(), stopping: AtomicBool::new(false) }
    }

    /// Serves a client in a thread of its own. It ends with the guest's run, the client, or us.
    pub(super) fn begin(self: &Arc<Self>, token: &Token, client: UnixStream) {
        let began = Instant::now();
        let (instance, device, uid) = (token.instance, token.device, token.uid);
        let id = match self.register(token, &client) {
            Ok(id) => id,
            Err(error) => return log::warn!("a console session of instance {instance} cannot begin: {error}"),
        };
        let Some(id) = id else {
            return refuse(&client, device, "this instance has too many console sessions already; close one");
        };
        let sessions = Arc::clone(self);
        let served = thread::Builder::new().name("console-session".to_owned()).spawn(move || {
            let outcome = match sessions.open(instance, device) {
                Ok(console) => carry(&client, &console),
                Err(error) => {
                    refuse(&client, device, &error.to_string());
                    Err(error.to_string())
                }
            };
            sessions.current.lock().remove(&id);
            log::info!(
                "{} console of instance {instance} by uid {uid} ended after {:.3} s: {}",
                device.word(),
                began.elapsed().as_secs_f64(),
                match outcome {
                    Ok((printed, typed)) => format!("{printed} bytes out, {typed} in"),
                    Err(reason) => reason,
                }
            );
        });
        if let Err(error) = served {
            self.current.lock().remove(&id);
            log::warn!("a console session of instance {instance} has no thread: {error}");
        }
    }

    /// Whoever had the console before may have left a moment ago, and libvirt not have noticed.
    fn open(&self, instance: Uuid, device: ConsoleDevice) -> Result<UnixStream, HypervisorError> {
        let until = Instant::now() + LEAVING_PATIENCE;
        loop {
            match self.hypervisor.open_console(instance, device) {
                Err(HypervisorError::Failed(_)) if Instant::now() < until => thread::sleep(LEAVING_PAUSE),
                outcome => return outcome,
            }
        }
    }

    /// `None` if the instance has enough of them.
    fn register(&self, token: &Token, client: &UnixStream) -> io::Result<Option<u64>> {
        let (instance, generation) = (token.instance, token.generation);
        let mut current = self.current.lock();
        if self.stopping.load(Ordering::Acquire) {
            return Err(io::Error::other("instancefs is ending"));
        }
        if current.values().filter(|session| session.instance == instance).count() >= SESSIONS_PER_INSTANCE {
            return Ok(None);
        }
        client.set_nonblocking(false)?;
        let id = current.keys().max().map_or(1, |last| last + 1);
        current.insert(id, Session { instance, generation, client: client.try_clone()? });
        Ok(Some(id))
    }

    /// Ends those of which `holds` is not true, given instance and generation of its ownership. Returns whether there are
    /// sessions.
    pub(super) fn look(&self, holds: impl Fn(Uuid, u32) -> bool) -> bool {
        let current = self.current.lock();
        for session in current.values().filter(|session| !holds(session.instance, session.generation)) {
            let _closed = session.client.shutdown(Shutdown::Both);
        }
        !current.is_empty()
    }

    /// Ends them all; the threads end by themselves.
    pub(super) fn stop(&self) {
        let current = self.current.lock();
        self.stopping.store(true, Ordering::Release);
        for session in current.values() {
            let _closed = session.client.shutdown(Shutdown::Both);
        }
    }
}

/// Carries bytes both ways until one end closes; returns how many, out of the guest and into it.
fn carry(client: &UnixStream, console: &UnixStream) -> Result<(u64, u64), String> {
    thread::scope(|scope| {
        let typing = thread::Builder::new()
            .name("console-input".to_owned())
            .spawn_scoped(scope, || transfer(client, console))
            .map_err(|error| error.to_string())?;
        let printed = transfer(console, client);
        let typed = typing.join().unwrap_or(0);
        Ok((printed, typed))
    })
}

/// Ends with either end, and then ends the other direction as well.
fn transfer(mut from: &UnixStream, mut to: &UnixStream) -> u64 {
    let mut buffer = vec![0; 16 << 10];
    let mut total = 0;
    loop {
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                if to.write_all(&buffer[..count]).is_err() {
                    break;
                }
                total += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    let _closed = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
    total
}

/// Tells the client why there is no console, in its own protocol.
fn refuse(mut client: &UnixStream, device: ConsoleDevice, reason: &str) {
    let sentence = format!("instancefs: no {} console: {reason}", device.word());
    let told = client.set_write_timeout(Some(REFUSAL_PATIENCE)).and_then(|()| match device {
        ConsoleDevice::Serial => client.write_all(format!("{sentence}\r\n").as_bytes()),
        ConsoleDevice::Vnc => refuse_rfb(client, &sentence),
    });
    if let Err(error) = told {
        log::debug!("a client went away before it was told {sentence:?}: {error}");
    }
}

/// No security types, and a reason instead (RFC 6143, 7.1.2).
fn refuse_rfb(mut client: &UnixStream, sentence: &str) -> io::Result<()> {
    client.set_read_timeout(Some(REFUSAL_PATIENCE))?;
    client.write_all(RFB_VERSION)?;
    client.read_exact(&mut [0; RFB_VERSION.len()])?;
    let length = u32::try_from(sentence.len()).unwrap_or(0);
    client.write_all(&[[0].as_slice(), &length.to_be_bytes(), sentence.as_bytes()].concat())
}
