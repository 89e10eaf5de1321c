//! The modes of an ordinary user's mount, in which there is nobody else.

use super::{Attributes, Kind};
use crate::privilege::Privilege;

/// What a place is to root's mount, as it is in this user's: his, and nobody else's.
///
/// He may write by its mode also what is only read: the announcer runs as him, and opens for writing what has changed.
/// Everybody else who does that is refused by the daemon (`EACCES`).
pub(super) fn private(attributes: Attributes, user: Privilege) -> Attributes {
    let mode = match attributes.kind {
        Kind::Directory => 0o700,
        Kind::Symlink => attributes.mode,
        Kind::File if attributes.mode & 0o200 == 0 => 0o644,
        Kind::File => attributes.mode & 0o600,
    };
    Attributes { mode, uid: user.uid, gid: user.gid, ..attributes }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Caching;

    #[test]
    fn an_ordinary_user_owns_everything_and_his_announcer_may_open_everything() {
        let user = Privilege { uid: 1000, gid: 100 };
        let of = |kind, mode| {
            let roots =
                Attributes { kind, mode, uid: 0, gid: 7, size: 1, allocated: None, caching: Caching::Nothing, time: 2 };
            let his = private(roots, user);
            assert_eq!((his.uid, his.gid, his.size, his.time), (1000, 100, 1, 2));
            his.mode
        };
        assert_eq!(of(Kind::Directory, 0o705), 0o700);
        assert_eq!(of(Kind::File, 0o440), 0o644);
        assert_eq!(of(Kind::File, 0o660), 0o600);
        assert_eq!(of(Kind::File, 0o220), 0o200);
        assert_eq!(of(Kind::Symlink, 0o777), 0o777);
    }
}
