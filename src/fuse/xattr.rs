//! Extended attributes: of all there are, a file of the tree has its access control list, if that names anybody.

use std::ffi::OsStr;

use fuser::{Errno, ReplyXattr};

use super::acl;
use super::edge::Edge;
use crate::tree::Node;

/// The value of one. `EOPNOTSUPP` for what no file here has, by which tools know not to ask for it of every other file:
/// `ls -l` wants `security.selinux`.
pub fn get(edge: &Edge, node: Node, name: &OsStr) -> Result<Vec<u8>, Errno> {
    if name != acl::ACCESS && name != acl::DEFAULT {
        return Err(Errno::EOPNOTSUPP);
    }
    edge.access_list(node).filter(|_| name == acl::ACCESS).ok_or(Errno::ENODATA)
}

/// The names, each with a NUL.
pub fn list(edge: &Edge, node: Node) -> Vec<u8> {
    edge.access_list(node).map_or_else(Vec::new, |_| [acl::ACCESS.as_bytes(), &[0]].concat())
}

/// Sets what is so already; and tools give a temporary file the attributes of what it shall replace.
pub fn set(edge: &Edge, node: Node, name: &OsStr, value: &[u8]) -> Result<(), Errno> {
    let is_list = name == acl::ACCESS;
    let same = is_list && edge.access_list(node).as_deref() == Some(value);
    if same || (is_list && matches!(node, Node::Scratch(_))) { Ok(()) } else { Err(Errno::EOPNOTSUPP) }
}

/// Why it is not removed.
pub fn remove(edge: &Edge, node: Node, name: &OsStr) -> Errno {
    let is_there = name == acl::ACCESS && edge.access_list(node).is_some();
    if is_there { Errno::EOPNOTSUPP } else { Errno::ENODATA }
}

/// `size` 0 asks for the length alone.
pub fn reply(value: &[u8], size: u32, reply: ReplyXattr) {
    match u32::try_from(value.len()) {
        Ok(length) if size == 0 => reply.size(length),
        Ok(length) if length <= size => reply.data(value),
        Ok(_) | Err(_) => reply.error(Errno::ERANGE),
    }
}
