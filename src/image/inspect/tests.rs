use std::cell::Cell;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use proptest::prelude::*;

use super::*;

impl Source for [u8] {
    fn read_upto(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let rest = usize::try_from(offset).ok().and_then(|offset| self.get(offset..)).unwrap_or_default();
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }

    fn is_hole(&self, _range: &Range<u64>) -> bool {
        false
    }
}

impl Source for Vec<u8> {
    fn read_upto(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.as_slice().read_upto(buffer, offset)
    }

    fn is_hole(&self, range: &Range<u64>) -> bool {
        self.as_slice().is_hole(range)
    }
}

fn judge(bytes: &Vec<u8>, claimed: Option<Format>) -> Result<Inspected, Refusal> {
    examine_source(bytes, bytes.len() as u64, claimed).map(|examined| examined.inspected)
}

const CLUSTER: usize = 65536;

/// A sound, empty version 3 image of 1 GiB: header, refcount table, refcount block, L1 table.
fn image() -> Vec<u8> {
    let mut bytes = vec![0u8; 3 * CLUSTER + 16];
    bytes[..4].copy_from_slice(b"QFI\xfb");
    put32(&mut bytes, 4, 3);
    put32(&mut bytes, 20, 16);
    put64(&mut bytes, 24, 1 << 30);
    put32(&mut bytes, 36, 2);
    put64(&mut bytes, 40, 3 * CLUSTER as u64);
    put64(&mut bytes, 48, CLUSTER as u64);
    put32(&mut bytes, 56, 1);
    put32(&mut bytes, 96, 4);
    put32(&mut bytes, 100, 112);
    bytes
}

fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

fn changed(change: impl FnOnce(&mut Vec<u8>)) -> Result<Inspected, Refusal> {
    let mut bytes = image();
    change(&mut bytes);
    judge(&bytes, None)
}

#[track_caller]
fn assert_refused(change: impl FnOnce(&mut Vec<u8>), refusal: Refusal) {
    assert_eq!(changed(change), Err(refusal));
}

#[test]
fn a_sound_header_is_accepted_with_and_without_a_claim() {
    let expected = Inspected { format: Format::Qcow2, virtual_size_bytes: 1 << 30 };
    assert_eq!(judge(&image(), None), Ok(expected));
    assert_eq!(judge(&image(), Some(Format::Qcow2)), Ok(expected));
}

#[test]
fn a_claim_that_the_bytes_do_not_confirm_is_refused() {
    assert_eq!(judge(&image(), Some(Format::Raw)), Err(Refusal::Qcow2ClaimedRaw));
    assert_eq!(judge(&vec![0; 4096], Some(Format::Qcow2)), Err(Refusal::NotQcow2));
}

#[test]
fn other_versions_are_refused() {
    for version in [0, 1, 4, u32::MAX] {
        assert_refused(|b| put32(b, 4, version), Refusal::Version(version));
    }
}

#[test]
fn a_backing_file_is_refused_however_it_is_hinted_at() {
    assert_refused(|b| put64(b, 8, 0x200), Refusal::BackingFile);
    assert_refused(|b| put32(b, 16, 5), Refusal::BackingFile);
    assert_refused(|b| put32(b, 112, 0xe279_2aca), Refusal::BackingFile);
}

#[test]
fn an_external_data_file_is_refused_however_it_is_hinted_at() {
    assert_refused(|b| put64(b, 72, 1 << 2), Refusal::DataFile);
    assert_refused(|b| put64(b, 88, 1 << 1), Refusal::DataFile);
    assert_refused(|b| put32(b, 112, 0x4441_5441), Refusal::DataFile);
}

#[test]
fn encryption_is_refused_however_it_is_hinted_at() {
    for method in [1, 2, 77] {
        assert_refused(|b| put32(b, 32, method), Refusal::Encrypted);
    }
    assert_refused(|b| put32(b, 112, 0x0537_be77), Refusal::Encrypted);
}

#[test]
fn an_unclean_or_corrupt_image_is_refused() {
    assert_refused(|b| put64(b, 72, 1 << 0), Refusal::Dirty);
    assert_refused(|b| put64(b, 72, 1 << 1), Refusal::Corrupt);
}

#[test]
fn unknown_incompatible_features_are_refused_and_compatible_ones_are_not() {
    for bit in 5..64 {
        assert_refused(|b| put64(b, 72, 1 << bit), Refusal::UnknownFeatures(1 << bit));
    }
    changed(|b| put64(b, 80, u64::MAX)).unwrap();
    changed(|b| put64(b, 88, !3)).unwrap();
}

#[test]
fn a_compression_type_agrees_with_its_feature_bit() {
    let zstd = |bytes: &mut Vec<u8>, kind: u8| {
        put64(bytes, 72, 1 << 3);
        bytes[104] = kind;
    };
    changed(|b| zstd(b, 1)).unwrap();
    assert_refused(|b| zstd(b, 0), Refusal::Compression(0));
    assert_refused(|b| zstd(b, 2), Refusal::Compression(2));
    assert_refused(|b| b[104] = 1, Refusal::Compression(1));
    let no_field = |b: &mut Vec<u8>| {
        zstd(b, 1);
        put32(b, 100, 104);
    };
    assert_refused(no_field, Refusal::Compression(0));
}

#[test]
fn internal_snapshots_and_valid_bitmaps_are_refused() {
    for count in [1, u32::MAX] {
        assert_refused(|b| put32(b, 60, count), Refusal::InternalSnapshots);
    }
    assert_refused(|b| put64(b, 88, 1), Refusal::Bitmaps);
}

#[test]
fn an_impossible_header_length_is_refused() {
    for length in [0, 72, 103, 105, 65544, u32::MAX] {
        assert_refused(|b| put32(b, 100, length), Refusal::HeaderLength(length));
    }
}

#[test]
fn cluster_sizes_outside_the_spec_are_refused() {
    for bits in [0, 8, 22, 63, 64, u32::MAX] {
        assert_refused(|b| put32(b, 20, bits), Refusal::ClusterBits(bits));
    }
    let extended_with_small_clusters = |b: &mut Vec<u8>| {
        put32(b, 20, 13);
        put64(b, 72, 1 << 4);
    };
    assert_refused(extended_with_small_clusters, Refusal::ClusterBits(13));
}

#[test]
fn an_impossible_refcount_width_is_refused() {
    assert_refused(|b| put32(b, 96, 7), Refusal::RefcountOrder(7));
}

#[test]
fn an_absurd_virtual_size_is_refused() {
    for size in [0, 100, 513, (64 << 40) + 512, u64::MAX] {
        assert_refused(|b| put64(b, 24, size), Refusal::VirtualSize(size));
    }
}

#[test]
fn an_l1_table_maps_the_size_and_lies_within_the_file() {
    let l1 = |what| Refusal::L1Table(what);
    assert_refused(|b| put32(b, 36, 1), l1("is too small for the virtual size"));
    assert_refused(|b| put32(b, 36, 0), l1("is too small for the virtual size"));
    assert_refused(|b| put32(b, 36, 3), l1("reaches past the end of the file"));
    assert_refused(|b| put32(b, 36, (4 << 20) + 1), l1("is absurdly large"));
    assert_refused(|b| put32(b, 36, u32::MAX), l1("is absurdly large"));
    assert_refused(|b| put64(b, 40, 0), l1("does not begin at a cluster of its own"));
    assert_refused(|b| put64(b, 40, 512), l1("does not begin at a cluster of its own"));
    assert_refused(|b| put64(b, 40, 4 * CLUSTER as u64), l1("reaches past the end of the file"));
    assert_refused(|b| put64(b, 40, !(CLUSTER as u64 - 1)), l1("reaches past the end of the file"));
    let extended_halves_what_an_entry_maps = |b: &mut Vec<u8>| put64(b, 72, 1 << 4);
    assert_refused(extended_halves_what_an_entry_maps, l1("is too small for the virtual size"));
}

#[test]
fn a_refcount_table_lies_within_the_file() {
    let table = |what| Refusal::RefcountTable(what);
    assert_refused(|b| put32(b, 56, 0), table("is missing"));
    assert_refused(|b| put32(b, 56, 129), table("is absurdly large"));
    assert_refused(|b| put32(b, 56, 3), table("reaches past the end of the file"));
    assert_refused(|b| put64(b, 48, 0), table("does not begin at a cluster of its own"));
    assert_refused(|b| put64(b, 48, 7), table("does not begin at a cluster of its own"));
    assert_refused(|b| put64(b, 48, 1 << 60), table("reaches past the end of the file"));
}

#[test]
fn header_extensions_stay_within_their_cluster() {
    assert_refused(
        |b| {
            put32(b, 112, 0x1234_5678);
            put32(b, 116, CLUSTER as u32);
        },
        Refusal::HeaderExtensions,
    );
    assert_refused(
        |b| {
            put32(b, 112, 0x1234_5678);
            put32(b, 116, u32::MAX);
        },
        Refusal::HeaderExtensions,
    );
    // Behind unknown ones, and with a length that needs padding, a forbidden one is still found.
    assert_refused(
        |b| {
            put32(b, 112, 0x1234_5678);
            put32(b, 116, 3);
            put32(b, 128, 0x6803_f857);
            put32(b, 136, 0);
            put32(b, 136, 0x4441_5441);
        },
        Refusal::DataFile,
    );
    changed(|b| {
        put32(b, 112, 0x1234_5678);
        put32(b, 116, (CLUSTER - 120) as u32);
    })
    .unwrap();
}

#[test]
fn a_header_cut_short_is_refused_at_every_length() {
    for length in 4..CLUSTER {
        if length > 600 && length % 997 != 0 {
            continue;
        }
        let mut bytes = image();
        bytes.truncate(length);
        assert!(judge(&bytes, None).is_err(), "{length}");
    }
}

#[test]
fn a_version_2_header_has_no_features() {
    let v2 = |b: &mut Vec<u8>| {
        put32(b, 4, 2);
        b[72..112].fill(0);
    };
    changed(v2).unwrap();
    assert_refused(
        |b| {
            v2(b);
            put32(b, 72, 0xe279_2aca);
        },
        Refusal::BackingFile,
    );
}

#[test]
fn raw_is_accepted_only_without_any_known_magic() {
    let raw = |size| Inspected { format: Format::Raw, virtual_size_bytes: size };
    assert_eq!(judge(&vec![0; 512], None), Ok(raw(512)));
    assert_eq!(judge(&vec![0; 513], Some(Format::Raw)), Ok(raw(1024)));
    for (offset, magic, name) in foreign::HEADS {
        for claimed in [None, Some(Format::Raw)] {
            let mut bytes = vec![0; 4096];
            bytes[*offset..offset + magic.len()].copy_from_slice(magic);
            assert_eq!(judge(&bytes, claimed), Err(Refusal::ForeignFormat(name)));
        }
    }
    for (from_end, magic, name) in
        [(512, b"conectix".as_slice(), "VHD"), (511, b"conectix", "VHD"), (512, b"koly", "DMG")]
    {
        let mut bytes = vec![0; 5000];
        let at = bytes.len() - from_end;
        bytes[at..at + magic.len()].copy_from_slice(magic);
        assert_eq!(judge(&bytes, None), Err(Refusal::ForeignFormat(name)));
    }
}

#[test]
fn any_text_that_qemu_would_read_as_a_vmdk_descriptor_is_refused() {
    for text in ["version=1\n", "# mine\n\n  \r\nversion=3\r\nRW 1 FLAT \"/etc/shadow\" 0\n"] {
        let mut bytes = text.as_bytes().to_vec();
        bytes.resize(1024, b' ');
        assert_eq!(judge(&bytes, None), Err(Refusal::ForeignFormat("a VMDK descriptor")));
    }
}

#[test]
fn an_iso_and_a_partitioned_disk_are_raw() {
    let mut iso = vec![0; 40960];
    iso[32769..32774].copy_from_slice(b"CD001");
    judge(&iso, None).unwrap();
    let mut disk = vec![0; 4096];
    disk[510..520].copy_from_slice(b"\x55\xaaEFI PART");
    judge(&disk, None).unwrap();
}

#[test]
fn nothing_or_less_than_a_sector_is_empty() {
    for length in [0, 1, 511] {
        assert_eq!(judge(&vec![0; length], None), Err(Refusal::Empty));
    }
    assert_eq!(judge(&Vec::new(), Some(Format::Qcow2)), Err(Refusal::Empty));
}

#[test]
fn what_is_not_a_regular_file_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    assert!(matches!(inspect(&File::open(directory.path()).unwrap(), None), Err(Refusal::Unreadable(_))));
    assert!(matches!(inspect(&File::open("/dev/zero").unwrap(), None), Err(Refusal::Unreadable(_))));
}

fn qemu_img(arguments: &[&str], path: &Path, rest: &[&str]) {
    let output = Command::new("qemu-img").args(arguments).arg(path).args(rest).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Runs qemu-img with the path of a new image between the arguments, and inspects what it made.
fn made_by_qemu(arguments: &[&str], rest: &[&str]) -> Result<Inspected, Refusal> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    qemu_img(arguments, &path, rest);
    inspect(&File::open(&path).unwrap(), None)
}

#[test]
fn what_qemu_img_makes_is_accepted() {
    let size = 5 << 30;
    let qcow2 = Ok(Inspected { format: Format::Qcow2, virtual_size_bytes: size });
    for options in [
        "compat=1.1",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=2M",
        "compression_type=zstd",
        "extended_l2=on",
        "refcount_bits=64",
        "refcount_bits=1",
        "lazy_refcounts=on",
        "preallocation=metadata",
    ] {
        assert_eq!(made_by_qemu(&["create", "-q", "-f", "qcow2", "-o", options], &["5G"]), qcow2, "{options}");
    }
    let raw = made_by_qemu(&["create", "-q", "-f", "raw"], &["5G"]);
    assert_eq!(raw, Ok(Inspected { format: Format::Raw, virtual_size_bytes: size }));
}

#[test]
fn compressed_and_shrunk_images_are_accepted() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    std::fs::write(&source, b"instancefs ".repeat(100_000)).unwrap();
    for options in ["compression_type=zlib", "compression_type=zstd", "compat=0.10"] {
        let from = source.to_str().unwrap();
        let result = made_by_qemu(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, from], &[]);
        assert_eq!(result.unwrap().virtual_size_bytes, 1_100_288, "{options}");
    }
    let path = directory.path().join("shrunk");
    qemu_img(&["create", "-q", "-f", "qcow2"], &path, &["10G"]);
    qemu_img(&["resize", "-q", "-f", "qcow2", "--shrink"], &path, &["1G"]);
    assert_eq!(inspect(&File::open(&path).unwrap(), None).unwrap().virtual_size_bytes, 1 << 30);
}

/// qemu-img times its key derivation and now and then fails because a processor is too fast for its clock; then again.
fn make_luks(path: &Path) {
    let made = (0..100).any(|_| {
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2", "--object", "secret,id=key,data=secret"]);
        command.args(["-o", "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"]);
        command.arg(path).arg("1G").output().unwrap().status.success()
    });
    assert!(made);
}

#[test]
fn what_qemu_img_makes_with_ties_to_other_files_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let other = directory.path().join("other");
    std::fs::write(&other, vec![0; 4096]).unwrap();
    let other = other.to_str().unwrap();
    let create = ["create", "-q", "-f", "qcow2"];
    let with = |more: &[&str]| made_by_qemu(&[&create, more].concat(), &["1G"]);
    assert_eq!(with(&["-F", "raw", "-b", other]), Err(Refusal::BackingFile));
    assert_eq!(with(&["-o", "compat=0.10", "-F", "raw", "-b", other]), Err(Refusal::BackingFile));
    let data_file = format!("data_file={other}");
    assert_eq!(with(&["-o", &data_file]), Err(Refusal::DataFile));
    assert_eq!(with(&["-o", &format!("{data_file},data_file_raw=on")]), Err(Refusal::DataFile));
    let aes = ["--object", "secret,id=key,data=secret", "-o", "encrypt.format=aes,encrypt.key-secret=key"];
    assert_eq!(with(&aes), Err(Refusal::Encrypted));

    let path = directory.path().join("luks");
    make_luks(&path);
    assert_eq!(inspect(&File::open(&path).unwrap(), None), Err(Refusal::Encrypted));

    let path = directory.path().join("marked");
    qemu_img(&create, &path, &["1G"]);
    qemu_img(&["snapshot", "-c", "one"], &path, &[]);
    assert_eq!(inspect(&File::open(&path).unwrap(), None), Err(Refusal::InternalSnapshots));
    qemu_img(&["snapshot", "-d", "one"], &path, &[]);
    inspect(&File::open(&path).unwrap(), None).unwrap();
    qemu_img(&["bitmap", "-f", "qcow2", "--add"], &path, &["b"]);
    assert_eq!(inspect(&File::open(&path).unwrap(), None), Err(Refusal::Bitmaps));
    for format in ["vmdk", "vdi", "vhdx", "vpc", "qed", "parallels"] {
        let result = made_by_qemu(&["create", "-q", "-f", format], &["8M"]);
        assert!(matches!(result, Err(Refusal::ForeignFormat(_))), "{format}: {result:?}");
    }
    let fixed_vhd = made_by_qemu(&["create", "-q", "-f", "vpc", "-o", "subformat=fixed"], &["8M"]);
    assert_eq!(fixed_vhd, Err(Refusal::ForeignFormat("VHD")));
}

/// What was accepted keeps its promise: all ranges are within the file.
fn assert_bounded(bytes: &Vec<u8>) {
    for claimed in [None, Some(Format::Qcow2), Some(Format::Raw)] {
        if let Ok(examined) = examine_source(bytes, bytes.len() as u64, claimed) {
            assert!(examined.metadata.iter().all(|range| range.start < range.end && range.end <= bytes.len() as u64));
            assert!((1..=MAX_VIRTUAL_SIZE_BYTES).contains(&examined.inspected.virtual_size_bytes));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    #[test]
    fn random_bytes_are_judged_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..2048), magic in any::<bool>()) {
        let mut bytes = bytes;
        if magic {
            bytes.splice(0..0, *b"QFI\xfb\0\0\0\x03");
        }
        assert_bounded(&bytes);
    }

    #[test]
    fn mutated_headers_are_judged_without_harm(
        edits in prop::collection::vec((4usize..160, prop_oneof![any::<u8>(), Just(0), Just(0xff), Just(1)]), 1..6),
        length in prop_oneof![Just(3 * CLUSTER + 16), 0..3 * CLUSTER],
    ) {
        let mut bytes = image();
        for (at, value) in edits {
            bytes[at] = value;
        }
        bytes.truncate(length);
        assert_bounded(&bytes);
    }
}

/// `data`, and behind it a hole up to `length`.
struct Sparse {
    data: Vec<u8>,
    length: u64,
    reads_of_the_hole: Cell<u32>,
}

impl Source for Sparse {
    fn read_upto(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        if offset < self.data.len() as u64 {
            return self.data.read_upto(buffer, offset);
        }
        self.reads_of_the_hole.update(|reads| reads + 1);
        let count = buffer.len().min(self.length.saturating_sub(offset) as usize);
        buffer[..count].fill(0);
        Ok(count)
    }

    fn is_hole(&self, range: &Range<u64>) -> bool {
        range.start >= self.data.len() as u64
    }
}

#[test]
fn tables_in_holes_are_not_read_but_have_to_be_there() {
    let mut data = image();
    data.resize(4 * CLUSTER, 0);
    put64(&mut data, 3 * CLUSTER, 4 * CLUSTER as u64);
    put64(&mut data, 3 * CLUSTER + 8, 5 * CLUSTER as u64);
    let mut source = Sparse { data, length: 6 * CLUSTER as u64, reads_of_the_hole: Cell::new(0) };
    examine_source(&source, source.length, None).unwrap();
    assert_eq!(source.reads_of_the_hole.get(), 0);
    source.length -= 1;
    let cut = examine_source(&source, source.length, None).map(|examined| examined.inspected);
    assert_eq!(cut, Err(Refusal::MissingClusters));
}

#[test]
fn a_file_says_where_its_holes_are() {
    let mut file = tempfile::tempfile().unwrap();
    file.set_len(4 << 20).unwrap();
    file.write_all(b"data").unwrap();
    assert!(file.is_hole(&(1 << 20..2 << 20)));
    assert!(!file.is_hole(&(0..1 << 20)));
}
