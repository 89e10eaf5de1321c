//! The command line of instancefs.
fn main() {}
