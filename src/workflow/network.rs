//! Whether a guest can have the network that it is to have: asked when it is written and before each start.

use std::path::Path;

use crate::hypervisor::Networks;
use crate::model::network::Network;
use crate::model::reason::Reason;

/// Where the kernel shows its interfaces; a bridge has a directory of this name in its own.
const INTERFACES: &str = "/sys/class/net";
const BRIDGE: &str = "bridge";

/// The hypervisor has a driver for it.
pub(super) fn supported(network: &Network, networks: &Networks) -> Result<(), Reason> {
    match network {
        Network::Libvirt(_) if !networks.has_libvirt_networks => Err(Reason::Unsupported(
            "libvirt's networks need a libvirt daemon, and this is its driver inside instancefs; write bridge:NAME for a \
             bridge of this host, or user"
                .to_owned(),
        )),
        Network::None | Network::User | Network::Bridge(_) | Network::Libvirt(_) => Ok(()),
    }
}

/// What it names is there, as far as that can be seen without asking anybody.
pub(super) fn exists(network: Option<&Network>, networks: &Networks) -> Result<(), Reason> {
    match network {
        Some(Network::Bridge(name)) if networks.is_local => bridge_exists(Path::new(INTERFACES), name),
        Some(Network::None | Network::User | Network::Bridge(_) | Network::Libvirt(_)) | None => Ok(()),
    }
}

fn bridge_exists(interfaces: &Path, name: &str) -> Result<(), Reason> {
    let interface = interfaces.join(name);
    let words = if !interfaces.is_dir() || interface.join(BRIDGE).is_dir() {
        return Ok(());
    } else if interface.exists() {
        format!("the interface {name} is no bridge; write the bridge that it is a port of to network")
    } else {
        format!(
            "there is no bridge {name} on this host; make it (ip link add {name} type bridge), or write another \
                 network in a draft"
        )
    };
    Err(Reason::Malformed(words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bridge_is_a_bridge() {
        let interfaces = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(interfaces.path().join("br0/bridge")).unwrap();
        std::fs::create_dir(interfaces.path().join("eth0")).unwrap();
        assert_eq!(bridge_exists(interfaces.path(), "br0"), Ok(()));
        for (name, words) in [("eth0", "is no bridge"), ("br1", "no bridge br1 on this host")] {
            let refusal = bridge_exists(interfaces.path(), name).unwrap_err();
            assert!(refusal.to_string().contains(words), "{refusal}");
            assert_eq!(refusal.errno(), libc::EINVAL);
        }
        assert_eq!(bridge_exists(&interfaces.path().join("none"), "br1"), Ok(()));
    }

    #[test]
    fn a_network_of_libvirt_needs_its_driver() {
        let embedded = Networks { default: Network::User, has_libvirt_networks: false, is_local: true };
        let refusal = supported(&Network::Libvirt("default".to_owned()), &embedded).unwrap_err();
        assert_eq!(refusal.errno(), libc::EOPNOTSUPP);
        assert_eq!(supported(&Network::Bridge("br0".to_owned()), &embedded), Ok(()));
    }
}
