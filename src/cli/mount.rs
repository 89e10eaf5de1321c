//! `instancefs mount`: from the command line to a mount that answers, and back.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use super::background::{self, BackgroundError, Caller};
use super::daemon::{Daemon, DaemonError};
use super::mountpoint::{Mountpoint, MountpointError};
use super::signals;
use super::state_directory::{StateDirectory, StateDirectoryError};
use super::supervisor;
use crate::config::{ConfigError, Layer, parse_duration};

/// The command line of `mount`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Where the virtual machines are: auto, embed, a libvirt URI, or the path of a libvirt socket [default: auto]; an
    /// ordinary user's auto is embed
    #[arg(long, value_name = "URI")]
    connect: Option<String>,
    /// Where instancefs keeps its records [default: /var/lib/instancefs; an ordinary user's: ~/.local/state/instancefs]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// How long a write waits for the end of its work [default: 3s]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    settle: Option<Duration>,
    /// Return when the mount answers; messages go to the file log in the state directory
    #[arg(long)]
    background: bool,
    /// Read this configuration instead of /etc/instancefs.toml, or an ordinary user's ~/.config/instancefs.toml
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Mount options: ro, access_group=NAME, admin_group=NAME, projects=A:B, settle=DURATION, retention=DURATION, shelved_offload_time=DURATION, connect=URI, state_dir=DIR, import_directory=DIR
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<String>,
    /// We are the daemon that --background started
    #[arg(long = "in-background", hide = true)]
    in_background: bool,
    /// An existing directory
    mountpoint: PathBuf,
}

/// Why there is no mount.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateDirectoryError),
    /// The mount point.
    #[error(transparent)]
    Mountpoint(#[from] MountpointError),
    /// The background process.
    #[error(transparent)]
    Background(#[from] BackgroundError),
    /// The daemon.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// No FUSE in this kernel, or not for us.
    #[error("{0}")]
    NoFuse(io::Error),
    /// A thread cannot be started.
    #[error("a thread cannot be started")]
    Thread(#[source] io::Error),
    /// Signals cannot be caught.
    #[error("signals cannot be caught")]
    Signals(#[source] io::Error),
}

/// Mounts and serves until the mount is gone; `command_line` is the whole one, for the background process.
pub fn run(arguments: &Arguments, command_line: &[OsString]) -> Result<ExitCode, MountError> {
    if arguments.background && !arguments.in_background {
        return Ok(background::launch(command_line)?);
    }
    let mut caller = match arguments.in_background {
        true => Some(Caller::detach()?),
        false => None,
    };
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    match serve(arguments, &mut caller) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => {
            if let Some(caller) = caller {
                caller.failed(&format!("instancefs: {}", super::chain(&error)));
            }
            Err(error)
        }
    }
}

fn serve(arguments: &Arguments, caller: &mut Option<Caller>) -> Result<(), MountError> {
    let flags = Layer {
        connect: arguments.connect.clone(),
        state_dir: arguments.state_dir.clone(),
        settle: arguments.settle,
        ..Layer::default()
    };
    let settings = flags
        .over(Layer::from_options(arguments.options.iter().map(String::as_str))?)
        .over(Layer::from_file(arguments.config.as_deref())?)
        .resolve()?;
    // Said now, not after a connection was made.
    crate::fuse::open_device().map_err(MountError::NoFuse)?;
    let mountpoint = Mountpoint::resolve(&arguments.mountpoint)?;
    if settings.is_in_home {
        StateDirectory::make_parents(&settings.state_directory)?;
    }
    let mut state = StateDirectory::open(&settings.state_directory)?;
    mountpoint.prepare(&state)?;
    if let Some(caller) = caller.as_mut() {
        caller.redirect(&state.log())?;
    }

    let prepared = Daemon::prepare(&settings, &state, mountpoint.path())?;
    // Caught from here on, since from here on there may be a mount to take away.
    let signals = signals::catch().map_err(MountError::Signals)?;
    let daemon = prepared.mount(&mut state)?;
    let stopper = daemon.stopper();
    // Whom --background returned to has no service manager above the daemon, whatever its environment says.
    let supervised = caller.is_none();
    let stop = move || {
        if supervised {
            supervisor::stopping();
        }
        stopper.stop();
    };
    signals.on_first(stop).map_err(MountError::Signals)?;
    if let Some(caller) = caller.take()
        && let Err(error) = caller.ready()
    {
        daemon.stopper().stop();
        daemon.wait()?;
        return Err(error.into());
    }
    log::info!("{} is mounted, state in {}", mountpoint.path().display(), state.path().display());
    if supervised {
        supervisor::ready(daemon.watched()).map_err(MountError::Thread)?;
    }
    daemon.wait()?;
    if supervised {
        // Somebody may have unmounted it.
        supervisor::stopping();
    }
    log::info!("{} is unmounted; guests go on running", mountpoint.path().display());
    Ok(())
}
