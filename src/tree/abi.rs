//! `docs/abi/`: the documentation of every file, generated from the tables.

use std::fmt::Write as _;
use std::path::Path;
use std::{fs, io};

use super::attribute::{Row, Type};
use super::root::{FixedRow, ROOT, SUMMARY};
use super::{backend, flavor, image, instance, schema, task, transfer, volume};
use crate::inventory::{Flavor, Image, Instance, Volume};

const NOTE: &str = "Generated from the attribute tables in the source (`instancefs abi docs/abi`); do not edit.\n";

/// All documents, by file name.
pub fn documents() -> Vec<(&'static str, String)> {
    vec![
        ("root.md", fixed("/", ROOT)),
        ("summary.md", fixed("summary/", SUMMARY)),
        ("instances.md", class("instances/UUID/", instance::ROWS)),
        ("images.md", class("images/UUID/", image::ROWS)),
        ("tasks.md", class("tasks/UUID/", task::ROWS)),
        ("flavors.md", class("flavors/NAME/", flavor::ROWS)),
        ("volumes.md", class("volumes/UUID/", volume::ROWS)),
        ("transfers.md", class("transfers/UUID/", transfer::ROWS)),
        ("backends.md", class("backends/NAME/", backend::ROWS)),
        ("instances.schema.json", schema::of::<Instance>("instances/UUID/spec.json")),
        ("images.schema.json", schema::of::<Image>("images/UUID/spec.json")),
        ("volumes.schema.json", schema::of::<Volume>("volumes/UUID/spec.json")),
        ("flavors.schema.json", schema::of::<Flavor>("flavors/NAME/spec.json")),
    ]
}

/// Writes them into a directory.
pub fn write(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    for (name, text) in documents() {
        fs::write(directory.join(name), text)?;
    }
    Ok(())
}

fn class<O, C>(title: &str, rows: &[Row<O, C>]) -> String {
    let mut text = head(title);
    for row in rows {
        line(&mut text, row.name, row.mode, row.kind, row.description);
    }
    text
}

fn fixed(title: &str, rows: &[FixedRow]) -> String {
    let mut text = head(title);
    for row in rows {
        line(&mut text, row.name, row.mode(), row.kind, row.description);
    }
    text
}

fn head(title: &str) -> String {
    format!("# `{title}`\n\n{NOTE}\n| file | mode | type | content |\n|---|---|---|---|\n")
}

fn line(text: &mut String, name: &str, mode: u16, kind: Type, description: &str) {
    let kind = match kind {
        Type::Text => "text".to_owned(),
        Type::Boolean => "boolean".to_owned(),
        Type::Word => "word".to_owned(),
        Type::Number("") => "number".to_owned(),
        Type::Number(unit) => format!("number ({unit})"),
        Type::Time => "Unix seconds".to_owned(),
        Type::Object => "object".to_owned(),
        Type::User => "user".to_owned(),
        Type::Group => "group".to_owned(),
        Type::Groups => "groups".to_owned(),
        Type::Document(format) => format.to_owned(),
        Type::Link => "symlink".to_owned(),
        Type::Data => "data".to_owned(),
        Type::Directory => "directory".to_owned(),
    };
    let mode = if kind == "symlink" { "symlink".to_owned() } else { format!("0{mode:o}") };
    // Writing into a String cannot fail.
    let _ = writeln!(text, "| `{name}` | {mode} | {kind} | {description} |");
}
