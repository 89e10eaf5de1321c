//! What a reconfiguration changes of an instance that exists already: one set of values, done as one operation.

use serde::{Deserialize, Serialize};

/// The values that are to change; `None` leaves one as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Reconfiguration {
    /// Virtual CPUs; while stopped.
    pub vcpus: Option<u32>,
    /// Memory in bytes; while stopped.
    pub memory_bytes: Option<u64>,
    /// Size of the root disk in bytes, which only grows; while stopped.
    pub root_disk_bytes: Option<u64>,
    /// Started with the host; at any time.
    pub autostart: Option<bool>,
    /// The name of the flavor that the values come from.
    pub flavor: Option<String>,
}

impl Reconfiguration {
    /// Only what is known to the hypervisor while it is off.
    pub fn needs_stopped(&self) -> bool {
        self.vcpus.is_some() || self.memory_bytes.is_some() || self.root_disk_bytes.is_some()
    }

    /// This one and a later one, whose values count.
    #[must_use]
    pub fn merged(&self, later: &Reconfiguration) -> Reconfiguration {
        Reconfiguration {
            vcpus: later.vcpus.or(self.vcpus),
            memory_bytes: later.memory_bytes.or(self.memory_bytes),
            root_disk_bytes: later.root_disk_bytes.or(self.root_disk_bytes),
            autostart: later.autostart.or(self.autostart),
            flavor: later.flavor.clone().or_else(|| self.flavor.clone()),
        }
    }

    /// The file that asks for just this; the document if several do.
    pub fn file(&self) -> &'static str {
        if self.flavor.is_some() {
            return "flavor";
        }
        let files = [
            (self.vcpus.is_some(), "vcpus"),
            (self.memory_bytes.is_some(), "memory_bytes"),
            (self.root_disk_bytes.is_some(), "root_disk_bytes"),
            (self.autostart.is_some(), "autostart"),
        ];
        let mut asked = files.into_iter().filter_map(|(asks, file)| asks.then_some(file));
        match (asked.next(), asked.next()) {
            (Some(only), None) => only,
            (Some(_), Some(_)) | (None, _) => "spec.json",
        }
    }

    /// Doing this one does all of `other`.
    pub fn includes(&self, other: &Reconfiguration) -> bool {
        self.merged(other) == *self
    }

    /// Both change some value.
    pub fn overlaps(&self, other: &Reconfiguration) -> bool {
        (self.vcpus.is_some() && other.vcpus.is_some())
            || (self.memory_bytes.is_some() && other.memory_bytes.is_some())
            || (self.root_disk_bytes.is_some() && other.root_disk_bytes.is_some())
            || (self.autostart.is_some() && other.autostart.is_some())
            || (self.flavor.is_some() && other.flavor.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_keeps_what_the_later_one_leaves_alone() {
        let two = Reconfiguration { vcpus: Some(2), memory_bytes: Some(1), ..Reconfiguration::default() };
        let three = Reconfiguration { vcpus: Some(3), autostart: Some(true), ..Reconfiguration::default() };
        let both = two.merged(&three);
        assert_eq!((both.vcpus, both.memory_bytes, both.autostart), (Some(3), Some(1), Some(true)));
        assert!(both.includes(&three) && !both.includes(&two) && both.overlaps(&two));
        let disk = Reconfiguration { root_disk_bytes: Some(1), ..Reconfiguration::default() };
        assert!(!both.overlaps(&disk) && !both.includes(&disk));
    }
}
