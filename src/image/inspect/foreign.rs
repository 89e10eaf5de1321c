//! What other formats and packers sign with: all that QEMU 7.2 to 10 probe for, and what people upload by mistake.

/// How much of the end of a file [`tail`] wants: as far back as QEMU looks for the trailer of a DMG, with a sector for
/// the rounding of odd lengths.
pub(super) const TAIL_BYTES: usize = 1536;

const FOOTER_BYTES: usize = 512;

/// (Offset within the first sector, bytes, name).
pub(super) const HEADS: &[(usize, &[u8], &str)] = &[
    (0, b"QED\0", "QED"),
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK (version 3)"),
    (0, b"\xbe\xba\xfe\xca\0\0\0\0", "VMDK (space-efficient)"),
    (0, b"# Disk DescriptorFile", "a VMDK descriptor"),
    (0, b"conectix", "VHD"),
    (0, b"vhdxfile", "VHDX"),
    (0x40, b"\x7f\x10\xda\xbe", "VDI"),
    (0, b"LUKS\xba\xbe", "a LUKS container"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0, b"WithouFreSpacExt", "Parallels"),
    (0, b"Bochs Virtual HD Image", "Bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\n", "cloop"),
];

/// The same of packers. None of these begins a disk that a machine boots from.
const PACKED: &[(usize, &[u8], &str)] = &[
    (0, b"\x1f\x8b\x08", "gzip"),
    (0, b"\xfd7zXZ\0", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"BZh", "bzip2"),
    (0, b"PK\x03\x04", "zip"),
    (0, b"7z\xbc\xaf\x27\x1c", "7-Zip"),
    (0, b"\x04\x22\x4d\x18", "lz4"),
    (257, b"ustar", "tar or OVA"),
];

/// The format that `head`, the first sector, belongs to.
pub(super) fn head(head: &[u8]) -> Option<&'static str> {
    find(HEADS, head).or_else(|| is_vmdk_descriptor(head).then_some("a VMDK descriptor"))
}

/// The packer that `head`, the first sector, belongs to.
pub(super) fn packed(head: &[u8]) -> Option<&'static str> {
    find(PACKED, head)
}

fn find(table: &[(usize, &[u8], &'static str)], head: &[u8]) -> Option<&'static str> {
    let matches = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|at| at.starts_with(magic));
    table.iter().find(|(offset, magic, _)| matches(*offset, magic)).map(|(_, _, name)| *name)
}

/// QEMU takes any text for a VMDK whose first line after comments and empty ones is `version=`; its extents name files.
fn is_vmdk_descriptor(head: &[u8]) -> bool {
    head.split(|byte| *byte == b'\n')
        .map(|line| line.trim_ascii())
        .find(|line| !line.is_empty() && !line.starts_with(b"#"))
        .is_some_and(|line| line.starts_with(b"version="))
}

/// The format that signs in `tail`, the last [`TAIL_BYTES`] or the whole of a shorter file: VHD in the last sector, in
/// which old tools made a footer of 511 bytes, and DMG anywhere, as QEMU looks for it.
pub(super) fn tail(tail: &[u8]) -> Option<&'static str> {
    let last = tail.get(tail.len().saturating_sub(FOOTER_BYTES)..).unwrap_or_default();
    let old_footer = last.get(1..).unwrap_or_default();
    if last.starts_with(b"conectix") || old_footer.starts_with(b"conectix") {
        Some("VHD")
    } else if last.starts_with(b"koly") || tail.windows(12).any(|at| at == b"koly\0\0\0\x04\0\0\x02\0") {
        Some("DMG")
    } else {
        None
    }
}
