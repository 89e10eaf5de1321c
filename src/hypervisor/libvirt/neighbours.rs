//! The kernel's neighbour table (IPv4): the addresses of the guests on this host's bridges, where libvirt cannot say.
//!
//! libvirt 9.0 fails to read the table of newer kernels (`wrong nlmsg len`).

use std::net::{IpAddr, Ipv4Addr};

const TABLE: &str = "/proc/net/arp";

/// `ATF_COM`: the kernel has had an answer.
const COMPLETE: u32 = 0x2;

/// The addresses that the host has seen at these hardware addresses, which are in lower case.
pub(super) fn of(hardware: &[String]) -> Vec<IpAddr> {
    if hardware.is_empty() {
        return Vec::new();
    }
    match std::fs::read_to_string(TABLE) {
        Ok(table) => parse(&table, hardware),
        Err(error) => {
            log::debug!("{TABLE} cannot be read: {error}");
            Vec::new()
        }
    }
}

/// Columns: IP address, HW type, Flags, HW address, Mask, Device; the first line names them.
fn parse(table: &str, hardware: &[String]) -> Vec<IpAddr> {
    let entry = |line: &str| {
        let mut columns = line.split_ascii_whitespace();
        let address: Ipv4Addr = columns.next()?.parse().ok()?;
        let flags = u32::from_str_radix(columns.nth(1)?.trim_start_matches("0x"), 16).ok()?;
        let at = columns.next()?.to_ascii_lowercase();
        (flags & COMPLETE != 0 && hardware.contains(&at)).then_some(IpAddr::V4(address))
    };
    table.lines().skip(1).filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_answers_from_the_guests_cards_count() {
        let table = "IP address       HW type     Flags       HW address            Mask     Device\n\
            10.0.0.2  0x1  0x2  52:54:00:AA:00:01  *  br0\n\
            10.0.0.3  0x1  0x0  52:54:00:aa:00:01  *  br0\n\
            10.0.0.4  0x1  0x2  52:54:00:aa:00:02  *  br0\n\
            nonsense\n";
        assert_eq!(parse(table, &["52:54:00:aa:00:01".to_owned()]), [IpAddr::from([10, 0, 0, 2])]);
    }
}
