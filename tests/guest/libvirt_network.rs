//! A network of a libvirtd of our own, with the addresses that its DHCP server gives; gone with the value.

use std::fs;
use std::process::{Command, Output};

use uuid::Uuid;

use crate::host::Daemon as Host;
use crate::support::skipped;

pub struct LibvirtNetwork {
    pub name: String,
    /// The first three numbers of its addresses, with their dots.
    pub prefix: String,
    host: Host,
}

impl LibvirtNetwork {
    /// `None`, and said so, on a machine that cannot have one.
    pub fn new(test: &str) -> Option<LibvirtNetwork> {
        let bytes = Uuid::new_v4().into_bytes();
        // The name of its bridge as well, which has at most 15 bytes; a range that nobody else is likely to use.
        let name = format!("ifs{:02x}{:02x}{:02x}{:02x}", bytes[0], bytes[1], bytes[2], bytes[3]);
        let prefix = format!("10.{}.{}.", 128 + bytes[4] % 120, bytes[5]);
        let network = LibvirtNetwork { name, prefix, host: Host::start() };
        let LibvirtNetwork { name, prefix, host } = &network;
        let definition = host.directory().join("network.xml");
        let xml = format!(
            "<network><name>{name}</name><bridge name='{name}'/><ip address='{prefix}1' netmask='255.255.255.0'>\
             <dhcp><range start='{prefix}10' end='{prefix}200'/></dhcp></ip></network>"
        );
        fs::write(&definition, xml).expect("a definition");
        let defined = network.virsh(&["net-define", &definition.display().to_string()]);
        assert!(defined.status.success(), "{}", String::from_utf8_lossy(&defined.stderr));
        let started = network.start();
        if !started.status.success() {
            let words = String::from_utf8_lossy(&started.stderr).trim().to_owned();
            skipped(test, &format!("no network of libvirt can be started here ({words})"));
            return None;
        }
        Some(network)
    }

    /// As [`Daemon::start_with`](crate::support::Daemon::start_with) takes it.
    pub fn socket(&self) -> String {
        self.host.directory().join("run/libvirt-sock").display().to_string()
    }

    pub fn start(&self) -> Output {
        self.virsh(&["net-start", &self.name])
    }

    pub fn stop(&self) -> Output {
        self.virsh(&["net-destroy", &self.name])
    }

    fn virsh(&self, arguments: &[&str]) -> Output {
        let uri = format!("qemu:///system?socket={}", self.socket());
        Command::new("virsh").args(["--quiet", "--connect", &uri]).args(arguments).output().expect("virsh runs")
    }
}

impl Drop for LibvirtNetwork {
    /// What libvirtd has started goes on without it: the guests, the DHCP server, the bridge.
    fn drop(&mut self) {
        let guests = self.virsh(&["list", "--uuid"]).stdout;
        for id in String::from_utf8_lossy(&guests).split_ascii_whitespace() {
            self.virsh(&["destroy", id]);
        }
        self.stop();
    }
}
