//! Disks that come, grow and go while a guest runs: a libvirtd of our own and guests under emulation.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use instancefs::hypervisor::definition::{AttachedDisk, Definition};
use instancefs::hypervisor::libvirt::Target;
use instancefs::hypervisor::{Event, Hypervisor, HypervisorError, Places};
use instancefs::image::Format;
use instancefs::model::domain::DiskSource;
use uuid::Uuid;

use super::daemon::Daemon;
use super::guest::Guest;
use super::{connect, wait_for_event, wait_until};

const MIB: u64 = 1 << 20;
const BOTH: Places = Places { persistent: true, live: true };
const PERSISTENT: Places = Places { persistent: true, live: false };
const LIVE: Places = Places { persistent: false, live: true };

/// A host, with a file that is to be a disk.
struct Host {
    // Before the daemon, which has to be there as long as it is connected.
    hypervisor: Arc<dyn Hypervisor>,
    events: Receiver<Event>,
    daemon: Daemon,
}

impl Host {
    fn new() -> Host {
        let daemon = Daemon::start();
        let target = Target::parse(&daemon.socket(), daemon.directory()).unwrap();
        let (hypervisor, events) = connect(&target, daemon.directory());
        Host { hypervisor, events, daemon }
    }

    /// Defines and starts a guest.
    fn run(&self, guest: &Guest) {
        let name = guest.uuid().to_string();
        self.hypervisor.define(&guest.definition(&name, &self.hypervisor.definition_profile())).unwrap();
        self.hypervisor.start(guest.uuid()).unwrap();
    }

    /// An empty disk of 8 MiB, in a file of its own.
    fn disk(&self, device: &str) -> AttachedDisk {
        let path = self.daemon.directory().join(format!("{device}.raw"));
        File::create(&path).and_then(|file| file.set_len(8 * MIB)).unwrap();
        AttachedDisk {
            source: DiskSource::File(path),
            format: Format::Raw,
            device: device.to_owned(),
            volume: Uuid::new_v4(),
            is_shared: false,
            boots: false,
        }
    }

    /// As which device a disk is in the definition, and in the guest.
    fn found(&self, guest: &Guest, disk: &AttachedDisk) -> (Option<String>, Option<String>) {
        let device = |xml: String| {
            let disks = Definition::parse(&xml).unwrap().disks;
            disks.into_iter().find(|found| found.path.as_deref() == Some(path(disk))).map(|found| found.device)
        };
        let live = self.hypervisor.live_definition(guest.uuid()).unwrap();
        (device(self.hypervisor.definition(guest.uuid()).unwrap()), live.and_then(device))
    }

    fn detach_live(&self, guest: &Guest, device: &str) {
        self.hypervisor.detach_disk(guest.uuid(), device, LIVE).unwrap();
        wait_for_event(&self.events, |event| *event == Event::DeviceRemoved(guest.uuid()));
    }
}

fn path(disk: &AttachedDisk) -> &Path {
    match &disk.source {
        DiskSource::File(path) | DiskSource::Block(path) => path,
    }
}

fn some(device: &str) -> Option<String> {
    Some(device.to_owned())
}

fn has_open(guest: &Guest, disk: &AttachedDisk) -> bool {
    guest.open_files().iter().any(|file| file == path(disk))
}

#[test]
fn a_disk_comes_grows_and_goes_while_the_guest_runs() {
    let host = Host::new();
    let guest = Guest::that_lets_go();
    host.run(&guest);
    let (uuid, disk) = (guest.uuid(), host.disk("vdb"));
    assert_eq!(host.found(&guest, &disk), (None, None));

    host.hypervisor.attach_disk(uuid, &disk, BOTH).unwrap();
    assert_eq!(host.found(&guest, &disk), (some("vdb"), some("vdb")));
    assert!(has_open(&guest, &disk));
    let live = host.hypervisor.live_definition(uuid).unwrap().unwrap();
    let serial: String = disk.volume.to_string().chars().take(20).collect();
    assert!(live.contains(&format!("<serial>{serial}</serial>")), "{live}");
    assert!(host.hypervisor.attach_disk(uuid, &disk, BOTH).is_err(), "twice");

    let size = || fs::metadata(path(&disk)).unwrap().len();
    host.hypervisor.resize_disk(uuid, "vdb", 24 * MIB).unwrap();
    assert_eq!(size(), 24 * MIB);
    host.hypervisor.resize_disk(uuid, "vdb", 8 * MIB).unwrap();
    assert_eq!(size(), 24 * MIB, "it became smaller");

    host.detach_live(&guest, "vdb");
    assert_eq!(host.found(&guest, &disk), (some("vdb"), None));
    assert!(!has_open(&guest, &disk));
    assert!(host.hypervisor.resize_disk(uuid, "vdb", 32 * MIB).is_err());
    assert!(matches!(host.hypervisor.detach_disk(uuid, "vdb", LIVE), Err(HypervisorError::Failed(_))), "twice");
    host.hypervisor.detach_disk(uuid, "vdb", PERSISTENT).unwrap();
    assert_eq!(host.found(&guest, &disk), (None, None));
    assert_eq!(size(), 24 * MIB, "the file is left alone");
    host.hypervisor.power_off(uuid).unwrap();
    host.hypervisor.undefine(uuid).unwrap();
}

#[test]
fn a_guest_that_hears_nothing_keeps_its_disk_until_it_ends() {
    let host = Host::new();
    let guest = Guest::new();
    host.run(&guest);
    wait_until("the guest boots", || guest.boots() == 1);
    let (uuid, disk) = (guest.uuid(), host.disk("vdb"));
    host.hypervisor.attach_disk(uuid, &disk, LIVE).unwrap();
    assert_eq!(host.found(&guest, &disk), (None, some("vdb")));

    host.hypervisor.detach_disk(uuid, "vdb", LIVE).unwrap();
    assert_eq!(host.found(&guest, &disk), (None, some("vdb")));
    assert!(has_open(&guest, &disk));
    assert!(!host.events.try_iter().any(|event| event == Event::DeviceRemoved(uuid)));

    host.hypervisor.power_off(uuid).unwrap();
    assert_eq!(host.found(&guest, &disk), (None, None));
    assert_eq!(host.hypervisor.live_definition(uuid), Ok(None));
    host.hypervisor.undefine(uuid).unwrap();
}

#[test]
fn a_domain_that_is_off_has_disks_in_its_definition_alone() {
    let host = Host::new();
    let guest = Guest::new();
    let (uuid, disk) = (guest.uuid(), host.disk("vdb"));
    host.hypervisor.define(&guest.definition("off", &host.hypervisor.definition_profile())).unwrap();
    let live = host.hypervisor.attach_disk(uuid, &disk, BOTH);
    assert!(matches!(live, Err(HypervisorError::InvalidState(_))), "{live:?}");
    assert_eq!(host.found(&guest, &disk), (None, None));
    host.hypervisor.attach_disk(uuid, &disk, PERSISTENT).unwrap();
    assert_eq!(host.found(&guest, &disk), (some("vdb"), None));
    let live = host.hypervisor.detach_disk(uuid, "vdb", LIVE);
    assert!(matches!(live, Err(HypervisorError::InvalidState(_))), "{live:?}");
    assert_eq!(host.found(&guest, &disk), (some("vdb"), None));
    host.hypervisor.detach_disk(uuid, "vdb", PERSISTENT).unwrap();
    assert_eq!(host.found(&guest, &disk), (None, None));
    host.hypervisor.undefine(uuid).unwrap();
}

#[test]
fn a_disk_of_two_guests_leaves_one_of_them_and_the_other_keeps_it() {
    let host = Host::new();
    let guests = [Guest::that_lets_go(), Guest::that_lets_go()];
    let disk = AttachedDisk { is_shared: true, ..host.disk("vdb") };
    for guest in &guests {
        host.run(guest);
        host.hypervisor.attach_disk(guest.uuid(), &disk, BOTH).unwrap();
        assert!(has_open(guest, &disk));
    }
    host.detach_live(&guests[0], "vdb");
    assert!(!has_open(&guests[0], &disk) && has_open(&guests[1], &disk));
    assert_eq!(host.found(&guests[1], &disk), (some("vdb"), some("vdb")));

    let alone = AttachedDisk { is_shared: false, ..disk.clone() };
    let refused = host.hypervisor.attach_disk(guests[0].uuid(), &alone, LIVE);
    assert!(refused.is_err(), "QEMU's locks let a second one write");
    assert!(!has_open(&guests[0], &disk));
    for guest in &guests {
        host.hypervisor.power_off(guest.uuid()).unwrap();
        host.hypervisor.undefine(guest.uuid()).unwrap();
    }
}
