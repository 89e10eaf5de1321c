//! kill -9 of the daemon, under load.

mod support;

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use support::{Daemon, wait_until};
use uuid::Uuid;

fn rounds() -> u32 {
    if std::env::var_os("INSTANCEFS_LONG").is_some() { 100 } else { 8 }
}

/// Threads of this process in uninterruptible sleep.
fn stuck_threads() -> usize {
    let tasks = fs::read_dir("/proc/self/task").expect("proc").filter_map(Result::ok);
    tasks
        .filter(|task| {
            let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('D'))
        })
        .count()
}

#[test]
fn kill_minus_nine_under_load_leaves_nobody_stuck_and_loses_no_acknowledged_write() {
    let mut daemon = Daemon::start(&[]);
    let id = daemon.domain("survivor");
    daemon.domain_does(id, "start", "active");
    let acknowledged = AtomicU64::new(0);
    let number = Mutex::new(0_u64);
    for round in 0..rounds() {
        let stop = AtomicBool::new(false);
        let root = daemon.root();
        thread::scope(|scope| {
            let (stop, acknowledged, root, number) = (&stop, &acknowledged, &root, &number);
            scope.spawn(move || {
                let path = root.join(format!("instances/{id}/description"));
                while !stop.load(Ordering::Relaxed) {
                    let mut number = number.lock().expect("no panic");
                    *number += 1;
                    if support::write(&path, number.to_string().as_bytes()).is_ok() {
                        acknowledged.store(*number, Ordering::SeqCst);
                    } else {
                        thread::sleep(Duration::from_millis(1));
                    }
                }
            });
            for _ in 0..2 {
                scope.spawn(move || {
                    let path = root.join(format!("instances/{id}/state"));
                    while !stop.load(Ordering::Relaxed) {
                        if fs::read(&path).is_err() {
                            thread::sleep(Duration::from_millis(1));
                        }
                    }
                });
            }
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let draft = root.join(format!("instances/{}", Uuid::new_v4()));
                    if fs::create_dir(&draft).is_ok() {
                        let _ = fs::remove_dir(&draft);
                    } else {
                        thread::sleep(Duration::from_millis(1));
                    }
                }
            });
            let before = acknowledged.load(Ordering::SeqCst);
            wait_until("the load runs", || acknowledged.load(Ordering::SeqCst) > before + 20 + u64::from(round % 7));
            daemon.kill();
            let killed = Instant::now();
            wait_until("nobody is stuck", || stuck_threads() == 0);
            assert!(killed.elapsed() < Duration::from_secs(5), "threads hung in D state");
            stop.store(true, Ordering::Relaxed);
        });
        daemon.spawn();
        let kept: u64 = daemon.read(format!("instances/{id}/description")).parse().expect("a number");
        assert!(kept >= acknowledged.load(Ordering::SeqCst), "an acknowledged write is lost: {kept}");
        wait_until("the guest is seen running", || daemon.read(format!("instances/{id}/state")) == "active");
        let calls = daemon.host_does(json!({"do": "calls"}));
        assert_eq!(calls["calls"]["power_off"].as_u64().unwrap_or(0), 0, "the guest ran on");
    }
}

#[test]
fn a_stale_mount_is_swept_and_a_foreign_one_is_not() {
    let mut daemon = Daemon::start(&[]);
    daemon.kill();
    assert!(fs::metadata(daemon.root()).is_err() || fs::read_dir(daemon.root()).is_err(), "the mount is dead");
    daemon.spawn();
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    let root = daemon.root();
    let here = mounts.lines().filter(|line| line.split(' ').nth(4).map(Path::new) == Some(root.as_path()));
    assert_eq!(here.count(), 1, "the dead mount is gone, not covered");
}

#[test]
fn what_was_done_with_a_stop_under_way_is_finished_after_the_restart() {
    let mut daemon = Daemon::start(&["--settle", "100ms"]);
    let id = daemon.domain("stubborn");
    daemon.domain_does(id, "start", "active");
    daemon.set(format!("instances/{id}/stop_timeout_seconds"), "1");
    daemon.host_does(json!({"do": "guest", "uuid": id.to_string(), "ignores_acpi": true}));
    daemon.set(format!("instances/{id}/state"), "stopped");
    assert_eq!(daemon.read(format!("instances/{id}/task")), "stopping");
    daemon.kill();
    daemon.spawn();
    daemon.wait_state(id, "stopped");
    wait_until("the task ended", || daemon.read(format!("instances/{id}/task")).is_empty());
    assert_eq!(daemon.read(format!("instances/{id}/last_task/state")), "success");
}
