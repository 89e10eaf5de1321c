//! One life of the program: all its parts but the mount, on a store that kills it at one commit.

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::process::{self, exit};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use instancefs::block::BlockBackend;
use instancefs::block::backends::Backends;
use instancefs::block::directory::DirectoryBackend;
use instancefs::block::local::HostDevices;
use instancefs::hypervisor::target::Target;
use instancefs::image::import::Policy;
use instancefs::inventory::Inventory;
use instancefs::model::Class;
use instancefs::model::backend::Kind;
use instancefs::model::caller::Caller;
use instancefs::model::change::InstanceChange;
use instancefs::model::instance::{State, Word};
use instancefs::model::reason::Reason;
use instancefs::privilege::Privilege;
use instancefs::store::power_loss::Moment;
use instancefs::store::sqlite::SqliteStore;
use instancefs::store::{Change, Committed, Compare, Record, Revision, Store, StoreError};
use instancefs::workflow::events::EventLog;
use instancefs::workflow::ledger::Ledger;
use instancefs::workflow::reconcile::{self, Reconciler};
use instancefs::workflow::request::{Request, Submission, Wait};
use instancefs::workflow::uptime::SystemClock;
use instancefs::workflow::{self, Engine, Parts, Settings};
use nix::unistd::User;
use parking_lot::Mutex;
use serde_json::{Value, json};
use uuid::Uuid;

/// The variable that tells a process that it is a life, and which.
pub const LIFE: &str = "INSTANCEFS_TEST_LIFE";

const DEADLINE: Duration = Duration::from_secs(240);

/// What a life is to do.
pub struct Order<'a> {
    pub directory: PathBuf,
    pub image: Uuid,
    pub id: Uuid,
    /// Written to the state; without one it only recovers.
    pub word: Option<&'a str>,
    pub kill: Option<(u64, Moment)>,
}

impl<'a> Order<'a> {
    pub fn to_text(&self) -> String {
        let (at, before) = self.kill.map_or((0, false), |(at, moment)| (at, moment == Moment::Before));
        let (directory, word) = (self.directory.display(), self.word.unwrap_or("-"));
        format!("{} {} {word} {at} {before} {directory}", self.image, self.id)
    }

    pub fn from_text(text: &'a str) -> Option<Order<'a>> {
        let mut words = text.splitn(6, ' ');
        let image = words.next()?.parse().ok()?;
        let id = words.next()?.parse().ok()?;
        let word = words.next().filter(|word| *word != "-");
        let at = words.next()?.parse().ok()?;
        let moment = if words.next()? == "true" { Moment::Before } else { Moment::After };
        let directory = PathBuf::from(words.next()?);
        Some(Order { directory, image, id, word, kill: Some((at, moment)).filter(|_| at > 0) })
    }
}

/// Kills the process at one commit of the engine.
struct Deadly {
    inner: SqliteStore,
    kill: Option<(u64, Moment)>,
    commits: Mutex<Option<u64>>,
}

impl Deadly {
    /// Commits count from now on.
    fn arm(&self) {
        *self.commits.lock() = Some(0);
    }
}

fn die() -> ! {
    // The whole process, as with `kill -9`.
    let _killed = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL);
    process::abort()
}

impl Store for Deadly {
    fn get(&self, key: &str) -> Result<Option<Record>, StoreError> {
        self.inner.get(key)
    }

    fn list(&self, prefix: &str) -> Result<Vec<Record>, StoreError> {
        self.inner.list(prefix)
    }

    fn transact(&self, compares: &[Compare], changes: &[Change]) -> Result<Revision, StoreError> {
        let is_counted = thread::current().name().is_some_and(|name| ["engine", "operation"].contains(&name));
        let mut commits = self.commits.lock();
        let number = commits.as_mut().filter(|_| is_counted).map(|count| {
            *count += 1;
            *count
        });
        drop(commits);
        match self.kill {
            Some((at, Moment::Before)) if number == Some(at) => die(),
            Some((at, Moment::After)) if number == Some(at) => {
                self.inner.transact(compares, changes)?;
                die()
            }
            Some(_) | None => self.inner.transact(compares, changes),
        }
    }

    fn watch(&self, prefix: &str) -> Receiver<Committed> {
        self.inner.watch(prefix)
    }
}

fn must<T, E: Debug>(result: Result<T, E>, what: &str) -> T {
    result.unwrap_or_else(|error| {
        eprintln!("{what}: {error:?}");
        exit(1)
    })
}

/// Does what the order says, prints what there is then, and ends without ending anything else.
pub fn live(order: &Order<'_>) -> ! {
    let directory = &order.directory;
    let inner = must(SqliteStore::open(&directory.join("store.sqlite")), "the store");
    let store = Arc::new(Deadly { inner, kill: order.kill, commits: Mutex::default() });
    let target = must(Target::parse("embed", directory), "the target");
    target.learn(Path::new(env!("CARGO_BIN_EXE_instancefs")));
    let hypervisor = must(target.open(directory), "the hypervisor");
    let incoming = hypervisor.events();
    must(hypervisor.connect(), "the connection");
    let inventory = Arc::new(Inventory::new());
    inventory.apply(must(workflow::load(&*store), "the records"));
    let ledger = Arc::new(must(Ledger::open(store.clone(), inventory.clone()), "the ledger"));
    let events = must(EventLog::open(directory.join("events"), inventory.clone()), "the events");
    let guest_group = User::from_name("libvirt-qemu").ok().flatten().map(|user| user.gid.as_raw());
    let block: Arc<dyn BlockBackend> = Arc::new(DirectoryBackend::new(directory.join("disks"), guest_group));
    let reconciler = Reconciler::start(
        ledger.clone(),
        store.clone(),
        hypervisor.clone(),
        events.clone(),
        incoming,
        reconcile::Settings { state_directory: directory.clone(), interval: DEADLINE, owner: 0, read_only: false },
    );
    must(reconciler.pass(), "the first pass");
    if order.word.is_none() {
        // What it recovers begins with the engine.
        store.arm();
    }
    let backends = Backends::new(Kind::Directory, block.clone());
    let local = Arc::new(HostDevices::new(directory.join("exports"), Privilege::of_this_process()));
    let parts = Parts { ledger, hypervisor, block: block.clone(), backends, local, reconciler, events };
    let settings = Settings {
        settle: DEADLINE,
        state_directory: directory.clone(),
        read_only: false,
        projects: Vec::new(),
        guest_group,
        import: Policy::new(directory.join("import")),
        retention: None,
        clock: Arc::new(SystemClock),
        drafts_per_user: 100,
        device_interval: Duration::from_secs(86_400),
        console_token_lifetime: DEADLINE,
        copies_at_once: 1,
        shelved_offload_time: None,
        shelf_grace: DEADLINE,
    };
    let engine = must(Engine::start(parts, settings), "the engine");
    let ask = |request: Request| -> Result<(), Reason> {
        let (answer, answered) = channel();
        engine.submit(Submission {
            caller: Caller::daemon(),
            file: "state".to_owned(),
            request,
            wait: Wait::Settle,
            done: Box::new(move |result| drop(answer.send(result))),
        });
        must(answered.recv_timeout(DEADLINE), "an answer")
    };
    let change = |change| ask(Request::Instance { id: order.id, changes: vec![change] });
    let is_idle = || inventory.instance(order.id).is_none_or(|instance| instance.task.is_none());
    wait(is_idle);
    let mut result = Ok(());
    if let Some(word) = order.word {
        let word = must(Word::parse(word), "the word");
        if inventory.instance(order.id).is_none() && word == Word::State(State::Active) {
            must(ask(Request::MakeDraft { class: Class::Instance, id: order.id }), "a draft");
            must(change(InstanceChange::Image(order.image)), "its image");
            must(change(InstanceChange::MemoryBytes(192 << 20)), "its memory");
        }
        store.arm();
        result = change(InstanceChange::State(word));
        wait(is_idle);
    }
    println!("SEEN {}", seen(order, &inventory, &*block, &result));
    // Nothing is ended: the guest runs on.
    exit(0)
}

fn wait(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        if Instant::now() > deadline {
            eprintln!("waited in vain for the end of an operation");
            exit(1);
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// The state, and which recorded disks and copies are not there.
fn seen(order: &Order<'_>, inventory: &Inventory, block: &dyn BlockBackend, result: &Result<(), Reason>) -> Value {
    let Some(instance) = inventory.instance(order.id) else { return json!({ "state": "gone", "lost": [] }) };
    let disks = instance.record.disks.iter().filter(|disk| block.open(disk).is_err());
    let mut lost: Vec<_> = disks.map(|disk| disk.reference.clone()).collect();
    for copy in instance.record.shelf.iter().flat_map(|shelf| &shelf.copies) {
        let file = copy.of.disk.reference.rsplit('/').next().unwrap_or_default();
        let name = format!("shelf/{}/{}-{file}", order.id, copy.of.operation);
        if !order.directory.join(&name).exists() {
            lost.push(name);
        }
    }
    json!({
        "state": instance.observed().state.word(),
        "lost": lost,
        "answer": format!("{result:?}"),
        "last_error": instance.record.errors.last().map(|line| line.reason.clone()),
        "disks": instance.record.disks.len(),
    })
}
