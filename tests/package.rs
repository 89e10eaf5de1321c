//! What the package installs beside the program: units that systemd takes, and a configuration that says what holds
//! anyway. `scripts/test-package` installs and removes the whole of it.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use instancefs::config::{ConfigError, Layer};

fn part(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/deb").join(name)
}

fn text(name: &str) -> String {
    fs::read_to_string(part(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The configuration with every key that is commented out.
fn uncommented() -> String {
    let is_key =
        |line: &str| line.split_once(" = ").is_some_and(|(key, _)| !key.contains(' ')) || line.starts_with('[');
    let lines = text("instancefs.toml");
    let keys = lines.lines().filter_map(|line| line.strip_prefix('#')).filter(|line| is_key(line));
    keys.map(|line| format!("{line}\n")).collect()
}

fn layer(text: &str) -> Result<Layer, ConfigError> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("instancefs.toml");
    fs::write(&path, text).expect("written");
    Layer::from_file(Some(&path))
}

/// The keys that a configuration can have, in the words of the refusal of one that it cannot.
fn known_keys() -> BTreeSet<String> {
    let refusal = layer("no_such_key = 1").expect_err("there is no such key").to_string();
    let (_, expected) = refusal.split_once("expected").expect("it names those that there are");
    expected.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn the_packaged_configuration_names_every_key() {
    let named: toml::Table = uncommented().parse().expect("TOML");
    let named: BTreeSet<_> = named.keys().cloned().collect();
    assert!(named.contains("state_dir"));
    assert_eq!(named, known_keys());
}

#[test]
fn what_the_packaged_configuration_calls_a_default_is_one() {
    assert_eq!(layer(&text("instancefs.toml")).expect("it is understood"), Layer::default());
    let said = layer(&uncommented()).expect("every default is understood").resolve().expect("and can be used");
    assert_eq!(said, Layer::default().resolve().expect("the defaults"));
}

/// The values of a unit's keys, in order.
fn values(unit: &str, key: &str) -> Vec<String> {
    let prefix = format!("{key}=");
    text(unit).lines().filter_map(|line| line.strip_prefix(&prefix)).map(str::to_owned).collect()
}

#[test]
fn systemd_understands_the_units() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let program = directory.path().join("instancefs");
    symlink(env!("CARGO_BIN_EXE_instancefs"), &program).expect("a link");
    let units = ["instancefs.service", "instancefs-metrics.service", "instancefs-metrics.timer"];
    let paths = units.map(|unit| {
        let path = directory.path().join(unit);
        let here = text(unit).replace("/usr/bin/instancefs", program.to_str().expect("UTF-8"));
        fs::write(&path, here).expect("written");
        path
    });
    let verify = Command::new("systemd-analyze").args(["verify", "--man=no"]).args(&paths).output();
    let verify = verify.expect("systemd-analyze runs (package systemd)");
    let said = String::from_utf8_lossy(&verify.stderr);
    // What other units of this machine lack is not ours to judge.
    let ours: Vec<_> = said.lines().filter(|line| line.contains("instancefs")).collect();
    assert!(ours.is_empty(), "{said}");
    for (unit, most) in [("instancefs.service", "90"), ("instancefs-metrics.service", "70")] {
        let path = directory.path().join(unit);
        let security = Command::new("systemd-analyze")
            .args(["security", "--offline=true", "--no-pager", &format!("--threshold={most}")])
            .arg(path)
            .output()
            .expect("systemd-analyze runs");
        let table = String::from_utf8_lossy(&security.stdout);
        assert!(security.status.success(), "{unit} is more exposed than it was: {table}");
    }
}

/// With any of these systemd gives a service a mount namespace of its own: systemd.exec(5).
const MAKES_A_MOUNT_NAMESPACE: [&str; 30] = [
    "BindPaths",
    "BindReadOnlyPaths",
    "CacheDirectory",
    "ConfigurationDirectory",
    "DynamicUser",
    "ExecPaths",
    "ExtensionDirectories",
    "ExtensionImages",
    "InaccessiblePaths",
    "LogNamespace",
    "MountFlags",
    "MountImages",
    "NoExecPaths",
    "PrivateDevices",
    "PrivateIPC",
    "PrivateMounts",
    "PrivateTmp",
    "ProcSubset",
    "ProtectControlGroups",
    "ProtectHome",
    "ProtectKernelLogs",
    "ProtectKernelModules",
    "ProtectKernelTunables",
    "ProtectProc",
    "ProtectSystem",
    "ReadOnlyPaths",
    "ReadWritePaths",
    "RootDirectory",
    "RootImage",
    "TemporaryFileSystem",
];

#[test]
fn the_service_sees_the_mounts_of_the_host_and_leaves_its_guests_alone() {
    let unit = text("instancefs.service");
    for key in MAKES_A_MOUNT_NAMESPACE {
        assert!(values("instancefs.service", key).is_empty(), "{key} would hide the tree and the disks of guests");
    }
    assert_eq!(values("instancefs.service", "KillMode"), ["process"], "{unit}");
    assert_eq!(values("instancefs.service", "OOMPolicy"), ["continue"]);
    for (key, breaks) in [
        ("NoNewPrivileges", "AppArmor's profiles of guests"),
        ("MemoryDenyWriteExecute", "emulation"),
        ("RestrictNamespaces", "libvirt's namespaces of guests"),
        ("RestrictRealtime", "real-time processors"),
    ] {
        assert!(values("instancefs.service", key).is_empty(), "{key} breaks {breaks}");
    }
}

#[test]
fn nothing_that_the_package_does_removes_what_holds_data() {
    for script in ["postinst", "prerm", "postrm"] {
        for line in text(script).lines().filter(|line| !line.trim_start().starts_with('#')) {
            let removes = ["rm ", "rmdir ", "find ", "unlink "].iter().any(|word| line.contains(word));
            assert!(!removes || !line.contains("/var") && !line.contains("$state") && !line.contains("-r"), "{line}");
        }
    }
    assert!(text("tmpfiles.conf").lines().any(|line| line == "x /var/lib/instancefs"));
    assert!(values("instancefs.service", "StateDirectory").is_empty(), "systemctl clean would remove it");
}
