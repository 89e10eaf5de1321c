//! What the service manager is told, by the protocol of sd_notify(3): that the mount answers, how it is, and, where it
//! asks for that (`WATCHDOG_USEC`), that the engine still answers. Without a service manager nothing is said.
//!
//! The engine is asked through its own queue, and never the mount: a thread of ours that waits there could never be
//! killed. The kernel's side is looked at by whoever uses it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use sd_notify::NotifyState;

use crate::inventory::{Change, Inventory};
use crate::tree::root;
use crate::workflow::engine::{Beat, Pulse};

/// Names the service manager's socket, where there is one.
const SOCKET: &str = "NOTIFY_SOCKET";

/// What is watched once the mount answers.
pub struct Watched {
    /// The mount point.
    pub mountpoint: PathBuf,
    /// What the status is told from.
    pub inventory: Arc<Inventory>,
    /// The engine.
    pub pulse: Pulse,
}

/// The mount answers. From here on the status follows what happens, and the watchdog is fed as long as the engine answers.
///
/// # Errors
///
/// No thread for that.
pub fn ready(watched: Watched) -> io::Result<()> {
    if std::env::var_os(SOCKET).is_none() {
        return Ok(());
    }
    let Watched { mountpoint, inventory, pulse } = watched;
    let changes = inventory.subscribe();
    say(&[NotifyState::Ready, NotifyState::Status(&status(&mountpoint, &inventory))]);
    thread::Builder::new().name("status".to_owned()).spawn(move || {
        for batch in changes {
            if batch.iter().any(is_told) {
                say(&[NotifyState::Status(&status(&mountpoint, &inventory))]);
            }
        }
    })?;
    let Some(limit) = sd_notify::watchdog_enabled() else { return Ok(()) };
    // Half of the limit, as sd_watchdog_enabled(3) recommends, for the answer and the pause together.
    let interval = limit / 2;
    log::info!("the service manager expects a sign of life every {:.1} s", limit.as_secs_f64());
    thread::Builder::new().name("watchdog".to_owned()).spawn(move || {
        loop {
            let asked = Instant::now();
            match pulse.ask(interval) {
                Beat::Alive => say(&[NotifyState::Watchdog]),
                Beat::Silent => log::error!(
                    "the engine has not answered for {:.1} s; the service manager will end this process if it goes on",
                    interval.as_secs_f64()
                ),
                Beat::Ended => return,
            }
            thread::sleep(interval.saturating_sub(asked.elapsed()));
        }
    })?;
    Ok(())
}

/// The end begins.
pub fn stopping() {
    say(&[NotifyState::Stopping, NotifyState::Status("unmounting; guests go on running")]);
}

/// Whether the status may read differently after a change.
fn is_told(change: &Change) -> bool {
    match change {
        Change::Health => true,
        Change::Object { old, new } => old.is_none() || new.is_none(),
        Change::Events(_) | Change::Console(..) | Change::Moved(..) => false,
    }
}

/// One line for `systemctl status`.
fn status(mountpoint: &Path, inventory: &Inventory) -> String {
    let health = root::health(&inventory.health());
    let ails: Vec<_> = health.lines().filter(|line| !line.ends_with(" ok")).collect();
    let ails = if ails.is_empty() { "all parts ok".to_owned() } else { ails.join("; ") };
    format!("{}: instances {}; {ails}", mountpoint.display(), inventory.instances().len())
}

/// Who does not hear us cannot be helped: the watchdog's limit decides.
fn say(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        log::warn!("the service manager cannot be told: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::{Health, Part, Update};

    #[test]
    fn the_status_names_what_is_wrong_and_nothing_else() {
        let inventory = Inventory::new();
        assert_eq!(status(Path::new("/vm"), &inventory), "/vm: instances 0; all parts ok");
        let hypervisor = Part::Down { since: 0, detail: "no\nsocket".to_owned() };
        inventory.apply(vec![Update::Health(Health { hypervisor, ..Health::default() })]);
        let told = status(Path::new("/vm"), &inventory);
        assert_eq!(told, "/vm: instances 0; hypervisor down since 1970-01-01T00:00:00Z: no socket");
    }
}
