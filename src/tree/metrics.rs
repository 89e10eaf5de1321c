//! The content of `metrics`: Prometheus' text format, version 0.0.4.
//!
//! Every series that can ever come is there from the beginning, with 0, but for the histograms of operations: those of
//! kinds that never ran would be most of the file.

use std::fmt::{Display, Write};
use std::time::Duration;

use crate::inventory::metrics::{DURATION_BOUNDS, OUTCOMES};
use crate::inventory::{Inventory, Part};
use crate::model::image::State as ImageState;
use crate::model::instance::State as InstanceState;
use crate::model::volume::State as VolumeState;

/// The whole text, as of now. Asks nobody but the inventory.
pub fn render(inventory: &Inventory) -> String {
    let mut text = Text::default();
    text.family("instancefs_build_info", "gauge", "The version that runs.");
    text.sample("instancefs_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
    objects(&mut text, inventory);
    operations(&mut text, inventory);
    parts(&mut text, inventory);
    store(&mut text, inventory);
    text.0
}

fn objects(text: &mut Text, inventory: &Inventory) {
    let instances = inventory.instances();
    let of_instances = InstanceState::ALL.map(|state| {
        let there = instances.iter().filter(|instance| instance.observed().state == state);
        (state.word(), there.count())
    });
    text.states("instancefs_instances", "Instances by state.", of_instances);
    let images = inventory.images();
    let of_images =
        ImageState::ALL.map(|state| (state.word(), images.iter().filter(|image| image.state() == state).count()));
    text.states("instancefs_images", "Images by state.", of_images);
    let volumes = inventory.volumes();
    let of_volumes = VolumeState::ALL
        .map(|state| (state.word(), volumes.iter().filter(|volume| volume.record.state() == state).count()));
    text.states("instancefs_volumes", "Volumes by state.", of_volumes);
}

fn operations(text: &mut Text, inventory: &Inventory) {
    let metrics = inventory.metrics();
    let kinds: Vec<_> = metrics.operations().collect();
    let name = "instancefs_operations_total";
    text.family(name, "counter", "Operations that have ended, by the word of their task.");
    for (kind, operations) in &kinds {
        for (outcome, count) in OUTCOMES.iter().zip(operations.outcomes) {
            text.sample(name, &[("kind", kind.word()), ("outcome", outcome.word())], count);
        }
    }
    text.family(
        "instancefs_operation_duration_seconds",
        "histogram",
        "How long operations took until they ended, whatever the outcome.",
    );
    for (kind, operations) in &kinds {
        let count: u64 = operations.outcomes.iter().sum();
        if count == 0 {
            continue;
        }
        let bucket = |text: &mut Text, bound: &str, count: u64| {
            let labels = [("kind", kind.word()), ("le", bound)];
            text.sample("instancefs_operation_duration_seconds_bucket", &labels, count);
        };
        for (bound, within) in DURATION_BOUNDS.iter().zip(operations.within) {
            // Counted while this is written, a bucket may be ahead of the count.
            bucket(text, &seconds(Duration::from_millis(*bound)), within.min(count));
        }
        bucket(text, "+Inf", count);
        let labels = [("kind", kind.word())];
        text.sample("instancefs_operation_duration_seconds_sum", &labels, seconds(operations.sum));
        text.sample("instancefs_operation_duration_seconds_count", &labels, count);
    }
    let name = "instancefs_refusals_total";
    text.family(name, "counter", "Requests that were refused, by errno.");
    for (errno, count) in metrics.refusals() {
        text.sample(name, &[("errno", errno)], count);
    }
}

fn parts(text: &mut Text, inventory: &Inventory) {
    let metrics = inventory.metrics();
    let health = inventory.health();
    let name = "instancefs_part_up";
    text.family(name, "gauge", "1 if health says ok of the part, else 0.");
    let parts = [
        ("hypervisor", &health.hypervisor),
        ("store", &health.store),
        ("directory", &health.directory),
        ("announcer", &health.announcer),
    ];
    for (part, state) in parts {
        text.sample(name, &[("part", part)], u8::from(*state == Part::Ok));
    }
    if let Some(age) = metrics.since_answer() {
        let name = "instancefs_hypervisor_last_answer_age_seconds";
        text.family(name, "gauge", "Seconds since the hypervisor answered last.");
        text.sample(name, &[], seconds(age));
    }
    if let Some(backlog) = metrics.backlog() {
        let name = "instancefs_announcer_queue_length";
        text.family(name, "gauge", "Files and names whose change is still to be announced.");
        text.sample(name, &[], backlog.length);
        let name = "instancefs_announcer_oldest_queued_age_seconds";
        text.family(name, "gauge", "Since when the oldest of them waits, in seconds; 0 if none does.");
        text.sample(name, &[], seconds(backlog.oldest));
    }
}

fn store(text: &mut Text, inventory: &Inventory) {
    let commits = inventory.metrics().commits();
    let name = "instancefs_store_commit_duration_seconds";
    text.family(name, "summary", "Durable transactions of the store, and how long they took.");
    text.sample("instancefs_store_commit_duration_seconds_sum", &[], seconds(commits.sum));
    text.sample("instancefs_store_commit_duration_seconds_count", &[], commits.count);
    let name = "instancefs_store_commit_longest_seconds";
    text.family(name, "gauge", "The longest of them since the daemon started.");
    text.sample(name, &[], seconds(commits.longest));
    let name = "instancefs_store_commit_failures_total";
    text.family(name, "counter", "Transactions that could not be stored.");
    text.sample(name, &[], commits.failures);
    let mut known: Vec<_> = inventory
        .backends()
        .iter()
        .filter_map(|backend| Some((backend.record.name.clone(), backend.capacity?)))
        .collect();
    known.sort();
    for (name, help, of) in [
        ("instancefs_backend_size_bytes", "How much fits into the backend, as last asked.", 0),
        ("instancefs_backend_free_bytes", "How much of that is free, as last asked.", 1),
    ] {
        if known.is_empty() {
            continue;
        }
        text.family(name, "gauge", help);
        for (backend, (total, free)) in &known {
            text.sample(name, &[("backend", backend)], if of == 0 { total } else { free });
        }
    }
}

/// Seconds with all their digits, which Prometheus reads as a float.
fn seconds(duration: Duration) -> String {
    duration.as_secs_f64().to_string()
}

#[derive(Default)]
struct Text(String);

impl Text {
    /// Begins a metric family. Its samples follow before the next one begins.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let pairs: Vec<_> = labels.iter().map(|(label, value)| format!("{label}=\"{}\"", quoted(value))).collect();
        let braces = if pairs.is_empty() { String::new() } else { format!("{{{}}}", pairs.join(",")) };
        let _ = writeln!(self.0, "{name}{braces} {value}");
    }

    fn states<const COUNT: usize>(&mut self, name: &str, help: &str, states: [(&str, usize); COUNT]) {
        self.family(name, "gauge", help);
        for (state, count) in states {
            self.sample(name, &[("state", state)], count);
        }
    }
}

fn quoted(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_leave_its_label() {
        let mut text = Text::default();
        text.sample("a", &[("backend", "x\"} 1\n\\")], 2);
        assert_eq!(text.0, "a{backend=\"x\\\"} 1\\n\\\\\"} 2\n");
    }
}
