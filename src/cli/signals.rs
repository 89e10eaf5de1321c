//! Signals that end the daemon.

use std::io;
use std::thread;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Signals caught from now on, acted on later.
pub struct Caught(Signals);

/// From here on SIGTERM, SIGINT and SIGHUP no longer kill; they are kept for [`Caught::on_first`].
pub fn catch() -> io::Result<Caught> {
    Signals::new([SIGTERM, SIGINT, SIGHUP]).map(Caught)
}

impl Caught {
    /// Calls `stop` in a thread of its own at the first signal, also if it came before this call. A second signal ends
    /// the process as it would have without us: whoever sends two does not want to wait.
    pub fn on_first(mut self, stop: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let mut stop = Some(stop);
        thread::Builder::new().name("signals".to_owned()).spawn(move || {
            for signal in self.0.forever() {
                match stop.take() {
                    Some(stop) => {
                        log::info!("signal {signal}: unmounting; guests go on running");
                        // In a thread of its own, so that a second signal is seen while it waits.
                        thread::spawn(stop);
                    }
                    None => {
                        log::warn!("signal {signal} again: ending at once");
                        let _ = signal_hook::low_level::emulate_default_handler(signal);
                    }
                }
            }
        })?;
        Ok(())
    }
}
