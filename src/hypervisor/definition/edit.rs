//! Changes in a definition that somebody else may have written: only the text of the elements in question, so that
//! nothing is lost of what we do not know.

use std::ops::Range;

use roxmltree::Node;
use uuid::Uuid;

use super::{METADATA_NAMESPACE, child, document, elements, root};

/// The definition with other hardware; `None` leaves a value as it is. `xml` is the inactive definition with its
/// secrets, which `libvirt` would forget otherwise.
///
/// What depends on the values (a CPU topology, pinning) is left as it is; libvirt refuses what does not fit together.
///
/// # Errors
///
/// One sentence, if it is no definition, or one whose memory is laid out in NUMA cells: those decide its size.
pub fn with_hardware(xml: &str, vcpus: Option<u32>, memory_bytes: Option<u64>) -> Result<String, String> {
    let document = document(xml)?;
    let domain = root(&document, "domain")?;
    let mut edits: Vec<(Range<usize>, String)> = Vec::new();
    if let Some(count) = vcpus {
        let element = |attributes: &str| format!("<vcpu{attributes}>{count}</vcpu>");
        match child(domain, "vcpu") {
            // All of them are plugged in at the start; the other attributes stay.
            Some(present) => edits.push((present.range(), element(&attributes(xml, present, "current")))),
            None => edits.push((after_name(domain)?, format!("\n  {}", element("")))),
        }
        // Which are plugged in, one by one, out of the former number.
        edits.extend(elements(domain, "vcpus").map(|listed| (listed.range(), String::new())));
    }
    if let Some(bytes) = memory_bytes {
        if child(domain, "cpu").and_then(|cpu| child(cpu, "numa")).is_some() {
            return Err("its memory is laid out in NUMA cells, whose sizes virsh edit changes".to_owned());
        }
        let element =
            |name: &str, attributes: &str| format!("<{name}{attributes} unit='KiB'>{}</{name}>", bytes.div_ceil(1024));
        match child(domain, "memory") {
            Some(present) => edits.push((present.range(), element("memory", &attributes(xml, present, "unit")))),
            None => edits.push((after_name(domain)?, format!("\n  {}", element("memory", "")))),
        }
        // The balloon begins deflated.
        edits.extend(elements(domain, "currentMemory").map(|current| (current.range(), element("currentMemory", ""))));
    }
    // From the end, so that the places before stay where they are.
    edits.sort_by_key(|(range, _)| std::cmp::Reverse(range.start));
    let mut edited = xml.to_owned();
    for (range, text) in edits {
        edited.replace_range(range, &text);
    }
    super::document(&edited)?;
    Ok(edited)
}

/// The definition, marked as made by this operation in our metadata element; whatever else it says stays.
///
/// # Errors
///
/// One sentence, if it is no definition.
pub fn with_operation(xml: &str, operation: Uuid) -> Result<String, String> {
    let document = document(xml)?;
    let domain = root(&document, "domain")?;
    let metadata = child(domain, "metadata");
    let ours = metadata
        .and_then(|metadata| metadata.children().find(|node| node.tag_name().namespace() == Some(METADATA_NAMESPACE)));
    let mark = format!("operation=\"{operation}\"");
    let element = format!("<instancefs:instance xmlns:instancefs=\"{METADATA_NAMESPACE}\" {mark}/>");
    let (range, text) = match (ours, metadata) {
        (Some(ours), _) => match ours.attribute_node("operation") {
            Some(present) => (present.range(), mark),
            None => {
                let end = after_tag_name(xml, ours)?;
                (end..end, format!(" {mark}"))
            }
        },
        (None, Some(metadata)) => match metadata.first_child() {
            Some(first) => (first.range().start..first.range().start, element),
            None => (metadata.range(), format!("<metadata>{element}</metadata>")),
        },
        (None, None) => (after_name(domain)?, format!("\n  <metadata>{element}</metadata>")),
    };
    let mut edited = xml.to_owned();
    edited.replace_range(range, &text);
    super::document(&edited)?;
    Ok(edited)
}

/// Where an element's attributes begin: its name is as it is written, with its prefix.
fn after_tag_name(xml: &str, node: Node<'_, '_>) -> Result<usize, String> {
    let start = node.range().start + 1;
    let written = xml.get(start..).ok_or("the definition cannot be edited")?;
    let length = written.find(|character: char| character.is_ascii_whitespace() || ['/', '>'].contains(&character));
    length.map(|length| start + length).ok_or_else(|| "the definition cannot be edited".to_owned())
}

/// The attributes of an element as they are written, but for one.
fn attributes(xml: &str, node: Node<'_, '_>, without: &str) -> String {
    let kept = node.attributes().filter(|attribute| attribute.name() != without);
    kept.filter_map(|attribute| xml.get(attribute.range())).map(|written| format!(" {written}")).collect()
}

fn after_name(domain: Node<'_, '_>) -> Result<Range<usize>, String> {
    let end = child(domain, "name").ok_or("the definition has no name")?.range().end;
    Ok(end..end)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::Definition;
    use super::*;

    const FOREIGN: &str = "<domain type='kvm' xmlns:q='urn:q'>\n  <name>a &amp; b</name>\n  <memory dumpCore='off' unit='MiB'>512</memory>\n  \
        <currentMemory unit='MiB'>256</currentMemory>\n  <vcpu placement='static' cpuset='0-1' current='1'>4</vcpu>\n  \
        <vcpus><vcpu id='0' enabled='yes'/></vcpus>\n  <devices><graphics type='vnc' passwd='&lt;secret&gt;'/></devices>\n  \
        <!-- kept --><q:commandline/>\n</domain>";

    #[test]
    fn only_the_asked_for_elements_change() {
        let edited = with_hardware(FOREIGN, Some(2), Some(1 << 30)).unwrap();
        let expected = FOREIGN
            .replace("<memory dumpCore='off' unit='MiB'>512<", "<memory dumpCore='off' unit='KiB'>1048576<")
            .replace("<currentMemory unit='MiB'>256<", "<currentMemory unit='KiB'>1048576<")
            .replace("cpuset='0-1' current='1'>4<", "cpuset='0-1'>2<")
            .replace("<vcpus><vcpu id='0' enabled='yes'/></vcpus>", "");
        assert_eq!(edited, expected);
        assert_eq!(with_hardware(FOREIGN, None, None).unwrap(), FOREIGN);
    }

    #[test]
    fn a_value_that_was_not_written_down_is_added() {
        let edited = with_hardware("<domain><name>a</name></domain>", Some(3), Some(4096)).unwrap();
        let definition = Definition::parse(&edited).unwrap();
        assert_eq!((definition.vcpus, definition.memory_bytes), (Some(3), Some(4096)));
    }

    #[test]
    fn memory_in_cells_is_refused_and_so_is_what_is_no_definition() {
        let cells = "<domain><name>a</name><cpu><numa><cell/></numa></cpu></domain>";
        assert!(with_hardware(cells, None, Some(4096)).unwrap_err().contains("NUMA"));
        assert!(with_hardware(cells, Some(2), None).is_ok());
        assert!(with_hardware("<network/>", Some(2), None).is_err());
    }

    #[test]
    fn the_mark_of_an_operation_replaces_the_former_one_and_nothing_else() {
        let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let ours =
            |attributes: &str| format!("<instancefs:instance xmlns:instancefs=\"{METADATA_NAMESPACE}\"{attributes}/>");
        let others = "<o:x xmlns:o='urn:other'/>";
        for (metadata, expected) in [
            (String::new(), format!("\n  <metadata>{}</metadata>", ours(&format!(" operation=\"{two}\"")))),
            ("<metadata/>".to_owned(), format!("<metadata>{}</metadata>", ours(&format!(" operation=\"{two}\"")))),
            (
                format!("<metadata>{others}</metadata>"),
                format!("<metadata>{}{others}</metadata>", ours(&format!(" operation=\"{two}\""))),
            ),
            (
                format!("<metadata>{others}{}</metadata>", ours(&format!(" operation=\"{one}\" locked=\"1\""))),
                format!("<metadata>{others}{}</metadata>", ours(&format!(" operation=\"{two}\" locked=\"1\""))),
            ),
            (
                format!("<metadata><instance xmlns='{METADATA_NAMESPACE}'>a</instance></metadata>"),
                format!("<metadata><instance operation=\"{two}\" xmlns='{METADATA_NAMESPACE}'>a</instance></metadata>"),
            ),
        ] {
            let definition = |metadata: &str| format!("<domain><name>a</name>{metadata}<devices/></domain>");
            assert_eq!(with_operation(&definition(&metadata), two).unwrap(), definition(&expected));
        }
        assert!(with_operation("<network/>", one).is_err());
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(vcpus in 1u32..512, kib in 1u64..1 << 40) {
            let definition = Definition::parse(&with_hardware(FOREIGN, Some(vcpus), Some(kib * 1024)).unwrap()).unwrap();
            prop_assert_eq!((definition.vcpus, definition.memory_bytes), (Some(vcpus), Some(kib * 1024)));
        }
    }
}
