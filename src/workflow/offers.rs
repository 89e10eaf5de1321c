//! What is known of offers in memory only: keys that who offered may still read, and who wrote wrong ones. Times are
//! seconds that the host was up, which nobody can set.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use crate::model::reason::Reason;
use crate::model::secret::Secret;

/// How long a key is shown.
const SHOWN_SECONDS: u64 = 600;
/// So many wrong keys of one user...
const WRONG_KEYS: usize = 5;
/// ... in so many seconds shut him out.
const WINDOW_SECONDS: u64 = 3600;

struct Shown {
    line: Arc<Secret>,
    uid: u32,
    until: u64,
}

/// See the module.
#[derive(Default)]
pub(super) struct Offers {
    keys: Mutex<HashMap<Uuid, Shown>>,
    /// When wrong keys came, by uid.
    wrong: Mutex<HashMap<u32, Vec<u64>>>,
}

impl Offers {
    /// Shows a key, with its newline, to this user for a while.
    pub(super) fn show(&self, offer: Uuid, line: Secret, uid: u32, uptime: u64) {
        let until = uptime.saturating_add(SHOWN_SECONDS);
        self.keys.lock().insert(offer, Shown { line: Arc::new(line), uid, until });
    }

    /// The key of an offer, with its newline.
    pub(super) fn key(&self, offer: Uuid, uid: u32, uptime: u64) -> Result<Arc<Secret>, Reason> {
        self.tidy(uptime);
        match self.keys.lock().get(&offer) {
            Some(shown) if shown.uid == uid => Ok(shown.line.clone()),
            Some(_) => Err(Reason::NotYours { class: crate::model::Class::Transfer }),
            None => Err(Reason::NotFound(
                "key to be read any more: take the offer back and make it again to have another one".to_owned(),
            )),
        }
    }

    /// The offer has ended.
    pub(super) fn forget(&self, offer: Uuid) {
        self.keys.lock().remove(&offer);
    }

    /// Whether a user has written so many wrong keys that no more are looked at.
    pub(super) fn is_shut_out(&self, uid: u32, uptime: u64) -> bool {
        let wrong = self.wrong.lock();
        let recent = |at: &&u64| at.saturating_add(WINDOW_SECONDS) > uptime;
        wrong.get(&uid).is_some_and(|times| times.iter().filter(recent).count() >= WRONG_KEYS)
    }

    /// A user has written a wrong key.
    pub(super) fn wrong(&self, uid: u32, uptime: u64) {
        let mut wrong = self.wrong.lock();
        let times = wrong.entry(uid).or_default();
        times.retain(|at| at.saturating_add(WINDOW_SECONDS) > uptime);
        times.push(uptime);
    }

    /// Forgets what is over.
    pub(super) fn tidy(&self, uptime: u64) {
        self.keys.lock().retain(|_, shown| shown.until > uptime);
        self.wrong.lock().retain(|_, times| {
            times.retain(|at| at.saturating_add(WINDOW_SECONDS) > uptime);
            !times.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_shown_to_who_offered_for_ten_minutes_and_the_memory_is_given_back() {
        let (offers, offer) = (Offers::default(), Uuid::new_v4());
        offers.show(offer, Secret::new("key\n".to_owned()), 7, 100);
        assert_eq!(offers.key(offer, 7, 699).map(|line| line.bytes().to_vec()), Ok(b"key\n".to_vec()));
        assert_eq!(offers.key(offer, 0, 699).map_err(|reason| reason.errno()), Err(libc::EACCES));
        let held = Arc::downgrade(&offers.keys.lock()[&offer].line);
        assert_eq!(offers.key(offer, 7, 700).map_err(|reason| reason.errno()), Err(libc::ENOENT));
        assert!(held.upgrade().is_none());
    }

    #[test]
    fn five_wrong_keys_within_an_hour_shut_out_their_user_until_the_first_is_an_hour_old() {
        let offers = Offers::default();
        for at in 0..4 {
            offers.wrong(7, at);
        }
        assert!(!offers.is_shut_out(7, 3599));
        offers.wrong(7, 3599);
        assert!(offers.is_shut_out(7, 3599));
        assert!(!offers.is_shut_out(8, 3599));
        assert!(!offers.is_shut_out(7, 3600), "the first is an hour old");
        offers.tidy(3599 + 3600);
        assert!(offers.wrong.lock().is_empty());
    }
}
