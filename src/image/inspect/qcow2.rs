//! qcow2, versions 2 and 3, by QEMU's `docs/interop/qcow2.txt`: header, extensions, and the place of the tables.
//!
//! Numbers are big-endian. What clusters hold is not judged, but that every cluster is there is: QEMU reads what is
//! missing at the end of a file as zeros, so that an upload cut short would boot, and its guest find its files gone.

mod tables;

use std::ops::Range;

use super::{Examined, MAX_VIRTUAL_SIZE_BYTES, Refusal, SECTOR_BYTES, Source};
use crate::image::{Format, Inspected};

pub(super) const MAGIC: &[u8] = b"QFI\xfb";

/// The header of version 2, and the least of version 3, in bytes.
const V2_HEADER_BYTES: u64 = 72;
const V3_HEADER_BYTES: u32 = 104;
/// The most that we read of a header; QEMU 10 writes 112.
const MAX_HEADER_BYTES: u64 = 512;

const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
const EXTENDED_L2_CLUSTER_BITS: u32 = 14;

/// QEMU's own bounds on the tables, in bytes.
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
const TABLE_ENTRY_BYTES: u64 = 8;

const INCOMPATIBLE_DIRTY: u64 = 1 << 0;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
const INCOMPATIBLE_KNOWN: u64 = INCOMPATIBLE_DIRTY
    | INCOMPATIBLE_CORRUPT
    | INCOMPATIBLE_DATA_FILE
    | INCOMPATIBLE_COMPRESSION
    | INCOMPATIBLE_EXTENDED_L2;

const AUTOCLEAR_BITMAPS: u64 = 1 << 0;
const AUTOCLEAR_RAW_DATA_FILE: u64 = 1 << 1;

const COMPRESSION_DEFLATE: u8 = 0;
const COMPRESSION_ZSTD: u8 = 1;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_ENCRYPTION: u32 = 0x0537_be77;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

/// The fields that version 2 lacks, with the values that it implies.
struct Features {
    incompatible: u64,
    autoclear: u64,
    refcount_order: u32,
    header_length: u64,
    compression: u8,
}

/// Judges a file of `length` bytes that begins with [`MAGIC`].
pub(super) fn examine(source: &impl Source, length: u64) -> Result<Examined, Refusal> {
    let mut header = [0u8; MAX_HEADER_BYTES as usize];
    let header_read = source.read_upto(&mut header, 0)?;
    let header = header.get(..header_read).unwrap_or_default();

    let version = u32_at(header, 4)?;
    if !(2..=3).contains(&version) {
        return Err(Refusal::Version(version));
    }
    if u64_at(header, 8)? != 0 || u32_at(header, 16)? != 0 {
        return Err(Refusal::BackingFile);
    }
    let cluster_bits = u32_at(header, 20)?;
    if !CLUSTER_BITS.contains(&cluster_bits) {
        return Err(Refusal::ClusterBits(cluster_bits));
    }
    let cluster_bytes = 1u64 << cluster_bits;
    let virtual_size_bytes = u64_at(header, 24)?;
    if u32_at(header, 32)? != 0 {
        return Err(Refusal::Encrypted);
    }
    let l1_entries = u64::from(u32_at(header, 36)?);
    let l1_offset = u64_at(header, 40)?;
    let refcount_table_offset = u64_at(header, 48)?;
    let refcount_table_clusters = u64::from(u32_at(header, 56)?);
    if u32_at(header, 60)? != 0 {
        return Err(Refusal::InternalSnapshots);
    }
    // The field ends at byte 72; reading it proves that a version 2 header is complete.
    let _snapshots_offset = u64_at(header, 64)?;

    let features = features(header, version, cluster_bytes)?;
    judge_features(&features, cluster_bits)?;

    if virtual_size_bytes == 0 || virtual_size_bytes > MAX_VIRTUAL_SIZE_BYTES || virtual_size_bytes % SECTOR_BYTES != 0
    {
        return Err(Refusal::VirtualSize(virtual_size_bytes));
    }
    let l2_entry_bytes = if features.incompatible & INCOMPATIBLE_EXTENDED_L2 == 0 { 8 } else { 16 };
    // At most 2 MiB * 2^18 entries = 2^39 bytes: no overflow.
    let bytes_per_l1_entry = cluster_bytes * (cluster_bytes / l2_entry_bytes);
    // More entries than needed are legitimate: shrinking an image and deleting its snapshots leave them behind.
    if l1_entries < virtual_size_bytes.div_ceil(bytes_per_l1_entry) {
        return Err(Refusal::L1Table("is too small for the virtual size"));
    }
    let l1 = table(l1_offset, l1_entries * TABLE_ENTRY_BYTES, MAX_L1_BYTES, cluster_bytes, length)
        .map_err(Refusal::L1Table)?;
    let refcount_table = table(
        refcount_table_offset,
        refcount_table_clusters * cluster_bytes,
        MAX_REFCOUNT_TABLE_BYTES,
        cluster_bytes,
        length,
    )
    .map_err(Refusal::RefcountTable)?;

    walk_extensions(source, features.header_length, cluster_bytes)?;
    let needed = l1.start..l1.start + virtual_size_bytes.div_ceil(bytes_per_l1_entry) * TABLE_ENTRY_BYTES;
    let tables = tables::Tables { l1: &l1, needed: &needed, refcount_table: &refcount_table, cluster_bits, length };
    tables.walk(source, l2_entry_bytes as usize)?;

    Ok(Examined {
        inspected: Inspected { format: Format::Qcow2, virtual_size_bytes },
        // Tables are aligned and not at 0, so the whole first cluster lies within the file.
        metadata: vec![0..cluster_bytes, l1, refcount_table],
    })
}

fn features(header: &[u8], version: u32, cluster_bytes: u64) -> Result<Features, Refusal> {
    if version == 2 {
        return Ok(Features {
            incompatible: 0,
            autoclear: 0,
            refcount_order: 4,
            header_length: V2_HEADER_BYTES,
            compression: COMPRESSION_DEFLATE,
        });
    }
    let header_length = u32_at(header, 100)?;
    if header_length < V3_HEADER_BYTES
        || header_length % 8 != 0
        || u64::from(header_length) > cluster_bytes.min(MAX_HEADER_BYTES)
    {
        return Err(Refusal::HeaderLength(header_length));
    }
    let known = (V3_HEADER_BYTES as usize + 1).min(header_length as usize);
    let unknown = header.get(known..header_length as usize).ok_or(Refusal::Truncated)?;
    if unknown.iter().any(|byte| *byte != 0) {
        return Err(Refusal::UnknownHeaderFields);
    }
    let compression = if header_length > V3_HEADER_BYTES {
        *header.get(V3_HEADER_BYTES as usize).ok_or(Refusal::Truncated)?
    } else {
        COMPRESSION_DEFLATE
    };
    Ok(Features {
        incompatible: u64_at(header, 72)?,
        autoclear: u64_at(header, 88)?,
        refcount_order: u32_at(header, 96)?,
        header_length: u64::from(header_length),
        compression,
    })
}

fn judge_features(features: &Features, cluster_bits: u32) -> Result<(), Refusal> {
    let has = |bit: u64| features.incompatible & bit != 0;
    let unknown = features.incompatible & !INCOMPATIBLE_KNOWN;
    if unknown != 0 {
        return Err(Refusal::UnknownFeatures(unknown));
    }
    if has(INCOMPATIBLE_DATA_FILE) || features.autoclear & AUTOCLEAR_RAW_DATA_FILE != 0 {
        return Err(Refusal::DataFile);
    }
    if has(INCOMPATIBLE_CORRUPT) {
        return Err(Refusal::Corrupt);
    }
    if has(INCOMPATIBLE_DIRTY) {
        return Err(Refusal::Dirty);
    }
    let expected_compression = if has(INCOMPATIBLE_COMPRESSION) { COMPRESSION_ZSTD } else { COMPRESSION_DEFLATE };
    if features.compression != expected_compression {
        return Err(Refusal::Compression(features.compression));
    }
    if has(INCOMPATIBLE_EXTENDED_L2) && cluster_bits < EXTENDED_L2_CLUSTER_BITS {
        return Err(Refusal::ClusterBits(cluster_bits));
    }
    // Without the bit the extension is void, and QEMU ignores it.
    if features.autoclear & AUTOCLEAR_BITMAPS != 0 {
        return Err(Refusal::Bitmaps);
    }
    if features.refcount_order > 6 {
        return Err(Refusal::RefcountOrder(features.refcount_order));
    }
    Ok(())
}

/// The range of a table, or what is wrong with it. Offset 0 is the header, so no table can be there.
fn table(
    offset: u64,
    bytes: u64,
    most_bytes: u64,
    cluster_bytes: u64,
    length: u64,
) -> Result<Range<u64>, &'static str> {
    if bytes == 0 {
        return Err("is missing");
    }
    if bytes > most_bytes {
        return Err("is absurdly large");
    }
    if offset == 0 || !offset.is_multiple_of(cluster_bytes) {
        return Err("does not begin at a cluster of its own");
    }
    match offset.checked_add(bytes) {
        Some(end) if end <= length => Ok(offset..end),
        Some(_) | None => Err("reaches past the end of the file"),
    }
}

/// Walks the extensions between the header and the end of the first cluster. Each step is at least 8 bytes, so this ends.
/// Behind the last one is nothing: the name of a backing file would be there, or the beginning of another format.
fn walk_extensions(source: &impl Source, header_length: u64, cluster_bytes: u64) -> Result<(), Refusal> {
    let mut cluster = vec![0u8; cluster_bytes as usize];
    let read = source.read_upto(&mut cluster, 0)?;
    let mut rest = cluster.get(header_length as usize..read).ok_or(Refusal::Truncated)?;
    while !rest.is_empty() {
        let (Ok(kind), Ok(bytes)) = (u32_at(rest, 0), u32_at(rest, 4)) else {
            return Err(Refusal::HeaderExtensions);
        };
        match kind {
            EXTENSION_END if rest.iter().any(|byte| *byte != 0) => return Err(Refusal::BehindHeader),
            EXTENSION_END => return Ok(()),
            EXTENSION_BACKING_FORMAT => return Err(Refusal::BackingFile),
            EXTENSION_DATA_FILE => return Err(Refusal::DataFile),
            EXTENSION_ENCRYPTION => return Err(Refusal::Encrypted),
            _unknown_or_harmless => {}
        }
        let step = 8 + u64::from(bytes).next_multiple_of(8);
        rest = rest.get(step as usize..).ok_or(Refusal::HeaderExtensions)?;
    }
    Ok(())
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, Refusal> {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk()).ok_or(Refusal::Truncated)?;
    Ok(u32::from_be_bytes(*field))
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64, Refusal> {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk()).ok_or(Refusal::Truncated)?;
    Ok(u64::from_be_bytes(*field))
}
