//! A mount, and the examples as an administrator would run them on it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::json;
use uuid::Uuid;

use crate::support::{self, Daemon, wait_until};

/// Where the examples lie.
pub fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("mount-examples")
}

/// A mount with a simulated hypervisor.
pub struct Stage {
    pub daemon: Daemon,
}

/// Plays a scene twice: with the usual settle window, and with none, when every write returns before its work is done.
pub fn twice(scene: impl Fn(&Stage)) {
    for options in [&[][..], &["--settle", "0s"]] {
        eprintln!("mounted with {options:?}");
        scene(&Stage { daemon: Daemon::start(options) });
    }
}

impl Stage {
    /// An instance that is off. Its name may come a moment after it.
    pub fn domain(&self, name: &str) -> Uuid {
        let id = self.daemon.domain(name);
        wait_until("it has its name", || self.daemon.path(format!("by-name/instances/{name}")).exists());
        id
    }

    /// A running instance.
    pub fn running(&self, name: &str) -> Uuid {
        let id = self.domain(name);
        self.daemon.domain_does(id, "start", "active");
        id
    }

    pub fn file(&self, id: Uuid, name: &str) -> String {
        format!("instances/{id}/{name}")
    }

    pub fn read(&self, id: Uuid, name: &str) -> String {
        self.daemon.read(self.file(id, name))
    }

    pub fn set(&self, id: Uuid, name: &str, value: &str) {
        self.daemon.set(self.file(id, name), value);
    }

    /// Does something to a domain as virsh would.
    pub fn host_does(&self, what: &str, id: Uuid) {
        self.daemon.host_does(json!({"do": what, "uuid": id.to_string()}));
    }

    /// A directory of the test's own.
    pub fn directory(&self, name: &str) -> PathBuf {
        let directory = self.daemon.scratch().join(name);
        fs::create_dir_all(&directory).expect("a directory");
        directory
    }

    /// How many lines `events` has: one for each change and each refusal.
    pub fn events(&self) -> Vec<String> {
        self.daemon.read("events").lines().map(str::to_owned).collect()
    }

    /// A command in the surroundings that the examples expect: the program on the path, the tree in `INSTANCEFS`.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        self.surround(&mut command);
        command
    }

    fn surround(&self, command: &mut Command) {
        let program = Path::new(env!("CARGO_BIN_EXE_instancefs"));
        let path = std::env::var("PATH").expect("a path");
        let path = format!("{}:{}:{path}", program.parent().expect("a directory").display(), self.bin().display());
        command.env("PATH", path).env("INSTANCEFS", self.daemon.root()).env("HOME", self.directory("home"));
        command.env("LC_ALL", "C.UTF-8").env("GIT_CONFIG_GLOBAL", self.daemon.scratch().join("gitconfig"));
        command.env_remove("ANSIBLE_CONFIG").current_dir(self.daemon.scratch());
    }

    /// Programs of the test that stand in for those of the world, such as mail.
    fn bin(&self) -> PathBuf {
        self.directory("bin")
    }

    /// Puts such a program there; `$OUT` in it is a directory of the test.
    pub fn stand_in(&self, name: &str, script: &str) {
        let path = self.bin().join(name);
        let out = self.directory("out");
        fs::write(&path, format!("#!/bin/sh\nOUT={}\n{script}\n", out.display())).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("executable");
    }

    /// An example as it lies there.
    pub fn example(&self, name: &str) -> Command {
        self.command(examples().join(name))
    }

    /// An example whose text names fixed paths and ids, with these instead, as its reader would edit it.
    pub fn edited(&self, name: &str, edits: &[(&str, &str)]) -> PathBuf {
        let mut text = fs::read_to_string(examples().join(name)).expect("an example");
        for (from, to) in edits {
            assert!(text.contains(from), "{name} does not say {from}");
            text = text.replace(from, to);
        }
        let path = self.directory("edited").join(name.replace('/', "-"));
        fs::write(&path, text).expect("written");
        path
    }

    /// The mount point as text.
    pub fn root(&self) -> String {
        self.daemon.root().to_str().expect("UTF-8").to_owned()
    }

    /// Runs a command that has to succeed, and returns all that it said.
    pub fn succeeds(&self, command: &mut Command) -> String {
        let (code, said) = run(command);
        assert_eq!(code, Some(0), "{command:?}: {said}\n{}", self.daemon.log_text());
        said
    }

    /// The same of a command that has to fail.
    pub fn fails(&self, command: &mut Command) -> String {
        let (code, said) = run(command);
        assert!(code.is_some_and(|code| code != 0), "{command:?}: {code:?}: {said}");
        said
    }

    /// Starts something that goes on until it is dropped, with all that it started.
    pub fn background(&self, command: &mut Command, name: &str) -> Background {
        let log = self.directory("out").join(name);
        let file = fs::File::create(&log).expect("a log");
        command.process_group(0).stdin(Stdio::null());
        command.stdout(file.try_clone().expect("a descriptor")).stderr(file);
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Background { child, log }
    }
}

fn run(command: &mut Command) -> (Option<i32>, String) {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&said).into_owned())
}

/// A process group that ends with the scene.
pub struct Background {
    child: Child,
    log: PathBuf,
}

impl Background {
    /// Waits until it has said this.
    pub fn says(&mut self, text: &str) {
        wait_until(&format!("it says {text}"), || {
            let ended = self.child.try_wait().expect("waits");
            assert!(ended.is_none(), "it ended: {ended:?}: {}", self.said());
            self.said().contains(text)
        });
    }

    /// All that it said.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let group = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"));
        let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}:\n{}", self.log.display(), self.said());
        }
    }
}

/// Where a tool of the long form is; `None`, and said so, where the scene cannot be played. `scripts/setup long` installs
/// them, in `$INSTANCEFS_TOOLS` those that Debian has not.
pub fn long_tool(test: &str, tool: &str) -> Option<PathBuf> {
    if std::env::var_os("INSTANCEFS_LONG").is_none() {
        eprintln!("skipped: {test}: it belongs to the long form");
        return None;
    }
    let own = std::env::var_os("INSTANCEFS_TOOLS").map(PathBuf::from);
    let places = own.map(|own| own.join(tool)).into_iter();
    let places = places.chain(["/usr/bin", "/usr/sbin"].map(|place| Path::new(place).join(tool)));
    let found = places.into_iter().find(|place| place.exists());
    if found.is_none() {
        support::skipped(test, &format!("{tool} is not installed, and scripts/setup could not"));
    }
    found
}
