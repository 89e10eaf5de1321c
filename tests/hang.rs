//! A hypervisor that hangs, hangs nobody.

mod support;

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use support::{Daemon, errno, wait_until};
use uuid::Uuid;

/// Limits against hanging, generous on a busy machine: the promise is 1 s for reads, 2 s for what is refused.
const READ: Duration = Duration::from_secs(3);
const REFUSED: Duration = Duration::from_secs(5);

#[test]
fn while_the_hypervisor_hangs_reads_answer_writes_are_accepted_and_health_says_since_when() {
    let daemon = Daemon::start(&["--settle", "1s"]);
    let id = daemon.domain("hung");
    daemon.domain_does(id, "start", "active");
    daemon.host_does(json!({"do": "hang_all"}));
    wait_until("health notices", || daemon.read("health").contains("hypervisor does not answer since 20"));
    let begun = Instant::now();
    daemon.set(format!("instances/{id}/state"), "paused");
    assert!(begun.elapsed() < Duration::from_secs(10), "an accepted write is answered at the settle window");
    assert_eq!(daemon.read(format!("instances/{id}/state")), "active");
    assert_eq!(daemon.read(format!("instances/{id}/task")), "pausing");
    assert_eq!(errno(daemon.write(format!("instances/{id}/state"), "suspended")), libc::EBUSY);
    daemon.set(format!("instances/{id}/state"), "paused");
    daemon.set(format!("instances/{id}/description"), "still here");
    daemon.set(format!("instances/{id}/locked"), "1");
    daemon.host_does(json!({"do": "release_all"}));
    daemon.wait_state(id, "paused");
    wait_until("health recovers", || daemon.read("health").contains("hypervisor ok"));
    wait_until("the task ended", || daemon.read(format!("instances/{id}/task")).is_empty());
}

#[test]
fn without_a_connection_the_last_truth_stays_and_only_what_needs_the_hypervisor_is_refused() {
    let mut daemon = Daemon::start(&[]);
    let id = daemon.domain("cut-off");
    daemon.domain_does(id, "start", "active");
    daemon.host_does(json!({"do": "disconnect"}));
    wait_until("health notices", || daemon.read("health").contains("hypervisor down since"));
    assert_eq!(daemon.read(format!("instances/{id}/state")), "active");
    assert_eq!(errno(daemon.write(format!("instances/{id}/state"), "stopped")), libc::ENODEV);
    daemon.set(format!("instances/{id}/locked"), "1");
    daemon.set(format!("instances/{id}/locked"), "0");
    daemon.kill();
    daemon.spawn();
    assert_eq!(daemon.read(format!("instances/{id}/state")), "active", "the last known truth is back at once");
    daemon.host_does(json!({"do": "reconnect"}));
    wait_until("health recovers", || daemon.read("health").contains("hypervisor ok"));
    daemon.set(format!("instances/{id}/state"), "stopped");
    daemon.wait_state(id, "stopped");
}

#[test]
fn what_changed_while_the_connection_was_down_is_found_by_reconciliation() {
    let daemon = Daemon::start(&[]);
    let (stays, goes) = (daemon.domain("stays"), daemon.domain("goes"));
    daemon.host_does(json!({"do": "disconnect"}));
    wait_until("health notices", || daemon.read("health").contains("down"));
    daemon.host_does(json!({"do": "start", "uuid": stays.to_string()}));
    daemon.host_does(json!({"do": "undefine", "uuid": goes.to_string()}));
    daemon.host_does(json!({"do": "reconnect"}));
    daemon.wait_state(stays, "active");
    wait_until("it is gone", || !daemon.path(format!("instances/{goes}")).exists());
}

#[test]
fn hammering_one_instance_while_the_hypervisor_hangs_delays_no_reader() {
    let daemon = Daemon::start(&["--settle", "1s"]);
    let id = daemon.domain("hammered");
    daemon.domain_does(id, "start", "active");
    let seconds = if std::env::var_os("INSTANCEFS_LONG").is_some() { 60 } else { 8 };
    let stop = AtomicBool::new(false);
    let slow = Mutex::new(Vec::new());
    let home = daemon.path(format!("instances/{id}"));
    let note = |what: &str, began: Instant, limit: Duration| {
        if began.elapsed() > limit {
            slow.lock().expect("no panic").push(format!("{what}: {:?}", began.elapsed()));
        }
    };
    let each = |what: &'static str, limit: Duration, act: &(dyn Fn(&Path) + Sync)| {
        while !stop.load(Ordering::Relaxed) {
            let began = Instant::now();
            act(&home);
            note(what, began, limit);
        }
    };
    let each = &each;
    thread::scope(|scope| {
        scope.spawn(move || each("read", READ, &|home| drop(fs::read(home.join("state")).expect("readable"))));
        scope.spawn(move || {
            each("stat", READ, &|home| assert!(fs::metadata(home.join("locked")).expect("stat").is_file()))
        });
        scope.spawn(move || each("readdir", READ, &|home| assert!(fs::read_dir(home).expect("listed").count() > 9)));
        scope.spawn(move || each("lookup", READ, &|home| drop(fs::metadata(home.join("no-such-file")))));
        scope.spawn(move || each("refused write", REFUSED, &|home| drop(support::write(&home.join("vcpus"), b"none"))));
        scope.spawn(move || {
            each("mkdir", REFUSED, &|home| {
                let draft = home.with_file_name(Uuid::new_v4().to_string());
                fs::create_dir(&draft).expect("a draft");
                fs::remove_dir(&draft).expect("discarded");
            });
        });
        scope.spawn(move || {
            each("rename", REFUSED, &|home| {
                let root = home.parent().and_then(Path::parent).expect("the root");
                let link =
                    |word: &str| root.join("by-state/instances").join(word).join(home.file_name().expect("a name"));
                let _ = fs::rename(link("active"), link("shelved"));
            });
        });
        for word in ["paused", "active", "stopped"] {
            scope.spawn(move || {
                each("writer", Duration::from_secs(15), &move |home| {
                    drop(support::write(&home.join("state"), word.as_bytes()))
                });
            });
        }
        let end = Instant::now() + Duration::from_secs(seconds);
        while Instant::now() < end {
            daemon.host_does(json!({"do": "hang_all"}));
            thread::sleep(Duration::from_millis(1500));
            daemon.host_does(json!({"do": "release_all"}));
            thread::sleep(Duration::from_millis(500));
        }
        stop.store(true, Ordering::Relaxed);
    });
    let slow = slow.into_inner().expect("no panic");
    assert!(slow.is_empty(), "{}", slow.join("\n"));
}
