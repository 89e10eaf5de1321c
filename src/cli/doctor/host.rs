//! Rights, the kernel and its FUSE, and what confines processes here.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;

use nix::sys::utsname::uname;

use super::{Finding, World, run};

/// The first kernel that knows `FOPEN_NOFLUSH`; without it each close of a file asks the daemon.
const GOOD_KERNEL: (u32, u32) = (5, 16);
const SETUID: u32 = 0o4000;

/// All findings.
pub fn look(world: &World) -> Vec<Finding> {
    let mut findings = vec![rights(world), kernel(), device(world)];
    findings.extend(fusermount(world));
    findings.extend(confinement());
    findings
}

fn rights(world: &World) -> Finding {
    if world.privilege.is_root() {
        Finding::ok("rights", "root: the tree can be mounted for every user, and guests get a user of their own")
    } else {
        let uid = world.privilege.uid;
        Finding::ok(
            "rights",
            format!("uid {uid}, an ordinary user: the tree is this user's alone, and guests run as this user"),
        )
    }
}

fn kernel() -> Finding {
    const WHAT: &str = "kernel";
    let release = uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default();
    match version(&release) {
        Some(found) if found >= GOOD_KERNEL => Finding::ok(WHAT, format!("{release}, with all of FUSE that is used")),
        Some(_) => Finding::warn(
            WHAT,
            format!("{release} has a FUSE that asks the daemon at each close of a file, which is slower"),
            format!("use Linux {}.{} or newer", GOOD_KERNEL.0, GOOD_KERNEL.1),
        ),
        None => Finding::warn(
            WHAT,
            format!("the release '{release}' cannot be understood"),
            format!("make sure that it is Linux {}.{} or newer: uname -r", GOOD_KERNEL.0, GOOD_KERNEL.1),
        ),
    }
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|character: char| !character.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn device(world: &World) -> Finding {
    const WHAT: &str = "/dev/fuse";
    match OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(_) => Finding::ok(WHAT, "can be opened"),
        Err(error)
            if matches!(error.kind(), io::ErrorKind::NotFound) || error.raw_os_error() == Some(libc_enodev()) =>
        {
            Finding::fail(WHAT, format!("is not there: {error}"), "load the kernel module: modprobe fuse")
        }
        Err(error) if world.privilege.is_root() => Finding::fail(
            WHAT,
            format!("cannot be opened: {error}"),
            "root is kept from it: in a container, let the container have the device and CAP_SYS_ADMIN",
        ),
        Err(error) => {
            Finding::fail(WHAT, format!("cannot be opened by this user: {error}"), "as root: chmod 0666 /dev/fuse")
        }
    }
}

fn libc_enodev() -> i32 {
    nix::errno::Errno::ENODEV as i32
}

/// The helper that mounts for ordinary users; root does without.
fn fusermount(world: &World) -> Option<Finding> {
    const WHAT: &str = "fusermount3";
    if world.privilege.is_root() {
        return None;
    }
    let Some(path) = run::find("fusermount3") else {
        return Some(Finding::fail(
            WHAT,
            "is not in PATH, and ordinary users mount by it",
            "as root: apt install fuse3, or your distribution's package with fusermount3",
        ));
    };
    let shown = path.display();
    Some(match fs::metadata(&path) {
        Ok(metadata) if metadata.mode() & SETUID != 0 && metadata.uid() == 0 => {
            Finding::ok(WHAT, format!("{shown} is set-user-ID root"))
        }
        Ok(_) => Finding::fail(
            WHAT,
            format!("{shown} is not set-user-ID root, so it cannot mount"),
            format!("as root: chown root {shown} && chmod u+s {shown}"),
        ),
        Err(error) => Finding::fail(WHAT, format!("{shown} cannot be looked at: {error}"), "look at its directory"),
    })
}

/// Only hints: whether a policy allows something is known when it is tried.
fn confinement() -> Option<Finding> {
    const WHAT: &str = "confinement";
    let is_on = |path, on: &str| fs::read_to_string(path).is_ok_and(|text: String| text.trim() == on);
    if is_on("/sys/fs/selinux/enforce", "1") {
        return Some(Finding::ok(
            WHAT,
            "SELinux enforces; if a guest may not open its disk, see: ausearch -m AVC -ts recent",
        ));
    }
    if is_on("/sys/module/apparmor/parameters/enabled", "Y") {
        return Some(Finding::ok(
            WHAT,
            "AppArmor is on; if a guest of libvirtd may not open its disk, see: journalctl -k -g DENIED",
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_by_their_numbers() {
        assert_eq!(version("6.1.0-13-amd64"), Some((6, 1)));
        assert_eq!(version("5.16-rc1"), Some((5, 16)));
        assert_eq!(version("unknown"), None);
    }
}
