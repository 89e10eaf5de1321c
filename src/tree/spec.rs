//! `spec.json`: what can be written, as one canonical document.

use serde_json::{Value, json};

use super::account::{group_name, user_name};
use crate::inventory::Instance;

/// The document of an instance: keys in alphabetical order, two spaces, a final newline, so that comparing texts
/// compares contents.
pub fn instance(instance: &Instance) -> String {
    let record = &instance.record;
    let lock = record.protection.lock.as_ref();
    let document = json!({
        "description": record.description,
        "disable_terminate": record.protection.disable_terminate,
        "image": record.image.map(|id| id.to_string()),
        "locked": lock.is_some(),
        "locked_reason": lock.map_or("", |lock| lock.reason.as_str()),
        "memory_bytes": record.memory_bytes,
        "name": instance.name(),
        "owner": user_name(record.ownership.owner),
        "project": group_name(record.ownership.project),
        "root_disk_bytes": record.root_disk_bytes,
        "state": instance.observed().state.word(),
        "stop_timeout_seconds": record.stop_timeout_seconds,
        "vcpus": record.vcpus,
    });
    canonical(&document)
}

fn canonical(document: &Value) -> String {
    format!("{document:#}\n")
}
