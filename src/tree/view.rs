//! Where objects stand: their names in the class directories, `by-name` and `by-state`.

use super::names::{Names, Place, Position};
use super::node::{Directory, Node, words};
use super::value::{LONGEST_NAME, escape};
use crate::inventory::{Instance, Object};
use crate::model::Class;
use crate::model::flavor;
use crate::model::task::Operation;

/// The name of an object's directory: its uuid, or a flavor's name.
pub fn home(object: &Object) -> String {
    match object {
        Object::Flavor(flavor) => escape(&flavor.record.name),
        Object::Instance(_) | Object::Image(_) | Object::Task(_) => object.id().to_string(),
    }
}

/// Where an object should be published at a position; `None` if nowhere.
pub fn wanted(object: &Object, position: Position, names: &Names) -> Option<Place> {
    let class = object.class();
    match position {
        Position::Home => Some(Place { directory: Directory::Class(class), name: home(object) }),
        Position::Name => by_name(object, names),
        Position::State => by_state(object),
    }
}

fn by_name(object: &Object, names: &Names) -> Option<Place> {
    let class = object.class();
    let directory = Directory::ByNameClass(class);
    let (name, is_draft) = match object {
        Object::Instance(instance) => (link_name(instance), instance.record.draft.is_some()),
        Object::Image(image) => (escape(&image.record.name), image.record.draft.is_some()),
        Object::Task(_) | Object::Flavor(_) => return None,
    };
    if is_draft {
        return None;
    }
    let node = Node::NameLink(class, object.number());
    let second = format!("{name}.{}", object.id());
    // Whoever came second keeps the longer name until he is renamed, also when the first holder goes. Instances are
    // unique: theirs is a passing clash while two of them swap names.
    let is_second = class != Class::Instance && names.published(node).is_some_and(|place| place.name == second);
    let is_held = names.lookup(directory, &name).is_some_and(|holder| holder != node);
    Some(Place { directory, name: if is_second || is_held { second } else { name } })
}

/// A foreign name that is no name of ours appears as the uuid. During a change of name the link bears the new one
/// already: a moved link stays where it was put, unless the change fails.
fn link_name(instance: &Instance) -> String {
    let name = match instance.task.as_ref().map(|task| &task.operation) {
        Some(Operation::Rename { to, .. }) => to,
        Some(_) | None => instance.name(),
    };
    let escaped = escape(name);
    let is_ours = !name.is_empty()
        && escaped.len() <= LONGEST_NAME
        && !name.chars().any(|character| character == '/' || character.is_control());
    if is_ours { escaped } else { instance.id.to_string() }
}

fn by_state(object: &Object) -> Option<Place> {
    let (task, state) = match object {
        Object::Instance(instance) => (&instance.task, instance.observed().state.word()),
        Object::Image(image) => (&image.task, image.state().word()),
        Object::Flavor(flavor) => (&None, flavor::state(&flavor.record).word()),
        Object::Task(_) => return None,
    };
    let word = task.as_ref().map_or(state, |task| task.operation.task_word().word());
    let class = object.class();
    let position = words(class).iter().position(|candidate| *candidate == word)?;
    let directory = Directory::ByStateWord(class, u8::try_from(position).ok()?);
    Some(Place { directory, name: home(object) })
}
