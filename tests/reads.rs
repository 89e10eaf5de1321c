//! Reading while everything changes.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use support::Daemon;

/// Who reads at the same time.
const READERS: u64 = 4;
/// How many reads are timed while nothing changes.
const READS_AT_REST: u32 = 5000;
/// How many changes of `state` there are at least.
const PHASES: u64 = 20;
/// When a reader gives up.
const LONGEST: Duration = Duration::from_secs(600);
/// What is known of `state` while a change is under way: nothing.
const CHANGING: u64 = 0;

/// How many reads of `state` in all.
fn reads() -> u64 {
    if std::env::var_os("INSTANCEFS_LONG").is_some() { 1_000_000 } else { 60_000 }
}

/// Ends the other threads, also when this one panics.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What a reader may rely on: a number that grows with each phase, odd ones `active`, even ones `paused`.
struct Phase<'a> {
    known: &'a AtomicU64,
    reached: &'a AtomicU64,
    last: u64,
}

impl Phase<'_> {
    fn changing(&self) {
        self.known.store(CHANGING, Ordering::SeqCst);
    }

    fn reached(&mut self, state: &Path) {
        self.last += 1;
        self.known.store(self.last, Ordering::SeqCst);
        self.reached.store(self.last, Ordering::Relaxed);
        assert_eq!(fs::read_to_string(state).expect("readable"), word(self.last), "what was acknowledged");
    }
}

fn word(phase: u64) -> &'static str {
    if phase % 2 == 1 { "active\n" } else { "paused\n" }
}

/// The value of a description that is written as number `number`: of many lengths, and telling its own.
fn numbered(number: u64) -> String {
    format!("{number}:{}.", "x".repeat((number % 40) as usize))
}

/// What a reader has seen.
#[derive(Default)]
struct Seen {
    active: u64,
    paused: u64,
    /// Reads that fell into a phase in which only one answer was right.
    certain: u64,
}

#[test]
fn no_read_of_a_changing_file_is_torn_empty_or_older_than_one_before() {
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("busy");
    daemon.domain_does(id, "start", "active");
    let state = daemon.path(format!("instances/{id}/state"));
    let description = daemon.path(format!("instances/{id}/description"));
    let one = {
        let begun = Instant::now();
        for _ in 0..READS_AT_REST {
            assert_eq!(fs::read_to_string(&state).expect("readable"), word(1));
        }
        begun.elapsed() / READS_AT_REST
    };
    let begun = Instant::now();
    for _ in 0..READS_AT_REST {
        let mut bytes = [0; 64];
        let file = File::open(&state).expect("opens");
        assert_eq!(file.read_at(&mut bytes, 0).expect("readable"), word(1).len());
    }
    println!(
        "a state at rest: open, read and close {:?}; as cat does it, to the end {one:?}",
        begun.elapsed() / READS_AT_REST
    );
    let (done, written, known) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(CHANGING));
    let phases = AtomicU64::new(0);
    let begun = Instant::now();
    let (changes, seen) = thread::scope(|scope| {
        let changer = scope.spawn(|| {
            let _ends = Ends(&done);
            let mut phase = Phase { known: &known, reached: &phases, last: 1 };
            while !done.load(Ordering::Relaxed) {
                phase.changing();
                support::write(&state, b"paused").expect("pausing is taken");
                phase.reached(&state);
                phase.changing();
                daemon.host_does(json!({"do": "unpause", "uuid": id.to_string()}));
                daemon.wait_state(id, "active");
                phase.reached(&state);
            }
            phase.last
        });
        let writer = scope.spawn(|| {
            let _ends = Ends(&done);
            let mut number = 0_u64;
            while !done.load(Ordering::Relaxed) {
                number += 1;
                support::write(&description, numbered(number).as_bytes()).expect("a description is taken");
                written.store(number, Ordering::SeqCst);
            }
            number
        });
        let readers: Vec<_> = (0..READERS)
            .map(|reader| {
                let (state, description, done) = (&state, &description, &done);
                let (written, known, phases) = (&written, &known, &phases);
                scope.spawn(move || {
                    let _ends = Ends(done);
                    let mut seen = Seen::default();
                    let mut newest = 0;
                    let kept = File::open(state).expect("opens");
                    let mut round = 0;
                    while round < reads() / READERS || phases.load(Ordering::Relaxed) < PHASES {
                        round += 1;
                        assert!(begun.elapsed() < LONGEST, "the writers hardly get on");
                        let before = known.load(Ordering::SeqCst);
                        let text = if (round + reader).is_multiple_of(2) {
                            fs::read_to_string(state).expect("readable")
                        } else {
                            let mut bytes = [0; 64];
                            let length = kept.read_at(&mut bytes, 0).expect("readable");
                            String::from_utf8(bytes[..length].to_vec()).expect("UTF-8")
                        };
                        match text.as_str() {
                            "active\n" => seen.active += 1,
                            "paused\n" => seen.paused += 1,
                            torn => panic!("torn: {torn:?}"),
                        }
                        if before != CHANGING && known.load(Ordering::SeqCst) == before {
                            assert_eq!(text, word(before), "stale in phase {before}");
                            seen.certain += 1;
                        }
                        if round.is_multiple_of(4) {
                            newest = read_numbered(description, newest, written.load(Ordering::SeqCst));
                        }
                    }
                    seen
                })
            })
            .collect();
        let seen = readers.into_iter().map(|reader| reader.join()).collect::<Vec<_>>();
        done.store(true, Ordering::Relaxed);
        let seen: Vec<Seen> = seen.into_iter().map(|seen| seen.expect("a reader saw what is right")).collect();
        let changes = [changer, writer].map(|thread| thread.join().expect("a writer was served"));
        (changes, seen)
    });
    let sum = |count: fn(&Seen) -> u64| seen.iter().map(count).sum::<u64>();
    let (active, paused, certain) = (sum(|seen| seen.active), sum(|seen| seen.paused), sum(|seen| seen.certain));
    println!(
        "{} reads of state in {:?} by {READERS} readers: {active} active, {paused} paused, {certain} with one right \
         answer; {} changes of state and {} of description meanwhile",
        active + paused,
        begun.elapsed(),
        changes[0],
        changes[1]
    );
    assert!(active > 0 && paused > 0 && certain > 0, "both states were seen");
}

/// Reads a description: whole, and at least as new as what this reader saw and what was acknowledged.
fn read_numbered(description: &Path, newest: u64, acknowledged: u64) -> u64 {
    let text = fs::read_to_string(description).expect("readable");
    if text == "\n" {
        assert_eq!((newest, acknowledged), (0, 0), "empty after a value was there");
        return 0;
    }
    let number = text.split_once(':').and_then(|(number, _)| number.parse().ok()).expect("a number");
    assert_eq!(text, format!("{}\n", numbered(number)), "torn");
    assert!(number >= newest.max(acknowledged), "{number} after {newest} and {acknowledged}");
    number
}
