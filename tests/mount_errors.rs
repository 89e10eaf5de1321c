//! `instancefs mount`: what it refuses, what it leaves alone, and how it comes and goes.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// Far longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(30);
const CONNECTION: &str = "test:///default";

/// A mount point and a state directory, and what it takes to clean up behind them.
struct Place(TempDir);

impl Place {
    fn new() -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        fs::create_dir(place.mountpoint()).unwrap();
        place
    }

    fn mountpoint(&self) -> PathBuf {
        self.0.path().join("mnt")
    }

    fn state(&self) -> PathBuf {
        self.0.path().join("state")
    }

    /// `instancefs mount ARGUMENTS... --state-dir STATE MOUNTPOINT`
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_instancefs"));
        // Groups differ from host to host.
        command.args(["mount", "-o", "access_group=root,admin_group=root"]).args(arguments);
        command.arg("--state-dir").arg(self.state()).arg(self.mountpoint()).stdin(Stdio::null());
        command
    }

    fn refusal(&self, arguments: &[&str]) -> String {
        refusal(self.command(arguments))
    }

    fn foreground(&self) -> Daemon {
        let child = self.command(&["--connect", CONNECTION]).stderr(Stdio::piped()).spawn().unwrap();
        let daemon = Daemon(child);
        eventually("it is mounted", || self.is_mounted() && statfs(&self.mountpoint()).is_ok());
        daemon
    }

    fn background(&self) -> Output {
        self.command(&["--background", "--connect", CONNECTION]).output().unwrap()
    }

    fn is_mounted(&self) -> bool {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        table.contains(&format!(" {} ", self.mountpoint().display()))
    }

    fn daemon(&self) -> Pid {
        let lock = fs::read_to_string(self.state().join("lock")).unwrap();
        Pid::from_raw(lock.lines().next().unwrap().parse().unwrap())
    }
}

impl Drop for Place {
    /// Only the daemon that holds this place's lock is ended, and only this place's mounts are removed.
    fn drop(&mut self) {
        if let Ok(lock) = File::open(self.state().join("lock"))
            && nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusiveNonblock).is_err()
        {
            let _ = kill(self.daemon(), Signal::SIGKILL);
        }
        while umount2(&self.mountpoint(), MntFlags::MNT_DETACH).is_ok() {}
    }
}

struct Daemon(Child);

impl Daemon {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.0.id()).unwrap()), signal).unwrap();
    }

    fn end(mut self) -> (Option<i32>, String) {
        eventually("the daemon ends", || self.0.try_wait().unwrap().is_some());
        let mut messages = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut messages).unwrap();
        (self.0.wait().unwrap().code(), messages)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn statfs(path: &Path) -> nix::Result<()> {
    nix::sys::statfs::statfs(path).map(drop)
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {} s: {what}", LIMIT.as_secs());
        thread::sleep(Duration::from_millis(2));
    }
}

/// Runs what must fail with exit code 1, and returns the last line of its messages.
fn refusal(mut command: Command) -> String {
    let output = command.output().unwrap();
    let messages = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{messages}");
    let last = messages.lines().last().unwrap_or_default().to_owned();
    assert!(last.starts_with("instancefs: "), "{messages}");
    last
}

#[test]
fn a_foreign_state_directory_is_refused_and_left_as_it_is() {
    let place = Place::new();
    fs::create_dir(place.state()).unwrap();
    fs::set_permissions(place.state(), PermissionsExt::from_mode(0o750)).unwrap();
    fs::write(place.state().join("photos"), "dear").unwrap();
    let message = place.refusal(&[]);
    assert!(message.contains("photos") && message.contains("left as it is"), "{message}");
    assert_eq!(place.state().read_dir().unwrap().count(), 1);
    assert_eq!(place.state().metadata().unwrap().mode() & 0o7777, 0o750);
}

#[test]
fn a_state_directory_without_a_parent_is_not_made() {
    let place = Place::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_instancefs"));
    command.args(["mount", "-o", "access_group=root,admin_group=root", "--state-dir"]);
    command.arg(place.0.path().join("disk/state")).arg(place.mountpoint());
    let message = refusal(command);
    assert!(message.contains("/disk does not exist"), "{message}");
    assert!(!place.0.path().join("disk").exists());
}

#[test]
fn a_state_directory_that_is_a_file_is_refused() {
    let place = Place::new();
    fs::write(place.state(), "").unwrap();
    let message = place.refusal(&[]);
    assert!(message.contains("is not a directory"), "{message}");
}

/// A file system of its own for the state directory, with room for `size` bytes.
fn mount_state(place: &Place, flags: MsFlags, size: &str) -> StateMount {
    fs::create_dir(place.state()).unwrap();
    let data = format!("size={size},mode=0700");
    mount(Some("tmpfs"), &place.state(), Some("tmpfs"), flags, Some(data.as_str())).unwrap();
    StateMount(place.state())
}

struct StateMount(PathBuf);

impl Drop for StateMount {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_read_only_state_directory_is_refused_with_the_reason() {
    let place = Place::new();
    let _state = mount_state(&place, MsFlags::MS_RDONLY, "64k");
    let message = place.refusal(&[]);
    assert!(message.contains("cannot be written: Read-only file system"), "{message}");
}

#[test]
fn a_full_state_directory_is_refused_with_the_reason() {
    let place = Place::new();
    let _state = mount_state(&place, MsFlags::empty(), "8k");
    let message = place.refusal(&["--connect", CONNECTION]);
    assert!(message.contains("is full; free some space"), "{message}");
}

#[test]
fn a_mount_point_that_cannot_be_one_is_refused() {
    let place = Place::new();
    fs::remove_dir(place.mountpoint()).unwrap();
    let message = place.refusal(&[]);
    assert!(message.contains("mnt does not exist; create the directory first"), "{message}");
    fs::write(place.mountpoint(), "").unwrap();
    let message = place.refusal(&[]);
    assert!(message.contains("is not a directory"), "{message}");
}

#[test]
fn a_mount_point_of_somebody_else_is_refused() {
    let place = Place::new();
    mount(Some("tmpfs"), &place.mountpoint(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    let message = place.refusal(&[]);
    assert!(message.contains("is a mount point already (tmpfs from tmpfs)"), "{message}");
    assert!(place.is_mounted());
}

#[test]
fn a_mount_that_would_hide_its_state_is_refused() {
    let place = Place::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_instancefs"));
    command.args(["mount", "-o", "access_group=root,admin_group=root", "--state-dir"]);
    command.arg(place.mountpoint().join("state")).arg(place.mountpoint());
    let message = refusal(command);
    assert!(message.contains("would hide it"), "{message}");
}

#[test]
fn options_and_configuration_are_checked_before_anything_is_made() {
    let place = Place::new();
    let message = place.refusal(&["-o", "rw,rro"]);
    assert!(message.contains("unknown mount option 'rro'"), "{message}");
    let message = place.refusal(&["-o", "projects=instancefs-no-such-group"]);
    assert!(message.contains("'instancefs-no-such-group'") && message.contains("does not exist"), "{message}");
    let config = place.0.path().join("config.toml");
    let config = config.to_str().unwrap();
    let message = place.refusal(&["--config", config]);
    assert!(message.contains("cannot be read: No such file"), "{message}");
    fs::write(config, "settle = '1s'\nprojcts = []\n").unwrap();
    let message = place.refusal(&["--config", config]);
    assert!(message.contains("line 2") && message.contains("projcts"), "{message}");
    assert!(!place.state().exists());
}

#[test]
fn a_first_mount_without_its_hypervisor_says_why_and_what_to_do() {
    let place = Place::new();
    for background in [&["--background"][..], &[]] {
        let uri = "qemu:///system?socket=/nonexistent/instancefs-test-socket";
        let message = place.refusal(&[background, &["--connect", uri]].concat());
        assert!(message.contains(uri) && message.contains("--connect"), "{message}");
        assert!(!place.is_mounted());
    }
}

#[test]
fn a_state_directory_is_not_mounted_twice() {
    let place = Place::new();
    let daemon = place.foreground();
    let message = place.refusal(&[]);
    assert!(message.contains(&format!("another instancefs (pid {})", daemon.0.id())), "{message}");
    let other = Place::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_instancefs"));
    command.args(["mount", "-o", "access_group=root,admin_group=root", "--state-dir"]);
    command.arg(other.state()).arg(place.mountpoint());
    let message = refusal(command);
    assert!(message.contains("is mounted by a running instancefs already"), "{message}");
}

#[test]
fn a_state_directory_stays_with_its_connection() {
    let place = Place::new();
    let daemon = place.foreground();
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.end().0, Some(0));
    let message = place.refusal(&["--connect", "qemu:///system"]);
    assert!(message.contains("this state directory belongs to test:///default"), "{message}");
    let output = place.command(&["--background", "--connect", "auto"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn a_signal_unmounts_also_while_something_is_open() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let place = Place::new();
        let daemon = place.foreground();
        let directory = nix::fcntl::open(
            &place.mountpoint(),
            nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_CLOEXEC,
            nix::sys::stat::Mode::empty(),
        )
        .unwrap();
        let mut file = File::open(place.mountpoint().join("health")).unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("hypervisor ok"), "{text}");
        daemon.signal(signal);
        let (code, messages) = daemon.end();
        assert_eq!(code, Some(0), "{messages}");
        assert!(!place.is_mounted());
        assert!(file.read_at(&mut [0; 8], 0).is_err(), "the file is of a mount that is gone");
        drop(directory);
    }
}

#[test]
fn an_unmount_from_outside_ends_the_daemon() {
    let place = Place::new();
    let daemon = place.foreground();
    assert!(Command::new("umount").arg(place.mountpoint()).status().unwrap().success());
    let (code, messages) = daemon.end();
    assert_eq!(code, Some(0), "{messages}");
}

#[test]
fn a_background_mount_lets_its_caller_go() {
    let place = Place::new();
    // Returns only when nobody holds the pipe any more; descriptor 3 stands for whatever else the shell has open.
    let script = "out=$(\"$@\" 2>&1 3>&1) && stat -f -c ok \"$MOUNTPOINT\"";
    let command = place.command(&["--background", "--connect", CONNECTION]);
    // A file, since a daemon that holds a pipe of ours would make this test hang instead of fail.
    let said = place.0.path().join("said");
    let status = Command::new("timeout")
        .args(["10", "sh", "-c", script, "sh"])
        .arg(command.get_program())
        .args(command.get_args())
        .env("MOUNTPOINT", place.mountpoint())
        .stdout(File::create(&said).unwrap())
        .status()
        .unwrap();
    assert_eq!((status.code(), fs::read_to_string(said).unwrap().as_str()), (Some(0), "ok\n"));
    let daemon = place.daemon();
    assert_eq!(nix::unistd::getsid(Some(daemon)), Ok(daemon));
    kill(daemon, Signal::SIGTERM).unwrap();
    eventually("the background daemon ends", || kill(daemon, None) == Err(Errno::ESRCH));
    assert!(!place.is_mounted());
    let log = fs::read_to_string(place.state().join("log")).unwrap();
    assert!(log.contains("is mounted") && log.contains("is unmounted"), "{log}");
}

#[test]
fn the_mount_of_a_killed_daemon_is_swept() {
    let place = Place::new();
    assert!(place.background().status.success());
    kill(place.daemon(), Signal::SIGKILL).unwrap();
    eventually("the mount is dead", || statfs(&place.mountpoint()) == Err(Errno::ENOTCONN));
    let output = place.background();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(statfs(&place.mountpoint()), Ok(()));
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let path = format!(" {} ", place.mountpoint().display());
    assert_eq!(table.lines().filter(|line| line.contains(&path)).count(), 1, "the dead one is gone");
}

#[test]
fn a_directory_that_is_not_empty_is_mounted_with_a_warning() {
    let place = Place::new();
    fs::write(place.mountpoint().join("file"), "").unwrap();
    let daemon = place.foreground();
    daemon.signal(Signal::SIGTERM);
    let (code, messages) = daemon.end();
    assert_eq!(code, Some(0));
    assert!(messages.contains("is not empty"), "{messages}");
    assert!(place.mountpoint().join("file").exists());
}

#[test]
fn mount_8_can_call_us_as_its_helper() {
    let place = Place::new();
    let helper = place.0.path().join("mount.instancefs");
    symlink(env!("CARGO_BIN_EXE_instancefs"), &helper).unwrap();
    let options = format!("rw,_netdev,noauto,access_group=root,admin_group=root,state_dir={}", place.state().display());
    let output = Command::new(helper).arg(CONNECTION).arg(place.mountpoint()).args(["-o", &options]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(statfs(&place.mountpoint()), Ok(()));
}

/// A mount like ours on which nobody ever answers, as a daemon leaves it that hangs or whose /dev/fuse leaked.
fn mount_silence(place: &Place) -> File {
    use std::os::fd::AsRawFd;
    let device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
    let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
    mount(Some("instancefs"), &place.mountpoint(), Some("fuse"), MsFlags::empty(), Some(data.as_str())).unwrap();
    device
}

#[test]
fn a_mount_that_does_not_answer_is_left_to_its_state_directory() {
    let place = Place::new();
    let _device = mount_silence(&place);
    let message = place.refusal(&["--connect", CONNECTION]);
    assert!(message.contains("belongs to another state directory"), "{message}");
    assert!(place.is_mounted());
}

#[test]
fn a_mount_that_does_not_answer_is_swept_by_the_state_directory_that_made_it() {
    let place = Place::new();
    let _device = mount_silence(&place);
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let path = place.mountpoint();
    let line = table.lines().find(|line| line.contains(&format!(" {} ", path.display()))).unwrap();
    let device = line.split(' ').nth(2).unwrap();
    fs::create_dir(place.state()).unwrap();
    fs::write(place.state().join("lock"), format!("1\n{device} {}\n", path.display())).unwrap();
    let output = place.background();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(statfs(&path), Ok(()));
}
