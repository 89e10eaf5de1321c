//! What is neither qcow2 nor raw.

use super::corpus::Corpus;

const BYTES: usize = 16 << 10;

fn beginning(head: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; BYTES];
    bytes[..head.len()].copy_from_slice(head);
    bytes
}

fn at(places: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; BYTES];
    for (at, content) in places {
        bytes[*at..at + content.len()].copy_from_slice(content);
    }
    bytes
}

/// A VMDK text descriptor.
pub fn descriptor(kind: &str, extent: &str, newline: &str) -> String {
    let lines = [
        "# Disk DescriptorFile",
        "version=1",
        "CID=fffffffe",
        "parentCID=ffffffff",
        &format!("createType=\"{kind}\""),
        "# Extent description",
        extent,
        "ddb.adapterType = \"ide\"",
        "",
    ];
    lines.join(newline)
}

pub fn add(corpus: &mut Corpus) {
    vmdk(corpus);
    vhd_and_vhdx(corpus);
    others(corpus);
    packed(corpus);
}

fn vmdk(corpus: &mut Corpus) {
    let canary = corpus.canary.to_owned();
    let flat = format!("RW 1 FLAT \"{canary}\" 0");
    for kind in ["monolithicFlat", "twoGbMaxExtentFlat", "vmfs", "monolithicSparse", "custom", "fullDevice"] {
        for (ending, newline) in [("LF", "\n"), ("CRLF", "\r\n")] {
            let text = descriptor(kind, &flat, newline);
            corpus.add(format!("VMDK descriptor {kind}, {ending}"), beginning(text.as_bytes()), "VMDK");
        }
    }
    for extent in [
        format!("RW 1 VMFS \"{canary}\""),
        format!("RW 1 SPARSE \"{canary}\""),
        "RW 1 FLAT \"/dev/vda\" 0".to_owned(),
        format!("RDONLY 1 FLAT \"json:{{}}\" 0\nRW 1 FLAT \"{canary}\" 1"),
    ] {
        corpus.add(
            format!("VMDK descriptor with {extent}"),
            beginning(descriptor("vmfs", &extent, "\n").as_bytes()),
            "VMDK",
        );
    }
    let parent = descriptor("monolithicSparse", &format!("parentFileNameHint=\"{canary}\""), "\n");
    corpus.add("VMDK descriptor with a parent", beginning(parent.as_bytes()), "VMDK");
    for (kind, before) in [
        ("without a title", ""),
        ("behind a comment", "# anything\n"),
        ("behind empty lines", "\n\n"),
        ("behind spaces and CRLF", "   \r\n"),
        ("behind much of both", "#\n \n#\r\n\n"),
    ] {
        for version in 1..=3 {
            let text = format!("{before}version={version}\n{flat}\n");
            corpus.add(format!("VMDK descriptor version {version} {kind}"), beginning(text.as_bytes()), "VMDK");
        }
    }
    for (kind, flags, grain_directory) in [("monolithicSparse", 3u32, 21u64), ("streamOptimized", 0x30001, u64::MAX)] {
        for version in 1u32..=3 {
            let mut header = b"KDMV".to_vec();
            header.extend(version.to_le_bytes());
            header.extend(flags.to_le_bytes());
            header.extend([128u64, 128, 1, 20].map(u64::to_le_bytes).concat());
            header.extend(512u32.to_le_bytes());
            header.extend([0u64, grain_directory, 128].map(u64::to_le_bytes).concat());
            let text = descriptor(kind, &flat, "\n");
            corpus.add(format!("VMDK {kind} version {version}"), at(&[(0, &header), (512, text.as_bytes())]), "VMDK");
        }
    }
    corpus.add("VMDK of ESX", beginning(b"COWD\x01\0\0\0"), "VMDK");
    corpus.add("VMDK SE sparse", beginning(b"\xbe\xba\xfe\xca\0\0\0\0\x01\0\0\0\x02\0\0\0"), "VMDK");
}

fn vhd_and_vhdx(corpus: &mut Corpus) {
    let canary = corpus.canary.to_owned();
    for (kind, number) in [("fixed", 2u8), ("dynamic", 3), ("differencing", 4)] {
        let mut footer = vec![0; 512];
        footer[..8].copy_from_slice(b"conectix");
        footer[60..64].copy_from_slice(&[0, 0, 0, number]);
        corpus.add(format!("VHD {kind}"), at(&[(0, &footer), (BYTES - 512, &footer)]), "VHD");
        corpus.add(format!("VHD {kind}, by its footer alone"), at(&[(BYTES - 512, &footer)]), "VHD");
        corpus.add(format!("VHD {kind}, by a footer of 511 bytes"), at(&[(BYTES - 511, &footer[..511])]), "VHD");
    }
    corpus.add("VHDX", beginning(b"vhdxfile"), "VHDX");
    let parent: Vec<u8> = format!("absolute_win32_path={canary}").encode_utf16().flat_map(u16::to_le_bytes).collect();
    corpus.add("VHDX with a parent", at(&[(0, b"vhdxfile"), (4096, b"head"), (8192, &parent)]), "VHDX");
}

fn others(corpus: &mut Corpus) {
    let canary = corpus.canary.to_owned();
    for (kind, number) in [("dynamic", 1u8), ("fixed", 2), ("undo", 3), ("differencing", 4)] {
        let text = b"<<< Oracle VM VirtualBox Disk Image >>>\n";
        corpus.add(
            format!("VDI {kind}"),
            at(&[(0, text), (0x40, b"\x7f\x10\xda\xbe\x01\0\x01\0"), (0x4c, &[number])]),
            "VDI",
        );
    }
    corpus.add("VDI without its text", at(&[(0x40, b"\x7f\x10\xda\xbe")]), "VDI");
    for (kind, features) in [("plain", 0u8), ("backed", 1), ("backed by raw", 5)] {
        let bytes = at(&[(0, b"QED\0"), (4, &4096u32.to_le_bytes()), (16, &[features]), (64, canary.as_bytes())]);
        corpus.add(format!("QED {kind}"), bytes, "QED");
    }
    for version in [1, 2] {
        corpus.add(
            format!("LUKS version {version}"),
            beginning(&[b'L', b'U', b'K', b'S', 0xba, 0xbe, 0, version]),
            "LUKS",
        );
    }
    corpus.add("Parallels", beginning(b"WithoutFreeSpace\x02\0\0\0"), "Parallels");
    corpus.add("Parallels, extended", beginning(b"WithouFreSpacExt\x02\0\0\0"), "Parallels");
    corpus.add("Bochs", beginning(b"Bochs Virtual HD Image\0\0Redolog\0"), "Bochs");
    let cloop = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n";
    corpus.add("cloop", beginning(cloop), "cloop");
    let koly = b"koly\0\0\0\x04\0\0\x02\0\0\0\0\x01";
    corpus.add("DMG", at(&[(BYTES - 512, koly)]), "DMG");
    // QEMU looks for it in the last KiB, not at one place.
    corpus.add("DMG with something behind it", at(&[(BYTES - 700, koly)]), "DMG");
    corpus.add("DMG with an odd length", at(&[(BYTES - 512, koly)])[..BYTES - 1].to_vec(), "DMG");
}

fn packed(corpus: &mut Corpus) {
    for (kind, magic) in [
        ("gzip", &b"\x1f\x8b\x08\x08"[..]),
        ("xz", b"\xfd7zXZ\0\0\x04"),
        ("zstd", b"\x28\xb5\x2f\xfd\x24"),
        ("bzip2", b"BZh91AY&SY"),
        ("zip", b"PK\x03\x04\x14"),
        ("7-Zip", b"7z\xbc\xaf\x27\x1c\0\x04"),
        ("lz4", b"\x04\x22\x4d\x18"),
    ] {
        corpus.add(format!("an image packed with {kind}"), beginning(magic), "unpack it");
    }
    corpus.add("an OVA", at(&[(0, b"disk.ovf"), (257, b"ustar\x0000")]), "unpack it");
    corpus.add("a tar of GNU", at(&[(0, b"disk.raw"), (257, b"ustar  \0")]), "unpack it");
}
