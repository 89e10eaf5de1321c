//! What `stat` says of a place: in root's mount, which he shares with others, and in an ordinary user's, in which there is
//! nobody else.

use super::interface::Tree;
use super::node::{Directory, Node};
use super::root::{self, Audience};
use super::{Attributes, Caching, Kind};
use crate::model::Class;
use crate::privilege::Privilege;

/// The gid of the root directory: its members have no rights in it, everybody else may pass.
const NOBODY: u32 = 65534;

impl Tree {
    /// What a place is in a mount that root shares with others.
    pub(super) fn shared_attributes(&self, node: Node) -> Option<Attributes> {
        let group = self.settings.access_group;
        let time = self.settings.started_at;
        let directory = |mode, gid| Attributes {
            kind: Kind::Directory,
            mode,
            uid: 0,
            gid,
            size: 0,
            allocated: None,
            caching: Caching::Attributes,
            time,
        };
        match node {
            Node::Directory(Directory::Root) => Some(directory(0o705, NOBODY)),
            Node::Directory(_) => Some(directory(0o770, group)),
            Node::File(parent, id) => {
                let row = root::table(parent).iter().find(|row| row.id == id)?;
                let gid = match row.audience {
                    Audience::Everybody => 0,
                    Audience::Access => group,
                    Audience::Admin => self.settings.admin_group,
                };
                let (caching, size) = match row.is_volatile(parent) {
                    true => (Caching::Nothing, 0),
                    false => (Caching::Attributes, self.file_size(parent, id)?),
                };
                Some(Attributes {
                    kind: Kind::File,
                    mode: row.mode(),
                    uid: 0,
                    gid,
                    size,
                    allocated: None,
                    caching,
                    time,
                })
            }
            Node::Events(first) => {
                let size = self.events.segment(first)?.length;
                let gid = self.settings.admin_group;
                // The name may stand for another one at any time.
                let caching = Caching::Nothing;
                Some(Attributes { kind: Kind::File, mode: 0o440, uid: 0, gid, size, allocated: None, caching, time })
            }
            Node::Scratch(serial) => {
                let (uid, parent, size) = self.scratch.stat(serial)?;
                let gid = self.object(parent)?.ownership().project;
                // Nobody else writes into what its creator is about to rename over an attribute with his rights.
                let kind = self.scratch.kind(serial)?;
                let mode = match kind {
                    Kind::File => 0o600,
                    Kind::Directory => 0o700,
                    Kind::Symlink => 0o777,
                };
                Some(Attributes { kind, mode, uid, gid, size, allocated: None, caching: Caching::Nothing, time })
            }
            Node::Object(class, number) | Node::NameLink(class, number) | Node::StateLink(class, number) => {
                match self.inventory.by_number(number) {
                    Some(object) => self.object_attributes(node, &object),
                    // Gone, but its name is not yet taken back from the kernel: the replay of that has to find it.
                    None => self.names.published(node).map(|_| match node {
                        Node::Object(..) => Attributes { mode: 0o700, ..directory(0o700, 0) },
                        _ => Attributes { kind: Kind::Symlink, mode: 0o777, ..directory(0o777, 0) },
                    }),
                }
                .filter(|_| Class::ALL.contains(&class))
            }
            Node::Attribute(..) | Node::Key(..) => self.object_attributes(node, &self.object(node)?),
        }
    }
}

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
