//! `instancefs watch`, on a mounted tree.

mod support;

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::{Value, json};
use support::{Daemon, gid, signal, wait_until};
use uuid::Uuid;

/// The bound of `events`, of which its documentation tells.
const EVENTS_BOUND: u64 = 16 << 20;
/// Somebody with no rights but those of the group that he is given.
const STRANGER: u32 = 64_999;

/// A running `watch`, ended with the test.
struct Watch {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Watch {
    fn start<S: AsRef<OsStr>>(arguments: &[S]) -> Watch {
        Watch::run(Watch::command(Path::new(env!("CARGO_BIN_EXE_instancefs"))).args(arguments))
    }

    fn command(program: &Path) -> Command {
        // A shell's background job ignores interrupts, and so do the tests that it runs, and their children.
        let mut command = Command::new("env");
        command.arg("--default-signal=INT").arg(program).arg("watch");
        command
    }

    /// As a stranger whose group may enter the tree, but not read `events`.
    fn as_member<S: AsRef<OsStr>>(daemon: &Daemon, arguments: &[S]) -> Watch {
        // The build's directory need not be open to others.
        let program = daemon.scratch().join("instancefs");
        if !program.exists() {
            fs::copy(env!("CARGO_BIN_EXE_instancefs"), &program).expect("copied");
        }
        let mut command = Watch::command(&program);
        Watch::run(command.args(arguments).uid(STRANGER).gid(gid("libvirt")).current_dir("/"))
    }

    fn run(command: &mut Command) -> Watch {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("it starts");
        let lines = Arc::new(Mutex::new(Vec::new()));
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let seen = Arc::clone(&lines);
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                seen.lock().expect("unpoisoned").push(line);
            }
        });
        let mut watch = Watch { child, lines };
        watch.wait_until_it_sleeps();
        watch
    }

    /// It has looked at everything and sleeps in poll, which is what it does nowhere else.
    fn wait_until_it_sleeps(&mut self) {
        let stat = format!("/proc/{}/syscall", self.child.id());
        // The number of poll(2) on x86_64 is 7; elsewhere poll(3) is ppoll.
        let polls = |text: &str| ["7 ", "73 ", "271 "].iter().any(|number| text.starts_with(number));
        wait_until("watch sleeps", || {
            let ended = self.child.try_wait().expect("waits");
            assert!(ended.is_none(), "it ended: {}", self.complaint());
            fs::read_to_string(&stat).is_ok_and(|text| polls(&text))
        });
    }

    fn complaint(&mut self) -> String {
        let mut text = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            stderr.read_to_string(&mut text).expect("read");
        }
        text
    }

    fn lines(&self) -> Vec<String> {
        self.lines.lock().expect("unpoisoned").clone()
    }

    fn waits_for(&self, parts: &[&str]) -> String {
        let mut found = None;
        wait_until(&format!("a line with {parts:?}"), || {
            found = self.lines().into_iter().find(|line| parts.iter().all(|part| line.contains(part)));
            found.is_some()
        });
        found.expect("found")
    }

    /// Its exit code as a shell says it, and its complaint.
    fn end(mut self) -> (i32, String) {
        let mut status = None;
        wait_until("watch ends", || {
            status = self.child.try_wait().expect("waits");
            status.is_some()
        });
        let status = status.expect("ended");
        (status.code().unwrap_or_else(|| 128 + status.signal().expect("a signal")), self.complaint())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn directory(daemon: &Daemon, id: Uuid) -> PathBuf {
    daemon.path(format!("instances/{id}"))
}

#[test]
fn changes_by_users_and_by_the_host_are_told_with_who_made_them() {
    let daemon = Daemon::start(&[]);
    let watch = Watch::start(&[daemon.root()]);
    let id = daemon.domain("web1");
    watch.waits_for(&["instance web1 appeared", "by libvirt"]);
    daemon.set(format!("instances/{id}/description"), "one");
    daemon.set(format!("instances/{id}/description"), "two");
    watch.waits_for(&["instance web1 description: one -> two, by "]);
    daemon.domain_does(id, "start", "active");
    watch.waits_for(&["instance web1 state: stopped -> active", "by libvirt"]);
    daemon.set(format!("instances/{id}/locked"), "1");
    daemon.write(format!("instances/{id}/state"), "stopped").expect_err("it is locked");
    watch.waits_for(&["instance web1 state", "EPERM: locked by"]);
}

#[test]
fn of_one_object_or_class_nothing_else_is_told() {
    let daemon = Daemon::start(&[]);
    let (one, other) = (daemon.domain("one"), daemon.domain("other"));
    let object = Watch::start(&[directory(&daemon, one)]);
    let class = Watch::start(&[daemon.path("images")]);
    let image = Uuid::new_v4();
    for id in [other, one] {
        daemon.set(format!("instances/{id}/description"), "changed");
    }
    fs::create_dir(daemon.path(format!("images/{image}"))).expect("a draft");
    object.waits_for(&["one description: changed"]);
    class.waits_for(&["image", &image.to_string(), "draft"]);
    assert!(object.lines().iter().all(|line| line.contains(" one ")), "{:?}", object.lines());
    assert!(class.lines().iter().all(|line| line.contains(" image ")), "{:?}", class.lines());
}

#[test]
fn the_value_of_one_file_is_told_before_and_after() {
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("web1");
    let watch = Watch::start(&[directory(&daemon, id).join("power_state")]);
    daemon.domain_does(id, "start", "active");
    watch.waits_for(&["instance web1 power_state: shutoff -> running"]);
    daemon.set(format!("instances/{id}/description"), "else");
    daemon.host_does(json!({"do": "power_off", "uuid": id.to_string()}));
    watch.waits_for(&["power_state: running -> shutoff"]);
    assert_eq!(watch.lines().len(), 2, "{:?}", watch.lines());
}

#[test]
fn links_of_states_are_told_as_they_come_and_go() {
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("web1");
    let watch = Watch::start(&[daemon.path("by-state/instances/active")]);
    let link = format!("by-state/instances/active/{id}");
    daemon.domain_does(id, "start", "active");
    watch.waits_for(&[&link, "appeared"]);
    daemon.domain_does(id, "power_off", "stopped");
    watch.waits_for(&[&link, "disappeared"]);
}

#[test]
fn who_may_not_read_events_is_told_what_differs() {
    let daemon = Daemon::start(&[]);
    let tree = Watch::as_member(&daemon, &[daemon.root()]);
    let id = daemon.domain("web1");
    let line = tree.waits_for(&["instance web1 appeared: stopped"]);
    assert!(!line.contains(", by "), "nobody told it who: {line}");
    daemon.domain_does(id, "start", "active");
    tree.waits_for(&["instance web1 state: stopped -> active"]);
    daemon.set(format!("instances/{id}/locked"), "1");
    tree.waits_for(&["instance web1 locked: 0 -> 1"]);
    daemon.set(format!("instances/{id}/locked"), "0");
    daemon.host_does(json!({"do": "power_off", "uuid": id.to_string()}));
    daemon.host_does(json!({"do": "undefine", "uuid": id.to_string()}));
    tree.waits_for(&["instance web1 disappeared"]);
}

#[test]
fn a_member_is_told_every_value_of_an_object_of_its_group() {
    let daemon = Daemon::start(&["-o", "projects=libvirt"]);
    let id = daemon.domain("web1");
    daemon.set(format!("instances/{id}/project"), "libvirt");
    let watch = Watch::as_member(&daemon, &[directory(&daemon, id)]);
    daemon.domain_does(id, "start", "active");
    watch.waits_for(&["instance web1 state: stopped -> active"]);
    watch.waits_for(&["instance web1 power_state: shutoff -> running"]);
    daemon.set(format!("instances/{id}/description"), "mine");
    watch.waits_for(&["instance web1 description: mine"]);
}

#[test]
fn json_has_the_keys_of_events_from_both_sources() {
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("web1");
    let events = Watch::start(&[OsStr::new("--json"), daemon.root().as_os_str()]);
    let values = Watch::start(&[OsStr::new("--json"), directory(&daemon, id).join("description").as_os_str()]);
    daemon.set(format!("instances/{id}/description"), "text");
    for watch in [&events, &values] {
        let line: Value = serde_json::from_str(&watch.waits_for(&["\"description\""])).expect("JSON");
        let keys: Vec<&str> = line.as_object().expect("an object").keys().map(String::as_str).collect();
        let mut expected =
            ["seq", "time", "class", "uuid", "name", "uid", "login", "what", "from", "to", "errno", "reason"];
        expected.sort_unstable();
        assert_eq!(keys, expected);
        assert_eq!((&line["to"], &line["uuid"]), (&json!("text"), &json!(id.to_string())));
    }
}

#[test]
fn control_characters_do_not_reach_the_terminal() {
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("web1");
    let watch = Watch::start(&[daemon.root()]);
    let refused = daemon.write(format!("instances/{id}/vcpus"), "\u{9b}31m");
    refused.expect_err("no number");
    daemon.set(format!("instances/{id}/description"), "end");
    watch.waits_for(&["description: end"]);
    assert!(watch.lines().iter().all(|line| !line.chars().any(char::is_control)), "{:?}", watch.lines());
}

/// Fills `events` of a stopped daemon up to some bytes below its bound.
fn fill_events(daemon: &Daemon, room: u64) {
    let path = daemon.state_directory().join("events");
    let mut file = fs::OpenOptions::new().append(true).open(&path).expect("events");
    let text = fs::read_to_string(&path).expect("events");
    let last: Value = serde_json::from_str(text.lines().last().expect("a line")).expect("JSON");
    let mut seq = last["seq"].as_u64().expect("a number");
    loop {
        let left = (EVENTS_BOUND - room).saturating_sub(file.metadata().expect("its length").len());
        if left < 300 {
            break;
        }
        seq += 1;
        let padding = "x".repeat(usize::try_from(left.min(64 << 10)).expect("small") - 200);
        writeln!(file, "{}", json!({"seq": seq, "time": 1, "what": "filler", "reason": padding})).expect("written");
    }
}

#[test]
fn no_line_is_lost_or_told_twice_when_events_is_rotated() {
    const CHANGES: usize = 60;
    let mut daemon = Daemon::start(&[]);
    let id = daemon.domain("web1");
    assert!(daemon.stop());
    fill_events(&daemon, 6000);
    daemon.spawn();
    let watch = Watch::start(&[OsStr::new("--json"), daemon.root().as_os_str()]);
    for change in 0..CHANGES {
        daemon.set(format!("instances/{id}/description"), &format!("text {change}"));
    }
    watch.waits_for(&[&format!("\"text {}\"", CHANGES - 1)]);
    assert!(daemon.state_directory().join("events.1").exists(), "it was rotated");
    let lines: Vec<Value> = watch.lines().iter().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let seqs: Vec<u64> = lines.iter().map(|line| line["seq"].as_u64().expect("a number")).collect();
    let expected: Vec<u64> = (seqs[0]..).take(seqs.len()).collect();
    assert_eq!(seqs, expected);
    let told: Vec<&str> =
        lines.iter().filter(|line| line["what"] == "description").map(|line| line["to"].as_str().unwrap()).collect();
    let expected: Vec<String> = (0..CHANGES).map(|change| format!("text {change}")).collect();
    assert_eq!(told, expected);
}

#[test]
fn an_unmount_ends_it_with_a_sentence_and_is_not_hindered() {
    let mut daemon = Daemon::start(&[]);
    let id = daemon.domain("web1");
    let watches = [
        Watch::start(&[daemon.root()]),
        Watch::start(&[directory(&daemon, id)]),
        Watch::start(&[directory(&daemon, id).join("state")]),
        Watch::start(&[daemon.path("by-state/instances/active")]),
    ];
    // Busy only while somebody looks just now.
    wait_until("it can be unmounted", || Command::new("umount").arg(daemon.root()).output().unwrap().status.success());
    assert!(daemon.stop());
    for watch in watches {
        let (code, complaint) = watch.end();
        assert_eq!(code, 1);
        assert!(
            complaint.starts_with("instancefs: the tree ") && complaint.contains("not mounted any more"),
            "{complaint}"
        );
        assert_eq!(complaint.lines().count(), 1, "{complaint}");
    }
}

#[test]
fn the_death_of_the_daemon_ends_it_and_after_a_restart_it_goes_on_counting() {
    let mut daemon = Daemon::start(&[]);
    let id = daemon.domain("web1");
    let first = Watch::start(&[OsStr::new("--json"), daemon.root().as_os_str()]);
    let value = Watch::start(&[directory(&daemon, id).join("state")]);
    daemon.set(format!("instances/{id}/description"), "before");
    let seq = |line: &str| serde_json::from_str::<Value>(line).expect("JSON")["seq"].as_u64().expect("a number");
    let before = seq(&first.waits_for(&["\"before\""]));
    daemon.kill();
    for watch in [first, value] {
        let (code, complaint) = watch.end();
        assert_eq!(code, 1);
        assert!(complaint.contains("daemon") && complaint.contains("is gone"), "{complaint}");
    }
    daemon.spawn();
    let second = Watch::start(&[OsStr::new("--json"), daemon.root().as_os_str()]);
    daemon.set(format!("instances/{id}/description"), "after");
    assert!(seq(&second.waits_for(&["\"after\""])) > before);
    assert!(second.lines().iter().all(|line| !line.contains("\"before\" ")), "the past is not told again");
}

#[test]
fn an_interrupt_ends_it_at_once_and_a_closed_pipe_quietly() {
    let daemon = Daemon::start(&[]);
    let watch = Watch::start(&[daemon.root()]);
    signal(watch.child.id(), libc::SIGINT);
    assert_eq!(watch.end(), (130, String::new()));

    let mut command = Watch::command(Path::new(env!("CARGO_BIN_EXE_instancefs")));
    let command = command.arg(daemon.root()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("it starts");
    drop(child.stdout.take());
    let watch = Watch { child, lines: Arc::default() };
    assert_eq!(watch.end(), (0, String::new()));
}

#[test]
fn without_a_path_the_tree_of_the_current_directory_is_meant() {
    let daemon = Daemon::start(&[]);
    let mut command = Watch::command(Path::new(env!("CARGO_BIN_EXE_instancefs")));
    let watch = Watch::run(command.current_dir(daemon.path("images")));
    daemon.domain("web1");
    watch.waits_for(&["instance web1 appeared"]);
}

#[test]
fn what_is_no_tree_or_not_there_is_refused() {
    let daemon = Daemon::start(&[]);
    let absent = directory(&daemon, Uuid::new_v4());
    for (path, word) in [(Path::new("/usr"), "in no instancefs tree"), (&absent, "no such file or object")] {
        let output = Command::new(env!("CARGO_BIN_EXE_instancefs")).arg("watch").arg(path).output().expect("it runs");
        assert_eq!(output.status.code(), Some(1));
        let complaint = String::from_utf8(output.stderr).expect("UTF-8");
        assert!(complaint.starts_with("instancefs: ") && complaint.contains(word), "{complaint}");
    }
}
