//! Has libvirt learn what QEMU can do, where guests may not open `/dev/kvm`.
//!
//! libvirt 9 probes QEMU with more rights than it gives to guests: the probe opens the device, libvirt's own check says
//! that guests may not, and so each call finds the last probe out of date and probes again, for seconds. A probe that
//! sees no KVM either agrees with the check and stays valid. So a child process of ours, in a mount namespace in which
//! the device is an empty file, opens an embedded driver beside the real one: it has the same cache of capabilities and
//! no domains, hence nothing to start automatically.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use virt::connect::Connect;

use super::accelerator::DEVICE;
use super::{Target, embed, sys};

/// The hidden subcommand of the program that runs [`main`].
pub const SUBCOMMAND: &str = "capabilities";
/// How long the child may take: some seconds for each QEMU binary after an upgrade, else far below one.
const LIMIT: Duration = Duration::from_secs(60);
const PACE: Duration = Duration::from_millis(10);

/// Fills the cache of the embedded driver in `root`, if that is needed here; says in the log if guests cannot have KVM.
/// Without success libvirt still works, slowly. `program` is one whose subcommand [`SUBCOMMAND`] is [`main`].
pub fn learn(program: &Path, root: &Path) {
    let user = match embed::prepare(root) {
        Ok(Some(user)) => user,
        // An edited configuration may say another user, and who is not root probes as himself.
        Ok(None) => return,
        // Connecting will say the same.
        Err(reason) => return log::debug!("{reason}"),
    };
    if !embed::is_kvm_closed(&user) {
        return;
    }
    log::warn!(
        "guests run as {}, who may not open {DEVICE}: they are emulated; where udev does not do it, run chgrp kvm \
         {DEVICE} && chmod 0660 {DEVICE}",
        user.name,
    );
    let ended = Command::new(program)
        .arg(SUBCOMMAND)
        .arg(root)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .and_then(wait);
    match ended {
        Ok(status) if status.success() => {}
        Ok(status) => {
            log::warn!("libvirt may take seconds for each call: learning what QEMU can do ended with {status}")
        }
        Err(error) => log::warn!("libvirt may take seconds for each call: cannot learn what QEMU can do: {error}"),
    }
}

fn wait(mut child: Child) -> std::io::Result<ExitStatus> {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            child.kill()?;
            return child.wait();
        }
        thread::sleep(PACE);
    }
}

/// The child's side.
///
/// # Errors
///
/// One sentence.
pub fn main(root: &Path) -> Result<(), String> {
    let beside = root.join("probe");
    lay_out(root, &beside).map_err(|error| format!("cannot prepare {}: {error}", beside.display()))?;
    hide_kvm(&beside.join("no-kvm")).map_err(|error| format!("cannot hide {DEVICE}: {error}"))?;
    sys::initialise()?;
    let target = Target::embedded(&beside)?;
    Connect::open(Some(target.uri()))
        .and_then(|connection| connection.capabilities())
        .map(drop)
        .map_err(|error| error.message().to_owned())
}

/// The same configuration and cache, and nothing else of the real driver.
fn lay_out(root: &Path, beside: &Path) -> std::io::Result<()> {
    let etc = beside.join("etc");
    fs::create_dir_all(root.join("cache"))?;
    embed::make_directory(&etc)?;
    fs::copy(root.join("etc/qemu.conf"), etc.join("qemu.conf"))?;
    let cache = beside.join("cache");
    if fs::symlink_metadata(&cache).is_err() {
        symlink(PathBuf::from("../cache"), &cache)?;
    }
    Ok(())
}

/// From here on, for this process and its children, the device is a file that guests may not open and KVM is not in.
fn hide_kvm(mask: &Path) -> std::io::Result<()> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(mask)?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    keep_private(Path::new(DEVICE))?;
    mount(Some(mask), DEVICE, none, MsFlags::MS_BIND, none)?;
    Ok(())
}

/// What is mounted here from now on stays in our namespace. In a chroot `/` is no mount, so the mount that the path lies
/// on is looked for from below.
fn keep_private(path: &Path) -> nix::Result<()> {
    let none = None::<&str>;
    let make = |place| mount(none, place, none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none);
    let mut outcome = Err(Errno::EINVAL);
    for place in path.ancestors() {
        outcome = make(place);
        // No mount.
        if outcome != Err(Errno::EINVAL) {
            break;
        }
    }
    outcome
}
