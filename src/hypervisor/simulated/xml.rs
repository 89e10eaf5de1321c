//! The few things that the simulated hypervisor reads and edits in domain XML; everything else stays as it was given.

use std::ops::Range;

use roxmltree::{Document, Node};
use uuid::Uuid;

use crate::hypervisor::HypervisorError;
use crate::hypervisor::definition::METADATA_NAMESPACE;

/// The name and, if it says so, the UUID of a definition.
pub(super) fn name_and_uuid(xml: &str) -> Result<(String, Option<Uuid>), HypervisorError> {
    let document = parse(xml)?;
    let text = |tag: &str| child(document.root_element(), tag).map(|node| node.text().unwrap_or_default().to_owned());
    let name = text("name").unwrap_or_default();
    check_name(&name)?;
    let uuid = match text("uuid") {
        Some(text) => Some(
            Uuid::try_parse(text.trim()).map_err(|_| refused(format!("XML error: malformed uuid element '{text}'")))?,
        ),
        None => None,
    };
    Ok((name, uuid))
}

/// What libvirt demands of a name.
pub(super) fn check_name(name: &str) -> Result<(), HypervisorError> {
    if name.is_empty() {
        return Err(refused("XML error: a domain needs a name".to_owned()));
    }
    if name.contains('/') {
        return Err(refused(format!("XML error: name {name} cannot contain '/'")));
    }
    if name.contains('\n') {
        return Err(refused(format!("XML error: name {name:?} cannot contain a newline")));
    }
    Ok(())
}

/// The definition with this UUID, which it did not have.
pub(super) fn with_uuid(xml: &str, uuid: Uuid) -> Result<String, HypervisorError> {
    with_child(xml, "uuid", Some(&uuid.to_string()))
}

/// The definition under another name.
pub(super) fn with_name(xml: &str, name: &str) -> Result<String, HypervisorError> {
    with_child(xml, "name", Some(name))
}

/// The definition with another description, or none.
pub(super) fn with_description(xml: &str, text: Option<&str>) -> Result<String, HypervisorError> {
    with_child(xml, "description", text)
}

/// The definition with `element` as ours in its `<metadata>`, or without ours; other programs' elements stay.
pub(super) fn with_metadata(xml: &str, element: Option<&str>) -> Result<String, HypervisorError> {
    let element = element.map(in_our_namespace).transpose()?;
    let document = parse(xml)?;
    let edited = match child(document.root_element(), "metadata") {
        None => match element {
            None => return Ok(xml.to_owned()),
            Some(element) => {
                let at = after_name(&document)?;
                replaced(xml, at..at, &format!("\n  <metadata>{element}</metadata>"))
            }
        },
        Some(metadata) => {
            let ours = metadata
                .children()
                .find(|node| node.tag_name().namespace() == Some(METADATA_NAMESPACE))
                .map(|node| node.range());
            match (ours, element) {
                (Some(range), element) => replaced(xml, range, &element.unwrap_or_default()),
                (None, None) => return Ok(xml.to_owned()),
                (None, Some(element)) => match metadata.first_child() {
                    Some(first) => {
                        let at = first.range().start;
                        replaced(xml, at..at, &element)
                    }
                    None => replaced(xml, metadata.range(), &format!("<metadata>{element}</metadata>")),
                },
            }
        }
    };
    parse(&edited)?;
    Ok(edited)
}

/// The definition with one more disk.
pub(super) fn with_disk(xml: &str, element: &str) -> Result<String, HypervisorError> {
    let disk = Document::parse(element).map_err(|error| refused(format!("(device_definition): {error}")))?;
    let device = target(disk.root_element()).unwrap_or_default().to_owned();
    let document = parse(xml)?;
    if disk_of(&document, &device).is_some() {
        return Err(refused(format!("operation failed: target {device} already exists")));
    }
    let element = &element[disk.root_element().range()];
    let edited = match child(document.root_element(), "devices") {
        None => {
            let at = after_name(&document)?;
            replaced(xml, at..at, &format!("<devices>{element}</devices>"))
        }
        Some(devices) => match devices.last_child() {
            Some(last) => {
                let at = last.range().end;
                replaced(xml, at..at, element)
            }
            None => replaced(xml, devices.range(), &format!("<devices>{element}</devices>")),
        },
    };
    parse(&edited)?;
    Ok(edited)
}

/// The definition without a disk.
pub(super) fn without_disk(xml: &str, device: &str) -> Result<String, HypervisorError> {
    let document = parse(xml)?;
    let disk = disk_of(&document, device);
    let range = disk.ok_or_else(|| refused(format!("device not found: no target device {device}")))?;
    Ok(replaced(xml, range, ""))
}

fn disk_of(document: &Document<'_>, device: &str) -> Option<Range<usize>> {
    let devices = child(document.root_element(), "devices")?;
    let mut disks = devices.children().filter(|node| node.has_tag_name("disk"));
    disks.find(|disk| target(*disk) == Some(device)).map(|disk| disk.range())
}

fn target<'a>(disk: Node<'a, '_>) -> Option<&'a str> {
    child(disk, "target")?.attribute("dev")
}

/// Like libvirt, puts an element without a namespace into ours.
fn in_our_namespace(element: &str) -> Result<String, HypervisorError> {
    let document = Document::parse(element).map_err(|error| refused(format!("(metadata_xml): {error}")))?;
    let root = document.root_element();
    let range = root.range();
    match root.tag_name().namespace() {
        Some(METADATA_NAMESPACE) => Ok(element[range].to_owned()),
        None => {
            let at = range.start + 1 + root.tag_name().name().len();
            let declared = format!(" xmlns=\"{METADATA_NAMESPACE}\"");
            Ok(format!("{}{declared}{}", &element[range.start..at], &element[at..range.end]))
        }
        Some(other) => Err(refused(format!("the metadata element is in the namespace {other}"))),
    }
}

fn with_child(xml: &str, tag: &str, text: Option<&str>) -> Result<String, HypervisorError> {
    let document = parse(xml)?;
    let element = text.map(|text| format!("<{tag}>{}</{tag}>", escaped(text))).unwrap_or_default();
    let edited = match child(document.root_element(), tag) {
        Some(node) => replaced(xml, node.range(), &element),
        None if text.is_none() => return Ok(xml.to_owned()),
        None => {
            let at = after_name(&document)?;
            replaced(xml, at..at, &format!("\n  {element}"))
        }
    };
    // A character that XML cannot hold is noticed here.
    parse(&edited)?;
    Ok(edited)
}

fn parse(xml: &str) -> Result<Document<'_>, HypervisorError> {
    let document = Document::parse(xml).map_err(|error| refused(format!("(domain_definition): {error}")))?;
    let root = document.root_element().tag_name().name();
    if root != "domain" {
        return Err(refused(format!("XML error: unexpected root element <{root}>, expecting <domain>")));
    }
    Ok(document)
}

fn child<'a, 'input>(node: Node<'a, 'input>, tag: &str) -> Option<Node<'a, 'input>> {
    node.children().find(|child| child.has_tag_name(tag))
}

fn after_name(document: &Document<'_>) -> Result<usize, HypervisorError> {
    child(document.root_element(), "name")
        .map(|node| node.range().end)
        .ok_or_else(|| refused("XML error: a domain needs a name".to_owned()))
}

fn replaced(xml: &str, range: Range<usize>, with: &str) -> String {
    format!("{}{with}{}", &xml[..range.start], &xml[range.end..])
}

pub(super) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('\r', "&#13;")
}

fn refused(detail: String) -> HypervisorError {
    HypervisorError::Failed(detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = "<domain type='kvm'><name>a &amp; b</name><os/></domain>";

    fn text_of(xml: &str, tag: &str) -> Option<String> {
        let document = Document::parse(xml).unwrap();
        child(document.root_element(), tag).map(|node| node.text().unwrap_or_default().to_owned())
    }

    #[test]
    fn edits_touch_only_their_element() {
        let uuid = Uuid::from_u128(7);
        let xml = with_uuid(PLAIN, uuid).unwrap();
        assert_eq!(name_and_uuid(&xml).unwrap(), ("a & b".to_owned(), Some(uuid)));
        let xml = with_description(&xml, Some("<&>\n")).unwrap();
        let xml = with_name(&xml, "c").unwrap();
        assert_eq!(text_of(&xml, "description").as_deref(), Some("<&>\n"));
        assert_eq!(name_and_uuid(&xml).unwrap(), ("c".to_owned(), Some(uuid)));
        let xml = with_description(&xml, None).unwrap();
        assert_eq!(text_of(&xml, "description"), None);
        assert!(xml.ends_with("<os/></domain>"));
    }

    #[test]
    fn our_metadata_comes_and_goes_beside_that_of_others() {
        let others = "<o:x xmlns:o='urn:other'/>";
        for metadata in ["", "<metadata/>", "<metadata></metadata>", &format!("<metadata>{others}</metadata>")] {
            let xml = PLAIN.replace("<os/>", metadata);
            let set = with_metadata(&xml, Some("<instance locked='yes'/>")).unwrap();
            let set = with_metadata(&set, Some("<instance locked='no'/>")).unwrap();
            let document = Document::parse(&set).unwrap();
            let ours: Vec<_> =
                document.descendants().filter(|node| node.has_tag_name((METADATA_NAMESPACE, "instance"))).collect();
            assert_eq!(ours.len(), 1, "{set}");
            assert_eq!(ours[0].attribute("locked"), Some("no"));
            let removed = with_metadata(&set, None).unwrap();
            assert!(!removed.contains(METADATA_NAMESPACE));
            assert_eq!(removed.contains(others), metadata.contains(others));
        }
    }

    #[test]
    fn what_is_no_definition_is_refused() {
        for xml in [
            "",
            "<domain",
            "<network><name>a</name></network>",
            "<domain/>",
            "<domain><name>a/b</name></domain>",
            "<domain><name>a</name><uuid>7</uuid></domain>",
        ] {
            assert!(matches!(name_and_uuid(xml), Err(HypervisorError::Failed(_))), "{xml}");
        }
        assert!(with_description(PLAIN, Some("\u{1}")).is_err());
        assert!(with_metadata(PLAIN, Some("<a>")).is_err());
        assert!(with_metadata(PLAIN, Some("<a xmlns='urn:other'/>")).is_err());
    }
}
