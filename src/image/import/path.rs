//! Files of the import directory.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use super::ImportError;

/// Opens the regular file `name` below `directory`, and tells its length in bytes. Neither `..` nor a symlink leads out
/// of the directory, nor does a mount below it: that could be our own tree, which must not be read from here.
pub(super) fn open(directory: &Path, name: &Path) -> Result<(File, u64), ImportError> {
    let failed = |error: io::Error| failed(name, error);
    let directory =
        OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(directory).map_err(failed)?;
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS | ResolveFlag::RESOLVE_NO_XDEV;
    // Without opening it really: a device or FIFO would notice.
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(resolve);
    let found = openat2(&directory, name, how).map(File::from).map_err(|error| failed(error.into()))?;
    if !found.metadata().map_err(failed)?.is_file() {
        return Err(ImportError::File { name: name.display().to_string(), why: "it is not a regular file".to_owned() });
    }
    let file = File::open(format!("/proc/self/fd/{}", found.as_raw_fd())).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    Ok((file, length))
}

/// What an error on the file `name` means.
pub(super) fn failed(name: &Path, error: io::Error) -> ImportError {
    let why = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EXDEV | Errno::ELOOP) => "it leads out of the import directory".to_owned(),
        Some(Errno::ENOENT | Errno::ENOTDIR) => "there is no such file in the import directory".to_owned(),
        Some(_) | None => error.to_string(),
    };
    ImportError::File { name: name.display().to_string(), why }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_below_the_directory_are_opened() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("secret"), b"secret").unwrap();
        let directory = outside.path().join("import");
        std::fs::create_dir_all(directory.join("sub")).unwrap();
        std::fs::write(directory.join("sub/image"), b"image").unwrap();
        for (name, target) in [
            ("inside", "sub/image"),
            ("upwards", "../secret"),
            ("absolute", outside.path().join("secret").to_str().unwrap()),
            ("magic", "/proc/self/fd/0"),
            ("loop", "loop"),
            ("proc", "/proc/self/root/etc/passwd"),
        ] {
            std::os::unix::fs::symlink(target, directory.join(name)).unwrap();
        }
        nix::unistd::mkfifo(&directory.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let open = |name: &str| open(&directory, Path::new(name)).map(|(_, length)| length);
        assert_eq!(open("sub/image").unwrap(), 5);
        assert_eq!(open("sub/../sub/image").unwrap(), 5);
        assert_eq!(open("inside").unwrap(), 5);
        for (name, reason) in [
            ("../secret", "out of"),
            ("sub/../../secret", "out of"),
            ("upwards", "out of"),
            ("absolute", "out of"),
            ("magic", "out of"),
            ("proc", "out of"),
            ("loop", "out of"),
            ("missing", "no such file"),
            ("sub/image/x", "no such file"),
            ("sub", "not a regular file"),
            (".", "not a regular file"),
            ("fifo", "not a regular file"),
        ] {
            let error = open(name).unwrap_err().to_string();
            assert!(error.contains(reason), "{name}: {error}");
        }
        assert!(super::open(Path::new("/dev"), Path::new("null")).unwrap_err().to_string().contains("regular file"));
    }
}
