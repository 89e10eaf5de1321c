//! Where the tables lead: to clusters that are in the file, and not onto each other.

use std::ops::Range;

use super::{Refusal, Source, TABLE_ENTRY_BYTES, u64_at};

/// The offset in an entry of a table.
const ENTRY_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const ENTRY_COMPRESSED: u64 = 1 << 62;

/// How much of a table is read at once, in bytes.
const PART_BYTES: u64 = 64 << 10;

/// The tables that the header names, all within the file.
pub(super) struct Tables<'a> {
    /// The L1 table.
    pub(super) l1: &'a Range<u64>,
    /// Its part that maps what a guest sees.
    pub(super) needed: &'a Range<u64>,
    /// The refcount table.
    pub(super) refcount_table: &'a Range<u64>,
    /// The size of a cluster is 2 to the power of this.
    pub(super) cluster_bits: u32,
    /// The length of the file, in bytes.
    pub(super) length: u64,
}

impl Tables<'_> {
    /// Follows the tables to every cluster. The last one may be cut short: QEMU itself writes no more of it than it has
    /// to.
    pub(super) fn walk(&self, source: &impl Source, l2_entry_bytes: usize) -> Result<(), Refusal> {
        if self.l1.start < self.refcount_table.end && self.refcount_table.start < self.l1.end {
            return Err(Refusal::Overlap);
        }
        entries(source, self.refcount_table, |block| self.check(block))?;
        let mut l2_tables = Vec::with_capacity(((self.needed.end - self.needed.start) / TABLE_ENTRY_BYTES) as usize);
        entries(source, self.needed, |table| {
            self.check(table)?;
            l2_tables.push(table);
            Ok(())
        })?;
        l2_tables.sort_unstable();
        // Only internal snapshots share tables, and there are none.
        if l2_tables.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(Refusal::Overlap);
        }
        let mut table = vec![0u8; 1 << self.cluster_bits];
        for offset in &l2_tables {
            // It maps nothing: as many such tables as L1 can name would be 64 GiB of zeros.
            let range = *offset..offset + table.len() as u64;
            if range.end <= self.length && source.is_hole(&range) {
                continue;
            }
            if source.read_upto(&mut table, *offset)? < table.len() {
                return Err(Refusal::MissingClusters);
            }
            for entry in table.chunks_exact(l2_entry_bytes) {
                self.check_l2_entry(u64_at(entry, 0)?, &l2_tables)?;
            }
        }
        Ok(())
    }

    fn check_l2_entry(&self, entry: u64, l2_tables: &[u64]) -> Result<(), Refusal> {
        if entry & ENTRY_COMPRESSED != 0 {
            let offset = entry & ((1 << (62 - (self.cluster_bits - 8))) - 1);
            return if offset >= self.length { Err(Refusal::MissingClusters) } else { Ok(()) };
        }
        let offset = entry & ENTRY_OFFSET;
        if offset == 0 {
            return Ok(());
        }
        self.check(offset)?;
        if l2_tables.binary_search(&offset).is_ok() { Err(Refusal::Overlap) } else { Ok(()) }
    }

    /// Judges the offset of a cluster.
    fn check(&self, offset: u64) -> Result<(), Refusal> {
        if !offset.is_multiple_of(1 << self.cluster_bits) {
            return Err(Refusal::Misaligned);
        }
        if offset >= self.length {
            return Err(Refusal::MissingClusters);
        }
        if self.l1.contains(&offset) || self.refcount_table.contains(&offset) {
            return Err(Refusal::Overlap);
        }
        Ok(())
    }
}

/// Calls `each` with the offset in each entry of the table at `range` that has one.
fn entries(
    source: &impl Source,
    range: &Range<u64>,
    mut each: impl FnMut(u64) -> Result<(), Refusal>,
) -> Result<(), Refusal> {
    let mut part = vec![0u8; PART_BYTES.min(range.end - range.start) as usize];
    let mut at = range.start;
    while at < range.end {
        let wanted = part.len().min((range.end - at) as usize);
        let part = part.get_mut(..wanted).unwrap_or_default();
        if source.read_upto(part, at)? < wanted {
            return Err(Refusal::MissingClusters);
        }
        for entry in part.chunks_exact(TABLE_ENTRY_BYTES as usize) {
            let offset = u64_at(entry, 0)? & ENTRY_OFFSET;
            if offset != 0 {
                each(offset)?;
            }
        }
        at += wanted as u64;
    }
    Ok(())
}
