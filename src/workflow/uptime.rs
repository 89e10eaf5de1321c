//! How long the host was up since instancefs knows it: a clock that nobody can set.
//!
//! A boot is known by its id. Within it the kernel counts, whether instancefs runs or not; what is stored is where that
//! count was last, and the seconds of all boots until then. Of a boot that ended unseen only what was stored counts, so
//! that the sum is never more than the truth.

use std::sync::Arc;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::ledger::{self, Ledger};
use crate::store::{Change, StoreError};

const KEY: &str = "meta/uptime";

/// The clocks of this host.
pub trait Clock: Send + Sync {
    /// Now, in Unix seconds, as somebody has set it.
    fn now(&self) -> u64;
    /// The id of this boot; empty if it is not known.
    fn boot(&self) -> String;
    /// Since this boot, in which the time that the host slept counts.
    fn since_boot(&self) -> Duration;
}

/// Those of the kernel: `CLOCK_REALTIME`, `CLOCK_BOOTTIME` and `/proc/sys/kernel/random/boot_id`.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> u64 {
        ledger::now()
    }

    fn boot(&self) -> String {
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map_or_else(
            |error| {
                log::warn!("the id of this boot is not known, so its time counts from now on only: {error}");
                String::new()
            },
            |text| text.trim().to_owned(),
        )
    }

    fn since_boot(&self) -> Duration {
        clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
    }
}

/// What is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Tick {
    boot: String,
    /// Seconds since that boot.
    at: u64,
    /// Seconds of all boots until then.
    total: u64,
}

/// See the module.
pub struct Uptime {
    clock: Arc<dyn Clock>,
    /// Of this boot.
    start: Tick,
}

impl Uptime {
    /// Goes on from what is stored. What cannot be read counts as nothing, since less is safe.
    pub fn load(ledger: &Ledger, clock: Arc<dyn Clock>) -> Uptime {
        let stored = ledger.meta(KEY).and_then(|value| {
            let tick = serde_json::from_slice::<Tick>(value);
            tick.map_err(|error| log::warn!("{KEY} cannot be read, the host's uptime counts from now on: {error}")).ok()
        });
        let (boot, since) = (clock.boot(), clock.since_boot().as_secs());
        let start = match stored {
            Some(tick) if tick.boot == boot && !boot.is_empty() => tick,
            // Nobody knows which part of this boot was counted before.
            Some(tick) if boot.is_empty() => Tick { boot, at: since, total: tick.total },
            Some(tick) => Tick { boot, at: 0, total: tick.total },
            None => Tick { boot, at: since, total: 0 },
        };
        Uptime { clock, start }
    }

    /// In seconds.
    pub fn seconds(&self) -> u64 {
        let since = self.clock.since_boot().as_secs();
        self.start.total.saturating_add(since.saturating_sub(self.start.at))
    }

    /// Stores it.
    ///
    /// # Errors
    ///
    /// [`StoreError`] if it was not stored; then a reboot now costs the time since the last one.
    pub fn store(&self, ledger: &Ledger) -> Result<(), StoreError> {
        let at = self.clock.since_boot().as_secs();
        let tick = Tick { boot: self.start.boot.clone(), at, total: self.seconds() };
        let value = serde_json::to_vec(&tick)
            .map_err(|error| StoreError::Failed(format!("{KEY} cannot be written as JSON: {error}")))?;
        ledger.transact(|batch| batch.store(Change::Put(KEY.to_owned(), value)))
    }
}
