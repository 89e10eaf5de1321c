//! A simulated host in a directory of its own, and what the tests ask of it again and again.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use instancefs::hypervisor::simulated::SimulatedHypervisor;
use instancefs::hypervisor::{Domain, Event, Hypervisor, HypervisorError, PowerState};
use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;

pub const DEADLINE: Duration = Duration::from_secs(20);

pub struct Lab {
    pub hypervisor: Arc<SimulatedHypervisor>,
    pub events: Receiver<Event>,
    pub directory: TempDir,
}

impl Lab {
    pub fn new() -> Lab {
        let directory = TempDir::new().unwrap();
        let (hypervisor, events) = connect(directory.path());
        assert_eq!(events.recv_timeout(DEADLINE), Ok(Event::Connected));
        Lab { hypervisor, events, directory }
    }

    pub fn with_domain(name: &str) -> (Lab, Uuid) {
        let lab = Lab::new();
        let uuid = lab.define(name);
        (lab, uuid)
    }

    pub fn define(&self, name: &str) -> Uuid {
        let uuid = Uuid::new_v4();
        self.hypervisor.define(&xml(name, uuid)).unwrap();
        assert_eq!(self.next_event(), Event::Changed(uuid));
        uuid
    }

    pub fn ok(&self, command: Value) -> Value {
        let answer = self.hypervisor.control(command);
        assert_eq!(answer["ok"], true, "{answer}");
        answer
    }

    pub fn next_event(&self) -> Event {
        self.events.recv_timeout(DEADLINE).expect("an event comes")
    }

    pub fn no_event(&self) {
        assert_eq!(self.events.try_recv(), Err(TryRecvError::Empty));
    }

    pub fn domain(&self, uuid: Uuid) -> Domain {
        self.hypervisor.domain(uuid).unwrap().expect("the domain exists")
    }

    pub fn power(&self, uuid: Uuid) -> (PowerState, String) {
        let domain = self.domain(uuid);
        (domain.power, domain.reason)
    }

    pub fn guest(&self, uuid: Uuid) -> Value {
        let list = self.ok(json!({ "do": "list" }));
        let guests = list["guests"].as_array().unwrap();
        guests.iter().find(|guest| guest["domain"]["uuid"] == json!(uuid)).expect("known").clone()
    }

    /// Makes a call in a thread of its own, and returns when the daemon has taken it.
    pub fn taken<T: Send + 'static>(
        &self,
        call: impl FnOnce(&SimulatedHypervisor) -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let pending = || self.ok(json!({ "do": "calls" }))["pending"].as_array().unwrap().len();
        let before = pending();
        let hypervisor = Arc::clone(&self.hypervisor);
        let thread = thread::spawn(move || call(&hypervisor));
        wait_until("the call is taken", || pending() > before);
        thread
    }
}

pub fn connect(directory: &Path) -> (Arc<SimulatedHypervisor>, Receiver<Event>) {
    let hypervisor = SimulatedHypervisor::open(directory).unwrap();
    let events = hypervisor.events();
    hypervisor.connect().unwrap();
    (Arc::new(hypervisor), events)
}

pub fn xml(name: &str, uuid: Uuid) -> String {
    format!("<domain type='kvm'><name>{name}</name><uuid>{uuid}</uuid><vcpu>1</vcpu></domain>")
}

pub fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < DEADLINE, "{what}: not within {DEADLINE:?}");
        thread::sleep(Duration::from_millis(2));
    }
}

pub fn running(reason: &str) -> (PowerState, String) {
    (PowerState::Running, reason.to_owned())
}

pub fn off(reason: &str) -> (PowerState, String) {
    (PowerState::ShutOff, reason.to_owned())
}

pub fn paused(reason: &str) -> (PowerState, String) {
    (PowerState::Paused, reason.to_owned())
}

#[track_caller]
pub fn invalid<T: std::fmt::Debug>(answer: Result<T, HypervisorError>) {
    assert!(matches!(answer, Err(HypervisorError::InvalidState(_))), "{answer:?}");
}

/// What the call in the thread answered.
pub fn joined<T>(thread: JoinHandle<T>) -> T {
    wait_until("the call returns", || thread.is_finished());
    thread.join().unwrap()
}
