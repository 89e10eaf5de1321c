//! The composition: every part is made here, once, and told about the others.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::{Duration, Instant};

use nix::unistd::User;

use super::identity::{self, IdentityError};
use super::mountpoint::{self, MountEntry};
use super::pinned::Pinned;
use super::probe::{self, Answer};
use super::state_directory::{StateDirectory, StateDirectoryError};
use super::supervisor::Watched;
use crate::block::backends::Backends;
use crate::block::directory::DirectoryBackend;
use crate::block::local::HostDevices;
use crate::config::{IMPORT_DIRECTORY, Settings};
use crate::fuse::{self, Mount};
use crate::hypervisor::{Hypervisor, HypervisorError};
use crate::inventory::{Change, Inventory, Part};
use crate::memory;
use crate::model::backend::Kind;
use crate::privilege::Privilege;
use crate::store::sqlite::SqliteStore;
use crate::store::{Store, StoreError};
use crate::tree::{self, Tree};
use crate::workflow::consoles::TOKEN_LIFETIME;
use crate::workflow::engine::{self, Engine, Pulse};
use crate::workflow::events::EventLog;
use crate::workflow::ledger::{Ledger, now};
use crate::workflow::reconcile::{self, Reconciler};
use crate::workflow::recovery;
use crate::workflow::uptime::SystemClock;

/// How often all domains are looked at, should an event have been lost.
const RECONCILE_INTERVAL: Duration = Duration::from_secs(30);
/// How often the block devices of volumes are looked at, should somebody have taken one away.
const DEVICE_INTERVAL: Duration = Duration::from_secs(5);
/// How many drafts a user may have.
const DRAFTS_PER_USER: usize = 100;
/// Operations that copy a lot of data at once.
const COPIES_AT_ONCE: usize = 2;
/// How long a guest from the shelf has to run before its copies are removed.
const SHELF_GRACE: Duration = Duration::from_secs(60);
/// How long a new mount has for its first answer.
const MOUNT_LIMIT: Duration = Duration::from_secs(5);
/// Whatever became of its file meanwhile.
const THIS_PROGRAM: &str = "/proc/self/exe";
/// Users that distributions let QEMU run as.
const GUEST_USERS: [&str; 2] = ["libvirt-qemu", "qemu"];

/// Why the daemon did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// State directory and connection do not fit together.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateDirectoryError),
    /// The import directory lies within the tree.
    #[error("the import directory {0} lies within the mount point; name another one as import_directory")]
    ImportInside(PathBuf),
    /// The import directory cannot be made.
    #[error("the import directory {path} cannot be made")]
    ImportDirectory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The hypervisor's library cannot be used at all.
    #[error("the connection {uri} cannot be prepared")]
    Hypervisor {
        /// The URI.
        uri: String,
        /// Why.
        source: HypervisorError,
    },
    /// The first connection of a state directory failed: there is nothing to show yet.
    #[error(
        "the first mount of a state directory needs its hypervisor, and {uri} does not answer; start it, or name \
         another one with --connect"
    )]
    FirstConnection {
        /// The URI.
        uri: String,
        /// Why.
        source: HypervisorError,
    },
    /// `events` cannot be kept.
    #[error("the event log {path} cannot be opened")]
    Events {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel refused.
    #[error("{path} cannot be mounted")]
    Mount {
        /// The mount point.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Mounted, but nobody answers.
    #[error("{path} was mounted but does not answer ({answer}); it was unmounted again")]
    NoAnswer {
        /// The mount point.
        path: PathBuf,
        /// What statfs said.
        answer: String,
    },
    /// The session ended with an error.
    #[error("the mount {path} ended")]
    Ended {
        /// The mount point.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A thread cannot be started.
    #[error("a thread cannot be started")]
    Thread(#[source] io::Error),
}

/// Everything but the mount.
pub struct Prepared {
    mountpoint: PathBuf,
    privilege: Privilege,
    read_only: bool,
    changes: Receiver<Arc<Vec<Change>>>,
    inventory: Arc<Inventory>,
    pulse: Pulse,
    reconciler: Arc<Reconciler>,
    tree: Arc<Tree>,
}

/// Makes the usual import directory. One within the tree would have the daemon wait for itself.
fn import_directory(settings: &Settings, mountpoint: &Path) -> Result<(), DaemonError> {
    let path = &settings.import.directory;
    // The mount point is not mounted yet, so that looking at either is safe.
    let (real, tree) = (path.canonicalize(), mountpoint.canonicalize());
    if path.starts_with(mountpoint) || real.is_ok_and(|real| tree.is_ok_and(|tree| real.starts_with(tree))) {
        return Err(DaemonError::ImportInside(path.clone()));
    }
    if settings.read_only || *path != settings.state_directory.join(IMPORT_DIRECTORY) {
        return Ok(());
    }
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Err(source) if source.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(DaemonError::ImportDirectory { path: path.clone(), source })
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// A mount that answers.
pub struct Daemon {
    mountpoint: PathBuf,
    inventory: Arc<Inventory>,
    pulse: Pulse,
    reconciler: Arc<Reconciler>,
    mount: Arc<Mount>,
}

/// Ends a daemon from another thread.
pub struct Stopper(Arc<Mount>);

impl Daemon {
    /// Opens the store and starts every part. Of a new state directory the hypervisor is connected and looked at first;
    /// of a known one that happens in the background, and the tree shows the last known truth meanwhile.
    pub fn prepare(settings: &Settings, state: &StateDirectory, mountpoint: &Path) -> Result<Prepared, DaemonError> {
        memory::keep_little();
        import_directory(settings, mountpoint)?;
        let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&state.store())?);
        let recorded = identity::load(store.as_ref())?;
        let target = identity::choose(recorded.as_ref(), settings.connect.as_deref(), state.path())?;
        let uri = target.uri();
        let learn = {
            let target = target.clone();
            move || target.learn(Path::new(THIS_PROGRAM))
        };
        let hypervisor =
            target.open(state.path()).map_err(|source| DaemonError::Hypervisor { uri: uri.clone(), source })?;
        let first = recorded.is_none();
        let hypervisor = Arc::new(Pinned::new(hypervisor, recorded));
        let incoming = hypervisor.events();
        if first {
            learn();
            hypervisor.connect().map_err(|source| DaemonError::FirstConnection { uri: uri.clone(), source })?;
            hypervisor.pin(identity::record(store.as_ref(), hypervisor.as_ref())?);
        }

        let inventory = Arc::new(Inventory::new());
        // Before anything is in it, so that whoever publishes names hears of every object.
        let changes = inventory.subscribe();
        inventory.apply(recovery::load(store.as_ref())?);
        let ledger = Arc::new(Ledger::open(store.clone(), inventory.clone())?);
        let path = state.path().join("events");
        let events =
            EventLog::open(path.clone(), inventory.clone()).map_err(|source| DaemonError::Events { path, source })?;
        let guest_group = guest_group(settings.privilege);
        let block = Arc::new(
            DirectoryBackend::new(state.path().join("disks"), guest_group)
                .with_volumes_in(state.path().join("volumes"))
                .managing(settings.backends.manage.clone()),
        );
        let mut backends = Backends::new(Kind::Directory, block.clone());
        for (name, backend) in &settings.backends.further {
            backends.add(backend.kind, backend.make(name, guest_group));
        }
        let local = Arc::new(HostDevices::new(state.path().join("exports"), settings.privilege));
        let reconciler = Reconciler::start(
            ledger.clone(),
            store,
            hypervisor.clone(),
            events.clone(),
            incoming,
            reconcile::Settings {
                state_directory: state.path().to_owned(),
                interval: RECONCILE_INTERVAL,
                owner: settings.privilege.uid,
                read_only: settings.read_only,
            },
        );
        if first {
            reconciler.pass().map_err(|source| DaemonError::FirstConnection { uri, source })?;
        } else {
            in_background("connect", connect_later(uri, learn, hypervisor.clone(), !settings.read_only))?;
        }
        if first && !settings.read_only {
            in_background("accelerator", try_accelerator(hypervisor.clone()))?;
        }
        let engine = Engine::start(
            engine::Parts {
                ledger: ledger.clone(),
                hypervisor,
                block,
                backends,
                local,
                reconciler: reconciler.clone(),
                events: events.clone(),
            },
            engine::Settings {
                settle: settings.settle,
                state_directory: state.path().to_owned(),
                read_only: settings.read_only,
                projects: settings.projects.clone(),
                guest_group,
                import: settings.import.clone(),
                retention: settings.retention,
                clock: Arc::new(SystemClock),
                drafts_per_user: DRAFTS_PER_USER,
                device_interval: DEVICE_INTERVAL,
                console_token_lifetime: TOKEN_LIFETIME,
                copies_at_once: COPIES_AT_ONCE,
                shelved_offload_time: settings.shelved_offload_time,
                shelf_grace: SHELF_GRACE,
            },
        )?;
        let pulse = engine.pulse();
        let tree = Tree::new(
            inventory.clone(),
            engine,
            reconciler.clone(),
            events,
            tree::Settings {
                privilege: settings.privilege,
                access_group: settings.access_group,
                admin_group: settings.admin_group,
                mountpoint: mountpoint.to_owned(),
                state_directory: state.path().to_owned(),
                started_at: now(),
            },
        );
        Ok(Prepared {
            mountpoint: mountpoint.to_owned(),
            privilege: settings.privilege,
            read_only: settings.read_only,
            changes,
            inventory,
            pulse,
            reconciler,
            tree,
        })
    }
}

impl Prepared {
    /// Mounts, and returns when the mount has answered.
    pub fn mount(self, state: &mut StateDirectory) -> Result<Daemon, DaemonError> {
        let path = self.mountpoint;
        let announcer = self.reconciler.clone();
        announcer.set_announcer(Part::Down { since: now(), detail: "it is starting".to_owned() });
        let options = fuse::Options {
            mountpoint: path.clone(),
            privilege: self.privilege,
            read_only: self.read_only,
            announce: true,
            program: None,
            on_announcer: Box::new(move |result| {
                announcer.set_announcer(match result {
                    Ok(()) => Part::Ok,
                    Err(detail) => Part::Down { since: now(), detail },
                });
            }),
        };
        let mount = Mount::start(self.tree, self.changes, options)
            .map_err(|source| DaemonError::Mount { path: path.clone(), source })?;
        let mount = Arc::new(mount);
        // Weak, since the mount holds the tree, which holds the inventory.
        let queue = Arc::downgrade(&mount);
        let ask = move || queue.upgrade().map(|mount| mount.backlog()).unwrap_or_default();
        self.inventory.metrics().set_backlog(Box::new(ask));
        let (inventory, pulse) = (self.inventory, self.pulse);
        let daemon = Daemon { mountpoint: path, inventory, pulse, reconciler: self.reconciler, mount };
        if let Err(error) = daemon.begin(state) {
            daemon.stopper().stop();
            return Err(error);
        }
        Ok(daemon)
    }
}

impl Daemon {
    /// Tells everybody where the mount is, and waits for its first answer.
    fn begin(&self, state: &mut StateDirectory) -> Result<(), DaemonError> {
        let path = &self.mountpoint;
        let failed = |source| DaemonError::Mount { path: path.clone(), source };
        if let Some(entry) = mountpoint::mounted_at(path).map_err(failed)? {
            state.remember(Some(mountpoint::remembered(&entry)))?;
            if let Some(device) = device_number(&entry) {
                self.reconciler.set_mount_device(device);
            }
        }
        let answer = probe::ask(path, MOUNT_LIMIT).map_err(failed)?;
        let answer = match answer {
            Answer::Alive => return Ok(()),
            Answer::Dead => "its connection is closed".to_owned(),
            Answer::Silent => format!("nothing within {} s", MOUNT_LIMIT.as_secs()),
            Answer::Failed(errno) => errno.desc().to_owned(),
        };
        Err(DaemonError::NoAnswer { path: path.clone(), answer })
    }

    /// What [`Daemon::wait`] can be ended with.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.mount.clone())
    }

    /// What a service manager is told of.
    pub fn watched(&self) -> Watched {
        let (mountpoint, inventory) = (self.mountpoint.clone(), self.inventory.clone());
        Watched { mountpoint, inventory, pulse: self.pulse.clone() }
    }

    /// Serves until somebody unmounts, from inside or outside. Guests stay as they are.
    pub fn wait(&self) -> Result<(), DaemonError> {
        let ended = self.mount.wait();
        self.reconciler.stop();
        ended.map_err(|source| DaemonError::Ended { path: self.mountpoint.clone(), source })
    }
}

impl Stopper {
    /// Unmounts, also while something is open there.
    pub fn stop(&self) {
        if let Err(error) = self.0.stop() {
            log::error!("the mount cannot be removed: {error}");
        }
    }
}

fn in_background(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), DaemonError> {
    thread::Builder::new().name(name.to_owned()).spawn(work).map(drop).map_err(DaemonError::Thread)
}

/// Connects without making anybody wait. Once it was asked to, the hypervisor goes on trying by itself, and the
/// reconciler hears of it; meanwhile `health` says why there is no connection. With `boots`, guests may be started.
fn connect_later(uri: String, learn: impl FnOnce(), hypervisor: Arc<dyn Hypervisor>, boots: bool) -> impl FnOnce() {
    move || {
        let begun = Instant::now();
        learn();
        match hypervisor.connect() {
            Ok(()) => log::info!("connected to {uri} in {:.3} s", begun.elapsed().as_secs_f64()),
            Err(error) => log::warn!("{uri} is not there yet, the last known state is shown: {error}"),
        }
        if boots {
            try_accelerator(hypervisor)();
        }
    }
}

/// Finds out what guests run on before the first one boots, which would have to wait for it.
fn try_accelerator(hypervisor: Arc<dyn Hypervisor>) -> impl FnOnce() {
    move || match hypervisor.accelerator() {
        Ok(accelerator) => log::info!("new guests run on {accelerator:?}"),
        Err(error) => log::debug!("what new guests run on is found out at the first boot: {error}"),
    }
}

/// The group that QEMU runs in where libvirt is set up as distributions do. An ordinary user's guests run as himself.
fn guest_group(privilege: Privilege) -> Option<u32> {
    if !privilege.is_root() {
        return None;
    }
    let user = GUEST_USERS.iter().find_map(|name| User::from_name(name).ok().flatten())?;
    Some(user.gid.as_raw())
}

/// `st_dev` of a mount.
fn device_number(entry: &MountEntry) -> Option<u64> {
    let (major, minor) = entry.device.split_once(':')?;
    Some(nix::libc::makedev(major.parse().ok()?, minor.parse().ok()?))
}
