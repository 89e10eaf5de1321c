//! Objects named inside values: a uuid, a unique name, or a path in this tree, resolved as text and never opened.

use std::path::{Component, Path, PathBuf};

use uuid::Uuid;

use super::value::{malformed, unescape};
use crate::inventory::{Inventory, Object};
use crate::model::Class;
use crate::model::caller::{Caller, Role};
use crate::model::change::{FlavorChoice, Sizes};
use crate::model::flavor;
use crate::model::reason::Reason;
use crate::model::sharing;
use crate::model::volume::record::Origin;

/// Finds objects for one caller, with his rights.
pub struct Resolver<'a> {
    /// Where they live.
    pub inventory: &'a Inventory,
    /// Who asks.
    pub caller: &'a Caller,
    /// Where the tree is mounted, for absolute paths.
    pub mountpoint: &'a Path,
}

impl Resolver<'_> {
    /// The image that a value names. Whether it may be used, in the bin for one, is not asked here: an instance that has
    /// it already asks for nothing new.
    pub fn image(&self, value: &str) -> Result<Uuid, Reason> {
        self.object(Class::Image, value)
    }

    /// The instance that a value names.
    pub fn instance(&self, value: &str) -> Result<Uuid, Reason> {
        self.object(Class::Instance, value)
    }

    /// The volume that a value names.
    pub fn volume(&self, value: &str) -> Result<Uuid, Reason> {
        self.object(Class::Volume, value)
    }

    /// What a new volume's content is to come from: the kind, a colon, and an object; or `existing:BACKEND:REFERENCE`.
    pub fn origin(&self, value: &str) -> Result<Origin, Reason> {
        let wrong = || malformed("write image:, volume:, snapshot: and an object, or existing:BACKEND:REFERENCE");
        let (kind, rest) = value.split_once(':').ok_or_else(wrong)?;
        match kind {
            "image" => self.image(rest).map(Origin::Image),
            "volume" => self.volume(rest).map(Origin::Volume),
            "snapshot" => {
                let (volume, name) = rest.rsplit_once('/').ok_or_else(|| malformed("write snapshot:VOLUME/NAME"))?;
                let volume = self.volume(volume.strip_suffix("/snapshots").unwrap_or(volume))?;
                Ok(Origin::Snapshot { volume, name: unescape(name).ok_or_else(wrong)? })
            }
            "existing" => {
                let (backend, reference) = rest.split_once(':').ok_or_else(wrong)?;
                let is_plain = !backend.is_empty() && !reference.is_empty();
                let is_plain = is_plain && !reference.chars().any(char::is_control);
                if !is_plain {
                    return Err(wrong());
                }
                Ok(Origin::Existing { backend: backend.to_owned(), reference: reference.to_owned() })
            }
            _ => Err(wrong()),
        }
    }

    /// The flavor that a value names. What is wrong with it matters to instances that have another one only.
    pub fn flavor(&self, value: &str) -> Result<FlavorChoice, Reason> {
        let name = match self.path(Class::Flavor, value)? {
            Some(Named::Name(name)) => name,
            Some(Named::Uuid(_) | Named::InBin(_)) | None => value.to_owned(),
        };
        let sizes = match self.inventory.flavor_named(&name) {
            None => Err(Reason::NotFound(format!("flavor named {name:?}"))),
            Some(found) if !flavor::may_read(&found.record, self.caller) => Err(flavor::not_yours()),
            Some(found) if found.record.draft.is_some() => {
                Err(Reason::Malformed(format!("the flavor {name:?} is a draft; root writes active to its state")))
            }
            Some(found) => Ok(Sizes {
                vcpus: found.record.vcpus,
                memory_bytes: found.record.memory_bytes,
                root_disk_bytes: found.record.root_disk_bytes,
            }),
        };
        Ok(FlavorChoice { name, sizes })
    }

    fn object(&self, class: Class, value: &str) -> Result<Uuid, Reason> {
        if value.is_empty() {
            return Err(malformed("write a uuid, a unique name, or a path in this tree"));
        }
        let (name, place) = match self.path(class, value)? {
            Some(Named::Uuid(id)) => return self.accessible(class, id, value),
            Some(Named::Name(name)) => (name, Some(false)),
            Some(Named::InBin(name)) => (name, Some(true)),
            None => match canonical_uuid(value) {
                Some(id) => return self.accessible(class, id, value),
                None => (value.to_owned(), None),
            },
        };
        let matching = self.candidates(class).into_iter().filter(|(_, held)| *held == name);
        let (binned, standing): (Vec<_>, Vec<_>) = matching.partition(|(object, _)| object.bin().is_some());
        let matching = match place {
            Some(true) => binned,
            Some(false) => standing,
            // A bare name means what is in the bin as long as nothing else bears it.
            None if standing.is_empty() => binned,
            None => standing,
        };
        let accessible: Vec<_> =
            matching.iter().filter(|(object, _)| self.may_read(object)).map(|(object, _)| object.id()).collect();
        match (accessible.as_slice(), matching.is_empty()) {
            ([id], _) => Ok(*id),
            ([], true) => Err(Reason::NotFound(format!("{} named {name:?}", class.noun()))),
            ([], false) => Err(Reason::NotYours { class }),
            _ => Err(Reason::Malformed(format!("several are named {name:?}; write the uuid"))),
        }
    }

    /// What a path in this tree names: relative to the root, with or without the mount point, leading `../` dropped.
    fn path(&self, class: Class, value: &str) -> Result<Option<Named>, Reason> {
        if !value.contains('/') {
            return Ok(None);
        }
        let path = Path::new(value);
        let inside = path.strip_prefix(self.mountpoint).unwrap_or(path);
        let relative: PathBuf =
            inside.components().filter(|component| matches!(component, Component::Normal(_))).collect();
        let parts: Vec<_> = relative.iter().filter_map(|part| part.to_str()).collect();
        let wrong = || Reason::Malformed(format!("{value:?} is no path of {} in this tree", class.directory()));
        match parts.as_slice() {
            [directory, name] if class == Class::Flavor && *directory == class.directory() => {
                unescape(name).map(|name| Some(Named::Name(name))).ok_or_else(wrong)
            }
            [directory, id] if *directory == class.directory() => {
                canonical_uuid(id).map(|id| Some(Named::Uuid(id))).ok_or_else(wrong)
            }
            ["trash", id] if class != Class::Flavor => {
                canonical_uuid(id).map(|id| Some(Named::Uuid(id))).ok_or_else(wrong)
            }
            ["by-name", "trash", name] if class != Class::Flavor => {
                unescape(name).map(|name| Some(Named::InBin(name))).ok_or_else(wrong)
            }
            ["by-name", directory, name] if *directory == class.directory() => {
                unescape(name).map(|name| Some(Named::Name(name))).ok_or_else(wrong)
            }
            ["by-state", directory, _, name] if class == Class::Flavor && *directory == class.directory() => {
                unescape(name).map(|name| Some(Named::Name(name))).ok_or_else(wrong)
            }
            ["by-state", directory, _, id] if *directory == class.directory() => {
                canonical_uuid(id).map(|id| Some(Named::Uuid(id))).ok_or_else(wrong)
            }
            _ => Err(wrong()),
        }
    }

    fn accessible(&self, class: Class, id: Uuid, value: &str) -> Result<Uuid, Reason> {
        let object = self.inventory.get(class, id);
        let object = object.ok_or_else(|| Reason::NotFound(format!("{} {value:?}", class.noun())))?;
        if self.may_read(&object) { Ok(id) } else { Err(Reason::NotYours { class }) }
    }

    fn may_read(&self, object: &Object) -> bool {
        match object {
            Object::Image(image) => sharing::may_read(&image.record, self.caller),
            Object::Instance(_)
            | Object::Task(_)
            | Object::Flavor(_)
            | Object::Volume(_)
            | Object::Transfer(_)
            | Object::Backend(_) => self.caller.role(&object.ownership()) != Role::Stranger,
        }
    }

    fn candidates(&self, class: Class) -> Vec<(Object, String)> {
        match class {
            Class::Image => {
                let images = self.inventory.images().into_iter();
                images.map(|image| (Object::Image(image.clone()), image.record.name.clone())).collect()
            }
            Class::Instance => {
                let instances = self.inventory.instances().into_iter();
                instances.map(|instance| (Object::Instance(instance.clone()), instance.name().to_owned())).collect()
            }
            Class::Volume => {
                let volumes = self.inventory.volumes().into_iter();
                volumes.map(|volume| (Object::Volume(volume.clone()), volume.record.name.clone())).collect()
            }
            // Found by their names, which are unique, or by their uuids alone.
            Class::Task | Class::Flavor | Class::Transfer | Class::Backend => Vec::new(),
        }
    }
}

enum Named {
    Uuid(Uuid),
    Name(String),
    /// The name of something in the bin.
    InBin(String),
}

/// A uuid in the one form that the tree uses: lower case with hyphens.
pub fn canonical_uuid(text: &str) -> Option<Uuid> {
    let id = Uuid::try_parse(text).ok()?;
    (id.hyphenated().to_string() == text && !id.is_nil()).then_some(id)
}
