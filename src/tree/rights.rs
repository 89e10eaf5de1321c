//! What the kernel is told to decide access to objects by: owner, group, mode, and what single groups get besides.
//!
//! Owner and project have the bits of the row's mode. Readers of a public image have its group's reading bits as
//! everybody else's; so have the members of a shared one, each by an entry of its own.

use super::attribute::{Read, Row};
use crate::inventory::{Image, Object, Transfer};
use crate::model::caller::Ownership;
use crate::model::image::State;
use crate::model::sharing::{Audience, audience};

/// The bits of reading in a group's part of a mode.
const READING: u16 = 0o050;
/// The bit of writing there.
const WRITING: u16 = 0o020;

/// An image's bytes, once they never change.
const PUBLISHED_DATA: u16 = 0o440;

/// The directory of an object.
pub const DIRECTORY: u16 = 0o770;

/// The directory of an offer: who knows its uuid reaches `accept`.
pub const OFFER_DIRECTORY: u16 = 0o711;

/// The directory of a flavor, which is root's.
pub const FLAVOR_DIRECTORY: u16 = 0o750;

/// What one group may beyond owner and group of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Group id.
    pub group: u32,
    /// 4 to read, 2 to write, 1 to pass.
    pub bits: u16,
}

/// Owner, group and mode of a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Permission bits.
    pub mode: u16,
}

/// Everything about an object that its rights follow from: while it is equal, so are they.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Admission {
    ownership: Option<Ownership>,
    is_draft: bool,
    is_deactivated: bool,
    readers: Readers,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Readers {
    #[default]
    Nobody,
    Groups(Vec<u32>),
    Everybody,
}

/// The present one of an object.
pub fn admission(object: &Object) -> Admission {
    let ownership = Some(object.ownership());
    match object {
        Object::Instance(instance) => {
            Admission { ownership, is_draft: instance.record.draft.is_some(), ..Admission::default() }
        }
        Object::Image(image) => Admission {
            ownership,
            is_draft: image.record.draft.is_some(),
            is_deactivated: image.record.deactivated,
            readers: match audience(&image.record) {
                Audience::Nobody => Readers::Nobody,
                Audience::Members => Readers::Groups(members(image).collect()),
                Audience::Everybody => Readers::Everybody,
            },
        },
        Object::Volume(volume) => {
            Admission { ownership, is_draft: volume.record.draft.is_some(), ..Admission::default() }
        }
        Object::Task(_) | Object::Flavor(_) | Object::Transfer(_) | Object::Backend(_) => {
            Admission { ownership, ..Admission::default() }
        }
    }
}

/// Of a place in an object whose own mode is this.
pub fn rights(object: &Object, mode: u16, access_group: u32) -> Rights {
    let Ownership { owner, mut project, .. } = object.ownership();
    // The kernel cannot tell who may read one that is not public; see [`super::Interface::may_open`].
    if matches!(object, Object::Flavor(_) | Object::Backend(_)) {
        project = access_group;
    }
    let everybody = match object {
        Object::Image(image) => match audience(&image.record) {
            Audience::Everybody => (mode & READING) >> 3,
            Audience::Nobody | Audience::Members => 0,
        },
        Object::Instance(_)
        | Object::Task(_)
        | Object::Flavor(_)
        | Object::Volume(_)
        | Object::Transfer(_)
        | Object::Backend(_) => 0,
    };
    Rights { uid: owner, gid: project, mode: mode | everybody }
}

/// Of the key of an offer: it is for who made the offer, also where the volume is not his own.
pub fn of_offerer(transfer: &Transfer, mode: u16) -> Rights {
    Rights { uid: transfer.record.offered_by, gid: transfer.record.ownership.project, mode }
}

/// What single groups get in a place whose own mode is this; `writer` is one that writes too.
pub fn grants(object: &Object, mode: u16, writer: Option<u32>) -> Vec<Grant> {
    let bits = (mode & READING) >> 3;
    let grant = |group| Grant { group, bits: if writer == Some(group) { (mode & WRITING) >> 3 | bits } else { bits } };
    match object {
        Object::Image(image) if bits != 0 => match audience(&image.record) {
            Audience::Members => members(image).map(grant).collect(),
            Audience::Nobody | Audience::Everybody => Vec::new(),
        },
        Object::Image(_)
        | Object::Instance(_)
        | Object::Task(_)
        | Object::Flavor(_)
        | Object::Volume(_)
        | Object::Transfer(_)
        | Object::Backend(_) => Vec::new(),
    }
}

fn members(image: &Image) -> impl Iterator<Item = u32> {
    image.record.sharing.members.iter().map(|(project, ..)| project)
}

/// The own mode of a row's file; `None` if it is root's alone.
pub fn image_row<C>(row: &Row<Image, C>, image: &Image) -> Option<u16> {
    if !matches!(row.read, Read::Data) {
        return Some(row.mode);
    }
    match image.state() {
        State::Draft => Some(row.mode),
        State::Active | State::Error | State::SoftDeleted => Some(PUBLISHED_DATA),
        State::Deactivated => None,
    }
}

/// Of a file that is root's alone.
pub const ROOT_ALONE: Rights = Rights { uid: 0, gid: 0, mode: 0o400 };

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use uuid::Uuid;

    use super::*;
    use crate::model::caller::{Caller, NO_PROJECT};
    use crate::model::record::{Draft, ImageRecord};
    use crate::model::sharing::{Status, Visibility, may_read};

    /// What the kernel does with a mode and a list, acl(5), for the bits of reading a directory.
    fn kernel_admits(caller: &Caller, rights: Rights, grants: &[Grant]) -> bool {
        let all = |bits: u16| bits & 0o5 == 0o5;
        if caller.uid == 0 {
            return true;
        }
        if caller.uid == rights.uid {
            return all(rights.mode >> 6);
        }
        let of_groups = grants.iter().filter(|grant| caller.in_group(grant.group)).map(|grant| grant.bits);
        let of_group = caller.in_group(rights.gid).then_some(rights.mode >> 3);
        let mut matching = of_groups.chain(of_group).map(|bits| bits & rights.mode >> 3).peekable();
        if matching.peek().is_some() { matching.any(all) } else { all(rights.mode) }
    }

    #[test]
    fn the_kernel_admits_whom_the_model_lets_read() {
        const MEMBER: u32 = 60;
        let mut record = ImageRecord::new(16, "image".into(), Ownership { owner: 1, project: 50, generation: 0 }, 0);
        record.sharing.members.set(MEMBER, Status::Rejected).expect("one fits");
        let mut cases = 0;
        for visibility in Visibility::ALL {
            for draft in [None, Some(Draft { written: true })] {
                for (deactivated, project) in [(false, 50), (true, 50), (false, NO_PROJECT)] {
                    record.sharing.visibility = visibility;
                    record.draft = draft;
                    record.deactivated = deactivated;
                    record.ownership.project = project;
                    let image = Image { id: Uuid::nil(), record: record.clone(), task: None, data_bytes: 0 };
                    let object = Object::Image(Arc::new(image));
                    for uid in [0, 1, 2] {
                        for groups in [vec![], vec![50], vec![MEMBER], vec![50, MEMBER], vec![70]] {
                            let caller = Caller { uid, gid: 90, groups, ..Caller::daemon() };
                            let (rights, grants) = (rights(&object, DIRECTORY, 70), grants(&object, DIRECTORY, None));
                            assert_eq!(
                                kernel_admits(&caller, rights, &grants),
                                may_read(&record, &caller),
                                "{caller:?} {:?} {draft:?} {rights:?} {grants:?}",
                                record.sharing
                            );
                            cases += 1;
                        }
                    }
                }
            }
        }
        assert_eq!(cases, 270);
    }
}
