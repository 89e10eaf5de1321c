//! Who may what with an image, through the mount.

mod effects;
#[path = "../support/mod.rs"]
mod support;
mod table;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use support::{Daemon, errno};

/// The access group.
const ACCESS: &str = "users";

fn daemon() -> Daemon {
    Daemon::start(&["-o", "access_group=users,projects=games"])
}

fn read(path: &Path) -> i32 {
    match path.is_dir() {
        true => errno(fs::read_dir(path)),
        false => errno(File::open(path)),
    }
}

fn rename_over(path: &Path, value: &str) -> i32 {
    let temporary = path.with_file_name(".new");
    let make = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).open(&temporary)?;
        file.write_all(value.as_bytes())?;
        drop(file);
        let renamed = fs::rename(&temporary, path);
        if renamed.is_err() {
            fs::remove_file(&temporary)?;
        }
        renamed
    };
    errno(make())
}
