//! The disk element of a volume, and disk elements in definitions that others may have written.

use uuid::Uuid;

use super::{child, document, elements, escape, root};
use crate::model::domain::DiskSource;
use crate::model::image::Format;

/// What the virtio block device carries of a serial number, in bytes (`VIRTIO_BLK_ID_BYTES`, Virtio 1.2 §5.2.6).
const SERIAL_BYTES: usize = 20;

/// A volume as a disk of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachedDisk {
    /// How its bytes are reached.
    pub source: DiskSource,
    /// Their format; never left to be guessed from what a guest may have written.
    pub format: Format,
    /// The device name, `vdb`: libvirt's target, which says the order on the bus.
    pub device: String,
    /// The volume, whose uuid is the serial number.
    pub volume: Uuid,
    /// Other guests have it too.
    pub is_shared: bool,
    /// The guest boots from it.
    pub boots: bool,
}

impl AttachedDisk {
    /// The element: a virtio disk that the guest finds as `/dev/disk/by-id/virtio-` and the first 20 characters of the
    /// volume's uuid, and whose unused blocks it can give back.
    pub fn to_xml(&self) -> String {
        let (kind, attribute, path) = match &self.source {
            DiskSource::File(path) => ("file", "file", path),
            DiskSource::Block(path) => ("block", "dev", path),
        };
        // A page cache for each guest would show each its own truth.
        let cache = if self.is_shared { " cache='none'" } else { "" };
        let optional = |is_there, line| if is_there { line } else { "" };
        format!(
            "    <disk type='{kind}' device='disk'>
      <driver name='qemu' type='{format}'{cache} discard='unmap'/>
      <source {attribute}='{path}'/>
      <target dev='{device}' bus='virtio'/>
{shareable}      <serial>{serial}</serial>
{boot}    </disk>
",
            format = self.format.word(),
            path = escape(&path.to_string_lossy()),
            device = escape(&self.device),
            shareable = optional(self.is_shared, "      <shareable/>\n"),
            serial = serial(self.volume),
            boot = optional(self.boots, "      <boot order='1'/>\n"),
        )
    }
}

/// The serial number under which a guest sees a volume.
pub fn serial(volume: Uuid) -> String {
    volume.to_string().chars().take(SERIAL_BYTES).collect()
}

/// The element of a disk as it is written, by its target device.
pub fn disk_element(xml: &str, device: &str) -> Option<String> {
    with_disk(xml, device, |disk| xml.get(disk.range()).map(str::to_owned))
}

/// The hypervisor's own name for a disk of a guest that is there, by its target device: events have it.
pub fn disk_alias(xml: &str, device: &str) -> Option<String> {
    with_disk(xml, device, |disk| child(disk, "alias")?.attribute("name").map(str::to_owned))
}

fn with_disk<T>(xml: &str, device: &str, what: impl Fn(roxmltree::Node<'_, '_>) -> Option<T>) -> Option<T> {
    let document = document(xml).ok()?;
    let devices = child(root(&document, "domain").ok()?, "devices")?;
    let disk = elements(devices, "disk")
        .find(|disk| child(*disk, "target").and_then(|it| it.attribute("dev")) == Some(device));
    what(disk?)
}

/// Every target device that a definition uses, those of drives for removable media too.
pub fn targets(xml: &str) -> Vec<String> {
    let Ok(document) = document(xml) else { return Vec::new() };
    let devices = root(&document, "domain").ok().and_then(|domain| child(domain, "devices"));
    let disks = devices.into_iter().flat_map(|devices| elements(devices, "disk"));
    disks.filter_map(|disk| child(disk, "target")?.attribute("dev").map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::super::Definition;
    use super::*;

    fn disk() -> AttachedDisk {
        AttachedDisk {
            source: DiskSource::File(PathBuf::from("/v/a & 'b'")),
            format: Format::Raw,
            device: "vdb".to_owned(),
            volume: Uuid::from_u128(0x1234_5678),
            is_shared: false,
            boots: false,
        }
    }

    fn domain(disks: &str) -> String {
        format!("<domain><devices>\n{disks}</devices></domain>")
    }

    #[test]
    fn what_is_written_reads_back_as_the_same() {
        let xml = domain(&disk().to_xml());
        let defined = Definition::parse(&xml).unwrap().disks;
        assert_eq!((defined[0].device.as_str(), defined[0].path.as_deref()), ("vdb", Some(Path::new("/v/a & 'b'"))));
        assert_eq!(defined[0].format.as_deref(), Some("raw"));
        assert!(xml.contains("<serial>00000000-0000-0000-0</serial>") && !xml.contains("shareable"), "{xml}");
        let block = AttachedDisk { source: DiskSource::Block(PathBuf::from("/dev/vg/lv")), ..disk() };
        let defined = Definition::parse(&domain(&block.to_xml())).unwrap().disks;
        assert_eq!(defined[0].path.as_deref(), Some(Path::new("/dev/vg/lv")));
    }

    #[test]
    fn a_shared_disk_says_so_and_has_no_cache_of_its_own() {
        let xml = AttachedDisk { is_shared: true, ..disk() }.to_xml();
        assert!(xml.contains("<shareable/>") && xml.contains("cache='none'"), "{xml}");
    }

    #[test]
    fn an_element_is_found_by_its_target_and_taken_as_it_is() {
        let first = "<disk type='file'><target dev='vda'/><alias name='virtio-disk0'/></disk>";
        let xml = domain(&format!("{first}<disk device='cdrom'><target dev='sda'/></disk>{}", disk().to_xml()));
        assert_eq!(disk_element(&xml, "vda").as_deref(), Some(first));
        assert_eq!(disk_alias(&xml, "vda").as_deref(), Some("virtio-disk0"));
        assert_eq!(disk_alias(&xml, "vdb"), None);
        assert_eq!(disk_element(&xml, "vdc"), None);
        assert_eq!(targets(&xml), ["vda", "sda", "vdb"]);
    }
}
