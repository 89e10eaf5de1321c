//! kill -9 of the daemon, under load.

mod support;

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde_json::json;
use support::{Daemon, wait_until};
use uuid::Uuid;

/// How long a process may be stuck, and a tree may be away, at most: generous on a busy machine. The promise for both
/// is 1 s.
const STUCK: Duration = Duration::from_secs(5);
const AWAY: Duration = Duration::from_secs(10);
/// What a client does between two attempts on a dead mount.
const PAUSE: Duration = Duration::from_millis(1);

fn rounds() -> u32 {
    if std::env::var_os("INSTANCEFS_LONG").is_some() { 100 } else { 8 }
}

/// How many threads of these processes are in uninterruptible sleep. A process that is gone has none.
fn stuck_threads(processes: &[u32]) -> usize {
    let tasks = processes.iter().filter_map(|process| fs::read_dir(format!("/proc/{process}/task")).ok());
    tasks
        .flatten()
        .filter_map(Result::ok)
        .filter(|task| {
            let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('D'))
        })
        .count()
}

/// A load on a mount that dies again and again. Clients meet errors and go on.
struct Load<'a> {
    root: &'a Path,
    id: Uuid,
    stop: &'a AtomicBool,
    /// The last number given to a description.
    number: &'a AtomicU64,
    /// The last number whose write succeeded.
    acknowledged: &'a AtomicU64,
}

impl Load<'_> {
    fn repeat(&self, mut act: impl FnMut() -> bool) {
        while !self.stop.load(Ordering::Relaxed) {
            if !act() {
                thread::sleep(PAUSE);
            }
        }
    }

    fn write(&self) {
        let path = self.root.join(format!("instances/{}/description", self.id));
        self.repeat(|| {
            let number = self.number.fetch_add(1, Ordering::SeqCst) + 1;
            let is_taken = support::write(&path, number.to_string().as_bytes()).is_ok();
            if is_taken {
                self.acknowledged.store(number, Ordering::SeqCst);
            }
            is_taken
        });
    }

    fn read(&self) {
        let path = self.root.join(format!("instances/{}/state", self.id));
        self.repeat(|| fs::read(&path).is_ok());
    }

    /// Drafts come and go: names that the daemon announces itself are those of the views.
    fn make(&self) {
        self.repeat(|| {
            let draft = self.root.join(format!("instances/{}", Uuid::new_v4()));
            fs::create_dir(&draft).is_ok() && fs::remove_dir(&draft).is_ok()
        });
    }

    /// Names and states change by way of the host, so that the announcer has everything to do.
    fn change(&self, daemon: &Daemon) {
        let uuid = self.id.to_string();
        self.repeat(|| {
            ["pause", "unpause"].iter().all(|what| {
                thread::sleep(PAUSE);
                daemon.host_may_do(&json!({"do": what, "uuid": uuid})).is_ok()
            })
        });
    }

    fn watch(&self) {
        self.repeat(|| {
            let Ok(inotify) = Inotify::init(InitFlags::IN_NONBLOCK) else { return false };
            let watched = ["instances", "by-state/instances/active"]
                .iter()
                .map(|path| inotify.add_watch(&self.root.join(path), AddWatchFlags::IN_ALL_EVENTS))
                .filter_map(Result::ok)
                .count();
            let _ = inotify.add_watch(&self.root.join(format!("instances/{}", self.id)), AddWatchFlags::IN_ALL_EVENTS);
            let end = Instant::now() + Duration::from_millis(50);
            while Instant::now() < end && !self.stop.load(Ordering::Relaxed) {
                let mut descriptors = [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)];
                let _ = poll(&mut descriptors, PollTimeout::from(10_u16));
                let _ = inotify.read_events();
            }
            watched > 0
        });
    }

    fn poll(&self) {
        let path = self.root.join(format!("instances/{}/description", self.id));
        self.repeat(|| {
            let Ok(file) = File::open(&path) else { return false };
            for _ in 0..20 {
                let mut descriptors = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
                let _ = poll(&mut descriptors, PollTimeout::from(20_u16));
                if file.read_at(&mut [0; 64], 0).is_err() {
                    return false;
                }
            }
            true
        });
    }
}

/// The daemon's children: its announcer.
fn children(process: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().filter_map(Result::ok);
    tasks
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|line| line.split_whitespace().filter_map(|child| child.parse().ok()).collect::<Vec<u32>>())
        .collect()
}

#[test]
fn kill_minus_nine_under_load_leaves_nobody_stuck_and_loses_no_acknowledged_write() {
    let mut daemon = Daemon::start(&[]);
    let id = daemon.domain("survivor");
    daemon.domain_does(id, "start", "active");
    let (number, acknowledged) = (AtomicU64::new(0), AtomicU64::new(0));
    let mut worst: HashMap<&str, Duration> = HashMap::new();
    for round in 0..rounds() {
        let stop = AtomicBool::new(false);
        let root = daemon.root();
        let load = Load { root: &root, id, stop: &stop, number: &number, acknowledged: &acknowledged };
        thread::scope(|scope| {
            let _stops = Stops(&stop);
            let (load, watched) = (&load, &daemon);
            scope.spawn(move || load.write());
            scope.spawn(move || load.read());
            scope.spawn(move || load.read());
            scope.spawn(move || load.make());
            scope.spawn(move || load.change(watched));
            scope.spawn(move || load.watch());
            scope.spawn(move || load.poll());
            let before = acknowledged.load(Ordering::SeqCst);
            wait_until("the load runs", || acknowledged.load(Ordering::SeqCst) > before + 20 + u64::from(round % 7));
            let announcers = children(daemon.pid());
            assert!(!announcers.is_empty(), "there is an announcer");
            let killed = Instant::now();
            support::signal(daemon.pid(), libc::SIGKILL);
            let processes: Vec<u32> = announcers.into_iter().chain([std::process::id(), daemon.pid()]).collect();
            // Nobody may be stuck twice in a row: a thread that only just waits is no concern.
            let mut calm = 0;
            wait_until("nobody is stuck", || {
                calm = if stuck_threads(&processes) == 0 { calm + 1 } else { 0 };
                calm == 2
            });
            let stuck = killed.elapsed();
            note(&mut worst, "nobody in D state", stuck);
            assert!(stuck < STUCK, "threads hung in D state for {stuck:?}");
        });
        daemon.kill();
        let restarted = Instant::now();
        daemon.spawn();
        let away = restarted.elapsed();
        note(&mut worst, "restart until the tree answers", away);
        assert!(away < AWAY, "the tree was away for {away:?}");
        let kept: u64 = daemon.read(format!("instances/{id}/description")).parse().expect("a number");
        assert!(kept >= acknowledged.load(Ordering::SeqCst), "an acknowledged write is lost: {kept}");
        assert_eq!(mounts_at(&root), 1, "the dead mount is gone, not covered");
        wait_until("the guest is seen as it is", || {
            let list = daemon.host_does(json!({"do": "list"}));
            let power = list["guests"][0]["domain"]["power"].as_str().expect("the domain is there").to_owned();
            daemon.read(format!("instances/{id}/power_state")) == power
        });
        let calls = daemon.host_does(json!({"do": "calls"}));
        assert_eq!(calls["calls"]["power_off"].as_u64().unwrap_or(0), 0, "the guest ran on");
    }
    println!("{} kills, {} acknowledged writes; at most: {worst:?}", rounds(), acknowledged.load(Ordering::SeqCst));
}

/// Ends the load, also when the test fails.
struct Stops<'a>(&'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn note<'a>(worst: &mut HashMap<&'a str, Duration>, what: &'a str, took: Duration) {
    let entry = worst.entry(what).or_default();
    *entry = (*entry).max(took);
}

fn mounts_at(path: &Path) -> usize {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    mounts.lines().filter(|line| line.split(' ').nth(4).map(Path::new) == Some(path)).count()
}

#[test]
fn a_stale_mount_is_swept_and_a_foreign_one_is_not() {
    let mut daemon = Daemon::start(&[]);
    daemon.kill();
    assert!(fs::metadata(daemon.root()).is_err() || fs::read_dir(daemon.root()).is_err(), "the mount is dead");
    daemon.spawn();
    assert_eq!(mounts_at(&daemon.root()), 1, "the dead mount is gone, not covered");
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
