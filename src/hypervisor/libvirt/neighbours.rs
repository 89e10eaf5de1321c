//! The kernel's neighbour table (IPv4): the addresses of the guests on this host's bridges, where libvirt cannot say.
//!
//! libvirt 9.0 fails to read the table of newer kernels (`wrong nlmsg len`).

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use crate::hypervisor::definition::Card;

const TABLE: &str = "/proc/net/arp";

/// `ATF_COM`: the kernel has had an answer.
const COMPLETE: u32 = 0x2;

/// The addresses that the host has seen at these cards. Guests on two networks of a host may have the same hardware
/// address: a card is only where its bridge is.
pub(super) fn of(cards: &[Card]) -> Vec<IpAddr> {
    if cards.is_empty() {
        return Vec::new();
    }
    match std::fs::read_to_string(TABLE) {
        Ok(table) => parse(&table, cards, is_above),
        Err(error) => {
            log::debug!("{TABLE} cannot be read: {error}");
            Vec::new()
        }
    }
}

/// Whether one network device of this host lies on another one, as that of a VLAN does on its bridge.
fn is_above(device: &str, lower: &str) -> bool {
    Path::new("/sys/class/net").join(device).join(format!("lower_{lower}")).exists()
}

/// Columns: IP address, HW type, Flags, HW address, Mask, Device; the first line names them.
fn parse(table: &str, cards: &[Card], is_above: impl Fn(&str, &str) -> bool) -> Vec<IpAddr> {
    let entry = |line: &str| {
        let mut columns = line.split_ascii_whitespace();
        let address: Ipv4Addr = columns.next()?.parse().ok()?;
        let flags = u32::from_str_radix(columns.nth(1)?.trim_start_matches("0x"), 16).ok()?;
        let at = columns.next()?.to_ascii_lowercase();
        let device = columns.nth(1)?;
        let is_here = |bridge: &String| bridge == device || is_above(device, bridge);
        let is_of = |card: &Card| card.mac_address == at && card.bridge.as_ref().is_none_or(is_here);
        (flags & COMPLETE != 0 && cards.iter().any(is_of)).then_some(IpAddr::V4(address))
    };
    table.lines().skip(1).filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_answers_from_the_guests_cards_on_their_own_bridges_count() {
        let table = "IP address       HW type     Flags       HW address            Mask     Device\n\
            10.0.0.2  0x1  0x2  52:54:00:AA:00:01  *  br0\n\
            10.0.0.3  0x1  0x0  52:54:00:aa:00:01  *  br0\n\
            10.0.0.4  0x1  0x2  52:54:00:aa:00:02  *  br0\n\
            10.0.7.5  0x1  0x2  52:54:00:aa:00:01  *  br0.7\n\
            10.1.0.6  0x1  0x2  52:54:00:aa:00:01  *  br1\n\
            nonsense\n";
        let found = |bridge: Option<&str>| {
            let card = Card { mac_address: "52:54:00:aa:00:01".to_owned(), bridge: bridge.map(str::to_owned) };
            parse(table, &[card], |device, lower| (device, lower) == ("br0.7", "br0"))
        };
        let [own, vlan, other] = [[10, 0, 0, 2], [10, 0, 7, 5], [10, 1, 0, 6]].map(IpAddr::from);
        assert_eq!(found(Some("br0")), [own, vlan]);
        assert_eq!(found(Some("br1")), [other]);
        assert_eq!(found(None), [own, vlan, other]);
    }
}
