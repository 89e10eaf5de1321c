//! Whoever watches hears of it, whoever moved it and how.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent};
use uuid::Uuid;

use crate::support::{Daemon, wait_until};

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
        let ways: [(&str, &dyn Fn(), &dyn Fn()); 2] = [
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
