//! `instancefs completions SHELL`: what a shell completes, from the command line's own definition.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Command, CommandFactory, ValueEnum};
use clap_complete::{Generator, Shell as Generated};

/// A shell that completions are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    /// bash(1), with the package bash-completion
    Bash,
    /// zsh(1)
    Zsh,
    /// fish(1)
    Fish,
}

/// The completions cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("the completions cannot be written")]
pub struct CompletionsError(#[source] io::Error);

/// Writes them to standard output.
pub fn run(shell: Shell) -> Result<ExitCode, CompletionsError> {
    let mut text = Vec::new();
    let generated = match shell {
        Shell::Bash => Generated::Bash,
        Shell::Zsh => Generated::Zsh,
        Shell::Fish => Generated::Fish,
    };
    let mut command = public_command();
    command.build();
    generated.try_generate(&command, &mut text).map_err(CompletionsError)?;
    io::stdout().lock().write_all(&text).map_err(CompletionsError)?;
    Ok(ExitCode::SUCCESS)
}

/// The command line without what is hidden: neither people nor shells need to know that.
pub fn public_command() -> Command {
    let whole = super::Arguments::command();
    let public = whole.get_subcommands().filter(|command| !command.is_hide_set()).map(without_hidden);
    without_hidden(&whole)
        .bin_name("instancefs")
        .version(env!("CARGO_PKG_VERSION"))
        .disable_help_subcommand(true)
        .subcommands(public)
}

/// The command itself, made anew, since nothing can be taken from one that is.
fn without_hidden(command: &Command) -> Command {
    let arguments = command.get_arguments().filter(|argument| !argument.is_hide_set()).cloned();
    let public = Command::new(command.get_name().to_owned()).args(arguments);
    match command.get_about() {
        Some(about) => public.about(about.clone()),
        None => public,
    }
}
