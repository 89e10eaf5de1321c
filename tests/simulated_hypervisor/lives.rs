//! What outlives the process that was connected.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::TryRecvError;
use std::thread;

use instancefs::hypervisor::simulated::SimulatedHypervisor;
use instancefs::hypervisor::{Event, Hypervisor, HypervisorError};
use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;

use crate::lab::{DEADLINE, Lab, connect, wait_until, xml};

#[test]
fn a_host_survives_being_reopened() {
    let (lab, uuid) = Lab::with_domain("a");
    lab.hypervisor.start(uuid).unwrap();
    lab.ok(json!({ "do": "guest", "uuid": uuid, "ignores_acpi": true }));
    let (identity, domains) = (lab.hypervisor.identity().unwrap(), lab.hypervisor.domains().unwrap());
    let Lab { hypervisor, events, directory } = lab;
    assert!(matches!(SimulatedHypervisor::open(directory.path()).map(|_| ()), Err(HypervisorError::Unreachable(_))));
    drop(hypervisor);
    assert!(events.try_iter().count() > 0 && events.try_recv() == Err(TryRecvError::Disconnected));
    let (hypervisor, _events) = connect(directory.path());
    assert_eq!(hypervisor.identity().unwrap(), identity);
    assert_eq!(hypervisor.domains().unwrap(), domains);
    assert_eq!(identity.uri, format!("simulated:{}", directory.path().display()));
}

const KILLED: &str = "INSTANCEFS_TEST_KILLED_HOST";

/// The child process of the test below; started otherwise it has nothing to do.
#[test]
fn process_to_be_killed() {
    let Some(directory) = std::env::var_os(KILLED) else { return };
    let (_hypervisor, _events) = connect(Path::new(&directory));
    eprintln!("connected");
    loop {
        thread::park();
    }
}

#[test]
fn guests_outlive_a_killed_process() {
    let directory = TempDir::new().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "lives::process_to_be_killed", "--nocapture"])
        .env(KILLED, directory.path())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let connected = BufReader::new(child.stderr.take().unwrap()).lines().next().unwrap().unwrap();
    assert_eq!(connected, "connected");
    let socket = UnixStream::connect(directory.path().join("control")).unwrap();
    let mut answers = BufReader::new(socket.try_clone().unwrap()).lines();
    let mut say = |command: Value| -> Value {
        (&socket).write_all(format!("{command}\n").as_bytes()).unwrap();
        serde_json::from_str(&answers.next().unwrap().unwrap()).unwrap()
    };
    let uuid = Uuid::new_v4();
    assert_eq!(say(json!({ "do": "define", "xml": xml("a", uuid) }))["uuid"], json!(uuid));
    assert_eq!(say(json!("nonsense"))["ok"], false);
    assert_eq!(say(json!({ "do": "start", "uuid": uuid }))["ok"], true);
    say(json!({ "do": "guest", "uuid": uuid, "acpi_delay_ms": 500 }));
    assert_eq!(say(json!({ "do": "shutdown", "uuid": uuid }))["ok"], true);
    child.kill().unwrap();
    child.wait().unwrap();

    // The socket that the killed one left is replaced, and the guest goes on with its shutdown.
    let (hypervisor, _events) = connect(directory.path());
    UnixStream::connect(directory.path().join("control")).unwrap();
    wait_until("the guest has shut down", || hypervisor.domain(uuid).unwrap().unwrap().reason == "shutdown");
}

#[test]
fn a_daemon_that_is_down_stays_down_over_a_restart_and_comes_back_by_itself() {
    let (lab, uuid) = Lab::with_domain("a");
    lab.ok(json!({ "do": "disconnect" }));
    let Lab { hypervisor, events: _, directory } = lab;
    drop(hypervisor);
    let hypervisor = SimulatedHypervisor::open(directory.path()).unwrap();
    let events = hypervisor.events();
    assert!(matches!(hypervisor.ping(), Err(HypervisorError::Unreachable(_))));
    assert!(matches!(hypervisor.connect(), Err(HypervisorError::Unreachable(_))));
    hypervisor.control(json!({ "do": "reconnect" }));
    assert_eq!(events.recv_timeout(DEADLINE), Ok(Event::Connected));
    assert_eq!(hypervisor.domain(uuid).unwrap().unwrap().name, "a");
}
