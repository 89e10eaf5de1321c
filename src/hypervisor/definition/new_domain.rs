//! The XML of a new guest, one function for each kind of device.

use std::path::{Path, PathBuf};

use openssl::sha::sha256;
use uuid::Uuid;

use super::{AttachedDisk, Profile, escape};
use crate::hypervisor::Accelerator;
use crate::model::image::Format;
use crate::model::network::Network;

/// The target of the seed, which says its order on the bus: behind all disks that are attached later.
const SEED_TARGET: &str = "vdz";

/// The file below a copy-on-write disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingImage {
    /// Absolute.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
}

/// A new guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewDomain {
    /// The instance's UUID.
    pub uuid: Uuid,
    /// The domain's name.
    pub name: String,
    /// The description, empty for none.
    pub description: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// What its network card is connected to.
    pub network: Network,
    /// The root disk (qcow2), absolute; `None` where one of the volumes is it, or there is none.
    pub root_disk: Option<PathBuf>,
    /// The image below the root disk. libvirt is told to leave its owner alone: a guest's QEMU must never own what other
    /// guests run on.
    pub image: Option<BackingImage>,
    /// The volumes that it has, in the order of their devices.
    pub volumes: Vec<AttachedDisk>,
    /// The NoCloud seed (raw), absolute.
    pub seed: Option<PathBuf>,
    /// Where the serial console is logged, absolute.
    pub console_log: PathBuf,
    /// What it runs on.
    pub accelerator: Accelerator,
    /// Our metadata element, complete and well-formed, or empty.
    pub metadata: String,
}

impl NewDomain {
    /// The domain's XML: a BIOS guest that boots from one virtio disk, with a logged serial console, a channel for the
    /// guest agent, at most one virtio network card, the host's randomness, and a screen that listens nowhere and is
    /// reached through libvirt alone.
    ///
    /// Paths have to be UTF-8 (libvirt knows no others); characters that XML cannot hold are left out.
    pub fn to_xml(&self, profile: &Profile) -> String {
        let (kind, cpu) = match self.accelerator {
            Accelerator::Kvm => ("kvm", "  <cpu mode='host-model' check='partial'/>\n"),
            Accelerator::Tcg => ("qemu", ""),
        };
        let optional = |text: &str, name: &str, content: String| {
            if text.is_empty() { String::new() } else { format!("  <{name}>{content}</{name}>\n") }
        };
        format!(
            "<domain type='{kind}'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
{description}{metadata}  <memory unit='KiB'>{memory}</memory>
  <vcpu>{vcpus}</vcpu>
  <os>
    <type arch='{architecture}' machine='{machine}'>hvm</type>
  </os>
  <features><acpi/></features>
{cpu}  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>{emulator}</emulator>
{root_disk}{volumes}{seed}{network}{console}{agent}    <graphics type='vnc'>
      <listen type='none'/>
    </graphics>
    <video>
      <model type='{video}'/>
    </video>
    <controller type='usb' model='none'/>
    <rng model='virtio'>
      <backend model='random'>/dev/urandom</backend>
    </rng>
    <memballoon model='virtio'/>
  </devices>
</domain>
",
            name = escape(&self.name),
            uuid = self.uuid,
            description = optional(&self.description, "description", escape(&self.description)),
            metadata = optional(&self.metadata, "metadata", self.metadata.clone()),
            memory = self.memory_bytes.div_ceil(1024),
            vcpus = self.vcpus,
            architecture = escape(&profile.architecture),
            machine = escape(&profile.machine),
            emulator = text(&profile.emulator),
            root_disk = self.root_disk(),
            volumes = self.volumes.iter().map(AttachedDisk::to_xml).collect::<String>(),
            seed = self.seed(),
            network = self.network(),
            console = self.console(),
            agent = self.agent(profile),
            // What its firmware and every system can draw on; other machines have no VGA.
            video = if profile.architecture == "x86_64" { "vga" } else { "virtio" },
        )
    }

    fn root_disk(&self) -> String {
        let Some(root_disk) = &self.root_disk else { return String::new() };
        let image = self.image.as_ref().map_or_else(String::new, |image| {
            format!(
                "      <backingStore type='file'>
        <format type='{}'/>
        <source file='{}'>
          <seclabel model='dac' relabel='no'/>
        </source>
        <backingStore/>
      </backingStore>
",
                image.format.word(),
                text(&image.path)
            )
        });
        format!(
            "    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='{}'/>
{image}      <target dev='vda' bus='virtio'/>
      <boot order='1'/>
    </disk>
",
            text(root_disk)
        )
    }

    /// A virtio disk and no CD: every kernel of a cloud image has the driver that it boots with, not every one has those
    /// of IDE and SATA, and cloud-init goes by the label of whatever block device it finds.
    fn seed(&self) -> String {
        self.seed.as_ref().map_or_else(String::new, |seed| {
            format!(
                "    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='{}'/>
      <target dev='{SEED_TARGET}' bus='virtio'/>
      <readonly/>
      <serial>cidata</serial>
    </disk>
",
                text(seed)
            )
        })
    }

    fn network(&self) -> String {
        let (kind, source) = match &self.network {
            Network::None => return String::new(),
            Network::User => ("user", String::new()),
            Network::Bridge(name) => ("bridge", format!("      <source bridge='{}'/>\n", escape(name))),
            Network::Libvirt(name) => ("network", format!("      <source network='{}'/>\n", escape(name))),
        };
        format!(
            "    <interface type='{kind}'>
      <mac address='{}'/>
{source}      <model type='virtio'/>
    </interface>
",
            mac_address(self.uuid)
        )
    }

    fn console(&self) -> String {
        format!(
            "    <serial type='pty'>
      <log file='{}' append='on'/>
      <target port='0'/>
    </serial>
    <console type='pty'>
      <target type='serial' port='0'/>
    </console>
",
            text(&self.console_log)
        )
    }

    fn agent(&self, profile: &Profile) -> String {
        let source = profile.agent_sockets.as_ref().map_or_else(String::new, |directory| {
            format!("\n      <source mode='bind' path='{}'/>", text(&directory.join(self.uuid.to_string())))
        });
        format!(
            "    <channel type='unix'>{source}
      <target type='virtio' name='org.qemu.guest_agent.0'/>
    </channel>
"
        )
    }
}

/// The hardware address of an instance's network card: in QEMU's own range, and the same whenever the instance is made
/// again. Of the whole UUID, since those of one machine may differ in few bytes.
pub fn mac_address(uuid: Uuid) -> String {
    let digest = sha256(uuid.as_bytes());
    format!("52:54:00:{:02x}:{:02x}:{:02x}", digest[0], digest[1], digest[2])
}

fn text(path: &Path) -> String {
    escape(&path.to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::super::{DefinedDisk, Definition, METADATA_NAMESPACE};
    use super::*;

    fn profile() -> Profile {
        Profile {
            emulator: PathBuf::from("/usr/bin/qemu-system-x86_64"),
            architecture: "x86_64".to_owned(),
            machine: "pc".to_owned(),
            agent_sockets: None,
        }
    }

    fn new_domain() -> NewDomain {
        NewDomain {
            uuid: Uuid::from_u128(1),
            name: "web".to_owned(),
            description: "the web".to_owned(),
            vcpus: 2,
            memory_bytes: 128 << 20,
            network: Network::User,
            root_disk: Some(PathBuf::from("/d/root.qcow2")),
            image: Some(BackingImage { path: PathBuf::from("/i/data"), format: Format::Qcow2 }),
            volumes: Vec::new(),
            seed: None,
            console_log: PathBuf::from("/d/console.log"),
            accelerator: Accelerator::Tcg,
            metadata: format!("<instance xmlns='{METADATA_NAMESPACE}'/>"),
        }
    }

    #[test]
    fn what_is_written_reads_back_as_the_same() {
        let definition = Definition::parse(&new_domain().to_xml(&profile())).unwrap();
        assert_eq!(
            definition,
            Definition {
                vcpus: Some(2),
                memory_bytes: Some(128 << 20),
                description: Some("the web".to_owned()),
                network: Some(Network::User),
                disks: vec![DefinedDisk {
                    device: "vda".to_owned(),
                    path: Some(PathBuf::from("/d/root.qcow2")),
                    format: Some("qcow2".to_owned()),
                    read_only: false,
                }],
                console_log: Some(PathBuf::from("/d/console.log")),
                has_serial: true,
                has_vnc: true,
            }
        );
    }

    #[test]
    fn the_accelerator_decides_type_and_cpu() {
        let emulated = new_domain().to_xml(&profile());
        assert!(emulated.contains("type='qemu'") && !emulated.contains("<cpu"));
        let accelerated = NewDomain { accelerator: Accelerator::Kvm, ..new_domain() }.to_xml(&profile());
        assert!(accelerated.contains("type='kvm'") && accelerated.contains("<cpu mode="));
    }

    #[test]
    fn the_agents_socket_is_libvirts_affair_unless_the_profile_has_a_place() {
        assert!(!new_domain().to_xml(&profile()).contains("mode='bind'"));
        let xml = new_domain().to_xml(&Profile { agent_sockets: Some(PathBuf::from("/s/agent")), ..profile() });
        let path = format!("path='/s/agent/{}'", Uuid::from_u128(1));
        assert!(xml.contains(&path), "{xml}");
    }

    #[test]
    fn each_network_is_written_as_it_reads_back() {
        for network in ["none", "user", "bridge:a&'b", "network:<a>"] {
            let network: Network = network.parse().unwrap();
            let xml = NewDomain { network: network.clone(), ..new_domain() }.to_xml(&profile());
            assert_eq!(Definition::parse(&xml).unwrap().network, Some(network), "{xml}");
        }
    }

    #[test]
    fn hardware_addresses_are_stable_and_differ() {
        let one = mac_address(Uuid::from_u128(1));
        assert_eq!(one, mac_address(Uuid::from_u128(1)));
        assert!(one.starts_with("52:54:00:") && one.len() == 17);
        assert_ne!(one, mac_address(Uuid::from_u128(1 << 127 | 1)));
    }

    #[test]
    fn a_guest_without_a_root_disk_of_its_own_boots_from_its_volume() {
        let volume = AttachedDisk {
            source: crate::model::domain::DiskSource::Block(PathBuf::from("/dev/vg/root")),
            format: Format::Raw,
            device: "vda".to_owned(),
            volume: Uuid::from_u128(2),
            is_shared: false,
            boots: true,
        };
        let xml = NewDomain { root_disk: None, image: None, volumes: vec![volume], ..new_domain() }.to_xml(&profile());
        let disks = Definition::parse(&xml).unwrap().disks;
        assert_eq!((disks.len(), disks[0].device.as_str()), (1, "vda"));
        assert_eq!(disks[0].path.as_deref(), Some(Path::new("/dev/vg/root")));
        assert_eq!(xml.matches("<boot order='1'/>").count(), 1);
    }

    #[test]
    fn a_seed_is_one_more_disk_that_nobody_writes() {
        let xml = NewDomain { seed: Some(PathBuf::from("/d/seed.iso")), ..new_domain() }.to_xml(&profile());
        let disks = Definition::parse(&xml).unwrap().disks;
        assert_eq!(disks[1].path.as_deref(), Some(Path::new("/d/seed.iso")));
        assert_eq!(xml.matches("<readonly/>").count(), 1);
        assert!(!new_domain().to_xml(&profile()).contains("<readonly/>"));
    }
}
