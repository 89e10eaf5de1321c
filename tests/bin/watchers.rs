//! Whoever watches hears of it, whoever moved it and how.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent};
use uuid::Uuid;

use crate::support::{Daemon, signal, wait_until};

const NAMES: AddWatchFlags = AddWatchFlags::IN_MOVED_FROM
    .union(AddWatchFlags::IN_MOVED_TO)
    .union(AddWatchFlags::IN_CREATE)
    .union(AddWatchFlags::IN_DELETE);

struct Heard {
    inotify: Inotify,
    events: Vec<InotifyEvent>,
}

impl Heard {
    fn of(path: &Path, flags: AddWatchFlags) -> Heard {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK).expect("inotify");
        inotify.add_watch(path, flags).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Heard { inotify, events: Vec::new() }
    }

    /// How many events of this kind and name have come so far.
    fn count(&mut self, kind: AddWatchFlags, name: Option<&str>) -> usize {
        self.events.extend(self.inotify.read_events().unwrap_or_default());
        let matches =
            |event: &&InotifyEvent| event.mask.contains(kind) && event.name.as_deref() == name.map(OsStr::new);
        self.events.iter().filter(matches).count()
    }

    /// Waits until an event of this kind and name has come, and forgets it.
    fn hears(&mut self, what: &str, kind: AddWatchFlags, name: Option<&str>) {
        wait_until(what, || self.count(kind, name) > 0);
        assert_eq!(self.count(kind, name), 1, "{what}: {:?}", self.events);
        self.events.retain(|event| !(event.mask.contains(kind) && event.name.as_deref() == name.map(OsStr::new)));
    }
}

/// A name that the announcer is late for is published without an event; it is not late every time.
fn in_one_of_some_attempts(what: &str, attempt: impl Fn() -> bool) {
    assert!((0..10).any(|_| attempt()), "{what} is never heard");
}

/// Whether it becomes true in the time in which an event comes if one comes at all.
fn soon(condition: impl FnMut() -> bool) -> bool {
    let mut condition = condition;
    let end = Instant::now() + Duration::from_secs(2);
    while Instant::now() < end {
        if condition() {
            return true;
        }
        thread::sleep(Duration::from_millis(5));
    }
    false
}

const FROM: AddWatchFlags = AddWatchFlags::IN_MOVED_FROM;
const TO: AddWatchFlags = AddWatchFlags::IN_MOVED_TO;
const ITSELF: AddWatchFlags = AddWatchFlags::IN_MOVE_SELF;

#[test]
fn a_move_by_hand_is_heard_once_in_both_directories() {
    let daemon = Daemon::start(&[]);
    let (instance, image) = (daemon.domain("web"), daemon.image());
    for (class, id) in [("instances", instance), ("images", image)] {
        let (home, bin) = (daemon.path(format!("{class}/{id}")), daemon.path(format!("trash/{id}")));
        let name = id.to_string();
        let mut classes = Heard::of(&daemon.path(class), NAMES);
        let mut trash = Heard::of(&daemon.path("trash"), NAMES);
        let mut itself = Heard::of(&home, ITSELF);
        for _ in 0..3 {
            fs::rename(&home, &bin).expect("moved");
            wait_until("it is put away", || daemon.read(bin.join("task")).is_empty());
            classes.hears("it went", FROM, Some(&name));
            trash.hears("it came", TO, Some(&name));
            itself.hears("it moved", ITSELF, None);
            fs::rename(&bin, &home).expect("moved back");
            wait_until("it is back", || daemon.read(home.join("task")).is_empty());
            trash.hears("it went back", FROM, Some(&name));
            classes.hears("it came back", TO, Some(&name));
            itself.hears("it moved back", ITSELF, None);
        }
        assert!(classes.events.is_empty() && trash.events.is_empty(), "it neither comes nor goes");
    }
}

#[test]
fn a_move_by_a_word_is_heard_as_a_move_in_both_directories() {
    let daemon = Daemon::start(&[]);
    let (instance, image) = (daemon.domain("web"), daemon.image());
    for (class, id, back) in [("instances", instance, "stopped"), ("images", image, "active")] {
        let (home, bin) = (daemon.path(format!("{class}/{id}")), daemon.path(format!("trash/{id}")));
        let name = id.to_string();
        let moves = |word: &str, from: &Path, to: &Path| {
            let mut left = Heard::of(from.parent().expect("a directory"), NAMES);
            let mut entered = Heard::of(to.parent().expect("a directory"), NAMES);
            let mut itself = Heard::of(from, ITSELF);
            daemon.set(from.join("state"), word);
            wait_until("it has moved", || to.join("state").exists() && !from.exists());
            wait_until("it is idle", || daemon.read(to.join("task")).is_empty());
            let heard = soon(|| {
                left.count(FROM, Some(&name)) == 1
                    && entered.count(TO, Some(&name)) == 1
                    && itself.count(ITSELF, None) == 1
            });
            let others = left.events.iter().chain(&entered.events).filter(|event| !event.mask.intersects(FROM | TO));
            assert_eq!(others.count(), 0, "it neither comes nor goes: {:?} {:?}", left.events, entered.events);
            heard
        };
        in_one_of_some_attempts("a move by a word", || {
            let goes = moves("soft_deleted", &home, &bin);
            moves(back, &bin, &home) && goes
        });
    }
}

/// Reads a file whenever it is said to have changed, until it reads this.
fn hears_of(inotify: &Inotify, file: &File, value: &str) {
    let mut read = String::new();
    wait_until(&format!("{value:?} is heard of"), || {
        if inotify.read_events().is_ok_and(|events| !events.is_empty()) {
            let mut bytes = [0; 100];
            let length = file.read_at(&mut bytes, 0).expect("readable");
            read = String::from_utf8_lossy(&bytes[..length]).trim_end().to_owned();
        }
        read == value
    });
}

#[test]
fn the_last_change_before_a_move_is_heard_and_so_is_every_one_in_the_bin() {
    let daemon = Daemon::start(&[]);
    for round in 0..10 {
        let id: Uuid = daemon.domain(&format!("web-{round}"));
        let home = daemon.path(format!("instances/{id}"));
        let bin = daemon.path(format!("trash/{id}"));
        let watch = |path: &Path| (Heard::of(path, AddWatchFlags::IN_MODIFY).inotify, File::open(path).expect("opens"));
        let (description, state) = (watch(&home.join("description")), watch(&home.join("state")));
        let describe = |home: &Path, text: &str| {
            // Written as a document, so that the write itself is no event of the file.
            daemon.set(home.join("spec.json"), &format!("{{\"description\": \"{text}\"}}"));
        };
        describe(&home, "first");
        hears_of(&description.0, &description.1, "first");
        // This one waits for its turn, and is announced where the object has gone by then.
        describe(&home, "second");
        fs::rename(&home, &bin).expect("moved");
        hears_of(&description.0, &description.1, "second");
        hears_of(&state.0, &state.1, "soft_deleted");
        let expires_at = watch(&bin.join("expires_at"));
        daemon.set(bin.join("spec.json"), "{\"expires_at\": \"never\"}");
        hears_of(&expires_at.0, &expires_at.1, "never");
        describe(&bin, "third");
        hears_of(&description.0, &description.1, "third");
    }
}

#[test]
fn deletion_for_good_is_heard_in_the_bin_and_nowhere_before() {
    let daemon = Daemon::start(&[]);
    in_one_of_some_attempts("deletion for good", || {
        let image = daemon.image();
        let (home, bin) = (daemon.path(format!("images/{image}")), daemon.path(format!("trash/{image}")));
        let mut classes = Heard::of(&daemon.path("images"), NAMES);
        let mut trash = Heard::of(&daemon.path("trash"), NAMES);
        fs::rename(&home, &bin).expect("moved");
        let name = daemon.path(format!("by-name/trash/{image}"));
        wait_until("its name is there", || name.exists());
        daemon.set(bin.join("state"), "deleted");
        wait_until("it is gone, and its links", || !name.is_symlink() && !bin.exists());
        let id = image.to_string();
        classes.hears("it went away once", FROM, Some(&id));
        assert_eq!(classes.count(AddWatchFlags::IN_DELETE, Some(&id)), 0);
        soon(|| trash.count(AddWatchFlags::IN_DELETE, Some(&id)) == 1)
    });
}

/// The announcer of a daemon, whichever of its threads has started it.
fn announcer(daemon: &Daemon) -> u32 {
    let threads = fs::read_dir(format!("/proc/{}/task", daemon.pid())).expect("threads").flatten();
    let children = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    let mut children: Vec<u32> = children
        .flat_map(|pids| pids.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
        .map(|pid| pid.parse().expect("a pid"))
        .collect();
    children.retain(|pid| {
        fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| String::from_utf8_lossy(&line).contains("\0announcer\0"))
    });
    assert_eq!(children.len(), 1, "one announcer");
    children[0]
}

#[test]
fn without_an_announcer_it_is_moved_all_the_same_and_whoever_is_inside_goes_along() {
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("web");
    let (home, bin) = (daemon.path(format!("instances/{id}")), daemon.path(format!("trash/{id}")));
    let inside = fs::File::open(&home).expect("a directory");
    let file = File::open(home.join("state")).expect("opens");
    let inside_reads = |name: &str| fs::read_to_string(format!("/proc/self/fd/{}/{name}", inside.as_raw_fd()));
    signal(announcer(&daemon), libc::SIGSTOP);
    daemon.set(home.join("state"), "soft_deleted");
    wait_until("it is moved", || bin.join("class").exists() && !home.exists());
    assert_eq!(inside_reads("class").expect("readable"), "instances\n");
    assert_eq!(inside_reads("state").expect("readable"), "soft_deleted\n");
    let mut bytes = [0; 13];
    file.read_exact_at(&mut bytes, 0).expect("readable");
    assert_eq!(&bytes, b"soft_deleted\n");
    wait_until("it is put away", || daemon.read(bin.join("task")).is_empty());
    fs::rename(&bin, &home).expect("moved back");
    wait_until("it is back", || daemon.read(home.join("state")) == "stopped");
    assert_eq!(inside_reads("state").expect("readable"), "stopped\n");
    signal(announcer(&daemon), libc::SIGCONT);
}

#[test]
fn whoever_waits_for_an_object_follows_it() {
    let daemon = Daemon::start(&["--settle", "0s"]);
    let id = daemon.domain("web");
    daemon.domain_does(id, "start", "active");
    let wait = |path: &str, word: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_instancefs"));
        command.arg("wait").arg(daemon.path(path)).args(["--for", word, "--timeout", "25s"]).env("LC_ALL", "C");
        let output = command.output().expect("it runs");
        assert!(output.status.success(), "{path} {word}: {}", String::from_utf8_lossy(&output.stderr));
    };
    daemon.set(format!("instances/{id}/state"), "soft_deleted");
    wait(&format!("instances/{id}"), "soft_deleted");
    wait(&format!("trash/{id}"), "soft_deleted");
    fs::rename(daemon.path(format!("trash/{id}")), daemon.path(format!("instances/{id}"))).expect("moved back");
    wait(&format!("trash/{id}"), "active");
}

#[test]
fn a_name_moved_into_the_bin_is_heard_on_its_way_to_the_names_of_the_bin() {
    let daemon = Daemon::start(&[]);
    let moves = |class: &str, name: &str, id: Uuid| {
        let link = daemon.path(format!("by-name/{class}/{name}"));
        wait_until("the name stands", || link.exists());
        let mut trash = Heard::of(&daemon.path("trash"), NAMES);
        let mut names = Heard::of(&daemon.path("by-name/trash"), NAMES);
        fs::rename(&link, daemon.path("trash").join(name)).expect("moved");
        let final_place = daemon.path(format!("by-name/trash/{name}"));
        wait_until("it is there", || final_place.join("class").exists());
        let id = id.to_string();
        // An image that nobody named has its directory's name: the link makes way for the directory.
        let came = if name == id { 2 } else { 1 };
        soon(|| {
            trash.count(TO, Some(name)) == came
                && trash.count(TO, Some(&id)) == came
                && trash.count(FROM, Some(name)) == 1
                && names.count(TO, Some(name)) == 1
        })
    };
    let attempt = std::sync::atomic::AtomicUsize::new(0);
    in_one_of_some_attempts("a moved name", || {
        let name = format!("web-{}", attempt.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
        moves("instances", &name, daemon.domain(&name))
    });
    in_one_of_some_attempts("a moved name that makes way", || {
        let image = daemon.image();
        moves("images", &image.to_string(), image)
    });
}
