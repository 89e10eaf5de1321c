//! Where configuration and state lie where nobody says otherwise: in the system's places for root, in his own by the XDG
//! base directory specification (0.8) for an ordinary user.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::privilege::Privilege;

/// Root's configuration; it may be absent.
const ROOTS_FILE: &str = "/etc/instancefs.toml";
/// Root's state.
const ROOTS_STATE: &str = "/var/lib/instancefs";

/// The configuration that is read where none is named; it may be absent. `None`: the user has no home.
pub fn configuration(privilege: Privilege) -> Option<PathBuf> {
    if privilege.is_root() {
        return Some(ROOTS_FILE.into());
    }
    users("XDG_CONFIG_HOME", ".config", &environment(privilege)).map(|base| base.join("instancefs.toml"))
}

/// Where the state lives where nobody says otherwise. `None`: the user has no home.
pub fn state(privilege: Privilege) -> Option<PathBuf> {
    if privilege.is_root() {
        return Some(ROOTS_STATE.into());
    }
    users("XDG_STATE_HOME", ".local/state", &environment(privilege)).map(|base| base.join("instancefs"))
}

/// The process's environment, with the home of the user database where it names none.
fn environment(privilege: Privilege) -> impl Fn(&str) -> Option<OsString> {
    move |variable| match (std::env::var_os(variable), variable) {
        (None, "HOME") => privilege.account().map(|user| user.dir.into_os_string()),
        (value, _) => value,
    }
}

/// The directory that the variable names, else the one below his home. What is not absolute does not count.
fn users(variable: &str, below_home: &str, environment: &dyn Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let absolute = |variable| environment(variable).map(PathBuf::from).filter(|path: &PathBuf| path.is_absolute());
    absolute(variable).or_else(|| absolute("HOME").map(|home| home.join(below_home)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state_of(variables: &[(&str, &str)]) -> Option<PathBuf> {
        let environment =
            |wanted: &str| variables.iter().find(|(name, _)| *name == wanted).map(|(_, value)| OsString::from(value));
        users("XDG_STATE_HOME", ".local/state", &environment)
    }

    #[test]
    fn an_ordinary_users_state_lies_where_xdg_says_else_in_his_home() {
        let home = ("HOME", "/home/ann");
        assert_eq!(state_of(&[home]), Some("/home/ann/.local/state".into()));
        assert_eq!(state_of(&[home, ("XDG_STATE_HOME", "/srv/ann")]), Some("/srv/ann".into()));
        for ignored in ["", "relative/path"] {
            assert_eq!(state_of(&[home, ("XDG_STATE_HOME", ignored)]), Some("/home/ann/.local/state".into()));
        }
        assert_eq!(state_of(&[]), None);
    }

    #[test]
    fn roots_state_depends_on_no_variable() {
        assert_eq!(state(Privilege { uid: 0, gid: 0 }), Some(ROOTS_STATE.into()));
    }
}
