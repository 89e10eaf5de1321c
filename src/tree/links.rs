//! What users make in the directories of an object: a link in an instance's `volumes/` attaches a volume, a directory in
//! a volume's `snapshots/` takes a snapshot. Both are answered when that is accepted, since the kernel holds locks
//! meanwhile.

use std::sync::Arc;

use uuid::Uuid;

use super::interface::Tree;
use super::node::Node;
use super::reference::Resolver;
use super::{NodeCompletion, instance, scratch, volume};
use crate::model::Class;
use crate::model::caller::Caller;
use crate::model::reason::Reason;
use crate::model::task::TaskState;
use crate::model::volume::change::VolumeChange;
use crate::model::volume::device;
use crate::workflow::request::{Completion, Request, Wait};

/// symlink(2): attaches the volume that the target names to the instance in whose `volumes/` the link is made. A
/// temporary name, as `ln -f` and others use, is kept until it is renamed to a device.
pub(super) fn symlink(tree: Arc<Tree>, parent: Node, name: &str, target: &str, caller: Caller, done: NodeCompletion) {
    let object = tree.object(parent).map(|object| (object.class(), object.id()));
    let (Node::Attribute(Class::Instance, _, instance::VOLUMES), Some((_, instance))) = (parent, object) else {
        let reason =
            Reason::Policy("symlinks can be made in an instance's volumes/ only, where they attach one".into());
        return done(Err(tree.refusal(&caller, object, name, reason)));
    };
    if device::check(name).is_err() {
        let made = if scratch::is_temporary(name, std::iter::empty()) {
            tree.scratch.create_link(parent, name, caller.uid, target).map(Node::Scratch)
        } else {
            Err(Reason::Policy("name the link by a device of the guest, such as vdb".into()))
        };
        return done(made.map_err(|reason| tree.refusal(&caller, object, name, reason)));
    }
    match asked(&tree, instance, name, target, &caller) {
        Err(reason) => done(Err(tree.refusal(&caller, object, name, reason))),
        Ok((id, request)) => {
            let (kept, device) = (tree.clone(), name.to_owned());
            let shown: Completion = Box::new(move |outcome| {
                done(outcome.and_then(|()| kept.entry(parent, &device).ok_or_else(|| ended(&kept, id))));
            });
            tree.submit(caller, "attach", request, Wait::Accepted, shown);
        }
    }
}

/// rename(2) of a temporary link to the name of a device.
pub(super) fn replace(tree: &Arc<Tree>, directory: Node, serial: u64, name: &str, caller: Caller, done: Completion) {
    let object = tree.object(directory).map(|object| (object.class(), object.id()));
    let target = tree.scratch.target(serial);
    let (Some((_, instance)), Some(target)) = (object, target) else { return done(Err(Reason::StaleHandle)) };
    match asked(tree, instance, name, &target, &caller) {
        Err(reason) => done(Err(tree.refusal(&caller, object, name, reason.of_move()))),
        Ok((_, request)) => {
            let kept = tree.clone();
            let forgotten: Completion = Box::new(move |outcome| {
                if outcome.is_ok() {
                    kept.scratch.remove(serial);
                }
                done(outcome.map_err(Reason::of_move));
            });
            tree.submit(caller, "attach", request, Wait::Accepted, forgotten);
        }
    }
}

/// The volume that a link names, and the request to attach it.
fn asked(tree: &Tree, instance: Uuid, name: &str, target: &str, caller: &Caller) -> Result<(Uuid, Request), Reason> {
    device::check(name)?;
    let resolver = Resolver { inventory: &tree.inventory, caller, mountpoint: &tree.settings.mountpoint };
    let id = resolver.volume(target)?;
    let change = VolumeChange::Attach { instance, device: Some(name.to_owned()) };
    Ok((id, Request::Volume { id, changes: vec![change] }))
}

/// mkdir(2) in `snapshots/`.
pub(super) fn take_snapshot(tree: Arc<Tree>, parent: Node, file_name: &str, caller: Caller, done: NodeCompletion) {
    let object = tree.object(parent).map(|object| (object.class(), object.id()));
    let Some((_, id)) = object else { return done(Err(Reason::NotFound("such object any more".into()))) };
    let name = match volume::snapshot_name(file_name) {
        Ok(name) => name,
        Err(reason) => return done(Err(tree.refusal(&caller, object, "snapshots", reason))),
    };
    let kept = tree.clone();
    let request = Request::Volume { id, changes: vec![VolumeChange::TakeSnapshot(name.clone())] };
    let shown: Completion = Box::new(move |outcome| {
        done(outcome.and_then(|()| {
            let node = kept.inventory.volume(id).and_then(|volume| {
                let mut snapshots = volume.record.snapshots.iter();
                let (_, entry) = snapshots.find(|(held, _)| *held == name)?;
                Some(Node::Key(Class::Volume, volume.record.number, volume::SNAPSHOTS, entry.serial))
            });
            node.ok_or_else(|| ended(&kept, id))
        }));
    });
    tree.submit(caller, "snapshots", request, Wait::Accepted, shown);
}

/// What became of an operation that was accepted a moment ago, and has nothing to show any more.
fn ended(tree: &Tree, volume: Uuid) -> Reason {
    let task = tree.inventory.volume(volume).and_then(|volume| tree.inventory.task(volume.record.last_task?));
    match task.filter(|task| task.record.state == TaskState::Failure) {
        Some(task) => Reason::Failed(task.record.message.clone()),
        None => Reason::NotFound("such object any more".into()),
    }
}
