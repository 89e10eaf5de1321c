//! Whether KVM really works here: found out by booting, since a `/dev/kvm` that opens proves nothing. There are machines
//! (nested ones above all) on which KVM starts a guest that then crawls or stops.
//!
//! The probe boots one sector of our own, through QEMU's firmware, which writes to the port of QEMU's `isa-debug-exit`
//! device. Only an exit through that port within [`LIMIT`] counts.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use super::embed;
use crate::hypervisor::Accelerator;
use crate::hypervisor::definition::Profile;
use crate::privilege::Privilege;

/// How long the boot sector may take.
pub const LIMIT: Duration = Duration::from_secs(5);
/// The environment variable that overrides the probe.
pub const VARIABLE: &str = "INSTANCEFS_ACCELERATOR";

const REMEMBERED: &str = "accelerator.json";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// The device of KVM.
pub const DEVICE: &str = "/dev/kvm";

const EXIT_PORT: u8 = 0xf4;
const EXIT_VALUE: u8 = 0x15;
/// `isa-debug-exit` ends QEMU with twice the value plus one.
const EXIT_CODE: i32 = EXIT_VALUE as i32 * 2 + 1;

/// The override of the environment, `None` if the variable is not set or empty.
///
/// # Errors
///
/// A sentence, if it is neither `kvm` nor `tcg`.
pub fn from_environment() -> Result<Option<Accelerator>, String> {
    match std::env::var_os(VARIABLE) {
        None => Ok(None),
        Some(value) => match value.to_str() {
            Some("") => Ok(None),
            Some("kvm") => Ok(Some(Accelerator::Kvm)),
            Some("tcg") => Ok(Some(Accelerator::Tcg)),
            _ => Err(format!("{VARIABLE} is {value:?}: write kvm or tcg, or unset it")),
        },
    }
}

/// Under which circumstances a finding stays true.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Circumstances {
    boot_id: String,
    emulator: PathBuf,
    emulator_mtime: i64,
    emulator_size: u64,
}

/// What the probe found out.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Finding {
    #[serde(flatten)]
    circumstances: Circumstances,
    accelerator: Accelerator,
}

/// What new guests run on. Takes up to [`LIMIT`] once per boot of this host and QEMU binary; the answer is kept in
/// `state_dir`. Without an answer it is emulation, which works everywhere.
pub fn probe_remembered(profile: &Profile, state_dir: &Path) -> Accelerator {
    if !Path::new(DEVICE).exists() {
        return Accelerator::Tcg;
    }
    if let Some(remedy) = closed_to_us() {
        // Not remembered: joining a group changes it.
        log::warn!("you may not open {DEVICE}, guests are emulated; {remedy}");
        return Accelerator::Tcg;
    }
    let path = state_dir.join(REMEMBERED);
    let circumstances = circumstances(&profile.emulator);
    if let (Ok(now), Some(before)) = (&circumstances, remembered(&path))
        && *now == before.circumstances
    {
        return before.accelerator;
    }
    let accelerator = match probe(profile, Accelerator::Kvm) {
        Ok(()) => Accelerator::Kvm,
        Err(reason) => {
            log::warn!("KVM does not work here, guests are emulated: {reason}");
            Accelerator::Tcg
        }
    };
    let kept = circumstances.and_then(|circumstances| remember(&path, &Finding { circumstances, accelerator }));
    if let Err(error) = kept {
        log::warn!("cannot remember the accelerator in {}: {error}", path.display());
    }
    accelerator
}

/// What opens [`DEVICE`] to an ordinary user; `None` if it is open, or we are root.
pub fn closed_to_us() -> Option<String> {
    let privilege = Privilege::of_this_process();
    let opened = File::options().read(true).write(true).open(DEVICE);
    let is_denied = opened.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied);
    let name = privilege.account().map_or_else(|| privilege.uid.to_string(), |user| user.name);
    (is_denied && !privilege.is_root()).then(|| {
        format!(
            "as root: adduser {name} kvm, and log in again (where udev does not do it: chgrp kvm {DEVICE} && chmod \
             0660 {DEVICE})"
        )
    })
}

fn circumstances(emulator: &Path) -> io::Result<Circumstances> {
    let metadata = fs::metadata(emulator)?;
    Ok(Circumstances {
        boot_id: fs::read_to_string(BOOT_ID)?.trim().to_owned(),
        emulator: emulator.to_path_buf(),
        emulator_mtime: metadata.mtime(),
        emulator_size: metadata.size(),
    })
}

fn remembered(path: &Path) -> Option<Finding> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn remember(path: &Path, finding: &Finding) -> io::Result<()> {
    let new = path.with_extension("json.new");
    fs::write(&new, serde_json::to_vec(finding)?)?;
    fs::rename(new, path)
}

/// Boots the sector with this accelerator.
///
/// # Errors
///
/// Why it did not reach its exit, in one sentence.
pub fn probe(profile: &Profile, accelerator: Accelerator) -> Result<(), String> {
    if !["x86_64", "i686"].contains(&profile.architecture.as_str()) {
        return Err(format!(
            "there is no probe for {}; set {VARIABLE}=kvm if you know that it works",
            profile.architecture
        ));
    }
    let disk = boot_disk().map_err(|error| format!("cannot make the probe's disk: {error}"))?;
    let mut child = Stopped(
        command(profile, accelerator, disk)
            .spawn()
            .map_err(|error| format!("cannot run {}: {error}", profile.emulator.display()))?,
    );
    match child.wait(LIMIT) {
        Ok(Some(status)) if status.code() == Some(EXIT_CODE) => Ok(()),
        Ok(Some(status)) => {
            Err(format!("the boot sector was not reached, QEMU ended with {}: {}", ending(status), child.last_words()))
        }
        Ok(None) => Err(format!("the boot sector was not reached within {} s", LIMIT.as_secs())),
        Err(error) => Err(format!("cannot wait for QEMU: {error}")),
    }
}

fn ending(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "no exit code".to_owned(),
    }
}

/// One sector in memory, so that QEMU's user can read it wherever the state directory is.
fn boot_disk() -> io::Result<File> {
    let mut disk = File::from(memfd_create("instancefs-probe", MFdFlags::MFD_CLOEXEC)?);
    disk.write_all(&boot_sector())?;
    disk.rewind()?;
    Ok(disk)
}

/// `mov al, EXIT_VALUE; out EXIT_PORT, al; forever: hlt; jmp forever`
fn boot_sector() -> [u8; 512] {
    let code = [0xb0, EXIT_VALUE, 0xe6, EXIT_PORT, 0xf4, 0xeb, 0xfd];
    let mut sector = [0; 512];
    sector[..code.len()].copy_from_slice(&code);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

fn command(profile: &Profile, accelerator: Accelerator, disk: File) -> Command {
    let mut command = Command::new(&profile.emulator);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-m", "16"]);
    command.args(["-machine", &profile.machine]);
    match accelerator {
        Accelerator::Kvm => command.args(["-accel", "kvm", "-cpu", "host"]),
        Accelerator::Tcg => command.args(["-accel", "tcg"]),
    };
    command.arg("-device");
    command.arg(format!("isa-debug-exit,iobase={EXIT_PORT:#x},iosize=4"));
    command.args(["-drive", "file=/dev/stdin,format=raw,if=ide,file.locking=off"]);
    command.stdin(disk).stdout(Stdio::null()).stderr(Stdio::piped()).current_dir("/");
    if Privilege::of_this_process().is_root()
        && let Ok(user) = embed::unprivileged_user()
    {
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
    }
    command
}

/// A child that does not outlive us.
struct Stopped(Child);

impl Stopped {
    /// Its end, `None` if it has not ended within the limit.
    fn wait(&mut self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.0.try_wait()? {
                return Ok(Some(status));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Stopped {
    /// The last line that it wrote to stderr; call it after its end.
    fn last_words(&mut self) -> String {
        let mut text = Vec::new();
        if let Some(stderr) = self.0.stderr.take() {
            let _ = stderr.take(64 * 1024).read_to_end(&mut text);
        }
        String::from_utf8_lossy(&text).lines().last().unwrap_or("it said nothing").to_owned()
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Emulation runs the very same probe, so a probe that says no to KVM says it of KVM.
    #[test]
    fn the_boot_sector_reaches_its_exit_under_emulation() {
        probe(&embed::usual_profile(), Accelerator::Tcg).unwrap();
    }

    #[test]
    fn an_emulator_that_ends_otherwise_proves_nothing() {
        let profile = Profile { emulator: PathBuf::from("/bin/true"), ..embed::usual_profile() };
        assert!(probe(&profile, Accelerator::Tcg).is_err());
    }

    #[test]
    fn a_finding_is_believed_until_the_emulator_changes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(REMEMBERED);
        let emulator = directory.path().join("qemu");
        fs::write(&emulator, "1").unwrap();
        let finding = Finding { circumstances: circumstances(&emulator).unwrap(), accelerator: Accelerator::Kvm };
        remember(&path, &finding).unwrap();
        assert_eq!(remembered(&path), Some(finding));

        fs::write(&emulator, "22").unwrap();
        let now = circumstances(&emulator).unwrap();
        assert_ne!(remembered(&path).unwrap().circumstances, now);
    }

    #[test]
    fn a_damaged_memory_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(REMEMBERED);
        fs::write(&path, "{\"accelerator\":").unwrap();
        assert_eq!(remembered(&path), None);
    }
}
