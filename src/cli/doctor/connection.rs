//! libvirt: the library, its QEMU driver, and whether the hypervisor answers.

use std::path::PathBuf;
use std::process::Command;

use super::run::{self, Ended};
use super::{Finding, World};
use crate::hypervisor::libvirt::greeting::{self, Greeting};
use crate::hypervisor::target::Target;

/// The first libvirt with the embedded driver.
const EMBEDDED_SINCE: u32 = 6_001_000;
const DAEMON: &str = "libvirt daemon";
const SYSTEM: &str = "qemu:///system";

/// All findings.
pub fn look(world: &World) -> Vec<Finding> {
    let mut findings = vec![library(world), choice(world)];
    findings.extend(driver(world));
    findings.extend(daemon(world));
    findings
}

fn library(world: &World) -> Finding {
    const WHAT: &str = "libvirt";
    match greeting::library() {
        Ok(version) if version < EMBEDDED_SINCE && world.embed_root().is_some() => Finding::fail(
            WHAT,
            format!("the library is {}, which has no driver to embed", greeting::written(version)),
            format!("install libvirt {} or newer, or use a libvirt daemon", greeting::written(EMBEDDED_SINCE)),
        ),
        Ok(version) => Finding::ok(WHAT, format!("the library is {}", greeting::written(version))),
        Err(reason) => Finding::fail(WHAT, format!("the library does not work: {reason}"), "install libvirt anew"),
    }
}

fn choice(world: &World) -> Finding {
    const WHAT: &str = "connection";
    let target = match &world.target {
        Ok(target) => target.uri(),
        Err(reason) => {
            let (finding, advice) = reason.split_once("; ").unwrap_or((reason, "name another one: --connect URI"));
            return Finding::fail(WHAT, finding, advice);
        }
    };
    match (&world.recorded, &world.asked) {
        (Ok(Some(identity)), _) => Finding::ok(
            WHAT,
            format!("{target}, recorded at the first mount of the state directory (host {})", identity.hostname),
        ),
        (Err(reason), _) => Finding::ok(
            WHAT,
            format!("the state directory has recorded one that cannot be seen now ({reason}); {target} is looked at"),
        ),
        (Ok(None), Some(_)) => Finding::ok(WHAT, format!("{target}, as asked for")),
        (Ok(None), None) => Finding::ok(WHAT, format!("auto would take {target}")),
    }
}

/// The driver is a plug-in of the library and a package of its own.
fn driver(world: &World) -> Option<Finding> {
    const WHAT: &str = "libvirt QEMU driver";
    world.embed_root()?;
    let Some(directory) = drivers() else {
        return Some(Finding::warn(
            WHAT,
            "the place of the library's drivers is not known",
            "see whether libvirt_driver_qemu.so is installed",
        ));
    };
    let path = directory.join("libvirt_driver_qemu.so");
    Some(if path.exists() {
        Finding::ok(WHAT, "is installed")
    } else {
        Finding::fail(
            WHAT,
            format!("{} is missing", path.display()),
            "apt install libvirt-daemon-driver-qemu (elsewhere: libvirt-daemon-driver-qemu or libvirt-daemon)",
        )
    })
}

/// Beside the library that this process has loaded, or where its own variable says.
fn drivers() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("LIBVIRT_DRIVER_DIR") {
        return Some(named.into());
    }
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let library =
        maps.lines().find_map(|line| Some(&line[line.find('/')?..]).filter(|path| path.contains("/libvirt.so")))?;
    Some(PathBuf::from(library).parent()?.join("libvirt/connection-driver"))
}

/// The chosen connection if somebody else answers it, and the host's own daemon if there is one.
fn daemon(world: &World) -> Vec<Finding> {
    let chosen = match &world.target {
        Ok(Target::Libvirt(target)) if target.embed_root().is_none() => Some(target.uri().to_owned()),
        Ok(Target::Libvirt(_) | Target::Simulated(_)) | Err(_) => None,
    };
    let system = Target::parse("auto", &world.state_directory).is_ok_and(|target| target.uri() == SYSTEM);
    let mut findings: Vec<Finding> = chosen.iter().map(|uri| greeted(uri, true)).collect();
    if chosen.as_deref() != Some(SYSTEM) {
        findings.push(match system {
            true => greeted(SYSTEM, false),
            false => Finding::ok(DAEMON, format!("none has a socket here, so none is asked at {SYSTEM}")),
        });
    }
    findings
}

/// Asked by a child: there is no limit that libvirt would keep by itself.
fn greeted(uri: &str, needed: bool) -> Finding {
    let again = "systemctl restart libvirtd (or virtqemud); guests go on running";
    let mut child = Command::new("/proc/self/exe");
    match run::output(child.arg(greeting::SUBCOMMAND).arg(uri), run::LIMIT) {
        Ok(Ended::Well(text)) => match serde_json::from_str::<Greeting>(&text) {
            Ok(Greeting { libvirt, kind, version, host }) => {
                Finding::ok(DAEMON, format!("{uri} answers: libvirt {libvirt}, {kind} {version} on {host}"))
            }
            Err(_) => Finding::bad(needed, DAEMON, format!("{uri} cannot be understood: {text}"), again),
        },
        Ok(Ended::Badly(text)) => {
            let reason = text.strip_prefix("instancefs: ").unwrap_or(&text);
            let advice = format!("{again}; or use another connection: --connect embed");
            Finding::bad(needed, DAEMON, format!("{uri} refuses: {reason}"), advice)
        }
        Ok(Ended::Never) => {
            Finding::bad(needed, DAEMON, format!("{uri} hangs: no answer within {} s", run::LIMIT.as_secs()), again)
        }
        Err(error) => Finding::bad(needed, DAEMON, format!("{uri} cannot be asked: {error}"), "try again"),
    }
}
