//! Every kind of watcher hears of every kind of change, and the value can be read by then.

mod support;

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags as FanotifyInit, MarkFlags, MaskFlags};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde_json::json;
use support::{DEADLINE, Daemon, User, errno, gid, wait_until};
use uuid::Uuid;

struct Watch {
    inotify: Inotify,
    names: HashMap<nix::sys::inotify::WatchDescriptor, String>,
}

impl Watch {
    fn new() -> Watch {
        Watch { inotify: Inotify::init(InitFlags::IN_NONBLOCK).expect("inotify"), names: HashMap::new() }
    }

    fn on(mut self, path: &Path) -> Watch {
        let flags = AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_MOVED_TO;
        let watch = self.inotify.add_watch(path, flags).expect("a watch");
        self.names.insert(watch, path.file_name().expect("a name").to_str().expect("UTF-8").to_owned());
        self
    }

    /// Waits until all of these came: name (of the entry, or of the watched path) and kind.
    fn expect(&self, what: &str, wanted: &[(&str, AddWatchFlags)]) {
        let mut missing = wanted.to_vec();
        let mut seen = Vec::new();
        let end = Instant::now() + DEADLINE;
        while !missing.is_empty() {
            assert!(Instant::now() < end, "{what}: no event for {missing:?}; there were {seen:?}");
            match self.inotify.read_events() {
                Ok(events) => {
                    for event in events {
                        let name = event.name.map_or_else(
                            || self.names.get(&event.wd).cloned().unwrap_or_default(),
                            |name| name.to_string_lossy().into_owned(),
                        );
                        missing.retain(|(wanted, kind)| !(*wanted == name && event.mask.contains(*kind)));
                        seen.push((name, event.mask));
                    }
                }
                Err(nix::errno::Errno::EAGAIN) => std::thread::sleep(Duration::from_millis(2)),
                Err(error) => panic!("inotify: {error}"),
            }
        }
    }

    fn drain(&self) -> usize {
        let mut count = 0;
        while let Ok(events) = self.inotify.read_events() {
            count += events.len();
        }
        count
    }
}

const CHANGED: [AddWatchFlags; 2] = [AddWatchFlags::IN_MODIFY, AddWatchFlags::IN_CLOSE_WRITE];

fn changed<'a>(names: &[&'a str]) -> Vec<(&'a str, AddWatchFlags)> {
    names.iter().flat_map(|name| CHANGED.map(|kind| (*name, kind))).collect()
}

#[test]
fn a_change_from_anywhere_is_an_inotify_event_on_the_file_and_its_directory() {
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("watched");
    let home = daemon.path(format!("instances/{id}"));
    let set = |name: &str, value: &str| daemon.set(format!("instances/{id}/{name}"), value);
    let host = |what: &str| drop(daemon.host_does(json!({"do": what, "uuid": id.to_string()})));
    /// What is done, how, and which files then read what (empty: whatever).
    type Act<'a> = (&'static str, Box<dyn Fn() + 'a>, Vec<(&'static str, &'static str)>);
    let acts: Vec<Act<'_>> = vec![
        ("start by virsh", Box::new(|| host("start")), vec![("state", "active"), ("power_state", "running")]),
        (
            "pause by virsh",
            Box::new(|| host("pause")),
            vec![("state", "paused"), ("state_available", "active soft_deleted")],
        ),
        (
            "unpause by write",
            Box::new(|| set("state", "active")),
            vec![("state", "active"), ("power_state", "running")],
        ),
        (
            "lock",
            Box::new(|| set("locked", "1")),
            vec![("locked", "1"), ("locked_level", "admin"), ("state_available", "")],
        ),
        ("reason", Box::new(|| set("locked_reason", "audit")), vec![("locked_reason", "audit")]),
        ("unlock", Box::new(|| set("locked", "0")), vec![("locked", "0"), ("locked_by", ""), ("locked_reason", "")]),
        ("protect", Box::new(|| set("disable_terminate", "1")), vec![("disable_terminate", "1")]),
        ("describe", Box::new(|| set("description", "a text")), vec![("description", "a text"), ("spec.json", "")]),
        ("time-out", Box::new(|| set("stop_timeout_seconds", "7")), vec![("stop_timeout_seconds", "7")]),
        ("own", Box::new(|| set("owner", "2001")), vec![("owner", "2001")]),
        ("share", Box::new(|| set("project", "games")), vec![("project", "games")]),
        (
            "refusal",
            Box::new(|| drop(daemon.write(format!("instances/{id}/vcpus"), "none"))),
            vec![("last_error", ""), ("errors", "")],
        ),
        ("stop", Box::new(|| set("state", "stopped")), vec![("state", "stopped"), ("last_error", "ok")]),
        ("rename", Box::new(|| set("name", "renamed")), vec![("name", "renamed")]),
        (
            "rename by virsh",
            Box::new(|| drop(daemon.host_does(json!({"do": "rename", "uuid": id.to_string(), "name": "other"})))),
            vec![("name", "other")],
        ),
        (
            "crash",
            Box::new(|| {
                host("start");
                host("crash")
            }),
            vec![("state", "error"), ("state_reason", "crashed")],
        ),
    ];
    for (what, act, files) in acts {
        let names: Vec<_> = files.iter().map(|(name, _)| *name).collect();
        let directory = Watch::new().on(&home);
        let each: Vec<_> = names.iter().map(|name| Watch::new().on(&home.join(name))).collect();
        act();
        directory.expect(what, &changed(&names));
        for (watch, name) in each.iter().zip(&names) {
            watch.expect(&format!("{what}, on the file"), &changed(&[name]));
        }
        for (name, value) in files {
            if !value.is_empty() {
                wait_until(&format!("{what}: {name} reads {value}"), || {
                    daemon.read(format!("instances/{id}/{name}")) == value
                });
            }
        }
    }
}

#[test]
fn objects_that_come_go_and_move_are_events_in_their_directories_and_views() {
    let daemon = Daemon::start(&[]);
    let watch = |path: &str| Watch::new().on(&daemon.path(path));
    let (all, names, stopped) = (watch("instances"), watch("by-name/instances"), watch("by-state/instances/stopped"));
    let id = daemon.domain("comer");
    let uuid = id.to_string();
    let uuid = uuid.as_str();
    all.expect("define", &[(uuid, AddWatchFlags::IN_CREATE)]);
    names.expect("define", &[("comer", AddWatchFlags::IN_CREATE)]);
    stopped.expect("define", &[(uuid, AddWatchFlags::IN_CREATE)]);
    let active = watch("by-state/instances/active");
    daemon.domain_does(id, "start", "active");
    stopped.expect("start", &[(uuid, AddWatchFlags::IN_MOVED_FROM)]);
    active.expect("start", &[(uuid, AddWatchFlags::IN_MOVED_TO)]);
    daemon.set(format!("instances/{id}/state"), "stopped");
    active.expect("stop", &[(uuid, AddWatchFlags::IN_MOVED_FROM)]);
    stopped.expect("stop", &[(uuid, AddWatchFlags::IN_MOVED_TO)]);
    fs::rename(daemon.path("by-name/instances/comer"), daemon.path("by-name/instances/goer")).expect("renamed");
    names.expect("rename", &[("comer", AddWatchFlags::IN_MOVED_FROM), ("goer", AddWatchFlags::IN_MOVED_TO)]);
    wait_until("it is named so", || daemon.read(format!("instances/{id}/name")) == "goer");
    daemon.host_does(json!({"do": "undefine", "uuid": uuid}));
    all.expect("undefine", &[(uuid, AddWatchFlags::IN_DELETE)]);
    names.expect("undefine", &[("goer", AddWatchFlags::IN_DELETE)]);
    stopped.expect("undefine", &[(uuid, AddWatchFlags::IN_DELETE)]);
    let draft = Uuid::new_v4();
    fs::create_dir(daemon.path(format!("instances/{draft}"))).expect("a draft");
    all.expect("mkdir", &[(draft.to_string().as_str(), AddWatchFlags::IN_CREATE)]);
}

#[test]
fn poll_says_priority_until_the_file_is_read_again() {
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("polled");
    let path = daemon.path(format!("instances/{id}/state"));
    let file = File::open(&path).expect("opens");
    let read = || {
        let mut bytes = [0; 32];
        let length = std::os::unix::fs::FileExt::read_at(&file, &mut bytes, 0).expect("readable");
        String::from_utf8_lossy(&bytes[..length]).trim_end().to_owned()
    };
    assert_eq!(read(), "stopped");
    let pending = |milliseconds: u16| {
        let mut descriptors = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
        poll(&mut descriptors, PollTimeout::from(milliseconds)).expect("poll");
        descriptors[0].revents().is_some_and(|events| events.contains(PollFlags::POLLPRI))
    };
    assert!(!pending(0), "nothing changed since it was read");
    for (what, state) in [("start", "active"), ("pause", "paused"), ("unpause", "active")] {
        daemon.host_does(json!({"do": what, "uuid": id.to_string()}));
        assert!(pending(20_000), "{what} wakes");
        assert!(pending(0), "and stays until it is read");
        wait_until("the value", || read() == state);
        wait_until("quiet again", || {
            read();
            !pending(0)
        });
    }
}

#[test]
fn a_fanotify_listener_hears_it_too() {
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("listened");
    let state = daemon.path(format!("instances/{id}/state"));
    let group = Fanotify::init(FanotifyInit::FAN_CLASS_NOTIF | FanotifyInit::FAN_NONBLOCK, EventFFlags::O_RDONLY)
        .expect("fanotify");
    group
        .mark(MarkFlags::FAN_MARK_ADD, MaskFlags::FAN_CLOSE_WRITE, nix::fcntl::AT_FDCWD, Some(&state))
        .expect("a mark");
    daemon.host_does(json!({"do": "start", "uuid": id.to_string()}));
    wait_until("FAN_CLOSE_WRITE", || match group.read_events() {
        Ok(events) => events.iter().any(|event| event.mask().contains(MaskFlags::FAN_CLOSE_WRITE)),
        Err(nix::errno::Errno::EAGAIN) => false,
        Err(error) => panic!("fanotify: {error}"),
    });
    assert_eq!(daemon.read(format!("instances/{id}/state")), "active");
}

#[test]
fn nothing_is_announced_where_nothing_changed() {
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("quiet");
    let other = daemon.domain("loud");
    wait_until("definitions are fetched", || {
        [id, other].iter().all(|id| daemon.path(format!("instances/{id}/domain.xml")).exists())
    });
    let watch = Watch::new().on(&daemon.path(format!("instances/{id}")));
    let mut last = Instant::now();
    wait_until("what came before is announced", || {
        if watch.drain() > 0 {
            last = Instant::now();
        }
        last.elapsed() > Duration::from_secs(1)
    });
    let marker = Watch::new().on(&daemon.path(format!("instances/{other}")));
    for round in 0..20 {
        daemon.set(format!("instances/{other}/description"), &format!("round {round}"));
        drop(daemon.read(format!("instances/{id}/state")));
    }
    daemon.set(format!("instances/{other}/locked"), "1");
    marker.expect("the last change", &changed(&["locked"]));
    assert_eq!(watch.drain(), 0, "events without a change");
}

#[test]
fn a_new_owner_is_seen_by_stat_and_has_the_rights_and_the_old_one_has_not() {
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("given-away");
    let path = |name: &str| daemon.path(format!("instances/{id}/{name}"));
    let names = ["", "state", "locked", "description"];
    let owners = || names.map(|name| fs::metadata(path(name)).expect("stat").uid());
    for uid in [2001, 2002] {
        daemon.set(format!("instances/{id}/owner"), &uid.to_string());
        wait_until("stat shows the owner everywhere", || owners() == [uid; 4]);
    }
    let user = |uid| User { uid, gid: gid("libvirt"), groups: Vec::new() };
    let reads = |uid| user(uid).act(|| fs::read(path("state")));
    assert!(reads(2002).is_ok(), "the owner reads");
    assert_eq!(errno(reads(2001)), libc::EACCES, "the one before does not");
}

#[test]
fn the_data_of_an_active_image_is_read_only_for_stat_too() {
    let daemon = Daemon::start(&[]);
    let id = Uuid::new_v4();
    let file = daemon.scratch().join("disk.qcow2");
    let status = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&file).arg("8M").status();
    assert!(status.expect("qemu-img runs").success());
    let (home, bytes) = (daemon.path(format!("images/{id}")), fs::read(&file).expect("an image"));
    fs::create_dir(&home).expect("a draft");
    fs::write(home.join("data"), &bytes).expect("data is taken");
    let data = || fs::metadata(home.join("data")).expect("stat");
    assert_eq!((data().mode() & 0o777, data().len()), (0o660, bytes.len() as u64));
    daemon.set(format!("images/{id}/state"), "active");
    wait_until("the image is active", || daemon.read(format!("images/{id}/state")) == "active");
    wait_until("stat shows it", || (data().mode() & 0o777, data().len()) == (0o440, bytes.len() as u64));
}
