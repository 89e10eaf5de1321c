//! What systemd hears of a daemon that runs as its unit says: the test is the service manager.

mod support;

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use support::{DEADLINE, signal, wait_until};
use tempfile::TempDir;

/// The unit's daemon under a service manager that only listens.
struct Service {
    directory: TempDir,
    socket: UnixDatagram,
    child: Option<Child>,
}

impl Service {
    /// Runs the command line of the packaged unit, with a simulated host; `watchdog` is `WatchdogSec`.
    fn start(watchdog: Option<Duration>, arguments: &[&str]) -> Service {
        let directory = tempfile::tempdir().expect("a temporary directory");
        for name in ["mnt", "host"] {
            fs::create_dir(directory.path().join(name)).expect("a directory");
        }
        let notify = directory.path().join("notify");
        let socket = UnixDatagram::bind(&notify).expect("a socket");
        let configuration = directory.path().join("instancefs.toml");
        let path = |name: &str| directory.path().join(name).display().to_string();
        let text = format!("connect = \"simulated:{}\"\nstate_dir = \"{}\"\n", path("host"), path("state"));
        fs::write(&configuration, text).expect("written");

        let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/deb/instancefs.service");
        let unit = fs::read_to_string(unit).expect("the unit");
        let line = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).expect("a command line");
        let mut words = line.split(' ').map(|word| word.replace("${MOUNTPOINT}", &path("mnt")));
        assert_eq!(words.next().as_deref(), Some("/usr/bin/instancefs"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_instancefs"));
        command.args(words).arg("--config").arg(&configuration).args(arguments);
        command.env("NOTIFY_SOCKET", &notify).env_remove("WATCHDOG_PID").env_remove("WATCHDOG_USEC");
        if let Some(watchdog) = watchdog {
            command.env("WATCHDOG_USEC", watchdog.as_micros().to_string());
        }
        let child = command.stdin(Stdio::null()).spawn().expect("the daemon starts");
        Service { directory, socket, child: Some(child) }
    }

    fn root(&self) -> PathBuf {
        self.directory.path().join("mnt")
    }

    fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    /// The next message, within a time.
    fn hears_within(&self, time: Duration) -> Option<String> {
        self.socket.set_read_timeout(Some(time)).expect("a timeout");
        let mut message = [0; 4096];
        let length = self.socket.recv(&mut message).ok()?;
        Some(String::from_utf8_lossy(&message[..length]).into_owned())
    }

    /// The next message that says this.
    fn hears(&self, what: &str) -> String {
        let end = Instant::now() + DEADLINE;
        while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            match self.hears_within(left) {
                Some(message) if message.lines().any(|line| line == what) => return message,
                Some(_) | None => {}
            }
        }
        panic!("waited in vain for {what}");
    }

    /// Nothing more is said, but what was on its way already.
    fn falls_silent(&self, watchdog: Duration) {
        self.socket.set_nonblocking(true).expect("no waiting");
        while self.socket.recv(&mut [0; 4096]).is_ok() {}
        self.socket.set_nonblocking(false).expect("waiting");
        let mut end = Instant::now() + watchdog * 2;
        let mut late = 0;
        while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            if self.hears_within(left).is_some_and(|message| message.contains("WATCHDOG=1")) {
                late += 1;
                end = Instant::now() + watchdog * 2;
            }
            assert!(late <= 1, "only one could be on its way");
        }
    }

    fn answers(&self) -> bool {
        fs::read_to_string(self.root().join("README")).is_ok_and(|text| text.starts_with("instancefs"))
    }

    /// The id of the thread that works off what the tree asks for.
    fn engine(&self) -> i32 {
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid())).expect("threads");
        let engine = threads.flatten().find(|thread| {
            fs::read_to_string(thread.path().join("comm")).is_ok_and(|name| name.trim_end() == "engine")
        });
        let name = engine.expect("the engine's thread").file_name();
        name.to_str().and_then(|name| name.parse().ok()).expect("a thread id")
    }

    fn end(&mut self) -> bool {
        let Some(mut child) = self.child.take() else { return true };
        let mut ended = None;
        wait_until("the daemon has ended", || {
            ended = child.try_wait().expect("waits");
            ended.is_some()
        });
        ended.is_some_and(|status| status.success())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ended_before = child.kill();
            let _ = child.wait();
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        if mounts.lines().any(|line| line.split(' ').nth(4) == self.root().to_str()) {
            let _ = nix::mount::umount2(&self.root(), nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

/// One thread of another process that does nothing until this is dropped, while all others go on.
struct Held(i32);

impl Held {
    fn still(thread: i32) -> Held {
        let none: *mut libc::c_void = std::ptr::null_mut();
        // SAFETY: these requests read and write no memory of ours.
        let refused = unsafe {
            libc::ptrace(libc::PTRACE_SEIZE, thread, none, none) != 0
                || libc::ptrace(libc::PTRACE_INTERRUPT, thread, none, none) != 0
        };
        assert!(!refused, "the engine's thread cannot be held: {}", std::io::Error::last_os_error());
        let mut status = 0;
        // SAFETY: the status is written to a live integer.
        let waited = unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL) };
        assert!(waited == thread && libc::WIFSTOPPED(status), "it stands still");
        Held(thread)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let none: *mut libc::c_void = std::ptr::null_mut();
        // SAFETY: as above.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, self.0, none, none) };
    }
}

#[test]
fn the_manager_hears_ready_when_the_tree_answers_and_stopping_at_the_end() {
    let mut service = Service::start(None, &[]);
    let first = service.hears_within(DEADLINE).expect("a message");
    assert!(service.answers(), "the tree answers before anything else is said");
    assert!(first.lines().any(|line| line == "READY=1"), "{first}");
    let status = format!("STATUS={}: instances 0; ", service.root().display());
    assert!(first.lines().any(|line| line.starts_with(&status)), "{first}");
    signal(service.pid(), libc::SIGTERM);
    service.hears("STOPPING=1");
    assert!(service.end());
}

#[test]
fn the_status_follows_what_happens_also_without_a_watchdog() {
    let service = Service::start(None, &[]);
    let says = |status: &str| service.hears(&format!("STATUS={}: {status}", service.root().display()));
    // The announcer starts after the tree answers.
    says("instances 0; all parts ok");
    let draft = service.root().join("instances/5b0d4a52-9a41-4c55-9a7c-1d1f8e0f8f11");
    fs::create_dir(&draft).expect("a draft");
    says("instances 1; all parts ok");
    fs::remove_dir(&draft).expect("it is discarded");
    says("instances 0; all parts ok");
}

#[test]
fn the_watchdog_is_fed_as_long_as_the_engine_works_and_no_longer() {
    let watchdog = Duration::from_secs(2);
    let mut service = Service::start(Some(watchdog), &[]);
    service.hears("READY=1");
    for _ in 0..3 {
        service.hears("WATCHDOG=1");
    }
    let held = Held::still(service.engine());
    service.falls_silent(watchdog);
    assert!(service.answers(), "the rest of the daemon lives");
    drop(held);
    service.hears("WATCHDOG=1");
    signal(service.pid(), libc::SIGTERM);
    service.hears("STOPPING=1");
    assert!(service.end());
}

#[test]
fn a_whole_daemon_that_stands_still_is_silent_too() {
    let watchdog = Duration::from_secs(1);
    let service = Service::start(Some(watchdog), &[]);
    service.hears("WATCHDOG=1");
    signal(service.pid(), libc::SIGSTOP);
    service.falls_silent(watchdog);
    signal(service.pid(), libc::SIGCONT);
    service.hears("WATCHDOG=1");
}

#[test]
fn an_unmount_from_outside_is_an_end_like_any_other() {
    let mut service = Service::start(Some(Duration::from_secs(60)), &[]);
    service.hears("READY=1");
    nix::mount::umount2(&service.root(), nix::mount::MntFlags::MNT_DETACH).expect("unmounted");
    service.hears("STOPPING=1");
    assert!(service.end());
}

#[test]
fn a_daemon_in_the_background_says_nothing_to_the_manager_of_its_caller() {
    let mut service = Service::start(Some(Duration::from_secs(1)), &["--background"]);
    assert!(service.end(), "the caller is let go");
    assert!(service.answers());
    assert_eq!(service.hears_within(Duration::from_secs(2)), None);
    let lock = fs::read_to_string(service.directory.path().join("state/lock")).expect("the lock names the daemon");
    let pid: u32 = lock.lines().next().and_then(|pid| pid.parse().ok()).expect("a process id");
    signal(pid, libc::SIGTERM);
    wait_until("it is gone", || !Path::new(&format!("/proc/{pid}")).exists());
}
