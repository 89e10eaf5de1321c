//! Whether a disk needs a file: is it, or is a copy-on-write child of it, however far down.
//!
//! What is read is the header of qcow2 (QEMU's `docs/interop/qcow2.txt`): the name of the backing file, without which the
//! disk is worth nothing. Such a name may be anything, so nothing is opened that is no regular file.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const MAGIC: [u8; 4] = *b"QFI\xfb";
/// QEMU's limit, in bytes.
const LONGEST_NAME: u32 = 1023;
/// Longer chains are taken for endless ones.
const DEEPEST: usize = 64;

/// Whether a disk needs this file. `is_qcow2` says that its header tells; else its bytes are a guest's, and mean nothing.
/// What cannot be read needs nothing.
pub fn needs(disk: &Path, is_qcow2: bool, file: &Metadata) -> bool {
    let mut path = disk.to_owned();
    for _ in 0..DEEPEST {
        let Ok(found) = std::fs::metadata(&path) else { return false };
        if (found.dev(), found.ino()) == (file.dev(), file.ino()) {
            return true;
        }
        if !is_qcow2 || !found.is_file() {
            return false;
        }
        match backing_file(&path) {
            Ok(Some(below)) => path = path.parent().map_or_else(|| below.clone(), |parent| parent.join(&below)),
            Ok(None) | Err(_) => return false,
        }
    }
    false
}

/// The name of a qcow2's backing file, relative to its own directory, if it is a file's.
fn backing_file(path: &Path) -> io::Result<Option<PathBuf>> {
    let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let mut header = [0; 20];
    file.read_exact(&mut header)?;
    let (magic, rest) = header.split_at(8);
    let (offset, size) = rest.split_at(8);
    let offset = u64::from_be_bytes(offset.try_into().unwrap_or_default());
    let size = u32::from_be_bytes(size.try_into().unwrap_or_default());
    if magic[..4] != MAGIC || offset == 0 || size > LONGEST_NAME {
        return Ok(None);
    }
    name_at(&mut file, offset, size).map(file_of)
}

fn name_at(file: &mut File, offset: u64, size: u32) -> io::Result<Vec<u8>> {
    file.seek(SeekFrom::Start(offset))?;
    let mut name = Vec::new();
    file.take(u64::from(size)).read_to_end(&mut name)?;
    Ok(name)
}

/// The file in one of QEMU's names for it: plain, `file:...`, or `json:{...}`.
fn file_of(name: Vec<u8>) -> Option<PathBuf> {
    if let Some(text) = name.strip_prefix(b"json:") {
        let value: serde_json::Value = serde_json::from_slice(text).ok()?;
        let named = ["/file/filename", "/filename", "/file.filename"].iter().find_map(|place| value.pointer(place));
        return named.and_then(|named| named.as_str()).map(PathBuf::from);
    }
    let plain = name.strip_prefix(b"file:").map(<[u8]>::to_vec).unwrap_or(name);
    Some(PathBuf::from(std::ffi::OsString::from_vec(plain)))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn create(path: &Path, backing: Option<&str>) {
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2"]).arg(path);
        match backing {
            Some(backing) => command.args(["-F", "qcow2", "-b", backing]),
            None => command.arg("1M"),
        };
        assert!(command.status().unwrap().success());
    }

    #[test]
    fn a_disk_needs_itself_and_what_is_below_it_under_whichever_name() {
        let directory = tempfile::TempDir::new().unwrap();
        let at = |name: &str| directory.path().join(name);
        create(&at("base"), None);
        create(&at("absolute"), Some(at("base").to_str().unwrap()));
        create(&at("relative"), Some("absolute"));
        let relative = at("relative");
        let json = serde_json::json!({ "driver": "qcow2", "file": { "driver": "file", "filename": relative } });
        create(&at("json"), Some(&format!("json:{json}")));
        create(&at("other"), None);
        std::os::unix::fs::symlink(at("relative"), at("link")).unwrap();
        let base = std::fs::metadata(at("base")).unwrap();
        for name in ["base", "absolute", "relative", "json", "link"] {
            assert!(needs(&at(name), true, &base), "{name}");
        }
        assert!(!needs(&at("other"), true, &base) && !needs(&at("absent"), true, &base));
        assert!(!needs(&at("relative"), false, &base), "a guest has written these bytes");
        assert!(needs(&at("base"), false, &base));
    }

    #[test]
    fn a_chain_that_has_no_end_and_what_is_no_disk_need_nothing() {
        let directory = tempfile::TempDir::new().unwrap();
        let at = |name: &str| directory.path().join(name);
        create(&at("base"), None);
        create(&at("first"), Some("base"));
        let base = std::fs::metadata(at("base")).unwrap();
        // Its inode number stays taken.
        std::fs::rename(at("base"), at("kept")).unwrap();
        std::fs::copy(at("first"), at("base")).unwrap();
        assert!(!needs(&at("first"), true, &base));
        std::fs::write(at("short"), "QFI").unwrap();
        assert!(!needs(&at("short"), true, &base) && !needs(Path::new("/dev/zero"), true, &base));
    }
}
