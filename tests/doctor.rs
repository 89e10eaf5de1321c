//! `instancefs doctor` in worlds that are broken on purpose.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;
use support::Daemon;
use tempfile::TempDir;

/// Somebody without any rights.
const STRANGER: u32 = 64_999;

/// A place that QEMU's user can reach, as `/var/lib` is.
fn place() -> TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("permissions");
    directory
}

/// What doctor said: level, what, finding, advice.
struct Findings(Vec<[String; 4]>);

impl Findings {
    /// The one finding about `what` that says `part`.
    fn about(&self, what: &str, part: &str) -> [&str; 2] {
        let mut found = self.0.iter().filter(|[_, subject, finding, _]| subject == what && finding.contains(part));
        let Some([level, _, _, advice]) = found.next() else { panic!("nothing about {what}, {part}: {:#?}", self.0) };
        assert!(found.next().is_none(), "said twice: {what}, {part}: {:#?}", self.0);
        [level, advice]
    }

    #[track_caller]
    fn fails(&self, what: &str, part: &str, advice: &str) {
        let [level, advised] = self.about(what, part);
        assert!(level == "fail" && advised.contains(advice), "{level}: {advised}");
    }

    #[track_caller]
    fn warns(&self, what: &str, part: &str, advice: &str) {
        let [level, advised] = self.about(what, part);
        assert!(level == "warn" && advised.contains(advice), "{level}: {advised}");
    }

    #[track_caller]
    fn is_ok(&self, what: &str, part: &str) {
        assert_eq!(self.about(what, part), ["ok", ""]);
    }
}

/// A doctor that tries no KVM, which is not what these tests are about.
fn doctor(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.arg("doctor").env("INSTANCEFS_ACCELERATOR", "tcg");
    command
}

fn ask(command: &mut Command) -> Findings {
    let output = command.arg("--json").output().expect("it runs");
    let stdout = String::from_utf8(output.stdout).expect("UTF-8");
    let findings = stdout.lines().map(|line| {
        let line: Value = serde_json::from_str(line).expect("JSON");
        ["level", "what", "finding", "advice"].map(|key| line[key].as_str().expect(key).to_owned())
    });
    let findings: Vec<[String; 4]> = findings.collect();
    assert!(!findings.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    for [level, what, finding, advice] in &findings {
        assert_eq!(advice.is_empty(), level == "ok", "{what}: {finding}: what is bad needs advice, and nothing else");
    }
    let is_bad = findings.iter().any(|[level, ..]| level == "fail");
    assert_eq!(output.status.code(), Some(i32::from(is_bad)), "{findings:#?}");
    Findings(findings)
}

fn examine(state: &Path, arguments: &[&str]) -> Findings {
    ask(doctor(Path::new(env!("CARGO_BIN_EXE_instancefs"))).arg("--state-dir").arg(state).args(arguments))
}

/// Every file below a directory.
fn content(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = fs::read_dir(directory).expect("listed").map(|entry| entry.expect("an entry").path());
    entries
        .flat_map(|path| match path.is_dir() {
            true => content(&path),
            false => BTreeMap::from([(path.clone(), fs::read(&path).unwrap_or_default())]),
        })
        .collect()
}

#[test]
fn a_good_world_is_ok_and_stays_as_it_was() {
    let place = place();
    let findings = examine(&place.path().join("state"), &["--connect", "test:///default"]);
    findings.is_ok("rights", "root");
    findings.is_ok("/dev/fuse", "can be opened");
    findings.is_ok("state directory", "does not exist and will be made");
    findings.is_ok("hard links", "can be made");
    findings.is_ok("connection", "test:///default, as asked for");
    findings.is_ok("libvirt daemon", "test:///default answers");
    findings.is_ok("qemu-img", " is ");
    assert_eq!(place.path().read_dir().expect("listed").count(), 0, "something was left behind");
}

#[test]
fn each_finding_is_a_line_and_its_advice_an_indented_one() {
    let place = place();
    let mut command = doctor(Path::new(env!("CARGO_BIN_EXE_instancefs")));
    command.args(["--connect", "test:///default", "--state-dir"]).arg(place.path().join("a/b"));
    let output = command.output().expect("it runs");
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let mut lines = text.lines().skip_while(|line| !line.starts_with("fail  state directory: "));
    assert!(lines.next().is_some_and(|line| line.contains("does not exist")), "{text}");
    let advice = format!("      mkdir -p '{}'", place.path().join("a").display());
    assert!(lines.next().is_some_and(|line| line.starts_with(&advice)), "{text}");
}

#[test]
fn missing_tools_are_named_with_their_packages() {
    let (place, empty) = (place(), place());
    let mut command = doctor(Path::new(env!("CARGO_BIN_EXE_instancefs")));
    command.args(["--connect", "test:///default", "--state-dir"]).arg(place.path().join("state"));
    let findings = ask(command.env("PATH", empty.path()));
    findings.fails("qemu-img", "not in PATH", "apt install qemu-utils");
    findings.warns("ISO tool", "there is none", "apt install xorriso");
}

#[test]
fn a_closed_directory_above_the_disks_is_named_with_its_remedy() {
    let place = place();
    let closed = place.path().join("closed");
    fs::create_dir(&closed).expect("a directory");
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).expect("permissions");
    let findings = examine(&closed.join("state"), &["--connect", "test:///default"]);
    let remedy = format!("chmod o+x '{}'", closed.display());
    findings.fails("way to the disks", &closed.display().to_string(), &remedy);
}

#[test]
fn a_state_directory_that_mount_would_refuse_is_refused() {
    let place = place();
    let open = place.path().join("open");
    fs::create_dir(&open).expect("a directory");
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).expect("permissions");
    let remedy = format!("chmod go-w '{}'", open.display());
    examine(&open, &["--connect", "test:///default"]).fails("state directory", "mode 0777", &remedy);

    fs::write(place.path().join("photos"), "dear").expect("written");
    let findings = examine(place.path(), &["--connect", "test:///default"]);
    findings.fails("state directory", "is not empty", "--state-dir");
    let findings = examine(&place.path().join("photos"), &["--connect", "test:///default"]);
    findings.fails("state directory", "is not a directory", "--state-dir");
}

#[test]
fn an_unknown_key_of_the_configuration_is_named_with_its_line() {
    let place = place();
    let file = place.path().join("instancefs.toml");
    fs::write(&file, "settle = '3s'\nacess_group = 'x'\n").expect("written");
    let findings = examine(
        &place.path().join("state"),
        &["--connect", "test:///default", "--config", &file.display().to_string()],
    );
    findings.fails("configuration", "line 2: unknown field `acess_group`", "correct it");
}

#[test]
fn groups_that_the_configuration_names_have_to_exist() {
    let place = place();
    let file = place.path().join("instancefs.toml");
    fs::write(&file, "access_group = 'ghosts'\nadmin_group = 'adm'\nprojects = ['adm', 'spooks']\n").expect("written");
    let findings = examine(
        &place.path().join("state"),
        &["--connect", "test:///default", "--config", &file.display().to_string()],
    );
    findings.fails("group", "ghosts does not exist", "groupadd ghosts");
    findings.fails("group", "spooks does not exist", "groupadd spooks");
    findings.is_ok("group", "adm exists (a project)");
}

#[test]
fn a_libvirtd_that_hangs_does_not_hang_doctor() {
    let place = place();
    let path = place.path().join("sock");
    // It takes connections into its queue and never looks at them.
    let _socket = UnixListener::bind(&path).expect("a socket");
    for uri in [format!("qemu+unix:///system?socket={}", path.display()), path.display().to_string()] {
        let findings = examine(&place.path().join("state"), &["--connect", &uri]);
        findings.fails("libvirt daemon", "hangs", "systemctl restart libvirtd");
    }
}

#[test]
fn a_libvirtd_that_is_not_there_is_said() {
    let place = place();
    let path = place.path().join("sock").display().to_string();
    let findings = examine(&place.path().join("state"), &["--connect", &path]);
    findings.fails("libvirt daemon", "refuses", "--connect embed");
    examine(&place.path().join("state"), &["--connect", "nonsense"]).fails("connection", "'nonsense'", "--connect");
}

#[test]
fn a_path_too_long_for_sockets_is_said() {
    let place = place();
    let state = place.path().join("d".repeat(60));
    examine(&state, &["--connect", "embed"]).fails("connection", "bytes too long for the sockets", "shorter");
}

/// A file system of its own.
struct Disk(TempDir);

impl Disk {
    fn new(size: &str) -> Disk {
        let directory = place();
        mount(Some("tmpfs"), directory.path(), Some("tmpfs"), MsFlags::empty(), Some(size))
            .expect("a small file system");
        Disk(directory)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_full_disk_fails_and_a_small_one_warns() {
    let disk = Disk::new("size=16m,mode=0755");
    let state = disk.0.path().join("state");
    let findings = examine(&state, &["--connect", "test:///default"]);
    findings.warns("free space", "16 MiB (100 %)", "du -xh");
    findings.warns("file system", "in memory", "--state-dir");
    fs::write(disk.0.path().join("filler"), vec![1; 15 << 20]).expect("written");
    let findings = examine(&state, &["--connect", "test:///default"]);
    findings.fails("free space", "the disk is full", "du -xh");
}

#[test]
fn a_daemon_and_its_mount_are_found_and_nothing_is_changed() {
    let mut daemon = Daemon::start(&[]);
    let state = daemon.state_directory();
    let connection = format!("simulated:{}", daemon.host().display());
    let root = daemon.root().display().to_string();
    let findings = examine(&state, &[]);
    findings.is_ok("state directory", &format!("served by the daemon {} on {root}", daemon.pid()));
    findings.is_ok("mount", &format!("{root} answers"));
    findings.is_ok("connection", &format!("{connection}, recorded at the first mount"));

    assert!(daemon.stop());
    let before = content(&state);
    let findings = examine(&state, &[]);
    findings.is_ok("state directory", "nobody uses it now");
    findings.is_ok("connection", &format!("{connection}, recorded at the first mount"));
    examine(&state, &["--connect", "test:///default"]).fails("connection", "belongs to", "mount it without --connect");
    assert_eq!(content(&state), before);
}

#[test]
fn a_mount_that_was_left_behind_is_named_with_its_remedy() {
    let mut daemon = Daemon::start(&[]);
    daemon.kill();
    let root = daemon.root().display().to_string();
    let findings = examine(&daemon.state_directory(), &[]);
    findings.fails("mount", &root, &format!("umount -l '{root}'"));
}

#[test]
fn a_state_directory_in_a_tree_is_refused() {
    let daemon = Daemon::start(&[]);
    let findings = examine(&daemon.path("images"), &["--connect", "test:///default"]);
    findings.fails("file system", "in a tree of instancefs itself", "--state-dir");
}

#[test]
fn an_ordinary_user_is_told_what_that_means() {
    let place = place();
    // The build's directory need not be open to others.
    let program = place.path().join("instancefs");
    fs::copy(env!("CARGO_BIN_EXE_instancefs"), &program).expect("copied");
    let home = place.path().join("home");
    fs::create_dir(&home).expect("a directory");
    std::os::unix::fs::chown(&home, Some(STRANGER), Some(STRANGER)).expect("chown");
    let mut command = doctor(&program);
    command.args(["--connect", "test:///default", "--state-dir"]).arg(home.join("state"));
    let findings = ask(command.uid(STRANGER).gid(STRANGER).current_dir("/"));
    findings.is_ok("rights", "an ordinary user");
    findings.is_ok("state directory", "will be made");
    findings.about("fusermount3", "");
    findings.about("/dev/fuse", "");

    let mut command = doctor(&program);
    command.args(["--connect", "test:///default", "--state-dir"]).arg(place.path().join("state"));
    let findings = ask(command.uid(STRANGER).gid(STRANGER).current_dir("/"));
    findings.fails("state directory", "may not make it", "mount as root");

    if fs::metadata("/dev/kvm").is_ok_and(|device| device.mode() & 0o006 == 0) {
        let mut command = doctor(&program);
        command.env_remove("INSTANCEFS_ACCELERATOR").args(["--connect", "test:///default", "--state-dir"]);
        let findings = ask(command.arg(home.join("state")).uid(STRANGER).gid(STRANGER).current_dir("/"));
        findings.warns("KVM", "you may not open /dev/kvm", "adduser");
    }
}
