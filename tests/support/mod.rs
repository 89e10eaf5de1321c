//! A daemon on a real mount, with a simulated hypervisor that tests command from outside, and callers of any identity.
#![allow(dead_code, reason = "each test program uses its own part of this")]

pub mod guests;

use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;

/// A generous limit against hanging; nothing is asserted about speed.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Waits for a condition.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < end, "waited in vain for: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Says in the last lines of `scripts/test` that this machine cannot run a test, and why.
pub fn skipped(test: &str, reason: &str) {
    eprintln!("skipped: {test}: {reason}");
    if let Some(path) = std::env::var_os("INSTANCEFS_SKIPPED") {
        let file = OpenOptions::new().create(true).append(true).open(path).expect("the list of skipped tests");
        writeln!(&file, "{test}: {reason}").expect("written");
    }
}

/// A daemon, its mount, and its simulated host. Dropping it ends and removes all of it.
pub struct Daemon {
    directory: TempDir,
    connection: String,
    state: PathBuf,
    options: Vec<String>,
    child: Option<Child>,
}

impl Daemon {
    /// Starts one on a new simulated host.
    pub fn start(options: &[&str]) -> Daemon {
        Daemon::start_with("simulated", options)
    }

    /// Starts one on another connection.
    pub fn start_with(connection: &str, options: &[&str]) -> Daemon {
        Daemon::start_on(connection, None, options)
    }

    /// Starts one on a new simulated host, with its state elsewhere than in its own directory.
    pub fn start_in(state: &str, options: &[&str]) -> Daemon {
        Daemon::start_on("simulated", Some(state), options)
    }

    fn start_on(connection: &str, state: Option<&str>, options: &[&str]) -> Daemon {
        let directory = tempfile::tempdir().expect("a temporary directory");
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o711)).expect("permissions");
        for name in ["mnt", "host"] {
            fs::create_dir(directory.path().join(name)).expect("a directory");
        }
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        let connection = match connection {
            "simulated" => format!("simulated:{}", directory.path().join("host").display()),
            other => other.to_owned(),
        };
        let state = state.map_or_else(|| directory.path().join("state"), PathBuf::from);
        let mut daemon = Daemon { directory, connection, state, options, child: None };
        daemon.spawn();
        daemon
    }

    /// Starts the daemon again on the same state, and waits until the tree answers.
    pub fn spawn(&mut self) {
        self.spawn_with(&[]);
    }

    /// The same with these environment variables.
    pub fn spawn_with(&mut self, variables: &[(&str, &str)]) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_instancefs"));
        command.envs(variables.iter().copied());
        command.args(["mount", "--connect", &self.connection]);
        command.arg("--state-dir").arg(self.state_directory()).args(&self.options).arg(self.root());
        let log = OpenOptions::new().create(true).append(true).open(self.log()).expect("a log");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.child = Some(command.spawn().expect("the daemon starts"));
        let end = Instant::now() + DEADLINE;
        let is_up = |daemon: &Daemon| {
            daemon.is_mounted()
                && fs::read_to_string(daemon.path("health")).is_ok_and(|health| health.contains("announcer ok"))
        };
        while !is_up(self) {
            let ended = self.child.as_mut().and_then(|child| child.try_wait().expect("waits"));
            assert!(ended.is_none() && Instant::now() < end, "no mount: {}", self.log_text());
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn is_mounted(&self) -> bool {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        mounts.lines().any(|line| line.split(' ').nth(4) == self.root().to_str())
    }

    /// The mount point.
    pub fn root(&self) -> PathBuf {
        self.directory.path().join("mnt")
    }

    /// The daemon's own files.
    pub fn state_directory(&self) -> PathBuf {
        self.state.clone()
    }

    /// The simulated host.
    pub fn host(&self) -> PathBuf {
        self.directory.path().join("host")
    }

    /// Where the test may put files.
    pub fn scratch(&self) -> &Path {
        self.directory.path()
    }

    fn log(&self) -> PathBuf {
        self.directory.path().join("log")
    }

    /// What the daemon said so far.
    pub fn log_text(&self) -> String {
        fs::read_to_string(self.log()).unwrap_or_default()
    }

    /// A path below the mount point.
    pub fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.root().join(relative)
    }

    /// A file's content without its newline.
    pub fn read(&self, relative: impl AsRef<Path>) -> String {
        let path = self.path(relative);
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        text.strip_suffix('\n').unwrap_or(&text).to_owned()
    }

    /// One write as the test's own user, root.
    pub fn write(&self, relative: impl AsRef<Path>, value: &str) -> io::Result<()> {
        write(&self.path(relative), value.as_bytes())
    }

    /// A write that has to succeed.
    pub fn set(&self, relative: impl AsRef<Path>, value: &str) {
        let path = relative.as_ref();
        self.write(path, value).unwrap_or_else(|error| {
            let last = path.parent().map(|parent| self.path(parent.join("last_error")));
            let reason = last.and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
            panic!("{value} > {}: {error}: {reason}", path.display())
        });
    }

    /// Sends a command to the simulated host, as virsh would act from elsewhere.
    pub fn host_does(&self, command: Value) -> Value {
        let answer = self.host_may_do(&command).expect("the control socket answers");
        assert_eq!(answer["ok"], json!(true), "{command}: {answer}");
        answer
    }

    /// The same while the daemon, and its host with it, may die at any time.
    pub fn host_may_do(&self, command: &Value) -> io::Result<Value> {
        let mut socket = UnixStream::connect(self.host().join("control"))?;
        writeln!(socket, "{command}")?;
        let mut answer = String::new();
        BufReader::new(socket).read_line(&mut answer)?;
        serde_json::from_str(&answer).map_err(io::Error::from)
    }

    /// Defines a domain behind the daemon's back and waits until it is an instance.
    pub fn domain(&self, name: &str) -> Uuid {
        let id = Uuid::new_v4();
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><uuid>{id}</uuid><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
             <os><type>hvm</type></os></domain>"
        );
        self.host_does(json!({"do": "define", "xml": xml}));
        wait_until("the domain appears", || self.path(format!("instances/{id}/state")).exists());
        id
    }

    /// Does something to a domain behind the daemon's back and waits for the state that follows.
    pub fn domain_does(&self, id: Uuid, what: &str, state: &str) {
        self.host_does(json!({"do": what, "uuid": id.to_string()}));
        self.wait_state(id, state);
    }

    /// Waits for an instance's state.
    pub fn wait_state(&self, id: Uuid, state: &str) {
        wait_until(&format!("{id} is {state}"), || self.read(format!("instances/{id}/state")) == state);
    }

    /// An active image of a small real qcow2 file.
    pub fn image(&self) -> Uuid {
        let id = Uuid::new_v4();
        let file = self.scratch().join("image.qcow2");
        if !file.exists() {
            let status = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&file).arg("8M").status();
            assert!(status.expect("qemu-img runs").success());
        }
        fs::create_dir(self.path(format!("images/{id}"))).expect("a draft");
        fs::write(self.path(format!("images/{id}/data")), fs::read(&file).expect("an image")).expect("data is taken");
        self.set(format!("images/{id}/state"), "active");
        wait_until("the image is active", || self.read(format!("images/{id}/state")) == "active");
        id
    }

    /// The daemon's process id.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    /// Ends the daemon as a power failure of its process would.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("killed");
            child.wait().expect("reaped");
        }
    }

    /// Ends the daemon politely and returns whether it said success.
    pub fn stop(&mut self) -> bool {
        let Some(mut child) = self.child.take() else { return true };
        signal(child.id(), libc::SIGTERM);
        let end = Instant::now() + DEADLINE;
        loop {
            match child.try_wait().expect("waits") {
                Some(status) => return status.success(),
                None if Instant::now() > end => {
                    child.kill().expect("killed");
                    child.wait().expect("reaped");
                    return false;
                }
                None => thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let polite = self.stop();
        if self.is_mounted() {
            let _ = nix::mount::umount2(&self.root(), nix::mount::MntFlags::MNT_DETACH);
        }
        if thread::panicking() {
            eprintln!("daemon (ended politely: {polite}):\n{}", self.log_text());
        }
    }
}

/// Sends a signal.
pub fn signal(pid: u32, signal: i32) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).expect("a pid"));
    let signal = nix::sys::signal::Signal::try_from(signal).expect("a signal");
    nix::sys::signal::kill(pid, signal).expect("signalled");
}

/// One write(2), as a shell's redirect does it.
pub fn write(path: &Path, value: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).truncate(true).custom_flags(libc::O_CLOEXEC).open(path)?;
    let written = file.write(value)?;
    assert_eq!(written, value.len(), "a write is taken whole or not at all");
    Ok(())
}

/// The errno of a failure, 0 for success.
pub fn errno<T>(result: io::Result<T>) -> i32 {
    result.err().map_or(0, |error| error.raw_os_error().expect("an errno"))
}

/// An identity to act under.
#[derive(Clone, Debug)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

impl User {
    /// Runs something as this user, in a thread of its own: Linux keeps credentials per thread.
    pub fn act<T: Send>(&self, what: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let acting = scope.spawn(|| {
                become_user(self);
                what()
            });
            match acting.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }
}

/// libc's wrappers would change every thread of the process, so these are the bare system calls.
fn become_user(user: &User) {
    let groups = user.groups.as_ptr();
    // SAFETY: setgroups reads `len` gids from a live vector; the other two take plain numbers.
    let failed = unsafe {
        libc::syscall(libc::SYS_setgroups, user.groups.len(), groups) != 0
            || libc::syscall(libc::SYS_setresgid, user.gid, user.gid, user.gid) != 0
            || libc::syscall(libc::SYS_setresuid, user.uid, user.uid, user.uid) != 0
    };
    assert!(!failed, "cannot become {user:?}: {}", io::Error::last_os_error());
}

/// A group's id.
pub fn gid(name: &str) -> u32 {
    nix::unistd::Group::from_name(name).expect("the group file").expect("the group exists").gid.as_raw()
}
