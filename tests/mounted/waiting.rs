//! `instancefs wait` on the real tree.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;
use uuid::Uuid;

use crate::support::{DEADLINE, Daemon, signal, wait_until};

struct Waiter(Child);

impl Waiter {
    fn start(paths: &[PathBuf], rest: &[&str]) -> Waiter {
        let mut command = Command::new(env!("CARGO_BIN_EXE_instancefs"));
        command.arg("wait").args(paths).args(rest).stdin(Stdio::null());
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
        Waiter(child)
    }

    /// It has looked and sleeps in poll(2).
    fn sleeps(&mut self) {
        let syscall = format!("/proc/{}/syscall", self.0.id());
        wait_until("it sleeps", || {
            assert!(self.0.try_wait().expect("waits").is_none(), "it ended");
            let text = fs::read_to_string(&syscall).unwrap_or_default();
            ["7 ", "73 ", "271 "].iter().any(|number| text.starts_with(number))
        });
    }

    fn end(mut self) -> (Option<i32>, String) {
        let mut status = None;
        wait_until("it ends", || {
            status = self.0.try_wait().expect("waits");
            status.is_some()
        });
        let mut said = String::new();
        self.0.stderr.take().expect("piped").read_to_string(&mut said).expect("text");
        (status.and_then(|status| status.code()), said)
    }

    /// Processor time used, in ticks of a hundredth of a second.
    fn ticks(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id())).expect("a process");
        let fields: Vec<_> = stat.rsplit(") ").next().expect("fields").split(' ').collect();
        fields[11].parse::<u64>().expect("a number") + fields[12].parse::<u64>().expect("a number")
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn running(daemon: &Daemon, name: &str) -> Uuid {
    let id = daemon.domain(name);
    daemon.domain_does(id, "start", "active");
    daemon.host_does(json!({"do": "guest", "uuid": id.to_string(), "acpi_delay_ms": 400}));
    id
}

fn ask(daemon: &Daemon, id: Uuid, word: &str) {
    daemon.set(format!("instances/{id}/state"), word);
}

/// No settle window: a write returns while its task runs.
const AT_ONCE: &[&str] = &["-o", "settle=0s"];

#[test]
fn several_objects_by_any_path_are_waited_for_without_using_the_processor() {
    let daemon = Daemon::start(AT_ONCE);
    let ids = [running(&daemon, "one"), running(&daemon, "two"), running(&daemon, "three")];
    let by_name = daemon.path("by-name/instances/two");
    wait_until("the name stands", || by_name.is_symlink());
    let by_state = daemon.path(format!("by-state/instances/active/{}", ids[2]));
    wait_until("the link stands", || by_state.is_symlink());
    for id in ids {
        daemon.host_does(json!({"do": "guest", "uuid": id.to_string(), "ignores_acpi": true}));
        ask(&daemon, id, "stopped");
    }
    let paths = [daemon.path(format!("instances/{}/state", ids[0])), by_name, by_state];
    let mut waiter = Waiter::start(&paths, &["--for", "stopped"]);
    waiter.sleeps();
    let before = waiter.ticks();
    let begun = Instant::now();
    wait_until("a second has passed", || begun.elapsed() > Duration::from_secs(1));
    let used = waiter.ticks() - before;
    assert!(used <= 10, "{used} hundredths of a second of a second's wait");
    for id in ids {
        daemon.host_does(json!({"do": "halt", "uuid": id.to_string()}));
    }
    assert_eq!(waiter.end(), (Some(0), String::new()));
    assert!(ids.iter().all(|id| daemon.read(format!("instances/{id}/state")) == "stopped"));
}

#[test]
fn a_failed_task_is_a_failure_with_its_reason() {
    let daemon = Daemon::start(AT_ONCE);
    let id = daemon.domain("web");
    daemon.host_does(
        json!({"do": "fault", "call": "start", "mode": "fail", "message": "no such machine type", "times": 1}),
    );
    let path = daemon.path(format!("instances/{id}"));
    let _ = daemon.write(format!("instances/{id}/state"), "active");
    for rest in [&[][..], &["--for", "active"][..]] {
        let (code, said) = Waiter::start(std::slice::from_ref(&path), rest).end();
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("no such machine type") && said.lines().count() == 1, "{said}");
    }
}

#[test]
fn the_time_limit_and_an_interrupt_end_it_at_once() {
    let daemon = Daemon::start(AT_ONCE);
    let id = running(&daemon, "web");
    daemon.host_does(json!({"do": "guest", "uuid": id.to_string(), "ignores_acpi": true}));
    ask(&daemon, id, "stopped");
    let path = [daemon.path(format!("instances/{id}"))];
    let (code, said) = Waiter::start(&path, &["--for", "stopped", "--timeout", "200ms"]).end();
    assert_eq!(code, Some(124), "{said}");
    assert!(said.contains("stopping") && said.contains("active"), "{said}");
    let mut waiter = Waiter::start(&path, &[]);
    waiter.sleeps();
    let begun = Instant::now();
    signal(waiter.0.id(), libc::SIGINT);
    let (code, _) = waiter.end();
    assert_eq!(code, None, "it dies of the signal, so that a script stops too");
    assert!(begun.elapsed() < DEADLINE);
    daemon.host_does(json!({"do": "halt", "uuid": id.to_string()}));
    daemon.wait_state(id, "stopped");
}

#[test]
fn a_discarded_draft_is_deleted_and_a_waiter_sees_it_go() {
    let daemon = Daemon::start(&[]);
    let id = Uuid::new_v4();
    let path = daemon.path(format!("instances/{id}"));
    fs::create_dir(&path).expect("a draft");
    let mut waiter = Waiter::start(std::slice::from_ref(&path), &["--for", "draft"]);
    waiter.0.wait().expect("it ends at once");
    drop(waiter);
    daemon.set(format!("instances/{id}/description"), "x");
    daemon.set(format!("instances/{id}/state"), "deleted");
    assert_eq!(Waiter::start(std::slice::from_ref(&path), &["--for", "deleted"]).end(), (Some(0), String::new()));
    wait_until("it is gone", || !path.exists());
}

/// What a terminal shows of a command, until it ends.
fn on_a_terminal(command: &str) -> String {
    let mut script = Command::new("script");
    script.args(["-qec", command, "/dev/null"]).env("TERM", "xterm").stdin(Stdio::null());
    String::from_utf8_lossy(&script.output().expect("script runs").stdout).into_owned()
}

#[test]
fn a_terminal_shows_the_task_and_is_clean_afterwards() {
    let daemon = Daemon::start(AT_ONCE);
    let id = running(&daemon, "web");
    daemon.host_does(json!({"do": "guest", "uuid": id.to_string(), "acpi_delay_ms": 1000}));
    ask(&daemon, id, "stopped");
    let path = daemon.path(format!("instances/{id}"));
    let command = |path: &Path| format!("{} wait {}", env!("CARGO_BIN_EXE_instancefs"), path.display());
    let shown = on_a_terminal(&command(&path));
    assert!(shown.contains("stopping"), "{shown:?}");
    let (_, after) = shown.rsplit_once("\u{1b}[2K").expect("the line is wiped");
    assert!(!after.contains(char::is_alphanumeric) || after == "\u{1b}[1A", "and stays so: {shown:?}");
    let shown = on_a_terminal(&command(&path));
    assert_eq!(shown, "", "nothing is shown for nothing");
}
