//! `instancefs wait`, against a directory that looks like the tree.

use std::fs;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

const VM: &str = "0d8c5a0e-6f2b-4d7c-9a53-1f6f5b2f9a11";
const OTHER: &str = "6a1f0c1e-98a5-4a66-8a6e-2f1f0f9d7b22";
const TASK: &str = "b7b1d5f2-3d11-4b8e-8f39-7a1f6c0e5c33";
/// Far longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(20);

struct Tree(TempDir);

impl Tree {
    /// Two instances, the first with a running task.
    fn new() -> Tree {
        let tree = Tree(tempfile::tempdir().unwrap());
        for class in ["instances", "images", "tasks", "trash", "by-name/instances", "by-state/instances/stopping"] {
            fs::create_dir_all(tree.path(class)).unwrap();
        }
        fs::write(tree.path("abi_version"), "1\n").unwrap();
        for id in [VM, OTHER] {
            fs::create_dir(tree.path("instances").join(id)).unwrap();
            for (file, value) in [("task", ""), ("state", "active"), ("progress", ""), ("last_error", "ok")] {
                tree.write(&format!("instances/{id}/{file}"), value);
            }
        }
        fs::create_dir(tree.path("tasks").join(TASK)).unwrap();
        for (file, value) in [("state", "processing"), ("message", ""), ("progress", "10")] {
            tree.write(&format!("tasks/{TASK}/{file}"), value);
        }
        symlink(format!("../../tasks/{TASK}"), tree.path(&format!("instances/{VM}/last_task"))).unwrap();
        tree.set("task", "stopping");
        tree
    }

    fn path(&self, below: &str) -> PathBuf {
        self.0.path().join(below)
    }

    /// Replaced as a whole, so that nobody reads half of it.
    fn write(&self, file: &str, value: &str) {
        let next = self.path("next");
        fs::write(&next, format!("{value}\n")).unwrap();
        fs::rename(next, self.path(file)).unwrap();
    }

    fn set(&self, file: &str, value: &str) {
        self.write(&format!("instances/{VM}/{file}"), value);
    }

    fn end_task(&self, state: &str, message: &str) {
        self.write(&format!("tasks/{TASK}/message"), message);
        self.write(&format!("tasks/{TASK}/state"), state);
        self.set("task", "");
    }

    fn vm(&self) -> PathBuf {
        self.path("instances").join(VM)
    }
}

/// A waiter that is killed if the test fails.
struct Waiter(Child);

impl Waiter {
    fn start<S: AsRef<std::ffi::OsStr>>(arguments: &[S]) -> Waiter {
        // A shell's background job ignores interrupts, and so do the tests that it runs, and their children.
        let mut command = Command::new("env");
        command.args(["--default-signal=INT", env!("CARGO_BIN_EXE_instancefs"), "wait"]).args(arguments);
        Waiter(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    fn for_paths(paths: &[&Path], rest: &[&str]) -> Waiter {
        let mut arguments: Vec<_> = paths.iter().map(|path| path.as_os_str().to_owned()).collect();
        arguments.extend(rest.iter().map(Into::into));
        Waiter::start(&arguments)
    }

    /// It has looked at the tree and sleeps: no exit although it has used the processor and stopped doing so.
    fn assert_waiting(&mut self) {
        let stat = format!("/proc/{}/syscall", self.0.id());
        let deadline = Instant::now() + LIMIT;
        // The number of poll(2) on x86_64 is 7; elsewhere poll(3) is ppoll.
        let polls = |text: &str| ["7 ", "73 ", "271 "].iter().any(|number| text.starts_with(number));
        while !fs::read_to_string(&stat).is_ok_and(|text| polls(&text)) {
            assert!(self.0.try_wait().unwrap().is_none(), "it ended");
            assert!(Instant::now() < deadline, "it never slept");
            thread::yield_now();
        }
    }

    fn end(mut self) -> (i32, String) {
        let deadline = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "it still waits");
            thread::sleep(Duration::from_millis(2));
        };
        let mut stderr = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap());
        (code, stderr)
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_instancefs")).args(arguments).output().unwrap()
}

#[test]
fn waiting_ends_with_the_task() {
    let tree = Tree::new();
    let mut waiter = Waiter::for_paths(&[&tree.vm()], &[]);
    waiter.assert_waiting();
    tree.end_task("success", "");
    assert_eq!(waiter.end(), (0, String::new()));
}

#[test]
fn a_failed_task_fails_the_wait_with_its_message() {
    let tree = Tree::new();
    let mut waiter = Waiter::for_paths(&[&tree.vm()], &[]);
    waiter.assert_waiting();
    tree.end_task("failure", "the guest did not shut down");
    let (code, message) = waiter.end();
    assert_eq!(code, 1);
    assert!(message.contains(TASK) && message.contains("failed: the guest did not shut down"), "{message}");
    assert_eq!(message.lines().count(), 1, "{message}");
}

#[test]
fn the_last_task_counts_when_none_runs() {
    let tree = Tree::new();
    tree.end_task("failure", "no disk");
    let (code, message) = Waiter::for_paths(&[&tree.vm()], &[]).end();
    assert_eq!(code, 1);
    assert!(message.contains("no disk"), "{message}");
    tree.end_task("success", "");
    assert_eq!(Waiter::for_paths(&[&tree.vm()], &[]).end().0, 0);
}

#[test]
fn an_object_that_never_had_a_task_is_idle() {
    let tree = Tree::new();
    assert_eq!(Waiter::for_paths(&[&tree.path("instances").join(OTHER)], &[]).end(), (0, String::new()));
}

#[test]
fn an_expired_last_task_is_no_failure() {
    let tree = Tree::new();
    tree.set("task", "");
    fs::remove_dir_all(tree.path("tasks").join(TASK)).unwrap();
    assert_eq!(Waiter::for_paths(&[&tree.vm()], &[]).end(), (0, String::new()));
}

#[test]
fn waiting_for_a_state_ends_when_it_is_reached() {
    let tree = Tree::new();
    let mut waiter = Waiter::for_paths(&[&tree.vm()], &["--for", "stopped"]);
    waiter.assert_waiting();
    tree.set("state", "stopped");
    assert_eq!(waiter.end(), (0, String::new()));
}

#[test]
fn a_state_that_nothing_works_towards_is_a_failure() {
    let tree = Tree::new();
    tree.set("last_error", "2026-01-01T00:00:00Z root state EIO the disk is on fire");
    let mut waiter = Waiter::for_paths(&[&tree.vm()], &["--for", "stopped"]);
    waiter.assert_waiting();
    tree.end_task("failure", "");
    let (code, message) = waiter.end();
    assert_eq!(code, 1);
    assert!(message.contains("the state is active") && message.contains("the disk is on fire"), "{message}");
}

#[test]
fn any_path_of_an_object_will_do() {
    let tree = Tree::new();
    tree.end_task("success", "");
    let name = tree.path("by-name/instances/web");
    symlink(format!("../../instances/{VM}"), &name).unwrap();
    let state = tree.path("by-state/instances/stopping").join(VM);
    symlink(format!("../../../instances/{VM}"), &state).unwrap();
    for path in [tree.vm().join("state"), tree.vm().join("last_task"), name.clone(), name.join("progress"), state] {
        assert_eq!(
            Waiter::for_paths(&[&path], &["--for", "active"]).end().0,
            if path.ends_with("last_task") { 1 } else { 0 }
        );
        assert_eq!(Waiter::for_paths(&[&path], &[]).end(), (0, String::new()), "{}", path.display());
    }
}

#[test]
fn the_link_of_a_state_that_was_left_still_names_the_object() {
    let tree = Tree::new();
    tree.end_task("success", "");
    tree.set("state", "stopped");
    let gone = tree.path("by-state/instances/stopping").join(VM);
    assert_eq!(Waiter::for_paths(&[&gone], &["--for", "stopped"]).end(), (0, String::new()));
}

#[test]
fn a_task_can_be_waited_for() {
    let tree = Tree::new();
    let mut waiter = Waiter::for_paths(&[&tree.path("tasks").join(TASK)], &[]);
    waiter.assert_waiting();
    tree.end_task("failure", "no space");
    let (code, message) = waiter.end();
    assert_eq!(code, 1);
    assert!(message.contains("failed: no space"), "{message}");
}

#[test]
fn an_object_is_followed_into_the_bin() {
    let tree = Tree::new();
    let mut waiter = Waiter::for_paths(&[&tree.vm()], &["--for", "soft_deleted"]);
    waiter.assert_waiting();
    fs::rename(tree.vm(), tree.path("trash").join(VM)).unwrap();
    tree.write(&format!("trash/{VM}/state"), "soft_deleted");
    tree.write(&format!("trash/{VM}/task"), "");
    assert_eq!(waiter.end(), (0, String::new()));
}

#[test]
fn absence_is_what_deleted_waits_for() {
    let tree = Tree::new();
    let mut waiter = Waiter::for_paths(&[&tree.vm()], &["--for", "deleted"]);
    waiter.assert_waiting();
    fs::remove_dir_all(tree.vm()).unwrap();
    assert_eq!(waiter.end(), (0, String::new()));
    assert_eq!(Waiter::for_paths(&[&tree.vm()], &["--for", "deleted"]).end(), (0, String::new()));
    let (code, message) = Waiter::for_paths(&[&tree.vm()], &["--for", "stopped"]).end();
    assert_eq!(code, 1);
    assert!(message.contains("no such object"), "{message}");
}

#[test]
fn an_object_in_the_bin_is_not_deleted() {
    let tree = Tree::new();
    tree.end_task("success", "");
    fs::rename(tree.vm(), tree.path("trash").join(VM)).unwrap();
    assert_eq!(Waiter::for_paths(&[&tree.vm()], &["--for", "deleted"]).end().0, 1);
}

#[test]
fn an_unmounted_tree_has_not_deleted_anything() {
    let tree = Tree::new();
    let mut waiter = Waiter::for_paths(&[&tree.vm()], &["--for", "deleted"]);
    waiter.assert_waiting();
    // As an unmount would: everything is gone at once, the mark first.
    fs::remove_file(tree.path("abi_version")).unwrap();
    fs::remove_dir_all(tree.path("instances")).unwrap();
    let (code, message) = waiter.end();
    assert_eq!(code, 1);
    assert!(message.contains("not mounted any more"), "{message}");
    assert_eq!(Waiter::for_paths(&[&tree.vm()], &["--for", "deleted"]).end().0, 1);
}

#[test]
fn several_objects_are_waited_for_and_the_worst_counts() {
    let tree = Tree::new();
    let other = tree.path("instances").join(OTHER);
    let mut waiter = Waiter::for_paths(&[&other, &tree.vm(), &tree.path("instances/x")], &[]);
    waiter.assert_waiting();
    tree.end_task("success", "");
    let (code, message) = waiter.end();
    assert_eq!(code, 1);
    assert!(message.contains("instances/x: there is no such object"), "{message}");
}

#[test]
fn the_time_limit_has_the_exit_code_of_timeout() {
    let tree = Tree::new();
    let begun = Instant::now();
    let (code, message) = Waiter::for_paths(&[&tree.vm()], &["--timeout", "0.2"]).end();
    assert_eq!(code, 124);
    assert!(message.contains("still stopping") && message.contains("state active"), "{message}");
    assert!(begun.elapsed() >= Duration::from_millis(200));
}

#[test]
fn an_interrupt_ends_the_wait_at_once() {
    let tree = Tree::new();
    let mut waiter = Waiter::for_paths(&[&tree.vm()], &[]);
    waiter.assert_waiting();
    let id = i32::try_from(waiter.0.id()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(id), nix::sys::signal::Signal::SIGINT).unwrap();
    assert_eq!(waiter.end().0, 130);
}

#[test]
fn what_is_no_tree_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    let output = run(&["wait", path]);
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.starts_with("instancefs: ") && message.contains("no object of an instancefs tree"), "{message}");
}

#[test]
fn a_command_line_that_makes_no_sense_is_a_usage_error() {
    for arguments in [&["wait"][..], &["wait", "/", "--timeout", "soon"], &["mount"], &["wiat"]] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(message.starts_with("instancefs: "), "{message}");
    }
}
