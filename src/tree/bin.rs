//! The files that an object has in the bin only.

use super::value::{filled, malformed};
use crate::model::Class;
use crate::model::reason::Reason;
use crate::model::record::BinEntry;

/// What `class` says.
pub const CLASS: &str = "In the bin: the directory that it came from, and goes back to.";
/// What `deleted_at` says.
pub const DELETED_AT: &str = "In the bin: when it was moved there.";
/// What `deleted_by` says.
pub const DELETED_BY: &str = "In the bin: login name of who moved it there.";
/// What `expires_at` says.
pub const EXPIRES_AT: &str = "In the bin: when it may be removed for good, or never; write Unix seconds or never.";

/// `expires_at` of what never does.
const NEVER: &str = "never";

/// The content of `class`.
pub fn class(class: Class, entry: Option<&BinEntry>) -> Option<String> {
    entry.map(|_| class.directory().to_owned())
}

/// The content of `deleted_at`.
pub fn deleted_at(entry: Option<&BinEntry>) -> Option<String> {
    entry.map(|entry| entry.deleted_at.to_string())
}

/// The content of `deleted_by`.
pub fn deleted_by(entry: Option<&BinEntry>) -> Option<String> {
    entry.map(|entry| entry.deleted_by.clone())
}

/// The content of `expires_at`.
pub fn expires_at(entry: Option<&BinEntry>) -> Option<String> {
    let at = |entry: &BinEntry| entry.expiry.map_or_else(|| NEVER.to_owned(), |expiry| expiry.at.to_string());
    entry.map(at)
}

/// What is written to `expires_at`.
pub fn expiry(value: &str) -> Result<Option<u64>, Reason> {
    match filled(value)? {
        NEVER => Ok(None),
        seconds if seconds.bytes().all(|byte| byte.is_ascii_digit()) => {
            seconds.parse().map(Some).map_err(|_| Reason::OutOfRange { low: 0, high: u64::MAX, unit: "seconds" })
        }
        _ => Err(malformed("write Unix seconds, or never")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::record::Expiry;

    #[test]
    fn an_expiry_is_a_time_or_never_and_nothing_else() {
        assert_eq!(expiry("never").expect("valid"), None);
        assert_eq!(expiry("1700000000").expect("valid"), Some(1_700_000_000));
        for bad in ["", "soon", "-1", "+1", "1.5", "0x10", "Never", "1K"] {
            assert_eq!(expiry(bad).expect_err(bad).errno(), libc::EINVAL, "{bad}");
        }
        assert_eq!(expiry("99999999999999999999").expect_err("too large").errno(), libc::ERANGE);
    }

    #[test]
    fn the_files_of_the_bin_are_there_with_the_entry_only() {
        let entry = |expiry| BinEntry { deleted_at: 7, deleted_by: "ann".into(), expiry };
        let expiring = entry(Some(Expiry { at: 9, at_uptime: 1 }));
        assert_eq!(class(Class::Image, Some(&expiring)).as_deref(), Some("images"));
        assert_eq!(deleted_at(Some(&expiring)).as_deref(), Some("7"));
        assert_eq!(deleted_by(Some(&expiring)).as_deref(), Some("ann"));
        assert_eq!(expires_at(Some(&expiring)).as_deref(), Some("9"));
        assert_eq!(expires_at(Some(&entry(None))).as_deref(), Some("never"));
        assert_eq!(
            [class(Class::Image, None), deleted_at(None), deleted_by(None), expires_at(None)],
            [None, None, None, None]
        );
    }
}
