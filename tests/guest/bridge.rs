//! A bridge of a test's own, with addresses from a DHCP server of its own; gone with the value.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use uuid::Uuid;

use crate::support::skipped;

pub struct Bridge {
    pub name: String,
    /// The first three numbers of its addresses, with their dots.
    pub prefix: String,
    dhcp: Option<Child>,
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(arguments).output().expect("ip runs (scripts/setup)");
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()) }
}

impl Bridge {
    /// `None`, and said so, on a machine that cannot have one.
    pub fn new(test: &str, directory: &Path) -> Option<Bridge> {
        if !Path::new("/dev/net/tun").exists() {
            skipped(test, "there is no /dev/net/tun");
            return None;
        }
        let bytes = Uuid::new_v4().into_bytes();
        // At most 15 bytes; a range that nobody else is likely to use.
        let name = format!("ifs{:02x}{:02x}{:02x}{:02x}", bytes[0], bytes[1], bytes[2], bytes[3]);
        let prefix = format!("10.{}.{}.", 128 + bytes[4] % 120, bytes[5]);
        if let Err(words) = ip(&["link", "add", &name, "type", "bridge"]) {
            skipped(test, &format!("no bridge can be made here ({words})"));
            return None;
        }
        let mut bridge = Bridge { name, prefix, dhcp: None };
        let Bridge { name, prefix, .. } = &bridge;
        ip(&["address", "add", &format!("{prefix}1/24"), "dev", name]).expect("an address");
        ip(&["link", "set", name, "up"]).expect("up");
        let dhcp = Command::new("dnsmasq")
            .args(["--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--port=0", "--user=root"])
            .args(["--bind-interfaces", "--except-interface=lo", "--dhcp-authoritative", "--no-ping"])
            .arg(format!("--interface={name}"))
            .arg(format!("--dhcp-range={prefix}10,{prefix}200,1h"))
            .arg(format!("--dhcp-leasefile={}", directory.join("leases").display()))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("dnsmasq runs (scripts/setup)");
        bridge.dhcp = Some(dhcp);
        Some(bridge)
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        if let Some(dhcp) = &mut self.dhcp {
            let _ended_by_itself = dhcp.kill();
            let _reaped = dhcp.wait();
        }
        if let Err(words) = ip(&["link", "delete", &self.name]) {
            eprintln!("the bridge {} is left behind: {words}", self.name);
        }
    }
}
