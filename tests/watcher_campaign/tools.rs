//! The watchers: each runs as its users run it and says what it hears of.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use serde_json::{Value, json};

use crate::picture::Tracked;
use crate::support::{Daemon, skipped, wait_until};

/// What a watcher says.
pub enum Heard {
    /// This path, or something in this directory.
    Of(PathBuf),
    /// One of those that it was given.
    Something,
}

/// A running watcher.
pub struct Tool {
    pub name: &'static str,
    /// The files and directories that it watches and of which it has to have the right picture.
    pub compared: Vec<PathBuf>,
    events: Option<Receiver<Heard>>,
    _processes: Vec<Process>,
}

/// A process group, which ends with this.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let group = nix::unistd::Pid::from_raw(i32::try_from(self.0.id()).expect("a pid"));
        let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

impl Tool {
    /// All that are installed; what is not is said.
    pub fn all(daemon: &Daemon, tracked: &Tracked, long: bool) -> Vec<Tool> {
        let mut tools = vec![inotifywait(tracked), watchdog(daemon, tracked), entr(tracked)];
        if long {
            let own = std::env::var_os("INSTANCEFS_TOOLS").map(PathBuf::from).unwrap_or_default();
            let here = |path: PathBuf| path.exists().then_some(path);
            match here(own.join("node_modules/chokidar")) {
                Some(chokidar) => tools.push(self::chokidar(daemon, tracked, &chokidar)),
                None => skipped("watchers: chokidar", "it is not installed, and scripts/setup could not"),
            }
            match here("/usr/bin/watchman".into()) {
                Some(_) => tools.push(watchman(daemon, tracked)),
                None => skipped("watchers: watchman", "it is not installed, and scripts/setup could not"),
            }
        }
        tools
    }

    /// What it hears from now on.
    pub fn events(&mut self) -> Receiver<Heard> {
        self.events.take().expect("asked for once")
    }
}

fn everything(tracked: &Tracked) -> Vec<PathBuf> {
    let mut all = tracked.files(tracked.stayers());
    all.extend(tracked.directories());
    all
}

/// What the recursive ones are told to watch.
fn roots(tracked: &Tracked) -> [PathBuf; 4] {
    ["instances", "by-name/instances", "by-state/instances", "summary"].map(|name| tracked.root().join(name))
}

/// Starts it in a process group of its own and passes on each line that it says, until `ready` has been said.
fn start(command: &mut Command, hear: impl Fn(&str, &Sender<Heard>) + Send + 'static) -> (Process, Receiver<Heard>) {
    let (sender, receiver) = channel();
    (follow(command, sender, hear), receiver)
}

fn follow(
    command: &mut Command,
    sender: Sender<Heard>,
    hear: impl Fn(&str, &Sender<Heard>) + Send + 'static,
) -> Process {
    command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}; scripts/setup test"));
    let output = child.stdout.take().expect("piped");
    thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            hear(&line, &sender);
        }
    });
    Process(child)
}

fn pass_on(line: &str, sender: &Sender<Heard>) {
    if line.starts_with('/') {
        let _ = sender.send(Heard::Of(line.trim_end_matches('/').into()));
    }
}

/// Waits until a process has this many watches in the tree.
fn wait_watches(process: &Process, tracked: &Tracked, count: usize) {
    let device = format!("sdev:{:x} ", fs::metadata(tracked.root()).expect("a tree").dev());
    let watches = |pid: &str| -> usize {
        let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fdinfo")) else { return 0 };
        let texts = descriptors.flatten().filter_map(|entry| fs::read_to_string(entry.path()).ok());
        texts.map(|text| text.matches(&device).count()).sum()
    };
    // The process itself, or one of its group.
    let group = process.0.id().to_string();
    wait_until("it watches", || {
        let processes = fs::read_dir("/proc").expect("processes").flatten();
        let of_group = processes.filter(|entry| is_of_group(&entry.path(), &group));
        of_group.map(|entry| watches(&entry.file_name().to_string_lossy())).sum::<usize>() >= count
    });
}

fn is_of_group(process: &Path, group: &str) -> bool {
    let stat = fs::read_to_string(process.join("stat")).unwrap_or_default();
    stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(2)) == Some(group)
}

/// How many directories a recursive watcher watches.
fn directories_below(tracked: &Tracked) -> usize {
    let mut find = Command::new("find");
    let output = find.args(roots(tracked)).args(["-type", "d"]).output().expect("find runs");
    output.stdout.split(|byte| *byte == b'\n').count() - 1
}

fn inotifywait(tracked: &Tracked) -> Tool {
    let mut command = Command::new("inotifywait");
    command.args(["-q", "-m", "-r", "--format", "%w%f"]);
    command.args(["modify", "create", "delete", "move"].iter().flat_map(|event| ["-e", event])).args(roots(tracked));
    // It complains of directories that are gone again before it watches them.
    let (child, events) = start(command.stderr(Stdio::null()), pass_on);
    wait_watches(&child, tracked, directories_below(tracked));
    Tool { name: "inotifywait", compared: everything(tracked), events: Some(events), _processes: vec![child] }
}

/// A script of ours in the tool's language.
fn script(daemon: &Daemon, name: &str, text: &str) -> PathBuf {
    let path = daemon.scratch().join(name);
    fs::write(&path, text).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("executable");
    path
}

fn says_ready(name: &'static str, command: &mut Command, tracked: &Tracked) -> Tool {
    let (ready, is_ready) = channel();
    let (child, events) = start(command, move |line, sender| {
        if line == "ready" {
            let _ = ready.send(());
        }
        pass_on(line, sender);
    });
    is_ready.recv_timeout(crate::support::DEADLINE).unwrap_or_else(|_| panic!("{name} is not ready"));
    Tool { name, compared: everything(tracked), events: Some(events), _processes: vec![child] }
}

fn watchdog(daemon: &Daemon, tracked: &Tracked) -> Tool {
    let script = script(daemon, "hear.py", include_str!("hear.py"));
    says_ready("watchdog", Command::new("/usr/bin/python3").arg(script).args(roots(tracked)), tracked)
}

fn chokidar(daemon: &Daemon, tracked: &Tracked, chokidar: &Path) -> Tool {
    let script = script(daemon, "hear.mjs", include_str!("hear.mjs"));
    let modules = chokidar.parent().expect("a directory");
    std::os::unix::fs::symlink(modules, daemon.scratch().join("node_modules")).expect("linked");
    says_ready("chokidar", Command::new("node").arg(script).args(roots(tracked)), tracked)
}

/// It watches the files that it is given, and says that one of them changed.
fn entr(tracked: &Tracked) -> Tool {
    let files = tracked.files(tracked.stayers());
    let list: Vec<_> = files.iter().map(|path| path.display().to_string()).collect();
    let mut command = Command::new("sh");
    command.args(["-c", "printf '%s\\n' \"$@\" | entr -an echo woken", "sh"]).args(&list);
    let (child, events) = start(&mut command, |_, sender| drop(sender.send(Heard::Something)));
    wait_watches(&child, tracked, files.len());
    Tool { name: "entr", compared: files, events: Some(events), _processes: vec![child] }
}

fn watchman(daemon: &Daemon, tracked: &Tracked) -> Tool {
    let home = daemon.scratch().join("watchman");
    fs::create_dir(&home).expect("a directory");
    let command = || {
        let mut command = Command::new("watchman");
        for (option, name) in [("sockname", "socket"), ("logfile", "log"), ("statefile", "state"), ("pidfile", "pid")] {
            command.arg(format!("--{option}={}", home.join(name).display()));
        }
        command.env("HOME", &home);
        command
    };
    let mut server = command();
    server.arg("--foreground").process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut processes = vec![Process(server.spawn().expect("watchman runs"))];
    let (sender, events) = channel();
    for root in roots(tracked) {
        wait_until("watchman watches", || {
            let watch = command().args(["--no-spawn", "watch"]).arg(&root).output().expect("it runs");
            watch.status.success()
        });
        let (ready, is_ready) = channel();
        let base = root.clone();
        let mut client = follow(
            // At the end it says that the server is gone.
            command().args(["--no-spawn", "--persistent", "--no-pretty", "-j"]).stderr(Stdio::null()),
            sender.clone(),
            move |line, sender| {
                let said: Value = serde_json::from_str(line).unwrap_or_default();
                if said["subscribe"].is_string() {
                    let _ = ready.send(());
                }
                let Some(files) = said["files"].as_array() else { return };
                // All that there is, after the subscription.
                if said["is_fresh_instance"] == json!(true) {
                    let _ = sender.send(Heard::Something);
                    return;
                }
                for name in files.iter().filter_map(Value::as_str) {
                    let _ = sender.send(Heard::Of(base.join(name)));
                }
            },
        );
        let subscription = json!(["subscribe", root, "campaign", {"fields": ["name"]}]);
        std::io::Write::write_all(&mut client.0.stdin.as_mut().expect("piped"), format!("{subscription}\n").as_bytes())
            .expect("asked");
        is_ready.recv_timeout(crate::support::DEADLINE).expect("it answers");
        processes.push(client);
    }
    Tool { name: "watchman", compared: everything(tracked), events: Some(events), _processes: processes }
}
