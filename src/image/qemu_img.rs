//! `qemu-img` in a cage: limits on memory, time, files and output, no environment, killed with us.
//!
//! No `qemu-img` of ours reads an image that [`super::inspect`] refused, and none reads a user's bytes with our rights:
//! [`info`] runs on a sealed copy of the header and tables, so it needs no right to any file at all: as `nobody`, and
//! where we are not root ourselves, and cannot become anybody, as ourselves without access to our files.

pub(crate) mod cage;
mod convert;
pub(crate) mod rights;

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::Deserialize;

use super::Format;
use super::inspect::{Examined, examine};
use crate::privilege::Privilege;
pub use convert::{ConvertFailure, End, convert, create, volume_size};
use rights::Rights;

/// `nobody` and `nogroup`, the same numbers everywhere: who reads untrusted bytes where we are root.
const NOBODY: u32 = 65534;

/// What qemu-img says about an image.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct QemuInfo {
    /// Its word for the format, which is the one it was told.
    pub format: String,
    /// The size that a guest sees, in bytes.
    #[serde(rename = "virtual-size")]
    pub virtual_size_bytes: u64,
    /// The backing file that it would open.
    #[serde(rename = "backing-filename")]
    pub backing_file: Option<String>,
    /// Whether reading needs a secret.
    #[serde(default)]
    pub encrypted: bool,
    #[serde(default, rename = "format-specific")]
    format_specific: FormatSpecific,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
struct FormatSpecific {
    #[serde(default)]
    data: FormatSpecificData,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
struct FormatSpecificData {
    #[serde(rename = "data-file")]
    data_file: Option<String>,
}

impl QemuInfo {
    /// The external data file that it would open.
    pub fn data_file(&self) -> Option<&str> {
        self.format_specific.data.data_file.as_deref()
    }
}

/// Asks qemu-img about the image at `path`, an absolute path, in the format given; nothing is probed.
/// An image that the inspector refuses is not shown to qemu-img. Errors are sentences.
pub fn info(path: &Path, format: Format) -> Result<QemuInfo, String> {
    check_absolute(path)?;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .map_err(|error| format!("cannot open {}: {error}", path.display()))?;
    info_of(&file, format)
}

/// [`info`] for a file that is open.
pub fn info_of(file: &File, format: Format) -> Result<QemuInfo, String> {
    describe(file, format, without_our_rights())
}

fn describe(file: &File, format: Format, rights: Rights<'_>) -> Result<QemuInfo, String> {
    let examined = examine(file, Some(format)).map_err(|refusal| refusal.to_string())?;
    let copy = sealed_metadata(file, &examined).map_err(|error| format!("cannot copy the image's header: {error}"))?;
    let mut command = Command::new("qemu-img");
    // The copy is standard input; a memory file may be opened by anybody who holds it. -U: a sealed file takes no locks.
    command.args(["info", "--output=json", "-U", "-f", format.word(), "/proc/self/fd/0"]).stdin(Stdio::from(copy));
    let output = cage::run(command, cage::Limits::reading(), rights)?;
    serde_json::from_slice(&output)
        .map_err(|error| format!("qemu-img info answered something else than expected: {error}"))
}

/// Creates a qcow2 file at `path` of `size_bytes` whose unwritten clusters are those of `backing`.
///
/// All paths are absolute: QEMU takes a name with a colon before its first slash for a protocol. The backing file is
/// not opened by qemu-img (`-u`); its format and size are known from the inspection and the size given here.
/// An existing regular file at `path` is overwritten and keeps its mode and attributes. Errors are sentences and hold
/// the words of qemu-img.
pub fn create_overlay(path: &Path, backing: &Path, backing_format: Format, size_bytes: u64) -> Result<(), String> {
    check_absolute(path)?;
    check_absolute(backing)?;
    let backing_metadata =
        std::fs::metadata(backing).map_err(|error| format!("cannot use the image {}: {error}", backing.display()))?;
    if !backing_metadata.is_file() {
        return Err(format!("the image {} is not a regular file", backing.display()));
    }
    let size = OsString::from(size_bytes.to_string());
    let mut command = Command::new("qemu-img");
    command
        .args(["create", "-q", "-u", "-f", Format::Qcow2.word(), "-F", backing_format.word(), "-b"])
        .args([backing.as_os_str(), OsStr::new("--"), path.as_os_str(), &size])
        .stdin(Stdio::null());
    cage::run(command, cage::Limits::creating(), Rights::Ours).map(|_nothing_said| ())
}

/// The size that a guest sees of a qcow2 disk that we made, in bytes. Its header was written by qemu-img and QEMU, never
/// by a guest. Errors are sentences.
pub fn disk_size(path: &Path) -> Result<u64, String> {
    check_absolute(path)?;
    let mut command = Command::new("qemu-img");
    command.args(["info", "--output=json", "-U", "-f", Format::Qcow2.word(), "--"]).arg(path).stdin(Stdio::null());
    let output = cage::run(command, cage::Limits::reading(), Rights::Ours)?;
    let info: QemuInfo = serde_json::from_slice(&output)
        .map_err(|error| format!("qemu-img info answered something else than expected: {error}"))?;
    Ok(info.virtual_size_bytes)
}

/// Makes a qcow2 disk that we made larger, to `size_bytes`; qemu-img refuses to make one smaller, and to touch one that a
/// guest uses. Errors are sentences.
pub fn grow(path: &Path, size_bytes: u64) -> Result<(), String> {
    check_absolute(path)?;
    let mut command = Command::new("qemu-img");
    command
        .args(["resize", "-q", "-f", Format::Qcow2.word(), "--"])
        .arg(path)
        .arg(size_bytes.to_string())
        .stdin(Stdio::null());
    cage::run(command, cage::Limits::growing(), Rights::Ours).map(|_nothing_said| ())
}

/// Why a disk did not pass [`check`].
#[derive(Debug, PartialEq, Eq)]
pub enum CheckFailure {
    /// Given up on request.
    Cancelled,
    /// It is damaged; what qemu-img says.
    Damaged(String),
    /// It could not be checked; a sentence.
    Failed(String),
}

/// Has qemu-img check the tables of a qcow2 disk that we made, which nobody writes to; nothing is repaired. Clusters that are
/// lost to use, as a power failure leaves them, are no damage.
pub fn check(path: &Path, cancelled: &dyn Fn() -> bool) -> Result<(), CheckFailure> {
    const DAMAGED: i32 = 2;
    const LEAKS: i32 = 3;
    check_absolute(path).map_err(CheckFailure::Failed)?;
    let mut command = Command::new("qemu-img");
    command.args(["check", "-q", "-U", "-f", Format::Qcow2.word(), "--"]).arg(path).stdin(Stdio::null());
    match cage::run_to_end(command, cage::Limits::checking(), Rights::Ours, &|_output| cancelled()) {
        Ok(ended) => match ended.status.code() {
            Some(0 | LEAKS) => Ok(()),
            Some(DAMAGED) => Err(CheckFailure::Damaged(ended.words())),
            Some(_) | None => Err(CheckFailure::Failed(ended.words())),
        },
        Err(_) if cancelled() => Err(CheckFailure::Cancelled),
        Err(words) => Err(CheckFailure::Failed(words)),
    }
}

/// For what parses untrusted bytes.
fn without_our_rights() -> Rights<'static> {
    if Privilege::of_this_process().is_root() { Rights::Of(NOBODY) } else { Rights::SystemOnly }
}

fn check_absolute(path: &Path) -> Result<(), String> {
    if path.is_absolute() {
        Ok(())
    } else {
        Err(format!("{} is not an absolute path; give the full path", path.display()))
    }
}

/// A memory file as long as the image that holds only what the inspector read, and that nobody can change any more.
fn sealed_metadata(file: &File, examined: &Examined) -> io::Result<File> {
    let copy = File::from(memfd_create("image-metadata", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    copy.set_len(file.metadata()?.len())?;
    let mut buffer = vec![0u8; 256 << 10];
    for range in &examined.metadata {
        let mut at = range.start;
        while at < range.end {
            let most = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(buffer.len());
            let chunk = &mut buffer[..most];
            file.read_exact_at(chunk, at)?;
            copy.write_all_at(chunk, at)?;
            at += most as u64;
        }
    }
    fcntl(
        &copy,
        FcntlArg::F_ADD_SEALS(
            SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL,
        ),
    )?;
    Ok(copy)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qemu_img(arguments: &[&str]) {
        let status = Command::new("qemu-img").args(arguments).status().unwrap();
        assert!(status.success());
    }

    #[test]
    fn a_file_that_only_root_can_read_is_described() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "3G"]);
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        let info = info(&path, Format::Qcow2).unwrap();
        assert_eq!(info.format, "qcow2");
        assert_eq!(info.virtual_size_bytes, 3 << 30);
        assert_eq!((info.backing_file.as_deref(), info.data_file(), info.encrypted), (None, None, false));
    }

    #[test]
    fn what_reads_untrusted_bytes_can_neither_open_our_files_nor_write_any() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        let secret = directory.path().join("secret");
        std::fs::write(&secret, b"secret").unwrap();
        std::fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        let mut read = Command::new("cat");
        read.arg(&secret).stdin(Stdio::null());
        let error = cage::run(read, cage::Limits::reading(), Rights::Of(NOBODY)).unwrap_err();
        assert!(error.contains("Permission denied"), "{error}");
        let mut write = Command::new("dd");
        write.arg("if=/dev/zero").arg(format!("of={}", directory.path().join("new").display())).arg("count=1");
        assert!(cage::run(write, cage::Limits::reading(), Rights::Of(NOBODY)).is_err());
        assert_eq!(std::fs::metadata(directory.path().join("new")).map_or(0, |new| new.len()), 0);
    }

    #[test]
    fn without_root_it_can_open_no_file_of_ours_either_but_describes_the_image() {
        if Rights::SystemOnly.ruleset().unwrap().is_none() {
            eprintln!("not proven: this kernel has no landlock");
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let (secret, new) = (directory.path().join("secret"), directory.path().join("new"));
        std::fs::write(&secret, b"secret").unwrap();
        let caged = |program: &str, argument: &Path| {
            let mut command = Command::new(program);
            command.arg(argument).stdin(Stdio::null());
            cage::run(command, cage::Limits::reading(), Rights::SystemOnly)
        };
        let error = caged("cat", &secret).unwrap_err();
        assert!(error.contains("Permission denied"), "{error}");
        assert!(caged("touch", &new).is_err() && !new.exists());

        let image = directory.path().join("image");
        qemu_img(&["create", "-q", "-f", "qcow2", image.to_str().unwrap(), "3G"]);
        let info = describe(&File::open(&image).unwrap(), Format::Qcow2, Rights::SystemOnly).unwrap();
        assert_eq!(info.virtual_size_bytes, 3 << 30);
    }

    #[test]
    fn a_raw_file_has_the_size_that_qemu_rounds_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        std::fs::write(&path, vec![7u8; 1000]).unwrap();
        assert_eq!(info(&path, Format::Raw).unwrap().virtual_size_bytes, 1024);
    }

    #[test]
    fn an_image_that_the_inspector_refuses_never_reaches_qemu_img() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        qemu_img(&[
            "create",
            "-q",
            "-u",
            "-f",
            "qcow2",
            "-F",
            "raw",
            "-b",
            "/etc/shadow",
            path.to_str().unwrap(),
            "1M",
        ]);
        let refusal = info(&path, Format::Qcow2).unwrap_err();
        assert!(refusal.contains("backing file"), "{refusal}");
    }

    #[test]
    fn relative_names_are_refused_before_qemu_takes_them_for_a_protocol() {
        let size = 1 << 20;
        for name in ["json:{\"driver\":\"raw\"}", "nbd:localhost:10809", "image"] {
            let name = Path::new(name);
            assert!(info(name, Format::Raw).unwrap_err().contains("absolute"));
            assert!(create_overlay(name, Path::new("/dev/null"), Format::Raw, size).unwrap_err().contains("absolute"));
            assert!(create_overlay(Path::new("/nowhere"), name, Format::Raw, size).unwrap_err().contains("absolute"));
        }
    }

    #[test]
    fn an_overlay_names_its_image_and_format_even_with_odd_letters_in_the_path() {
        let directory = tempfile::tempdir().unwrap();
        let odd = directory.path().join("json:a, b=c");
        std::fs::create_dir(&odd).unwrap();
        let (image, overlay) = (odd.join("image:1"), odd.join("disk,2"));
        std::fs::write(&image, vec![0u8; 4096]).unwrap();
        create_overlay(&overlay, &image, Format::Raw, 1 << 20).unwrap();
        let output =
            Command::new("qemu-img").args(["info", "--output=json", "-f", "qcow2"]).arg(&overlay).output().unwrap();
        let info: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(info["full-backing-filename"], image.to_str().unwrap());
        assert_eq!(info["backing-filename-format"], "raw");
        assert_eq!(info["virtual-size"], 1 << 20);
    }

    #[test]
    fn a_missing_image_makes_no_overlay() {
        let directory = tempfile::tempdir().unwrap();
        let overlay = directory.path().join("disk");
        let error = create_overlay(&overlay, &directory.path().join("image"), Format::Raw, 1 << 20).unwrap_err();
        assert!(error.contains("cannot use the image"), "{error}");
        assert!(!overlay.exists());
    }
}
