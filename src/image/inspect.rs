//! Which bytes we accept as an image. Reads only, trusts nothing, and needs at most the memory of the largest L1 table
//! that QEMU accepts (32 MiB) and of two clusters (4 MiB).
//!
//! A format is what the bytes say, never what a name or a user says; a claim can only be confirmed. Whatever could make
//! QEMU open a second file, or take the bytes for another format than we did, is refused.

mod foreign;
mod qcow2;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::extent::{Find, find};
use super::{Format, Inspected};

/// The largest virtual size that we accept, in bytes: 64 TiB.
pub const MAX_VIRTUAL_SIZE_BYTES: u64 = 64 << 40;

/// The unit of a virtual size, in bytes.
pub(crate) const SECTOR_BYTES: u64 = 512;

/// Why bytes are not accepted as an image: one variant per reason, each with what to do next.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The file could not be read at all.
    #[error("the image cannot be read: {0}")]
    Unreadable(String),
    /// Nothing, or less than a sector.
    #[error("the image is empty; write its data first")]
    Empty,
    /// Claimed qcow2, but the magic is missing.
    #[error("the image is not qcow2: its first bytes are not QFI\\xfb; set disk_format to what it is")]
    NotQcow2,
    /// Claimed raw, but it begins as a qcow2 does: a guest could name the host's files that way.
    #[error("the image claims to be raw but has a qcow2 header; set disk_format to qcow2")]
    Qcow2ClaimedRaw,
    /// A format that we know and do not accept.
    #[error("the image is {0}; convert it first: qemu-img convert -O qcow2")]
    ForeignFormat(&'static str),
    /// Bytes within an archive or a compressed file, which a guest would get as its disk.
    #[error("the image is packed as {0}; unpack it first")]
    Packed(&'static str),
    /// The header says more than the file holds.
    #[error("the image ends inside its qcow2 header; copy it again")]
    Truncated,
    /// Neither version 2 nor 3.
    #[error("qcow2 version {0} is not supported; convert it with qemu-img convert -O qcow2")]
    Version(u32),
    /// It depends on another file.
    #[error("the image has a backing file; flatten it with qemu-img convert -O qcow2")]
    BackingFile,
    /// Its data lies in another file.
    #[error("the image keeps its data in an external file; flatten it with qemu-img convert -O qcow2")]
    DataFile,
    /// Encrypted within qcow2.
    #[error("the image is encrypted; decrypt it with qemu-img convert first")]
    Encrypted,
    /// Carries internal snapshots.
    #[error("the image has internal snapshots; drop them with qemu-img convert -O qcow2")]
    InternalSnapshots,
    /// Carries dirty bitmaps, which every guest on it would have to load.
    #[error("the image has dirty bitmaps; drop them with qemu-img convert -O qcow2")]
    Bitmaps,
    /// The dirty bit.
    #[error("the image was not closed cleanly; repair it with qemu-img check -r all")]
    Dirty,
    /// The corrupt bit.
    #[error("the image is marked as corrupt; repair it with qemu-img check -r all")]
    Corrupt,
    /// Incompatible feature bits that this program does not know.
    #[error("the image needs features that are unknown here (bits {0:#x}); convert it with qemu-img convert -O qcow2")]
    UnknownFeatures(u64),
    /// A compression type that is unknown, or does not agree with its feature bit.
    #[error("the image's compression type {0} is unknown or contradicts its feature bits; convert it again")]
    Compression(u8),
    /// `header_length` is too small, not a multiple of 8 or longer than a cluster.
    #[error("the image's header length of {0} bytes is impossible; copy it again")]
    HeaderLength(u32),
    /// Cluster size outside 512 bytes to 2 MiB, or too small for extended L2 entries.
    #[error("the image's cluster size of 2^{0} bytes is not supported; convert it with qemu-img convert -O qcow2")]
    ClusterBits(u32),
    /// Reference counts wider than 64 bits.
    #[error("the image's refcount order {0} is impossible; copy it again")]
    RefcountOrder(u32),
    /// Zero, not whole sectors, or too much.
    #[error("the image's virtual size of {0} bytes is not between 512 bytes and 64 TiB in whole sectors")]
    VirtualSize(u64),
    /// The L1 table is not where and how large it must be.
    #[error("the image's L1 table {0}; copy it again, or repair it with qemu-img check")]
    L1Table(&'static str),
    /// A table leads behind the end of the file.
    #[error("parts of the image lie past the end of the file: it was cut short; copy it again")]
    MissingClusters,
    /// The refcount table is not where and how large it must be.
    #[error("the image's refcount table {0}; copy it again, or repair it with qemu-img check")]
    RefcountTable(&'static str),
    /// A header extension reaches past the header's cluster.
    #[error("the image's header extensions run past their cluster; copy it again")]
    HeaderExtensions,
    /// A field behind those that we know is not zero.
    #[error("the image's header has fields that are unknown here; convert it with qemu-img convert -O qcow2")]
    UnknownHeaderFields,
    /// Something lies between the last extension and the end of the header's cluster.
    #[error(
        "the image hides something behind its header, as if it were two formats; convert it with qemu-img convert -O qcow2"
    )]
    BehindHeader,
    /// An entry of a table is not a multiple of the cluster size.
    #[error(
        "offsets in the image's tables are not aligned to its clusters; copy it again, or repair it with qemu-img check"
    )]
    Misaligned,
    /// A table, or a cluster of data, lies where another table is.
    #[error("parts of the image overlap its tables; copy it again, or repair it with qemu-img check")]
    Overlap,
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Refusal {
        Refusal::Unreadable(error.to_string())
    }
}

/// Bytes at offsets: a file, or a slice in tests.
trait Source {
    /// Fills `buffer` from `offset` as far as the source reaches; returns how much that was.
    fn read_upto(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Whether these bytes are known to be zeros without reading them.
    fn is_hole(&self, range: &Range<u64>) -> bool;
}

impl Source for File {
    fn read_upto(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.read_at(rest, offset.saturating_add(done as u64)) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn is_hole(&self, range: &Range<u64>) -> bool {
        find(self, range.start, Find::Data).is_ok_and(|data| data.is_none_or(|data| data >= range.end))
    }
}

/// What was found, and where the bytes lie that `qemu-img info` needs to see.
#[derive(Debug)]
pub(crate) struct Examined {
    pub(crate) inspected: Inspected,
    /// Byte ranges within the file: header and tables. Empty for raw, whose size says everything.
    pub(crate) metadata: Vec<Range<u64>>,
}

/// Judges the bytes of `file`. Without a claim the format is qcow2 by its magic, and raw only if no known magic is
/// found. The position of `file` means nothing afterwards.
pub fn inspect(file: &File, claimed: Option<Format>) -> Result<Inspected, Refusal> {
    examine(file, claimed).map(|examined| examined.inspected)
}

/// [`inspect`], telling also where the metadata lies.
pub(crate) fn examine(file: &File, claimed: Option<Format>) -> Result<Examined, Refusal> {
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(Refusal::Unreadable("it is not a regular file".to_owned()));
    }
    examine_source(file, metadata.len(), claimed)
}

fn examine_source(source: &impl Source, length: u64, claimed: Option<Format>) -> Result<Examined, Refusal> {
    if length == 0 {
        return Err(Refusal::Empty);
    }
    let mut head = [0u8; SECTOR_BYTES as usize];
    let head_length = source.read_upto(&mut head, 0)?;
    let head = head.get(..head_length).unwrap_or_default();
    let is_qcow2 = head.starts_with(qcow2::MAGIC);
    if let Some(name) = foreign::head(head).filter(|_| is_qcow2) {
        return Err(Refusal::ForeignFormat(name));
    }
    match (claimed, is_qcow2) {
        (Some(Format::Raw), true) => Err(Refusal::Qcow2ClaimedRaw),
        (Some(Format::Qcow2), false) => Err(Refusal::NotQcow2),
        (Some(Format::Qcow2) | None, true) => qcow2::examine(source, length),
        (Some(Format::Raw) | None, false) => examine_raw(source, length, head),
    }
}

fn examine_raw(source: &impl Source, length: u64, head: &[u8]) -> Result<Examined, Refusal> {
    if length < SECTOR_BYTES {
        return Err(Refusal::Empty);
    }
    if let Some(name) = foreign::head(head) {
        return Err(Refusal::ForeignFormat(name));
    }
    if let Some(name) = foreign::packed(head) {
        return Err(Refusal::Packed(name));
    }
    let mut tail = [0u8; foreign::TAIL_BYTES];
    let tail_length = source.read_upto(&mut tail, length.saturating_sub(foreign::TAIL_BYTES as u64))?;
    if let Some(name) = foreign::tail(tail.get(..tail_length).unwrap_or_default()) {
        return Err(Refusal::ForeignFormat(name));
    }
    if length > MAX_VIRTUAL_SIZE_BYTES {
        return Err(Refusal::VirtualSize(length));
    }
    Ok(Examined {
        inspected: Inspected { format: Format::Raw, virtual_size_bytes: length.next_multiple_of(SECTOR_BYTES) },
        metadata: Vec::new(),
    })
}
