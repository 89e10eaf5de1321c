//! Reads values again whenever they may have changed, and tells what differs.
//!
//! What changes twice between two looks is one change here, and nobody knows who made it; in return this needs no more
//! rights than reading the values.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use nix::sys::inotify::Inotify;
use uuid::Uuid;

use super::line::Line;
use super::scope::{Part, is_summarised};
use super::{WatchError, wake_on};
use crate::cli::place::{CLASSES, identifier};
use crate::model::Class;

/// Values are lines; what is longer is a document or data and is not compared.
const MAX_VALUE: u64 = 64 * 1024;
/// Files that are no values, or that only repeat others.
const NO_VALUES: [&str; 6] = ["data", "console.log", "domain.xml", "spec.json", "errors", "updated_at"];

/// How often an object that is being moved is looked for.
const ATTEMPTS: usize = 3;

/// A thing that comes, goes and has values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Thing {
    class: Option<&'static str>,
    id: Option<Uuid>,
    name: String,
    values: BTreeMap<String, String>,
}

/// What is there at one moment, by something that stays the same.
type Picture = BTreeMap<String, Thing>;

/// A part of a tree and how it looked last.
pub struct Values {
    root: PathBuf,
    part: Part,
    picture: Picture,
}

impl Values {
    /// Begins with what is there now.
    pub fn begin(root: &Path, part: Part, inotify: &Inotify) -> Result<Values, WatchError> {
        let mut values = Values { root: root.to_owned(), part, picture: Picture::new() };
        values.picture = values.take(inotify)?;
        Ok(values)
    }

    /// Prints what differs since the last look.
    pub fn look(
        &mut self,
        inotify: &Inotify,
        print: &mut impl FnMut(&Line) -> Result<(), WatchError>,
    ) -> Result<(), WatchError> {
        let picture = self.take(inotify)?;
        let lines = differences(&self.picture, &picture);
        self.picture = picture;
        lines.iter().try_for_each(print)
    }

    /// Wakes are asked for before reading, so that no change falls between both.
    fn take(&self, inotify: &Inotify) -> Result<Picture, WatchError> {
        match &self.part {
            Part::Tree => {
                let mut picture = Picture::new();
                for class in Class::ALL.into_iter().filter(|class| is_summarised(*class)) {
                    picture.append(&mut self.summary(class, inotify)?);
                }
                Ok(picture)
            }
            Part::Class(class) if is_summarised(*class) => self.summary(*class, inotify),
            Part::Class(class) => self.directory(Path::new(class.directory()), inotify),
            Part::Object(id) | Part::Task(id) => self.object(*id, inotify),
            Part::Attribute(id, file) => self.attribute(*id, file, inotify),
            Part::File(path) => self.file(path, inotify),
            Part::Directory(path) => self.directory(path, inotify),
        }
    }

    /// A class in one read. Its header says which columns there are.
    fn summary(&self, class: Class, inotify: &Inotify) -> Result<Picture, WatchError> {
        let path = self.root.join("summary").join(class.directory());
        wake_on(inotify, &path)?;
        let text = fs::read_to_string(&path).map_err(|source| WatchError::Unreadable { file: path, source })?;
        let mut lines = text.lines();
        let columns: Vec<&str> = lines.next().unwrap_or_default().split('\t').collect();
        let things = lines.filter_map(|line| {
            let mut values: BTreeMap<String, String> =
                columns.iter().map(|column| (*column).to_owned()).zip(line.split('\t').map(str::to_owned)).collect();
            let key = values.remove("uuid")?;
            let thing = Thing {
                class: Some(class.noun()),
                id: key.parse().ok(),
                name: values.get("name").cloned().unwrap_or_default(),
                values,
            };
            Some((key, thing))
        });
        Ok(things.collect())
    }

    /// All values of an object, wherever it is now.
    fn object(&self, id: Uuid, inotify: &Inotify) -> Result<Picture, WatchError> {
        // It may be moved between being found and being read.
        for _ in 0..ATTEMPTS {
            let Some((class, home)) = self.home(id, inotify)? else { break };
            match values(&home) {
                Ok(mut values) => {
                    values.insert("directory".to_owned(), class.to_owned());
                    let name = values.get("name").cloned().unwrap_or_default();
                    return Ok(Picture::from([(
                        id.to_string(),
                        Thing { class: noun(class), id: Some(id), name, values },
                    )]));
                }
                Err(WatchError::Unreadable { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Picture::new())
    }

    fn attribute(&self, id: Uuid, file: &Path, inotify: &Inotify) -> Result<Picture, WatchError> {
        let Some((class, home)) = self.home(id, inotify)? else { return Ok(Picture::new()) };
        let path = home.join(file);
        wake_on(inotify, &path)?;
        let name = value(&home.join("name"))?.unwrap_or_default();
        let values = value(&path)?.map(|value| (file.display().to_string(), value)).into_iter().collect();
        Ok(Picture::from([(id.to_string(), Thing { class: noun(class), id: Some(id), name, values })]))
    }

    fn file(&self, inside: &Path, inotify: &Inotify) -> Result<Picture, WatchError> {
        let path = self.root.join(inside);
        wake_on(inotify, &path)?;
        let values = value(&path)?.map(|value| (inside.display().to_string(), value)).into_iter().collect();
        Ok(Picture::from([(String::new(), Thing { values, ..Thing::default() })]))
    }

    /// The names in a directory, and the values of its files.
    fn directory(&self, inside: &Path, inotify: &Inotify) -> Result<Picture, WatchError> {
        let path = self.root.join(inside);
        wake_on(inotify, &path)?;
        let unreadable = |source| WatchError::Unreadable { file: path.clone(), source };
        let mut files = Thing { name: inside.display().to_string(), ..Thing::default() };
        let mut picture = Picture::new();
        for entry in fs::read_dir(&path).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            let name = entry.file_name();
            if entry.file_type().map_err(unreadable)?.is_file() {
                if let Some(value) = value(&entry.path())? {
                    files.values.insert(name.display().to_string(), value);
                }
                continue;
            }
            let path = inside.join(&name).display().to_string();
            picture.insert(path.clone(), Thing { id: identifier(&name), name: path, ..Thing::default() });
        }
        picture.insert(String::new(), files);
        Ok(picture)
    }

    /// An object's class directory and its own.
    fn home(&self, id: Uuid, inotify: &Inotify) -> Result<Option<(&'static str, PathBuf)>, WatchError> {
        for class in CLASSES {
            let home = self.root.join(class).join(id.to_string());
            match home.symlink_metadata() {
                Ok(_) => {
                    wake_on(inotify, &home)?;
                    return Ok(Some((class, home)));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(WatchError::Unreadable { file: home, source }),
            }
        }
        Ok(None)
    }
}

/// The class of the objects in a class directory; of the bin it cannot be said so.
fn noun(directory: &str) -> Option<&'static str> {
    Class::ALL.into_iter().find(|class| class.directory() == directory).map(Class::noun)
}

/// All values of an object's directory.
fn values(home: &Path) -> Result<BTreeMap<String, String>, WatchError> {
    let unreadable = |source| WatchError::Unreadable { file: home.to_owned(), source };
    let mut values = BTreeMap::new();
    for entry in fs::read_dir(home).map_err(unreadable)? {
        let Ok(name) = entry.map_err(unreadable)?.file_name().into_string() else { continue };
        // What begins with a dot is somebody's temporary file.
        if NO_VALUES.contains(&name.as_str()) || name.starts_with('.') {
            continue;
        }
        if let Some(value) = value(&home.join(&name))? {
            values.insert(name, value);
        }
    }
    Ok(values)
}

/// What a file or a link says. `None` if it is gone, or cannot be read, as a verb, or is too long for a value.
fn value(path: &Path) -> Result<Option<String>, WatchError> {
    let unreadable = |source| WatchError::Unreadable { file: path.to_owned(), source };
    let read = || -> io::Result<Option<String>> {
        let kind = path.symlink_metadata()?.file_type();
        if kind.is_symlink() {
            return Ok(Some(path.read_link()?.display().to_string()));
        }
        if !kind.is_file() {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        File::open(path)?.take(MAX_VALUE + 1).read_to_end(&mut bytes)?;
        let is_value = bytes.len() as u64 <= MAX_VALUE;
        Ok(is_value.then(|| String::from_utf8_lossy(&bytes).trim_end_matches('\n').to_owned()))
    };
    match read() {
        Ok(value) => Ok(value),
        Err(error) if absent(&error) => Ok(None),
        Err(error) => Err(unreadable(error)),
    }
}

/// Not there, not for us, or nothing to read.
fn absent(error: &io::Error) -> bool {
    use nix::errno::Errno;
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(Errno::ENOENT | Errno::ESTALE | Errno::ENOTDIR | Errno::EACCES | Errno::EOPNOTSUPP)
    )
}

/// What happened between two pictures.
fn differences(before: &Picture, after: &Picture) -> Vec<Line> {
    let mut lines = Vec::new();
    let none = String::new();
    for (_, old) in before.iter().filter(|(key, _)| !after.contains_key(*key)) {
        lines.push(told(old, "disappeared", old.values.get("state").unwrap_or(&none), ""));
    }
    for (key, new) in after {
        let Some(old) = before.get(key) else {
            lines.push(told(new, "appeared", "", new.values.get("state").unwrap_or(&none)));
            continue;
        };
        let names = old.values.keys().chain(new.values.keys().filter(|name| !old.values.contains_key(*name)));
        for name in names {
            let (from, to) = (old.values.get(name).unwrap_or(&none), new.values.get(name).unwrap_or(&none));
            if from != to {
                lines.push(told(new, name, from, to));
            }
        }
    }
    lines
}

fn told(thing: &Thing, what: &str, from: &str, to: &str) -> Line {
    Line {
        class: thing.class.map(str::to_owned),
        uuid: thing.id,
        name: thing.name.clone(),
        ..Line::now(what, from, to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thing(values: &[(&str, &str)]) -> Thing {
        let values = values.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Thing { name: "web1".to_owned(), values, ..Thing::default() }
    }

    fn told_of(before: &[(&str, Thing)], after: &[(&str, Thing)]) -> Vec<(String, String, String)> {
        let picture = |things: &[(&str, Thing)]| things.iter().cloned().map(|(key, it)| (key.to_owned(), it)).collect();
        let lines = differences(&picture(before), &picture(after));
        lines.into_iter().map(|line| (line.what, line.from, line.to)).collect()
    }

    fn words(what: &str, from: &str, to: &str) -> (String, String, String) {
        (what.to_owned(), from.to_owned(), to.to_owned())
    }

    #[test]
    fn values_that_differ_are_told_and_others_not() {
        let before = thing(&[("state", "active"), ("task", "stopping"), ("name", "a")]);
        let after = thing(&[("state", "stopped"), ("task", ""), ("name", "a"), ("last_task", "x")]);
        assert_eq!(
            told_of(&[("1", before)], &[("1", after)]),
            [words("state", "active", "stopped"), words("task", "stopping", ""), words("last_task", "", "x")]
        );
    }

    #[test]
    fn what_comes_and_goes_is_told_with_its_state() {
        let one = thing(&[("state", "active")]);
        assert_eq!(told_of(&[], &[("1", one.clone())]), [words("appeared", "", "active")]);
        assert_eq!(told_of(&[("1", one)], &[]), [words("disappeared", "active", "")]);
    }
}
