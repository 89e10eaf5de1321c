//! Where objects stand: their names in the class directories or the bin, in `by-name` and in `by-state`.

use std::path::PathBuf;

use super::fixed;
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
        Object::Flavor(_) | Object::Backend(_) => escape(object.name()),
        Object::Instance(_) | Object::Image(_) | Object::Task(_) | Object::Volume(_) | Object::Transfer(_) => {
            object.id().to_string()
        }
    }
}

/// The directory and name of an object's own directory.
pub fn home_place(object: &Object) -> Place {
    let directory = match object.bin() {
        Some(_) => Directory::Trash,
        None => Directory::Class(object.class()),
    };
    Place { directory, name: home(object) }
}

/// The path of an object's directory, below the mount point.
pub fn home_path(object: &Object) -> PathBuf {
    let Place { directory, name } = home_place(object);
    fixed::path(directory).join(name)
}

/// Where an object should be published at a position; `None` if nowhere.
pub fn wanted(object: &Object, position: Position, names: &Names) -> Option<Place> {
    match position {
        Position::Home => Some(home_place(object)),
        Position::Name => by_name(object, names),
        Position::State => by_state(object),
    }
}

fn by_name(object: &Object, names: &Names) -> Option<Place> {
    let class = object.class();
    let directory = match object.bin() {
        Some(_) => Directory::ByNameTrash,
        None => Directory::ByNameClass(class),
    };
    let (name, is_draft) = match object {
        Object::Instance(instance) => (link_name(instance), instance.record.draft.is_some()),
        Object::Image(image) => (escape(&image.record.name), image.record.draft.is_some()),
        Object::Volume(volume) => (escape(&volume.record.name), volume.record.draft.is_some()),
        Object::Task(_) | Object::Flavor(_) | Object::Transfer(_) | Object::Backend(_) => return None,
    };
    if is_draft {
        return None;
    }
    let node = Node::NameLink(class, object.number());
    let second = format!("{name}.{}", object.id());
    // Whoever came second keeps the longer name until he is renamed or moved, also when the first holder goes. Instances
    // are unique outside the bin: theirs is a passing clash while two of them swap names.
    let is_unique = directory == Directory::ByNameClass(Class::Instance);
    let present = names.published(node).filter(|place| place.directory == directory);
    let is_second = !is_unique && present.is_some_and(|place| place.name == second);
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
        Object::Volume(volume) => (&volume.task, volume.record.state().word()),
        Object::Task(_) | Object::Transfer(_) | Object::Backend(_) => return None,
    };
    let word = task.as_ref().map_or(state, |task| task.operation.task_word().word());
    let class = object.class();
    let position = words(class).iter().position(|candidate| *candidate == word)?;
    let directory = Directory::ByStateWord(class, u8::try_from(position).ok()?);
    Some(Place { directory, name: home(object) })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use uuid::Uuid;

    use super::*;
    use crate::inventory::Image;
    use crate::model::caller::Ownership;
    use crate::model::record::{BinEntry, ImageRecord};

    fn image(number: u64, name: &str, in_bin: bool) -> Object {
        let ownership = Ownership { owner: 1, project: 1, generation: 0 };
        let mut record = ImageRecord::new(number, name.into(), ownership, 0);
        record.bin = in_bin.then(|| BinEntry { deleted_at: 1, deleted_by: "ann".into(), expiry: None });
        Object::Image(Arc::new(Image { id: Uuid::from_u128(number.into()), record, task: None, data_bytes: 0 }))
    }

    fn publish(object: &Object, names: &Names) {
        for position in Position::ALL {
            let node = position.node(object.class(), object.number());
            names.publish(node, wanted(object, position, names));
        }
    }

    #[test]
    fn the_bin_takes_an_object_with_its_name_and_the_first_of_a_name_keeps_it() {
        let names = Names::new();
        let (first, second) = (image(16, "web", false), image(17, "web", false));
        publish(&first, &names);
        publish(&second, &names);
        let name_of =
            |object: &Object| names.published(Position::Name.node(object.class(), object.number())).expect("published");
        assert_eq!(name_of(&second).name, format!("web.{}", second.id()));
        let binned = image(17, "web", true);
        publish(&binned, &names);
        assert_eq!(home_path(&binned), PathBuf::from("trash").join(binned.id().to_string()));
        assert_eq!(name_of(&binned), Place { directory: Directory::ByNameTrash, name: "web".into() });
        let later = image(16, "web", true);
        publish(&later, &names);
        assert_eq!(name_of(&later).name, format!("web.{}", later.id()));
        let soft_deleted = fixed::lookup(Directory::ByStateClass(Class::Image), "soft_deleted");
        let Some(Node::Directory(directory)) = soft_deleted else { panic!("{soft_deleted:?}") };
        assert_eq!(wanted(&later, Position::State, &names).map(|place| place.directory), Some(directory));
        publish(&second, &names);
        assert_eq!(name_of(&second), Place { directory: Directory::ByNameClass(Class::Image), name: "web".into() });
    }
}
