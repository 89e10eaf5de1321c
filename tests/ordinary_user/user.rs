//! An ordinary user, his home, and a `/dev/fuse` that he may open, whatever this machine has.
//!
//! All of it is seen by the test's own thread and what it starts only: it lies in a mount namespace of their own. The user
//! is in a user database that lies over the machine's there, since `fusermount3` serves nobody without a name.

use std::ffi::OsStr;
use std::fs::{self, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use tempfile::TempDir;

use crate::support::{DEADLINE, User, errno, signal, wait_until};

pub const UID: u32 = 54_242;
pub const NAME: &str = "ann-of-the-tests";
/// Short, as the home of a person is: the sockets of libvirt lie below it.
const HOME: &str = "/media/ann";
const PROGRAM: &str = "/media/instancefs";

/// Ann. Dropping her ends her daemon.
pub struct Ann {
    user: User,
    daemon: Mutex<Option<Child>>,
    _home: TempDir,
}

impl Ann {
    /// With a `/dev/fuse` of this mode.
    pub fn with_device(mode: u32) -> Ann {
        unshare(CloneFlags::CLONE_NEWNS).expect("root may have a mount namespace");
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("a private one");
        mount(Some("tmpfs"), "/media", Some("tmpfs"), MsFlags::empty(), Some("mode=0755")).expect("a place");
        let over = |source: &Path, target: &str| {
            mount(Some(source), target, none, MsFlags::MS_BIND, none)
                .unwrap_or_else(|error| panic!("{target}: {error}"));
        };
        let device = Path::new("/media/fuse");
        mknod(device, SFlag::S_IFCHR, Mode::S_IRUSR, makedev(10, 229)).expect("a device");
        fs::set_permissions(device, Permissions::from_mode(mode)).expect("its mode");
        over(device, "/dev/fuse");
        for (database, entry) in [
            ("/etc/passwd", format!("{NAME}:x:{UID}:{UID}::{HOME}:/bin/sh\n")),
            ("/etc/group", format!("{NAME}:x:{UID}:\n")),
        ] {
            let copy = Path::new("/media").join(Path::new(database).file_name().expect("a name"));
            fs::copy(database, &copy).expect("a copy");
            OpenOptions::new().append(true).open(&copy).expect("it").write_all(entry.as_bytes()).expect("an entry");
            over(&copy, database);
        }
        fs::write(PROGRAM, "").expect("a place for the program");
        over(Path::new(env!("CARGO_BIN_EXE_instancefs")), PROGRAM);
        let home = tempfile::tempdir().expect("a home");
        chown(home.path(), Some(UID), Some(UID)).expect("her home");
        fs::create_dir(HOME).expect("its place");
        over(home.path(), HOME);
        let ann = Ann { user: User { uid: UID, gid: UID, groups: Vec::new() }, daemon: Mutex::default(), _home: home };
        for name in ["machines", "host"] {
            ann.act(|| fs::create_dir(Path::new(HOME).join(name)).expect("a directory"));
        }
        ann
    }

    /// As on a machine where everything is set up.
    pub fn new() -> Ann {
        Ann::with_device(0o666)
    }

    /// Does something as her.
    pub fn act<T: Send>(&self, what: impl FnOnce() -> T + Send) -> T {
        self.user.act(what)
    }

    /// Her command, in her home, with her environment.
    pub fn command(program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env_clear().env("HOME", HOME).env("PATH", "/usr/bin:/bin").current_dir(HOME).stdin(Stdio::null());
        // By which scripts/test knows whose a process is.
        if let Some(directory) = std::env::var_os("TMPDIR") {
            command.env("TMPDIR", directory);
        }
        command
    }

    pub fn instancefs(arguments: &[&str]) -> Command {
        let mut command = Ann::command(PROGRAM);
        command.args(arguments);
        command
    }

    /// What a mount that does not come about says.
    pub fn refusal(&self, mut command: Command) -> String {
        let output = self.act(|| command.output().expect("it runs"));
        assert!(!output.status.success(), "this should have been refused");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    pub fn home(&self) -> PathBuf {
        HOME.into()
    }

    pub fn state(&self) -> PathBuf {
        self.home().join(".local/state/instancefs")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.home().join("log")).unwrap_or_default()
    }

    /// Starts her daemon on a simulated host, and waits until the tree answers.
    pub fn mount_simulated(&self) {
        self.mount(&["--connect", &format!("simulated:{HOME}/host")]);
    }

    /// Starts her daemon, and waits until the tree answers.
    pub fn mount(&self, options: &[&str]) {
        let child = self.act(|| {
            let log = OpenOptions::new().create(true).append(true).open(self.home().join("log")).expect("a log");
            let mut command = Ann::instancefs(&["mount"]);
            command.args(options).arg("machines").stdout(Stdio::null()).stderr(log);
            command.spawn().expect("the daemon starts")
        });
        *self.lock() = Some(child);
        let is_up = || {
            self.is_mounted()
                && self.act(|| fs::read_to_string(tree("health"))).is_ok_and(|health| health.contains("announcer ok"))
        };
        let end = Instant::now() + DEADLINE;
        while !is_up() {
            assert!(!self.has_ended() && Instant::now() < end, "no mount: {}", self.log());
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Child>> {
        self.daemon.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_ended(&self) -> bool {
        self.lock().as_mut().is_none_or(|child| child.try_wait().expect("waits").is_some())
    }

    pub fn is_mounted(&self) -> bool {
        // The process's own namespace is another.
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").expect("the table of mounts");
        mounts.lines().any(|line| line.split(' ').nth(4) == tree("").to_str().map(|path| path.trim_end_matches('/')))
    }

    pub fn signal(&self, number: i32) {
        signal(self.lock().as_ref().expect("a daemon").id(), number);
    }

    /// Waits for the daemon's end, and says whether that was a success.
    pub fn ended(&self) -> bool {
        wait_until("the daemon ends", || self.has_ended());
        let child = self.lock().take();
        child.is_some_and(|mut child| child.wait().expect("waits").success())
    }

    /// Unmounts as she would, once the last change is announced: meanwhile the mount is busy.
    pub fn unmount(&self) {
        let mut command = Ann::command("fusermount3");
        command.args(["-u", "machines"]).stderr(Stdio::null());
        wait_until("it is unmounted", || self.act(|| command.status().expect("it runs").success()));
        assert!(self.ended(), "the daemon ended badly: {}", self.log());
    }

    pub fn read(&self, relative: &str) -> String {
        let text = self.act(|| fs::read_to_string(tree(relative)));
        let text = text.unwrap_or_else(|error| panic!("{relative}: {error}: {}", self.log()));
        text.strip_suffix('\n').unwrap_or(&text).to_owned()
    }

    /// One write, and its errno.
    pub fn write(&self, relative: &str, value: &str) -> i32 {
        errno(self.act(|| crate::support::write(&tree(relative), value.as_bytes())))
    }

    pub fn set(&self, relative: &str, value: &str) {
        let errno = self.write(relative, value);
        assert_eq!(errno, 0, "{value} > {relative}: {}", self.log());
    }

    pub fn make_directory(&self, relative: &str) {
        self.act(|| fs::create_dir(tree(relative))).unwrap_or_else(|error| panic!("{relative}: {error}"));
    }
}

/// A place in her tree.
pub fn tree(relative: &str) -> PathBuf {
    Path::new(HOME).join("machines").join(relative)
}

impl Drop for Ann {
    fn drop(&mut self) {
        let Some(mut child) = self.lock().take() else { return };
        signal(child.id(), libc::SIGTERM);
        let end = Instant::now() + DEADLINE;
        while matches!(child.try_wait(), Ok(None)) && Instant::now() < end {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let _already_gone = child.kill();
        let _reaped = child.wait();
        if std::thread::panicking() {
            eprintln!("daemon:\n{}", self.log());
        }
    }
}
