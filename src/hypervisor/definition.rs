//! Domain XML: what we write for a new guest (`new_domain`), what we read out of any definition, and what we change in
//! one (`edit`). `attached_disk` is the element of a volume.

mod attached_disk;
mod edit;
mod new_domain;

use std::fmt::Write;
use std::path::{Path, PathBuf};

use roxmltree::{Document, Node};
use uuid::Uuid;

pub use crate::model::domain::{DefinedDisk, Definition};
use crate::model::network::Network;
pub use attached_disk::{AttachedDisk, disk_alias, disk_element, targets};
pub use edit::{with_hardware, with_operation};
pub use new_domain::{BackingImage, NewDomain, mac_address};

/// The namespace of our element in a domain's `<metadata>`.
pub const METADATA_NAMESPACE: &str = "https://instancefs.org/xmlns/instance/1";

/// The longest document that we read, in bytes. libvirt's own limit for a definition is the same.
const DOCUMENT_MAX: usize = 4 * 1024 * 1024;

/// What the connection demands of a definition that we write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// The QEMU binary, absolute.
    pub emulator: PathBuf,
    /// `x86_64`, ...
    pub architecture: String,
    /// `pc`, `q35`.
    pub machine: String,
    /// Where the guest agent's sockets lie, absolute; `None` leaves that to libvirt. The embedded driver's own place for
    /// them makes paths that are too long for a socket.
    pub agent_sockets: Option<PathBuf>,
}

impl Definition {
    /// Reads a domain's XML. What is missing or makes no sense is `None`; unknown elements are skipped.
    ///
    /// # Errors
    ///
    /// One sentence, if it is longer than 4 MiB, no XML, or no domain.
    pub fn parse(xml: &str) -> Result<Definition, String> {
        let document = document(xml)?;
        let domain = root(&document, "domain")?;
        let devices = child(domain, "devices");
        Ok(Definition {
            vcpus: text_of(domain, "vcpu").and_then(|text| text.parse().ok()),
            memory_bytes: child(domain, "memory").and_then(bytes),
            description: child(domain, "description").and_then(|node| node.text()).map(str::to_owned),
            network: network(devices),
            disks: devices.map(disks).unwrap_or_default(),
            console_log: devices.and_then(console_log),
            has_serial: devices
                .is_some_and(|devices| child(devices, "serial").or_else(|| child(devices, "console")).is_some()),
            has_vnc: devices.and_then(vnc).is_some(),
        })
    }
}

/// What the only network card is connected to, if there is no more than one and [`Network`] has a word for it.
fn network(devices: Option<Node>) -> Option<Network> {
    let mut interfaces = devices.into_iter().flat_map(|devices| elements(devices, "interface"));
    let Some(only) = interfaces.next() else { return Some(Network::None) };
    if interfaces.next().is_some() {
        return None;
    }
    let source = |attribute| child(only, "source")?.attribute(attribute).map(str::to_owned);
    match only.attribute("type")? {
        "user" => Some(Network::User),
        "bridge" => source("bridge").map(Network::Bridge),
        "network" => source("network").map(Network::Libvirt),
        _ => None,
    }
}

/// A network card of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Card {
    /// Its hardware address, in lower case.
    pub mac_address: String,
    /// The bridge of the host that it is connected to, also by way of a libvirt network; `None` if there is none.
    pub bridge: Option<String>,
}

/// The network cards that have a hardware address.
pub(super) fn cards(xml: &str) -> Vec<Card> {
    let Ok(document) = document(xml) else { return Vec::new() };
    let devices = child(document.root_element(), "devices");
    let interfaces = devices.into_iter().flat_map(|devices| elements(devices, "interface"));
    let card = |interface| {
        Some(Card {
            mac_address: child(interface, "mac")?.attribute("address")?.to_ascii_lowercase(),
            bridge: child(interface, "source").and_then(|source| source.attribute("bridge")).map(str::to_owned),
        })
    };
    interfaces.filter_map(card).collect()
}

fn disks(devices: Node) -> Vec<DefinedDisk> {
    elements(devices, "disk")
        .filter(|disk| matches!(disk.attribute("device"), None | Some("disk")))
        .filter_map(|disk| {
            let source = child(disk, "source");
            Some(DefinedDisk {
                device: child(disk, "target")?.attribute("dev")?.to_owned(),
                path: source.and_then(|source| source.attribute("file").or(source.attribute("dev"))).map(PathBuf::from),
                format: child(disk, "driver").and_then(|driver| driver.attribute("type")).map(str::to_owned),
                read_only: child(disk, "readonly").is_some(),
            })
        })
        .collect()
}

/// The log of the first serial or console device that has one, or the file that such a device is.
fn console_log(devices: Node) -> Option<PathBuf> {
    elements(devices, "serial")
        .chain(elements(devices, "console"))
        .find_map(|device| {
            child(device, "log").and_then(|log| log.attribute("file")).or_else(|| {
                (device.attribute("type") == Some("file")).then(|| child(device, "source")?.attribute("path")).flatten()
            })
        })
        .map(PathBuf::from)
}

/// Which of the graphics devices of a domain's XML is the first VNC one.
pub(super) fn vnc_index(xml: &str) -> Option<u32> {
    let document = document(xml).ok()?;
    vnc(child(root(&document, "domain").ok()?, "devices")?)
}

fn vnc(devices: Node) -> Option<u32> {
    let index = elements(devices, "graphics").position(|graphics| graphics.attribute("type") == Some("vnc"))?;
    u32::try_from(index).ok()
}

/// A size with libvirt's units; without one it is KiB.
fn bytes(node: Node) -> Option<u64> {
    let number: u64 = node.text()?.trim().parse().ok()?;
    let unit: u64 = match node.attribute("unit") {
        Some("b" | "bytes") => 1,
        Some("KB") => 1000,
        None | Some("k" | "KiB") => 1 << 10,
        Some("MB") => 1_000_000,
        Some("M" | "MiB") => 1 << 20,
        Some("GB") => 1_000_000_000,
        Some("G" | "GiB") => 1 << 30,
        Some("TB") => 1_000_000_000_000,
        Some("T" | "TiB") => 1 << 40,
        Some(_) => return None,
    };
    number.checked_mul(unit)
}

/// The text with everything escaped that has a meaning in XML, fit for content and for attributes in either quotes.
/// Characters that XML cannot hold at all are left out.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&apos;"),
            // As plain characters a parser turns these into spaces in attributes, and a return into a newline.
            '\t' | '\n' | '\r' => {
                let _ = write!(escaped, "&#{};", u32::from(character));
            }
            '\0'..' ' | '\u{fffe}' | '\u{ffff}' => {}
            _ => escaped.push(character),
        }
    }
    escaped
}

/// Whether a domain's XML names a file anywhere: as a disk, as what one is based on, as firmware.
pub fn names(xml: &str, path: &Path) -> bool {
    let Some(path) = path.to_str() else { return false };
    match document(xml) {
        Ok(document) => document.descendants().any(|node| {
            node.attributes().any(|attribute| attribute.value() == path)
                || node.text().is_some_and(|text| text.trim() == path)
        }),
        // What cannot be read might name it.
        Err(_) => xml.contains(path),
    }
}

/// Whether a domain's XML is of a guest that is there: only that has a number on its host.
pub(super) fn is_live(xml: &str) -> bool {
    document(xml).is_ok_and(|document| root(&document, "domain").is_ok_and(|domain| domain.has_attribute("id")))
}

/// The name and UUID in a domain's XML.
pub(super) fn identity_of(xml: &str) -> Option<(String, Option<Uuid>)> {
    let document = document(xml).ok()?;
    let domain = root(&document, "domain").ok()?;
    let name = child(domain, "name")?.text()?.to_owned();
    let uuid = text_of(domain, "uuid").and_then(|text| text.parse().ok());
    Some((name, uuid))
}

/// The definition has state outside of its disks: NVRAM, or an emulated TPM.
pub(super) fn has_firmware_state(xml: &str) -> bool {
    // What cannot be read might have some.
    document(xml).map_or(true, |document| {
        document.descendants().any(|node| node.has_tag_name("nvram") || node.has_tag_name("tpm"))
    })
}

/// The host's UUID in `virConnectGetCapabilities`.
pub(super) fn host_uuid(capabilities: &str) -> Result<String, String> {
    let document = document(capabilities)?;
    let host = child(root(&document, "capabilities")?, "host");
    Ok(host.and_then(|host| text_of(host, "uuid")).unwrap_or_default().to_owned())
}

/// What `virConnectGetDomainCapabilities` says of the emulator.
pub(super) fn profile_of(capabilities: &str) -> Result<Profile, String> {
    let document = document(capabilities)?;
    let capabilities = root(&document, "domainCapabilities")?;
    let text = |name| text_of(capabilities, name).ok_or_else(|| format!("the domain capabilities name no {name}"));
    let machine = text("machine")?;
    Ok(Profile {
        emulator: PathBuf::from(text("path")?),
        architecture: text("arch")?.to_owned(),
        // libvirt answers with the version that it would take today; the plain name stays right after an upgrade.
        machine: if machine.starts_with("pc-i440fx") { "pc".to_owned() } else { machine.to_owned() },
        agent_sockets: None,
    })
}

fn document(xml: &str) -> Result<Document<'_>, String> {
    if xml.len() > DOCUMENT_MAX {
        return Err(format!("the XML is longer than {DOCUMENT_MAX} bytes"));
    }
    Document::parse(xml).map_err(|error| format!("the XML cannot be read: {error}"))
}

fn root<'a, 'input>(document: &'a Document<'input>, name: &str) -> Result<Node<'a, 'input>, String> {
    let root = document.root_element();
    if root.has_tag_name(name) { Ok(root) } else { Err(format!("the XML is no <{name}>")) }
}

fn elements<'a, 'input>(node: Node<'a, 'input>, name: &'static str) -> impl Iterator<Item = Node<'a, 'input>> {
    node.children().filter(move |child| child.has_tag_name(name))
}

fn child<'a, 'input>(node: Node<'a, 'input>, name: &'static str) -> Option<Node<'a, 'input>> {
    elements(node, name).next()
}

fn text_of<'a>(node: Node<'a, '_>, name: &'static str) -> Option<&'a str> {
    child(node, name)?.text().map(str::trim)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    fn profile() -> Profile {
        Profile {
            emulator: PathBuf::from("/usr/bin/qemu-system-x86_64"),
            architecture: "x86_64".to_owned(),
            machine: "pc".to_owned(),
            agent_sockets: None,
        }
    }

    #[test]
    fn only_disks_are_disks_and_only_local_ones_have_a_path() {
        let xml = "<domain><devices>
            <disk type='file' device='cdrom'><source file='/c.iso'/><target dev='sda'/></disk>
            <disk type='block'><driver type='raw'/><source dev='/dev/vg/lv'/><target dev='vda'/></disk>
            <disk type='network' device='disk'><source protocol='rbd' name='p/i'/><target dev='vdb'/></disk>
            <disk type='file' device='disk'><source file='/no-target'/></disk>
            </devices></domain>";
        let disks = Definition::parse(xml).unwrap().disks;
        let seen: Vec<_> = disks.iter().map(|disk| (disk.device.as_str(), disk.path.as_deref())).collect();
        assert_eq!(seen, [("vda", Some(Path::new("/dev/vg/lv"))), ("vdb", None)]);
    }

    #[test]
    fn memory_has_libvirts_units_and_never_overflows() {
        let memory = |element: &str| Definition::parse(&format!("<domain>{element}</domain>")).unwrap().memory_bytes;
        assert_eq!(memory("<memory>1024</memory>"), Some(1 << 20));
        assert_eq!(memory("<memory unit='GB'>1</memory>"), Some(1_000_000_000));
        assert_eq!(memory("<memory unit='T'>99999999999</memory>"), None);
        assert_eq!(memory("<memory unit='parsec'>1</memory>"), None);
        assert_eq!(memory("<memory>many</memory>"), None);
    }

    #[test]
    fn vnc_is_found_among_other_graphics() {
        let xml = "<domain><devices><graphics type='spice'/><graphics type='vnc'/></devices></domain>";
        assert_eq!((vnc_index(xml), Definition::parse(xml).unwrap().has_serial), (Some(1), false));
        assert_eq!(vnc_index("<domain><devices><graphics type='spice'/></devices></domain>"), None);
    }

    #[test]
    fn the_network_is_that_of_the_only_card_if_there_is_a_word_for_it() {
        let network =
            |cards: &str| Definition::parse(&format!("<domain><devices>{cards}</devices></domain>")).unwrap().network;
        let bridge = "<interface type='bridge'><source bridge='br0'/></interface>";
        assert_eq!(network(""), Some(Network::None));
        assert_eq!(network(bridge), Some(Network::Bridge("br0".to_owned())));
        assert_eq!(network("<interface type='user'/>"), Some(Network::User));
        let named = "<interface type='network'><source network='default' portgroup='p'/></interface>";
        assert_eq!(network(named), Some(Network::Libvirt("default".to_owned())));
        for other in [&bridge.repeat(2), "<interface type='direct'/>", "<interface type='bridge'/>", "<interface/>"] {
            assert_eq!(network(other), None, "{other}");
        }
    }

    #[test]
    fn a_card_is_on_a_bridge_directly_or_by_a_network() {
        let xml = "<domain><devices>
            <interface type='bridge'><mac address='52:54:00:AA:00:01'/><source bridge='br0'/></interface>
            <interface type='network'><mac address='a'/><source network='default' bridge='virbr0'/></interface>
            <interface type='user'><mac address='b'/></interface>
            <interface type='user'/>
            </devices></domain>";
        let on = |mac_address: &str, bridge: Option<&str>| Card {
            mac_address: mac_address.to_owned(),
            bridge: bridge.map(str::to_owned),
        };
        assert_eq!(cards(xml), [on("52:54:00:aa:00:01", Some("br0")), on("a", Some("virbr0")), on("b", None)]);
    }

    #[test]
    fn a_console_that_is_a_file_is_its_own_log() {
        let xml = "<domain><devices><serial type='file'><source path='/l'/></serial></devices></domain>";
        let definition = Definition::parse(xml).unwrap();
        assert_eq!(definition.console_log, Some(PathBuf::from("/l")));
    }

    #[test]
    fn hostile_xml_is_an_error_and_no_crash() {
        let deep = "<domain>".repeat(400_000);
        let bomb = "<!DOCTYPE d [<!ENTITY a 'aaaaaaaa'><!ENTITY b '&a;&a;&a;'>]><domain>&b;</domain>";
        let long = format!("<domain>{}</domain>", " ".repeat(DOCUMENT_MAX));
        for xml in [deep.as_str(), bomb, &long, "", "<network/>", "<domain"] {
            assert!(Definition::parse(xml).is_err());
        }
        let nested = format!("{}{}", "<domain>".repeat(200_000), "</domain>".repeat(200_000));
        assert!(Definition::parse(&nested).is_ok());
    }

    #[test]
    fn firmware_state_is_seen_and_assumed_where_nothing_can_be_read() {
        assert!(has_firmware_state("<domain><os><nvram>/n</nvram></os></domain>"));
        assert!(has_firmware_state("<domain><devices><tpm/></devices></domain>"));
        assert!(has_firmware_state("<domain"));
        assert!(!has_firmware_state("<domain><devices/></domain>"));
    }

    #[test]
    fn domain_capabilities_name_emulator_and_machine() {
        let xml = "<domainCapabilities><path>/usr/bin/q</path><domain>qemu</domain>\
            <machine>pc-i440fx-7.2</machine><arch>x86_64</arch></domainCapabilities>";
        assert_eq!(profile_of(xml).unwrap(), Profile { emulator: PathBuf::from("/usr/bin/q"), ..profile() });
    }

    proptest! {
        #[test]
        fn any_text_survives_escaping_but_for_what_xml_forbids(text in any::<String>()) {
            let xml = format!("<a b='{0}'>{0}</a>", escape(&text));
            let document = Document::parse(&xml).unwrap();
            let allowed: String = text
                .chars()
                .filter(|c| !matches!(c, '\0'..='\u{8}' | '\u{b}' | '\u{c}' | '\u{e}'..='\u{1f}' | '\u{fffe}' | '\u{ffff}'))
                .collect();
            let root = document.root_element();
            prop_assert_eq!(root.attribute("b"), Some(allowed.as_str()));
            prop_assert_eq!(root.text().unwrap_or_default(), allowed.as_str());
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in any::<String>()) {
            let _ = Definition::parse(&text);
            let _ = Definition::parse(&format!("<domain>{text}</domain>"));
        }
    }
}
