//! Prepares libvirt's QEMU driver inside our own process (`qemu:///embed?root=STATE/libvirt`): its directory, its
//! `qemu.conf`, and what has to be true on the host for its guests to start.

use std::fs::{self, DirBuilder};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::unistd::{Gid, User, getgrouplist};
use openssl::sha::sha256;
use uuid::Uuid;

use crate::hypervisor::definition::Profile;
use crate::privilege::Privilege;

/// Users that distributions run QEMU as, most common first.
const QEMU_USERS: [&str; 2] = ["libvirt-qemu", "qemu"];
/// `machine-id(5)`, and what the firmware says.
const HOST_UUID_FILES: [&str; 2] = ["/etc/machine-id", "/sys/class/dmi/id/product_uuid"];
/// `sun_path` in `unix(7)`, without its null byte.
const SOCKET_PATH_MAX: usize = 107;
/// The longest socket below the root: libvirt shortens the domain's name to 20 characters; six digits of domain id are
/// more starts than a process sees. A name of longer characters may still be refused by libvirt at its start.
const LONGEST_SOCKET: &str = "/lib/qemu/domain-999999-abcdefghijklmnopqrst/monitor.sock";
/// A new one at each boot of the host (`random(4)`).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// libvirt's note below the root that it has started what is to be started with the host.
const AUTOSTARTED: &str = "run/qemu/autostarted";
const MARK: &str = "# Written by instancefs. An edited file is never overwritten. sha256:";

/// Makes the directory and `etc/qemu.conf` in it, and checks the host. May be repeated. Returns the user that guests run
/// as, if that is another one than ours, and known: an edited configuration is not read.
///
/// # Errors
///
/// One sentence that says what is missing and what to do about it.
pub fn prepare(root: &Path) -> Result<Option<User>, String> {
    check_length(root)?;
    let profile = usual_profile();
    if !profile.emulator.exists() {
        return Err(format!(
            "{} is missing: install QEMU (Debian: apt install qemu-system-x86), or connect to a libvirt daemon \
             (--connect)",
            profile.emulator.display()
        ));
    }
    let user = if Privilege::of_this_process().is_root() { Some(unprivileged_user()?) } else { None };
    let etc = root.join("etc");
    make_directory(root)
        .and_then(|()| make_directory(&etc))
        .and_then(|()| make_directory(&agent_sockets(root)))
        .map_err(|error| format!("cannot make {}: {error}", etc.display()))?;
    forget_earlier_boot(root, BOOT_ID)
        .map_err(|error| format!("cannot prepare {} for this boot: {error}", root.display()))?;
    let conf = etc.join("qemu.conf");
    let ours = write_configuration(&conf, user.as_ref())
        .map_err(|error| format!("cannot write {}: {error}", conf.display()))?;
    match user {
        Some(user) if ours => check_reachable(root, &user).map(|()| Some(user)),
        Some(_) | None => Ok(None),
    }
}

/// libvirt expects its note on a file system that a boot empties. Ours stays, so the note of an earlier boot is removed
/// here, or nothing would ever be started with the host again. It holds nothing, and libvirt alone writes it.
fn forget_earlier_boot(root: &Path, boot_id: &str) -> io::Result<()> {
    let present = fs::read_to_string(boot_id)?;
    let record = root.join("boot_id");
    match fs::read_to_string(&record) {
        Ok(recorded) if recorded == present => return Ok(()),
        Ok(_) => match fs::remove_file(root.join(AUTOSTARTED)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let new = root.join("boot_id.new");
    fs::write(&new, present)?;
    fs::rename(new, record)
}

/// Where the sockets of guest agents lie. libvirt's own place has the domain's name in it, on top of a longer path, and
/// leaves too little of a socket's 107 bytes for the root.
pub(super) fn agent_sockets(root: &Path) -> PathBuf {
    root.join("agent")
}

/// This host. libvirt makes up a new UUID for each process where the firmware has none, so it is not asked. Nil if the
/// host has no identity: then it cannot be told from another.
pub(super) fn host_uuid() -> Uuid {
    let known = |file: &&str| Uuid::parse_str(fs::read_to_string(file).ok()?.trim()).ok();
    HOST_UUID_FILES.iter().find_map(known).unwrap_or_default()
}

/// What QEMU looks like on this host when libvirt does not say.
pub fn usual_profile() -> Profile {
    let architecture = std::env::consts::ARCH.to_owned();
    let machine = match architecture.as_str() {
        "x86_64" => "pc",
        "s390x" => "s390-ccw-virtio",
        "powerpc64" => "pseries",
        _ => "virt",
    };
    let emulator = PathBuf::from(format!("/usr/bin/qemu-system-{architecture}"));
    let red_hat = PathBuf::from("/usr/libexec/qemu-kvm");
    Profile {
        emulator: if !emulator.exists() && red_hat.exists() { red_hat } else { emulator },
        machine: machine.to_owned(),
        architecture,
        agent_sockets: None,
    }
}

/// The user that guests run as when we are root.
///
/// # Errors
///
/// One sentence, if this host has none.
pub fn unprivileged_user() -> Result<User, String> {
    QEMU_USERS.iter().find_map(|name| User::from_name(name).ok().flatten()).ok_or_else(|| {
        format!(
            "guests must not run as root, and there is no user {}: install libvirt's QEMU driver (Debian: apt \
                 install libvirt-daemon), or connect to a libvirt daemon (--connect)",
            QEMU_USERS.join(" or ")
        )
    })
}

/// By how many bytes the path is too long for libvirt's sockets below it.
pub(super) fn excess_length(root: &Path) -> usize {
    root.as_os_str().len().saturating_sub(SOCKET_PATH_MAX - LONGEST_SOCKET.len())
}

fn check_length(root: &Path) -> Result<(), String> {
    match excess_length(root) {
        0 => Ok(()),
        excess => Err(format!(
            "{} is a path {excess} bytes too long for the sockets that libvirt makes in it: use a shorter one",
            root.display()
        )),
    }
}

/// Others may pass through (QEMU runs as another user) but not look.
pub(super) fn make_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o711).create(path)
}

/// The configuration's text. No cgroups, namespaces or virtlogd: our process is no system service. Guests are kept apart
/// by their own user, by file ownership and by seccomp.
fn configuration(user: Option<(&str, &str)>) -> String {
    let identity = user.map_or_else(String::new, |(user, group)| {
        format!("user = \"{user}\"\ngroup = \"{group}\"\ndynamic_ownership = 1\n")
    });
    let body = format!(
        "{identity}remember_owner = 0\nseccomp_sandbox = 1\nsecurity_driver = \"none\"\nstdio_handler = \"file\"\n\
         namespaces = []\ncgroup_controllers = []\n"
    );
    format!("{MARK}{}\n{body}", digest(&body))
}

fn digest(text: &str) -> String {
    sha256(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The file is as some version of us wrote it.
fn is_unedited(text: &str) -> bool {
    text.strip_prefix(MARK).and_then(|rest| rest.split_once('\n')).is_some_and(|(sum, body)| digest(body) == sum)
}

/// Writes the configuration unless an administrator has edited it; says whether it is ours.
fn write_configuration(path: &Path, user: Option<&User>) -> io::Result<bool> {
    let group = match user {
        Some(user) => {
            nix::unistd::Group::from_gid(user.gid)?.map_or_else(|| format!("+{}", user.gid), |group| group.name)
        }
        None => String::new(),
    };
    let text = configuration(user.map(|user| (user.name.as_str(), group.as_str())));
    match fs::read_to_string(path) {
        Ok(present) if present == text => return Ok(true),
        Ok(present) if !is_unedited(&present) => {
            log::info!("{} was edited and stays as it is", path.display());
            return Ok(false);
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let new = path.with_extension("conf.new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    Ok(true)
}

/// QEMU's user must be able to pass through every directory down to the root.
fn check_reachable(root: &Path, user: &User) -> Result<(), String> {
    match closed_to(root, user)? {
        None => Ok(()),
        Some(directory) => Err(format!(
            "guests run as {}, who may not pass through {}: run {}, or use another state directory",
            user.name,
            directory.display(),
            opening(directory),
        )),
    }
}

/// The first directory on the way down to `path` through which the user may not pass.
///
/// # Errors
///
/// One sentence, if a directory cannot be looked at.
pub fn closed_to<'a>(path: &'a Path, user: &User) -> Result<Option<&'a Path>, String> {
    let groups = groups_of(user);
    let mut ancestors: Vec<_> = path.ancestors().collect();
    ancestors.reverse();
    for directory in ancestors {
        let metadata =
            fs::metadata(directory).map_err(|error| format!("cannot look at {}: {error}", directory.display()))?;
        let allowed = has_bits(0o1, &metadata, user, &groups);
        // The mode does not show an access control list, so a directory is refused only if a process is refused too.
        if !allowed && !enters(directory, user) {
            return Ok(Some(directory));
        }
    }
    Ok(None)
}

/// The command that lets others pass through a directory.
pub fn opening(directory: &Path) -> String {
    format!("chmod o+x {}", shell_quoted(directory))
}

fn shell_quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
}

fn groups_of(user: &User) -> Vec<Gid> {
    std::ffi::CString::new(user.name.as_str())
        .ok()
        .and_then(|name| getgrouplist(&name, user.gid).ok())
        .unwrap_or_else(|| vec![user.gid])
}

/// The mode gives the user all of `wanted` (read 4, write 2, execute 1).
fn has_bits(wanted: u32, metadata: &fs::Metadata, user: &User, groups: &[Gid]) -> bool {
    let shift = class_shift(metadata.uid(), metadata.gid(), user, groups);
    (metadata.mode() >> shift) & wanted == wanted
}

/// How far the bits of the user's class lie from the right: the owner's bits bind the owner, the group's its members.
fn class_shift(owner: u32, group: u32, user: &User, groups: &[Gid]) -> u32 {
    if owner == user.uid.as_raw() {
        6
    } else if groups.iter().any(|gid| gid.as_raw() == group) {
        3
    } else {
        0
    }
}

/// KVM is there, but that user may not open it.
pub(super) fn is_kvm_closed(user: &User) -> bool {
    fs::metadata(super::accelerator::DEVICE).is_ok_and(|metadata| !has_bits(0o6, &metadata, user, &groups_of(user)))
}

/// A process of that user may search the directory.
fn enters(directory: &Path, user: &User) -> bool {
    Command::new("/usr/bin/test")
        .arg("-x")
        .arg(directory)
        .uid(user.uid.as_raw())
        .gid(user.gid.as_raw())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn user() -> User {
        User {
            name: "guest".to_owned(),
            passwd: c"".to_owned(),
            uid: 64055.into(),
            gid: 107.into(),
            gecos: c"".to_owned(),
            dir: PathBuf::new(),
            shell: PathBuf::new(),
        }
    }

    #[test]
    fn a_root_too_long_for_a_socket_is_refused_with_the_excess() {
        let error = check_length(Path::new(&format!("/{}", "d".repeat(60)))).unwrap_err();
        assert!(error.contains("11 bytes too long"), "{error}");
        assert!(check_length(Path::new("/var/lib/instancefs/libvirt")).is_ok());
    }

    #[test]
    fn the_class_of_the_user_decides_and_not_the_widest() {
        let groups = [Gid::from_raw(107), Gid::from_raw(64055)];
        let shift = |owner, group| class_shift(owner, group, &user(), &groups);
        assert_eq!(shift(0, 0), 0);
        assert_eq!(shift(0, 107), 3);
        assert_eq!(shift(0, 64055), 3);
        assert_eq!(shift(64055, 107), 6);
    }

    #[test]
    fn an_edited_configuration_is_never_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let conf = directory.path().join("qemu.conf");
        assert!(write_configuration(&conf, None).unwrap());
        let written = fs::read_to_string(&conf).unwrap();
        assert!(is_unedited(&written));

        let edited = written.replace("seccomp_sandbox = 1", "seccomp_sandbox = 0");
        fs::write(&conf, &edited).unwrap();
        assert!(!write_configuration(&conf, None).unwrap());
        assert_eq!(fs::read_to_string(&conf).unwrap(), edited);
    }

    #[test]
    fn an_unedited_configuration_of_another_version_is_brought_up_to_date() {
        let directory = tempfile::tempdir().unwrap();
        let conf = directory.path().join("qemu.conf");
        let body = "user = \"nobody\"\n";
        fs::write(&conf, format!("{MARK}{}\n{body}", digest(body))).unwrap();
        assert!(write_configuration(&conf, None).unwrap());
        assert_eq!(fs::read_to_string(&conf).unwrap(), configuration(None));
    }

    #[test]
    fn guests_are_started_with_the_host_again_after_each_boot_and_not_before() {
        let root = tempfile::tempdir().unwrap();
        let (boot, note) = (root.path().join("kernel"), root.path().join(AUTOSTARTED));
        fs::create_dir_all(note.parent().unwrap()).unwrap();
        let forget = |id: &str| {
            fs::write(&boot, id).unwrap();
            forget_earlier_boot(root.path(), boot.to_str().unwrap()).unwrap();
        };
        // A root that was used before this was recorded: which boot its note is of is not known.
        fs::write(&note, "").unwrap();
        forget("one");
        forget("one");
        assert!(note.exists());
        forget("two");
        assert!(!note.exists());
        forget("three");
    }

    #[test]
    fn a_closed_directory_on_the_way_is_named_with_its_remedy() {
        if !Privilege::of_this_process().is_root() {
            eprintln!("not proven: only root can become another user");
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let closed = fs::Permissions::from_mode(0o700);
        fs::set_permissions(directory.path(), closed).unwrap();
        let root = directory.path().join("libvirt");
        make_directory(&root).unwrap();
        let error = check_reachable(&root, &user()).unwrap_err();
        let remedy = format!("chmod o+x '{}'", directory.path().display());
        assert!(error.contains(&remedy), "{error}");
    }
}
