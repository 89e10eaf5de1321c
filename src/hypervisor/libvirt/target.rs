//! Which hypervisor to connect to: the command line's `--connect`, and the URI that a state directory has recorded.

use std::path::{Component, Path, PathBuf};

use super::embed;
use crate::privilege::Privilege;

/// The sockets whose existence says that a libvirt daemon is meant to run on this host.
const SYSTEM_SOCKETS: [&str; 2] = ["/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock"];

const SYSTEM_URI: &str = "qemu:///system";
const EMBED_URI: &str = "qemu:///embed";
/// Its directory in the state directory.
const EMBED_DIRECTORY: &str = "libvirt";

/// A connection URI, and what has to be prepared for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    uri: String,
    embed_root: Option<PathBuf>,
}

impl Target {
    /// Reads `--connect`.
    ///
    /// `auto` is `qemu:///system` for root where the socket of a libvirt daemon exists, whether it answers or not, and
    /// else `embed`: what an ordinary user makes is his own, also where he may use the system's daemon; `embed` is libvirt's QEMU driver inside our process with its files in `STATE/libvirt`; an absolute
    /// path or `unix:PATH` is the socket of a daemon; anything else is a libvirt URI and is used as it is.
    ///
    /// # Errors
    ///
    /// A sentence that says what may be written.
    pub fn parse(text: &str, state_dir: &Path) -> Result<Target, String> {
        let is_root = Privilege::of_this_process().is_root();
        Self::parse_with(text, state_dir, |socket| is_root && Path::new(socket).symlink_metadata().is_ok())
    }

    fn parse_with(text: &str, state_dir: &Path, offers: impl Fn(&str) -> bool) -> Result<Target, String> {
        match text {
            "auto" => {
                if SYSTEM_SOCKETS.iter().any(|socket| offers(socket)) {
                    Ok(Self::plain(SYSTEM_URI))
                } else {
                    Self::embedded_in(state_dir)
                }
            }
            "embed" | EMBED_URI => Self::embedded_in(state_dir),
            _ => {
                if let Some(path) = text.strip_prefix("unix:").or_else(|| text.starts_with('/').then_some(text)) {
                    return Self::socket(path);
                }
                match text.split_once(':') {
                    Some((scheme, rest)) if is_scheme(scheme) && rest.starts_with("//") => Self::from_recorded(text),
                    _ => Err(format!(
                        "'{text}' is no connection: write auto, embed, the absolute path of a libvirt socket, or a \
                         libvirt URI such as qemu:///system"
                    )),
                }
            }
        }
    }

    /// The target that an earlier mount recorded (see [`crate::hypervisor::Identity::uri`]).
    ///
    /// # Errors
    ///
    /// A sentence, if it is an embedded driver without an absolute root.
    pub fn from_recorded(uri: &str) -> Result<Target, String> {
        let Some(query) = uri.strip_prefix(EMBED_URI).and_then(|rest| rest.strip_prefix('?')) else {
            if uri == EMBED_URI {
                return Err(format!("{EMBED_URI} needs its root: {EMBED_URI}?root=/absolute/path"));
            }
            return Ok(Self::plain(uri));
        };
        let root = query
            .split(['&', ';'])
            .find_map(|pair| pair.strip_prefix("root="))
            .ok_or_else(|| format!("'{uri}' has no root=/absolute/path"))?;
        let root = PathBuf::from(percent_decode(root).ok_or_else(|| format!("the root in '{uri}' is not UTF-8"))?);
        Ok(Target { uri: uri.to_owned(), embed_root: Some(checked_root(&root)?) })
    }

    /// The URI that libvirt is given; record this one.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The directory of the embedded driver, if it is one.
    pub fn embed_root(&self) -> Option<&Path> {
        self.embed_root.as_deref()
    }

    /// The driver runs inside our process: the connection cannot break.
    pub(super) fn is_in_process(&self) -> bool {
        self.embed_root.is_some() || self.uri.starts_with("test:///")
    }

    /// Guests of this target are QEMU processes on this very host.
    pub(super) fn is_local_qemu(&self) -> bool {
        ["qemu:///", "qemu+unix:///"].iter().any(|prefix| self.uri.starts_with(prefix))
    }

    fn plain(uri: &str) -> Target {
        Target { uri: uri.to_owned(), embed_root: None }
    }

    /// In the state directory, unless libvirt's sockets would not fit below.
    fn embedded_in(state_dir: &Path) -> Result<Target, String> {
        let root = state_dir.join(EMBED_DIRECTORY);
        let excess = embed::excess_length(&root);
        if excess > 0 {
            return Err(format!(
                "the state directory {} has a path that is {excess} bytes too long for the sockets that libvirt makes \
                 in it; name a shorter one with --state-dir",
                state_dir.display()
            ));
        }
        Self::embedded(&root)
    }

    pub(super) fn embedded(root: &Path) -> Result<Target, String> {
        let root = checked_root(root)?;
        let text = root.to_str().ok_or_else(|| format!("{} is not UTF-8, which libvirt needs", root.display()))?;
        Ok(Target { uri: format!("{EMBED_URI}?root={}", percent_encode(text)), embed_root: Some(root) })
    }

    fn socket(path: &str) -> Result<Target, String> {
        if !Path::new(path).is_absolute() {
            return Err(format!("the socket '{path}' is not an absolute path"));
        }
        Ok(Self::plain(&format!("{SYSTEM_URI}?socket={}", percent_encode(path))))
    }
}

/// libvirt demands an absolute root, and builds paths from it as text.
fn checked_root(root: &Path) -> Result<PathBuf, String> {
    let clean = root.components().all(|part| !matches!(part, Component::ParentDir | Component::CurDir));
    if root.is_absolute() && clean {
        Ok(root.to_path_buf())
    } else {
        Err(format!("the embedded driver's directory {} is not an absolute path", root.display()))
    }
}

fn is_scheme(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_lowercase())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
}

fn percent_encode(text: &str) -> String {
    use std::fmt::Write;
    text.bytes().fold(String::new(), |mut encoded, byte| {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
        encoded
    })
}

fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let escaped = (first == b'%')
            .then(|| std::str::from_utf8(tail.get(..2)?).ok())
            .flatten()
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match escaped {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Target, String> {
        Target::parse_with(text, Path::new("/var/lib/instancefs"), |_| false)
    }

    #[test]
    fn auto_is_the_system_daemon_where_its_socket_exists() {
        let target =
            Target::parse_with("auto", Path::new("/s"), |socket| socket == "/run/libvirt/libvirt-sock").unwrap();
        assert_eq!(target.uri(), "qemu:///system");
        assert_eq!(target.embed_root(), None);
    }

    #[test]
    fn auto_without_a_daemon_is_the_embedded_driver() {
        let target = parse("auto").unwrap();
        assert_eq!(target, parse("embed").unwrap());
        assert_eq!(target.uri(), "qemu:///embed?root=/var/lib/instancefs/libvirt");
        assert_eq!(target.embed_root(), Some(Path::new("/var/lib/instancefs/libvirt")));
    }

    #[test]
    fn a_socket_is_named_by_its_path() {
        let uri = "qemu:///system?socket=/run/a%20b/libvirt-sock";
        assert_eq!(parse("/run/a b/libvirt-sock").unwrap().uri(), uri);
        assert_eq!(parse("unix:/run/a b/libvirt-sock").unwrap().uri(), uri);
        assert!(parse("unix:run/sock").is_err());
    }

    #[test]
    fn any_other_uri_stays_as_it_is() {
        for uri in ["test:///default", "qemu:///system", "qemu+ssh://root@host/system"] {
            assert_eq!(parse(uri).unwrap().uri(), uri);
        }
    }

    #[test]
    fn words_that_are_no_connection_are_refused() {
        for text in ["", "atuo", "qemu", "localhost:80", "./sock", "://"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_recorded_embedded_driver_is_the_same_target_again() {
        let target = Target::parse_with("embed", Path::new("/srv/vm hosts & co/ä"), |_| false).unwrap();
        assert_eq!(Target::from_recorded(target.uri()).unwrap(), target);
        assert!(Target::from_recorded("qemu:///embed").is_err());
        assert!(Target::from_recorded("qemu:///embed?root=relative").is_err());
    }

    #[test]
    fn a_state_directory_too_long_for_sockets_is_refused_with_the_remedy() {
        let long = format!("/home/{}", "a".repeat(60));
        let error = parse("auto").and_then(|_| Target::parse_with("auto", Path::new(&long), |_| false)).unwrap_err();
        assert!(error.contains("24 bytes too long") && error.contains("--state-dir"), "{error}");
        assert!(Target::parse_with("auto", Path::new("/home/ann/.local/state/instancefs"), |_| false).is_ok());
    }

    #[test]
    fn a_relative_state_directory_cannot_hold_the_embedded_driver() {
        assert!(Target::parse_with("embed", Path::new("state"), |_| false).is_err());
    }
}
