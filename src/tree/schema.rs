//! The JSON Schema of each class's `spec.json`, from the rows that read and write it.

use serde_json::{Map, Value, json};

use super::attribute::{Row, Type, Write};
use super::spec::Specified;

/// The schema (draft 2020-12) of what can be written to `spec.json`; what it reads is valid too.
pub fn of<O: Specified>(title: &str) -> String {
    let properties: Map<_, _> = O::rows().iter().filter_map(property).collect();
    let schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        "description": "What can be written, as one document. Keys that are absent stay as they are; null means empty.",
        "type": "object",
        "additionalProperties": false,
        "properties": properties,
    });
    format!("{schema:#}\n")
}

fn property<O, C>(row: &Row<O, C>) -> Option<(String, Value)> {
    let mut schema = match &row.write {
        Write::Change(_) if row.is_verb() => return None,
        Write::Change(_) => values(row.kind),
        Write::Document(_) => json!({"type": ["string", "null"], "writeOnly": true}),
        Write::FreeKey { .. } => {
            json!({"type": ["object", "null"], "additionalProperties": {"type": ["string", "null"]}})
        }
        Write::Never | Write::Order(_) | Write::Spec | Write::Json(_) | Write::Data | Write::Key(_) => return None,
    };
    schema["description"] = row.description.into();
    Some((row.name.to_owned(), schema))
}

/// The exact type, and the ways in which the file takes it.
fn values(kind: Type) -> Value {
    match kind {
        Type::Boolean => json!({
            "type": ["boolean", "integer", "string"],
            "minimum": 0,
            "maximum": 1,
            "pattern": "^([01]|[yY]|[nN]|[yY][eE][sS]|[nN][oO]|[oO][nN]|[oO][fF][fF]|[tT][rR][uU][eE]|[fF][aA][lL][sS][eE])$",
        }),
        Type::Number("bytes") => {
            json!({"type": ["integer", "string", "null"], "minimum": 0, "pattern": "^([0-9]+[KMGTkmgt]?)?$"})
        }
        Type::Number(_) => json!({"type": ["integer", "string", "null"], "minimum": 0, "pattern": "^[0-9]*$"}),
        Type::Time => json!({"type": ["integer", "string"], "minimum": 0, "pattern": "^([0-9]+|never)$"}),
        Type::Groups => json!({"type": ["array", "string", "null"], "items": {"type": "string"}}),
        Type::Word => json!({"type": ["string", "null"], "pattern": "^[a-z0-9_]*$"}),
        Type::Text
        | Type::Object
        | Type::User
        | Type::Group
        | Type::Document(_)
        | Type::Link
        | Type::Data
        | Type::Directory => json!({"type": ["string", "null"]}),
    }
}
