//! What libvirt says of itself, without a connection that is kept.

use serde::{Deserialize, Serialize};
use virt::connect::Connect;

use super::sys;

/// The hidden subcommand of the program that runs [`greet`].
pub const SUBCOMMAND: &str = "greet";

/// What a hypervisor said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// Of the daemon, `1.2.3`.
    pub libvirt: String,
    /// `QEMU` or another word.
    pub kind: String,
    /// Of the hypervisor; empty if it does not say.
    pub version: String,
    /// The host's name.
    pub host: String,
}

/// The version of the library that this program uses.
///
/// # Errors
///
/// libvirt's own words.
pub fn library() -> Result<u32, String> {
    Connect::version().map_err(|error| error.message().to_owned())
}

/// libvirt's numbers as people write them.
pub fn written(version: u32) -> String {
    format!("{}.{}.{}", version / 1_000_000, version / 1000 % 1000, version % 1000)
}

/// Asks a hypervisor; never returns if it hangs, so this is for a child process.
///
/// # Errors
///
/// libvirt's own words.
pub fn greet(uri: &str) -> Result<Greeting, String> {
    let words = |error: virt::error::Error| error.message().to_owned();
    sys::initialise()?;
    let connection = Connect::open(Some(uri)).map_err(words)?;
    Ok(Greeting {
        libvirt: connection.lib_version().map(written).map_err(words)?,
        kind: connection.driver_type().map_err(words)?,
        version: connection.hyp_version().map(written).unwrap_or_default(),
        host: connection.hostname().map_err(words)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_versions() {
        assert_eq!(written(9_000_000), "9.0.0");
        assert_eq!(written(7_002_022), "7.2.22");
    }

    #[test]
    fn the_test_driver_says_who_it_is() {
        assert_eq!(greet("test:///default").unwrap().kind, "TEST");
        assert!(greet("nonsense:///").is_err());
    }
}
