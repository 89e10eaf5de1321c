//! A sound small qcow2 image, made byte by byte, for others to spoil.

/// Small clusters keep the images small.
pub const CLUSTER_BITS: u32 = 12;
pub const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// One L2 table's worth.
pub const VIRTUAL_SIZE: u64 = 2 << 20;

/// Where the parts of the image lie, in bytes.
pub const REFCOUNT_TABLE: u64 = CLUSTER;
pub const REFCOUNT_BLOCK: u64 = 2 * CLUSTER;
pub const L1_TABLE: u64 = 3 * CLUSTER;
pub const L2_TABLE: u64 = 4 * CLUSTER;
pub const DATA: u64 = 5 * CLUSTER;
pub const END: u64 = 6 * CLUSTER;

/// Where the fields of the header lie, in bytes.
pub mod field {
    pub const VERSION: u64 = 4;
    pub const BACKING_OFFSET: u64 = 8;
    pub const BACKING_LENGTH: u64 = 16;
    pub const CLUSTER_BITS: u64 = 20;
    pub const VIRTUAL_SIZE: u64 = 24;
    pub const ENCRYPTION: u64 = 32;
    pub const L1_ENTRIES: u64 = 36;
    pub const L1_OFFSET: u64 = 40;
    pub const REFCOUNT_OFFSET: u64 = 48;
    pub const REFCOUNT_CLUSTERS: u64 = 56;
    pub const SNAPSHOTS: u64 = 60;
    pub const SNAPSHOTS_OFFSET: u64 = 64;
    pub const INCOMPATIBLE: u64 = 72;
    pub const AUTOCLEAR: u64 = 88;
    pub const REFCOUNT_ORDER: u64 = 96;
    pub const HEADER_LENGTH: u64 = 100;
    pub const COMPRESSION: u64 = 104;
}

/// What marks a cluster as referenced once.
const COPIED: u64 = 1 << 63;

/// The kinds of header extensions.
pub const BACKING_FORMAT: u32 = 0xe279_2aca;
pub const FULL_DISK_ENCRYPTION: u32 = 0x0537_be77;
pub const DATA_FILE: u32 = 0x4441_5441;
pub const BITMAPS: u32 = 0x2385_2875;
pub const FEATURE_NAMES: u32 = 0x6803_f857;

#[derive(Clone)]
pub struct Qcow2 {
    pub version: u32,
    pub bytes: Vec<u8>,
}

impl Qcow2 {
    /// A sound image with one cluster of data.
    pub fn new(version: u32) -> Qcow2 {
        let mut image = Qcow2 { version, bytes: vec![0; END as usize] };
        image.bytes[..4].copy_from_slice(b"QFI\xfb");
        image.put32(field::VERSION, version);
        image.put32(field::CLUSTER_BITS, CLUSTER_BITS);
        image.put64(field::VIRTUAL_SIZE, VIRTUAL_SIZE);
        image.put32(field::L1_ENTRIES, 1);
        image.put64(field::L1_OFFSET, L1_TABLE);
        image.put64(field::REFCOUNT_OFFSET, REFCOUNT_TABLE);
        image.put32(field::REFCOUNT_CLUSTERS, 1);
        if version == 3 {
            image.put32(field::REFCOUNT_ORDER, 4);
            image.put32(field::HEADER_LENGTH, 112);
        }
        image.put64(REFCOUNT_TABLE, REFCOUNT_BLOCK);
        for cluster in 0..END / CLUSTER {
            image.bytes[(REFCOUNT_BLOCK + cluster * 2 + 1) as usize] = 1;
        }
        image.put64(L1_TABLE, L2_TABLE | COPIED);
        image.put64(L2_TABLE, DATA | COPIED);
        image.bytes[DATA as usize..].fill(0x5a);
        image
    }

    pub fn put32(&mut self, at: u64, value: u32) {
        self.put(at, &value.to_be_bytes());
    }

    pub fn put64(&mut self, at: u64, value: u64) {
        self.put(at, &value.to_be_bytes());
    }

    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        let at = at as usize;
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Where extensions begin.
    pub fn extensions(&self) -> u64 {
        if self.version == 2 { 72 } else { 112 }
    }

    /// Writes an extension and returns where the next one begins.
    pub fn extend(&mut self, at: u64, kind: u32, content: &[u8]) -> u64 {
        self.put32(at, kind);
        self.put32(at + 4, content.len() as u32);
        self.put(at + 8, content);
        at + 8 + (content.len() as u64).next_multiple_of(8)
    }

    /// Names a backing file as qemu-img does: the name behind the extensions.
    pub fn back(&mut self, name: &[u8], format: Option<&str>) {
        let mut at = self.extensions();
        if let Some(format) = format {
            at = self.extend(at, BACKING_FORMAT, format.as_bytes());
        }
        let at = at + 8;
        self.put(at, name);
        self.put64(field::BACKING_OFFSET, at);
        self.put32(field::BACKING_LENGTH, name.len() as u32);
    }

    /// The image after a change.
    pub fn with(&self, change: impl FnOnce(&mut Qcow2)) -> Vec<u8> {
        let mut image = self.clone();
        change(&mut image);
        image.bytes
    }
}
