//! The command line: one file a subcommand.
//!
//! Messages are sentences on standard error, `instancefs: ...`, and each error is said once with its whole chain. Exit
//! codes: 0 done, 1 failed, 2 the command line cannot be understood; `wait` adds 124 for its time limit.

mod abi;
mod background;
mod completions;
mod daemon;
mod doctor;
mod identity;
mod manual;
mod mount;
mod mount_helper;
mod mountpoint;
#[allow(missing_docs, dead_code)]
mod pinned;
mod place;
mod probe;
mod signals;
mod state_directory;
mod supervisor;
mod wait;
mod watch;

use std::error::Error;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

use crate::hypervisor::libvirt::{capabilities, greeting};

/// The command line was not understood.
const USAGE: u8 = 2;

/// The virtual machines of a libvirt host as files.
#[derive(Debug, Parser)]
#[command(name = "instancefs", version, disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Mount the tree of a libvirt host
    Mount(mount::Arguments),
    /// Wait until objects have no task, or reached a state
    Wait(wait::Arguments),
    /// Print what changes in a tree
    Watch(watch::Arguments),
    /// Check whether this host can do what a mount needs
    Doctor(doctor::Arguments),
    /// Write the documents of the tree's interface into a directory
    #[command(hide = true)]
    Abi {
        /// The directory
        directory: PathBuf,
    },
    /// Write the manual pages into a directory
    #[command(hide = true)]
    Man {
        /// The directory
        directory: PathBuf,
    },
    /// Write what a shell completes to standard output
    #[command(hide = true)]
    Completions {
        /// The shell
        shell: completions::Shell,
    },
    /// The child process that raises inotify events; started by the daemon
    #[command(hide = true)]
    Announcer {
        /// What the daemon tells it
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Has libvirt learn what QEMU can do without KVM; started by the daemon
    #[command(hide = true)]
    Capabilities {
        /// The directory of the embedded driver
        root: PathBuf,
    },
    /// Asks a hypervisor who it is, which may never be answered; started by doctor
    #[command(hide = true)]
    Greet {
        /// Its URI
        uri: String,
    },
    /// Asks a mount for statfs, which may never return; started by whoever must not hang
    #[command(hide = true)]
    Probe {
        /// The mount point
        path: PathBuf,
    },
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let mut arguments: Vec<OsString> = std::env::args_os().collect();
    if mount_helper::is_called(&arguments) {
        arguments = match mount_helper::translate(&arguments) {
            Ok(Some(translated)) => translated,
            Ok(None) => return ExitCode::SUCCESS,
            Err(error) => {
                report(&error);
                return ExitCode::from(USAGE);
            }
        };
    }
    let parsed = match Arguments::try_parse_from(&arguments) {
        Ok(parsed) => parsed,
        Err(error) => return usage(&error),
    };
    let outcome: Result<ExitCode, Box<dyn Error>> = match parsed.command {
        Command::Mount(options) => mount::run(&options, &arguments).map_err(Into::into),
        Command::Wait(options) => wait::run(&options).map_err(Into::into),
        Command::Watch(options) => watch::run(&options).map_err(Into::into),
        Command::Doctor(options) => return doctor::run(&options),
        Command::Greet { uri } => greeting::greet(&uri).map_err(Into::into).and_then(|greeting| {
            println!("{}", serde_json::to_string(&greeting)?);
            Ok(ExitCode::SUCCESS)
        }),
        Command::Abi { directory } => abi::run(&directory).map_err(Into::into),
        Command::Man { directory } => manual::run(&directory).map_err(Into::into),
        Command::Completions { shell } => completions::run(shell).map_err(Into::into),
        Command::Announcer { arguments } => return crate::fuse::announcer::main(arguments),
        Command::Capabilities { root } => capabilities::main(&root).map(|()| ExitCode::SUCCESS).map_err(Into::into),
        Command::Probe { path } => return probe::answer(&path),
    };
    outcome.unwrap_or_else(|error| {
        report(error.as_ref());
        ExitCode::FAILURE
    })
}

/// Help goes to standard output as it is; a refusal becomes a sentence of ours.
fn usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            ExitCode::from(if error.use_stderr() { USAGE } else { 0 })
        }
        _ => {
            let text = error.render().to_string();
            eprintln!("instancefs: {}", text.strip_prefix("error: ").unwrap_or(&text).trim_end());
            ExitCode::from(USAGE)
        }
    }
}

/// Says an error once.
fn report(error: &dyn Error) {
    eprintln!("instancefs: {}", chain(error));
}

/// An error and its sources in one line; a source that its parent already quotes is not said again.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut last = text.clone();
    let mut source = error.source();
    while let Some(error) = source {
        let next = error.to_string();
        if !last.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        last = next;
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] Middle);

    #[derive(Debug, thiserror::Error)]
    #[error("middle: {0}")]
    struct Middle(#[source] std::io::Error);

    #[test]
    fn a_chain_says_each_cause_once() {
        let error = Outer(Middle(std::io::Error::other("inner")));
        assert_eq!(chain(&error), "outer: middle: inner");
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }
}
