//! A change becomes known: invalidation, then the announcement, then whoever polls. In no request handler, and holding
//! no lock.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use crossbeam_channel::Sender;
use fuser::{INodeNo, Notifier};

use super::child::Announcer;
use super::edge::Edge;
use super::job::{Action, Job};
use super::queue::{Move, Pending, Step};
use crate::inventory::Change;
use crate::model::Class;
use crate::tree::rights::admission;
use crate::tree::{Directory, Node, Place, Position, object_number};

/// A batch with more moves than this is published at once, without events.
const LARGE: usize = 500;
/// How soon the publisher sees that it shall end.
const ROUND: Duration = Duration::from_millis(250);

/// A name that the kernel has to forget, or a directory that has changed.
#[derive(Debug)]
pub enum Stale {
    /// A name that is gone.
    Entry(Place),
    /// Entries have come or gone.
    Directory(Directory),
}

/// Tells the kernel, in a thread of its own: the kernel waits for the directory's lock, which a user can hold.
pub fn invalidate(stale: impl IntoIterator<Item = Stale>, notifier: &Notifier) {
    for stale in stale {
        let result = match &stale {
            Stale::Entry(place) => {
                notifier.inval_entry(INodeNo(Node::Directory(place.directory).inode()), OsStr::new(&place.name))
            }
            Stale::Directory(directory) => notifier.inval_inode(INodeNo(Node::Directory(*directory).inode()), 0, 0),
        };
        if let Err(error) = result {
            log::debug!("invalidation of {stale:?}: {error}");
        }
    }
}

/// Publishes changes: the thread between inventory and kernel.
pub struct Publisher {
    edge: Arc<Edge>,
    stale: Sender<Stale>,
}

impl Publisher {
    /// `stale` leads to [`invalidate`].
    pub fn new(edge: Arc<Edge>, stale: Sender<Stale>) -> Publisher {
        Publisher { edge, stale }
    }

    /// Publishes the names that a batch brings, before there is a mount that could announce them.
    pub fn publish_names(&self, batch: &[Change]) {
        for (class, number, position) in batch.iter().flat_map(|change| self.edge.interface.moved(change)) {
            self.publish(class, number, position);
        }
    }

    /// Until the inventory or the mount is gone.
    pub fn run(&self, changes: &Receiver<Arc<Vec<Change>>>, notifier: &Notifier) {
        while !self.edge.is_stopping() {
            match changes.recv_timeout(ROUND) {
                Ok(batch) => self.batch(&batch, notifier),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn batch(&self, batch: &[Change], notifier: &Notifier) {
        let edge = &*self.edge;
        let mut moves: Vec<_> = batch.iter().flat_map(|change| edge.interface.moved(change)).collect();
        moves.retain(|(class, number, position)| {
            let node = position.node(*class, *number);
            edge.interface.names().published(node) != edge.interface.wanted(*class, *number, *position)
        });
        if moves.len() > LARGE || !edge.queue.is_open() {
            for (class, number, position) in moves {
                edge.queue.give_up(number);
                self.publish(class, number, position);
            }
        } else {
            for (class, number, position) in moves {
                edge.queue.moved(class, number, position);
            }
        }
        let mut seen = HashSet::new();
        for touched in batch.iter().flat_map(|change| edge.interface.touched(change)) {
            let inode = touched.node.inode();
            if !seen.insert(inode) {
                continue;
            }
            edge.versions.bump(inode);
            if let Err(error) = notifier.inval_inode(INodeNo(inode), 0, 0) {
                log::debug!("invalidation of {}: {error}", touched.path.display());
            }
            if edge.announce {
                edge.queue.touch(touched);
            }
            edge.pollers.wake(inode);
        }
        for change in batch {
            match change {
                Change::Object { old: Some(old), new: None } => {
                    edge.versions.forget_object(old.number());
                    edge.pollers.wake_object(old.number());
                    edge.told.forget(old.number());
                }
                Change::Object { old: Some(old), new: Some(new) } if admission(old) != admission(new) => {
                    edge.rights_changed(new.number());
                    edge.told.told(new.number(), admission(new));
                }
                Change::Object { .. }
                | Change::Health
                | Change::Events(_)
                | Change::Console(..)
                | Change::Moved(..) => {}
            }
        }
    }

    /// Carries out what the queue says, until it is stopped.
    pub fn dispatch(&self, announcer: Option<&Announcer>) {
        loop {
            match self.edge.queue.next() {
                Step::Touch(id, inode, path) => match self.present_path(inode, &path) {
                    Some(path) => self.send(announcer, Job { id, action: Action::Touch { path } }),
                    None => self.edge.queue.drop_touch(id),
                },
                Step::Compare(pending) => self.compare(announcer, &pending),
                Step::Publish(class, number, positions) => {
                    for position in positions {
                        self.publish(class, number, position);
                    }
                }
                Step::Stop => return,
            }
        }
    }

    /// Where a file is now: its object may have moved since it changed. `None` for a path that cannot be said.
    fn present_path(&self, inode: u64, path: &Path) -> Option<String> {
        let names = self.edge.interface.names();
        let number = object_number(inode);
        let class = number.and_then(|number| names.class(number));
        let home = class.zip(number).and_then(|(class, number)| names.published(Node::Object(class, number)));
        let Some(home) = home else { return path.to_str().map(str::to_owned) };
        let directory = self.edge.interface.directory_path(home.directory).join(&home.name);
        let inside: PathBuf = path.components().skip(directory.components().count()).collect();
        directory.join(inside).to_str().map(str::to_owned)
    }

    fn send(&self, announcer: Option<&Announcer>, job: Job) {
        if !announcer.is_some_and(|announcer| announcer.send(&job)) {
            self.edge.queue.unsent(job.id);
        }
    }

    /// Replays the first name that differs: the directory before links to it when it comes, after them when it goes, and
    /// before both whatever stands where it is to come: a link that was moved into the bin under the object's own name.
    fn compare(&self, announcer: Option<&Announcer>, pending: &Pending) {
        let interface = &self.edge.interface;
        let mut positions: Vec<_> =
            Position::ALL.into_iter().filter(|position| pending.positions.contains(position)).collect();
        if interface.wanted(pending.class, pending.number, Position::Home).is_none() {
            positions.reverse();
        }
        let differing = positions.into_iter().map(|position| {
            let node = position.node(pending.class, pending.number);
            let from = interface.names().published(node);
            (position, node, from, interface.wanted(pending.class, pending.number, position))
        });
        let mut differing: Vec<_> = differing.filter(|(_, _, from, to)| from != to).collect();
        let is_taken = |to: &Option<Place>| {
            to.as_ref().is_some_and(|place| interface.names().lookup(place.directory, &place.name).is_some())
        };
        differing.sort_by_key(|(_, _, _, to)| is_taken(to));
        if let Some((position, node, from, to)) = differing.into_iter().next() {
            let Some(action) = self.action(node, from.as_ref(), to.as_ref()) else {
                // A path or target that cannot be said; the name itself can be published.
                self.publish(pending.class, pending.number, position);
                return self.edge.queue.moved(pending.class, pending.number, position);
            };
            let step = Move { class: pending.class, number: pending.number, position, from, to };
            if let Some(id) = self.edge.queue.start(step) {
                self.send(announcer, Job { id, action });
            }
            return;
        }
        self.edge.queue.agree(pending);
    }

    fn action(&self, node: Node, from: Option<&Place>, to: Option<&Place>) -> Option<Action> {
        let path = |place: &Place| {
            let path = self.edge.interface.directory_path(place.directory).join(&place.name);
            path.to_str().map(str::to_owned)
        };
        let is_directory = matches!(node, Node::Object(..));
        Some(match (from, to) {
            (None, None) => return None,
            (None, Some(to)) if is_directory => Action::MakeDirectory { path: path(to)? },
            (None, Some(to)) => Action::Symlink { path: path(to)?, target: self.edge.interface.target(node)? },
            (Some(from), None) if is_directory => Action::RemoveDirectory { path: path(from)? },
            (Some(from), None) => Action::Unlink { path: path(from)? },
            (Some(from), Some(to)) => Action::Rename { from: path(from)?, to: path(to)? },
        })
    }

    /// Publishes a name as it is wanted now, without an event.
    fn publish(&self, class: Class, number: u64, position: Position) {
        let edge = &*self.edge;
        let node = position.node(class, number);
        let from = edge.interface.names().published(node);
        let to = edge.interface.wanted(class, number, position);
        if from == to {
            return;
        }
        edge.interface.names().publish(node, to.clone());
        if position != Position::State && from.is_some() {
            edge.links_changed(class, number);
        }
        let directories: HashSet<_> = from.iter().chain(&to).map(|place| place.directory).collect();
        let stale = from.map(Stale::Entry).into_iter().chain(directories.iter().copied().map(Stale::Directory));
        for directory in &directories {
            edge.versions.bump(Node::Directory(*directory).inode());
        }
        for stale in stale {
            // Before the mount exists nobody listens, and nothing is stale.
            let _ = self.stale.send(stale);
        }
    }
}
