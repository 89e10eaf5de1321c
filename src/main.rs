//! The command line of instancefs; see [`instancefs::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    instancefs::cli::main()
}
