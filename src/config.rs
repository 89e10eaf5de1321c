//! What can be configured: `/etc/instancefs.toml` (an ordinary user's own: `~/.config/instancefs.toml`), mount options
//! (`-o`) and flags, the later winning over the earlier.

pub mod backends;
mod duration;
mod options;
pub mod place;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::Group;
use serde::Deserialize;

use crate::image::import::Policy;
use crate::privilege::Privilege;
pub use duration::{Retention, parse as parse_duration};
use duration::{duration, retention};

/// The import directory within the state directory where nobody says otherwise.
pub const IMPORT_DIRECTORY: &str = "import";
/// How long a write waits for the end of its work.
pub const DEFAULT_SETTLE: Duration = Duration::from_secs(3);
/// How long the bin keeps what was moved there.
pub const DEFAULT_RETENTION: Duration = Duration::from_secs(7 * 24 * 3600);
/// Who may enter root's tree.
pub const DEFAULT_ACCESS_GROUP: &str = "libvirt";
/// Who may read `events` and `metrics` in it.
pub const DEFAULT_ADMIN_GROUP: &str = "adm";

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the configuration {path} cannot be read")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file has an unknown key or a value of the wrong kind.
    #[error("{path}, line {line}: {detail}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The line, from 1 on.
        line: usize,
        /// What is wrong, with the key's name.
        detail: String,
    },
    /// A mount option that nobody knows.
    #[error(
        "unknown mount option '{0}'; known are ro, rw, access_group=, admin_group=, projects=, settle=, \
         retention=, shelved_offload_time=, connect=, state_dir= and import_directory="
    )]
    UnknownOption(String),
    /// A mount option with a value that cannot be used.
    #[error("mount option {option}: {detail}")]
    BadOption {
        /// The option's name.
        option: String,
        /// What is wrong with its value.
        detail: String,
    },
    /// A backend that cannot be as it is written.
    #[error("[backends.{name}]: {detail}")]
    Backend {
        /// Its name.
        name: String,
        /// What is wrong.
        detail: String,
    },
    /// An ordinary user without a home, and nothing named.
    #[error("your home directory is not known, where the state would be kept; set HOME, or name a --state-dir")]
    NoHome,
    /// A group that was named does not exist.
    #[error("the group '{name}', named as {purpose}, does not exist; create it (groupadd) or name another one")]
    NoGroup {
        /// The group.
        name: String,
        /// The setting that names it.
        purpose: &'static str,
    },
    /// The user database does not answer.
    #[error("the group '{name}' cannot be looked up")]
    GroupLookup {
        /// The group.
        name: String,
        /// Why.
        source: nix::Error,
    },
}

/// One layer of settings; what it does not say is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// The connection.
    pub connect: Option<String>,
    /// The state directory.
    pub state_dir: Option<PathBuf>,
    /// The settle window.
    #[serde(default, deserialize_with = "duration")]
    pub settle: Option<Duration>,
    /// How long the bin keeps what was moved there.
    #[serde(default, deserialize_with = "retention")]
    pub retention: Option<Retention>,
    /// How long after shelving the disks are removed.
    #[serde(default, deserialize_with = "retention")]
    pub shelved_offload_time: Option<Retention>,
    /// Name of the group that may enter the tree.
    pub access_group: Option<String>,
    /// Name of the group that may read `events` and `metrics`.
    pub admin_group: Option<String>,
    /// Names of the groups that are projects.
    pub projects: Option<Vec<String>>,
    /// Where importable files lie.
    pub import_directory: Option<PathBuf>,
    /// Hosts that images may be imported from though their addresses are not public; in the file only.
    pub import_hosts: Option<Vec<String>>,
    /// Whether images may be imported from any host with public addresses; in the file only.
    pub import_public_hosts: Option<bool>,
    /// The largest image that is imported, in bytes; in the file only.
    pub import_max_bytes: Option<u64>,
    /// How long an import may take; in the file only.
    #[serde(default, deserialize_with = "duration")]
    pub import_timeout: Option<Duration>,
    /// How long a server may say nothing; in the file only.
    #[serde(default, deserialize_with = "duration")]
    pub import_stall_timeout: Option<Duration>,
    /// Where volumes are kept, by the backend's name; in the file only.
    pub backends: Option<BTreeMap<String, backends::Section>>,
    /// Refuse every change; a mount option only.
    #[serde(skip)]
    pub read_only: Option<bool>,
}

/// Everything that a mount needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Who mounts.
    pub privilege: Privilege,
    /// The connection, if somebody named one; `auto` is `None` too.
    pub connect: Option<String>,
    /// The state directory.
    pub state_directory: PathBuf,
    /// It is the usual place in an ordinary user's home, so that the directories above it may be made.
    pub is_in_home: bool,
    /// How long a write waits for the end of its work.
    pub settle: Duration,
    /// How long the bin keeps what was moved there; `None`: until somebody deletes it.
    pub retention: Option<Duration>,
    /// How long after shelving the disks are removed; `None`: when somebody asks for it.
    pub shelved_offload_time: Option<Duration>,
    /// Refuse every change.
    pub read_only: bool,
    /// Group id that may enter the tree.
    pub access_group: u32,
    /// Group id that may read `events` and `metrics`.
    pub admin_group: u32,
    /// Group ids that are projects.
    pub projects: Vec<u32>,
    /// What may be imported.
    pub import: Policy,
    /// Where volumes are kept.
    pub backends: backends::Backends,
}

/// A group that a mount looks up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamedGroup<'a> {
    /// Its name.
    pub name: &'a str,
    /// The setting that it is for.
    pub purpose: &'static str,
    /// Nobody named it: then it may be absent, and root's group takes its place.
    pub is_default: bool,
}

impl Layer {
    /// The groups that [`Layer::resolve`] would look up.
    pub fn groups(&self) -> Vec<NamedGroup<'_>> {
        fn group<'a>(name: &'a Option<String>, default: &'a str, purpose: &'static str) -> NamedGroup<'a> {
            NamedGroup { name: name.as_deref().unwrap_or(default), purpose, is_default: name.is_none() }
        }
        let mut groups = vec![
            group(&self.access_group, DEFAULT_ACCESS_GROUP, "access_group"),
            group(&self.admin_group, DEFAULT_ADMIN_GROUP, "admin_group"),
        ];
        let projects = self.projects.iter().flatten();
        groups.extend(projects.map(|name| NamedGroup { name, purpose: "a project", is_default: false }));
        groups
    }

    /// Reads a configuration file; without `named` the default one, which may be absent.
    pub fn from_file(named: Option<&Path>) -> Result<Layer, ConfigError> {
        let usual = || place::configuration(Privilege::of_this_process());
        let Some(path) = named.map(Path::to_owned).or_else(usual) else { return Ok(Layer::default()) };
        match std::fs::read_to_string(&path) {
            Ok(text) => Layer::from_toml(&path, &text),
            Err(error) if named.is_none() && error.kind() == std::io::ErrorKind::NotFound => Ok(Layer::default()),
            Err(source) => Err(ConfigError::Unreadable { path, source }),
        }
    }

    fn from_toml(path: &Path, text: &str) -> Result<Layer, ConfigError> {
        toml::from_str(text).map_err(|error| {
            let start = error.span().map_or(0, |span| span.start);
            let line = text.bytes().take(start).filter(|byte| *byte == b'\n').count() + 1;
            ConfigError::Malformed { path: path.to_owned(), line, detail: error.message().to_owned() }
        })
    }

    /// This layer, and where it says nothing the one below.
    pub fn over(self, below: Layer) -> Layer {
        Layer {
            connect: self.connect.or(below.connect),
            state_dir: self.state_dir.or(below.state_dir),
            settle: self.settle.or(below.settle),
            retention: self.retention.or(below.retention),
            shelved_offload_time: self.shelved_offload_time.or(below.shelved_offload_time),
            access_group: self.access_group.or(below.access_group),
            admin_group: self.admin_group.or(below.admin_group),
            projects: self.projects.or(below.projects),
            import_directory: self.import_directory.or(below.import_directory),
            import_hosts: self.import_hosts.or(below.import_hosts),
            import_public_hosts: self.import_public_hosts.or(below.import_public_hosts),
            import_max_bytes: self.import_max_bytes.or(below.import_max_bytes),
            import_timeout: self.import_timeout.or(below.import_timeout),
            import_stall_timeout: self.import_stall_timeout.or(below.import_stall_timeout),
            backends: self.backends.or(below.backends),
            read_only: self.read_only.or(below.read_only),
        }
    }

    /// Fills in the defaults and looks up the groups.
    pub fn resolve(self) -> Result<Settings, ConfigError> {
        let lookup = |name: &str| {
            let group = Group::from_name(name);
            let found = group.map_err(|source| ConfigError::GroupLookup { name: name.to_owned(), source })?;
            Ok(found.map(|group| group.gid.as_raw()))
        };
        self.resolve_with(Privilege::of_this_process(), &lookup)
    }

    fn resolve_with(self, privilege: Privilege, lookup: &Lookup<'_>) -> Result<Settings, ConfigError> {
        let named =
            |name: &str, purpose| lookup(name)?.ok_or_else(|| ConfigError::NoGroup { name: name.to_owned(), purpose });
        let group = |name: Option<String>, default: &str, purpose| match name {
            Some(name) => named(&name, purpose),
            // Nobody else enters his mount.
            None if !privilege.is_root() => Ok(privilege.gid),
            None => Ok(lookup(default)?.unwrap_or_else(|| {
                log::warn!("there is no group '{default}', so {purpose} is root's group; name one with -o {purpose}=");
                0
            })),
        };
        let projects = self.projects.unwrap_or_default();
        let is_in_home = self.state_dir.is_none() && !privilege.is_root();
        let state_directory = self.state_dir.or_else(|| place::state(privilege)).ok_or(ConfigError::NoHome)?;
        let usual = Policy::new(state_directory.join(IMPORT_DIRECTORY));
        let import = Policy {
            directory: self.import_directory.unwrap_or(usual.directory),
            hosts: self.import_hosts.unwrap_or(usual.hosts),
            public_hosts: self.import_public_hosts.unwrap_or(usual.public_hosts),
            most_bytes: self.import_max_bytes.unwrap_or(usual.most_bytes),
            timeout: self.import_timeout.unwrap_or(usual.timeout),
            stall: self.import_stall_timeout.unwrap_or(usual.stall),
        };
        let backends = backends::Backends::resolve(self.backends.unwrap_or_default())
            .map_err(|(name, detail)| ConfigError::Backend { name, detail })?;
        Ok(Settings {
            privilege,
            backends,
            access_group: group(self.access_group, DEFAULT_ACCESS_GROUP, "access_group")?,
            admin_group: group(self.admin_group, DEFAULT_ADMIN_GROUP, "admin_group")?,
            projects: projects.iter().map(|name| named(name, "a project")).collect::<Result<_, _>>()?,
            connect: self.connect.filter(|uri| uri != "auto"),
            state_directory,
            import,
            is_in_home,
            settle: self.settle.unwrap_or(DEFAULT_SETTLE),
            retention: self.retention.unwrap_or(Retention::For(DEFAULT_RETENTION)).limit(),
            // On one host the copies and the disks lie together.
            shelved_offload_time: self.shelved_offload_time.unwrap_or(Retention::Never).limit(),
            read_only: self.read_only.unwrap_or(false),
        })
    }
}

/// A group's id by its name.
type Lookup<'a> = dyn Fn(&str) -> Result<Option<u32>, ConfigError> + 'a;

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: Privilege = Privilege { uid: 0, gid: 0 };

    fn toml(text: &str) -> Result<Layer, ConfigError> {
        Layer::from_toml(Path::new("/etc/instancefs.toml"), text)
    }

    #[test]
    fn a_file_says_everything_that_options_say() {
        let file = toml(
            "connect = 'qemu:///system'\nstate_dir = '/s'\nsettle = '500ms'\naccess_group = 'a'\nadmin_group = 'b'\n\
             projects = ['p', 'q']\nretention = '30d'\nshelved_offload_time = 0\n",
        )
        .unwrap();
        let options = Layer::from_options([
            "connect=qemu:///system,state_dir=/s",
            "settle=500ms,access_group=a,admin_group=b,projects=p:q,retention=30d",
            "shelved_offload_time=0",
        ]);
        assert_eq!(file, options.unwrap());
        assert_eq!(toml("settle = 2").unwrap().settle, Some(Duration::from_secs(2)));
    }

    #[test]
    fn what_may_be_imported_is_said_in_the_file_and_the_directory_as_an_option_too() {
        let file = toml(
            "import_hosts = ['a', '*.b']\nimport_public_hosts = false\nimport_max_bytes = 7\nimport_timeout = '1h'\n\
             import_stall_timeout = 5\nimport_directory = '/file'\n",
        );
        let option = Layer::from_options(["import_directory=/option,state_dir=/s"]).unwrap();
        let nobody = |_: &str| Ok(None);
        let import = option.over(file.unwrap()).resolve_with(ROOT, &nobody).unwrap().import;
        let expected = Policy {
            directory: "/option".into(),
            hosts: vec!["a".to_owned(), "*.b".to_owned()],
            public_hosts: false,
            most_bytes: 7,
            timeout: Duration::from_secs(3600),
            stall: Duration::from_secs(5),
        };
        assert_eq!(import, expected);
        let usual = Layer::from_options(["state_dir=/s"]).unwrap().resolve_with(ROOT, &nobody).unwrap().import;
        assert_eq!(usual, Policy::new("/s/import".into()));
        assert!(Layer::from_options(["import_directory=relative"]).is_err());
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_name_and_line() {
        let error = toml("settle = '3s'\nacess_group = 'x'\n").unwrap_err().to_string();
        assert!(error.starts_with("/etc/instancefs.toml, line 2: ") && error.contains("acess_group"), "{error}");
        let error = toml("settle = 'soon'\n").unwrap_err().to_string();
        assert!(error.contains("line 1") && error.contains("'soon' is no duration"), "{error}");
    }

    #[test]
    fn the_command_line_wins_over_the_file() {
        let layer = Layer { settle: Some(Duration::ZERO), ..Layer::default() }.over(toml("settle = 9").unwrap());
        assert_eq!(layer.settle, Some(Duration::ZERO));
    }

    #[test]
    fn a_missing_default_group_is_roots_and_a_missing_named_one_an_error() {
        let nobody = |_: &str| Ok(None);
        let settings = Layer::default().resolve_with(ROOT, &nobody).unwrap();
        assert_eq!((settings.access_group, settings.admin_group), (0, 0));
        for option in ["access_group=ghosts", "admin_group=ghosts", "projects=ghosts"] {
            let error = Layer::from_options([option]).unwrap().resolve_with(ROOT, &nobody).unwrap_err().to_string();
            assert!(error.contains("'ghosts'"), "{error}");
        }
    }

    #[test]
    fn an_ordinary_user_is_in_no_need_of_groups() {
        let user = Privilege { uid: 1000, gid: 100 };
        let layer = Layer { state_dir: Some("/s".into()), ..Layer::default() };
        let settings = layer.resolve_with(user, &|_| Ok(Some(7))).unwrap();
        assert_eq!((settings.access_group, settings.admin_group), (100, 100));
        assert!(!settings.is_in_home, "what somebody has named is not made with its parents");
    }

    #[test]
    fn the_bin_keeps_for_a_week_unless_somebody_says_otherwise() {
        let kept = |option: &str| {
            let layer = Layer::from_options([option]).unwrap();
            Layer { state_dir: Some("/s".into()), ..layer }.resolve_with(ROOT, &|_| Ok(None)).unwrap().retention
        };
        assert_eq!(kept(""), Some(DEFAULT_RETENTION));
        assert_eq!(kept("retention=1h"), Some(Duration::from_secs(3600)));
        assert_eq!(kept("retention=never"), None);
        assert_eq!(toml("retention = 60").unwrap().retention, Some(Retention::For(Duration::from_secs(60))));
        assert!(Layer::from_options(["retention=always"]).is_err());
    }

    #[test]
    fn disks_of_shelved_instances_stay_unless_somebody_says_otherwise() {
        let offload = |option: &str| {
            let layer = Layer { state_dir: Some("/s".into()), ..Layer::from_options([option]).unwrap() };
            layer.resolve_with(ROOT, &|_| Ok(None)).unwrap().shelved_offload_time
        };
        assert_eq!((offload(""), offload("shelved_offload_time=never")), (None, None));
        assert_eq!(offload("shelved_offload_time=0"), Some(Duration::ZERO));
        assert_eq!(offload("shelved_offload_time=2h"), Some(Duration::from_secs(7200)));
        assert!(Layer::from_options(["shelved_offload_time=-1"]).is_err());
    }

    #[test]
    fn auto_names_no_connection() {
        let layer = Layer { connect: Some("auto".to_owned()), ..Layer::default() };
        assert_eq!(layer.resolve_with(ROOT, &|_| Ok(Some(7))).unwrap().connect, None);
    }
}
