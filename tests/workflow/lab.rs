//! A world that outlives the program (store, hypervisor, disks), and the lives of the program in it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use instancefs::block::BlockBackend;
use instancefs::block::backends::Backends;
use instancefs::block::local::LocalDevices;
use instancefs::hypervisor::simulated::SimulatedHypervisor;
use instancefs::hypervisor::{Domain, Hypervisor, PowerState};
use instancefs::image::import::Policy;
use instancefs::inventory::{Image, Instance, Inventory, Object, Task};
use instancefs::model::Class;
use instancefs::model::backend::Kind;
use instancefs::model::caller::{Caller, NO_PROJECT, Ownership};
use instancefs::model::change::{ImageChange, InstanceChange};
use instancefs::model::image::Format;
use instancefs::model::instance::{State, Word};
use instancefs::model::reason::Reason;
use instancefs::model::record::ImageRecord;
use instancefs::model::volume::change::VolumeChange;
use instancefs::store::Store;
use instancefs::store::sqlite::SqliteStore;
use instancefs::workflow::events::EventLog;
use instancefs::workflow::ledger::Ledger;
use instancefs::workflow::reconcile::{self, Reconciler};
use instancefs::workflow::request::{Request, Submission, Wait};
use instancefs::workflow::uptime::{Clock, SystemClock};
use instancefs::workflow::{self, Engine, Parts, Settings};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;

use crate::devices::TestDevices;
use crate::disks::Disks;

pub const DEADLINE: Duration = Duration::from_secs(20);
/// How long the bin keeps.
pub const RETENTION: Duration = Duration::from_secs(7 * 24 * 3600);
pub const IMAGE_BYTES: u64 = 1 << 30;

pub fn root() -> Caller {
    Caller { uid: 0, gid: 0, groups: Vec::new(), login: "root".to_owned(), is_mounter: false }
}

pub fn alice() -> Caller {
    Caller { uid: 1000, gid: 1000, groups: Vec::new(), login: "alice".to_owned(), is_mounter: false }
}

pub fn bob() -> Caller {
    Caller { uid: 1001, gid: 1001, groups: Vec::new(), login: "bob".to_owned(), is_mounter: false }
}

pub struct World {
    pub directory: TempDir,
    pub store: Arc<dyn Store>,
    pub hypervisor: Arc<SimulatedHypervisor>,
    pub disks: Arc<Disks>,
    pub devices: Arc<TestDevices>,
    pub image: Uuid,
}

impl World {
    /// With one active image of 1 GiB, alice's.
    pub fn new() -> World {
        let directory = TempDir::new().unwrap();
        let store = SqliteStore::open(&directory.path().join("store.sqlite")).unwrap();
        World::on(directory, Arc::new(store))
    }

    /// In this directory, with this store.
    pub fn on(directory: TempDir, store: Arc<dyn Store>) -> World {
        let hypervisor = Arc::new(SimulatedHypervisor::open(&directory.path().join("host")).unwrap());
        hypervisor.connect().unwrap();
        std::fs::create_dir(directory.path().join("images")).unwrap();
        let devices = Arc::new(TestDevices::new(directory.path().join("devices")));
        let world = World { directory, store, hypervisor, disks: Arc::default(), devices, image: Uuid::new_v4() };
        let ledger = Ledger::open(world.store.clone(), Arc::default()).unwrap();
        ledger
            .transact(|batch| {
                let image = active_image(world.image, batch.next_number());
                batch.put(Object::Image(Arc::new(image)));
            })
            .unwrap();
        world
    }

    pub fn live(&self) -> Life<'_> {
        self.live_on(self.store.clone(), |_| {})
    }

    /// A life on another view of the store, with other settings.
    pub fn live_on(&self, store: Arc<dyn Store>, set: impl FnOnce(&mut Settings)) -> Life<'_> {
        self.begin_life(store, self.hypervisor.clone(), self.disks.clone(), set)
    }

    /// A life that makes its disks elsewhere.
    pub fn live_with(&self, block: Arc<dyn BlockBackend>) -> Life<'_> {
        self.begin_life(self.store.clone(), self.hypervisor.clone(), block, |_| {})
    }

    /// A life with other views of everything that it works with.
    pub fn begin_life(
        &self,
        store: Arc<dyn Store>,
        hypervisor: Arc<dyn Hypervisor>,
        block: Arc<dyn BlockBackend>,
        set: impl FnOnce(&mut Settings),
    ) -> Life<'_> {
        self.begin_life_on(store, hypervisor, block, self.devices.clone(), set)
    }

    /// The same on another view of the host's block devices too.
    pub fn begin_life_on(
        &self,
        store: Arc<dyn Store>,
        hypervisor: Arc<dyn Hypervisor>,
        block: Arc<dyn BlockBackend>,
        local: Arc<dyn LocalDevices>,
        set: impl FnOnce(&mut Settings),
    ) -> Life<'_> {
        let inventory = Arc::new(Inventory::new());
        inventory.apply(workflow::load(&*store).unwrap());
        let ledger = Arc::new(Ledger::open(store.clone(), inventory.clone()).unwrap());
        let events = EventLog::open(self.directory.path().join("events"), inventory.clone()).unwrap();
        let reconciler = Reconciler::start(
            ledger.clone(),
            store,
            hypervisor.clone(),
            events.clone(),
            hypervisor.events(),
            reconcile::Settings {
                state_directory: self.directory.path().to_owned(),
                interval: DEADLINE,
                owner: 0,
                read_only: false,
            },
        );
        let parts = Parts {
            ledger: ledger.clone(),
            hypervisor,
            backends: Backends::new(Kind::Directory, block.clone()),
            block,
            local,
            reconciler: reconciler.clone(),
            events: events.clone(),
        };
        let mut settings = Settings {
            settle: DEADLINE,
            state_directory: self.directory.path().to_owned(),
            read_only: false,
            projects: vec![2000],
            guest_group: None,
            import: Policy::new(self.directory.path().join("import")),
            retention: Some(RETENTION),
            clock: Arc::new(SystemClock),
            drafts_per_user: 100,
            device_interval: Duration::from_secs(86_400),
            console_token_lifetime: DEADLINE,
            copies_at_once: 2,
            shelved_offload_time: None,
            shelf_grace: DEADLINE,
        };
        set(&mut settings);
        let engine = Engine::start(parts, settings).unwrap();
        Life { world: self, engine, ledger, inventory, reconciler, events }
    }

    pub fn control(&self, command: Value) -> Value {
        let answer = self.hypervisor.control(command);
        assert_eq!(answer["ok"], true, "{answer}");
        answer
    }

    /// Has a call of the hypervisor fail, once.
    pub fn fail(&self, call: &str) {
        self.control(json!({ "do": "fault", "call": call, "mode": "fail", "message": "a test says no", "times": 1 }));
    }

    pub fn domain(&self, id: Uuid) -> Option<Domain> {
        self.hypervisor.domain(id).unwrap()
    }

    pub fn power(&self, id: Uuid) -> PowerState {
        self.domain(id).expect("the domain exists").power
    }

    pub fn calls(&self, call: &str) -> u64 {
        self.control(json!({ "do": "calls" }))["calls"][call].as_u64().unwrap_or(0)
    }

    pub fn is_pending(&self, call: &str) -> bool {
        let answer = self.control(json!({ "do": "calls" }));
        answer["pending"].as_array().unwrap().iter().any(|pending| pending["call"] == call)
    }

    /// The files on the shelf.
    pub fn shelf(&self) -> Vec<PathBuf> {
        let list = |path: PathBuf| {
            let entries = std::fs::read_dir(path).into_iter().flatten();
            entries.map(|entry| entry.unwrap().path()).collect::<Vec<_>>()
        };
        list(self.directory.path().join("shelf")).into_iter().flat_map(list).collect()
    }

    pub fn disk_count(&self) -> usize {
        self.disks.disks.lock().len()
    }
}

/// Clocks that a test sets.
pub struct TestClock {
    now: Mutex<u64>,
    boot: Mutex<String>,
    since_boot: Mutex<Duration>,
}

impl TestClock {
    pub fn new() -> Arc<TestClock> {
        let (now, since_boot) = (Mutex::new(SystemClock.now()), Mutex::new(Duration::from_secs(1000)));
        Arc::new(TestClock { now, boot: Mutex::new("first".to_owned()), since_boot })
    }

    /// Time passes.
    pub fn pass(&self, time: Duration) {
        *self.now.lock() += time.as_secs();
        *self.since_boot.lock() += time;
    }

    /// Somebody sets the wall clock.
    pub fn set(&self, change: impl FnOnce(u64) -> u64) {
        let mut now = self.now.lock();
        *now = change(*now);
    }

    /// The host is off for so long, and boots.
    pub fn reboot(&self, off: Duration) {
        *self.now.lock() += off.as_secs();
        *self.since_boot.lock() = Duration::from_secs(1);
        self.boot.lock().push('!');
    }
}

impl Clock for TestClock {
    fn now(&self) -> u64 {
        *self.now.lock()
    }

    fn boot(&self) -> String {
        self.boot.lock().clone()
    }

    fn since_boot(&self) -> Duration {
        *self.since_boot.lock()
    }
}

pub fn active_image(id: Uuid, number: u64) -> Image {
    let ownership = Ownership { owner: alice().uid, project: NO_PROJECT, generation: 0 };
    let record = ImageRecord {
        disk_format: Some(Format::Qcow2),
        size_bytes: 1 << 20,
        virtual_size_bytes: IMAGE_BYTES,
        sha512: Some("00".to_owned()),
        ..ImageRecord::new(number, "debian".to_owned(), ownership, 1)
    };
    Image { id, record, task: None, data_bytes: 1 << 20 }
}

/// One life of the program.
pub struct Life<'a> {
    pub world: &'a World,
    pub engine: Arc<Engine>,
    pub ledger: Arc<Ledger>,
    pub inventory: Arc<Inventory>,
    pub reconciler: Arc<Reconciler>,
    pub events: Arc<EventLog>,
}

impl Life<'_> {
    pub fn submit(&self, caller: &Caller, request: Request, wait: Wait) -> Receiver<Result<(), Reason>> {
        let (answer, answered) = channel();
        self.engine.submit(Submission {
            caller: caller.clone(),
            file: "state".to_owned(),
            request,
            wait,
            done: Box::new(move |result| drop(answer.send(result))),
        });
        answered
    }

    pub fn ask(&self, caller: &Caller, request: Request) -> Result<(), Reason> {
        self.submit(caller, request, Wait::Settle).recv_timeout(DEADLINE * 2).expect("answered")
    }

    pub fn change(&self, caller: &Caller, id: Uuid, change: InstanceChange) -> Result<(), Reason> {
        self.ask(caller, Request::Instance { id, changes: vec![change] })
    }

    pub fn change_image(&self, caller: &Caller, id: Uuid, change: ImageChange) -> Result<(), Reason> {
        self.ask(caller, Request::Image { id, changes: vec![change] })
    }

    pub fn change_volume(&self, caller: &Caller, id: Uuid, change: VolumeChange) -> Result<(), Reason> {
        self.ask(caller, Request::Volume { id, changes: vec![change] })
    }

    pub fn state(&self, id: Uuid, state: State) -> Result<(), Reason> {
        self.change(&alice(), id, InstanceChange::State(Word::State(state)))
    }

    /// Asks for a state without waiting for the end.
    pub fn begin(&self, id: Uuid, state: State) -> Receiver<Result<(), Reason>> {
        let changes = vec![InstanceChange::State(Word::State(state))];
        self.submit(&alice(), Request::Instance { id, changes }, Wait::Settle)
    }

    pub fn draft(&self) -> Uuid {
        let id = Uuid::new_v4();
        self.ask(&alice(), Request::MakeDraft { class: Class::Instance, id }).unwrap();
        id
    }

    /// Gives a draft its user data, as the document of that name will.
    pub fn tell(&self, id: Uuid, user_data: &str) {
        self.ledger
            .transact(|batch| {
                let mut instance = (*batch.instance(id).unwrap()).clone();
                instance.record.user_data = Some(user_data.into());
                batch.put(Object::Instance(Arc::new(instance)));
            })
            .unwrap();
    }

    /// Several changes as one.
    pub fn change_all(&self, id: Uuid, changes: Vec<InstanceChange>) -> Result<(), Reason> {
        self.change_all_by(&alice(), id, changes)
    }

    pub fn change_all_by(&self, caller: &Caller, id: Uuid, changes: Vec<InstanceChange>) -> Result<(), Reason> {
        self.ask(caller, Request::Instance { id, changes })
    }

    pub fn draft_with_image(&self) -> Uuid {
        let id = self.draft();
        self.change(&alice(), id, InstanceChange::Image(self.world.image)).unwrap();
        id
    }

    /// A running instance.
    pub fn active(&self) -> Uuid {
        let id = self.draft_with_image();
        self.state(id, State::Active).unwrap();
        id
    }

    /// One that is off.
    pub fn stopped(&self) -> Uuid {
        let id = self.draft_with_image();
        self.state(id, State::Stopped).unwrap();
        id
    }

    pub fn instance(&self, id: Uuid) -> Arc<Instance> {
        self.inventory.instance(id).expect("the instance exists")
    }

    pub fn observed(&self, id: Uuid) -> State {
        self.instance(id).observed().state
    }

    pub fn last_error(&self, id: Uuid) -> Option<String> {
        self.instance(id).record.errors.last().map(|line| line.reason.clone())
    }

    pub fn last_task(&self, id: Uuid) -> Arc<Task> {
        let task = self.instance(id).record.last_task.expect("there was a task");
        self.inventory.task(task).expect("the task exists")
    }

    pub fn wait_idle(&self, id: Uuid) {
        until("the instance is idle", || self.inventory.instance(id).is_none_or(|instance| instance.task.is_none()));
    }

    pub fn refresh(&self, id: Uuid) {
        self.reconciler.refresh(id).unwrap();
    }
}

impl Drop for Life<'_> {
    fn drop(&mut self) {
        self.engine.stop();
        self.reconciler.stop();
    }
}

/// Waits for a condition, and fails after a deadline.
pub fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}
