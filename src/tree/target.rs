//! Where the tree's links lead.

use std::path::PathBuf;

use uuid::Uuid;

use super::interface::Tree;
use super::node::{Directory, Node};
use super::{directory, fixed, instance, view, volume};
use crate::inventory::Object;
use crate::model::Class;

impl Tree {
    /// Where a link leads: to where its object stands now, from where the link does.
    pub(super) fn link_target(&self, link: Node, object: &Object) -> String {
        let home = Node::Object(object.class(), object.number());
        let home = self.names.published(home).unwrap_or_else(|| view::home_place(object));
        let directory = match self.names.published(link) {
            Some(place) => place.directory,
            None if matches!(link, Node::StateLink(..)) => Directory::ByStateWord(object.class(), 0),
            None => Directory::ByNameClass(object.class()),
        };
        let depth = fixed::path(directory).components().count();
        format!("{}{}/{}", "../".repeat(depth), fixed::path(home.directory).display(), home.name)
    }

    /// Where a link that comes and goes leads to: to where its object stands now.
    pub(super) fn key_target(&self, class: Class, row: u8, serial: u32, object: &Object) -> Option<String> {
        let key = directory::key(object, row, serial)?;
        let (class, id) = match (class, row) {
            (Class::Volume, volume::ATTACHMENTS) => (Class::Instance, Uuid::try_parse(&key.value).ok()?),
            (Class::Instance, instance::VOLUMES) if serial == instance::COMING => {
                let Object::Instance(instance) = object else { return None };
                (Class::Volume, self.inventory.task(instance.task.as_ref()?.id)?.record.object)
            }
            (Class::Instance, instance::VOLUMES) => (Class::Volume, Uuid::try_parse(&key.value).ok()?),
            _ => return None,
        };
        let home = match self.inventory.get(class, id) {
            Some(object) => view::home_path(&object),
            None => PathBuf::from(class.directory()).join(id.to_string()),
        };
        Some(format!("../../../{}", home.display()))
    }
}
