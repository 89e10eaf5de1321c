//! The configuration, and the users and groups that it and the guests need.

use nix::unistd::Group;

use super::{Finding, World};
use crate::cli::chain;
use crate::hypervisor::libvirt::embed;

/// All findings.
pub fn look(world: &World) -> Vec<Finding> {
    let mut findings = vec![configuration(world)];
    if let Ok(layer) = &world.layer {
        // Nobody else enters an ordinary user's tree, so he needs only those groups that he has named.
        let needed = layer.groups().into_iter().filter(|group| world.privilege.is_root() || !group.is_default);
        findings.extend(needed.map(|group| {
            let what = "group";
            match Group::from_name(group.name) {
                Ok(Some(_)) => Finding::ok(what, format!("{} exists ({})", group.name, group.purpose)),
                Ok(None) if group.is_default => Finding::warn(
                    what,
                    format!("{} does not exist, so {} is root's group", group.name, group.purpose),
                    format!("groupadd --system {0}, or name another one: -o {1}=", group.name, group.purpose),
                ),
                Ok(None) => Finding::fail(
                    what,
                    format!("{} does not exist, but the configuration names it as {}", group.name, group.purpose),
                    format!("groupadd {}, or name another one", group.name),
                ),
                Err(errno) => Finding::fail(
                    what,
                    format!("{} cannot be looked up: {}", group.name, errno.desc()),
                    "look at /etc/nsswitch.conf and its services",
                ),
            }
        }));
    }
    if world.privilege.is_root() {
        findings.push(guest_user(world));
    }
    findings
}

fn configuration(world: &World) -> Finding {
    const WHAT: &str = "configuration";
    match &world.layer {
        Ok(_) => Finding::ok(WHAT, "can be used"),
        Err(error) => Finding::fail(
            WHAT,
            chain(error),
            "correct it, or name another file with --config; instancefs-mount(1) names the keys",
        ),
    }
}

/// Root's guests do not run as root.
fn guest_user(world: &World) -> Finding {
    const WHAT: &str = "guests' user";
    match embed::unprivileged_user() {
        Ok(user) => Finding::ok(WHAT, format!("{} (uid {}, gid {})", user.name, user.uid, user.gid)),
        Err(reason) => {
            let (finding, advice) = reason.split_once(": ").unwrap_or((&reason, ""));
            Finding::bad(world.embed_root().is_some(), WHAT, finding, advice)
        }
    }
}
