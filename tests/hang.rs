//! A hypervisor that hangs, hangs nobody.

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde_json::json;
use support::{Daemon, errno, wait_until};
use uuid::Uuid;

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

/// What each kind of client waited for at most, and how often it asked.
#[derive(Default)]
struct Waits(Mutex<BTreeMap<&'static str, (u64, Duration)>>);

impl Waits {
    fn note(&self, what: &'static str, took: Duration) {
        let mut table = self.0.lock().expect("no panic");
        let (count, most) = table.entry(what).or_default();
        *count += 1;
        *most = (*most).max(took);
    }
}

/// One instance that everybody wants something of.
struct Hammer<'a> {
    home: &'a Path,
    stop: &'a AtomicBool,
    waits: &'a Waits,
}

impl Hammer<'_> {
    fn each(&self, what: &'static str, act: &dyn Fn()) {
        while !self.stop.load(Ordering::Relaxed) {
            let began = Instant::now();
            act();
            self.waits.note(what, began.elapsed());
        }
    }

    fn read(&self) {
        self.each("read", &|| assert!(!fs::read(self.home.join("state")).expect("readable").is_empty()));
    }

    fn stat(&self) {
        self.each("stat", &|| assert!(fs::metadata(self.home.join("locked")).expect("stat").is_file()));
    }

    fn list(&self) {
        self.each("readdir", &|| assert!(fs::read_dir(self.home).expect("listed").count() > 9));
    }

    fn look_up(&self) {
        self.each("lookup", &|| assert!(fs::metadata(self.home.join("no-such-file")).is_err()));
    }

    fn refused(&self) {
        self.each("refused write", &|| {
            assert_eq!(errno(support::write(&self.home.join("vcpus"), b"none")), libc::EINVAL);
        });
    }

    fn make(&self) {
        self.each("mkdir and rmdir", &|| {
            let draft = self.home.with_file_name(Uuid::new_v4().to_string());
            fs::create_dir(&draft).expect("a draft");
            fs::remove_dir(&draft).expect("discarded");
        });
    }

    /// Mostly refused: the state may forbid it, or a task own the instance.
    fn rename(&self) {
        let root = self.home.parent().and_then(Path::parent).expect("the root");
        let name = self.home.file_name().expect("a name");
        let link = |word: &str| root.join("by-state/instances").join(word).join(name);
        self.each("rename", &|| {
            let _ = fs::rename(link("active"), link("rescued"));
            let _ = fs::rename(link("active"), link("paused"));
        });
    }

    fn watch(&self) {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK).expect("inotify");
        inotify.add_watch(self.home, AddWatchFlags::IN_ALL_EVENTS).expect("a watch");
        let file = File::open(self.home.join("state")).expect("opens");
        self.each("watch", &|| {
            let mut descriptors = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
            let _ = poll(&mut descriptors, PollTimeout::from(10_u16));
            let _ = inotify.read_events();
            file.read_at(&mut [0; 64], 0).expect("readable");
        });
    }

    /// Writes of a file of which this is the only writer: the kernel lets each one in at once.
    fn write_alone(&self) {
        let numbers = std::cell::Cell::new(0_u64);
        self.each("write of one that is alone", &|| {
            numbers.set(numbers.get() + 1);
            support::write(&self.home.join("description"), numbers.get().to_string().as_bytes()).expect("taken");
        });
    }

    /// Writes of a file that others write too: the kernel queues them, and most are refused.
    fn write_queued(&self, word: &str) {
        self.each("queued write", &|| drop(support::write(&self.home.join("state"), word.as_bytes())));
    }
}

/// Ends the load, also when the test fails.
struct Stops<'a>(&'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn hammering_one_instance_while_the_hypervisor_hangs_delays_no_reader() {
    let settle = Duration::from_secs(1);
    let daemon = Daemon::start(&["--settle", "1s"]);
    let id = daemon.domain("hammered");
    daemon.domain_does(id, "start", "active");
    let seconds = if std::env::var_os("INSTANCEFS_LONG").is_some() { 60 } else { 8 };
    let (stop, waits) = (AtomicBool::new(false), Waits::default());
    let home = daemon.path(format!("instances/{id}"));
    let hammer = &Hammer { home: &home, stop: &stop, waits: &waits };
    thread::scope(|scope| {
        let _stops = Stops(&stop);
        scope.spawn(|| hammer.read());
        scope.spawn(|| hammer.stat());
        scope.spawn(|| hammer.list());
        scope.spawn(|| hammer.look_up());
        scope.spawn(|| hammer.refused());
        scope.spawn(|| hammer.make());
        scope.spawn(|| hammer.rename());
        scope.spawn(|| hammer.watch());
        scope.spawn(|| hammer.write_alone());
        for word in ["paused", "active", "stopped"] {
            scope.spawn(move || hammer.write_queued(word));
        }
        let end = Instant::now() + Duration::from_secs(seconds);
        while Instant::now() < end {
            daemon.host_does(json!({"do": "hang_all"}));
            thread::sleep(Duration::from_millis(1500));
            daemon.host_does(json!({"do": "release_all"}));
            thread::sleep(Duration::from_millis(500));
        }
    });
    let waits = waits.0.into_inner().expect("no panic");
    // What is promised; what is asserted allows for a busy machine.
    let promised = [
        ("read", Duration::from_secs(1)),
        ("stat", Duration::from_secs(1)),
        ("readdir", Duration::from_secs(1)),
        ("lookup", Duration::from_secs(1)),
        ("watch", Duration::from_secs(1)),
        ("refused write", Duration::from_secs(2)),
        ("mkdir and rmdir", Duration::from_secs(4)),
        ("rename", Duration::from_secs(4)),
        ("write of one that is alone", settle + Duration::from_secs(1)),
        ("queued write", settle + Duration::from_secs(2)),
    ];
    for (what, limit) in promised {
        let (count, most) = waits.get(what).copied().unwrap_or_default();
        println!("{what}: {count} times, at most {most:?}, promised {limit:?}");
        assert!(count > 0, "no {what} ever ended");
        assert!(most < limit * 3, "{what} took {most:?}");
    }
}
