//! Every file that can change is watched by inotify, poll and fanotify at once while it changes in every way.
//!
//! A watcher reads only when it is woken. So what is shown is that at least one event comes after the last change, and
//! that the right value can be read by then.

mod support;

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags as FanotifyInit, MarkFlags, MaskFlags};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde_json::json;
use support::{DEADLINE, Daemon, wait_until};
use uuid::Uuid;

/// How long a file has to be silent to be called so; an announcement comes at most 50 ms after the one before.
const SILENCE: Duration = Duration::from_millis(500);

/// The three kinds of watchers on one file.
struct Watchers {
    path: PathBuf,
    inotify: Inotify,
    polled: File,
    fanotify: Fanotify,
}

impl Watchers {
    fn on(path: PathBuf) -> Watchers {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK).expect("inotify");
        let flags = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CLOSE_WRITE;
        inotify.add_watch(&path, flags).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let fanotify =
            Fanotify::init(FanotifyInit::FAN_CLASS_NOTIF | FanotifyInit::FAN_NONBLOCK, EventFFlags::O_RDONLY)
                .expect("fanotify");
        fanotify
            .mark(MarkFlags::FAN_MARK_ADD, MaskFlags::FAN_CLOSE_WRITE, nix::fcntl::AT_FDCWD, Some(&path))
            .expect("a mark");
        let polled = File::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let watchers = Watchers { path, inotify, polled, fanotify };
        watchers.read_polled();
        watchers
    }

    fn read(&self) -> String {
        fs::read_to_string(&self.path).unwrap_or_else(|error| panic!("{}: {error}", self.path.display()))
    }

    fn read_polled(&self) -> String {
        let mut bytes = vec![0; 256 << 10];
        let length = self.polled.read_at(&mut bytes, 0).expect("readable");
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    }

    fn inotify_heard(&self) -> bool {
        match self.inotify.read_events() {
            Ok(events) => !events.is_empty(),
            Err(Errno::EAGAIN) => false,
            Err(error) => panic!("inotify: {error}"),
        }
    }

    fn fanotify_heard(&self) -> bool {
        match self.fanotify.read_events() {
            Ok(events) => !events.is_empty(),
            Err(Errno::EAGAIN) => false,
            Err(error) => panic!("fanotify: {error}"),
        }
    }

    fn poll_heard(&self) -> bool {
        let mut descriptors = [PollFd::new(self.polled.as_fd(), PollFlags::POLLPRI)];
        poll(&mut descriptors, PollTimeout::ZERO).expect("poll");
        descriptors[0].revents().is_some_and(|events| events.contains(PollFlags::POLLPRI))
    }

    /// Each kind of watcher, woken, reads what is right.
    fn see(&self, what: &str, right: &dyn Fn(&str) -> bool) {
        let kinds: [(&str, &dyn Fn() -> Option<String>); 3] = [
            ("inotify", &|| self.inotify_heard().then(|| self.read())),
            ("poll", &|| self.poll_heard().then(|| self.read_polled())),
            ("fanotify", &|| self.fanotify_heard().then(|| self.read())),
        ];
        let end = Instant::now() + DEADLINE / 2;
        for (kind, woken) in kinds {
            let mut read = None;
            while !read.as_deref().is_some_and(right) {
                read = woken().or(read);
                assert!(
                    Instant::now() < end,
                    "{what}: {kind} on {}: last read {read:?}, is {:?}",
                    self.path.display(),
                    self.read()
                );
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }

    /// Which kinds heard anything.
    fn heard(&self) -> Vec<&'static str> {
        let kinds =
            [("inotify", self.inotify_heard()), ("poll", self.poll_heard()), ("fanotify", self.fanotify_heard())];
        kinds.into_iter().filter(|(_, heard)| *heard).map(|(kind, _)| kind).collect()
    }
}

/// Forgets what was heard so far, once nothing more comes.
fn settle(all: &[Watchers]) {
    let mut last = Instant::now();
    wait_until("silence", || {
        for watchers in all {
            if !watchers.heard().is_empty() {
                watchers.read_polled();
                last = Instant::now();
            }
        }
        last.elapsed() > SILENCE
    });
}

/// Files, and what each reads in the end; `*` means anything but what it read before.
type Effects<'a> = &'a [(&'a str, &'a str)];

/// Does something, and has all watchers of all these files see it.
fn act(daemon: &Daemon, what: &str, files: Effects<'_>, act: impl FnOnce()) {
    let watched: Vec<_> = files
        .iter()
        .map(|(path, value)| {
            let watchers = Watchers::on(daemon.path(path));
            let before = watchers.read();
            (watchers, *value, before)
        })
        .collect();
    act();
    for (watchers, value, before) in &watched {
        watchers.see(what, &|text| match *value {
            "*" => text != before,
            part if part.starts_with('~') => text.contains(&part[1..]),
            value => text.strip_suffix('\n') == Some(value),
        });
    }
}

#[test]
fn every_attribute_of_an_instance() {
    let daemon = Daemon::start(&["--settle", "200ms"]);
    let id = daemon.domain("watched");
    let bystander = daemon.domain("bystander");
    wait_until("definitions are fetched", || {
        [id, bystander].iter().all(|id| daemon.path(format!("instances/{id}/domain.xml")).exists())
    });
    let silent: Vec<_> = fs::read_dir(daemon.path(format!("instances/{bystander}")))
        .expect("listed")
        .map(|entry| entry.expect("an entry"))
        .filter(|entry| entry.file_type().expect("a type").is_file() && File::open(entry.path()).is_ok())
        .filter(|entry| fs::read(entry.path()).is_ok())
        .map(|entry| Watchers::on(entry.path()))
        .collect();
    assert!(silent.len() > 20, "most files of an instance can be read");
    settle(&silent);

    let set = |name: &str, value: &str| daemon.set(format!("instances/{id}/{name}"), value);
    let host = |what: &str| drop(daemon.host_does(json!({"do": what, "uuid": id.to_string()})));
    let on = |what: &str, files: Effects<'_>, does: &dyn Fn()| {
        let paths: Vec<String> = files
            .iter()
            .map(|(name, _)| if name.contains('/') { (*name).to_owned() } else { format!("instances/{id}/{name}") })
            .collect();
        let files: Vec<_> = paths.iter().zip(files).map(|(path, (_, value))| (path.as_str(), *value)).collect();
        act(&daemon, what, &files, does);
    };
    let summary = format!("~{id}\twatched\t");
    on(
        "start by virsh",
        &[
            ("state", "active"),
            ("power_state", "running"),
            ("state_available", "*"),
            ("state_reason", "*"),
            ("launched_at", "*"),
            ("summary/instances", &format!("{summary}active\t")),
        ],
        &|| host("start"),
    );
    on("pause by virsh", &[("state", "paused"), ("power_state", "paused"), ("state_reason", "*")], &|| host("pause"));
    on("unpause by write", &[("state", "active"), ("task", ""), ("progress", "")], &|| set("state", "active"));
    on("save by virsh", &[("state", "suspended"), ("power_state", "shutoff")], &|| host("save"));
    on("resume by write", &[("state", "active"), ("last_error", "ok")], &|| {
        drop(daemon.write(format!("instances/{id}/vcpus"), "none"));
        set("state", "active");
    });
    on(
        "sleep in the guest",
        &[("state", "paused"), ("power_state", "pmsuspended"), ("state_reason", "pmsuspended")],
        &|| {
            host("sleep");
        },
    );
    on("wake in the guest", &[("state", "active"), ("power_state", "running")], &|| host("wake"));
    on("an I/O error", &[("state", "error"), ("state_reason", "ioerror")], &|| host("ioerror"));
    on("stop by virsh", &[("power_state", "shutoff")], &|| host("stop"));
    on("start by write", &[("state", "active"), ("task", "")], &|| {
        set("state", "active");
    });
    on(
        "lock",
        &[
            ("locked", "1"),
            ("locked_level", "admin"),
            ("locked_by", "*"),
            ("locked_at", "*"),
            ("state_available", ""),
            ("summary/instances", "*"),
        ],
        &|| set("locked", "1"),
    );
    on("reason", &[("locked_reason", "audit")], &|| set("locked_reason", "audit"));
    on(
        "unlock",
        &[("locked", "0"), ("locked_level", ""), ("locked_by", ""), ("locked_at", ""), ("locked_reason", "")],
        &|| set("locked", "0"),
    );
    on("protect", &[("disable_terminate", "1"), ("summary/instances", "*")], &|| set("disable_terminate", "1"));
    on("describe", &[("description", "a text"), ("spec.json", "~a text"), ("domain.xml", "*")], &|| {
        set("description", "a text");
    });
    on("describe thrice", &[("description", "third")], &|| {
        ["first", "second", "third"].iter().for_each(|value| set("description", value));
    });
    on("time-out", &[("stop_timeout_seconds", "7"), ("spec.json", "*")], &|| set("stop_timeout_seconds", "7"));
    on("own", &[("owner", "2001"), ("summary/instances", "~\t2001\t")], &|| set("owner", "2001"));
    on("share", &[("project", "games"), ("summary/instances", "~\tgames\n")], &|| set("project", "games"));
    on("a refusal", &[("last_error", "~EINVAL"), ("errors", "*"), ("./events", "~EINVAL")], &|| {
        drop(daemon.write(format!("instances/{id}/vcpus"), "none"));
    });
    on("stop by write", &[("state", "stopped"), ("task", ""), ("last_error", "ok"), ("updated_at", "*")], &|| {
        // So that the time differs from that of the change before.
        std::thread::sleep(Duration::from_millis(1100));
        set("state", "stopped");
    });
    on("rename", &[("name", "renamed"), ("spec.json", "~renamed"), ("domain.xml", "~renamed")], &|| {
        set("name", "renamed")
    });
    on("rename by virsh", &[("name", "other"), ("summary/instances", "~\tother\t")], &|| {
        daemon.host_does(json!({"do": "rename", "uuid": id.to_string(), "name": "other"}));
    });
    on("crash", &[("state", "error"), ("state_reason", "crashed")], &|| {
        host("start");
        host("crash");
    });

    for watchers in &silent {
        assert_eq!(watchers.heard(), [] as [&str; 0], "{} did not change", watchers.path.display());
    }
}

#[test]
fn every_attribute_of_a_task() {
    let daemon = Daemon::start(&["--settle", "100ms"]);
    let id = daemon.domain("working");
    daemon.domain_does(id, "start", "active");
    daemon.host_does(json!({"do": "guest", "uuid": id.to_string(), "ignores_acpi": true}));
    daemon.set(format!("instances/{id}/stop_timeout_seconds"), "2");
    daemon.set(format!("instances/{id}/state"), "stopped");
    let link = fs::read_link(daemon.path(format!("instances/{id}/last_task"))).expect("a task");
    let task = link.file_name().expect("its id").to_str().expect("UTF-8").to_owned();
    let path = |name: &str| format!("tasks/{task}/{name}");
    assert_eq!(daemon.read(path("state")), "processing");
    let files = ["state", "phase", "progress", "ended_at", "expires_at"].map(path);
    let values = ["success", "*", "100", "*", "*"];
    let effects: Vec<_> = files.iter().map(String::as_str).zip(values).collect();
    act(&daemon, "the end", &effects, || ());
}

#[test]
fn every_attribute_of_an_image_and_its_places() {
    let daemon = Daemon::start(&[]);
    let file = daemon.scratch().join("disk.qcow2");
    let status = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&file).arg("8M").status();
    assert!(status.expect("qemu-img runs").success());
    let id = Uuid::new_v4();
    let home = daemon.path(format!("images/{id}"));
    fs::create_dir(&home).expect("a draft");
    let on = |what: &str, files: Effects<'_>, does: &dyn Fn()| {
        let paths: Vec<String> = files
            .iter()
            .map(|(name, _)| if name.contains('/') { (*name).to_owned() } else { format!("images/{id}/{name}") })
            .collect();
        let files: Vec<_> = paths.iter().zip(files).map(|(path, (_, value))| (path.as_str(), *value)).collect();
        act(&daemon, what, &files, does);
    };
    let set = |name: &str, value: &str| daemon.set(format!("images/{id}/{name}"), value);
    on("name", &[("name", "golden"), ("summary/images", "~\tgolden\t")], &|| set("name", "golden"));
    on("describe", &[("description", "a text")], &|| set("description", "a text"));
    on("format", &[("disk_format", "qcow2"), ("summary/images", "~\tqcow2\t")], &|| set("disk_format", "qcow2"));
    on("own", &[("owner", "2001")], &|| set("owner", "2001"));
    on("share", &[("project", "games")], &|| set("project", "games"));
    on("a refusal", &[("last_error", "~EINVAL"), ("errors", "*")], &|| {
        assert!(daemon.write(format!("images/{id}/disk_format"), "vhd").is_err());
    });
    fs::write(home.join("data"), fs::read(&file).expect("an image")).expect("data is taken");
    let word = |word: &str| {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK).expect("inotify");
        let flags = AddWatchFlags::IN_MOVED_FROM | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_CREATE;
        inotify.add_watch(&daemon.path(word), flags).expect("a watch");
        inotify
    };
    let places = [word("by-state/images/draft"), word("by-state/images/active"), word("by-name/images")];
    on(
        "commit",
        &[
            ("state", "active"),
            ("state_available", "*"),
            ("task", ""),
            ("size_bytes", "*"),
            ("virtual_size_bytes", "8388608"),
            ("sha512", "*"),
            ("summary/images", "~\tactive\t"),
        ],
        &|| set("state", "active"),
    );
    for (place, name) in places.iter().zip([id.to_string(), id.to_string(), "golden".to_owned()]) {
        wait_until(&format!("an event of {name}"), || {
            let events = place.read_events().unwrap_or_default();
            events.iter().any(|event| event.name.as_deref() == Some(name.as_ref()))
        });
    }
    on("rename", &[("name", "silver")], &|| set("name", "silver"));
    wait_until("the link is renamed", || daemon.path("by-name/images/silver").exists());
    assert!(!daemon.path("by-name/images/golden").exists());
}

#[test]
fn a_console_that_grows() {
    let daemon = Daemon::start(&[]);
    let id = Uuid::new_v4();
    let log = daemon.state_directory().join(format!("consoles/{id}.log"));
    let xml = format!(
        "<domain type='qemu'><name>talks</name><uuid>{id}</uuid><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
         <os><type>hvm</type></os><devices><serial type='pty'><log file='{}' append='on'/><target port='0'/></serial>\
         </devices></domain>",
        log.display()
    );
    daemon.host_does(json!({"do": "define", "xml": xml}));
    fs::create_dir_all(log.parent().expect("a directory")).expect("created");
    fs::write(&log, "one\n").expect("written");
    wait_until("the definition is there", || daemon.path(format!("instances/{id}/domain.xml")).exists());
    daemon.domain_does(id, "start", "active");
    let path = format!("instances/{id}/console.log");
    wait_until("the console can be read", || fs::read(daemon.path(&path)).is_ok_and(|text| text == b"one\n"));
    for line in ["two\n", "three\n"] {
        let mut file = OpenOptions::new().append(true).open(&log).expect("opens");
        act(&daemon, "growth", &[(&path, &format!("~{}", line.trim()))], || {
            file.write_all(line.as_bytes()).expect("written");
        });
    }
    assert_eq!(fs::metadata(daemon.path(&path)).expect("stat").len(), 14, "its size grows with it");
}

#[test]
fn health() {
    let daemon = Daemon::start(&[]);
    let files: Effects<'_> = &[("health", "~hypervisor down since")];
    act(&daemon, "disconnection", files, || drop(daemon.host_does(json!({"do": "disconnect"}))));
    act(&daemon, "reconnection", &[("health", "~hypervisor ok")], || {
        drop(daemon.host_does(json!({"do": "reconnect"})))
    });
    let files: Effects<'_> = &[("health", "~hypervisor does not answer since")];
    act(&daemon, "hanging", files, || drop(daemon.host_does(json!({"do": "hang_all"}))));
    act(&daemon, "answering", &[("health", "~hypervisor ok")], || drop(daemon.host_does(json!({"do": "release_all"}))));
}
