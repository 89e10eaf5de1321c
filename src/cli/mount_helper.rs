//! Called as `mount.instancefs SPEC DIR [-sfnv] [-o OPTIONS]` by mount(8), so that fstab works.
//!
//! SPEC is the connection, or `none`, `auto` or `instancefs` for the one that the configuration or the state directory
//! names.

use std::ffi::{OsStr, OsString};
use std::path::Path;

/// mount(8) called us in a way that we do not know.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// A flag outside of the helpers' interface.
    #[error("mount(8) passed the flag {0}, which is not supported")]
    Flag(String),
    /// Too few or too many operands.
    #[error("called as mount.instancefs, a source and a directory are needed")]
    Operands,
}

/// Whether this process was started under the helper's name.
pub fn is_called(arguments: &[OsString]) -> bool {
    let name = arguments.first().and_then(|name| Path::new(name).file_name());
    name.is_some_and(|name| name == "mount.instancefs")
}

/// The same as arguments of ours; `None` if nothing is to be done (`-f`, fake).
pub fn translate(arguments: &[OsString]) -> Result<Option<Vec<OsString>>, HelperError> {
    let mut translated: Vec<OsString> = ["instancefs", "mount", "--background"].map(Into::into).to_vec();
    let mut operands = Vec::new();
    let mut fake = false;
    let mut rest = arguments.iter().skip(1);
    while let Some(argument) = rest.next() {
        match argument.to_str() {
            Some("-o" | "-t") => {
                let value = rest.next().ok_or_else(|| HelperError::Flag(argument.to_string_lossy().into_owned()))?;
                if argument == "-o" {
                    translated.extend(["-o".into(), value.clone()]);
                }
            }
            Some(flags) if flags.starts_with('-') => {
                for flag in flags.chars().skip(1) {
                    match flag {
                        's' | 'n' | 'v' | 'w' => {}
                        'f' => fake = true,
                        'r' => translated.extend(["-o", "ro"].map(OsString::from)),
                        other => return Err(HelperError::Flag(format!("-{other}"))),
                    }
                }
            }
            Some(_) | None => operands.push(argument.as_os_str()),
        }
    }
    let [source, directory] = operands[..] else { return Err(HelperError::Operands) };
    if fake {
        return Ok(None);
    }
    if ![OsStr::new("none"), OsStr::new("auto"), OsStr::new("instancefs")].contains(&source) {
        translated.extend(["--connect".into(), source.to_owned()]);
    }
    translated.extend(["--".into(), directory.to_owned()]);
    Ok(Some(translated))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translated(line: &str) -> Option<String> {
        let arguments: Vec<OsString> = line.split(' ').map(Into::into).collect();
        assert!(is_called(&arguments));
        let translated = translate(&arguments).unwrap()?;
        Some(translated.join(OsStr::new(" ")).into_string().unwrap())
    }

    #[test]
    fn mount_of_an_fstab_line_becomes_a_background_mount() {
        assert_eq!(
            translated("/sbin/mount.instancefs qemu:///system /run/i -o rw,_netdev -n").as_deref(),
            Some("instancefs mount --background -o rw,_netdev --connect qemu:///system -- /run/i")
        );
        assert_eq!(
            translated("mount.instancefs none /run/i -r").as_deref(),
            Some("instancefs mount --background -o ro -- /run/i")
        );
    }

    #[test]
    fn a_fake_mount_does_nothing() {
        assert_eq!(translated("mount.instancefs none /run/i -f"), None);
    }

    #[test]
    fn unknown_flags_are_refused() {
        assert!(translate(&["mount.instancefs", "none", "/x", "-N"].map(Into::into)).is_err());
        assert!(translate(&["mount.instancefs", "none"].map(Into::into)).is_err());
    }
}
