//! Block devices of this host, made of files: real loop devices and a real qemu-storage-daemon.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use instancefs::block::local::{HostDevices, LocalData, LocalDevices, LocalError};
use instancefs::image::Format;
use instancefs::model::volume::record::{Exporter, LocalAttachment};
use instancefs::privilege::Privilege;
use tempfile::TempDir;
use uuid::Uuid;

const MIB: u64 = 1 << 20;

/// A volume's file, and what was made of it, which is gone at the end.
struct Bed {
    directory: TempDir,
    host: HostDevices,
    volume: Uuid,
    format: Format,
    file: File,
    local: Option<LocalAttachment>,
}

impl Bed {
    fn new(format: Format) -> Bed {
        let directory = TempDir::new().expect("a directory");
        let path = directory.path().join("data");
        let status =
            Command::new("qemu-img").args(["create", "-q", "-f", format.word()]).arg(&path).arg("64M").status();
        assert!(status.expect("qemu-img runs").success());
        let host = HostDevices::new(directory.path().join("exports"), Privilege::of_this_process());
        let file = OpenOptions::new().read(true).write(true).open(path).expect("opened");
        Bed { file, directory, host, volume: Uuid::new_v4(), format, local: None }
    }

    fn data(&self) -> LocalData<'_> {
        LocalData { volume: self.volume, file: &self.file, format: self.format }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    fn attach(&mut self) -> PathBuf {
        let exporter = match self.format {
            Format::Raw => None,
            Format::Qcow2 => Some(self.host.export(&self.data()).expect("exported")),
        };
        let made = self.host.attach(&self.data(), exporter.as_ref()).expect("attached");
        self.local = Some(LocalAttachment {
            device: Some(made.device.clone()),
            boot_id: String::new(),
            exporter,
            backing: Some(made.backing),
        });
        made.device
    }

    fn local(&self) -> &LocalAttachment {
        self.local.as_ref().expect("attached")
    }

    fn exporter(&self) -> Exporter {
        self.local().exporter.clone().expect("exported")
    }

    fn detach(&mut self) {
        self.host.detach(self.volume, self.local()).expect("detached");
        self.host.end_export(self.volume).expect("ended");
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if let Some(local) = &self.local {
            let detached = self.host.detach(self.volume, local);
            let ended = self.host.end_export(self.volume);
            if !std::thread::panicking() {
                detached.expect("detached");
                ended.expect("ended");
            }
        }
    }
}

fn write_at(path: &Path, offset: u64, text: &str) {
    let mut file = OpenOptions::new().write(true).open(path).expect("opened");
    file.seek(SeekFrom::Start(offset)).expect("seeks");
    file.write_all(text.as_bytes()).expect("written");
    file.sync_all().expect("durable");
}

fn read_at(path: &Path, offset: u64, length: usize) -> String {
    let mut file = File::open(path).expect("opened");
    file.seek(SeekFrom::Start(offset)).expect("seeks");
    let mut bytes = vec![0; length];
    file.read_exact(&mut bytes).expect("read");
    String::from_utf8_lossy(&bytes).into_owned()
}

fn size(device: &Path) -> u64 {
    File::open(device).expect("opened").seek(SeekFrom::End(0)).expect("seeks")
}

fn words(result: Result<(), LocalError>) -> String {
    match result {
        Err(LocalError::InUse(words)) => words,
        other => panic!("not in use: {other:?}"),
    }
}

fn process_exists(exporter: &Exporter) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", exporter.pid)).unwrap_or_default();
    stat.contains("qemu-storage-da") && !stat.contains(") Z ")
}

#[test]
fn what_is_written_to_a_raw_volumes_device_is_in_its_file() {
    let mut bed = Bed::new(Format::Raw);
    let device = bed.attach();
    assert_eq!(size(&device), 64 * MIB);
    write_at(&device, 5 * MIB, "a raw word");
    bed.detach();
    assert_eq!(read_at(&bed.path(), 5 * MIB, 10), "a raw word");
    assert!(!bed.host.is_there(bed.volume, bed.local()).expect("looked"));
}

#[test]
fn a_device_or_exporter_that_is_there_is_found_and_not_made_twice() {
    for format in [Format::Raw, Format::Qcow2] {
        let mut bed = Bed::new(format);
        let first = bed.attach();
        let before = bed.local().clone();
        let again = HostDevices::new(bed.directory.path().join("exports"), Privilege::of_this_process());
        assert_eq!(again.exporter(bed.volume).expect("looked"), before.exporter);
        assert_eq!(bed.attach(), first);
        assert_eq!(*bed.local(), before);
        bed.detach();
        assert_eq!(again.exporter(bed.volume).expect("looked"), None);
    }
}

#[test]
fn a_qcow2_volume_grows_while_it_is_a_device_and_is_sound_afterwards() {
    let mut bed = Bed::new(Format::Qcow2);
    let device = bed.attach();
    let exporter = bed.exporter();
    write_at(&device, 7 * MIB, "a word");
    bed.host.grow(bed.volume, bed.local(), 96 * MIB).expect("grown");
    assert_eq!(size(&device), 96 * MIB);
    write_at(&device, 90 * MIB, "beyond");
    bed.detach();
    assert!(!process_exists(&exporter), "it goes on");
    assert!(!bed.directory.path().join("exports").join(bed.volume.to_string()).exists());
    let check = Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(bed.path()).status();
    assert!(check.expect("qemu-img runs").success());
    let raw = bed.directory.path().join("raw");
    let convert =
        Command::new("qemu-img").args(["convert", "-f", "qcow2", "-O", "raw"]).arg(bed.path()).arg(&raw).status();
    assert!(convert.expect("qemu-img runs").success());
    assert_eq!(fs::metadata(&raw).expect("converted").len(), 96 * MIB);
    assert_eq!((read_at(&raw, 7 * MIB, 6), read_at(&raw, 90 * MIB, 6)), ("a word".to_owned(), "beyond".to_owned()));
}

#[test]
fn many_large_writes_at_once_to_a_qcow2_volume_are_all_in_its_file() {
    let mut bed = Bed::new(Format::Qcow2);
    let device = bed.attach();
    // What QEMU's export mixes up if it gets it at once: more than it takes in one request.
    let piece =
        |number: u8| -> Vec<u8> { (0..4 * MIB).map(|at| (at / 512) as u8 ^ (at / MIB) as u8 ^ number).collect() };
    std::thread::scope(|scope| {
        for number in 0..8u8 {
            let device = &device;
            scope.spawn(move || {
                let flags = libc::O_DIRECT;
                let mut file = OpenOptions::new().write(true).custom_flags(flags).open(device).expect("opened");
                file.seek(SeekFrom::Start(u64::from(number) * 4 * MIB)).expect("seeks");
                let bytes = piece(number);
                // Memory that a direct write takes begins at a page.
                let mut memory = vec![0; bytes.len() + 4096];
                let begin = memory.as_ptr().align_offset(4096);
                memory[begin..begin + bytes.len()].copy_from_slice(&bytes);
                file.write_all(&memory[begin..begin + bytes.len()]).expect("written");
            });
        }
    });
    bed.detach();
    let raw = bed.directory.path().join("raw");
    let convert =
        Command::new("qemu-img").args(["convert", "-f", "qcow2", "-O", "raw"]).arg(bed.path()).arg(&raw).status();
    assert!(convert.expect("qemu-img runs").success());
    let found = fs::read(&raw).expect("read");
    for number in 0..8u8 {
        let begin = usize::from(number) * 4 * MIB as usize;
        assert!(found[begin..begin + 4 * MIB as usize] == piece(number), "piece {number} is not what was written");
    }
}

#[test]
fn a_raw_volume_grows_while_it_is_a_device() {
    let mut bed = Bed::new(Format::Raw);
    let device = bed.attach();
    OpenOptions::new().write(true).open(bed.path()).expect("opened").set_len(80 * MIB).expect("longer");
    bed.host.grow(bed.volume, bed.local(), 80 * MIB).expect("grown");
    assert_eq!(size(&device), 80 * MIB);
}

#[test]
fn whoever_uses_a_device_keeps_it_and_is_named() {
    let mut bed = Bed::new(Format::Raw);
    let device = bed.attach();
    let shown = device.display().to_string();

    let file = File::open(&device).expect("opened");
    let mut child = Command::new("sleep").arg("600").stdin(file).spawn().expect("sleeps");
    let said = words(bed.host.detach(bed.volume, bed.local()));
    child.kill().expect("killed");
    child.wait().expect("reaped");
    assert!(said.contains(&format!("the process {} (sleep)", child.id())) && said.contains(&shown), "{said}");

    // The kernel counts a loop device above another one neither as a holder nor as exclusive.
    let above = HostDevices::new(bed.directory.path().join("other"), Privilege::of_this_process());
    let output = Command::new("losetup").args(["-f", "--show"]).arg(&device).output().expect("losetup runs");
    let upper = String::from_utf8(output.stdout).expect("text").trim().to_owned();
    let said = words(above.detach(bed.volume, bed.local()));
    assert!(Command::new("losetup").args(["-d", &upper]).status().expect("losetup runs").success());
    assert!(said.contains(&format!("is behind {upper}")), "{said}");

    let exclusive = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(&device).expect("opened");
    let said = words(bed.host.detach(bed.volume, bed.local()));
    drop(exclusive);
    assert!(said.contains("cannot be looked at"), "{said}");

    bed.detach();
}

#[test]
fn another_device_of_the_same_file_is_left_alone() {
    let mut bed = Bed::new(Format::Raw);
    let output = Command::new("losetup").args(["-f", "--show"]).arg(bed.path()).output().expect("losetup runs");
    let others = String::from_utf8(output.stdout).expect("text").trim().to_owned();
    let found = bed.host.find(&bed.data(), None);
    let device = bed.attach();
    let backing = bed.local().backing;
    let claimed = LocalAttachment { device: Some(PathBuf::from(&others)), ..bed.local().clone() };
    let detached = bed.host.detach(bed.volume, &claimed);
    let is_left = fs::read_to_string(format!("/sys/block/{}/loop/backing_file", &others[5..]));
    assert!(Command::new("losetup").args(["-d", &others]).status().expect("losetup runs").success());
    assert_eq!(found.expect("looked"), None, "what somebody else made is not ours");
    assert_ne!(device, PathBuf::from(&others));
    assert!(backing.is_some());
    detached.expect("what is not ours needs no detaching");
    assert!(is_left.expect("it is still there").contains("data"));
    bed.detach();
}

#[test]
fn the_file_that_was_opened_is_the_device_whatever_lies_in_its_place_by_now() {
    for format in [Format::Raw, Format::Qcow2] {
        let mut bed = Bed::new(format);
        let aside = bed.directory.path().join("aside");
        fs::rename(bed.path(), &aside).expect("moved");
        fs::write(bed.path(), "another").expect("written");
        let device = bed.attach();
        write_at(&device, 0, "someword");
        bed.detach();
        assert_eq!(fs::read_to_string(bed.path()).expect("read"), "another");
        let output = Command::new("qemu-io").args(["-f", format.word(), "-c", "read -v 0 16"]).arg(&aside).output();
        assert!(String::from_utf8_lossy(&output.expect("qemu-io runs").stdout).contains("someword"), "{format:?}");
    }
}

#[test]
fn damaged_qcow2_data_is_refused_before_anything_runs() {
    let bed = Bed::new(Format::Qcow2);
    let io = Command::new("qemu-io").args(["-f", "qcow2", "-c", "write 0 1M"]).arg(bed.path()).output();
    assert!(io.expect("qemu-io runs").status.success());
    // The first entry of the first table of references, which qemu-img makes at this place.
    let mut file = OpenOptions::new().write(true).open(bed.path()).expect("opened");
    file.seek(SeekFrom::Start(0x20000)).expect("seeks");
    file.write_all(&[0; 4096]).expect("written");
    drop(file);
    let refused = bed.host.export(&bed.data());
    bed.host.end_export(bed.volume).expect("nothing is left");
    assert!(matches!(refused, Err(LocalError::Damaged(_))), "{refused:?}");
}

#[test]
fn an_exporter_has_no_other_rights_than_to_mount_and_to_open_no_network_and_one_file() {
    let mut bed = Bed::new(Format::Qcow2);
    bed.attach();
    let pid = bed.exporter().pid;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    // CAP_DAC_OVERRIDE and CAP_SYS_ADMIN.
    assert!(
        status.contains("CapEff:\t0000000000200002\n") && status.contains("CapBnd:\t0000000000200002\n"),
        "{status}"
    );
    assert!(status.contains("NoNewPrivs:\t1\n"), "{status}");
    let namespace = |of: &str| fs::read_link(format!("/proc/{of}/ns/net")).expect("a namespace");
    assert_ne!(namespace(&pid.to_string()), namespace("self"));
    let open = fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors").filter_map(Result::ok);
    let files: Vec<_> = open.filter_map(|entry| fs::read_link(entry.path()).ok()).collect();
    let ours = bed.directory.path();
    let foreign: Vec<_> = files
        .iter()
        .filter(|file| !file.starts_with(ours) && !file.starts_with("/dev") && file.starts_with("/"))
        .filter(|file| !file.to_string_lossy().starts_with("/proc"))
        .collect();
    assert!(foreign.is_empty(), "{foreign:?}");
    bed.detach();
}

#[test]
fn a_device_is_read_from_its_exporter_in_requests_larger_than_the_kernels_usual_ones() {
    let mut bed = Bed::new(Format::Qcow2);
    let device = bed.attach();
    let exporter = bed.exporter();
    let reads = || -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/io", exporter.pid)).expect("it runs");
        let count = text.lines().find_map(|line| line.strip_prefix("syscr: ")).expect("a count of reads");
        count.parse().expect("a number")
    };
    let before = reads();
    assert_eq!(fs::read(&device).expect("read").len() as u64, 64 * MIB);
    let taken = reads() - before;
    // Nothing is allocated in it, so that each request is one read: of its words.
    assert!(taken < 64 * MIB / (128 << 10), "{taken} requests for 64 MiB");
    bed.detach();
}

#[test]
fn what_a_killed_exporter_leaves_is_cleared_away_when_nobody_has_it_mounted() {
    let mut bed = Bed::new(Format::Qcow2);
    let device = bed.attach();
    let exporter = bed.exporter();
    let mountpoint = bed.directory.path().join("mnt");
    fs::create_dir(&mountpoint).expect("a directory");
    let run = |program: &str, arguments: &[&Path]| {
        let output = Command::new(program).args(arguments).output().expect("it runs");
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    };
    run("mkfs.ext4", &[&device]);
    run("mount", &[&device, &mountpoint]);
    let watch = bed.host.watch(&exporter).expect("watched").expect("it lives");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(exporter.pid), nix::sys::signal::Signal::SIGKILL)
        .expect("killed");
    let mut polled = [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(&watch), nix::poll::PollFlags::POLLIN)];
    assert_eq!(nix::poll::poll(&mut polled, 30_000u16), Ok(1), "its end is not heard");
    assert!(bed.host.watch(&exporter).expect("asked").is_none());
    let refused = bed.host.detach(bed.volume, bed.local());
    nix::mount::umount2(&mountpoint, nix::mount::MntFlags::empty()).expect("unmounted");
    assert!(words(refused).contains("is mounted on"));
    bed.detach();
    assert!(!bed.directory.path().join("exports").join(bed.volume.to_string()).exists());
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    assert!(!mounts.contains(bed.directory.path().to_str().expect("text")), "a mount is left");
    let device = bed.attach();
    assert_eq!(size(&device), 64 * MIB);
    bed.detach();
}
