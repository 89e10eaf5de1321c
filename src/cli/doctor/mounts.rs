//! The mounts of instancefs that are there, and whether they answer.

use std::process::Command;

use super::run::{self, Ended};
use super::{Finding, World};
use crate::cli::mountpoint::{MountEntry, mounts_of_ours};
use crate::cli::probe::{self, Answer};

const WHAT: &str = "mount";

/// All findings.
pub fn look(_world: &World) -> Vec<Finding> {
    match mounts_of_ours() {
        Ok(mounts) if mounts.is_empty() => vec![Finding::ok(WHAT, "no tree is mounted now")],
        Ok(mounts) => mounts.iter().map(one).collect(),
        Err(error) => vec![Finding::warn(WHAT, format!("the table of mounts cannot be read: {error}"), "mount /proc")],
    }
}

fn one(mount: &MountEntry) -> Finding {
    let shown = mount.path.display();
    let remove = format!("start its daemon again, or take it away: umount -l '{shown}'");
    match probe::ask(&mount.path, probe::LIMIT) {
        Ok(Answer::Alive) => health(mount),
        Ok(Answer::Dead) => Finding::fail(WHAT, format!("{shown} was left by a daemon that is gone"), remove),
        Ok(Answer::Silent) => Finding::fail(
            WHAT,
            format!("{shown} does not answer within {} s", probe::LIMIT.as_secs()),
            format!("if its daemon is gone, take it away: umount -l '{shown}'; else look at the daemon's log"),
        ),
        Ok(Answer::Failed(errno)) => Finding::warn(WHAT, format!("{shown} answers: {}", errno.desc()), remove),
        Err(error) => Finding::warn(WHAT, format!("{shown} cannot be asked: {error}"), "try again"),
    }
}

/// What the tree itself says of its parts; by a child, since the daemon may stop at any time.
fn health(mount: &MountEntry) -> Finding {
    let shown = mount.path.display();
    let path = mount.path.join("health");
    match run::output(Command::new("cat").arg(&path), run::LIMIT) {
        Ok(Ended::Well(text)) => {
            let bad: Vec<&str> = text.lines().filter(|line| !is_well(line)).collect();
            if bad.is_empty() {
                Finding::ok(WHAT, format!("{shown} answers, and its parts are well"))
            } else {
                let advice = format!("cat '{}'", path.display());
                Finding::warn(WHAT, format!("{shown} answers, but: {}", bad.join("; ")), advice)
            }
        }
        Ok(Ended::Badly(text)) => {
            Finding::warn(WHAT, format!("{shown} answers, but: {text}"), "look at the daemon's log")
        }
        Ok(Ended::Never) => {
            Finding::fail(WHAT, format!("{shown} cannot be read, it hangs"), "look at the daemon's log")
        }
        Err(error) => Finding::warn(WHAT, format!("{shown} answers, but cat cannot be run: {error}"), "mend PATH"),
    }
}

/// `<part> ok`
fn is_well(line: &str) -> bool {
    line.split_whitespace().nth(1) == Some("ok")
}
