//! Random changes by several writers: users of the tree, and the hypervisor behind its back.

use std::fmt;
use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use serde_json::json;
use uuid::Uuid;

use crate::support::Daemon;

/// How many there were, of each kind.
#[derive(Default)]
pub struct Changes {
    states: AtomicUsize,
    texts: AtomicUsize,
    locks: AtomicUsize,
    names: AtomicUsize,
    objects: AtomicUsize,
    refused: AtomicUsize,
}

impl fmt::Display for Changes {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |number: &AtomicUsize| number.load(Ordering::Relaxed);
        write!(
            formatter,
            "{} changes: {} states, {} texts, {} locks, {} names, {} objects that came or went; {} refused",
            self.total(),
            count(&self.states),
            count(&self.texts),
            count(&self.locks),
            count(&self.names),
            count(&self.objects),
            count(&self.refused)
        )
    }
}

/// Small, fast, and the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % bound as u64).expect("small")
    }

    fn of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }
}

impl Changes {
    /// Makes this many, by two users and two hypervisor's tools at once.
    pub fn make(daemon: &Daemon, stayers: &[Uuid], number: usize) -> Changes {
        let changes = Changes::default();
        thread::scope(|scope| {
            for writer in 0..4 {
                let changes = &changes;
                let mut random = Random(0x9e37_79b9_7f4a_7c15 + writer);
                scope.spawn(move || {
                    while changes.total() < number {
                        if writer % 2 == 0 {
                            changes.by_user(daemon, stayers, &mut random);
                        } else {
                            changes.by_hypervisor(daemon, stayers, &mut random);
                        }
                    }
                });
            }
        });
        // Whoever locks may be the last.
        for id in stayers {
            daemon.set(format!("instances/{id}/locked"), "0");
        }
        changes
    }

    fn total(&self) -> usize {
        let kinds = [&self.states, &self.texts, &self.locks, &self.names, &self.objects];
        kinds.iter().map(|kind| kind.load(Ordering::Relaxed)).sum()
    }

    fn count(&self, kind: &AtomicUsize, done: bool) {
        if done { kind } else { &self.refused }.fetch_add(1, Ordering::Relaxed);
    }

    fn by_user(&self, daemon: &Daemon, stayers: &[Uuid], random: &mut Random) {
        let id = random.of(stayers);
        let write = |name: &str, value: &str| daemon.write(format!("instances/{id}/{name}"), value).is_ok();
        match random.below(20) {
            0 => self.count(&self.states, write("state", ["active", "stopped", "paused"][random.below(3)])),
            1..=3 => self.count(&self.locks, write("locked", ["0", "0", "1"][random.below(3)])),
            4 => self.count(&self.names, write("name", &format!("named-{}", random.below(1000)))),
            5 => {
                // A draft comes and goes.
                let draft = daemon.path(format!("instances/{}", Uuid::new_v4()));
                self.count(&self.objects, fs::create_dir(&draft).is_ok());
                self.count(&self.objects, fs::remove_dir(&draft).is_ok());
            }
            _ => self.count(&self.texts, write("description", &format!("text {}", random.below(1_000_000)))),
        }
    }

    fn by_hypervisor(&self, daemon: &Daemon, stayers: &[Uuid], random: &mut Random) {
        let id = random.of(stayers);
        let host =
            |command: serde_json::Value| daemon.host_may_do(&command).is_ok_and(|answer| answer["ok"] == json!(true));
        match random.below(20) {
            0 => {
                let comer = Uuid::new_v4();
                let xml = format!(
                    "<domain type='qemu'><name>comer-{comer}</name><uuid>{comer}</uuid><memory unit='MiB'>64</memory>\
                     <vcpu>1</vcpu><os><type>hvm</type></os></domain>"
                );
                self.count(&self.objects, host(json!({"do": "define", "xml": xml})));
                self.count(&self.objects, host(json!({"do": "undefine", "uuid": comer.to_string()})));
            }
            1 => {
                let name = format!("renamed-{}", random.below(1000));
                self.count(&self.names, host(json!({"do": "rename", "uuid": id.to_string(), "name": name})));
            }
            2..=6 => {
                let text = format!("by virsh {}", random.below(1_000_000));
                let done = host(json!({"do": "set_description", "uuid": id.to_string(), "text": text}));
                self.count(&self.texts, done);
            }
            _ => {
                let what = *random.of(&["start", "stop", "pause", "unpause", "crash", "ioerror"]);
                self.count(&self.states, host(json!({"do": what, "uuid": id.to_string()})));
            }
        }
    }
}
