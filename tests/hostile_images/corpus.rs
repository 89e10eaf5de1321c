//! Hostile images by families and variants. Each names a canary, or lies about itself, in its own way.

use std::path::Path;

use instancefs::image::Format;

use super::foreign;
use super::qcow2::{self, CLUSTER, DATA, END, L1_TABLE, L2_TABLE, Qcow2, REFCOUNT_BLOCK, REFCOUNT_TABLE, field};

/// Refused whatever anybody claims.
const ANY: &[Option<Format>] = &[None, Some(Format::Qcow2), Some(Format::Raw)];

/// One hostile image.
pub struct Case {
    /// What it is.
    pub name: String,
    /// What it holds.
    pub bytes: Vec<u8>,
    /// With which claims it is refused; the first one is that of `reason`.
    pub claims: &'static [Option<Format>],
    /// What the refusal says.
    pub reason: &'static str,
}

/// Collects cases.
pub struct Corpus<'a> {
    /// What must not be read.
    pub canary: &'a str,
    cases: Vec<Case>,
}

impl Corpus<'_> {
    /// Adds an image that is refused whatever the claim.
    pub fn add(&mut self, name: impl Into<String>, bytes: Vec<u8>, reason: &'static str) {
        self.cases.push(Case { name: name.into(), bytes, claims: ANY, reason });
    }

    /// Adds an image that is refused for its claim.
    pub fn add_lie(
        &mut self,
        name: impl Into<String>,
        bytes: Vec<u8>,
        claims: &'static [Option<Format>],
        reason: &'static str,
    ) {
        self.cases.push(Case { name: name.into(), bytes, claims, reason });
    }

    /// Adds a spoiled qcow2 image, in versions 2 and 3.
    fn spoil(&mut self, name: impl std::fmt::Display, reason: &'static str, change: impl Fn(&mut Qcow2)) {
        for version in [2, 3] {
            self.add(format!("qcow2 v{version}: {name}"), Qcow2::new(version).with(&change), reason);
        }
    }

    /// The same for what only version 3 has.
    fn spoil_v3(&mut self, name: impl std::fmt::Display, reason: &'static str, change: impl Fn(&mut Qcow2)) {
        self.add(format!("qcow2 v3: {name}"), Qcow2::new(3).with(change), reason);
    }
}

/// All of them.
pub fn corpus(canary: &Path) -> Vec<Case> {
    let canary = canary.to_str().expect("UTF-8");
    let mut corpus = Corpus { canary, cases: Vec::new() };
    backing_files(&mut corpus);
    data_files(&mut corpus);
    versions_and_features(&mut corpus);
    impossible_numbers(&mut corpus);
    tables(&mut corpus);
    marks(&mut corpus);
    extensions(&mut corpus);
    cut_short(&mut corpus);
    polyglots(&mut corpus);
    foreign::add(&mut corpus);
    lies(&mut corpus);
    corpus.cases
}

/// What is accepted in the same run: name, bytes, claim, format.
pub fn controls() -> Vec<(&'static str, Vec<u8>, Option<Format>, Format)> {
    let mut disk = vec![0; 64 << 10];
    disk[510..512].copy_from_slice(b"\x55\xaa");
    let mut iso = vec![0; 64 << 10];
    iso[32769..32774].copy_from_slice(b"CD001");
    let mut nested = disk.clone();
    nested[512..512 + END as usize].copy_from_slice(&Qcow2::new(3).with(|image| image.back(b"/etc/shadow", None)));
    vec![
        ("qcow2 v2", Qcow2::new(2).bytes, None, Format::Qcow2),
        ("qcow2 v3", Qcow2::new(3).bytes, None, Format::Qcow2),
        ("qcow2 v3, claimed", Qcow2::new(3).bytes, Some(Format::Qcow2), Format::Qcow2),
        ("raw", vec![0; 64 << 10], None, Format::Raw),
        ("raw with partitions", disk, Some(Format::Raw), Format::Raw),
        ("raw ISO 9660", iso, None, Format::Raw),
        // Only a guest sees it, as content of its disk: the disk is raw for everybody, by the record.
        ("raw with a hostile qcow2 in its second sector", nested, None, Format::Raw),
    ]
}

fn names(canary: &str) -> Vec<(&'static str, String)> {
    let json = |driver: &str, key: &str| {
        format!("json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"{driver}\",\"{key}\":\"{canary}\"}}}}")
    };
    vec![
        ("absolute path", canary.to_owned()),
        ("relative path", "canary".to_owned()),
        ("path upwards", format!("../../../..{canary}")),
        ("file:", format!("file:{canary}")),
        ("file://", format!("file://{canary}")),
        ("json: file", json("file", "filename")),
        ("json: host_device", json("host_device", "filename")),
        ("json: without a format", format!("json:{{\"file.filename\":\"{canary}\"}}")),
        ("nbd://", "nbd://127.0.0.1:10809/export".to_owned()),
        ("nbd:unix:", format!("nbd:unix:{canary}:exportname=x")),
        ("nbd+unix://", format!("nbd+unix:///x?socket={canary}")),
        ("http://", "http://169.254.169.254/latest/meta-data/".to_owned()),
        ("https://", "https://127.0.0.1/".to_owned()),
        ("ftp://", "ftp://127.0.0.1/".to_owned()),
        ("ssh://", "ssh://root@127.0.0.1/etc/shadow".to_owned()),
        ("iscsi://", "iscsi://127.0.0.1/target/0".to_owned()),
        ("rbd:", "rbd:rbd/image".to_owned()),
        ("/dev/", "/dev/vda".to_owned()),
        ("host_device:", "host_device:/dev/vda".to_owned()),
        ("/proc/self/fd/", "/proc/self/fd/0".to_owned()),
        ("fat:", "fat:rw:/etc".to_owned()),
        ("NUL inside", format!("x\0{canary}")),
    ]
}

fn backing_files(corpus: &mut Corpus) {
    let canary = corpus.canary.to_owned();
    for (kind, name) in names(&canary) {
        corpus.spoil(format_args!("backing file, {kind}"), "backing file", |image| image.back(name.as_bytes(), None));
        corpus.spoil(format_args!("backing file with a format, {kind}"), "backing file", |image| {
            image.back(name.as_bytes(), Some("raw"));
        });
    }
    let lies: [(&str, u64, u32); 7] = [
        ("offset without a length", 0x200, 0),
        ("length without an offset", 0, 9),
        ("offset past the end", END + CLUSTER, 9),
        ("offset without bounds", u64::MAX, 9),
        ("length without bounds", 0x200, u32::MAX),
        ("name in the data", DATA, 9),
        ("name across the end", END - 1, 9),
    ];
    for (kind, offset, length) in lies {
        corpus.spoil(format_args!("backing file, {kind}"), "backing file", |image| {
            image.put64(field::BACKING_OFFSET, offset);
            image.put32(field::BACKING_LENGTH, length);
        });
    }
    for format in ["raw", "qcow2", "vmdk", "", "a format of more than sixteen letters"] {
        corpus.spoil(format_args!("a backing format '{format}' alone"), "backing file", |image| {
            let at = image.extensions();
            image.extend(at, qcow2::BACKING_FORMAT, format.as_bytes());
        });
    }
}

fn data_files(corpus: &mut Corpus) {
    let canary = corpus.canary.to_owned();
    let external = 1 << 2;
    for (kind, name) in names(&canary) {
        corpus.spoil_v3(format_args!("external data file, {kind}"), "external file", |image| {
            image.put64(field::INCOMPATIBLE, external);
            let at = image.extensions();
            image.extend(at, qcow2::DATA_FILE, name.as_bytes());
        });
        corpus.spoil_v3(format_args!("external data file without its bit, {kind}"), "external file", |image| {
            let at = image.extensions();
            image.extend(at, qcow2::DATA_FILE, name.as_bytes());
        });
    }
    corpus.spoil_v3("external data file by its bit alone", "external file", |image| {
        image.put64(field::INCOMPATIBLE, external);
    });
    corpus.spoil_v3("raw external data file", "external file", |image| {
        image.put64(field::INCOMPATIBLE, external);
        image.put64(field::AUTOCLEAR, 1 << 1);
    });
    corpus.spoil_v3("raw external data file by its autoclear bit alone", "external file", |image| {
        image.put64(field::AUTOCLEAR, 1 << 1);
    });
    corpus.spoil("external data file behind other extensions", "external file", |image| {
        let mut at = image.extensions();
        for length in [0, 1, 7, 8, 9] {
            at = image.extend(at, 0x1234_0000 + length, &vec![7; length as usize]);
        }
        at = image.extend(at, qcow2::FEATURE_NAMES, &[0; 48]);
        image.extend(at, qcow2::DATA_FILE, canary.as_bytes());
    });
    corpus.spoil_v3("external data file and backing file", "backing file", |image| {
        image.back(canary.as_bytes(), None);
        image.put64(field::INCOMPATIBLE, external);
    });
}

fn versions_and_features(corpus: &mut Corpus) {
    for version in [0, 1, 4, 5, 0x0200_0000, 0x0300_0000, u32::MAX] {
        corpus.spoil_v3(format_args!("version {version:#x}"), "version", |image| image.put32(field::VERSION, version));
    }
    for bit in 5..64 {
        corpus.spoil_v3(format_args!("incompatible feature {bit}"), "features that are unknown", |image| {
            image.put64(field::INCOMPATIBLE, 1 << bit);
        });
    }
    corpus.spoil_v3("all incompatible features", "features that are unknown", |image| {
        image.put64(field::INCOMPATIBLE, u64::MAX);
    });
    for (bit, kind) in [(0, 1), (0, 2), (0, 255), (1 << 3, 0), (1 << 3, 2), (1 << 3, 255)] {
        corpus.spoil_v3(format_args!("compression {kind} with feature bits {bit:#x}"), "compression", |image| {
            image.put64(field::INCOMPATIBLE, bit);
            image.put(field::COMPRESSION, &[kind]);
        });
    }
    corpus.spoil_v3("compression feature without its field", "compression", |image| {
        image.put64(field::INCOMPATIBLE, 1 << 3);
        image.put32(field::HEADER_LENGTH, 104);
    });
    corpus.spoil_v3("extended L2 entries with small clusters", "cluster size", |image| {
        image.put64(field::INCOMPATIBLE, 1 << 4);
    });
    corpus.spoil_v3("a header field that nobody knows", "unknown", |image| {
        image.put32(field::HEADER_LENGTH, 120);
        image.put(112, &[1]);
    });
}

fn impossible_numbers(corpus: &mut Corpus) {
    for length in [0, 8, 72, 96, 103, 105, 108, CLUSTER as u32 + 8, 0x7fff_fff8, 0xffff_fff8, u32::MAX] {
        corpus.spoil_v3(format_args!("header of {length} bytes"), "header length", |image| {
            image.put32(field::HEADER_LENGTH, length);
        });
    }
    for bits in [0, 1, 8, 22, 31, 32, 63, 64, 255, 0x7fff_ffff, u32::MAX] {
        corpus.spoil(format_args!("clusters of 2^{bits} bytes"), "cluster size", |image| {
            image.put32(field::CLUSTER_BITS, bits);
        });
    }
    for bits in [13, 16, 21] {
        corpus.spoil(format_args!("clusters of 2^{bits} bytes that no table keeps to"), "", |image| {
            image.put32(field::CLUSTER_BITS, bits);
        });
    }
    for size in [0, 1, 511, 513, (64 << 40) + 512, 1 << 60, (1 << 60) + 512, 1 << 63, !511, u64::MAX] {
        corpus.spoil(format_args!("virtual size {size}"), "virtual size", |image| {
            image.put64(field::VIRTUAL_SIZE, size);
        });
    }
    for order in [7, 8, 31, 32, 63, 64, u32::MAX] {
        corpus.spoil_v3(format_args!("refcounts of 2^{order} bits"), "refcount order", |image| {
            image.put32(field::REFCOUNT_ORDER, order);
        });
    }
}

fn tables(corpus: &mut Corpus) {
    for entries in [0, 2000, (4 << 20) + 1, 0x2000_0000, u32::MAX] {
        corpus.spoil(format_args!("{entries} L1 entries"), "L1 table", |image| {
            image.put32(field::L1_ENTRIES, entries);
        });
    }
    corpus.spoil("an L1 table that is too small", "L1 table", |image| {
        image.put64(field::VIRTUAL_SIZE, VIRTUAL_SIZE_OF_TWO_TABLES);
    });
    for offset in [0, 8, 512, L1_TABLE + 8, END, END + CLUSTER, 1 << 40, 1 << 63, !(CLUSTER - 1), u64::MAX] {
        corpus.spoil(format_args!("L1 table at {offset:#x}"), "L1 table", |image| {
            image.put64(field::L1_OFFSET, offset);
        });
        corpus.spoil(format_args!("refcount table at {offset:#x}"), "refcount table", |image| {
            image.put64(field::REFCOUNT_OFFSET, offset);
        });
    }
    for clusters in [0, 6, 2049, 0x0010_0000, 0x7fff_ffff, u32::MAX] {
        corpus.spoil(format_args!("refcount table of {clusters} clusters"), "refcount table", |image| {
            image.put32(field::REFCOUNT_CLUSTERS, clusters);
        });
    }
    corpus.spoil("L1 table in the refcount table", "overlap", |image| image.put64(field::L1_OFFSET, REFCOUNT_TABLE));
    for (kind, entry, reason) in [
        ("past the end", END, "past the end"),
        ("far past the end", 0x00ff_ffff_ffff_f000, "past the end"),
        ("into the header", 0x200, "not aligned"),
        ("not aligned", L2_TABLE + 0x200, "not aligned"),
        ("at the L1 table", L1_TABLE, "overlap"),
        ("at the refcount table", REFCOUNT_TABLE, "overlap"),
    ] {
        corpus.spoil(format_args!("an L1 entry {kind}"), reason, |image| image.put64(L1_TABLE, entry));
        corpus.spoil(format_args!("an L2 entry {kind}"), reason, |image| image.put64(L2_TABLE, entry));
        corpus.spoil(format_args!("a refcount block {kind}"), reason, |image| image.put64(REFCOUNT_TABLE, entry));
    }
    corpus.spoil("an L2 entry at its own table", "overlap", |image| image.put64(L2_TABLE, L2_TABLE));
    corpus.spoil("a compressed cluster past the end", "past the end", |image| {
        image.put64(L2_TABLE, 1 << 62 | (END + 5));
    });
    corpus.spoil("two L1 entries with one L2 table", "overlap", |image| {
        image.put64(field::VIRTUAL_SIZE, VIRTUAL_SIZE_OF_TWO_TABLES);
        image.put32(field::L1_ENTRIES, 2);
        image.put64(L1_TABLE + 8, L2_TABLE);
    });
}

const VIRTUAL_SIZE_OF_TWO_TABLES: u64 = 2 * qcow2::VIRTUAL_SIZE;

fn marks(corpus: &mut Corpus) {
    for method in [1, 2, 3, u32::MAX] {
        corpus.spoil(format_args!("encryption method {method}"), "encrypted", |image| {
            image.put32(field::ENCRYPTION, method);
        });
    }
    corpus.spoil("an encryption header alone", "encrypted", |image| {
        let at = image.extensions();
        image.extend(at, qcow2::FULL_DISK_ENCRYPTION, &[0; 16]);
    });
    corpus.spoil_v3("dirty", "not closed cleanly", |image| image.put64(field::INCOMPATIBLE, 1 << 0));
    corpus.spoil_v3("corrupt", "marked as corrupt", |image| image.put64(field::INCOMPATIBLE, 1 << 1));
    corpus.spoil_v3("dirty and corrupt", "", |image| image.put64(field::INCOMPATIBLE, 3));
    for (count, offset) in [(1, DATA), (1, 0), (65536, DATA), (u32::MAX, END), (7, u64::MAX)] {
        corpus.spoil(format_args!("{count} snapshots at {offset:#x}"), "internal snapshots", |image| {
            image.put32(field::SNAPSHOTS, count);
            image.put64(field::SNAPSHOTS_OFFSET, offset);
        });
    }
    corpus.spoil_v3("bitmaps by their bit", "bitmaps", |image| image.put64(field::AUTOCLEAR, 1));
    corpus.spoil_v3("bitmaps with a directory past the end", "bitmaps", |image| {
        image.put64(field::AUTOCLEAR, 1);
        let mut content = [0u8; 24];
        content[..4].copy_from_slice(&u32::MAX.to_be_bytes());
        content[8..16].copy_from_slice(&u64::MAX.to_be_bytes());
        content[16..].copy_from_slice(&END.to_be_bytes());
        let at = image.extensions();
        image.extend(at, qcow2::BITMAPS, &content);
    });
}

fn extensions(corpus: &mut Corpus) {
    for length in [CLUSTER as u32, 0x7fff_ffff, u32::MAX - 7, u32::MAX] {
        corpus.spoil(format_args!("an extension of {length} bytes"), "header extensions", |image| {
            let at = image.extensions();
            image.put32(at, 0x1234_5678);
            image.put32(at + 4, length);
        });
    }
    corpus.spoil("an extension of a byte too much", "header extensions", |image| {
        let at = image.extensions();
        image.put32(at, 0x1234_5678);
        image.put32(at + 4, (CLUSTER - at - 8) as u32 + 1);
    });
    let canary = corpus.canary.to_owned();
    corpus.spoil("a name behind the last extension", "behind its header", |image| {
        let at = image.extensions();
        image.put(at + 8, canary.as_bytes());
    });
}

fn cut_short(corpus: &mut Corpus) {
    for version in [2, 3] {
        let whole = Qcow2::new(version).bytes;
        let in_header = [1, 3, 4, 7, 8, 20, 32, 64, 71, 72, 100, 103, 104, 111, 112, 511, 512];
        let around_tables = [CLUSTER - 1, CLUSTER, CLUSTER + 1, REFCOUNT_BLOCK, L1_TABLE, L1_TABLE + 7, L1_TABLE + 8];
        let lengths = in_header.into_iter().chain(around_tables).chain([L2_TABLE, L2_TABLE + 1, DATA - 1, DATA]);
        // The first eight bytes hold the version.
        for length in lengths.filter(|length| version == 2 || *length >= 8) {
            corpus.add(format!("qcow2 v{version} cut to {length} bytes"), whole[..length as usize].to_vec(), "");
        }
    }
    corpus.add("nothing", Vec::new(), "empty");
    for length in [1, 511] {
        corpus.add(format!("{length} bytes"), vec![7; length], "empty");
    }
}

/// Two formats at once, of which each reader chooses its own.
fn polyglots(corpus: &mut Corpus) {
    let canary = corpus.canary.to_owned();
    for version in [2, 3] {
        let large = |version: u32| {
            // A header cluster that reaches past 32 KiB, where an ISO 9660 begins.
            let mut image = Qcow2::new(version);
            let parts = [REFCOUNT_TABLE, REFCOUNT_BLOCK, L1_TABLE, L2_TABLE, DATA];
            let mut bytes = vec![0; 6 << 16];
            bytes[..CLUSTER as usize].copy_from_slice(&image.bytes[..CLUSTER as usize]);
            for (index, part) in parts.into_iter().enumerate() {
                let to = (index + 1) << 16;
                let part = part as usize;
                bytes[to..to + CLUSTER as usize].copy_from_slice(&image.bytes[part..part + CLUSTER as usize]);
            }
            image.bytes = bytes;
            image.put32(field::CLUSTER_BITS, 16);
            image.put64(field::REFCOUNT_OFFSET, 1 << 16);
            image.put64(field::L1_OFFSET, 3 << 16);
            image.put64(1 << 16, 2 << 16);
            image.put64(3 << 16, 4 << 16);
            image.put64(4 << 16, 5 << 16);
            image
        };
        for (kind, at, magic) in [
            ("ISO 9660", 32769, &b"CD001"[..]),
            ("UDF", 32769, b"NSR02"),
            ("UDF", 32769, b"NSR03"),
            ("a boot sector", 510, b"\x55\xaa"),
            ("VDI", 0x40, b"\x7f\x10\xda\xbe"),
            ("a partition table", 512, b"EFI PART"),
            ("tar", 257, b"ustar"),
        ] {
            let name = format!("qcow2 v{version} that is {kind} ({}) too", String::from_utf8_lossy(magic));
            corpus.add(name, large(version).with(|image| image.put(at, magic)), "");
        }
    }
    let mut boot = foreign::descriptor("monolithicFlat", &format!("RW 1 FLAT \"{canary}\" 0"), "\n").into_bytes();
    boot.resize(4096, 0);
    boot[510..512].copy_from_slice(b"\x55\xaa");
    corpus.add("a boot sector that is a VMDK descriptor", boot.clone(), "VMDK");
    boot.resize(64 << 10, 0);
    boot[32769..32774].copy_from_slice(b"CD001");
    corpus.add("an ISO 9660 that is a VMDK descriptor", boot, "VMDK");
    let mut iso = vec![0; 64 << 10];
    iso[32769..32774].copy_from_slice(b"CD001");
    for (kind, magic) in [("VHDX", &b"vhdxfile"[..]), ("QED", b"QED\0"), ("LUKS", b"LUKS\xba\xbe\0\x01")] {
        let mut bytes = iso.clone();
        bytes[..magic.len()].copy_from_slice(magic);
        corpus.add(format!("an ISO 9660 that is {kind} too"), bytes, "");
    }
}

/// Sound images under a wrong name.
fn lies(corpus: &mut Corpus) {
    const QCOW2: &[Option<Format>] = &[Some(Format::Qcow2)];
    const RAW: &[Option<Format>] = &[Some(Format::Raw)];
    for (name, bytes, _, format) in controls().into_iter().filter(|(_, _, claim, _)| claim.is_none()) {
        match format {
            Format::Raw => corpus.add_lie(format!("{name}, claimed qcow2"), bytes, QCOW2, "not qcow2"),
            Format::Qcow2 => corpus.add_lie(format!("{name}, claimed raw"), bytes, RAW, "claims to be raw"),
        }
    }
    let canary = corpus.canary.to_owned();
    for version in [2, 3] {
        let bytes = Qcow2::new(version).with(|image| image.back(canary.as_bytes(), Some("raw")));
        corpus.add_lie(format!("qcow2 v{version}, backing file, claimed raw"), bytes, RAW, "claims to be raw");
    }
}
