//! `instancefs man DIR`: the manual pages. Synopsis and options come from the command line's own definition, so they
//! cannot differ from it; the rest is in [`pages`].

mod pages;

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Command;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use super::completions::public_command;
use pages::{HELPER, PAGES, Page};

const MANUAL: &str = "instancefs";

/// The pages cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("the manual page {path} cannot be written")]
pub struct ManualError {
    path: PathBuf,
    source: io::Error,
}

/// Writes all pages into a directory.
pub fn run(directory: &Path) -> Result<ExitCode, ManualError> {
    let mut root = public_command();
    root.build();
    for page in PAGES {
        let Some(command) = command(&root, page) else { continue };
        write(directory, &format!("{}.1", page.name), |file| of_command(command, page, file))?;
    }
    write(directory, &format!("{}.8", HELPER.name), helper)?;
    Ok(ExitCode::SUCCESS)
}

/// `instancefs` itself, or `instancefs-<subcommand>`.
fn command<'a>(root: &'a Command, page: &Page) -> Option<&'a Command> {
    match page.name.split_once('-') {
        None => Some(root),
        Some((_, subcommand)) => root.find_subcommand(subcommand),
    }
}

fn write(
    directory: &Path,
    name: &str,
    render: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), ManualError> {
    let path = directory.join(name);
    let written = File::create(&path).map(BufWriter::new).and_then(|mut file| {
        render(&mut file)?;
        file.flush()
    });
    written.map_err(|source| ManualError { path, source })
}

fn of_command(command: &Command, page: &Page, file: &mut dyn Write) -> io::Result<()> {
    let man = Man::new(command.clone()).title(page.name.to_uppercase()).source(source()).manual(MANUAL);
    man.render_title(file)?;
    man.render_name_section(file)?;
    man.render_synopsis_section(file)?;
    description(page).to_writer(file)?;
    man.render_options_section(file)?;
    if command.get_subcommands().next().is_some() {
        man.render_subcommands_section(file)?;
    }
    rest(page).to_writer(file)
}

/// The mount helper has no definition in the command line: mount(8) has laid it down.
fn helper(file: &mut dyn Write) -> io::Result<()> {
    let mut roff = Roff::new();
    roff.control("TH", [HELPER.name.to_uppercase().as_str(), "8", "", source().as_str(), MANUAL]);
    roff.control("SH", ["NAME"]);
    roff.text([roman(format!("{} - mount a tree of instancefs from mount(8) and fstab(5)", HELPER.name))]);
    roff.control("SH", ["SYNOPSIS"]);
    roff.text([bold(HELPER.name), roman(" SOURCE DIRECTORY [-fnrsvw] [-o OPTIONS]")]);
    roff.to_writer(file)?;
    description(&HELPER).to_writer(file)?;
    rest(&HELPER).to_writer(file)
}

fn source() -> String {
    format!("instancefs {}", env!("CARGO_PKG_VERSION"))
}

fn description(page: &Page) -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", ["DESCRIPTION"]);
    for paragraph in page.description {
        roff.control("PP", []);
        roff.text([roman(*paragraph)]);
    }
    roff
}

fn rest(page: &Page) -> Roff {
    let mut roff = Roff::new();
    for (heading, entries) in [("EXIT STATUS", page.exit), ("ENVIRONMENT", page.environment), ("FILES", page.files)] {
        if entries.is_empty() {
            continue;
        }
        roff.control("SH", [heading]);
        for (term, text) in entries {
            roff.control("TP", []);
            roff.text([bold(*term)]);
            roff.text([roman(*text)]);
        }
    }
    if !page.examples.is_empty() {
        roff.control("SH", ["EXAMPLES"]);
        for (text, lines) in page.examples {
            roff.control("PP", []);
            roff.text([roman(*text)]);
            roff.control("PP", []);
            roff.control("RS", ["4"]);
            roff.control("nf", []);
            for line in lines.lines() {
                roff.text([roman(line)]);
            }
            roff.control("fi", []);
            roff.control("RE", []);
        }
    }
    roff.control("SH", ["SEE ALSO"]);
    roff.text([roman(page.see.join(", "))]);
    roff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_public_command_has_a_page_and_each_page_a_command() {
        let root = public_command();
        for command in root.get_subcommands() {
            let name = format!("instancefs-{}", command.get_name());
            assert!(PAGES.iter().any(|page| page.name == name), "{name} has no page");
        }
        for page in PAGES {
            assert!(command(&root, page).is_some(), "{} is the page of no command", page.name);
            assert!(
                !page.description.is_empty() && !page.exit.is_empty() && !page.examples.is_empty(),
                "{}",
                page.name
            );
        }
    }
}
