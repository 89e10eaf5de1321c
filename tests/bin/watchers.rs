//! Whoever watches hears of it, whoever moved it and how.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent};
use uuid::Uuid;

use crate::support::{Daemon, signal, wait_until};

const NAMES: AddWatchFlags = AddWatchFlags::IN_MOVED_FROM
    .union(AddWatchFlags::IN_MOVED_TO)
    .union(AddWatchFlags::IN_CREATE)
    .union(AddWatchFlags::IN_DELETE);

/// Its name, a move into the bin, and one out of it.
type Way<'a> = (&'a str, &'a dyn Fn(), &'a dyn Fn());

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

    /// Waits until so many events of this kind and name have come.
    fn hears(&mut self, what: &str, kind: AddWatchFlags, name: Option<&str>, count: usize) {
        let matches = |event: &InotifyEvent| event.mask.contains(kind) && event.name.as_deref() == name.map(OsStr::new);
        wait_until(what, || {
            self.events.extend(self.inotify.read_events().unwrap_or_default());
            self.events.iter().filter(|event| matches(event)).count() >= count
        });
        assert_eq!(self.events.iter().filter(|event| matches(event)).count(), count, "{what}: {:?}", self.events);
    }
}

#[test]
fn a_move_is_heard_once_in_both_directories_whoever_makes_it() {
    let daemon = Daemon::start(&[]);
    let (instance, image) = (daemon.domain("web"), daemon.image());
    wait_until("the names stand", || daemon.path("by-name/instances/web").exists());
    let from = AddWatchFlags::IN_MOVED_FROM;
    let to = AddWatchFlags::IN_MOVED_TO;
    for (class, id) in [("instances", instance), ("images", image)] {
        let home = daemon.path(format!("{class}/{id}"));
        let bin = daemon.path(format!("trash/{id}"));
        let name = id.to_string();
        let mut classes = Heard::of(&daemon.path(class), NAMES);
        let mut trash = Heard::of(&daemon.path("trash"), NAMES);
        let mut itself = Heard::of(&home, AddWatchFlags::IN_MOVE_SELF);
        let idle = || {
            ["instances", "images", "trash"].iter().any(|place| {
                fs::read_to_string(daemon.path(format!("{place}/{id}/task"))).is_ok_and(|task| task == "\n")
            })
        };
        let ways: [Way<'_>; 2] = [
            ("by a user's move", &|| fs::rename(&home, &bin).expect("moved"), &|| {
                fs::rename(&bin, &home).expect("moved");
            }),
            ("by a word", &|| daemon.set(home.join("state"), "soft_deleted"), &|| {
                daemon.set(bin.join("state"), if class == "images" { "active" } else { "stopped" });
            }),
        ];
        for (round, (way, goes, comes)) in (1..).zip(ways) {
            goes();
            classes.hears(way, from, Some(&name), round);
            trash.hears(way, to, Some(&name), round);
            itself.hears(way, AddWatchFlags::IN_MOVE_SELF, None, 2 * round - 1);
            wait_until("it is put away", || bin.exists() && idle());
            comes();
            trash.hears(way, from, Some(&name), round);
            classes.hears(way, to, Some(&name), round);
            itself.hears(way, AddWatchFlags::IN_MOVE_SELF, None, 2 * round);
            wait_until("it is back", || home.exists() && idle());
        }
        for heard in [&classes, &trash] {
            let others = heard.events.iter().filter(|event| !event.mask.intersects(from | to));
            assert_eq!(others.count(), 0, "it neither comes nor goes: {:?}", heard.events);
        }
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
    let image = daemon.image();
    let (home, bin) = (daemon.path(format!("images/{image}")), daemon.path(format!("trash/{image}")));
    let mut classes = Heard::of(&daemon.path("images"), NAMES);
    let mut trash = Heard::of(&daemon.path("trash"), NAMES);
    fs::rename(&home, &bin).expect("moved");
    let name = daemon.path(format!("by-name/trash/{image}"));
    wait_until("its name is there", || name.exists());
    daemon.set(bin.join("state"), "deleted");
    let id = image.to_string();
    trash.hears("it is gone", AddWatchFlags::IN_DELETE, Some(&id), 1);
    wait_until("its links too", || !name.is_symlink() && !bin.exists());
    classes.hears("it went away once", AddWatchFlags::IN_MOVED_FROM, Some(&id), 1);
    assert!(!classes.events.iter().any(|event| event.mask.contains(AddWatchFlags::IN_DELETE)));
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
    let id = daemon.domain("web");
    let link = daemon.path("by-name/instances/web");
    wait_until("the name stands", || link.exists());
    let mut trash = Heard::of(&daemon.path("trash"), NAMES);
    let mut names = Heard::of(&daemon.path("by-name/trash"), NAMES);
    fs::rename(&link, daemon.path("trash/web")).expect("moved");
    trash.hears("where the user put it", AddWatchFlags::IN_MOVED_TO, Some("web"), 1);
    trash.hears("its object", AddWatchFlags::IN_MOVED_TO, Some(&id.to_string()), 1);
    names.hears("its name", AddWatchFlags::IN_MOVED_TO, Some("web"), 1);
    trash.hears("it went on", AddWatchFlags::IN_MOVED_FROM, Some("web"), 1);
    // An image that nobody named has its directory's name: the link makes way for the directory.
    let image = daemon.image().to_string();
    let link = daemon.path(format!("by-name/images/{image}"));
    wait_until("the name stands", || link.exists());
    fs::rename(&link, daemon.path(format!("trash/{image}"))).expect("moved");
    trash.hears("the link, then the object", AddWatchFlags::IN_MOVED_TO, Some(&image), 2);
    trash.hears("the link went on", AddWatchFlags::IN_MOVED_FROM, Some(&image), 1);
    names.hears("to the names", AddWatchFlags::IN_MOVED_TO, Some(&image), 1);
}
