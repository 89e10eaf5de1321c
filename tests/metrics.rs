//! `metrics`: what happens is counted, in a text that Prometheus takes.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;

use serde_json::json;
use support::{Daemon, errno, signal, wait_until};

/// Samples by name and labels, as they are written: `name{a="b"}`.
type Samples = BTreeMap<String, f64>;

fn is_name(text: &str) -> bool {
    let good = |character: char| character.is_ascii_alphanumeric() || "_:".contains(character);
    text.chars().all(good) && text.chars().next().is_some_and(|first| !first.is_ascii_digit())
}

/// The labels of a sample, in order.
fn labels(text: &str) -> Vec<(&str, &str)> {
    let mut rest = text;
    let mut found = Vec::new();
    while !rest.is_empty() {
        let (name, tail) = rest.split_once("=\"").unwrap_or_else(|| panic!("no label: {text}"));
        // No name here needs an escape.
        let (value, tail) = tail.split_once('"').unwrap_or_else(|| panic!("no end: {text}"));
        assert!(is_name(name) && !value.contains('\\'), "{text}");
        found.push((name, value));
        rest = tail.strip_prefix(',').unwrap_or(tail);
    }
    found
}

/// Reads the exposition format as Prometheus and its linter do, and fails where they would.
fn parse(text: &str) -> Samples {
    assert!(text.ends_with('\n'), "the last line is whole");
    let mut samples = Samples::new();
    let mut families = BTreeSet::new();
    let (mut family, mut kind, mut described) = (String::new(), String::new(), String::new());
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, words) = help.split_once(' ').expect("a help text");
            assert!(!words.is_empty() && families.insert(name.to_owned()), "{name} stands in one place");
            described = name.to_owned();
        } else if let Some(of) = line.strip_prefix("# TYPE ") {
            let (name, word) = of.split_once(' ').expect("a type");
            assert_eq!(name, described, "the help text comes before the type");
            assert!(["counter", "gauge", "histogram", "summary"].contains(&word), "{word}");
            assert!(is_name(name) && name.starts_with("instancefs_"), "{name}");
            assert_eq!(name.ends_with("_total"), word == "counter", "counters, and only they, end with _total: {name}");
            (family, kind) = (name.to_owned(), word.to_owned());
        } else {
            let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no sample: {line}"));
            let (name, inside) = match series.split_once('{') {
                Some((name, inside)) => (name, inside.strip_suffix('}').expect("a closing brace")),
                None => (series, ""),
            };
            let suffix = name.strip_prefix(family.as_str()).unwrap_or_else(|| panic!("{name} within {family}"));
            let allowed: &[&str] = match kind.as_str() {
                "histogram" => &["_bucket", "_sum", "_count"],
                "summary" => &["_sum", "_count"],
                _ => &[""],
            };
            assert!(allowed.contains(&suffix), "{name} within the {kind} {family}");
            let labels = labels(inside);
            assert_eq!(suffix == "_bucket", labels.iter().any(|(label, _)| *label == "le"), "{line}");
            let value: f64 = value.parse().unwrap_or_else(|error| panic!("{line}: {error}"));
            assert!(value.is_finite() && value >= 0.0, "{line}");
            assert!(samples.insert(series.to_owned(), value).is_none(), "{series} stands there once");
        }
    }
    for (series, count) in samples.iter().filter(|(series, _)| series.contains("seconds_count{")) {
        let of = |bound: &str| {
            let bucket = series.replace("_count{", "_bucket{").replace('}', &format!(",le=\"{bound}\"}}"));
            *samples.get(&bucket).unwrap_or_else(|| panic!("{bucket}"))
        };
        let bounds = ["0.1", "1", "10", "60", "600", "+Inf"].map(of);
        assert!(bounds.is_sorted(), "{series}: {bounds:?}");
        assert_eq!(bounds[5], *count, "{series}");
    }
    samples
}

fn read(daemon: &Daemon) -> Samples {
    parse(&fs::read_to_string(daemon.path("metrics")).expect("readable"))
}

fn value(daemon: &Daemon, series: &str) -> f64 {
    *read(daemon).get(series).unwrap_or_else(|| panic!("no {series}"))
}

#[test]
fn what_prometheus_reads_is_valid_and_whole_by_cat_and_by_cp() {
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("counted");
    daemon.set(format!("instances/{id}/state"), "active");
    let samples = read(&daemon);
    assert_eq!(samples[&format!("instancefs_build_info{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"))], 1.0);
    for part in ["hypervisor", "store", "directory", "announcer"] {
        assert_eq!(samples[&format!("instancefs_part_up{{part=\"{part}\"}}")], 1.0, "{part}");
    }
    for series in ["instancefs_backend_size_bytes", "instancefs_backend_free_bytes"] {
        wait_until(series, || {
            read(&daemon).get(&format!("{series}{{backend=\"directory\"}}")).is_some_and(|bytes| *bytes > 0.0)
        });
    }
    let samples = read(&daemon);
    let cat = Command::new("cat").arg(daemon.path("metrics")).output().expect("cat runs");
    assert!(cat.status.success());
    let copy = daemon.scratch().join("instancefs.prom");
    let cp = Command::new("cp").arg(daemon.path("metrics")).arg(&copy).status().expect("cp runs");
    assert!(cp.success());
    let names = |samples: Samples| samples.into_keys().collect::<Vec<_>>();
    let all = names(samples);
    assert!(all.len() > 100, "{}", all.len());
    assert_eq!(names(parse(&String::from_utf8(cat.stdout).expect("UTF-8"))), all);
    assert_eq!(names(parse(&fs::read_to_string(copy).expect("a copy"))), all);
}

#[test]
fn operations_refusals_commits_and_states_are_counted_as_they_happen() {
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("counted");
    let state = format!("instances/{id}/state");
    let before = read(&daemon);
    assert_eq!(before["instancefs_instances{state=\"stopped\"}"], 1.0);
    assert_eq!(before["instancefs_operations_total{kind=\"starting\",outcome=\"success\"}"], 0.0);
    assert!(!before.contains_key("instancefs_operation_duration_seconds_count{kind=\"starting\"}"));

    daemon.set(&state, "active");
    wait_until("it was started", || {
        daemon.read(&state) == "active" && daemon.read(format!("instances/{id}/task")).is_empty()
    });
    wait_until("the end is counted", || {
        value(&daemon, "instancefs_operations_total{kind=\"starting\",outcome=\"success\"}") == 1.0
    });
    let after = read(&daemon);
    assert_eq!(after["instancefs_operation_duration_seconds_count{kind=\"starting\"}"], 1.0);
    assert!(after["instancefs_operation_duration_seconds_sum{kind=\"starting\"}"] > 0.0);
    assert_eq!(after["instancefs_instances{state=\"active\"}"], 1.0);
    assert_eq!(after["instancefs_instances{state=\"stopped\"}"], 0.0);
    for series in ["instancefs_store_commit_duration_seconds_count", "instancefs_store_commit_duration_seconds_sum"] {
        assert!(after[series] > before[series], "{series}");
    }
    assert!(after["instancefs_store_commit_longest_seconds"] <= after["instancefs_store_commit_duration_seconds_sum"]);
    assert_eq!(after["instancefs_store_commit_failures_total"], 0.0);

    daemon.set(format!("instances/{id}/locked"), "1");
    assert_eq!(errno(daemon.write(&state, "stopped")), libc::EPERM);
    assert_eq!(errno(daemon.write(&state, "bicycle")), libc::EINVAL);
    assert_eq!(errno(daemon.write("instances/no-such-thing/state", "active")), libc::ENOENT);
    let refused = read(&daemon);
    let more = |name: &str| {
        let series = format!("instancefs_refusals_total{{errno=\"{name}\"}}");
        refused[&series] - before[&series]
    };
    assert_eq!((more("EPERM"), more("EINVAL"), more("EBUSY")), (1.0, 1.0, 0.0));
}

#[test]
fn an_operation_that_fails_is_counted_as_failed() {
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("unlucky");
    daemon.host_does(json!({"do": "fault", "call": "start", "mode": "fail", "message": "no KVM", "times": 1}));
    assert_ne!(errno(daemon.write(format!("instances/{id}/state"), "active")), 0);
    wait_until("the failure is counted", || {
        value(&daemon, "instancefs_operations_total{kind=\"starting\",outcome=\"failure\"}") == 1.0
    });
    assert_eq!(value(&daemon, "instancefs_operation_duration_seconds_count{kind=\"starting\"}"), 1.0);
}

#[test]
fn while_the_hypervisor_hangs_its_last_answer_gets_older_and_reading_asks_nobody() {
    const AGE: &str = "instancefs_hypervisor_last_answer_age_seconds";
    let daemon = Daemon::start(&[]);
    wait_until("it has answered", || read(&daemon).contains_key(AGE));
    daemon.host_does(json!({"do": "hang_all"}));
    wait_until("health notices", || value(&daemon, "instancefs_part_up{part=\"hypervisor\"}") == 0.0);
    let age = value(&daemon, AGE);
    wait_until("it gets older", || value(&daemon, AGE) > age + 0.5);
    let older = value(&daemon, AGE);
    daemon.host_does(json!({"do": "release_all"}));
    wait_until("it answers again", || value(&daemon, AGE) < older);
    wait_until("health recovers", || value(&daemon, "instancefs_part_up{part=\"hypervisor\"}") == 1.0);
}

/// The announcer is the daemon's child.
fn announcer(daemon: &Daemon) -> u32 {
    let pid = daemon.pid();
    let mut found = None;
    wait_until("the announcer runs", || {
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("threads").flatten();
        let all = threads.map(|thread| fs::read_to_string(thread.path().join("children")).unwrap_or_default());
        let all: String = all.chain([children]).collect::<Vec<_>>().join(" ");
        found = all.split_whitespace().filter_map(|child| child.parse().ok()).find(|child: &u32| {
            fs::read(format!("/proc/{child}/cmdline"))
                .is_ok_and(|line| line.split(|byte| *byte == 0).any(|argument| argument == b"announcer"))
        });
        found.is_some()
    });
    found.expect("found")
}

/// Lets a stopped process go on, also when the test fails.
struct Stopped(u32);

impl Drop for Stopped {
    fn drop(&mut self) {
        signal(self.0, libc::SIGCONT);
    }
}

#[test]
fn an_announcer_that_does_not_answer_has_a_queue_that_gets_older() {
    const LENGTH: &str = "instancefs_announcer_queue_length";
    const AGE: &str = "instancefs_announcer_oldest_queued_age_seconds";
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("quiet");
    // What the start has to announce may come between two readings.
    wait_until("all is announced", || value(&daemon, LENGTH) == 0.0 && value(&daemon, AGE) == 0.0);
    let stopped = Stopped(announcer(&daemon));
    signal(stopped.0, libc::SIGSTOP);
    daemon.set(format!("instances/{id}/description"), "nobody hears of this yet");
    wait_until("it is queued", || value(&daemon, LENGTH) > 0.0);
    let age = value(&daemon, AGE);
    wait_until("it gets older", || value(&daemon, AGE) > age + 0.2);
    drop(stopped);
    wait_until("it is announced", || value(&daemon, LENGTH) == 0.0 && value(&daemon, AGE) == 0.0);
}
