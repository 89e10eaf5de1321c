//! Rights, roles, events, and how the mount comes and goes.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::{User, errno, wait_until};
use crate::user::{Ann, NAME, UID, tree};

/// Something happens on her simulated host behind the daemon's back.
fn host_does(ann: &Ann, command: Value) {
    let answer = ann.act(|| {
        let mut socket = UnixStream::connect(ann.home().join("host/control")).expect("the control socket");
        writeln!(socket, "{command}").expect("a command");
        let mut answer = String::new();
        BufReader::new(socket).read_line(&mut answer).expect("an answer");
        answer
    });
    assert!(answer.contains("\"ok\":true"), "{command}: {answer}");
}

fn domain(ann: &Ann) -> String {
    let id = Uuid::new_v4();
    let xml = format!(
        "<domain type='qemu'><name>web</name><uuid>{id}</uuid><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
         <os><type>hvm</type></os></domain>"
    );
    host_does(ann, json!({"do": "define", "xml": xml}));
    let home = format!("instances/{id}");
    wait_until("the domain appears", || ann.act(|| tree(&format!("{home}/state")).exists()));
    home
}

fn mode(ann: &Ann, relative: &str) -> u32 {
    let metadata = ann.act(|| fs::symlink_metadata(tree(relative))).unwrap_or_else(|e| panic!("{relative}: {e}"));
    assert_eq!((metadata.uid(), metadata.gid()), (UID, UID), "{relative} is not hers");
    metadata.mode() & 0o7777
}

#[test]
fn an_ordinary_user_owns_his_tree_and_nobody_else_enters() {
    let ann = Ann::new();
    ann.mount_simulated();
    let home = domain(&ann);
    for directory in ["", "instances", "by-name/instances", "summary", home.as_str()] {
        assert_eq!(mode(&ann, directory), 0o700, "{directory}");
    }
    for file in ["health", "events", "summary/instances", &format!("{home}/power_state")] {
        assert_eq!(mode(&ann, file), 0o644, "{file}");
        assert_eq!(ann.write(file, "x"), libc::EACCES, "{file}");
        assert_eq!(errno(ann.act(|| File::options().write(true).open(tree(file)))), libc::EACCES, "{file}");
    }
    assert_eq!(mode(&ann, &format!("{home}/state")), 0o600);
    assert_eq!(ann.read(&format!("{home}/owner")), NAME);

    assert_eq!(errno(fs::read_dir(tree(""))), libc::EACCES, "root entered");
    let other = User { uid: UID + 1, gid: UID, groups: Vec::new() };
    assert_eq!(errno(other.act(|| fs::read_dir(tree("")))), libc::EACCES, "somebody else entered");

    let state = fs::metadata(ann.state()).expect("the state directory by the XDG specification");
    assert_eq!((state.uid(), state.mode() & 0o7777), (UID, 0o700));
    ann.unmount();
    assert!(!ann.is_mounted());
}

#[test]
fn he_administers_his_tree_but_gives_nothing_away() {
    let ann = Ann::new();
    ann.mount_simulated();
    let home = domain(&ann);
    let file = |name: &str| format!("{home}/{name}");
    ann.set(&file("state"), "active");
    wait_until("it runs", || ann.read(&file("state")) == "active");
    ann.set(&file("locked"), "1");
    assert_eq!((ann.read(&file("locked_level")), ann.read(&file("locked_by"))), ("admin".into(), NAME.into()));
    assert_eq!(ann.write(&file("state"), "stopped"), libc::EPERM);
    assert!(ann.read(&file("last_error")).contains("locked by"));
    ann.set(&file("locked"), "0");
    ann.set(&file("reset_state"), "1");

    for (name, value) in [("owner", "root"), ("project", "root")] {
        assert_eq!(ann.write(&file(name), value), libc::EPERM, "{name}");
        assert!(
            ann.read(&file("last_error")).contains("an ordinary user's mount"),
            "{}",
            ann.read(&file("last_error"))
        );
    }
    let given = ann.act(|| std::os::unix::fs::chown(tree(&file("state")), Some(0), None));
    assert_eq!(errno(given), libc::EPERM);
    ann.set(&file("owner"), NAME);
    ann.make_directory("flavors/small");
    ann.set("flavors/small/vcpus", "2");
    assert_eq!(ann.read(&file("owner")), NAME);
}

#[test]
fn he_puts_away_and_takes_back_what_is_his() {
    let ann = Ann::new();
    ann.mount_simulated();
    let home = domain(&ann);
    let bin = home.replace("instances", "trash");
    let there = |path: &str| ann.act(|| tree(&format!("{path}/state")).exists());
    ann.act(|| fs::rename(tree(&home), tree(&bin))).expect("moved");
    assert_eq!(
        (ann.read(&format!("{bin}/state")), ann.read(&format!("{bin}/deleted_by"))),
        ("soft_deleted".into(), NAME.into())
    );
    assert_eq!((mode(&ann, "trash"), mode(&ann, &format!("{bin}/expires_at"))), (0o700, 0o600));
    wait_until("it is put away", || ann.read(&format!("{bin}/task")).is_empty());
    ann.set(&format!("{bin}/state"), "stopped");
    wait_until("it is back", || there(&home) && !there(&bin));
    let task = format!("tasks/{}", Uuid::new_v4());
    ann.make_directory(&task);
    assert_eq!(mode(&ann, &format!("{task}/cancel")), 0o200);
    assert_eq!(ann.write(&format!("{task}/spec.json"), "{}"), libc::EINVAL);
    ann.act(|| fs::remove_dir(tree(&task))).expect("discarded");
}

#[test]
fn changes_wake_his_watchers_also_of_what_he_cannot_write() {
    let ann = Ann::new();
    ann.mount_simulated();
    let home = domain(&ann);
    let power = format!("{home}/power_state");
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK).expect("inotify");
    let woken = |name: &str| {
        let events = inotify.read_events().unwrap_or_default();
        events.iter().any(|event| name.is_empty() || event.name.as_deref().is_some_and(|seen| seen == name))
    };
    ann.act(|| inotify.add_watch(&tree(&power), AddWatchFlags::IN_MODIFY)).expect("a watch");
    host_does(&ann, json!({"do": "start", "uuid": home.trim_start_matches("instances/")}));
    wait_until("the watcher of power_state is woken", || woken(""));
    wait_until("and reads the change", || ann.read(&power) == "running");

    ann.act(|| inotify.add_watch(&tree("instances"), AddWatchFlags::IN_CREATE)).expect("a watch");
    let second = Uuid::new_v4().to_string();
    ann.make_directory(&format!("instances/{second}"));
    wait_until("the watcher of the directory is woken", || woken(&second));
    let id = home.trim_start_matches("instances/");
    let link = tree(&format!("by-state/instances/active/{id}"));
    wait_until("the link stands", || ann.act(|| link.is_symlink()));
    ann.act(|| inotify.add_watch(&tree("by-state/instances/active"), AddWatchFlags::IN_MOVED_FROM)).expect("a watch");
    host_does(&ann, json!({"do": "stop", "uuid": id}));
    wait_until("a link that moves wakes as well", || woken(id));
}

#[test]
fn what_stands_in_the_way_of_his_mount_is_said_with_its_remedy() {
    let ann = Ann::with_device(0o600);
    let words = ann.refusal(Ann::instancefs(&["mount", "machines"]));
    assert!(words.contains("/dev/fuse") && words.contains("0600") && words.contains("chmod 0666"), "{words}");

    fs::set_permissions("/dev/fuse", std::os::unix::fs::PermissionsExt::from_mode(0o666))
        .expect("the test's own device");
    let mut without = Ann::instancefs(&["mount", "--connect", "test:///default", "machines"]);
    without.env("PATH", "/nowhere");
    let words = ann.refusal(without);
    assert!(words.contains("fusermount3 is missing") && words.contains("apt install fuse3"), "{words}");

    let long = ann.home().join("a".repeat(60));
    let words = ann.refusal(Ann::instancefs(&["mount", "--state-dir", &long.to_string_lossy(), "machines"]));
    assert!(words.contains("too long") && words.contains("--state-dir"), "{words}");
    assert!(!ann.is_mounted());
}

#[test]
fn his_daemon_ends_when_told_even_while_a_file_is_open_and_another_takes_its_place_after_a_crash() {
    let ann = Ann::new();
    ann.mount_simulated();
    let open = ann.act(|| OpenOptions::new().read(true).open(tree("health"))).expect("an open file");
    ann.signal(libc::SIGTERM);
    assert!(ann.ended(), "{}", ann.log());
    assert!(!ann.is_mounted());
    drop(open);

    ann.mount_simulated();
    ann.signal(libc::SIGKILL);
    assert!(!ann.ended());
    assert!(ann.is_mounted(), "a killed daemon leaves its mount");
    ann.mount_simulated();
    assert!(ann.log().contains("left behind"), "{}", ann.log());
    ann.unmount();
}
