//! `spec.json` of a user's own task: what it is to do, in the shape of OpenStack's image tasks.
//!
//! ```json
//! {"type": "import", "input": {
//!     "import_from": "https://...", "import_from_format": "qcow2",
//!     "image_properties": {"name": "...", "disk_format": "qcow2", "container_format": "bare"}}}
//! ```

use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::json;
use super::reference::Resolver;
use super::spec;
use super::value::{filled, malformed, text};
use crate::inventory::Image;
use crate::model::caller::{NO_PROJECT, Ownership};
use crate::model::reason::Reason;
use crate::model::record::ImageRecord;
use crate::model::task::{Import, TaskChange};

/// What the task itself says of the image.
const NOT_PROPERTIES: [&str; 5] = ["state", "import_from", "owner", "project", "expires_at"];

type Refused = Vec<(String, Reason)>;

/// Reads such a document. All that cannot be read in it is named at once.
pub fn parse(document: &[u8], resolver: &Resolver<'_>) -> Result<TaskChange, Reason> {
    let members = json::object(document)?;
    let mut refused = Refused::new();
    let shown = format!("{:#}", Value::Object(members.clone()));
    let (mut kind, mut input) = (None, None);
    for (key, value) in members {
        match key.as_str() {
            "type" => kind = Some(value),
            "input" => input = Some(value),
            _ => refused.push(unknown("", &key)),
        }
    }
    match kind.as_ref().map(Value::as_str) {
        Some(Some("import")) => {}
        Some(_) => refused.push(("type".into(), malformed("write import, the only type that there is"))),
        None => refused.push(("type".into(), malformed("it is missing; write import"))),
    }
    let mut wanted = Wanted::default();
    match input {
        Some(Value::Object(input)) => wanted.read(input, &mut refused),
        Some(_) => refused.push(("input".into(), malformed("write an object"))),
        None => refused.push(("input".into(), malformed("it is missing; import_from in it says where from"))),
    }
    let properties = match spec::of_members(&nothing(), wanted.properties, resolver) {
        Ok(properties) => properties,
        Err(Reason::Document { refused: keys, .. }) => {
            refused.extend(keys.into_iter().map(|(key, reason)| (in_properties(&key), reason)));
            Vec::new()
        }
        Err(reason) => return Err(reason),
    };
    match (wanted.source, Reason::of_document(refused)) {
        (_, Some(reason)) => Err(reason),
        (Some(source), None) => Ok(TaskChange::Import(Box::new(Import { source, properties, document: shown }))),
        (None, None) => Err(malformed("input.import_from is missing")),
    }
}

/// `input`, as far as it was read.
#[derive(Default)]
struct Wanted {
    source: Option<String>,
    properties: Map<String, Value>,
}

impl Wanted {
    fn read(&mut self, input: Map<String, Value>, refused: &mut Refused) {
        let mut format = None;
        for (key, value) in input {
            match (key.as_str(), value) {
                ("import_from", Value::String(source)) => match text(source.as_bytes()).and_then(filled) {
                    Ok(source) => self.source = Some(source.to_owned()),
                    Err(reason) => refused.push(("input.import_from".into(), reason)),
                },
                ("import_from_format", Value::String(word)) => format = Some(word),
                ("import_from_format", Value::Null) => {}
                ("image_properties", Value::Object(properties)) => self.properties = properties,
                ("import_from" | "import_from_format", _) => {
                    refused.push((format!("input.{key}"), malformed("write a string")));
                }
                ("image_properties", _) => refused.push((format!("input.{key}"), malformed("write an object"))),
                _ => refused.push(unknown("input.", &key)),
            }
        }
        if self.source.is_none() && !refused.iter().any(|(key, _)| key == "input.import_from") {
            let missing = "it is missing; write an http or https URL, or a path below the import directory";
            refused.push(("input.import_from".into(), malformed(missing)));
        }
        self.properties.retain(|key, value| match key.as_str() {
            "container_format" => {
                if value.as_str() != Some("bare") {
                    refused.push((in_properties(key), malformed("write bare: nothing is unpacked")));
                }
                false
            }
            other if NOT_PROPERTIES.contains(&other) => {
                refused.push((in_properties(key), malformed("a task cannot set this; write it to the image later")));
                false
            }
            _ => true,
        });
        let claimed = self.properties.get("disk_format").and_then(Value::as_str);
        match (format, claimed) {
            (Some(format), Some(claimed)) if format != claimed => {
                let differs = format!("it differs from disk_format, {claimed}, and nothing is converted");
                refused.push(("input.import_from_format".into(), Reason::Malformed(differs)));
            }
            (Some(format), None) => drop(self.properties.insert("disk_format".into(), json!(format))),
            (Some(_), Some(_)) | (None, _) => {}
        }
    }
}

fn in_properties(key: &str) -> String {
    format!("input.image_properties.{key}")
}

fn unknown(inside: &str, key: &str) -> (String, Reason) {
    (format!("{inside}{key}"), malformed("there is no such key; docs/abi/tasks.md has an example"))
}

/// An image that has nothing yet: whatever is said of one that is to come is a change.
fn nothing() -> Image {
    let ownership = Ownership { owner: 0, project: NO_PROJECT, generation: 0 };
    let record = ImageRecord::new(0, String::new(), ownership, 0);
    Image { id: Uuid::nil(), record, task: None, data_bytes: 0 }
}
