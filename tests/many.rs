//! Ten thousand domains.

mod support;

use std::fs;
use std::time::{Duration, Instant};

use serde_json::json;
use support::{Daemon, wait_until};

const MANY: usize = 10_000;
/// A generous limit of the daemon's memory, in KiB.
const MEMORY: u64 = 400 << 10;

fn listed(daemon: &Daemon, directory: &str) -> usize {
    fs::read_dir(daemon.path(directory)).expect("listed").count()
}

/// A line of the daemon's `/proc/<pid>/status`, in KiB.
fn memory(daemon: &Daemon, line: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).expect("a status");
    let line = status.lines().find_map(|text| text.strip_prefix(line)).expect("the line");
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().expect("a number")
}

/// The daemon's processor time so far.
fn processor_time(daemon: &Daemon) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).expect("a stat");
    let (_, fields) = stat.rsplit_once(") ").expect("fields");
    let ticks: u64 = fields.split(' ').skip(11).take(2).map(|field| field.parse::<u64>().expect("a number")).sum();
    Duration::from_millis(ticks * 10)
}

fn report(daemon: &Daemon, what: &str, begun: Instant) {
    println!(
        "{what}: {:?}; memory {} KiB, at most {} KiB; processor {:?}",
        begun.elapsed(),
        memory(daemon, "VmRSS"),
        memory(daemon, "VmHWM"),
        processor_time(daemon)
    );
}

fn all_are_there(daemon: &Daemon) {
    let lines = || fs::read_to_string(daemon.path("summary/instances")).expect("readable").lines().count();
    let begun = Instant::now();
    wait_until("all are in the summary", || lines() == MANY + 1);
    println!("all in the summary after another {:?}", begun.elapsed());
    for directory in ["instances", "by-name/instances", "by-state/instances/stopped"] {
        wait_until(directory, || listed(daemon, directory) == MANY);
    }
}

#[test]
fn ten_thousand_domains_appear_at_start_and_at_run_time_and_can_be_used() {
    let mut daemon = Daemon::start(&[]);
    report(&daemon, "empty", Instant::now());
    let begun = Instant::now();
    daemon.host_does(json!({"do": "calls", "reset": true}));
    daemon.host_does(json!({"do": "bulk", "count": MANY, "prefix": "vm"}));
    println!("defined: {:?}", begun.elapsed());
    all_are_there(&daemon);
    report(&daemon, "all appeared at run time", begun);
    let calls = daemon.host_does(json!({"do": "calls"}))["calls"].clone();
    println!("calls: {calls}");
    let count = |call: &str| calls[call].as_u64().unwrap_or(0);
    assert!((1..10).contains(&count("domains")), "passes over all: {}", count("domains"));
    assert!(count("domain") < 100, "questions about one: {}", count("domain"));
    assert_eq!(daemon.read("by-name/instances/vm-7777/state"), "stopped");

    let begun = Instant::now();
    for entry in fs::read_dir(daemon.path("instances")).expect("listed") {
        let state = fs::read_to_string(entry.expect("an entry").path().join("state")).expect("readable");
        assert_eq!(state, "stopped\n");
    }
    report(&daemon, "every state read", begun);

    let begun = Instant::now();
    assert!(daemon.stop(), "a clean end");
    println!("ended: {:?}", begun.elapsed());
    let begun = Instant::now();
    daemon.spawn();
    assert_eq!(listed(&daemon, "instances"), MANY, "all are back with the mount");
    report(&daemon, "started with all of them", begun);
    let begun = Instant::now();
    daemon.set("by-name/instances/vm-7777/state", "active");
    assert_eq!(daemon.read("by-name/instances/vm-7777/state"), "active");
    report(&daemon, "one of them started", begun);
    assert!(memory(&daemon, "VmHWM") < MEMORY, "the daemon takes {} KiB", memory(&daemon, "VmHWM"));
}
