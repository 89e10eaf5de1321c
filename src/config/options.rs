//! Mount options, `-o`.

use std::path::Path;

use super::{ConfigError, Layer, Retention, parse_duration};

/// Options of mount(8) and of fstab that mean nothing here, or that hold anyway.
const GENERIC: [&str; 29] = [
    "async",
    "atime",
    "auto",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "group",
    "lazytime",
    "noatime",
    "noauto",
    "nodev",
    "nodiratime",
    "noexec",
    "nofail",
    "nolazytime",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nouser",
    "owner",
    "relatime",
    "strictatime",
    "suid",
    "sync",
    "user",
    "users",
    "_netdev",
];
const GENERIC_PREFIXES: [&str; 4] = ["x-", "X-", "comment=", "user="];

impl Layer {
    /// Reads the values of all `-o`; of an option said twice the last one counts.
    pub fn from_options<'a>(options: impl IntoIterator<Item = &'a str>) -> Result<Layer, ConfigError> {
        let mut layer = Layer::default();
        for option in options.into_iter().flat_map(|list| list.split(',')) {
            layer.set(option)?;
        }
        Ok(layer)
    }

    fn set(&mut self, option: &str) -> Result<(), ConfigError> {
        let bad = |detail: &str| ConfigError::BadOption {
            option: option.split('=').next().unwrap_or(option).to_owned(),
            detail: detail.to_owned(),
        };
        match option.split_once('=') {
            None if option.is_empty() => {}
            None if option == "ro" => self.read_only = Some(true),
            None if option == "rw" => self.read_only = Some(false),
            Some((
                "access_group"
                | "admin_group"
                | "projects"
                | "settle"
                | "retention"
                | "shelved_offload_time"
                | "connect"
                | "state_dir"
                | "import_directory",
                "",
            )) => {
                return Err(bad("a value is missing"));
            }
            Some(("access_group", name)) => self.access_group = Some(name.to_owned()),
            Some(("admin_group", name)) => self.admin_group = Some(name.to_owned()),
            Some(("projects", names)) => self.projects = Some(names.split(':').map(str::to_owned).collect()),
            Some(("settle", text)) => self.settle = Some(parse_duration(text).map_err(|detail| bad(&detail))?),
            Some(("retention", text)) => self.retention = Some(Retention::parse(text).map_err(|detail| bad(&detail))?),
            Some(("shelved_offload_time", text)) => {
                self.shelved_offload_time = Some(Retention::parse(text).map_err(|detail| bad(&detail))?);
            }
            Some(("connect", uri)) => self.connect = Some(uri.to_owned()),
            Some(("state_dir", path)) => self.state_dir = Some(path.into()),
            Some(("import_directory", path)) if Path::new(path).is_absolute() => {
                self.import_directory = Some(path.into());
            }
            Some(("import_directory", _)) => return Err(bad("write an absolute path")),
            Some(_) | None if GENERIC.contains(&option) => {}
            Some(_) | None if GENERIC_PREFIXES.iter().any(|prefix| option.starts_with(prefix)) => {}
            Some(_) | None => return Err(ConfigError::UnknownOption(option.to_owned())),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_option_is_refused_with_its_name() {
        for option in ["rro", "settle", "ro=1", "access_groups=x", "loop"] {
            let error = Layer::from_options([option]).unwrap_err().to_string();
            assert!(error.contains(&format!("'{option}'")), "{error}");
        }
        let error = Layer::from_options(["settle=soon"]).unwrap_err().to_string();
        assert!(error.contains("settle") && error.contains("'soon'"), "{error}");
        assert!(Layer::from_options(["access_group="]).is_err());
    }

    #[test]
    fn the_options_of_fstab_are_accepted() {
        let layer = Layer::from_options([
            "rw,noauto,_netdev,defaults,nofail,noatime,x-systemd.automount,X-mount.mkdir,user=me,comment=x",
        ]);
        assert_eq!(layer.unwrap(), Layer { read_only: Some(false), ..Layer::default() });
        assert_eq!(Layer::from_options(["rw,ro"]).unwrap().read_only, Some(true));
    }
}
