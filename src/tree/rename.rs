//! The table of renames: which moves mean something, and what.

use std::sync::Arc;

use uuid::Uuid;

use super::instance::VOLUMES;
use super::interface::Tree;
use super::names::Place;
use super::node::{Directory, Node, words};
use super::reference::canonical_uuid;
use super::value::{escape, instance_name, name, text, unescape};
use super::{Interface, Kind, OpenFile, links};
use crate::inventory::{Object, Update};
use crate::model::Class;
use crate::model::caller::Caller;
use crate::model::change::{ImageChange, InstanceChange};
use crate::model::flavor::{self, FlavorChange};
use crate::model::reason::Reason;
use crate::model::volume::change::VolumeChange;
use crate::model::{image, instance, volume};
use crate::workflow::request::{Completion, MOVE, Request, Wait};

/// What an allowed rename does.
#[derive(Debug)]
pub enum Move {
    /// A temporary file takes another name in its directory.
    Scratch(u64),
    /// A temporary file's content is written to this attribute.
    Replace(u64, Node),
    /// A temporary link takes the name of a device, which attaches the volume that it names.
    Attach(u64),
    /// A request about an object; the moved link stands at its new place at once if it is accepted.
    Ask(Request),
}

/// One end of a rename: a directory and a name in it.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// The directory.
    pub directory: Node,
    /// The name.
    pub name: &'a str,
    /// What stands there now.
    pub node: Option<Node>,
}

/// Does what a rename means. It is answered when that is accepted, and never waits for the work: the kernel holds locks
/// meanwhile.
pub(super) fn rename(tree: Arc<Tree>, from: (Node, &str), to: (Node, &str), caller: Caller, done: Completion) {
    let from = End { directory: from.0, name: from.1, node: tree.entry(from.0, from.1) };
    let to = End { directory: to.0, name: to.1, node: tree.entry(to.0, to.1) };
    let object = from.node.and_then(|node| tree.object(node));
    let identity = object.as_ref().map(|object| (object.class(), object.id()));
    let meaning = meaning(from, to, object.as_ref()).and_then(|meaning| {
        if let Move::Scratch(serial) | Move::Replace(serial, _) | Move::Attach(serial) = meaning {
            tree.own_scratch(serial, &caller)?;
            if tree.scratch.kind(serial) == Some(Kind::Directory) {
                return Err(no_meaning());
            }
        }
        if let Some(Node::Scratch(replaced)) = to.node {
            tree.own_scratch(replaced, &caller)?;
        }
        Ok(meaning)
    });
    match meaning {
        Err(reason) => tree.engine.refuse(&caller, identity, MOVE, &reason, done),
        Ok(Move::Scratch(serial)) => {
            if !tree.is_temporary(from.directory, to.name) {
                return done(Err(Reason::NotFound(format!("attribute {:?}", to.name))));
            }
            tree.scratch.rename(serial, to.name);
            done(Ok(()));
        }
        Ok(Move::Replace(serial, attribute)) => {
            let content = tree.scratch.content(serial).unwrap_or_default();
            let generation = tree.generation(attribute);
            let kept = tree.clone();
            let file = OpenFile { node: attribute, generation, written: false };
            let forgotten: Completion = Box::new(move |outcome| {
                if outcome.is_ok() {
                    kept.scratch.remove(serial);
                }
                done(outcome);
            });
            tree.write_value(file, caller, &content, Wait::Accepted, forgotten);
        }
        Ok(Move::Attach(serial)) => links::replace(&tree, from.directory, serial, to.name, caller, done),
        Ok(Move::Ask(request)) => {
            let moved = match (from.node, to.directory) {
                (Some(node), Node::Directory(directory)) => Some((node, Place { directory, name: to.name.to_owned() })),
                _ => None,
            };
            let kept = tree.clone();
            let published: Completion = Box::new(move |outcome| {
                let moved = moved.filter(|_| outcome.is_ok());
                if let Some((node, place)) = moved {
                    kept.names.publish(node, Some(place));
                    if let Some((class, id)) = identity {
                        // It stands where the kernel believes that the user put it, and goes on from there: a
                        // link to its task's directory, a name in the bin to the bin's names.
                        kept.inventory.apply(vec![Update::Moved(class, id)]);
                    }
                }
                done(outcome);
            });
            tree.submit(caller, MOVE, request, Wait::Accepted, published);
        }
    }
}

/// What the rename means. `object` is the object behind `from`, if it is one or a link to one.
pub fn meaning(from: End<'_>, to: End<'_>, object: Option<&Object>) -> Result<Move, Reason> {
    let source = from.node.ok_or_else(|| Reason::NotFound(format!("{:?} in this directory", from.name)))?;
    match (source, to.directory) {
        (Node::Scratch(serial), directory @ Node::Attribute(Class::Instance, _, VOLUMES))
            if directory == from.directory =>
        {
            Ok(Move::Attach(serial))
        }
        (Node::Scratch(serial), directory) if directory == from.directory => match to.node {
            Some(attribute @ (Node::Attribute(..) | Node::Key(..))) => Ok(Move::Replace(serial, attribute)),
            Some(Node::Scratch(_)) | None => Ok(Move::Scratch(serial)),
            Some(_) => Err(no_meaning()),
        },
        (Node::Object(..) | Node::NameLink(..), Node::Directory(Directory::Trash)) => {
            let (class, id) = identity(object)?;
            if is_in_the_bin(object) {
                return Err(Reason::Policy(format!("it is in the bin already, as trash/{id}")));
            }
            if to.name == from.name { into_the_bin(class, id) } else { Err(keeps_its_name()) }
        }
        (Node::Object(..), Node::Directory(Directory::Class(target)))
        | (Node::NameLink(..), Node::Directory(Directory::ByNameClass(target)))
            if is_in_the_bin(object) =>
        {
            let (class, id) = identity(object)?;
            if class != target {
                return Err(Reason::Policy(format!(
                    "it goes back to its own class: mv trash/{id} {}/",
                    class.directory()
                )));
            }
            if to.name == from.name { out_of_the_bin(class, id) } else { Err(keeps_its_name()) }
        }
        (Node::StateLink(class, _), Node::Directory(Directory::ByStateWord(target, word))) if class == target => {
            if to.name != from.name {
                return Err(keeps_its_name());
            }
            let (class, id) = identity(object)?;
            let all = words(class);
            let word = all.get(usize::from(word)).copied().unwrap_or_default();
            state(class, id, word)
        }
        (Node::NameLink(class, _), Node::Directory(Directory::ByNameClass(target))) if class == target => {
            if to.node.is_some_and(|node| node != source) {
                return Err(Reason::Exists);
            }
            let wanted =
                unescape(to.name).ok_or_else(|| Reason::Policy("this is no name as by-name writes it".into()))?;
            let (class, id) = identity(object)?;
            renamed(class, id, &wanted).map_err(Reason::of_move)
        }
        _ => Err(no_meaning()),
    }
}

fn identity(object: Option<&Object>) -> Result<(Class, Uuid), Reason> {
    object.map(|object| (object.class(), object.id())).ok_or_else(|| Reason::NotFound("such object any more".into()))
}

fn is_in_the_bin(object: Option<&Object>) -> bool {
    object.is_some_and(|object| object.bin().is_some())
}

fn no_meaning() -> Reason {
    Reason::Policy("this move means nothing here; README lists the moves that do".into())
}

fn keeps_its_name() -> Reason {
    Reason::Policy("a moved object keeps its name".into())
}

fn into_the_bin(class: Class, id: Uuid) -> Result<Move, Reason> {
    match class {
        Class::Instance => {
            Ok(ask_instance(id, InstanceChange::State(instance::Word::State(instance::State::SoftDeleted))))
        }
        Class::Image => Ok(ask_image(id, ImageChange::State(image::Word::State(image::State::SoftDeleted)))),
        Class::Volume => Ok(ask_volume(id, VolumeChange::State(volume::Word::State(volume::State::SoftDeleted)))),
        Class::Task | Class::Flavor | Class::Transfer | Class::Backend => Err(no_meaning()),
    }
}

fn out_of_the_bin(class: Class, id: Uuid) -> Result<Move, Reason> {
    match class {
        Class::Instance => Ok(ask_instance(id, InstanceChange::Restore)),
        Class::Image => Ok(ask_image(id, ImageChange::Restore)),
        Class::Volume => Ok(ask_volume(id, VolumeChange::Restore)),
        Class::Task | Class::Flavor | Class::Transfer | Class::Backend => Err(no_meaning()),
    }
}

fn state(class: Class, id: Uuid, word: &str) -> Result<Move, Reason> {
    match class {
        Class::Instance => instance::Word::parse(word)
            .map(|word| ask_instance(id, InstanceChange::State(word)))
            .map_err(Reason::of_move),
        Class::Image => {
            image::Word::parse(word).map(|word| ask_image(id, ImageChange::State(word))).map_err(Reason::of_move)
        }
        Class::Flavor => flavor::Word::parse(word)
            .map(|word| Move::Ask(Request::Flavor { id, changes: vec![FlavorChange::State(word)] }))
            .map_err(Reason::of_move),
        Class::Volume => {
            volume::Word::parse(word).map(|word| ask_volume(id, VolumeChange::State(word))).map_err(Reason::of_move)
        }
        Class::Task | Class::Transfer | Class::Backend => Err(no_meaning()),
    }
}

fn renamed(class: Class, id: Uuid, wanted: &str) -> Result<Move, Reason> {
    match class {
        Class::Instance => Ok(ask_instance(id, InstanceChange::Name(instance_name(wanted)?))),
        Class::Image => Ok(ask_image(id, ImageChange::Name(name(wanted)?))),
        Class::Volume => Ok(ask_volume(id, VolumeChange::Name(name(wanted)?))),
        Class::Task | Class::Flavor | Class::Transfer | Class::Backend => Err(no_meaning()),
    }
}

fn ask_instance(id: Uuid, change: InstanceChange) -> Move {
    Move::Ask(Request::Instance { id, changes: vec![change] })
}

fn ask_image(id: Uuid, change: ImageChange) -> Move {
    Move::Ask(Request::Image { id, changes: vec![change] })
}

fn ask_volume(id: Uuid, change: VolumeChange) -> Move {
    Move::Ask(Request::Volume { id, changes: vec![change] })
}

/// What making a directory asks for, and the class and uuid of the draft.
pub fn draft(parent: Node, file_name: &str) -> Result<(Class, Uuid, Request), Reason> {
    match parent {
        Node::Directory(Directory::Class(class @ (Class::Instance | Class::Image | Class::Task | Class::Volume))) => {
            canonical_uuid(file_name)
                .map(|id| (class, id, Request::MakeDraft { class, id }))
                .ok_or_else(|| Reason::Malformed("name it by a lower-case uuid: mkdir $(uuidgen)".into()))
        }
        Node::Directory(Directory::Class(Class::Flavor)) => {
            let id = Uuid::new_v4();
            let name = flavor_name(file_name)?;
            Ok((Class::Flavor, id, Request::MakeFlavor { id, name }))
        }
        _ => {
            Err(Reason::Policy("directories can be made in instances, volumes, images, tasks and flavors only".into()))
        }
    }
}

/// The name of a flavor whose directory is to be named so.
fn flavor_name(file_name: &str) -> Result<String, Reason> {
    let wanted = unescape(file_name).and_then(|wanted| name(text(wanted.as_bytes()).ok()?).ok());
    wanted.filter(|wanted| escape(wanted) == file_name).ok_or_else(|| {
        Reason::Malformed(
            "a flavor's name is one line without / in front or spaces behind, written as by-name does".into(),
        )
    })
}
