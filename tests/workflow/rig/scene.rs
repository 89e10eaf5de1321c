//! What there is of an object: record, domains and files, comparable between worlds. And what has to hold of every world
//! in which nothing runs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use instancefs::hypervisor::definition::Definition;
use instancefs::inventory::{Image, Instance, Object, Volume};
use instancefs::model::Class;
use instancefs::model::task::TaskState;
use instancefs::model::volume::record::VolumeData;
use serde_json::{Value, json};
use uuid::Uuid;

use super::memory::FileDisks;
use crate::lab::Life;

/// All that may differ between before and after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scene {
    /// The state word, or `gone`.
    pub state: String,
    /// What the record says.
    pub record: String,
    /// The hypervisor's domains.
    pub domains: BTreeSet<String>,
    /// All files that are kept, with their contents, and directories.
    pub files: BTreeMap<String, String>,
}

/// Words for what has another uuid in each world.
pub struct Words(pub Vec<(Uuid, &'static str)>);

impl Words {
    /// A text without uuids and moments.
    fn plain(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for (id, word) in &self.0 {
            text = text.replace(&id.to_string(), word);
        }
        let mut plain = String::new();
        let mut rest = text.as_str();
        while let Some(character) = rest.chars().next() {
            match rest.get(..36).filter(|word| Uuid::try_parse(word).is_ok()) {
                Some(_) => {
                    plain.push_str("UUID");
                    rest = &rest[36..];
                }
                None => {
                    plain.push(character);
                    rest = &rest[character.len_utf8()..];
                }
            }
        }
        plain
    }
}

impl Scene {
    /// What there is now.
    pub fn of(life: &Life<'_>, class: Class, id: Uuid, words: &Words, counts_boots: bool) -> Scene {
        let (state, record) = match life.inventory.get(class, id) {
            Some(Object::Instance(instance)) => {
                (instance.observed().state.word().to_owned(), instance_record(&instance))
            }
            Some(Object::Image(image)) => (image.state().word().to_owned(), image_record(&image)),
            Some(Object::Volume(volume)) => (volume.record.state().word().to_owned(), volume_record(&volume)),
            Some(Object::Task(_) | Object::Flavor(_) | Object::Transfer(_) | Object::Backend(_)) | None => {
                ("gone".to_owned(), String::new())
            }
        };
        let mut files = BTreeMap::new();
        walk(life.world.directory.path(), "", &mut files);
        // The second names that the disks of a protected instance have, until it is protected no more.
        if life.inventory.instance(id).is_some_and(|instance| instance.record.protection.protects()) {
            files.retain(|path, _| !path.contains("/.instancefs-kept/"));
        }
        // Places for what is kept are no leftovers.
        files.retain(|path, _| !["disks/", "shelf/", "devices/", "volumes/"].contains(&path.as_str()));
        let files = files.into_iter().map(|(path, content)| (words.plain(&path), words.plain(&content)));
        Scene {
            state,
            record: words.plain(&record),
            domains: guests(life).iter().map(|guest| words.plain(&domain(guest, counts_boots))).collect(),
            files: files.collect(),
        }
    }

    /// Whether all domains and files of the other are here too, as they are there.
    pub fn contains(&self, other: &Scene) -> bool {
        other.domains.is_subset(&self.domains)
            && other.files.iter().all(|(path, content)| self.files.get(path) == Some(content))
    }

    /// Whether all files of the other are here as they are there, and its domains, changed or not.
    pub fn keeps(&self, other: &Scene) -> bool {
        let uuids = |scene: &Scene| -> BTreeSet<String> {
            scene.domains.iter().filter_map(|domain| domain.split(' ').next()).map(str::to_owned).collect()
        };
        uuids(other).is_subset(&uuids(self))
            && other.files.iter().all(|(path, content)| self.files.get(path) == Some(content))
    }

    /// What is different here, as lines; empty where nothing is.
    pub fn difference(&self, other: &Scene) -> String {
        let lines = |scene: &Scene| -> BTreeSet<String> {
            let files = scene.files.iter().map(|(path, content)| format!("{path}: {content:?}"));
            let domains = scene.domains.iter().map(|domain| format!("domain {domain}"));
            [format!("state {}", scene.state), format!("record {}", scene.record)]
                .into_iter()
                .chain(domains)
                .chain(files)
                .collect()
        };
        let (here, there) = (lines(self), lines(other));
        let here_only = here.difference(&there).map(|line| format!("  is     {line}\n"));
        let there_only = there.difference(&here).map(|line| format!("  is not {line}\n"));
        here_only.chain(there_only).collect()
    }
}

fn instance_record(instance: &Instance) -> String {
    let record = &instance.record;
    let disks: Vec<_> = record.disks.iter().map(|disk| (&disk.reference, disk.role)).collect();
    let bin = record.bin.as_ref().map(|bin| (bin.state, bin.is_settled, bin.entry.expiry.is_some()));
    let shelf = record.shelf.as_ref().map(|shelf| {
        let copies = shelf.copies.iter().map(|copy| (&copy.of.disk.reference, copy.of.disk.role, copy.size_bytes));
        (shelf.stage, copies.collect::<Vec<_>>(), shelf.former.len())
    });
    // Else the hypervisor says.
    let remembers = record.draft.is_some() || record.bin.is_some() || record.shelf.is_some();
    format!(
        "{:?} draft {} {} vcpus {} bytes, root {:?}, autostart {:?} {}, disks {disks:?}, bin {bin:?}, shelf {shelf:?}",
        record.name,
        record.draft.is_some(),
        record.vcpus,
        record.memory_bytes,
        record.root_disk_bytes,
        remembers.then_some(record.autostart),
        instance.autostart()
    )
}

fn image_record(image: &Image) -> String {
    let record = &image.record;
    let bin = record.bin.as_ref().map(|entry| entry.expiry.is_some());
    format!(
        "{:?} draft {} {:?} {} {} {:?}, shown {}, bin {bin:?}",
        record.name,
        record.draft.is_some(),
        record.disk_format,
        record.size_bytes,
        record.virtual_size_bytes,
        record.sha512,
        image.data_bytes
    )
}

fn volume_record(volume: &Volume) -> String {
    let record = &volume.record;
    let snapshots: Vec<_> = record
        .snapshots
        .iter()
        .map(|(name, entry)| (name, entry.value.data.is_some(), entry.value.size_bytes))
        .collect();
    let attachments: Vec<_> = record.attached_to().map(|(id, attachment)| (id, &attachment.device)).collect();
    format!(
        "{:?} draft {} {} bytes, {:?}, data {}, attached {attachments:?}, local {}, snapshots {snapshots:?}, fault {:?}, \
         bin {:?}",
        record.name,
        record.draft.is_some(),
        record.size_bytes,
        record.disk_format,
        record.data.is_some(),
        record.local.is_some(),
        record.fault,
        record.bin.as_ref().map(|entry| entry.expiry.is_some()),
    )
}

/// All guests of the host, whatever the program knows.
fn guests(life: &Life<'_>) -> Vec<Value> {
    life.world.control(json!({ "do": "list" }))["guests"].as_array().cloned().unwrap_or_default()
}

fn domain(guest: &Value, counts_boots: bool) -> String {
    let domain = &guest["domain"];
    let xml = guest["xml"].as_str().unwrap_or_default();
    let definition = Definition::parse(xml).expect("a definition");
    let word = |key: &str| domain[key].to_string();
    let live = guest["live_xml"].as_str().map(|xml| disks(&Definition::parse(xml).expect("a definition")));
    format!(
        "{} {} {} saved {} persistent {} autostart {} boots {} {:?} vcpus {:?} bytes, disks {:?}, live {live:?}",
        word("uuid"),
        word("name"),
        word("power"),
        word("has_managed_save"),
        word("persistent"),
        word("autostart"),
        if counts_boots { &guest["boots"] } else { &Value::Null },
        definition.vcpus,
        definition.memory_bytes,
        disks(&definition),
    )
}

/// The devices of a definition; where they lie is another place in each world.
fn disks(definition: &Definition) -> Vec<String> {
    definition.disks.iter().map(|disk| disk.device.clone()).collect()
}

/// What is no object's: the store's, the host's, logs, and the directories for them.
const NOT_KEPT: [&str; 5] = ["store.sqlite", "host", "events", "consoles", "tokens"];

/// What the background removes meanwhile is gone.
fn walk(base: &Path, below: &str, files: &mut BTreeMap<String, String>) {
    let Ok(entries) = fs::read_dir(base.join(below)) else { return };
    for entry in entries.filter_map(Result::ok) {
        let name = entry.file_name().into_string().expect("text");
        if below.is_empty() && NOT_KEPT.iter().any(|prefix| name.starts_with(prefix)) {
            continue;
        }
        let path = if below.is_empty() { name } else { format!("{below}/{name}") };
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files.insert(format!("{path}/"), String::new());
            walk(base, &path, files);
        } else if let Ok(content) = fs::read(entry.path()) {
            files.insert(path, text_or_hash(content));
        }
    }
}

fn text_or_hash(content: Vec<u8>) -> String {
    String::from_utf8(content).unwrap_or_else(|binary| format!("{:?}", openssl::sha::sha256(&binary.into_bytes())))
}

/// Holds of every world in which nothing runs: no claim, no unfinished task, each disk there and made by who is recorded,
/// each domain known. `condemned` is an object whose disks were to be removed, so that a recorded one may be gone.
pub fn is_at_rest(life: &Life<'_>, disks: &FileDisks, condemned: Option<Uuid>) {
    for task in life.inventory.tasks() {
        assert!(task.record.state.is_final(), "a task goes on: {task:?}");
    }
    let mut known = BTreeSet::new();
    for instance in life.inventory.instances() {
        assert_eq!((&instance.task, instance.record.operation), (&None, None), "a claim stays");
        known.insert(instance.id.to_string());
        // A removal that took effect may have been reported as failed.
        let copies = instance.record.shelf.iter().flat_map(|shelf| &shelf.copies);
        let copies: Vec<_> = copies.map(|copy| copy.of.disk.reference.as_str()).collect();
        let has_copy = |reference: &str| copies.contains(&reference);
        for disk in &instance.record.disks {
            match disks.operation_of(&disk.reference) {
                None if condemned == Some(instance.id) || has_copy(&disk.reference) => {}
                found => assert_eq!(found, Some(disk.operation), "the disk {} is lost", disk.reference),
            }
        }
    }
    check_shelf(life);
    check_attachments(life);
    for image in life.inventory.images() {
        assert_eq!((&image.task, image.record.operation), (&None, None), "a claim stays");
    }
    for volume in life.inventory.volumes() {
        assert_eq!((&volume.task, volume.record.operation), (&None, None), "a claim stays");
    }
    check_volumes(life, disks);
    for guest in guests(life) {
        let id = guest["domain"]["uuid"].as_str().expect("a uuid").to_owned();
        assert!(known.contains(&id), "the domain {id} is nobody's");
    }
}

/// Who has which volume is the same from both sides, and no volume is owned.
fn check_attachments(life: &Life<'_>) {
    let mut of_volumes = BTreeSet::new();
    for volume in life.inventory.volumes() {
        assert_eq!((&volume.task, volume.record.operation), (&None, None), "a claim stays");
        let attachments = volume.record.attached_to();
        of_volumes.extend(attachments.map(|(instance, attachment)| (instance, attachment.device.clone(), volume.id)));
    }
    let mut of_instances = BTreeSet::new();
    for instance in life.inventory.instances() {
        let volumes = instance.record.volumes.iter();
        of_instances.extend(volumes.map(|(device, entry)| (instance.id, device.to_owned(), entry.value)));
    }
    assert_eq!(of_volumes, of_instances, "the records differ");
}

/// All data that was made is recorded, and that of a volume which nobody wants to remove is there.
fn check_volumes(life: &Life<'_>, disks: &FileDisks) {
    let made = disks.volumes.references();
    let mut recorded = BTreeSet::new();
    for volume in life.inventory.volumes() {
        let record = &volume.record;
        let snapshots = record.snapshots.iter().filter_map(|(_, entry)| entry.value.data.as_ref());
        recorded.extend(snapshots.chain(&record.leftovers).map(|data| data.reference.clone()));
        let Some(VolumeData::Ours(data)) = &record.data else { continue };
        recorded.insert(data.reference.clone());
        if record.draft.is_none() && record.bin.is_none() {
            assert_eq!(made.get(&data.reference), Some(&data.operation), "the volume {} is lost", volume.id);
        }
    }
    let nobodys: Vec<_> = made.keys().filter(|reference| !recorded.contains(*reference)).collect();
    assert!(nobodys.is_empty(), "data that is nobody's: {nobodys:?}");
}

/// Each copy on the shelf is recorded, and each recorded one that may be needed is there.
fn check_shelf(life: &Life<'_>) {
    let directory = life.world.directory.path().join("shelf");
    let mut recorded = BTreeSet::new();
    for instance in life.inventory.instances() {
        let Some(shelf) = &instance.record.shelf else { continue };
        let place = |operation: Uuid, reference: &str| {
            let (instance, file) = reference.split_once('/').expect("a reference of two parts");
            directory.join(instance).join(format!("{operation}-{file}"))
        };
        for copy in &shelf.copies {
            let path = place(copy.of.operation, &copy.of.disk.reference);
            assert!(path.exists(), "the copy {} is lost", path.display());
            recorded.insert(path);
        }
        recorded.extend(shelf.former.iter().map(|copy| place(copy.operation, &copy.disk.reference)));
    }
    for path in life.world.shelf() {
        assert!(recorded.contains(&path), "the copy {} is nobody's", path.display());
    }
}

/// A failed latest task says why, and `last_error` says it too, until somebody asks for something else.
pub fn errors_agree(life: &Life<'_>) {
    for object in life.inventory.instances().into_iter().map(Object::Instance) {
        agree(life, &object);
    }
    for object in life.inventory.images().into_iter().map(Object::Image) {
        agree(life, &object);
    }
    for object in life.inventory.volumes().into_iter().map(Object::Volume) {
        agree(life, &object);
    }
}

fn agree(life: &Life<'_>, object: &Object) {
    let task = match object {
        Object::Instance(instance) => instance.record.last_task,
        Object::Image(image) => image.record.last_task,
        Object::Volume(volume) => volume.record.last_task,
        Object::Task(_) | Object::Flavor(_) | Object::Transfer(_) | Object::Backend(_) => None,
    };
    // Of an operation on one of its volumes, that volume tells.
    let task = task.and_then(|task| life.inventory.task(task)).filter(|task| task.record.object == object.id());
    let Some(task) = task else { return };
    let error = object.errors().and_then(|errors| errors.last());
    match task.record.state {
        TaskState::Failure => {
            assert!(!task.record.message.is_empty() && task.record.errno != 0, "a failure without words: {task:?}");
            assert!(error.is_some(), "it failed ({}) and last_error says ok", task.record.message);
        }
        TaskState::Success | TaskState::Cancelled | TaskState::Pending | TaskState::Processing => {}
    }
}
