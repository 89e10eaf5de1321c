//! Ten thousand domains.

mod support;

use std::fs;

use serde_json::json;
use support::{Daemon, wait_until};

#[test]
fn ten_thousand_domains_appear_at_start_and_at_run_time_and_can_be_used() {
    let mut daemon = Daemon::start(&[]);
    daemon.host_does(json!({"do": "bulk", "count": 10_000, "prefix": "vm"}));
    let lines =
        |daemon: &Daemon| fs::read_to_string(daemon.path("summary/instances")).expect("readable").lines().count();
    wait_until("all are in the summary", || lines(&daemon) == 10_001);
    let listed = |daemon: &Daemon, directory: &str| fs::read_dir(daemon.path(directory)).expect("listed").count();
    wait_until("all are listed", || listed(&daemon, "instances") == 10_000);
    wait_until("all have names", || listed(&daemon, "by-name/instances") == 10_000);
    wait_until("all are stopped", || listed(&daemon, "by-state/instances/stopped") == 10_000);
    assert_eq!(daemon.read("by-name/instances/vm-7777/state"), "stopped");
    assert!(daemon.stop(), "a clean end");
    daemon.spawn();
    assert_eq!(listed(&daemon, "instances"), 10_000, "all are back with the mount");
    daemon.set("by-name/instances/vm-7777/state", "active");
    assert_eq!(daemon.read("by-name/instances/vm-7777/state"), "active");
}
