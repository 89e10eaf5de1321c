//! POSIX access control lists as the kernel wants them: the extended attribute `system.posix_acl_access`.

use crate::tree::Grant;

/// The extended attribute's name.
pub const ACCESS: &str = "system.posix_acl_access";
/// That of the list which new entries of a directory would get; nothing here has one.
pub const DEFAULT: &str = "system.posix_acl_default";

const VERSION: u32 = 2;
const USER_OBJ: u16 = 0x01;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;
/// The id of entries that name nobody.
const NO_ID: u32 = u32::MAX;

/// The list for a mode and what single groups get besides; `None` if the mode says it all. The mask, which bounds all
/// groups, is the group's part of the mode: what `stat` shows stays what it is without a list.
pub fn encode(mode: u16, grants: &[Grant]) -> Option<Vec<u8>> {
    if grants.is_empty() {
        return None;
    }
    let mut grants = grants.to_vec();
    grants.sort_by_key(|grant| grant.group);
    let group = (mode >> 3) & 7;
    let mut list = VERSION.to_le_bytes().to_vec();
    let mut entry = |tag: u16, bits: u16, id: u32| {
        list.extend(tag.to_le_bytes());
        list.extend(bits.to_le_bytes());
        list.extend(id.to_le_bytes());
    };
    entry(USER_OBJ, (mode >> 6) & 7, NO_ID);
    entry(GROUP_OBJ, group, NO_ID);
    for grant in grants {
        entry(GROUP, grant.bits & 7, grant.group);
    }
    entry(MASK, group, NO_ID);
    entry(OTHER, mode & 7, NO_ID);
    Some(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_has_owner_group_the_named_groups_in_order_mask_and_others() {
        let grant = |group, bits| Grant { group, bits };
        let list = encode(0o660, &[grant(1000, 4), grant(60, 6)]).expect("a list");
        let entries: Vec<_> = list[4..]
            .chunks(8)
            .map(|entry| {
                let half = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
                (half(0), half(2), u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]))
            })
            .collect();
        assert_eq!(list[..4], [2, 0, 0, 0]);
        assert_eq!(entries, [(1, 6, NO_ID), (4, 6, NO_ID), (8, 6, 60), (8, 4, 1000), (16, 6, NO_ID), (32, 0, NO_ID)]);
    }

    #[test]
    fn without_named_groups_the_mode_says_it_all() {
        assert_eq!(encode(0o770, &[]), None);
    }
}
