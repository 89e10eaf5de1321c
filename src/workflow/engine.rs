//! The engine's outside: what it is made of, and how the rooms above talk to it. Its thread is in `turn`.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, Sender, bounded, unbounded};
use parking_lot::Mutex;
use uuid::Uuid;

use super::consoles::{self, Consoles};
use super::drafts_data::{DraftData, Drafts};
use super::events::{Entry, EventLog};
use super::gate::Gate;
use super::keeper::{self, Keeper};
use super::kept::{self, Holds};
use super::lanes::Lanes;
use super::ledger::{Ledger, now};
use super::offers::Offers;
use super::operation::{Edit, Fault};
use super::reconcile::Reconciler;
use super::request::{Completion, Submission};
use super::turn::{EngineThread, Inside};
use super::uptime::{Clock, Uptime};
use super::volume::{devices, exporters};
use super::{backends, protector, recovery};
use crate::block::BlockBackend;
use crate::block::backends::Backends;
use crate::block::local::LocalDevices;
use crate::block::shelf::Shelf;
use crate::hypervisor::{ConsoleDevice, Hypervisor};
use crate::image::import::Policy;
use crate::inventory::Instance;
use crate::model::Class;
use crate::model::caller::Caller;
use crate::model::reason::Reason;
use crate::model::record::{ErrorHistory, ErrorLine};
use crate::model::secret::Secret;
use crate::store::StoreError;

/// How long the end waits for operations to notice it.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// What the engine works with.
pub struct Parts {
    /// Where objects change.
    pub ledger: Arc<Ledger>,
    /// Where guests run.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Where the disks of instances are made.
    pub block: Arc<dyn BlockBackend>,
    /// Where volumes are made, and what they may be made of.
    pub backends: Backends,
    /// What makes them devices of this host.
    pub local: Arc<dyn LocalDevices>,
    /// Who shows what the hypervisor says.
    pub reconciler: Arc<Reconciler>,
    /// Who is told of everything.
    pub events: Arc<EventLog>,
}

/// How the engine works.
pub struct Settings {
    /// A waiting request is answered so long after its operation began at the latest.
    pub settle: Duration,
    /// Where images and consoles lie.
    pub state_directory: PathBuf,
    /// Nothing is ever changed.
    pub read_only: bool,
    /// Group ids that are projects.
    pub projects: Vec<u32>,
    /// The group that QEMU runs in, which has to read images.
    pub guest_group: Option<u32>,
    /// What may be imported.
    pub import: Policy,
    /// How long what is moved into the bin is kept there; `None`: until somebody deletes it.
    pub retention: Option<Duration>,
    /// The clocks that say when that is over.
    pub clock: Arc<dyn Clock>,
    /// How many drafts a user may have.
    pub drafts_per_user: usize,
    /// How soon it is noticed that somebody took a block device away: the kernel tells nobody whose it was.
    pub device_interval: Duration,
    /// How long an unused console token holds.
    pub console_token_lifetime: Duration,
    /// How many operations copy a lot of data at once.
    pub copies_at_once: usize,
    /// How long after shelving the disks are removed; `None`: when somebody asks for it.
    pub shelved_offload_time: Option<Duration>,
    /// How long a guest from the shelf has to run before its copies are removed.
    pub shelf_grace: Duration,
}

/// What the engine's thread is told.
pub(super) enum Message {
    Submit(Submission),
    Edit { edit: Edit, done: Sender<Result<(), Fault>> },
    Refused { caller: Caller, object: (Class, Uuid), file: String, reason: Reason, done: Option<Completion> },
    Ended { id: Uuid, result: Result<(), Reason>, cancelled: bool },
    Looked { id: Uuid, result: Result<(), Reason> },
    Pulse(Sender<()>),
    Expire,
    Stop,
}

/// Asks the engine's thread whether it still works off its queue. Keeps nothing of the engine alive.
#[derive(Clone)]
pub struct Pulse(Sender<Message>);

/// What came of that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beat {
    /// It answered.
    Alive,
    /// It did not, in the given time.
    Silent,
    /// It has ended.
    Ended,
}

impl Pulse {
    /// Asks, and waits that long for the answer.
    pub fn ask(&self, patience: Duration) -> Beat {
        let (done, answered) = bounded(1);
        if self.0.send(Message::Pulse(done)).is_err() {
            return Beat::Ended;
        }
        match answered.recv_timeout(patience) {
            Ok(()) => Beat::Alive,
            Err(RecvTimeoutError::Timeout) => Beat::Silent,
            Err(RecvTimeoutError::Disconnected) => Beat::Ended,
        }
    }
}

/// What the engine's threads share.
pub(super) struct Shared {
    pub(super) parts: Parts,
    pub(super) settings: Settings,
    pub(super) gate: Gate,
    pub(super) holds: Holds,
    pub(super) drafts: Drafts,
    pub(super) uptime: Uptime,
    pub(super) lanes: Lanes,
    pub(super) offers: Offers,
    pub(super) shelf: Shelf,
    pub(super) keeper: keeper::Calls,
    pub(super) exporters: exporters::Calls,
    messages: Sender<Message>,
}

impl Shared {
    /// Tells the engine's thread; nobody listens after the end.
    pub(super) fn tell(&self, message: Message) {
        let _ended = self.messages.send(message);
    }

    /// Takes a request; returns at once.
    pub(super) fn submit(&self, submission: Submission) {
        if let Err(error) = self.messages.send(Message::Submit(submission))
            && let Message::Submit(submission) = error.into_inner()
        {
            (submission.done)(Err(Fault::Stopped.reason()));
        }
    }

    /// Has the engine's thread store an edit, together with whatever else is queued. Returns when it is durable.
    pub(super) fn edit(&self, edit: Edit) -> Result<(), Fault> {
        if self.gate.stopping() {
            return Err(Fault::Stopped);
        }
        let (done, stored) = bounded(1);
        self.messages.send(Message::Edit { edit, done }).map_err(|_| Fault::Stopped)?;
        stored.recv().unwrap_or(Err(Fault::Stopped))
    }

    pub(super) fn image_path(&self, image: Uuid) -> PathBuf {
        self.settings.state_directory.join("images").join(image.to_string()).join("data")
    }

    pub(super) fn draft_path(&self, image: Uuid) -> PathBuf {
        self.image_path(image).with_extension("part")
    }

    pub(super) fn console_path(&self, instance: Uuid) -> PathBuf {
        self.settings.state_directory.join("consoles").join(format!("{instance}.log"))
    }
}

/// See the module. Dropping it is [`Engine::stop`].
pub struct Engine {
    shared: Arc<Shared>,
    /// None on a mount that changes nothing: a console changes its guest.
    consoles: Option<Consoles>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Engine {
    /// Starts the engine, and the operations again that an earlier life of the program left unfinished. The inventory
    /// has been filled before, from [`super::recovery::load`].
    pub fn start(parts: Parts, settings: Settings) -> Result<Arc<Engine>, StoreError> {
        let (messages, queue) = unbounded();
        parts.reconciler.know_volumes(parts.backends.clone());
        let uptime = Uptime::load(&parts.ledger, settings.clock.clone());
        let lanes = Lanes::new(settings.copies_at_once);
        let shelf = Shelf::new(settings.state_directory.join("shelf"));
        let (gate, holds, drafts) = (Gate::default(), Holds::default(), Drafts::default());
        let (keeper, exporters) = (keeper::Calls::default(), exporters::Calls::new());
        let shared = Arc::new(Shared {
            parts,
            settings,
            gate,
            holds,
            drafts,
            uptime,
            lanes,
            offers: Offers::default(),
            shelf,
            keeper,
            exporters,
            messages,
        });
        backends::register(&shared)?;
        let mut thread = EngineThread::new(shared.clone());
        if !shared.settings.read_only {
            for unfinished in recovery::unfinished(&shared)? {
                thread.adopt(&unfinished);
            }
        }
        let handle = thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || thread.run(&queue))
            .map_err(|error| StoreError::Failed(format!("no thread for the engine: {error}")))?;
        if !shared.settings.read_only {
            let (keeper, inside) = (Keeper::new(shared.clone()), Inside::of(&shared));
            let spawned = thread::Builder::new().name("keeper".to_owned()).spawn(move || {
                let _inside = inside;
                keeper.run();
            });
            spawned.map_err(|error| StoreError::Failed(format!("no thread for the bin's keeper: {error}")))?;
        }
        let consoles = if shared.settings.read_only {
            None
        } else {
            let started = Consoles::start(
                shared.parts.hypervisor.clone(),
                shared.parts.ledger.inventory().clone(),
                shared.settings.state_directory.join("tokens"),
                shared.settings.console_token_lifetime,
            );
            started.map_err(|error| log::error!("there are no consoles: {error}")).ok()
        };
        backends::start(&shared);
        if !shared.settings.read_only {
            protector::start(&shared);
            kept::start(&shared);
            devices::start(&shared);
            exporters::start(&shared);
        }
        Ok(Arc::new(Engine { shared, consoles, thread: Mutex::new(Some(handle)) }))
    }

    /// A new token for this user: the path of a socket that leads to a console, once.
    ///
    /// # Errors
    ///
    /// Why there is none.
    pub fn offer_console(&self, instance: &Instance, device: ConsoleDevice, uid: u32) -> Result<PathBuf, Reason> {
        match &self.consoles {
            Some(consoles) => consoles.offer(instance, device, uid),
            None if self.shared.settings.read_only => Err(Reason::ReadOnlyMount),
            None => Err(Reason::Failed("the directory for console sockets cannot be used; see the log".to_owned())),
        }
    }

    /// The length of the path that [`Engine::offer_console`] would return, if it returned one.
    pub fn console_path_length(&self, instance: &Instance, device: ConsoleDevice) -> Option<usize> {
        let consoles = self.consoles.as_ref()?;
        consoles::available(instance, device).is_ok().then(|| consoles.path_length())
    }

    /// The key of an offer, with its newline, for the user who made it.
    ///
    /// # Errors
    ///
    /// [`Reason::NotYours`] for everybody else; [`Reason::NotFound`] once it is not shown any more, and where there is none.
    pub fn offer_key(&self, transfer: Uuid, uid: u32) -> Result<Arc<Secret>, Reason> {
        self.shared.offers.key(transfer, uid, self.shared.uptime.seconds())
    }

    /// Takes a request; returns at once.
    pub fn submit(&self, submission: Submission) {
        self.shared.submit(submission);
    }

    /// Remembers a refusal that the tree gave without asking here: for the object, or else for the caller. Returns at
    /// once; it is stored with whatever is stored next.
    pub fn refused(&self, caller: &Caller, object: Option<(Class, Uuid)>, file: &str, reason: &Reason) {
        self.remember(caller, object, file, reason, None);
    }

    /// Like [`Engine::refused`], and answers once `last_error` shows it: who got an errno reads the reason next.
    pub fn refuse(
        &self,
        caller: &Caller,
        object: Option<(Class, Uuid)>,
        file: &str,
        reason: &Reason,
        done: Completion,
    ) {
        self.remember(caller, object, file, reason, Some(done));
    }

    fn remember(
        &self,
        caller: &Caller,
        object: Option<(Class, Uuid)>,
        file: &str,
        reason: &Reason,
        done: Option<Completion>,
    ) {
        record_refusal(&self.shared, caller, object, file, reason);
        match object.filter(|(class, id)| self.shared.parts.ledger.inventory().get(*class, *id).is_some()) {
            Some(object) => self.shared.tell(Message::Refused {
                caller: caller.clone(),
                object,
                file: file.to_owned(),
                reason: reason.clone(),
                done,
            }),
            None => {
                remember_for_caller(&self.shared, caller, line(caller, file, reason));
                if let Some(done) = done {
                    done(Err(reason.clone()));
                }
            }
        }
    }

    /// The data of an image draft; `None` for anything else.
    pub fn draft_data(&self, image: Uuid) -> Option<Arc<DraftData>> {
        let draft = self.shared.parts.ledger.inventory().image(image)?.record.draft;
        draft.map(|_| self.shared.drafts.get(&self.shared, image))
    }

    /// Where an active image's data lies.
    pub fn image_path(&self, image: Uuid) -> PathBuf {
        self.shared.image_path(image)
    }

    /// Where the console of an instance made here is logged.
    pub fn console_path(&self, instance: Uuid) -> PathBuf {
        self.shared.console_path(instance)
    }

    /// Removes finished tasks whose time is over. Returns at once.
    pub fn expire(&self) {
        self.shared.tell(Message::Expire);
    }

    /// What the engine's thread can be asked by whether it still answers.
    pub fn pulse(&self) -> Pulse {
        Pulse(self.shared.messages.clone())
    }

    /// Has the bin looked after now, also what failed lately. Returns at once.
    pub fn keep(&self) {
        self.shared.wake_keeper(true);
    }

    /// Ends the threads. Guests, and operations that are not finished, stay as they are; a thread that hangs in the
    /// hypervisor stays there and does nothing more when it comes back.
    pub fn stop(&self) {
        if let Some(consoles) = &self.consoles {
            consoles.stop();
        }
        self.shared.gate.close();
        self.shared.exporters.look_again();
        self.shared.tell(Message::Stop);
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            log::error!("the engine's thread panicked");
        }
        if !self.shared.gate.drained(END_PATIENCE) {
            log::warn!("some operations hang in the hypervisor; they are looked at again at the next start");
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop();
    }
}

pub(super) fn line(caller: &Caller, file: &str, reason: &Reason) -> ErrorLine {
    ErrorLine {
        time: now(),
        login: caller.login.clone(),
        file: file.to_owned(),
        errno: reason.errno_name().to_owned(),
        reason: reason.to_string(),
    }
}

pub(super) fn remember_for_caller(shared: &Shared, caller: &Caller, line: ErrorLine) {
    let inventory = shared.parts.ledger.inventory();
    let mut history: ErrorHistory = inventory.refusals(caller.uid);
    history.push(line);
    inventory.set_refusals(caller.uid, history);
}

/// Tells `events` and `metrics` of a refusal.
pub(super) fn record_refusal(
    shared: &Shared,
    caller: &Caller,
    object: Option<(Class, Uuid)>,
    file: &str,
    reason: &Reason,
) {
    shared.parts.ledger.inventory().metrics().refused(reason.errno());
    let found = object.and_then(|(class, id)| shared.parts.ledger.inventory().get(class, id));
    let name = found.map(|found| found.name().to_owned()).unwrap_or_default();
    shared.parts.events.record(Entry {
        class: object.map(|(class, _)| class),
        id: object.map(|(_, id)| id),
        name,
        uid: caller.uid,
        login: caller.login.clone(),
        what: file.to_owned(),
        from: String::new(),
        to: String::new(),
        errno: reason.errno_name().to_owned(),
        reason: reason.to_string(),
    });
}
