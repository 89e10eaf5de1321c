//! Volumes as block devices of this host, through a mount: real loop devices, a real qemu-storage-daemon, real file
//! systems, and a daemon that dies.

mod support;

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use support::{Daemon, errno, wait_until};
use uuid::Uuid;

const MIB: u64 = 1 << 20;

/// A daemon whose devices, exporters and mounts are gone when it is, whatever happened.
struct Host {
    daemon: Daemon,
}

impl Host {
    fn new() -> Host {
        Host { daemon: Daemon::start(&[]) }
    }

    /// A volume of 64 MiB that nobody has.
    fn volume(&self, format: &str) -> Uuid {
        let id = Uuid::new_v4();
        fs::create_dir(self.daemon.path(format!("volumes/{id}"))).expect("a draft");
        self.set(id, "disk_format", format);
        self.set(id, "size_bytes", "64M");
        self.set(id, "state", "available");
        wait_until("it is made", || self.read(id, "state") == "available");
        id
    }

    fn set(&self, id: Uuid, file: &str, value: &str) {
        self.daemon.set(format!("volumes/{id}/{file}"), value);
    }

    fn read(&self, id: Uuid, file: &str) -> String {
        self.daemon.read(format!("volumes/{id}/{file}"))
    }

    /// The errno of a write, and why.
    fn refused(&self, id: Uuid, file: &str, value: &str) -> (i32, String) {
        let errno = errno(self.daemon.write(format!("volumes/{id}/{file}"), value));
        (errno, self.read(id, "last_error"))
    }

    fn attach(&self, id: Uuid) -> PathBuf {
        self.set(id, "local_attach", "1");
        self.device(id)
    }

    fn device(&self, id: Uuid) -> PathBuf {
        wait_until("there is a device", || !self.read(id, "local_device").is_empty());
        let device = PathBuf::from(self.read(id, "local_device"));
        assert!(fs::metadata(&device).expect("the device").file_type().is_block_device());
        assert_eq!((self.read(id, "state"), self.read(id, "local_attach")), ("in_use".to_owned(), "1".to_owned()));
        device
    }

    fn detach(&self, id: Uuid) {
        self.set(id, "local_attach", "0");
        wait_until("it is detached", || self.read(id, "state") == "available");
        assert_eq!(self.read(id, "local_device"), "");
        assert!(self.loops().is_empty(), "a loop device is left: {:?}", self.loops());
        assert!(!self.home(id).exists(), "the exporter's directory is left");
    }

    fn home(&self, id: Uuid) -> PathBuf {
        self.daemon.state_directory().join("exports").join(id.to_string())
    }

    fn data(&self, id: Uuid) -> PathBuf {
        self.daemon.state_directory().join("volumes").join(id.to_string()).join("data")
    }

    fn exporter(&self, id: Uuid) -> i32 {
        fs::read_to_string(self.home(id).join("pid")).expect("an exporter").trim().parse().expect("a number")
    }

    /// The loop devices with one of our files behind them.
    fn loops(&self) -> Vec<PathBuf> {
        loops_on(self.daemon.scratch())
    }

    fn mountpoint(&self) -> PathBuf {
        let path = self.daemon.scratch().join("fs");
        fs::create_dir_all(&path).expect("a directory");
        path
    }

    fn mount(&self, device: &Path) -> PathBuf {
        let path = self.mountpoint();
        shell(&format!("mount {} {}", device.display(), path.display()));
        path
    }

    fn umount(&self) {
        nix::mount::umount2(&self.mountpoint(), nix::mount::MntFlags::empty()).expect("unmounted");
    }
}

impl Drop for Host {
    /// Whatever is left of this host has its files below this host's own directory.
    fn drop(&mut self) {
        self.daemon.kill();
        let place = self.daemon.scratch().to_owned();
        let _not_mounted = nix::mount::umount2(&place.join("fs"), nix::mount::MntFlags::MNT_DETACH);
        for device in loops_on(&place) {
            let _gone = Command::new("losetup").arg("-d").arg(&device).status();
        }
        for home in fs::read_dir(self.daemon.state_directory().join("exports")).into_iter().flatten() {
            let home = home.expect("an entry").path();
            // A process that has this very file open, so that an id that was given to another is left alone.
            let pid = fs::read_to_string(home.join("pid")).unwrap_or_default().trim().to_owned();
            let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().filter_map(Result::ok);
            let is_it = open.filter_map(|entry| fs::read_link(entry.path()).ok()).any(|file| file == home.join("pid"));
            if let (true, Ok(pid)) = (is_it, pid.parse()) {
                let _gone = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
            }
            let _not_mounted = nix::mount::umount2(&home.join("disk"), nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

fn loops_on(place: &Path) -> Vec<PathBuf> {
    let names = fs::read_dir("/sys/block").expect("devices").map(|entry| entry.expect("an entry").file_name());
    let has_ours = |name: &std::ffi::OsString| {
        let backing = fs::read_to_string(Path::new("/sys/block").join(name).join("loop/backing_file"));
        backing.is_ok_and(|path| Path::new(path.trim_end()).starts_with(place))
    };
    names.filter(has_ours).map(|name| Path::new("/dev").join(name)).collect()
}

/// Runs a command that has to succeed, and returns what it prints.
fn shell(command: &str) -> String {
    let output = Command::new("bash").args(["-ec", command]).output().expect("bash runs");
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn size(device: &Path) -> u64 {
    File::open(device).expect("opened").seek(SeekFrom::End(0)).expect("seeks")
}

/// From an empty device to a file system with a word in it, and back.
fn lives_a_life(format: &str) {
    let host = Host::new();
    let id = host.volume(format);
    let device = host.attach(id);
    assert_eq!(size(&device), 64 * MIB);
    let shown = device.display().to_string();
    shell(&format!("mkfs.ext4 -q {shown}"));
    let place = host.mount(&device);
    fs::write(place.join("word"), "written through the device").expect("written");

    let (errno, reason) = host.refused(id, "local_attach", "0");
    assert_eq!(errno, libc::EBUSY);
    assert!(reason.contains(&format!("{shown} is mounted on {}", place.display())), "{reason}");
    assert_eq!(fs::read_to_string(place.join("word")).expect("still there"), "written through the device");
    host.umount();

    let opened = File::open(&device).expect("opened");
    let mut child = Command::new("sleep").arg("600").stdin(opened).spawn().expect("sleeps");
    let (errno, reason) = host.refused(id, "local_attach", "0");
    child.kill().expect("killed");
    child.wait().expect("reaped");
    assert_eq!(errno, libc::EBUSY);
    assert!(reason.contains(&format!("process {} (sleep)", child.id())), "{reason}");

    let upper = shell(&format!("losetup -f --show {shown}"));
    let (errno, reason) = host.refused(id, "local_attach", "0");
    shell(&format!("losetup -d {upper}"));
    assert_eq!(errno, libc::EBUSY);
    assert!(reason.contains(&upper), "{reason}");

    host.set(id, "size_bytes", "96M");
    wait_until("it is larger", || host.read(id, "size_bytes") == (96 * MIB).to_string());
    assert_eq!(size(&device), 96 * MIB);
    shell(&format!("e2fsck -fp {shown}; resize2fs {shown}"));
    host.detach(id);

    if format == "qcow2" {
        shell(&format!("qemu-img check -q -f qcow2 {}", host.data(id).display()));
    } else {
        let mut bytes = Vec::new();
        File::open(host.data(id)).expect("opened").read_to_end(&mut bytes).expect("read");
        let word = b"written through the device";
        assert!(bytes.windows(word.len()).any(|window| window == word), "it is not in the file");
    }
    let place = host.mount(&host.attach(id));
    assert_eq!(fs::read_to_string(place.join("word")).expect("it is kept"), "written through the device");
    host.umount();
    host.detach(id);
}

#[test]
fn a_raw_volume_is_a_device_that_takes_a_file_system_and_goes_only_when_nobody_uses_it() {
    lives_a_life("raw");
}

#[test]
fn a_qcow2_volume_is_a_device_that_takes_a_file_system_and_goes_only_when_nobody_uses_it() {
    lives_a_life("qcow2");
}

#[test]
fn data_that_somebody_else_has_open_becomes_no_device() {
    let host = Host::new();
    let id = host.volume("raw");
    let others = shell(&format!("losetup -f --show {}", host.data(id).display()));
    let (errno, reason) = host.refused(id, "local_attach", "1");
    assert_eq!(host.loops(), [PathBuf::from(&others)]);
    shell(&format!("losetup -d {others}"));
    assert_eq!(errno, libc::EBUSY, "{reason}");
    host.attach(id);
    host.detach(id);
}

#[test]
fn a_mounted_device_outlives_the_daemon_and_is_taken_away_by_the_next_one() {
    for format in ["raw", "qcow2"] {
        let mut host = Host::new();
        let id = host.volume(format);
        let device = host.attach(id);
        shell(&format!("mkfs.ext4 -q {}", device.display()));
        let place = host.mount(&device);
        host.daemon.kill();
        fs::write(place.join("word"), "written while nobody was there").expect("written");
        shell(&format!("sync -f {}", place.display()));
        host.daemon.spawn();
        assert_eq!(host.device(id), device);
        assert_eq!(host.refused(id, "local_attach", "0").0, libc::EBUSY);
        host.umount();
        host.detach(id);
    }
}

#[test]
fn a_daemon_killed_at_any_moment_leaves_one_device_or_none_and_the_next_one_goes_on() {
    let mut host = Host::new();
    let id = host.volume("qcow2");
    let path = host.daemon.path(format!("volumes/{id}/local_attach"));
    for (round, delay) in [0, 5, 10, 20, 40, 80, 120, 160].into_iter().enumerate() {
        let wanted = if round % 2 == 0 { "1" } else { "0" };
        thread::scope(|scope| {
            // It hears nothing, or an error, when the daemon dies.
            scope.spawn(|| drop(fs::write(&path, wanted)));
            thread::sleep(Duration::from_millis(delay));
            host.daemon.kill();
        });
        host.daemon.spawn();
        wait_until("nothing goes on", || host.read(id, "task").is_empty());
        let is_device = host.read(id, "local_attach") == "1";
        assert_eq!(host.loops().len(), usize::from(is_device), "after {delay} ms: {:?}", host.loops());
        assert_eq!(host.home(id).exists(), is_device, "after {delay} ms");
        host.set(id, "local_attach", wanted);
        wait_until("nothing goes on", || host.read(id, "task").is_empty());
        assert_eq!(host.loops().len(), usize::from(wanted == "1"), "after {delay} ms");
    }
    assert_eq!(host.read(id, "local_attach"), "0");
    shell(&format!("qemu-img check -q -f qcow2 {}", host.data(id).display()));
}

#[test]
fn an_exporter_killed_under_a_file_system_is_a_fault_that_writing_0_and_available_mends() {
    let host = Host::new();
    let id = host.volume("qcow2");
    let device = host.attach(id);
    shell(&format!("mkfs.ext4 -q {}", device.display()));
    let place = host.mount(&device);
    fs::write(place.join("word"), "safe").expect("written");
    shell(&format!("sync -f {}", place.display()));
    let exporter = nix::unistd::Pid::from_raw(host.exporter(id));
    nix::sys::signal::kill(exporter, nix::sys::signal::Signal::SIGKILL).expect("killed");
    wait_until("it is seen", || host.read(id, "state") == "error");
    assert_eq!(host.refused(id, "local_attach", "0").0, libc::EBUSY);
    assert_eq!(host.refused(id, "state", "available").0, libc::EBUSY);
    host.umount();
    host.set(id, "local_attach", "0");
    wait_until("it is gone", || host.read(id, "local_attach") == "0" && host.read(id, "task").is_empty());
    assert!(host.loops().is_empty() && !host.home(id).exists());
    assert_eq!(host.read(id, "state"), "error");
    host.set(id, "state", "available");
    wait_until("it is mended", || host.read(id, "state") == "available");
    let device = host.attach(id);
    let place = host.mount(&device);
    assert_eq!(fs::read_to_string(place.join("word")).expect("it is kept"), "safe");
    host.umount();
    host.detach(id);
}

#[test]
fn an_exporter_that_hangs_keeps_nobody_from_hearing_of_the_death_of_another() {
    let host = Host::new();
    let [hung, dying] = [host.volume("qcow2"), host.volume("qcow2")];
    let devices = [hung, dying].map(|id| host.attach(id));
    support::signal(host.exporter(hung) as u32, libc::SIGSTOP);
    let threads = PathBuf::from(format!("/proc/{}/task", host.daemon.pid()));
    let asks = |thread: fs::DirEntry| {
        fs::read_to_string(thread.path().join("stack")).is_ok_and(|stack| stack.contains("lo_ioctl"))
    };
    wait_until("somebody asks the hung device and gets no answer", || {
        fs::read_dir(&threads).expect("threads").any(|thread| asks(thread.expect("a thread")))
    });
    support::signal(host.exporter(dying) as u32, libc::SIGKILL);
    wait_until("the death of the other is told", || host.read(dying, "state") == "error");
    support::signal(host.exporter(hung) as u32, libc::SIGCONT);
    assert_eq!(host.device(hung), devices[0], "it is as it was");
    host.set(dying, "local_attach", "0");
    wait_until("what is left of it is gone", || host.read(dying, "local_attach") == "0");
    host.set(hung, "local_attach", "0");
    wait_until("it is detached", || host.read(hung, "state") == "available");
    assert!(host.loops().is_empty());
}

#[test]
fn after_a_restart_of_the_host_the_devices_are_there_again() {
    let mut host = Host::new();
    let ids = [host.volume("raw"), host.volume("qcow2")];
    for id in ids {
        let device = host.attach(id);
        shell(&format!("mkfs.ext4 -q -L restarted {}", device.display()));
    }
    host.daemon.kill();
    // What a restart takes away, and what it leaves.
    for device in host.loops() {
        shell(&format!("losetup -d {}", device.display()));
    }
    let exporter = host.exporter(ids[1]);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(exporter), nix::sys::signal::Signal::SIGTERM).expect("ended");
    wait_until("the exporter has ended", || {
        !fs::read_to_string(format!("/proc/{exporter}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
    });
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("a boot");
    let store = host.daemon.state_directory().join("instancefs.db");
    let command = format!(
        "sqlite3 {} \"update record set value = cast(replace(cast(value as text), '{}', 'another-boot') as blob) \
         where key like 'volumes/%'; select changes()\"",
        store.display(),
        boot.trim()
    );
    assert_eq!(shell(&command), "2");
    host.daemon.spawn();
    for id in ids {
        let device = host.device(id);
        assert_eq!(shell(&format!("blkid -p -s LABEL -o value {}", device.display())), "restarted");
    }
    for id in ids {
        host.set(id, "local_attach", "0");
        wait_until("it is detached", || host.read(id, "state") == "available");
    }
    assert!(host.loops().is_empty());
}

#[test]
fn a_device_that_somebody_takes_away_is_made_again() {
    let host = Host::new();
    for format in ["raw", "qcow2"] {
        let id = host.volume(format);
        let device = host.attach(id);
        shell(&format!("mkfs.ext4 -q -L {format} {}", device.display()));
        shell(&format!("losetup -d {}", device.display()));
        // Its name may be the same one.
        wait_until("it is there again", || {
            let device = host.read(id, "local_device");
            !device.is_empty() && host.loops().contains(&PathBuf::from(&device))
        });
        let device = host.device(id);
        assert_eq!(shell(&format!("blkid -p -s LABEL -o value {}", device.display())), format);
        host.set(id, "local_attach", "0");
        wait_until("it is detached", || host.read(id, "state") == "available");
        assert!(host.loops().is_empty());
    }
}

#[test]
fn the_example_makes_formats_mounts_and_takes_away_with_any_settle_window() {
    for options in [&[][..], &["--settle", "0s"]] {
        let host = Host { daemon: Daemon::start(options) };
        let program = Path::new(env!("CARGO_BIN_EXE_instancefs")).parent().expect("a directory");
        let path = format!("{}:{}", program.display(), std::env::var("PATH").expect("a path"));
        let output = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("mount-examples/local-attach"))
            .args(["int32bit-test-local-attach", "64M"])
            .arg(host.mountpoint())
            .env("INSTANCEFS", host.daemon.root())
            .env("PATH", path)
            .output()
            .expect("the example runs");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{options:?}: {said}{}", String::from_utf8_lossy(&output.stderr));
        assert!(said.contains("int32bit-test-local-attach is /dev/loop") && said.contains("lost+found"), "{said}");
        assert!(host.loops().is_empty());
    }
}

#[test]
fn without_the_program_that_exports_a_qcow2_volume_is_refused_with_what_to_install() {
    let mut host = Host::new();
    let id = host.volume("qcow2");
    host.daemon.stop();
    // All programs but that one.
    let programs = host.daemon.scratch().join("programs");
    fs::create_dir(&programs).expect("a directory");
    shell(&format!(
        "shopt -s nullglob; for d in ${{PATH//:/ }}; do set -- $d/*; [ $# = 0 ] || ln -sf -t {0} $*; done; \
         rm -f {0}/qemu-storage-daemon",
        programs.display()
    ));
    host.daemon.spawn_with(&[("PATH", programs.to_str().expect("text"))]);
    let (errno, reason) = host.refused(id, "local_attach", "1");
    assert_eq!(errno, libc::EOPNOTSUPP, "{reason}");
    assert!(reason.contains("qemu-storage-daemon") && reason.contains("install"), "{reason}");
    assert_eq!(host.read(id, "state"), "available");
}
