//! What files contain, and how long they are.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use super::attribute::{Read, Row};
use super::interface::Tree;
use super::node::{Directory, Node};
use super::rights::{self, Grant, Rights};
use super::tables::with_table;
use super::{
    Attributes, Caching, Content, Interface, Kind, directory, errors, image, instance, metrics, root, transfer, view,
};
use crate::inventory::Object;
use crate::model::Class;
use crate::model::domain::ConsoleDevice;
use crate::model::reason::Reason;
use crate::workflow::console_log;
use crate::workflow::drafts_data::DraftData;

/// The unit of `st_blocks`, in bytes.
const STAT_BLOCK: u64 = 512;

/// A text that holds until the inventory's next revision.
pub(super) struct Rendered {
    revision: u64,
    text: Arc<[u8]>,
}

impl Tree {
    pub(super) fn object_attributes(&self, node: Node, object: &Object) -> Option<Attributes> {
        let with = |rights: Rights, kind, size, caching| {
            let Rights { uid, gid, mode } = rights;
            Attributes { kind, mode, uid, gid, size, allocated: None, caching, time: created_at(object) }
        };
        let group = self.settings.access_group;
        let plain = |kind, mode, size, caching| with(rights::rights(object, mode, group), kind, size, caching);
        match node {
            Node::Object(Class::Flavor | Class::Backend, _) => {
                Some(plain(Kind::Directory, rights::FLAVOR_DIRECTORY, 0, Caching::Attributes))
            }
            // Whoever was told of an offer finds it.
            Node::Object(Class::Transfer, _) => {
                Some(plain(Kind::Directory, rights::OFFER_DIRECTORY, 0, Caching::Attributes))
            }
            Node::Object(..) => Some(plain(Kind::Directory, rights::DIRECTORY, 0, Caching::Attributes)),
            Node::NameLink(..) | Node::StateLink(..) => {
                let size = self.target(node)?.len() as u64;
                Some(plain(Kind::Symlink, 0o777, size, Caching::Attributes))
            }
            Node::Attribute(_, _, id) => match object {
                Object::Image(image) => {
                    let row = find(image::ROWS, id)?;
                    let size = self.row_size(row, image.as_ref(), object)?;
                    let mode = rights::image_row(row, image);
                    let rights = mode.map_or(rights::ROOT_ALONE, |mode| rights::rights(object, mode, group));
                    let attributes = with(rights, row.read.kind(), size, row_caching(row));
                    if !matches!(row.read, Read::Data) {
                        return Some(attributes);
                    }
                    let allocated = Some(self.data_allocated(object));
                    Some(match image.record.draft {
                        Some(_) => Attributes { allocated, ..attributes },
                        None => Attributes { allocated, caching: Caching::Everything, ..attributes },
                    })
                }
                Object::Transfer(transfer) => {
                    let row = find(transfer::ROWS, id)?;
                    let size = self.row_size(row, transfer.as_ref(), object)?;
                    let rights = match row.read {
                        Read::OfferKey => rights::of_offerer(transfer, row.mode),
                        _ => rights::rights(object, row.mode, group),
                    };
                    Some(with(rights, row.read.kind(), size, row_caching(row)))
                }
                Object::Instance(_) | Object::Flavor(_) | Object::Task(_) | Object::Volume(_) | Object::Backend(_) => {
                    with_table!(object, |rows, value| {
                        let row = find(rows, id)?;
                        let size = self.row_size(row, value.as_ref(), object)?;
                        Some(plain(row.read.kind(), row.mode, size, row_caching(row)))
                    })
                }
            },
            Node::Key(Class::Instance, _, instance::CONSOLE_LOG, piece) => {
                let size = match self.readable_log(object) {
                    Ok(log) => console_log::find(&log, piece)?.length,
                    Err(_) => 0,
                };
                // The name may stand for another piece at any time.
                Some(plain(Kind::File, 0o440, size, Caching::Nothing))
            }
            Node::Key(class, _, row, serial) => {
                let key = directory::key(object, row, serial)?;
                let kind = directory::key_kind(class, row);
                let (mode, size) = match kind {
                    Kind::File => (directory::key_mode(class, row), key.value.len() as u64 + 1),
                    Kind::Symlink => (0o777, self.target(node)?.len() as u64),
                    Kind::Directory => (rights::DIRECTORY, 0),
                };
                // They come and go: the kernel asks again each time.
                Some(plain(kind, mode, size, Caching::Nothing))
            }
            Node::Directory(_) | Node::File(..) | Node::Events(_) | Node::Scratch(_) => None,
        }
    }

    /// What single groups may in a place of an object.
    pub(super) fn object_grants(&self, node: Node, object: &Object) -> Vec<Grant> {
        let (mode, writer) = match (node, object) {
            (Node::Object(..), _) => (Some(rights::DIRECTORY), None),
            (Node::Attribute(_, _, id), Object::Image(image)) => {
                (find(image::ROWS, id).and_then(|row| rights::image_row(row, image)), None)
            }
            (Node::Key(class, _, row, serial), Object::Image(_)) => {
                let key = directory::key(object, row, serial);
                (Some(directory::key_mode(class, row)), key.and_then(|key| key.writer))
            }
            (
                Node::Attribute(..) | Node::Key(..),
                Object::Instance(_)
                | Object::Task(_)
                | Object::Flavor(_)
                | Object::Volume(_)
                | Object::Transfer(_)
                | Object::Backend(_),
            )
            | (
                Node::NameLink(..)
                | Node::StateLink(..)
                | Node::Directory(_)
                | Node::File(..)
                | Node::Events(_)
                | Node::Scratch(_),
                _,
            ) => (None, None),
        };
        mode.map(|mode| rights::grants(object, mode, writer)).unwrap_or_default()
    }

    /// The size of a row's file; `None` if the file does not exist.
    pub(super) fn row_size<O, C>(&self, row: &Row<O, C>, value: &O, object: &Object) -> Option<u64> {
        match &row.read {
            Read::Link(target) => target(value).map(|target| target.len() as u64),
            Read::Place(place) => Some(self.place(place(value)).len() as u64),
            Read::Definition => self.definition(object).map(|definition| definition.len() as u64),
            // Served piece by piece, see `Tree::piece`.
            Read::Stream => None,
            Read::Data => Some(self.data_size(object)),
            Read::Console(device) => Some(self.console_size(*device, object)),
            Read::Directory | Read::Keys(_) | Read::Links(_) | Read::Nested(_) => Some(0),
            // It may be gone when it is read.
            Read::OfferKey => Some(0),
            // There is one in each directory of its kind, and none here.
            Read::Entries(_) => None,
            Read::Nothing | Read::Value(_) | Read::Sometimes(_) | Read::Document(_) => {
                row.render(value).map(|text| text.len() as u64)
            }
        }
    }

    pub(super) fn row_content<O, C>(
        &self,
        row: &Row<O, C>,
        value: &O,
        object: &Object,
        uid: u32,
    ) -> Result<Content, Reason> {
        let absent = || Reason::NotFound(format!("{} now", row.name));
        match &row.read {
            Read::Link(_) => Err(Reason::Malformed("this is a symlink".into())),
            Read::Directory | Read::Keys(_) | Read::Links(_) | Read::Nested(_) => {
                Err(Reason::Malformed("this is a directory".into()))
            }
            Read::OfferKey => self.engine.offer_key(object.id(), uid).map(Content::Secret),
            Read::Place(place) => Ok(snapshot(&self.place(place(value)))),
            Read::Definition => self.definition(object).map(|text| snapshot(&text)).ok_or_else(absent),
            Read::Stream | Read::Entries(_) => Err(absent()),
            Read::Data => match self.draft_data(object) {
                Some(data) => match open(data.path())? {
                    Content::File(file) => Ok(Content::Draft(file, data)),
                    empty => Ok(empty),
                },
                None => open(&self.engine.image_path(object.id())),
            },
            Read::Console(device) => self.console(*device, object, uid),
            Read::Nothing => Ok(snapshot("")),
            Read::Value(_) | Read::Sometimes(_) | Read::Document(_) => {
                row.render(value).map(|text| snapshot(&text)).ok_or_else(absent)
            }
        }
    }

    /// The path of an object, as a file reads it: where it stands, or where it stood when it was there.
    fn place(&self, place: Option<(Class, Uuid)>) -> String {
        let path = place.map(|(class, id)| match self.inventory.get(class, id) {
            Some(object) => view::home_path(&object).display().to_string(),
            None => format!("{}/{id}", class.directory()),
        });
        path.unwrap_or_default() + "\n"
    }

    /// The piece of the console log that a row's name stands for now, if there is one.
    pub(super) fn piece(&self, row: u8, object: &Object) -> Option<Node> {
        let number = match (row, self.readable_log(object)) {
            (instance::CONSOLE_LOG, Ok(log)) => console_log::pieces(&log).0.number,
            // There is the file, to say why it cannot be read.
            (instance::CONSOLE_LOG, Err(_)) => 0,
            (_, Ok(log)) => console_log::pieces(&log).1?.number,
            (_, Err(_)) => return None,
        };
        Some(Node::Key(Class::Instance, object.number(), instance::CONSOLE_LOG, number))
    }

    /// The content of a piece.
    pub(super) fn console_log(&self, object: &Object, number: u32) -> Result<Content, Reason> {
        let log = self.readable_log(object)?;
        let piece = console_log::find(&log, number).ok_or(Reason::StaleHandle)?;
        match piece.open() {
            Ok(Some(open)) => Ok(Content::Piece(open)),
            Ok(None) => Ok(snapshot("")),
            Err(error) => Err(Reason::Failed(format!("{} cannot be opened: {error}", log.display()))),
        }
    }

    /// The log that the definition names, if it is one that we read. Before the definition was fetched it is where guests
    /// made here print to, so that whoever follows a booting guest does not come too early.
    fn readable_log(&self, object: &Object) -> Result<PathBuf, Reason> {
        let Object::Instance(instance) = object else { return Err(Reason::NotFound("console log here".into())) };
        let log = match &instance.record.definition {
            None => Some(self.engine.console_path(instance.id)),
            Some(definition) => definition.console_log.clone(),
        };
        match log {
            Some(path) if self.is_readable_log(&path) => Ok(path),
            Some(path) => Err(Reason::Unsupported(format!(
                "the guest's log {} lies outside the places that instancefs reads; read it there",
                path.display()
            ))),
            None => Err(Reason::Unsupported("the definition logs no serial console; add <log file=.../> to it".into())),
        }
    }

    /// A log named by a foreign definition may lie on a dead network file system, or in this very tree: only our own
    /// and libvirt's usual places are opened.
    pub(super) fn is_readable_log(&self, path: &Path) -> bool {
        let clean = !path.components().any(|part| matches!(part, std::path::Component::ParentDir));
        let places =
            [self.settings.state_directory.as_path(), Path::new("/var/log/libvirt"), Path::new("/var/lib/libvirt")];
        clean && !path.starts_with(&self.settings.mountpoint) && places.iter().any(|place| path.starts_with(place))
    }

    /// A new way to a console: the path of a socket of which only this reader knows.
    fn console(&self, device: ConsoleDevice, object: &Object, uid: u32) -> Result<Content, Reason> {
        let Object::Instance(instance) = object else { return Err(Reason::NotFound("console here".into())) };
        let path = self.engine.offer_console(instance, device, uid)?;
        let mut line = path.into_os_string().into_encoded_bytes();
        line.push(b'\n');
        Ok(Content::Snapshot(line.into()))
    }

    fn console_size(&self, device: ConsoleDevice, object: &Object) -> u64 {
        let Object::Instance(instance) = object else { return 0 };
        self.engine.console_path_length(instance, device).map_or(0, |length| length as u64 + 1)
    }

    pub(super) fn definition(&self, object: &Object) -> Option<Arc<str>> {
        let Object::Instance(instance) = object else { return None };
        instance.record.definition.as_ref()?;
        self.reconciler.definition(instance.id)
    }

    pub(super) fn draft_data(&self, object: &Object) -> Option<Arc<DraftData>> {
        let Object::Image(image) = object else { return None };
        image.record.draft.and_then(|_| self.engine.draft_data(image.id))
    }

    pub(super) fn data_size(&self, object: &Object) -> u64 {
        let Object::Image(image) = object else { return 0 };
        match image.record.draft {
            None => image.record.size_bytes,
            Some(_) => self.draft_data(object).map_or(0, |data| data.len()),
        }
    }

    /// Bytes on the disk of an image's data.
    fn data_allocated(&self, object: &Object) -> u64 {
        let path = match self.draft_data(object) {
            Some(data) => data.path().to_owned(),
            None => self.engine.image_path(object.id()),
        };
        fs::symlink_metadata(path).map_or(0, |metadata| metadata.blocks() * STAT_BLOCK)
    }

    pub(super) fn file_content(&self, directory: Directory, id: u8, uid: u32) -> Result<Content, Reason> {
        match (directory, id) {
            (Directory::Root, root::README) => Ok(snapshot(root::README_TEXT)),
            (Directory::Root, root::ABI) => Ok(snapshot(&format!("{}\n", root::ABI_VERSION))),
            (Directory::Root, root::HEALTH) => Ok(snapshot(&root::health(&self.inventory.health()))),
            (Directory::Root, root::METRICS) => Ok(snapshot(&metrics::render(&self.inventory))),
            (Directory::Root, root::LAST_ERROR) => Ok(snapshot(&errors::last(&self.inventory.refusals(uid)))),
            (Directory::Summary, root::SUMMARY_INSTANCES) => Ok(self.summary(id, || {
                let lines = self.inventory.instances().into_iter().map(|instance| root::instance_line(&instance));
                [root::INSTANCES_HEADER.to_owned()].into_iter().chain(lines).collect()
            })),
            (Directory::Summary, root::SUMMARY_IMAGES) => Ok(self.summary(id, || {
                let lines = self.inventory.images().into_iter().map(|image| root::image_line(&image));
                [root::IMAGES_HEADER.to_owned()].into_iter().chain(lines).collect()
            })),
            (Directory::Summary, root::SUMMARY_VOLUMES) => Ok(self.summary(id, || {
                let lines = self.inventory.volumes().into_iter().map(|volume| root::volume_line(&volume));
                [root::VOLUMES_HEADER.to_owned()].into_iter().chain(lines).collect()
            })),
            _ => Err(Reason::NotFound("such file".into())),
        }
    }

    /// A summary as of now, rendered once a revision: of ten thousand lines every stat would need the length.
    pub(super) fn summary(&self, id: u8, render: impl FnOnce() -> String) -> Content {
        // Taken before rendering: what changes meanwhile makes the next reader render again.
        let revision = self.inventory.revision();
        if let Some(rendered) = self.summaries.lock().get(&id).filter(|rendered| rendered.revision == revision) {
            return Content::Snapshot(rendered.text.clone());
        }
        let text: Arc<[u8]> = render().into_bytes().into();
        self.summaries.lock().insert(id, Rendered { revision, text: text.clone() });
        Content::Snapshot(text)
    }

    pub(super) fn file_size(&self, directory: Directory, id: u8) -> Option<u64> {
        match self.file_content(directory, id, 0).ok()? {
            Content::Snapshot(bytes) => Some(bytes.len() as u64),
            Content::Secret(_) | Content::File(_) | Content::Draft(..) | Content::Piece(_) => None,
        }
    }
}

pub(super) fn snapshot(text: &str) -> Content {
    Content::Snapshot(Arc::from(text.as_bytes()))
}

pub(super) fn open(path: &Path) -> Result<Content, Reason> {
    match fs::File::open(path) {
        Ok(file) => Ok(Content::File(Arc::new(file))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(snapshot("")),
        Err(error) => Err(Reason::Failed(format!("{} cannot be opened: {error}", path.display()))),
    }
}

pub(super) fn created_at(object: &Object) -> u64 {
    match object {
        Object::Instance(instance) => instance.record.created_at,
        Object::Image(image) => image.record.created_at,
        Object::Flavor(flavor) => flavor.record.created_at,
        Object::Volume(volume) => volume.record.created_at,
        Object::Transfer(transfer) => transfer.record.created_at,
        // As old as the mount.
        Object::Backend(_) => 0,
        Object::Task(task) => task.record.started_at,
    }
}

pub(super) fn find<O, C>(rows: &'static [Row<O, C>], id: u8) -> Option<&'static Row<O, C>> {
    rows.iter().find(|row| row.id == id)
}

/// What may not exist any more the next time is asked for each time: a console ends with the guest's run, and other files
/// with the object's stay in the bin.
fn row_caching<O, C>(row: &Row<O, C>) -> Caching {
    match row.read {
        Read::Sometimes(_) | Read::Console(_) | Read::Entries(_) | Read::OfferKey => Caching::Nothing,
        Read::Nothing
        | Read::Value(_)
        | Read::Place(_)
        | Read::Link(_)
        | Read::Document(_)
        | Read::Definition
        | Read::Stream
        | Read::Data
        | Read::Directory
        | Read::Keys(_)
        | Read::Links(_)
        | Read::Nested(_) => Caching::Attributes,
    }
}

pub(super) fn link<O, C>(row: &Row<O, C>, value: &O) -> Option<String> {
    match &row.read {
        Read::Link(target) => target(value),
        _ => None,
    }
}
