//! Names that come, go and move by a request of the kernel: the announcer's replays, and the users' own.

use std::sync::Arc;

use fuser::{Errno, INodeNo, ReplyEntry, Request};

use super::edge::{Edge, errno};
use super::queue::Move;
use crate::model::Class;
use crate::model::reason::Reason;
use crate::tree::{Node, Place, Position};

impl Edge {
    /// An entry of this directory came or went.
    pub fn directory_changed(&self, directory: Node) {
        self.versions.bump(directory.inode());
    }

    /// An object or its name has moved: where its links lead, and so their lengths, follow from where all of them stand.
    pub fn links_changed(&self, class: Class, number: u64) {
        let Some(kernel) = self.kernel.get() else { return };
        for link in [Node::NameLink(class, number), Node::StateLink(class, number)] {
            // The kernel may not know it, which it says.
            let _ = kernel.inval_inode(INodeNo(link.inode()), -1, 0);
        }
    }

    /// The replay by the announcer of exactly this change of names; `None`: somebody else asks.
    pub fn replay(&self, request: &Request, from: Option<Place>, to: Option<Place>) -> Option<Result<Move, Errno>> {
        let is_announcer = self.queue.is_announcer(request.pid());
        is_announcer.then(|| {
            let step = self.queue.replay(from.as_ref(), to.as_ref()).ok_or(Errno::EPERM)?;
            let names = self.interface.names();
            let taken = to.as_ref().and_then(|place| names.lookup(place.directory, &place.name));
            if taken.is_some_and(|holder| holder != step.node()) {
                return Err(Errno::EEXIST);
            }
            Ok(step)
        })
    }

    /// The kernel has been told: from now on this is where the place is.
    pub fn publish(&self, step: Move) {
        for place in step.from.iter().chain(&step.to) {
            self.directory_changed(Node::Directory(place.directory));
        }
        self.interface.names().publish(step.node(), step.to.clone());
        if step.position != Position::State && step.from.is_some() {
            self.links_changed(step.class, step.number);
        }
        // The wanted name may be another by now, and the replay given up.
        self.queue.moved(step.class, step.number, step.position);
    }

    /// A name comes by the announcer.
    pub fn publish_new(&self, step: Move, reply: ReplyEntry) {
        let node = step.node();
        if self.interface.attributes(node).is_none() {
            return reply.error(Errno::ENOENT);
        }
        self.publish(step);
        self.reply_entry(node, reply);
    }

    /// Answers a user's mkdir or symlink.
    pub fn made(self: &Arc<Edge>, parent: Node, reply: ReplyEntry) -> Box<dyn FnOnce(Result<Node, Reason>) + Send> {
        let edge = self.clone();
        Box::new(move |result| match result {
            Ok(node) => {
                edge.directory_changed(parent);
                edge.reply_entry(node, reply);
            }
            Err(reason) => reply.error(errno(&reason)),
        })
    }
}
