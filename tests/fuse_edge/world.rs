//! A mounted fake tree in a process of its own, and its watchers. The tests never serve the mount that they use: a
//! process that waits for itself could not even be killed.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use instancefs::fuse::{Mount, Options};
use instancefs::privilege::Privilege;
use nix::mount::{MntFlags, umount2};

use crate::fake::Fake;

const MOUNTPOINT: &str = "FUSE_EDGE_MOUNTPOINT";
const FLAGS: &str = "FUSE_EDGE_FLAGS";
/// Everything has happened by then, or will not.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Not a test: the daemon of the tests, which start it as a process of its own.
#[test]
fn the_daemon_of_the_other_tests() {
    let Some(mountpoint) = std::env::var_os(MOUNTPOINT) else { return };
    let flags = std::env::var(FLAGS).unwrap_or_default();
    let (sender, changes) = channel();
    let fake = Arc::new(Fake::new(sender).expect("a tree"));
    let options = Options {
        mountpoint: PathBuf::from(mountpoint),
        privilege: Privilege::of_this_process(),
        read_only: flags.contains("read-only"),
        announce: !flags.contains("silent"),
        program: Some(PathBuf::from(env!("CARGO_BIN_EXE_instancefs"))),
        on_announcer: Box::new(|result| say(&format!("announcer {}", if result.is_ok() { "up" } else { "down" }))),
    };
    let mount = Arc::new(Mount::start(fake.clone(), changes, options).expect("a mount"));
    let waiting = mount.clone();
    std::thread::spawn(move || say(&format!("unmounted {}", waiting.wait().is_ok())));
    say("mounted");
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        match line.as_str() {
            "stop" => {
                mount.stop().expect("an end");
                say("stopped");
            }
            line => {
                fake.command(line).expect("a command");
                say("done");
            }
        }
    }
    mount.stop().expect("an end");
}

fn say(line: &str) {
    println!("@{line}");
}

/// The daemon, and what it says.
pub struct World {
    pub root: PathBuf,
    pub daemon: Child,
    input: Option<ChildStdin>,
    output: Receiver<String>,
    /// What it said while something else was expected.
    said: RefCell<Vec<String>>,
    _directory: tempfile::TempDir,
}

impl World {
    pub fn new() -> World {
        let world = World::with("");
        world.expect("announcer up");
        world
    }

    pub fn with(flags: &str) -> World {
        let directory = tempfile::tempdir().expect("a directory");
        let root = directory.path().join("mount");
        std::fs::create_dir(&root).expect("a mount point");
        let mut daemon = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "world::the_daemon_of_the_other_tests", "--nocapture"])
            .env(MOUNTPOINT, &root)
            .env(FLAGS, flags)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .expect("a daemon");
        let input = daemon.stdin.take();
        let output = lines(daemon.stdout.take().expect("piped"));
        let world = World { root, daemon, input, output, said: RefCell::default(), _directory: directory };
        world.expect("mounted");
        world
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Waits until the daemon says this.
    pub fn expect(&self, wanted: &str) {
        let start = Instant::now();
        loop {
            let mut said = self.said.borrow_mut();
            if let Some(position) = said.iter().position(|line| line == wanted) {
                said.remove(position);
                return;
            }
            let Ok(line) = self.output.recv_timeout(PATIENCE.saturating_sub(start.elapsed())) else { break };
            // The harness prints the beginning of its own line first.
            said.extend(line.split_once('@').map(|(_, said)| said.to_owned()));
        }
        panic!("the daemon does not say {wanted:?}");
    }

    pub fn tell(&mut self, line: &str) {
        writeln!(self.input.as_mut().expect("a daemon"), "{line}").expect("a listening daemon");
        self.expect(if line == "stop" { "stopped" } else { "done" });
    }

    /// The announcer's process.
    pub fn announcer(&self) -> Option<i32> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.daemon.id())).ok()?;
        let children = tasks.flatten().filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
        children.flat_map(|line| line.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<_>>()).next()
    }

    /// Runs a shell with `$m` as the mount; its standard output.
    pub fn shell(&self, script: &str) -> Result<String, String> {
        let output =
            Command::new("bash").args(["-c", script]).env("m", &self.root).current_dir("/").output().expect("a shell");
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).trim_end().to_owned();
        if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
    }

    pub fn watch(&self, what: &[&str]) -> Watch {
        Watch::new(&self.root, what)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        drop(self.input.take());
        let ended = wait_until(PATIENCE, || matches!(self.daemon.try_wait(), Ok(Some(_)) | Err(_)));
        if !ended {
            let _ = self.daemon.kill();
            let _ = self.daemon.wait();
        }
        let _ = umount2(&self.root, MntFlags::MNT_DETACH);
    }
}

/// Looks until it is so.
pub fn wait_until(patience: Duration, mut is_so: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if is_so() {
            return true;
        }
        if start.elapsed() > patience {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn lines(output: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    receiver
}

/// inotifywait, watching.
pub struct Watch {
    process: Child,
    events: Receiver<String>,
}

impl Watch {
    fn new(root: &Path, what: &[&str]) -> Watch {
        let mut process = Command::new("inotifywait")
            .args(["-m", "--format", "%w|%f|%e", "-e"])
            .arg("modify,close_write,create,delete,delete_self,move")
            .args(what.iter().map(|name| root.join(name)))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("inotifywait");
        let says = lines(process.stderr.take().expect("piped"));
        while !says.recv_timeout(PATIENCE).expect("inotifywait to watch").contains("Watches established") {}
        let events = lines(process.stdout.take().expect("piped"));
        Watch { process, events }
    }

    /// The next event, as `name EVENT,EVENT` with the last part of the path.
    pub fn next(&self, patience: Duration) -> Option<String> {
        let line = self.events.recv_timeout(patience).ok()?;
        let mut parts = line.split('|');
        let watched = parts.next()?.trim_end_matches('/');
        let name = parts.next().filter(|name| !name.is_empty()).or_else(|| watched.rsplit('/').next())?;
        Some(format!("{name} {}", parts.next()?))
    }

    /// Waits for these, in this order; others may come in between.
    pub fn expect(&self, wanted: &[&str]) {
        let start = Instant::now();
        let mut seen = Vec::new();
        let mut wanted = wanted.iter();
        let mut next = wanted.next();
        while let Some(event) = next {
            match self.next(PATIENCE.saturating_sub(start.elapsed())) {
                Some(happened) => {
                    if happened == *event {
                        next = wanted.next();
                    }
                    seen.push(happened);
                }
                None => panic!("{event:?} does not come; there were {seen:?}"),
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
