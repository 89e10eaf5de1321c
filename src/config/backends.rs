//! `[backends.NAME]` of the configuration: where volumes are kept, and which files may be taken over as such.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::block::backends::Configured;
use crate::block::directory::BUILT_IN;
use crate::model::backend::Kind;

/// The longest name.
const LONGEST_NAME: usize = 32;

/// One section, as it is written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Section {
    /// What it is; of [`BUILT_IN`] nothing else than that.
    #[serde(rename = "type")]
    kind: Option<Kind>,
    /// Where its volumes lie; of [`BUILT_IN`] always within the state directory.
    path: Option<PathBuf>,
    /// Below which directories data may lie that it takes over.
    #[serde(default)]
    manage: Vec<PathBuf>,
}

/// All backends: what the built-in one may take over, and the further ones by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Backends {
    /// See [`Configured::manage`].
    pub manage: Vec<PathBuf>,
    /// By name.
    pub further: BTreeMap<String, Configured>,
}

impl Backends {
    /// Looks whether the sections make sense. Errors are a backend's name and a sentence.
    pub(super) fn resolve(sections: BTreeMap<String, Section>) -> Result<Backends, (String, String)> {
        let mut backends = Backends::default();
        for (name, section) in sections {
            let bad = |detail: &str| (name.clone(), detail.to_owned());
            if let Some(path) = section.path.iter().chain(&section.manage).find(|path| !is_plain(path)) {
                return Err(bad(&format!("{} is not an absolute path without ..", path.display())));
            }
            if name == BUILT_IN {
                if section.path.is_some() {
                    return Err(bad(
                        "it always keeps its volumes in the state directory; give another name with a path",
                    ));
                }
                backends.manage = section.manage;
                continue;
            }
            if !is_name(&name) {
                return Err(bad("a name has a to z, 0 to 9, - and _, 32 at most, and begins with a letter"));
            }
            let kind = section.kind.ok_or_else(|| bad("type is missing; known is \"directory\""))?;
            let path = section.path.ok_or_else(|| bad("path is missing: the directory for its volumes"))?;
            if let Some((other, _)) = backends.further.iter().find(|(_, other)| other.path == path) {
                return Err(bad(&format!("it has the path of {other}; each needs a directory of its own")));
            }
            backends.further.insert(name, Configured { kind, path, manage: section.manage });
        }
        Ok(backends)
    }
}

fn is_plain(path: &Path) -> bool {
    use std::path::Component;
    path.is_absolute() && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
}

fn is_name(name: &str) -> bool {
    name.len() <= LONGEST_NAME
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && name.chars().all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit() || "-_".contains(letter))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(text: &str) -> Result<Backends, String> {
        let sections = toml::from_str(text).map_err(|error| error.message().to_owned())?;
        Backends::resolve(sections).map_err(|(name, detail)| format!("{name}: {detail}"))
    }

    #[test]
    fn backends_are_named_with_their_directories() {
        let backends = resolve(
            "[directory]\nmanage = ['/srv/disks']\n[fast]\ntype = 'directory'\npath = '/fast/volumes'\nmanage = ['/a', '/b']\n",
        )
        .unwrap();
        assert_eq!(backends.manage, [PathBuf::from("/srv/disks")]);
        let fast =
            Configured { kind: Kind::Directory, path: "/fast/volumes".into(), manage: vec!["/a".into(), "/b".into()] };
        assert_eq!(backends.further, BTreeMap::from([("fast".to_owned(), fast)]));
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_the_reason() {
        for (text, reason) in [
            ("[fast]\npath = '/a'", "type is missing"),
            ("[fast]\ntype = 'directory'", "path is missing"),
            ("[fast]\ntype = 'directory'\npath = 'a'", "absolute"),
            ("[fast]\ntype = 'directory'\npath = '/a/../b'", "absolute"),
            ("[fast]\ntype = 'directory'\npath = '/a'\nmanage = ['b']", "absolute"),
            ("[directory]\npath = '/a'", "state directory"),
            ("['a:b']\ntype = 'directory'\npath = '/a'", "a name has"),
            ("[a]\ntype = 'directory'\npath = '/a'\n[b]\ntype = 'directory'\npath = '/a'", "path of a"),
            ("[fast]\ntype = 'lvm'\npath = '/a'", "unknown variant"),
            ("[fast]\ntype = 'directory'\npath = '/a'\nsize = 1", "unknown field"),
        ] {
            let error = resolve(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
