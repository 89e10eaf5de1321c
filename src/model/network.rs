//! What a guest's network card is connected to, as `network` says it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// `IFNAMSIZ` without its null byte.
const INTERFACE_NAME_MAX: usize = 15;
/// The longest name of a libvirt network that is taken, in bytes.
const NETWORK_NAME_MAX: usize = 218;

/// The content of `network`, which [`fmt::Display`] writes and [`FromStr`] reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Network {
    /// `none`: no network card.
    None,
    /// `user`: QEMU itself translates the guest's connections; nobody can connect to the guest.
    User,
    /// `bridge:<name>`: a port of this bridge of the host.
    Bridge(String),
    /// `network:<name>`: libvirt's network of this name.
    Libvirt(String),
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Network::None => f.write_str("none"),
            Network::User => f.write_str("user"),
            Network::Bridge(name) => write!(f, "bridge:{name}"),
            Network::Libvirt(name) => write!(f, "network:{name}"),
        }
    }
}

impl From<Network> for String {
    fn from(network: Network) -> String {
        network.to_string()
    }
}

impl TryFrom<String> for Network {
    type Error = String;

    fn try_from(text: String) -> Result<Network, String> {
        text.parse()
    }
}

impl FromStr for Network {
    type Err = String;

    /// Errors are sentences.
    fn from_str(text: &str) -> Result<Network, String> {
        match text.split_once(':') {
            None if text == "none" => Ok(Network::None),
            None if text == "user" => Ok(Network::User),
            Some(("bridge", name)) => interface_name(name).map(Network::Bridge),
            Some(("network", name)) => network_name(name).map(Network::Libvirt),
            Some(_) | None => Err(format!("{text:?} is no network; write none, user, bridge:NAME or network:NAME")),
        }
    }
}

/// What the kernel takes for the name of an interface (`dev_valid_name`).
fn interface_name(name: &str) -> Result<String, String> {
    let refused = |byte: u8| matches!(byte, b'/' | b':') || byte.is_ascii_whitespace() || byte.is_ascii_control();
    if name.is_empty() || name.len() > INTERFACE_NAME_MAX || matches!(name, "." | "..") || name.bytes().any(refused) {
        return Err(format!(
            "{name:?} is no name of a bridge: it has 1 to {INTERFACE_NAME_MAX} bytes and neither /, : nor spaces"
        ));
    }
    Ok(name.to_owned())
}

fn network_name(name: &str) -> Result<String, String> {
    let refused = |character: char| character == '/' || character.is_control();
    if name.is_empty() || name.len() > NETWORK_NAME_MAX || name.trim() != name || name.chars().any(refused) {
        return Err(format!(
            "{name:?} is no name of a libvirt network; virsh net-list --all shows those that there are"
        ));
    }
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_kind_reads_back_as_it_was_written() {
        for text in ["none", "user", "bridge:br0", "bridge:fifteen-bytes-x", "network:default", "network:a b:c"] {
            assert_eq!(text.parse::<Network>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_no_interface_can_be_named_is_refused() {
        let long = format!("bridge:{}", "b".repeat(16));
        for text in [
            "",
            "None",
            "bridge",
            "bridge:",
            "bridge:a/b",
            "bridge:a b",
            "bridge:a:b",
            "bridge:..",
            &long,
            "network:",
            "network:a/b",
            "network: a",
            "tap:t0",
            "user:",
            "user ",
        ] {
            assert!(text.parse::<Network>().is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_taken_reads_back_as_the_same(text in "(bridge|network|user|none)?:?\\PC{0,20}") {
            if let Ok(network) = text.parse::<Network>() {
                prop_assert_eq!(network.to_string(), text);
            }
        }
    }
}
