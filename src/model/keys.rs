//! The named values of an object that a user makes: each is a file in a directory of the object.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::reason::Reason;

/// How many an object may have at once.
pub const MOST: usize = 128;
/// The largest serial: it has to fit into an inode number.
pub const LARGEST_SERIAL: u32 = (1 << 23) - 1;

/// One value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry<V> {
    /// Part of the file's inode number; unique in this directory, and never used again.
    pub serial: u32,
    /// The value.
    pub value: V,
}

/// All of a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keys<V> {
    last: u32,
    entries: BTreeMap<String, Entry<V>>,
}

impl<V> Default for Keys<V> {
    fn default() -> Keys<V> {
        Keys { last: 0, entries: BTreeMap::new() }
    }
}

impl<V> Keys<V> {
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&V> {
        self.entries.get(key).map(|entry| &entry.value)
    }

    /// All of them, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Entry<V>)> {
        self.entries.iter().map(|(key, entry)| (key.as_str(), entry))
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is room for one more.
    ///
    /// # Errors
    ///
    /// [`Reason::KeyQuota`] where there is none.
    pub fn room(&self) -> Result<(), Reason> {
        let is_full = self.entries.len() >= MOST || self.last >= LARGEST_SERIAL;
        if is_full { Err(Reason::KeyQuota { limit: MOST }) } else { Ok(()) }
    }

    /// Sets a value, made if it is not there.
    ///
    /// # Errors
    ///
    /// [`Reason::KeyQuota`] where there would be more than [`MOST`], or no serial is left.
    pub fn set(&mut self, key: &str, value: V) -> Result<(), Reason> {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.value = value;
            return Ok(());
        }
        self.room()?;
        self.last += 1;
        self.entries.insert(key.to_owned(), Entry { serial: self.last, value });
        Ok(())
    }

    /// Removes all whose value is not wanted.
    pub fn retain(&mut self, is_wanted: impl Fn(&V) -> bool) {
        self.entries.retain(|_, entry| is_wanted(&entry.value));
    }

    /// Removes a key; one that is not there is no error.
    pub fn remove(&mut self, key: &str) -> Option<V> {
        self.entries.remove(key).map(|entry| entry.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_comes_back_has_another_serial_and_the_129th_is_refused() {
        let mut keys = Keys::default();
        keys.set("a", 1).expect("set");
        keys.set("a", 2).expect("set");
        let first = keys.iter().next().map(|(_, entry)| entry.serial);
        assert_eq!(keys.remove("a"), Some(2));
        keys.set("a", 3).expect("set");
        assert_ne!(keys.iter().next().map(|(_, entry)| entry.serial), first);
        for key in 1..MOST {
            keys.set(&key.to_string(), 0).expect("set");
        }
        assert_eq!(keys.set("more", 0).map_err(|reason| reason.errno()), Err(libc::EDQUOT));
        assert!(keys.set("a", 4).is_ok());
    }
}
