//! What is written to a volume's `transfer`: an offer's name, and whom it is for.

use nix::unistd::{Group, User};
use uuid::Uuid;

use super::value::{malformed, name};
use crate::model::reason::Reason;
use crate::model::transfer::Recipient;
use crate::model::volume::change::VolumeChange;

/// `NAME [to=USER or to=:GROUP]`. A name that is a user's and a group's is the user's.
///
/// # Errors
///
/// [`Reason::Malformed`] where there is no name or nobody is called so.
pub fn parse(value: &str) -> Result<VolumeChange, Reason> {
    let (wanted, recipient) = match value.rsplit_once(' ') {
        Some((wanted, last)) if last.starts_with("to=") => (wanted.trim_end(), Some(recipient(&last["to=".len()..])?)),
        Some(_) | None if value.starts_with("to=") => {
            return Err(malformed("write a name for the offer first, and then whom it is for: NAME [to=USER]"));
        }
        Some(_) | None => (value, None),
    };
    Ok(VolumeChange::Offer { transfer: Uuid::new_v4(), name: name(wanted)?, recipient })
}

fn recipient(value: &str) -> Result<Recipient, Reason> {
    let nobody = || malformed("there is no such user or group on this host; write to=USER, or to=:GROUP");
    let group = |name: &str| Group::from_name(name).ok().flatten().map(|group| Recipient::Group(group.gid.as_raw()));
    let number = |text: &str| text.parse::<u32>().ok().filter(|id| *id != u32::MAX);
    if let Some(name) = value.strip_prefix(':') {
        return group(name).or_else(|| number(name).map(Recipient::Group)).ok_or_else(nobody);
    }
    let user = User::from_name(value).ok().flatten().map(|user| Recipient::User(user.uid.as_raw()));
    user.or_else(|| group(value)).or_else(|| number(value).map(Recipient::User)).ok_or_else(nobody)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(value: &str) -> Option<(String, Option<Recipient>)> {
        match parse(value) {
            Ok(VolumeChange::Offer { name, recipient, .. }) => Some((name, recipient)),
            Ok(_) | Err(_) => None,
        }
    }

    #[test]
    fn an_offer_has_a_name_and_perhaps_somebody_whom_it_is_for() {
        let to_root = Some(Recipient::User(0));
        assert_eq!(parsed("for you"), Some(("for you".to_owned(), None)));
        assert_eq!(parsed("gift to=root"), Some(("gift".to_owned(), to_root)));
        assert_eq!(parsed("two words  to=root"), Some(("two words".to_owned(), to_root)));
        assert_eq!(parsed("gift to=:root"), Some(("gift".to_owned(), Some(Recipient::Group(0)))));
        assert_eq!(parsed("gift to=2001"), Some(("gift".to_owned(), Some(Recipient::User(2001)))));
        assert_eq!(parsed("gift to=:2001"), Some(("gift".to_owned(), Some(Recipient::Group(2001)))));
        assert_eq!(parsed("to=nowhere here"), None, "whom it is for comes last");
        for bad in ["to=root", " to=root", "gift to=", "gift to=:", "gift to=no.such.user", "gift to=4294967295"] {
            assert_eq!(parsed(bad), None, "{bad:?}");
        }
    }
}
