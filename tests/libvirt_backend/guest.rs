//! Guests of one boot sector: one prints `BOOT`, then a dot at each tick of the timer; another one lets go of devices.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use instancefs::hypervisor::Accelerator;
use instancefs::hypervisor::definition::{NewDomain, Profile};
use instancefs::model::network::Network;
use uuid::Uuid;

/// Runs in the namespace: `$1` is this program and `$2` the test.
///
/// `/dev/kvm` gets the permissions there that udev gives it. Without access to a device that exists, libvirt 9 probes
/// QEMU again before each call, since its probe has access and its check has not.
const START: &str = r#"
    if [ -e /dev/kvm ]; then
        node=$(mktemp -d)/kvm && mknod -m 660 "$node" c 10 232 && chgrp kvm "$node" \
            && mount --bind "$node" /dev/kvm && rm -r "${node%/*}" 2>/dev/null
    fi
    exec "$1" --exact "$2" --nocapture
"#;
const INSIDE: &str = "INSTANCEFS_TEST_INSIDE";

/// libvirt's embedded driver allows one root in a process, and no daemon's QEMU beside it. So such a test runs itself
/// again: false in the process that did this, when the other one has passed.
pub fn in_a_process_of_its_own(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", START, "sh"])
        .arg(std::env::current_exe().unwrap())
        .arg(test)
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    false
}

pub struct Guest {
    state: tempfile::TempDir,
    uuid: Uuid,
}

impl Guest {
    /// One that tells of itself, and hears nothing.
    pub fn new() -> Self {
        Self::of(boot_sector())
    }

    /// One that lets go of each PCI device as soon as it is asked to.
    pub fn that_lets_go() -> Self {
        Self::of(letting_go())
    }

    /// Makes a state directory that QEMU's user may pass through, and a disk in it.
    fn of(boot_sector: [u8; 512]) -> Self {
        let state = tempfile::tempdir().unwrap();
        fs::set_permissions(state.path(), fs::Permissions::from_mode(0o711)).unwrap();
        let guest = Self { state, uuid: Uuid::new_v4() };
        let raw = guest.state().join("disk.raw");
        let mut disk = boot_sector.to_vec();
        disk.resize(1 << 20, 0);
        fs::write(&raw, disk).unwrap();
        let converted = Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", "qcow2"])
            .arg(&raw)
            .arg(guest.disk())
            .status()
            .unwrap();
        assert!(converted.success());
        guest
    }

    pub fn state(&self) -> &Path {
        self.state.path()
    }

    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    pub fn disk(&self) -> PathBuf {
        self.state().join("disk.qcow2")
    }

    pub fn definition(&self, name: &str, profile: &Profile) -> String {
        NewDomain {
            uuid: self.uuid,
            name: name.to_owned(),
            description: String::new(),
            vcpus: 1,
            memory_bytes: 32 << 20,
            network: Network::None,
            root_disk: Some(self.disk()),
            volumes: Vec::new(),
            image: None,
            seed: None,
            console_log: self.console_log(),
            accelerator: Accelerator::Tcg,
            metadata: String::new(),
        }
        .to_xml(profile)
    }

    fn console_log(&self) -> PathBuf {
        self.state().join("console.log")
    }

    fn console(&self) -> String {
        fs::read(self.console_log()).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// How often it has booted.
    pub fn boots(&self) -> usize {
        self.console().matches("BOOT").count()
    }

    /// How often its timer has ticked.
    pub fn ticks(&self) -> usize {
        self.console().matches('.').count()
    }

    /// The files that its QEMU has open.
    pub fn open_files(&self) -> Vec<PathBuf> {
        let descriptors = fs::read_dir(process_with_argument(&self.uuid.to_string()).join("fd")).unwrap();
        descriptors.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok()).collect()
    }

    /// Its QEMU is no root process, has a seccomp filter, and owns its disk.
    pub fn prove_it_is_confined(&self, uuid: Uuid) {
        let process = process_with_argument(&uuid.to_string());
        let owner = fs::metadata(&process).unwrap().uid();
        assert_ne!(owner, 0);
        assert_eq!(fs::metadata(self.disk()).unwrap().uid(), owner);
        let status = fs::read_to_string(process.join("status")).unwrap();
        assert!(status.contains("Seccomp:\t2"), "{status}");
    }
}

impl Drop for Guest {
    /// A test that failed half-way leaves no QEMU behind.
    fn drop(&mut self) {
        if let Some(process) = find_process(&self.uuid.to_string()) {
            let pid = process.file_name().unwrap().to_str().unwrap();
            let pid = nix::unistd::Pid::from_raw(pid.parse().unwrap());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
    }
}

fn process_with_argument(text: &str) -> PathBuf {
    find_process(text).expect("the guest's process")
}

fn find_process(argument: &str) -> Option<PathBuf> {
    fs::read_dir("/proc").ok()?.filter_map(|entry| Some(entry.ok()?.path())).find(|process| {
        fs::read(process.join("cmdline")).is_ok_and(|line| {
            let line = String::from_utf8_lossy(&line).into_owned();
            line.contains("qemu-system") && line.contains(argument)
        })
    })
}

fn boot_sector() -> [u8; 512] {
    let code = [
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0xfc, // cld
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xbe, 0x1a, 0x7c, // mov si, text
        // next:
        0xac, // lodsb
        0x84, 0xc0, // test al, al
        0x74, 0x03, // jz tick
        0xee, // out dx, al
        0xeb, 0xf8, // jmp next
        // tick:
        0xfb, // sti
        0xf4, // hlt
        0xb0, b'.', // mov al, '.'
        0xee, // out dx, al
        0xeb, 0xf9, // jmp tick
    ];
    let text = b"\nBOOT\n\0";
    assert_eq!(code.len(), 0x1a);
    bootable(&[&code[..], text].concat())
}

/// The registers are those of the machine type `pc`: docs/specs/acpi_pci_hotplug in QEMU.
fn letting_go() -> [u8; 512] {
    bootable(&[
        0xfa, // cli
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0xb0, 0x34, // mov al, 0x34: the timer's channel 0, as a rate of
        0xe6, 0x43, // out 0x43, al
        0xb0, 0xe8, // mov al, 0xe8: 1193182 Hz / 1000
        0xe6, 0x40, // out 0x40, al
        0xb0, 0x03, // mov al, 0x03
        0xe6, 0x40, // out 0x40, al
        // tick:
        0xfb, // sti
        0xf4, // hlt
        0xba, 0x10, 0xae, // mov dx, 0xae10: the bus, 0
        0x66, 0x31, 0xc0, // xor eax, eax
        0x66, 0xef, // out dx, eax
        0xba, 0x04, 0xae, // mov dx, 0xae04: the slots that are to be let go
        0x66, 0xed, // in eax, dx
        0x66, 0x85, 0xc0, // test eax, eax
        0x74, 0xec, // jz tick
        0xba, 0x08, 0xae, // mov dx, 0xae08: eject
        0x66, 0xef, // out dx, eax
        0xeb, 0xe5, // jmp tick
    ])
}

fn bootable(code: &[u8]) -> [u8; 512] {
    let mut sector = [0; 512];
    sector[..code.len()].copy_from_slice(code);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}
