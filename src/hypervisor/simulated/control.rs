//! The control socket: what tests do to the simulated host, one JSON object a line, one answer a line.
//!
//! Every answer has `ok`; a refusal has `error`, a sentence, and `kind`, one of the words of [`Kind`].

use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::daemon::{Daemon, Fault, Mode, now_ms};
use super::{CALLS, Shared, disk, xml};
use crate::hypervisor::{HypervisorError, Places, Reboot};

/// What a control line may say, in `do`. Verbs on a domain act as a `virsh` elsewhere would, and are told as events.
#[derive(Debug, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case", deny_unknown_fields)]
enum Command {
    /// Defines a domain; answers its `uuid`.
    Define { xml: String },
    /// Defines `count` domains `PREFIX-1` ... at once, then tells of them; answers their `uuids`.
    Bulk {
        count: u32,
        #[serde(default = "default_prefix")]
        prefix: String,
        #[serde(default)]
        running: bool,
    },
    /// Starts it.
    Start { uuid: Uuid },
    /// Pulls the plug.
    #[serde(alias = "power_off")]
    Stop { uuid: Uuid },
    /// Presses its power button.
    Shutdown { uuid: Uuid },
    /// Restarts it, by its button or by reset.
    Reboot {
        uuid: Uuid,
        #[serde(default)]
        hard: bool,
    },
    /// Freezes it.
    Pause { uuid: Uuid },
    /// Lets it go on.
    Unpause { uuid: Uuid },
    /// Saves its memory and stops it.
    Save { uuid: Uuid },
    /// Undefines it.
    Undefine { uuid: Uuid },
    /// Renames it.
    Rename { uuid: Uuid, name: String },
    /// Has it started with the host, or not.
    Autostart { uuid: Uuid, on: bool },
    /// Sets its description, or removes it.
    SetDescription { uuid: Uuid, text: Option<String> },
    /// Sets our metadata element, or removes it.
    SetMetadata { uuid: Uuid, xml: Option<String> },
    /// Puts a disk into these definitions.
    AttachDisk { uuid: Uuid, xml: String, persistent: bool, live: bool },
    /// Takes a disk out of these definitions.
    DetachDisk { uuid: Uuid, device: String, persistent: bool, live: bool },
    /// It crashes: off, or with `preserve` kept as crashed.
    Crash {
        uuid: Uuid,
        #[serde(default)]
        preserve: bool,
    },
    /// QEMU pauses it because of its disk.
    Ioerror { uuid: Uuid },
    /// QEMU pauses it because of its watchdog.
    Watchdog { uuid: Uuid },
    /// The guest turns itself off.
    Halt { uuid: Uuid },
    /// The guest goes to sleep.
    Sleep { uuid: Uuid },
    /// The guest is woken.
    Wake { uuid: Uuid },
    /// It moves to another host.
    Migrate { uuid: Uuid },
    /// Its addresses from now on: what its agent says, and what the host knows.
    Addresses { uuid: Uuid, agent: Option<Vec<IpAddr>>, host: Option<Vec<IpAddr>> },
    /// How the guest behaves.
    Guest {
        uuid: Uuid,
        ignores_acpi: Option<bool>,
        acpi_delay_ms: Option<u64>,
        refuses_detach: Option<bool>,
        detach_delay_ms: Option<u64>,
    },
    /// A fault for a call of the trait, by its method's name.
    Fault {
        call: String,
        /// Only calls on this domain.
        uuid: Option<Uuid>,
        mode: ModeName,
        /// With `fail`: what is said; with `disconnect`: the reason.
        message: Option<String>,
        /// With `fail`: which error; else `failed`.
        kind: Option<Kind>,
        /// With `late`: how late; with `disconnect`: when the connection is back, else at `reconnect`.
        ms: Option<u64>,
        /// How many calls it meets; without, each until `release`.
        times: Option<u32>,
        /// With `disconnect`: the call took effect before.
        #[serde(default)]
        applied: bool,
    },
    /// Removes the faults of a call (or all), and lets those go on that hang in them; answers how many `released`.
    Release { call: Option<String>, uuid: Option<Uuid> },
    /// Stops the daemon as SIGSTOP does: calls are taken and not answered, no event is sent. Faults are not consulted.
    HangAll,
    /// Lets it run again.
    ReleaseAll,
    /// Breaks the connection.
    Disconnect { reason: Option<String> },
    /// Has it come back.
    Reconnect,
    /// How often each call was made (`calls`), and which are taken and not answered (`pending`).
    Calls {
        #[serde(default)]
        reset: bool,
    },
    /// All domains and guests, whatever the daemon does.
    List,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ModeName {
    Fail,
    Hang,
    Late,
    Disconnect,
}

/// The variants of [`HypervisorError`], as words.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Unreachable,
    NoDomain,
    InvalidState,
    Exists,
    Unsupported,
    Failed,
}

fn default_prefix() -> String {
    "vm".to_owned()
}

/// Carries out one command.
pub(super) fn run(daemon: &mut Daemon, command: Value) -> Value {
    let answer = match serde_json::from_value::<Command>(command) {
        Ok(command) => obey(daemon, command),
        Err(error) => Err(HypervisorError::Failed(format!("not understood: {error}"))),
    };
    daemon.publish();
    match answer {
        Ok(Value::Object(mut fields)) => {
            fields.insert("ok".to_owned(), Value::Bool(true));
            Value::Object(fields)
        }
        Ok(_) => json!({ "ok": true }),
        Err(error) => json!({ "ok": false, "error": error.to_string(), "kind": kind(&error) }),
    }
}

fn obey(daemon: &mut Daemon, command: Command) -> Result<Value, HypervisorError> {
    if daemon.closed() {
        return Err(HypervisorError::Failed("the simulated host was closed".to_owned()));
    }
    let host = &mut daemon.host;
    match command {
        Command::Define { xml } => return Ok(json!({ "uuid": host.define(&xml)? })),
        Command::Bulk { count, prefix, running } => {
            return Ok(json!({ "uuids": host.define_many(&prefix, count, running)? }));
        }
        Command::Start { uuid } => host.start(uuid)?,
        Command::Stop { uuid } => host.end(uuid, "destroyed")?,
        Command::Shutdown { uuid } => host.press_button(uuid, false, now_ms())?,
        Command::Reboot { uuid, hard } => {
            let kind = if hard { Reboot::Hard } else { Reboot::Soft };
            host.reboot(uuid, kind, now_ms())?;
        }
        Command::Pause { uuid } => host.pause(uuid, "user")?,
        Command::Unpause { uuid } => host.unpause(uuid)?,
        Command::Save { uuid } => host.save(uuid)?,
        Command::Undefine { uuid } => host.undefine(uuid)?,
        Command::Rename { uuid, name } => host.rename(uuid, &name)?,
        Command::Autostart { uuid, on } => host.set_autostart(uuid, on)?,
        Command::SetDescription { uuid, text } => {
            host.edit(uuid, |xml| xml::with_description(xml, text.as_deref()))?;
        }
        Command::SetMetadata { uuid, xml: element } => {
            host.edit(uuid, |xml| xml::with_metadata(xml, element.as_deref()))?;
        }
        Command::Crash { uuid, preserve: false } => host.end(uuid, "crashed")?,
        Command::Crash { uuid, preserve: true } => host.panic(uuid)?,
        Command::Ioerror { uuid } => host.pause(uuid, "ioerror")?,
        Command::Watchdog { uuid } => host.pause(uuid, "watchdog")?,
        Command::Halt { uuid } => host.end(uuid, "shutdown")?,
        Command::Sleep { uuid } => host.sleep(uuid)?,
        Command::Wake { uuid } => host.wake(uuid)?,
        Command::Migrate { uuid } => host.migrate(uuid)?,
        Command::Addresses { uuid, agent, host: known } => host.set_addresses(uuid, agent, known)?,
        Command::Guest { uuid, ignores_acpi, acpi_delay_ms, refuses_detach, detach_delay_ms } => {
            host.set_behaviour(uuid, ignores_acpi, acpi_delay_ms, refuses_detach, detach_delay_ms)?;
        }
        Command::AttachDisk { uuid, xml, persistent, live } => {
            host.attach_disk(uuid, &xml, Places { persistent, live })?;
        }
        Command::DetachDisk { uuid, device, persistent, live } => {
            host.detach_disk(uuid, &device, Places { persistent, live }, now_ms())?;
        }
        Command::Fault { call, uuid, mode, message, kind, ms, times, applied } => {
            if !CALLS.contains(&call.as_str()) {
                return Err(HypervisorError::Failed(format!("there is no call {call}")));
            }
            if times == Some(0) {
                return Err(HypervisorError::Failed("a fault meets at least one call".to_owned()));
            }
            let message = message.unwrap_or_else(|| "a test wants it so".to_owned());
            let mode = match mode {
                ModeName::Fail => Mode::Fail(error(kind.unwrap_or(Kind::Failed), message)),
                ModeName::Hang => Mode::Hang,
                ModeName::Late => Mode::Late(ms.unwrap_or_default()),
                ModeName::Disconnect => Mode::Disconnect { reason: message, applied, back_after_ms: ms },
            };
            daemon.faults.push(Fault { call, uuid, mode, times });
        }
        Command::Release { call, uuid } => {
            return Ok(json!({ "released": daemon.release(call.as_deref(), uuid) }));
        }
        Command::HangAll => daemon.hang()?,
        Command::ReleaseAll => daemon.resume()?,
        Command::Disconnect { reason } => {
            daemon.disconnect(reason.as_deref().unwrap_or("a test wants it so"))?;
        }
        Command::Reconnect => daemon.reconnect()?,
        Command::Calls { reset } => {
            let pending: Vec<Value> =
                daemon.pending().map(|pending| json!({ "call": pending.call, "uuid": pending.uuid })).collect();
            let answer = json!({ "calls": daemon.counters(), "pending": pending });
            if reset {
                daemon.reset_counters();
            }
            return Ok(answer);
        }
        Command::List => {
            let guests: Vec<_> = daemon.host.guests().collect();
            return Ok(json!({ "guests": guests, "hung": daemon.hung(), "down": daemon.down() }));
        }
    }
    Ok(Value::Null)
}

fn error(kind: Kind, message: String) -> HypervisorError {
    match kind {
        Kind::Unreachable => HypervisorError::Unreachable(message),
        Kind::NoDomain => HypervisorError::NoDomain,
        Kind::InvalidState => HypervisorError::InvalidState(message),
        Kind::Exists => HypervisorError::Exists(message),
        Kind::Unsupported => HypervisorError::Unsupported(message),
        Kind::Failed => HypervisorError::Failed(message),
    }
}

fn kind(error: &HypervisorError) -> Kind {
    match error {
        HypervisorError::Unreachable(_) => Kind::Unreachable,
        HypervisorError::NoDomain => Kind::NoDomain,
        HypervisorError::InvalidState(_) => Kind::InvalidState,
        HypervisorError::Exists(_) => Kind::Exists,
        HypervisorError::Unsupported(_) => Kind::Unsupported,
        HypervisorError::Failed(_) => Kind::Failed,
    }
}

/// Listens on the control socket until the other end of `ended` is closed.
pub(super) fn serve(shared: Arc<Shared>, ended: UnixStream) -> Result<(), HypervisorError> {
    let path = shared.daemon.lock().host.disk.control_socket()?;
    let listener = UnixListener::bind(&path).map_err(|error| disk::failed(&path, &error))?;
    thread::Builder::new()
        .name("simulated-control".to_owned())
        .spawn(move || accept(&shared, &listener, &ended))
        .map_err(|error| HypervisorError::Failed(format!("no thread: {error}")))?;
    Ok(())
}

fn accept(shared: &Arc<Shared>, listener: &UnixListener, ended: &UnixStream) {
    loop {
        let mut waiting =
            [PollFd::new(listener.as_fd(), PollFlags::POLLIN), PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
        match poll(&mut waiting, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => {
                log::error!("the control socket cannot be waited for: {error}");
                return;
            }
        }
        if waiting[1].any() == Some(true) {
            return;
        }
        if waiting[0].any() != Some(true) {
            continue;
        }
        let client = match listener.accept() {
            Ok((client, _)) => client,
            Err(error) => {
                log::warn!("the control socket cannot accept: {error}");
                continue;
            }
        };
        let shared = Arc::clone(shared);
        let spawned = thread::Builder::new().name("simulated-client".to_owned()).spawn(move || {
            if let Err(error) = answer(&shared, &client) {
                log::debug!("a control client went away: {error}");
            }
        });
        if let Err(error) = spawned {
            log::warn!("no thread for a control client: {error}");
        }
    }
}

fn answer(shared: &Shared, client: &UnixStream) -> std::io::Result<()> {
    for line in BufReader::new(client).lines() {
        let line = line?;
        let answer = match serde_json::from_str(&line) {
            Ok(command) => shared.control(command),
            Err(error) => {
                json!({ "ok": false, "error": format!("not JSON: {error}"), "kind": Kind::Failed })
            }
        };
        let mut writer = client;
        writer.write_all(format!("{answer}\n").as_bytes())?;
    }
    Ok(())
}
