//! Reading while everything changes.

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use serde_json::json;
use support::Daemon;

/// How many reads in all; a million in the long run.
fn reads() -> u64 {
    if std::env::var_os("INSTANCEFS_LONG").is_some() { 1_000_000 } else { 100_000 }
}

/// Ends the writers also when a reader panicked.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn no_read_of_a_changing_file_is_torn_empty_or_older_than_one_before() {
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("busy");
    daemon.domain_does(id, "start", "active");
    let state = daemon.path(format!("instances/{id}/state"));
    let description = daemon.path(format!("instances/{id}/description"));
    let (done, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let ends = Ends(&done);
    thread::scope(|scope| {
        let ends = ends;
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for (word, host) in [("paused", "unpause"), ("paused", "unpause")] {
                    support::write(&state, word.as_bytes()).expect("pausing is taken");
                    daemon.host_does(json!({"do": host, "uuid": id.to_string()}));
                    daemon.wait_state(id, "active");
                }
            }
        });
        scope.spawn(|| {
            let mut number = 0_u64;
            while !done.load(Ordering::Relaxed) {
                number += 1;
                let value = format!("{number} {}", "x".repeat((number % 40 + 1) as usize));
                support::write(&description, value.as_bytes()).expect("a description is taken");
                written.store(number, Ordering::SeqCst);
            }
        });
        let readers: Vec<_> = (0..4)
            .map(|reader| {
                let (state, description, written) = (&state, &description, &written);
                scope.spawn(move || {
                    let (mut newest, mut states) = (0, [0_u64; 2]);
                    let kept = File::open(state).expect("opens");
                    for round in 0..reads() / 8 {
                        let text = if (round + reader) % 2 == 0 {
                            std::fs::read_to_string(state).expect("readable")
                        } else {
                            let mut bytes = [0; 64];
                            let length = kept.read_at(&mut bytes, 0).expect("readable");
                            String::from_utf8(bytes[..length].to_vec()).expect("UTF-8")
                        };
                        match text.as_str() {
                            "active\n" => states[0] += 1,
                            "paused\n" => states[1] += 1,
                            torn => panic!("torn: {torn:?}"),
                        }
                        let acknowledged = written.load(Ordering::SeqCst);
                        let text = std::fs::read_to_string(description).expect("readable");
                        if text == "\n" {
                            assert_eq!((newest, acknowledged), (0, 0), "empty after a value was there");
                            continue;
                        }
                        let (number, rest) =
                            text.strip_suffix('\n').and_then(|text| text.split_once(' ')).expect("whole");
                        let number: u64 = number.parse().expect("a number");
                        assert_eq!(rest.len() as u64, number % 40 + 1, "torn: {text:?}");
                        assert!(number >= newest.max(acknowledged), "{number} after {newest} and {acknowledged}");
                        newest = number;
                    }
                    states
                })
            })
            .collect();
        let seen = readers
            .into_iter()
            .map(|reader| reader.join().expect("a reader"))
            .fold([0, 0], |sum, states| [sum[0] + states[0], sum[1] + states[1]]);
        drop(ends);
        assert!(seen[0] > 0 && seen[1] > 0, "both states were seen: {seen:?}");
    });
}
