//! `instancefs doctor`: whether this host can do what a mount needs, and what to do where it cannot.
//!
//! It changes nothing: what has to be tried is tried on files without names, or in child processes that are given up
//! after their time. One file a subject; each returns its findings in the order in which they are read.

mod accounts;
mod connection;
mod host;
mod mounts;
mod qemu;
mod run;
mod state;
mod trial;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

use crate::config::{ConfigError, Layer, place};
use crate::hypervisor::Identity;
use crate::hypervisor::target::Target;
use crate::privilege::Privilege;

/// The command line of `doctor`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The state directory to look at [default: as for mount]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// The connection to look at [default: as for mount]
    #[arg(long, value_name = "URI")]
    connect: Option<String>,
    /// Read this configuration instead of /etc/instancefs.toml, or an ordinary user's ~/.config/instancefs.toml
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON objects, one a line: level, what, finding, advice
    #[arg(long)]
    json: bool,
}

/// How good it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Level {
    /// As it should be.
    Ok,
    /// A mount works, but something will not.
    Warn,
    /// A mount does not work.
    Fail,
}

/// The result of one check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    level: Level,
    what: &'static str,
    finding: String,
    /// What to do, empty if nothing.
    advice: String,
}

impl Finding {
    fn ok(what: &'static str, finding: impl Into<String>) -> Finding {
        Finding { level: Level::Ok, what, finding: finding.into(), advice: String::new() }
    }

    fn warn(what: &'static str, finding: impl Into<String>, advice: impl Into<String>) -> Finding {
        Finding { level: Level::Warn, what, finding: finding.into(), advice: advice.into() }
    }

    fn fail(what: &'static str, finding: impl Into<String>, advice: impl Into<String>) -> Finding {
        Finding { level: Level::Fail, what, finding: finding.into(), advice: advice.into() }
    }

    /// `fail` if a mount needs it, else `warn`.
    fn bad(needed: bool, what: &'static str, finding: impl Into<String>, advice: impl Into<String>) -> Finding {
        let level = if needed { Level::Fail } else { Level::Warn };
        Finding { level, ..Finding::fail(what, finding, advice) }
    }

    fn text(&self) -> String {
        let level = match self.level {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "fail",
        };
        let mut text = format!("{level:<4}  {}: {}", self.what, self.finding);
        if !self.advice.is_empty() {
            text.push_str(&format!("\n      {}", self.advice));
        }
        text
    }
}

/// What a mount with these arguments would work with.
struct World {
    layer: Result<Layer, ConfigError>,
    state_directory: PathBuf,
    /// It is the usual place in an ordinary user's home, so that the directories above it may be made.
    is_in_home: bool,
    /// As asked for on the command line or in the configuration.
    asked: Option<String>,
    /// What the first mount of the state directory recorded; an error if that cannot be seen now.
    recorded: Result<Option<Identity>, String>,
    /// What would be connected to.
    target: Result<Target, String>,
    privilege: Privilege,
}

impl World {
    fn new(arguments: &Arguments) -> World {
        let flags =
            Layer { connect: arguments.connect.clone(), state_dir: arguments.state_dir.clone(), ..Layer::default() };
        let (layer, asked, state_directory) = match Layer::from_file(arguments.config.as_deref()) {
            Ok(file) => {
                let layer = flags.over(file);
                let (connect, state_dir) = (layer.connect.clone(), layer.state_dir.clone());
                (Ok(layer), connect, state_dir)
            }
            // The rest is looked at as if there were no configuration.
            Err(error) => (Err(error), flags.connect, flags.state_dir),
        };
        let privilege = Privilege::of_this_process();
        let is_in_home = state_directory.is_none() && !privilege.is_root();
        // Without a home there is none; that is said of the empty path.
        let state_directory = state_directory.or_else(|| place::state(privilege)).unwrap_or_default();
        let state_directory = std::path::absolute(&state_directory).unwrap_or(state_directory);
        let asked = asked.filter(|uri| uri != "auto");
        let recorded = state::recorded(&state_directory);
        let known = recorded.as_ref().ok().and_then(Option::as_ref);
        let target = super::identity::choose(known, asked.as_deref(), &state_directory);
        World {
            layer,
            target: target.map_err(|error| super::chain(&error)),
            state_directory,
            asked,
            recorded,
            privilege,
            is_in_home,
        }
    }

    /// The directory of the embedded driver, if that is what would be connected to.
    fn embed_root(&self) -> Option<&std::path::Path> {
        match &self.target {
            Ok(Target::Libvirt(target)) => target.embed_root(),
            Ok(Target::Simulated(_)) | Err(_) => None,
        }
    }
}

/// Looks at everything; fails if a finding does.
pub fn run(arguments: &Arguments) -> ExitCode {
    let world = World::new(arguments);
    let subjects: [fn(&World) -> Vec<Finding>; 6] =
        [host::look, accounts::look, state::look, mounts::look, connection::look, qemu::look];
    let mut code = ExitCode::SUCCESS;
    for subject in subjects {
        for finding in subject(&world) {
            if finding.level == Level::Fail {
                code = ExitCode::FAILURE;
            }
            // Who does not want to read on is not told more.
            if print(&finding, arguments.json).is_err() {
                return code;
            }
        }
    }
    code
}

fn print(finding: &Finding, json: bool) -> io::Result<()> {
    let text = if json { serde_json::to_string(finding)? } else { finding.text() };
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}")?;
    stdout.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_a_line_and_its_advice_another() {
        assert_eq!(Finding::ok("qemu", "7.2").text(), "ok    qemu: 7.2");
        let text = Finding::warn("space", "512 MiB", "free some").text();
        assert_eq!(text, "warn  space: 512 MiB\n      free some");
        assert_eq!(Finding::bad(true, "a", "b", "c").level, Level::Fail);
        assert_eq!(Finding::bad(false, "a", "b", "c").level, Level::Warn);
    }
}
