//! The device names of volumes in guests: libvirt's targets on the virtio bus, `vda` to `vdz`. What a guest calls them
//! itself may differ; it knows a volume by its serial number.

use crate::model::reason::Reason;

/// The disk that a guest boots from.
pub const ROOT: &str = "vda";

/// The seed of a new guest.
const SEED: char = 'z';

/// Those that a volume can have beside [`ROOT`], in their order.
pub fn names() -> impl Iterator<Item = String> {
    ('b'..SEED).map(|letter| format!("vd{letter}"))
}

/// Whether a volume can have this name.
///
/// # Errors
///
/// [`Reason::Malformed`] if not.
pub fn check(device: &str) -> Result<(), Reason> {
    if device == ROOT || names().any(|name| name == device) {
        Ok(())
    } else {
        Err(Reason::Malformed(format!("{device:?} is no device of a volume; write one of vdb to vdy, or none")))
    }
}

/// The name for a volume: the wanted one, or the first that nobody has.
///
/// # Errors
///
/// [`Reason::InUse`] if it, or if all are taken.
pub fn choose(wanted: Option<&str>, is_taken: impl Fn(&str) -> bool) -> Result<String, Reason> {
    match wanted {
        Some(device) if is_taken(device) => {
            Err(Reason::InUse(format!("that instance has a disk {device} already; name another device, or none")))
        }
        Some(device) => Ok(device.to_owned()),
        None => names().find(|name| !is_taken(name)).ok_or_else(|| {
            Reason::InUse("that instance has as many disks as it can have; detach one first".to_owned())
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_free_name_is_taken_and_never_that_of_the_root_disk_or_the_seed() {
        assert_eq!(choose(None, |name| name == "vdb").as_deref(), Ok("vdc"));
        assert_eq!(
            choose(None, |name| name != "vda" && name != "vdz").map_err(|reason| reason.errno()),
            Err(libc::EBUSY)
        );
        assert_eq!(choose(Some("vdd"), |name| name == "vdd").map_err(|reason| reason.errno()), Err(libc::EBUSY));
        assert_eq!(names().last().as_deref(), Some("vdy"));
    }

    #[test]
    fn only_virtio_targets_of_one_letter_are_names() {
        assert!(["vda", "vdb", "vdy"].into_iter().all(|name| check(name).is_ok()));
        assert!(["vdz", "vdaa", "sda", "", "vd", "vdB", "/dev/vdb"].into_iter().all(|name| check(name).is_err()));
    }
}
