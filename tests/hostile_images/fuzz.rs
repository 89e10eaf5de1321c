//! A fuzzer on the inspector: mutates the corpus, field by field and blindly.
//!
//! It runs for seconds, and for ten minutes with `INSTANCEFS_LONG`. It says its seed; `INSTANCEFS_FUZZ=SEED` repeats a
//! run and `INSTANCEFS_FUZZ=SEED:CASE` the one case that a failure names.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use instancefs::image::inspect::{MAX_VIRTUAL_SIZE_BYTES, inspect};
use instancefs::image::{Format, Inspected};
use serde_json::Value;

use super::allocation::peak_of;
use super::corpus::{controls, corpus};
use super::file;
use super::qcow2::{CLUSTER, L1_TABLE, L2_TABLE, REFCOUNT_TABLE, field};

/// What the inspector promises to need at most: the largest L1 table, two clusters, and small change.
const MOST_BYTES: usize = (32 << 20) + (4 << 20) + (1 << 20);

/// Against endless loops; nothing is asserted about speed.
const PATIENCE: Duration = Duration::from_secs(120);

/// qemu-img is slow to start: it judges one accepted image in this time.
const SAMPLE_EVERY: Duration = Duration::from_millis(250);

/// SplitMix64: every seed is good, and a case needs no history.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

/// A file: its bytes, and how far it reaches beyond them.
struct Sample {
    bytes: Vec<u8>,
    length: u64,
}

impl Sample {
    fn put(&mut self, at: u64, value: &[u8]) {
        let at = at as usize;
        if let Some(place) = self.bytes.get_mut(at..at + value.len()) {
            place.copy_from_slice(value);
        }
    }

    fn file(&self) -> File {
        let file = file(&self.bytes);
        file.set_len(self.length).expect("a length");
        file
    }
}

/// (Place, width) of all that means something in a qcow2 file.
const FIELDS: &[(u64, usize)] = &[
    (field::VERSION, 4),
    (field::BACKING_OFFSET, 8),
    (field::BACKING_LENGTH, 4),
    (field::CLUSTER_BITS, 4),
    (field::VIRTUAL_SIZE, 8),
    (field::ENCRYPTION, 4),
    (field::L1_ENTRIES, 4),
    (field::L1_OFFSET, 8),
    (field::REFCOUNT_OFFSET, 8),
    (field::REFCOUNT_CLUSTERS, 4),
    (field::SNAPSHOTS, 4),
    (field::SNAPSHOTS_OFFSET, 8),
    (field::INCOMPATIBLE, 8),
    (80, 8),
    (field::AUTOCLEAR, 8),
    (field::REFCOUNT_ORDER, 4),
    (field::HEADER_LENGTH, 4),
    (field::COMPRESSION, 1),
    (112, 4),
    (116, 4),
    (72, 4),
    (76, 4),
    (REFCOUNT_TABLE, 8),
    (L1_TABLE, 8),
    (L1_TABLE + 8, 8),
    (L2_TABLE, 8),
    (L2_TABLE + 8, 8),
];

fn interesting(random: &mut Random) -> u64 {
    let bit = 1u64 << random.below(64);
    match random.below(7) {
        0 => random.of(&[0, 1, 2, 3, 7, 8, 9, 12, 16, 21, 22, 72, 104, 112, 120, 511, 512, 513]),
        1 => CLUSTER * random.below(10) as u64,
        2 => bit,
        3 => bit.wrapping_sub(1),
        4 => u64::MAX - random.below(1024) as u64,
        5 => random.of(&[0xe279_2aca, 0x4441_5441, 0x0537_be77, 0x2385_2875, 0x6803_f857]),
        _ => random.next(),
    }
}

fn mutate(random: &mut Random, sample: &mut Sample, others: &[Vec<u8>]) {
    match random.below(8) {
        0..=2 => {
            let (at, width) = random.of(FIELDS);
            let value = interesting(random).to_be_bytes();
            sample.put(at, &value[8 - width..]);
        }
        3 => {
            let bit = random.below(sample.bytes.len() * 8);
            if let Some(byte) = sample.bytes.get_mut(bit / 8) {
                *byte ^= 1 << (bit % 8);
            }
        }
        4 => {
            let at = random.below(sample.bytes.len().min(4096)) as u64;
            let value = interesting(random).to_be_bytes();
            sample.put(at, &value[..1 + random.below(8)]);
        }
        5 => {
            let other = &others[random.below(others.len())];
            let from = random.below(other.len());
            let count = random.below(other.len() - from).min(1 + random.below(4096));
            let at = if random.below(2) == 0 { from } else { random.below(sample.bytes.len()) };
            let count = count.min(sample.bytes.len().saturating_sub(at));
            sample.put(at as u64, &other[from..from + count]);
        }
        6 => {
            sample.length = sample.length.min(random.below(sample.bytes.len()) as u64);
            sample.bytes.truncate(sample.length as usize);
        }
        _ => sample.length += (interesting(random) >> 1) >> random.below(63),
    }
    sample.length = sample.length.clamp(sample.bytes.len() as u64, 1 << 62);
}

struct Fuzzer {
    seeds: Vec<Vec<u8>>,
    directory: tempfile::TempDir,
    sampled: Instant,
    accepted: u64,
    asked: u64,
    not_opened: u64,
}

impl Fuzzer {
    fn new() -> Fuzzer {
        let corpus = corpus(Path::new("/nonexistent/canary")).into_iter().map(|case| case.bytes);
        // The sound ones lead deepest.
        let sound: Vec<_> = controls().into_iter().map(|(_, bytes, _, _)| bytes).collect();
        let seeds = sound.iter().cycle().take(sound.len() * 40).cloned().chain(corpus).collect();
        let directory = tempfile::tempdir().expect("a directory");
        Fuzzer { seeds, directory, sampled: Instant::now(), accepted: 0, asked: 0, not_opened: 0 }
    }

    fn case(&mut self, seed: u64, case: u64, always_ask: bool) {
        let mut random = Random(seed ^ case.wrapping_mul(0xd134_2543_de82_ef95));
        let bytes = self.seeds[random.below(self.seeds.len())].clone();
        let mut sample = Sample { length: bytes.len() as u64, bytes };
        for _ in 0..random.below(5) {
            mutate(&mut random, &mut sample, &self.seeds);
        }
        let file = sample.file();
        let began = Instant::now();
        let (verdict, peak) = peak_of(|| inspect(&file, None));
        assert!(peak <= MOST_BYTES, "{peak} bytes of memory");
        assert!(began.elapsed() < PATIENCE, "it took {:?}", began.elapsed());
        assert_eq!(inspect(&file, None), verdict, "the verdict is not always the same");
        let Ok(inspected) = verdict else { return };
        self.accepted += 1;
        let other = if inspected.format == Format::Raw { Format::Qcow2 } else { Format::Raw };
        assert_eq!(inspect(&file, Some(inspected.format)), verdict, "a true claim changes the verdict");
        assert!(inspect(&file, Some(other)).is_err(), "a wrong claim is accepted");
        assert!((512..=MAX_VIRTUAL_SIZE_BYTES).contains(&inspected.virtual_size_bytes));
        if always_ask || self.sampled.elapsed() >= SAMPLE_EVERY {
            self.sampled = Instant::now();
            self.ask_qemu(&sample, &inspected);
        }
    }

    /// Whatever is accepted is for QEMU what it is for us, told its format or not, and depends on nothing.
    fn ask_qemu(&mut self, sample: &Sample, inspected: &Inspected) {
        let path = self.directory.path().join("image");
        fs::write(&path, &sample.bytes).expect("written");
        if File::options().write(true).open(&path).and_then(|file| file.set_len(sample.length)).is_err() {
            // Longer than this file system's files.
            return;
        }
        self.asked += 1;
        for told in [Some(inspected.format.word()), None] {
            let Some(info) = info(&path, told) else {
                self.not_opened += 1;
                continue;
            };
            assert_eq!(info["format"], inspected.format.word(), "told {told:?}: {info}");
            assert_eq!(info["virtual-size"], inspected.virtual_size_bytes, "told {told:?}: {info}");
            for name in ["backing-filename", "full-backing-filename", "encrypted", "snapshots"] {
                assert!(info.get(name).is_none(), "{name}: {info}");
            }
            assert!(info["format-specific"]["data"].get("data-file").is_none(), "{info}");
        }
    }
}

fn info(path: &PathBuf, format: Option<&str>) -> Option<Value> {
    let mut command = Command::new("qemu-img");
    command.args(["info", "--output=json", "-U"]);
    if let Some(format) = format {
        command.args(["-f", format]);
    }
    let output = command.arg(path).output().expect("qemu-img runs");
    output.status.success().then(|| serde_json::from_slice(&output.stdout).expect("JSON"))
}

#[test]
fn whatever_the_inspector_accepts_depends_on_nothing_else() {
    let long = std::env::var_os("INSTANCEFS_LONG").is_some();
    let wanted = std::env::var("INSTANCEFS_FUZZ").unwrap_or_default();
    let (seed, only) = wanted.split_once(':').unwrap_or((&wanted, ""));
    let new_seed = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a clock").as_micros() as u64;
    let seed = seed.parse().unwrap_or_else(|_| new_seed());
    let mut fuzzer = Fuzzer::new();
    if let Ok(case) = only.parse() {
        return fuzzer.case(seed, case, true);
    }
    println!("fuzzing the inspector with INSTANCEFS_FUZZ={seed}");
    let end = Instant::now() + Duration::from_secs(if long { 600 } else { 4 });
    let mut case = 0;
    while Instant::now() < end {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| fuzzer.case(seed, case, false)));
        assert!(result.is_ok(), "repeat it with INSTANCEFS_FUZZ={seed}:{case}");
        case += 1;
    }
    println!(
        "{case} mutated images: {} accepted, {} of them shown to qemu-img, which did not open {}",
        fuzzer.accepted, fuzzer.asked, fuzzer.not_opened
    );
    assert!(fuzzer.accepted > 0 && fuzzer.asked > 0, "nothing was accepted, so nothing was proven");
}
