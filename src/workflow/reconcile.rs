//! The only place that carries hypervisor events and reconciliation into the inventory.
//!
//! Each kind of waiting has a thread of its own, so that none stops another: one receives events, one asks about them
//! and makes the passes, one pings and one notices that the ping hangs, one fetches definitions and mirrors, one
//! watches console logs, one saves, one listens to the inventory, and some ask for addresses.

mod absorb;
mod addresses;
mod console;
mod definitions;
mod health;
mod incoming;
mod listen;
mod mirror;
mod questions;
mod volumes;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use uuid::Uuid;

use crate::block::backends::Backends;
use crate::hypervisor::{self, AddressSource, Domain, Hypervisor};
use crate::inventory::Part;
use crate::memory;
use crate::model::Class;
use crate::store::{Change, Store, StoreError};
use crate::workflow::events::EventLog;
use crate::workflow::ledger::{Batch, Ledger};
use crate::workflow::volume;

use absorb::Stamps;
use addresses::{AGENT_THREADS, Schedules};
use console::Console;
use health::{Board, Writer};
use incoming::Pending;

/// How many definitions are fetched for one transaction.
const DEFINITIONS_PER_TRANSACTION: usize = 256;

/// After as many, memory is given back.
const MANY_DEFINITIONS: usize = 1000;

/// What failed is tried again after this time.
const RETRY: Duration = Duration::from_secs(5);

/// How often what was only shown is saved.
const SAVE_INTERVAL: Duration = Duration::from_secs(1);

/// Health of the directory: less free space than this is too little, in bytes.
const SPACE_MIN: u64 = 64 << 20;

/// How often a thread that waits for a channel looks whether it is to end.
const CHANNEL_PATIENCE: Duration = Duration::from_secs(1);

/// How long [`Reconciler::stop`] waits for threads that are not in a hung call.
const STOP_PATIENCE: Duration = Duration::from_secs(1);

/// How to reconcile.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The state directory, absolute.
    pub state_directory: PathBuf,
    /// Time between two full passes.
    pub interval: Duration,
    /// Whose the domains are that somebody else defines.
    pub owner: u32,
    /// Observe only: nothing is mirrored into domains.
    pub read_only: bool,
}

/// Removes an instance that is gone, with what is kept beside its record. Its volumes stay, and nobody has them.
pub(super) fn forget(batch: &mut Batch<'_>, id: Uuid) {
    volume::record_all_detached(batch, id);
    batch.remove(Class::Instance, id);
    batch.store(Change::Delete(definitions::key(id)));
    batch.store(Change::Delete(mirror::key(id)));
}

/// What is to be done in the background.
#[derive(Default)]
struct Details {
    fetch: BTreeSet<Uuid>,
    mirror: BTreeSet<Uuid>,
    /// What was mirrored into these is not known any more.
    forget: BTreeSet<Uuid>,
}

/// What was heard of a guest's devices since we began to listen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceNews {
    /// How often it let one go.
    pub removed: u64,
    /// How often it refused to, by the hypervisor's own names of the devices.
    pub kept: BTreeMap<String, u64>,
}

/// See the module.
pub struct Reconciler {
    ledger: Arc<Ledger>,
    store: Arc<dyn Store>,
    hypervisor: Arc<dyn Hypervisor>,
    events: Arc<EventLog>,
    settings: Settings,
    board: Board,
    console: Option<Console>,
    /// 0 until it is known.
    mount_device: AtomicU64,
    addresses: Schedules,
    next_question: AtomicU64,
    stamps: Mutex<Stamps>,
    pending: Mutex<Pending>,
    pending_wake: Condvar,
    details: Mutex<Details>,
    details_wake: Condvar,
    /// How often something happened that [`Reconciler::wait_for`] may wait for.
    batches: Mutex<u64>,
    published: Condvar,
    /// How often each guest was heard to restart.
    reboots: Mutex<HashMap<Uuid, u64>>,
    devices: Mutex<HashMap<Uuid, DeviceNews>>,
    /// Who knows where volumes lie, once it is known.
    backends: OnceLock<Backends>,
    stopping: AtomicBool,
    /// Guards the saver's sleep.
    sleep: Mutex<()>,
    sleep_wake: Condvar,
    /// Threads that [`Reconciler::stop`] waits for.
    alive: Mutex<usize>,
    ended: Condvar,
}

impl Reconciler {
    /// Starts the threads. The inventory holds what the store knows, with [`domain`](crate::inventory::Instance::domain) as last seen.
    pub fn start(
        ledger: Arc<Ledger>,
        store: Arc<dyn Store>,
        hypervisor: Arc<dyn Hypervisor>,
        events: Arc<EventLog>,
        incoming: Receiver<hypervisor::Event>,
        settings: Settings,
    ) -> Arc<Reconciler> {
        let console = Console::new()
            .map_err(|error| log::error!("console logs are not watched, their growth is not announced: {error}"))
            .ok();
        let reconciler = Arc::new(Reconciler {
            board: Board::new(Arc::clone(ledger.inventory())),
            console,
            mount_device: AtomicU64::new(0),
            addresses: Schedules::default(),
            ledger,
            store,
            hypervisor,
            events,
            settings,
            next_question: AtomicU64::new(1),
            stamps: Mutex::default(),
            pending: Mutex::default(),
            pending_wake: Condvar::new(),
            details: Mutex::default(),
            details_wake: Condvar::new(),
            batches: Mutex::default(),
            published: Condvar::new(),
            reboots: Mutex::default(),
            devices: Mutex::default(),
            backends: OnceLock::new(),
            stopping: AtomicBool::new(false),
            sleep: Mutex::default(),
            sleep_wake: Condvar::new(),
            alive: Mutex::default(),
            ended: Condvar::new(),
        });
        let changes = reconciler.ledger.inventory().subscribe();
        for instance in reconciler.ledger.inventory().instances() {
            reconciler.watch_console(&instance);
            reconciler.watch_addresses(&instance);
        }
        reconciler.spawn_listener("events-in", move |this| this.receive(&incoming));
        reconciler.spawn_listener("inventory", move |this| this.listen(&changes));
        reconciler.spawn("reconcile", Reconciler::reconcile);
        reconciler.spawn("details", Reconciler::keep_details);
        reconciler.spawn("ping", |this| this.board.ping(&*this.hypervisor));
        reconciler.spawn("health", |this| this.board.watch());
        reconciler.spawn("saver", Reconciler::save);
        reconciler.spawn("addresses", |this| this.ask_for_addresses(AddressSource::Host));
        for _ in 0..AGENT_THREADS {
            reconciler.spawn("agents", |this| this.ask_for_addresses(AddressSource::Agent));
        }
        reconciler.spawn("console", |this| {
            if let Some(console) = &this.console {
                let inventory = Arc::clone(this.ledger.inventory());
                console.run(inventory, this.settings.state_directory.clone(), this.settings.interval);
            }
        });
        reconciler
    }

    /// How often this guest was heard to restart since we began to listen.
    pub fn reboots(&self, id: Uuid) -> u64 {
        self.reboots.lock().get(&id).copied().unwrap_or(0)
    }

    /// What was heard of this guest's devices.
    pub fn device_news(&self, id: Uuid) -> DeviceNews {
        self.devices.lock().get(&id).cloned().unwrap_or_default()
    }

    /// Has the definition read again, in the background: not every change of one is told.
    pub fn read_definition(&self, id: Uuid) {
        self.details.lock().fetch.insert(id);
        self.details_wake.notify_all();
    }

    /// Waits until `done` holds of the domain as it is shown, of [`Reconciler::reboots`], or of
    /// [`Reconciler::device_news`]. Returns whether it does; `false` also when the
    /// reconciler stops.
    pub fn wait_for(&self, id: Uuid, timeout: Duration, done: &dyn Fn(Option<&Domain>) -> bool) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            // Read before the domain, so that no batch between is slept through.
            let seen = *self.batches.lock();
            let instance = self.ledger.inventory().instance(id);
            if done(instance.as_ref().and_then(|instance| instance.domain.as_ref())) {
                return true;
            }
            let mut batches = self.batches.lock();
            while *batches == seen {
                if self.stopping() || self.published.wait_until(&mut batches, deadline).timed_out() {
                    return false;
                }
            }
        }
    }

    /// Has lock, protection, ownership and description mirrored into the domain, in the background.
    pub fn mirror(&self, id: Uuid) {
        self.details.lock().mirror.insert(id);
        self.details_wake.notify_all();
    }

    /// Has everything mirrored again into a domain that was defined from its definition last seen, which may be older
    /// than what was mirrored last.
    pub fn mirror_anew(&self, id: Uuid) {
        let mut details = self.details.lock();
        details.forget.insert(id);
        details.mirror.insert(id);
        drop(details);
        self.details_wake.notify_all();
    }

    /// Health of the announcer, which only its keeper knows.
    pub fn set_announcer(&self, part: Part) {
        self.board.set_announcer(part);
    }

    /// Health of a backend that the configuration names, which only who asks it knows.
    pub(super) fn set_backend(&self, name: &str, result: Result<(), String>) {
        self.board.backend(name, result);
    }

    /// The device (`st_dev`) of our own mount: no console log there is ever touched.
    pub fn set_mount_device(&self, device: u64) {
        self.mount_device.store(device, Ordering::Relaxed);
        if let Some(console) = &self.console {
            console.set_mount_device(device);
        }
    }

    /// Where our own tree is mounted, which no thread of ours may touch. It is not looked at.
    pub fn mount_points(&self) -> Vec<PathBuf> {
        match self.mount_device.load(Ordering::Relaxed) {
            0 => Vec::new(),
            device => console::mount_points(device),
        }
    }

    /// Where volumes lie, so that they are known in definitions.
    pub fn know_volumes(&self, backends: Backends) {
        // A second engine on the same reconciler knows nothing else.
        let _known = self.backends.set(backends);
        if !self.ledger.inventory().volumes().is_empty() {
            // What was read before said nothing of volumes.
            let instances = self.ledger.inventory().instances();
            self.details.lock().fetch.extend(instances.iter().map(|instance| instance.id));
            self.details_wake.notify_all();
        }
    }

    /// Ends the threads, without waiting for one that is in a hung call, and saves what was only shown.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        // Whoever checks the flag under one of these locks either sees it or is woken.
        drop(self.pending.lock());
        self.pending_wake.notify_all();
        drop(self.details.lock());
        self.details_wake.notify_all();
        drop(self.batches.lock());
        self.published.notify_all();
        drop(self.sleep.lock());
        self.sleep_wake.notify_all();
        self.addresses.close();
        self.board.stop();
        if let Some(console) = &self.console {
            console.stop();
        }
        let deadline = Instant::now() + STOP_PATIENCE;
        let mut alive = self.alive.lock();
        while *alive > 0 && !self.ended.wait_until(&mut alive, deadline).timed_out() {}
        if *alive > 0 {
            log::info!("{} threads still wait for an answer and are left behind", *alive);
        }
        drop(alive);
        self.save_shown();
        self.events.flush();
    }

    fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Starts a thread that [`Reconciler::stop`] wakes and waits for.
    fn spawn(self: &Arc<Self>, name: &str, body: impl FnOnce(&Reconciler) + Send + 'static) {
        *self.alive.lock() += 1;
        let leave = |this: &Reconciler| {
            *this.alive.lock() -= 1;
            this.ended.notify_all();
        };
        let started = self.spawn_listener(name, move |this| {
            body(this);
            leave(this);
        });
        if !started {
            leave(self);
        }
    }

    /// Starts a thread that waits for a channel: once we stop it does nothing any more, and ends by itself.
    fn spawn_listener(self: &Arc<Self>, name: &str, body: impl FnOnce(&Reconciler) + Send + 'static) -> bool {
        let this = Arc::clone(self);
        let spawned = thread::Builder::new().name(name.to_owned()).spawn(move || body(&this));
        if let Err(error) = &spawned {
            log::error!("the thread {name} cannot be started: {error}");
        }
        spawned.is_ok()
    }

    /// The thread that fetches definitions and mirrors. One thread does both, so that what it fetches is never older
    /// than what it knows to have mirrored.
    fn keep_details(&self) {
        let mut mirrors = mirror::load(&*self.store);
        let mut fetched = 0;
        loop {
            if fetched >= MANY_DEFINITIONS && self.details.lock().fetch.is_empty() {
                memory::give_back();
                fetched = 0;
            }
            let mut details = self.details.lock();
            while !self.stopping() && details.fetch.is_empty() && details.mirror.is_empty() {
                self.details_wake.wait(&mut details);
            }
            if self.stopping() {
                return;
            }
            let mirror = std::mem::take(&mut details.mirror);
            for id in std::mem::take(&mut details.forget) {
                mirrors.remove(&id);
            }
            let mut fetch = Vec::new();
            while fetch.len() < DEFINITIONS_PER_TRANSACTION
                && let Some(id) = details.fetch.pop_first()
            {
                fetch.push(id);
            }
            drop(details);
            fetched += fetch.len();
            let outcome =
                self.mirror_all(&mirror, &mut mirrors).and_then(|()| self.fetch_definitions(&fetch, &mut mirrors));
            let failed = outcome.is_err();
            self.report(Writer::Details, outcome);
            if failed {
                let mut details = self.details.lock();
                details.mirror.extend(mirror);
                details.fetch.extend(fetch);
                let deadline = Instant::now() + RETRY;
                while !self.stopping() && !self.details_wake.wait_until(&mut details, deadline).timed_out() {}
            }
        }
    }

    /// The thread that saves, and looks at the directory's space.
    fn save(&self) {
        loop {
            self.save_shown();
            self.board.directory(self.free_space());
            let mut sleep = self.sleep.lock();
            let deadline = Instant::now() + SAVE_INTERVAL;
            while !self.stopping() && !self.sleep_wake.wait_until(&mut sleep, deadline).timed_out() {}
            if self.stopping() {
                return;
            }
        }
    }

    fn save_shown(&self) {
        self.report(Writer::Saver, self.ledger.save_shown());
    }

    fn report(&self, writer: Writer, outcome: Result<(), StoreError>) {
        if let Err(error) = &outcome {
            log::debug!("not stored: {error}");
        }
        self.board.store(writer, outcome.map_err(|error| error.to_string()));
    }

    fn free_space(&self) -> Result<(), String> {
        let path = &self.settings.state_directory;
        let status = nix::sys::statvfs::statvfs(path)
            .map_err(|error| format!("{} cannot be looked at: {}", path.display(), io::Error::from(error)))?;
        if status.blocks_available().saturating_mul(status.fragment_size()) < SPACE_MIN {
            return Err(format!("less than 64 MiB are free on the disk of {}; free some space", path.display()));
        }
        Ok(())
    }
}
