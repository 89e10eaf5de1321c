//! `instancefs abi DIR`: the documents of the tree's interface, from the table that the tree is served from.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The documents could not be written.
#[derive(Debug, thiserror::Error)]
#[error("the documents cannot be written into {directory}")]
pub struct AbiError {
    directory: PathBuf,
    source: io::Error,
}

/// Writes them.
pub fn run(directory: &Path) -> Result<ExitCode, AbiError> {
    crate::tree::abi::write(directory).map_err(|source| AbiError { directory: directory.to_owned(), source })?;
    Ok(ExitCode::SUCCESS)
}
