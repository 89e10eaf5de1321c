//! What `qemu-img` does for volumes. It has the rights to the very files that it works on and to no others, where the
//! kernel has landlock(7): what a guest wrote into its disk, or somebody into a file that he gave to us, opens nothing else.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};

use super::rights::Rights;
use super::{QemuInfo, cage, check_absolute};
use crate::image::Format;

/// Why there is no copy.
#[derive(Debug, PartialEq, Eq)]
pub enum ConvertFailure {
    /// Given up on request.
    Cancelled,
    /// A sentence.
    Failed(String),
}

/// Makes an empty qcow2 disk of `size_bytes` in the empty file `file`, which lies at `path`, absolute. Errors are sentences.
pub fn create(file: &File, path: &Path, size_bytes: u64) -> Result<(), String> {
    check_absolute(path)?;
    let mut command = Command::new("qemu-img");
    command
        .args(["create", "-q", "-f", Format::Qcow2.word(), "--"])
        .arg(path)
        .arg(size_bytes.to_string())
        .stdin(Stdio::null());
    let rights = Rights::Files { read: None, write: Some(file.as_fd()) };
    cage::run(command, cage::Limits::creating(), rights).map(|_nothing_said| ())
}

/// The size that a guest sees of the disk in the open file, which lies at `path`, absolute, whoever uses it. Nothing but its
/// header is read, and no other file. Errors are sentences.
pub fn volume_size(file: &File, path: &Path, format: Format) -> Result<u64, String> {
    check_absolute(path)?;
    let mut command = Command::new("qemu-img");
    command.args(["info", "--output=json", "-U", "-f", format.word(), "--"]).arg(path).stdin(Stdio::null());
    let rights = Rights::Files { read: Some(file.as_fd()), write: None };
    let output = cage::run(command, cage::Limits::reading(), rights)?;
    let info: QemuInfo = serde_json::from_slice(&output)
        .map_err(|error| format!("qemu-img info answered something else than expected: {error}"))?;
    match (info.backing_file.as_deref(), info.data_file()) {
        (None, None) => Ok(info.virtual_size_bytes),
        (Some(other), _) | (None, Some(other)) => Err(format!("it needs another file, {other}")),
    }
}

/// One end of a copy: the open file, and the absolute path where it lies.
#[derive(Clone, Copy)]
pub struct End<'a> {
    /// The file.
    pub file: &'a File,
    /// Its path.
    pub path: &'a Path,
    /// Its format.
    pub format: Format,
}

/// Copies all that a guest would see of one disk, which nobody writes to, into another, empty file. `watch` is told how far it
/// is, in percent, and says whether to go on.
pub fn convert(from: End<'_>, to: End<'_>, watch: &dyn Fn(u8) -> bool) -> Result<(), ConvertFailure> {
    for end in [from, to] {
        check_absolute(end.path).map_err(ConvertFailure::Failed)?;
    }
    let mut command = Command::new("qemu-img");
    command
        .args(["convert", "-p", "-f", from.format.word(), "-O", to.format.word(), "--"])
        .args([from.path, to.path])
        .stdin(Stdio::null());
    let rights = Rights::Files { read: Some(from.file.as_fd()), write: Some(to.file.as_fd()) };
    let cancelled = |output: &[u8]| !watch(progress(output));
    match cage::run_to_end(command, cage::Limits::copying(), rights, &cancelled) {
        Ok(ended) if ended.status.success() => Ok(()),
        Ok(ended) => Err(ConvertFailure::Failed(ended.words())),
        Err(_) if !watch(0) => Err(ConvertFailure::Cancelled),
        Err(words) => Err(ConvertFailure::Failed(words)),
    }
}

/// The last number of `    (12.34/100%)\r    (13.35/100%)\r`, in whole percent; 0 before the first.
fn progress(output: &[u8]) -> u8 {
    let text = String::from_utf8_lossy(output);
    let last = text.rsplit('(').find_map(|part| part.split_once("/100%")?.0.parse::<f64>().ok());
    last.unwrap_or(0.0).clamp(0.0, 100.0) as u8
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn progress_is_the_last_whole_number_that_was_said() {
        assert_eq!(progress(b""), 0);
        assert_eq!(progress(b"    (0.00/100%)\r    (12.90/100%)\r    (13.9"), 12);
        assert_eq!(progress(b"    (100.00/100%)\r"), 100);
        assert_eq!(progress(b"words"), 0);
    }

    #[test]
    fn a_disk_that_names_another_file_does_not_get_its_content() {
        if Rights::SystemOnly.ruleset().unwrap().is_none() {
            eprintln!("not proven: this kernel has no landlock");
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let [secret, source, target] = ["secret", "source", "target"].map(|name| directory.path().join(name));
        fs::write(&secret, vec![b's'; 1 << 16]).unwrap();
        let status = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
            .args([&secret, &source])
            .status();
        assert!(status.unwrap().success());
        let (from, to) = (File::open(&source).unwrap(), File::create(&target).unwrap());
        let end = |file, path, format| End { file, path, format };
        let copied =
            convert(end(&from, &source, Format::Qcow2), end(&to, &target, Format::Raw), &|_percent| true).unwrap_err();
        let ConvertFailure::Failed(words) = copied else { panic!("{copied:?}") };
        assert!(words.contains("Permission denied"), "{words}");
        assert_eq!(fs::metadata(&target).unwrap().len(), 0);
        assert!(volume_size(&from, &source, Format::Qcow2).unwrap_err().contains("another file"));
    }
}
