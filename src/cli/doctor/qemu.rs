//! QEMU and its tools, and what guests would run on.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::run::{self, Ended};
use super::{Finding, World};
use crate::hypervisor::Accelerator;
use crate::hypervisor::definition::Profile;
use crate::hypervisor::libvirt::{accelerator, embed};
use crate::hypervisor::target::Target;

const TOOL: &str = "qemu-img";
/// Any of these makes the disk on which a guest finds its `user_data`.
const ISO_TOOLS: [&str; 3] = ["xorriso", "genisoimage", "mkisofs"];

/// All findings.
pub fn look(world: &World) -> Vec<Finding> {
    let profile = embed::usual_profile();
    let is_local = match &world.target {
        Ok(Target::Libvirt(target)) => target.embed_root().is_some() || target.uri().starts_with("qemu:///"),
        Ok(Target::Simulated(_)) | Err(_) => false,
    };
    let mut findings = Vec::new();
    findings.push(emulator(&profile, is_local));
    findings.push(tool());
    if profile.emulator.exists() {
        findings.push(acceleration(&profile));
    }
    findings.push(iso());
    findings
}

fn emulator(profile: &Profile, needed: bool) -> Finding {
    const WHAT: &str = "QEMU";
    let path = &profile.emulator;
    if !path.exists() {
        return Finding::bad(
            needed,
            WHAT,
            format!("{} is missing", path.display()),
            "apt install qemu-system-x86 (elsewhere: qemu-kvm, qemu-system)",
        );
    }
    match version(path) {
        Ok(version) => Finding::ok(WHAT, format!("{} is {version}", path.display())),
        Err(reason) => Finding::bad(needed, WHAT, format!("{} {reason}", path.display()), "install QEMU anew"),
    }
}

/// It inspects images and makes disks, wherever guests run.
fn tool() -> Finding {
    let Some(path) = run::find(TOOL) else {
        return Finding::fail(
            TOOL,
            "is not in PATH, so images cannot be checked and disks not be made",
            "apt install qemu-utils (elsewhere: qemu-img)",
        );
    };
    match version(&path) {
        Ok(version) => Finding::ok(TOOL, format!("{} is {version}", path.display())),
        Err(reason) => Finding::fail(TOOL, format!("{} {reason}", path.display()), "install it anew"),
    }
}

/// What comes behind the word `version` in the first line, up to the copyright.
fn version(program: &Path) -> Result<String, String> {
    match run::output(Command::new(program).arg("--version"), run::LIMIT) {
        Ok(Ended::Well(text)) => {
            let first = text.lines().next().unwrap_or_default();
            Ok(first.split_once("version ").map_or(first, |(_, version)| version).trim().to_owned())
        }
        Ok(Ended::Badly(text)) => Err(format!("fails: {}", text.lines().last().unwrap_or("it says nothing"))),
        Ok(Ended::Never) => Err(format!("says no version within {} s", run::LIMIT.as_secs())),
        Err(error) => Err(format!("cannot be run: {error}")),
    }
}

/// A trial boot, as the daemon does it: a device that opens proves nothing.
fn acceleration(profile: &Profile) -> Finding {
    const WHAT: &str = "KVM";
    match accelerator::from_environment() {
        Ok(Some(Accelerator::Kvm)) => {
            return Finding::ok(WHAT, format!("is used untried, since {} says so", accelerator::VARIABLE));
        }
        Ok(Some(Accelerator::Tcg)) => {
            return Finding::ok(WHAT, format!("is not used, since {} says so", accelerator::VARIABLE));
        }
        Ok(None) => {}
        Err(reason) => {
            return Finding::fail(WHAT, reason, format!("unset {}", accelerator::VARIABLE));
        }
    }
    let device = Path::new(accelerator::DEVICE);
    if !device.exists() {
        return Finding::warn(
            WHAT,
            format!("there is no {}, so guests are emulated (TCG), which is slow", accelerator::DEVICE),
            "switch virtualisation on in the firmware or the outer host; then: modprobe kvm_intel, or kvm_amd",
        );
    }
    if let Some(remedy) = accelerator::closed_to_us() {
        let words = format!("you may not open {}, so guests are emulated (TCG), which is slow", accelerator::DEVICE);
        return Finding::warn(WHAT, words, remedy);
    }
    match accelerator::probe(profile, Accelerator::Kvm) {
        Ok(()) => Finding::ok(WHAT, "works: a boot sector ran on it"),
        Err(reason) => Finding::warn(
            WHAT,
            format!("does not work here, so guests are emulated (TCG), which is slow: {reason}"),
            format!(
                "if it is not permitted: chgrp kvm {0} && chmod 0660 {0}, and be in the group kvm; else look at the \
                 outer host",
                accelerator::DEVICE
            ),
        ),
    }
}

fn iso() -> Finding {
    const WHAT: &str = "ISO tool";
    let found: Option<PathBuf> = ISO_TOOLS.iter().find_map(|tool| run::find(tool));
    match found {
        Some(path) => Finding::ok(WHAT, format!("{} makes the disks with user_data", path.display())),
        None => Finding::warn(WHAT, "there is none, so guests cannot be given user_data", "apt install xorriso"),
    }
}
