//! One life of the daemon around the reconciler, with a host, a store and a log that tests can spoil.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::{Duration, Instant};

use instancefs::hypervisor::Hypervisor;
use instancefs::hypervisor::simulated::SimulatedHypervisor;
use instancefs::inventory::{Addresses, Health, Instance, Inventory, Object, Update};
use instancefs::model::instance::State;
use instancefs::model::protection::{Level, Lock};
use instancefs::model::record::InstanceRecord;
use instancefs::store::sqlite::SqliteStore;
use instancefs::store::{self, Committed, Compare, Record, Revision, Store, StoreError};
use instancefs::workflow::events::EventLog;
use instancefs::workflow::ledger::Ledger;
use instancefs::workflow::reconcile::{Reconciler, Settings};
use serde_json::{Value, json};
use uuid::Uuid;

pub const PATIENCE: Duration = Duration::from_secs(20);

/// A store whose disk can be full.
pub struct Disk {
    pub store: SqliteStore,
    pub full: AtomicBool,
}

impl Store for Disk {
    fn get(&self, key: &str) -> Result<Option<Record>, StoreError> {
        self.store.get(key)
    }
    fn list(&self, prefix: &str) -> Result<Vec<Record>, StoreError> {
        self.store.list(prefix)
    }
    fn transact(&self, compares: &[Compare], changes: &[store::Change]) -> Result<Revision, StoreError> {
        if self.full.load(Ordering::Acquire) { Err(StoreError::Full) } else { self.store.transact(compares, changes) }
    }
    fn watch(&self, prefix: &str) -> Receiver<Committed> {
        self.store.watch(prefix)
    }
}

/// One life of the daemon, as far as these tests need it.
pub struct World {
    pub directory: Arc<tempfile::TempDir>,
    pub hypervisor: Arc<SimulatedHypervisor>,
    pub store: Arc<Disk>,
    pub ledger: Arc<Ledger>,
    pub events: Arc<EventLog>,
    pub reconciler: Arc<Reconciler>,
}

impl World {
    pub fn new() -> World {
        let directory = Arc::new(tempfile::tempdir().unwrap());
        let hypervisor = Arc::new(SimulatedHypervisor::open(&directory.path().join("host")).unwrap());
        World::on(directory, hypervisor, Duration::from_secs(3600), false)
    }

    pub fn on(
        directory: Arc<tempfile::TempDir>,
        hypervisor: Arc<SimulatedHypervisor>,
        interval: Duration,
        read_only: bool,
    ) -> World {
        let incoming = hypervisor.events();
        hypervisor.connect().unwrap();
        let state = directory.path().join("state");
        std::fs::create_dir_all(state.join("consoles")).unwrap();
        let store = SqliteStore::open(&state.join("store.db")).unwrap();
        let store = Arc::new(Disk { store, full: AtomicBool::new(false) });
        let inventory = Arc::new(Inventory::new());
        let loaded = store.list("instances/").unwrap().into_iter().map(|stored| {
            let id = stored.key.strip_prefix("instances/").unwrap().parse().unwrap();
            let record: InstanceRecord = serde_json::from_slice(&stored.value).unwrap();
            let domain = record.seen.clone();
            Update::Put(Object::Instance(Arc::new(Instance {
                id,
                record,
                domain,
                addresses: Addresses::default(),
                task: None,
            })))
        });
        inventory.apply(loaded.collect());
        let ledger = Arc::new(Ledger::open(Arc::clone(&store) as Arc<dyn Store>, Arc::clone(&inventory)).unwrap());
        let events = EventLog::open(state.join("events"), inventory).unwrap();
        let reconciler = Reconciler::start(
            Arc::clone(&ledger),
            Arc::clone(&store) as Arc<dyn Store>,
            Arc::clone(&hypervisor) as Arc<dyn Hypervisor>,
            Arc::clone(&events),
            incoming,
            Settings { state_directory: state, interval, owner: 0, read_only },
        );
        World { directory, hypervisor, store, ledger, events, reconciler }
    }

    /// The next life of the daemon, on the same host and state.
    pub fn again(self) -> World {
        self.reconciler.stop();
        World::on(Arc::clone(&self.directory), Arc::clone(&self.hypervisor), Duration::from_secs(3600), false)
    }

    pub fn control(&self, command: Value) -> Value {
        let answer = self.hypervisor.control(command.clone());
        assert_eq!(answer["ok"], true, "{command}: {answer}");
        answer
    }

    pub fn define_with(&self, name: &str, extra: &str) -> Uuid {
        let xml = format!(
            "<domain type='kvm'><name>{name}</name><memory unit='KiB'>524288</memory><vcpu>2</vcpu>{extra}</domain>"
        );
        let id = self.control(json!({ "do": "define", "xml": xml }))["uuid"].as_str().unwrap().parse().unwrap();
        self.until("it is defined here too", || self.instance(id).is_some_and(|it| it.record.definition.is_some()));
        id
    }

    pub fn define(&self, name: &str) -> Uuid {
        self.define_with(name, "")
    }

    pub fn on_domain(&self, verb: &str, id: Uuid) {
        self.control(json!({ "do": verb, "uuid": id }));
    }

    pub fn inventory(&self) -> &Arc<Inventory> {
        self.ledger.inventory()
    }

    pub fn instance(&self, id: Uuid) -> Option<Arc<Instance>> {
        self.inventory().instance(id)
    }

    pub fn health(&self) -> Health {
        self.inventory().health()
    }

    pub fn state(&self, id: Uuid) -> (State, String) {
        let observed = self.instance(id).unwrap().observed();
        (observed.state, observed.reason)
    }

    pub fn is(&self, id: Uuid, state: State) {
        self.until(&format!("it is {}", state.word()), || {
            self.instance(id).is_some_and(|it| it.observed().state == state)
        });
    }

    pub fn edit(&self, id: Uuid, edit: impl FnOnce(&mut InstanceRecord)) {
        let edited = self.ledger.transact(|batch| {
            let mut instance = (*batch.instance(id).unwrap()).clone();
            edit(&mut instance.record);
            batch.put(Object::Instance(Arc::new(instance)));
        });
        edited.unwrap();
    }

    pub fn lock(&self, id: Uuid, reason: &str) {
        let lock = Lock { by: "alice".to_owned(), at: 7, level: Level::Admin, reason: reason.to_owned() };
        self.edit(id, |record| record.protection.lock = Some(lock));
    }

    pub fn xml(&self, id: Uuid) -> String {
        self.hypervisor.definition(id).unwrap()
    }

    pub fn until(&self, what: &str, condition: impl Fn() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition() {
            assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
            thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn calls(&self, call: &str) -> u64 {
        self.control(json!({ "do": "calls" }))["calls"][call].as_u64().unwrap_or(0)
    }

    /// `what from to` of all entries of an instance.
    pub fn logged(&self, id: Uuid) -> Vec<String> {
        self.events.flush();
        let text = std::fs::read_to_string(self.events.path()).unwrap();
        let entries = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let word = |value: &Value| value.as_str().unwrap().to_owned();
        entries
            .filter(|entry| entry["uuid"] == id.to_string())
            .inspect(|entry| assert_eq!((&entry["login"], &entry["uid"]), (&json!("libvirt"), &json!(0))))
            .map(|entry| format!("{} {} {}", word(&entry["what"]), word(&entry["from"]), word(&entry["to"])))
            .collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.hypervisor.control(json!({ "do": "release_all" }));
        self.hypervisor.control(json!({ "do": "release" }));
        self.reconciler.stop();
    }
}
