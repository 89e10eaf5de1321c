//! Moves in and out, with the tools that people use.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use serde_json::json;
use uuid::Uuid;

use crate::support::{Daemon, errno, wait_until};

/// What mv says; empty if it went well.
pub fn mv(arguments: &[&str], from: &Path, to: &Path) -> String {
    let output = Command::new("mv").args(arguments).args([from, to]).env("LC_ALL", "C").output().expect("mv runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.success(), said.is_empty(), "{said}");
    said
}

fn running(daemon: &Daemon, name: &str) -> Uuid {
    let id = daemon.domain(name);
    daemon.domain_does(id, "start", "active");
    id
}

#[test]
fn an_instance_moved_into_the_bin_is_shut_down_and_moved_back_runs_again() {
    let daemon = Daemon::start(&[]);
    let id = running(&daemon, "web");
    let (home, bin) = (daemon.path(format!("instances/{id}")), daemon.path(format!("trash/{id}")));
    let inode = |path: &Path| fs::metadata(path).expect("stat").ino();
    let (directory, state) = (inode(&home), inode(&home.join("state")));
    for file in ["class", "deleted_at", "deleted_by", "expires_at"] {
        assert!(!home.join(file).exists(), "{file} is there in the bin only");
    }
    assert_eq!(mv(&[], &home, &daemon.path("trash/")), "");
    assert!(!home.exists() && bin.is_dir());
    assert_eq!((inode(&bin), inode(&bin.join("state"))), (directory, state), "it is the same one");
    assert_eq!(daemon.read(bin.join("state")), "soft_deleted");
    assert_eq!(daemon.read(bin.join("class")), "instances");
    assert!(!daemon.read(bin.join("deleted_by")).is_empty());
    let deleted_at: u64 = daemon.read(bin.join("deleted_at")).parse().expect("a time");
    let expires_at: u64 = daemon.read(bin.join("expires_at")).parse().expect("a time");
    assert!(expires_at > deleted_at && deleted_at > 1_700_000_000);
    wait_until("the guest is off", || daemon.read(bin.join("power_state")) == "shutoff");
    wait_until("it is idle", || daemon.read(bin.join("task")).is_empty());
    assert_eq!(mv(&["-n"], &bin, &home), "");
    assert!(home.is_dir() && !bin.exists());
    assert_eq!(inode(&home), directory);
    daemon.wait_state(id, "active");
    for file in ["class", "deleted_at", "deleted_by", "expires_at"] {
        assert!(!home.join(file).exists(), "{file} went with the bin");
    }
    assert_eq!(daemon.read(home.join("power_state")), "running");
    assert_eq!(daemon.host_does(json!({"do": "calls"}))["calls"]["undefine"].as_u64().unwrap_or(0), 0);
}

#[test]
fn an_image_moved_into_the_bin_keeps_its_data_and_goes_back_as_it_was() {
    let daemon = Daemon::start(&[]);
    let id = daemon.image();
    let (home, bin) = (daemon.path(format!("images/{id}")), daemon.path(format!("trash/{id}")));
    let data = fs::read(home.join("data")).expect("data");
    daemon.set(format!("images/{id}/state"), "deactivated");
    assert_eq!(mv(&[], &home, &bin), "");
    assert_eq!(daemon.read(bin.join("class")), "images");
    assert_eq!(daemon.read(bin.join("state")), "soft_deleted");
    assert!(fs::read(bin.join("data")).expect("data") == data);
    let copy = daemon.scratch().join("copy");
    let status = Command::new("cp").arg("-a").args([&bin, &copy]).output().expect("cp runs");
    assert!(fs::read(copy.join("data")).expect("copied") == data, "{status:?}");
    daemon.set(format!("trash/{id}/expires_at"), "never");
    assert_eq!(daemon.read(bin.join("expires_at")), "never");
    daemon.set(format!("trash/{id}/expires_at"), "4000000000");
    assert_eq!(daemon.read(bin.join("expires_at")), "4000000000");
    assert_eq!(errno(daemon.write(format!("trash/{id}/expires_at"), "soon")), libc::EINVAL);
    let document: serde_json::Value = serde_json::from_str(&daemon.read(bin.join("spec.json"))).expect("JSON");
    assert_eq!(document["expires_at"], json!(4_000_000_000_u64));
    daemon.set(format!("trash/{id}/spec.json"), "{\"expires_at\": \"never\"}");
    assert_eq!(daemon.read(bin.join("expires_at")), "never");
    assert_eq!(mv(&[], &bin, &home), "");
    assert_eq!(daemon.read(home.join("state")), "deactivated");
    assert!(fs::read(home.join("data")).expect("data") == data);
    assert_eq!(errno(daemon.write(format!("images/{id}/expires_at"), "never")), libc::ENOENT);
}

#[test]
fn moving_a_name_or_a_state_moves_the_object() {
    let daemon = Daemon::start(&[]);
    let (web, db) = (running(&daemon, "web"), daemon.domain("db"));
    let image = daemon.image();
    daemon.set(format!("images/{image}/description"), "named by its uuid");
    let named = |place: &str, name: &str| daemon.path(format!("by-name/{place}/{name}"));
    let by_state = |word: &str, id: Uuid| daemon.path(format!("by-state/instances/{word}/{id}"));
    wait_until("the names stand", || {
        named("instances", "web").exists()
            && named("images", &image.to_string()).exists()
            && by_state("stopped", db).exists()
    });
    let stands_in_the_bin = |id: Uuid, name: &str| {
        let home = daemon.path(format!("trash/{id}"));
        wait_until(&format!("{name} is in the bin"), || {
            home.join("state").exists() && fs::canonicalize(named("trash", name)).is_ok_and(|path| path == home)
        });
        let mut listed: Vec<_> = fs::read_dir(daemon.path("trash")).expect("listed").flatten().collect();
        listed.retain(|entry| !entry.file_type().expect("a type").is_dir());
        assert!(listed.is_empty(), "the moved link does not stay there: {listed:?}");
        assert_eq!(daemon.read(home.join("state")), "soft_deleted");
    };
    assert_eq!(mv(&[], &named("instances", "web"), &daemon.path("trash/")), "");
    stands_in_the_bin(web, "web");
    assert!(!named("instances", "web").is_symlink() && !daemon.path("trash/web").is_symlink());
    // The name of an image that nobody named is that of its directory in the bin.
    assert_eq!(mv(&[], &named("images", &image.to_string()), &daemon.path("trash/")), "");
    stands_in_the_bin(image, &image.to_string());
    assert_eq!(daemon.read(format!("trash/{image}/description")), "named by its uuid");
    assert_eq!(mv(&[], &by_state("stopped", db), &daemon.path("by-state/instances/soft_deleted/")), "");
    stands_in_the_bin(db, "db");
    wait_until("db is put away", || {
        daemon.read(format!("trash/{db}/task")).is_empty() && by_state("soft_deleted", db).exists()
    });

    // Out again: by state, by name, and from the bin.
    assert_eq!(mv(&[], &by_state("soft_deleted", db), &daemon.path("by-state/instances/stopped/")), "");
    wait_until("db is back", || daemon.path(format!("instances/{db}/state")).exists());
    daemon.wait_state(db, "stopped");
    wait_until("web is put away", || daemon.read(format!("trash/{web}/task")).is_empty());
    assert_eq!(mv(&[], &named("trash", "web"), &daemon.path("by-name/instances/")), "");
    wait_until("web is back", || daemon.path(format!("instances/{web}/state")).exists());
    daemon.wait_state(web, "active");
    wait_until("its name too", || named("instances", "web").exists() && !named("trash", "web").is_symlink());
    assert_eq!(mv(&[], &daemon.path(format!("trash/{image}")), &daemon.path("images/")), "");
    daemon.set(format!("instances/{web}/state"), "soft_deleted");
    wait_until("the word moves it as well", || daemon.path(format!("trash/{web}/state")).exists());
}

#[test]
fn a_shell_in_the_directory_and_open_files_go_along() {
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("web");
    let (home, bin) = (daemon.path(format!("instances/{id}")), daemon.path(format!("trash/{id}")));
    let mut open = File::open(home.join("state")).expect("opens");
    let fifo = daemon.scratch().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("a fifo");
    let script = "cd \"$1\" && cat \"$2\" >/dev/null && cat state && cat deleted_by >/dev/null && ls ../ && pwd -P";
    let mut shell = Command::new("sh");
    shell.args(["-c", script, "sh"]).args([&home, &fifo]).stdout(std::process::Stdio::piped());
    let shell = shell.spawn().expect("a shell");
    wait_until("the shell is there", || {
        fs::read_link(format!("/proc/{}/cwd", shell.id())).is_ok_and(|path| path == home)
    });
    fs::rename(&home, &bin).expect("moved");
    fs::write(&fifo, "go").expect("it goes on");
    let output = shell.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}");
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines, ["soft_deleted", &id.to_string(), bin.to_str().expect("UTF-8")]);
    let mut text = String::new();
    open.read_to_string(&mut text).expect("readable");
    assert_eq!(text, "soft_deleted\n");
}

#[test]
fn moves_that_mean_nothing_or_are_not_allowed_are_refused_and_nothing_is_copied_or_removed() {
    let daemon = Daemon::start(&[]);
    let (web, locked, kept) = (running(&daemon, "web"), daemon.domain("locked"), daemon.domain("kept"));
    let (binned, image) = (daemon.domain("binned"), daemon.image());
    let protected = daemon.image();
    fs::rename(daemon.path(format!("instances/{binned}")), daemon.path(format!("trash/{binned}"))).expect("moved");
    daemon.set(format!("instances/{locked}/locked"), "1");
    daemon.set(format!("instances/{locked}/locked_reason"), "month's end");
    daemon.set(format!("instances/{kept}/disable_terminate"), "1");
    daemon.set(format!("images/{protected}/delete_protection"), "1");
    let draft = Uuid::new_v4();
    fs::create_dir(daemon.path(format!("instances/{draft}"))).expect("a draft");
    daemon.set(format!("instances/{draft}/name"), "written");
    let table = [
        (format!("instances/{locked}"), format!("trash/{locked}"), "month's end"),
        ("by-name/instances/locked".to_owned(), "trash/locked".to_owned(), "month's end"),
        (
            format!("by-state/instances/stopped/{locked}"),
            format!("by-state/instances/soft_deleted/{locked}"),
            "locked by",
        ),
        (format!("instances/{kept}"), format!("trash/{kept}"), "disable_terminate is 1"),
        (format!("images/{protected}"), format!("trash/{protected}"), "delete_protection is 1"),
        (format!("instances/{draft}"), format!("trash/{draft}"), "not possible from draft"),
        (format!("instances/{web}"), "trash/web".to_owned(), "keeps its name"),
        (format!("instances/{web}"), format!("trash/{image}"), "keeps its name"),
        ("by-name/instances/web".to_owned(), "trash/other".to_owned(), "keeps its name"),
        (format!("by-state/instances/active/{web}"), format!("trash/{web}"), "means nothing here"),
        (format!("instances/{web}"), format!("by-name/trash/{web}"), "means nothing here"),
        ("by-name/instances/web".to_owned(), "by-name/trash/web".to_owned(), "means nothing here"),
        (format!("trash/{binned}"), format!("images/{binned}"), "its own class"),
        (format!("trash/{binned}"), "instances/other".to_owned(), "keeps its name"),
        (format!("trash/{binned}"), format!("trash/{web}"), "already"),
        ("by-name/trash/binned".to_owned(), "trash/binned".to_owned(), "already"),
        ("by-name/trash/binned".to_owned(), "by-name/trash/other".to_owned(), "means nothing here"),
        ("by-name/trash/binned".to_owned(), "by-name/instances/other".to_owned(), "keeps its name"),
        ("by-name/trash/binned".to_owned(), "by-name/images/binned".to_owned(), "its own class"),
        (
            format!("by-state/instances/soft_deleted/{binned}"),
            format!("by-state/instances/paused/{binned}"),
            "possible",
        ),
        ("trash".to_owned(), "instances/trash".to_owned(), "means nothing here"),
    ];
    wait_until("everything stands", || table.iter().all(|(from, ..)| daemon.path(from).symlink_metadata().is_ok()));
    wait_until("the bin is idle", || daemon.read(format!("trash/{binned}/task")).is_empty());
    for (from, to, why) in &table {
        let (from, to) = (daemon.path(from), daemon.path(to));
        let what = format!("{} -> {}", from.display(), to.display());
        assert_eq!(errno(fs::rename(&from, &to)), libc::EPERM, "{what}");
        let number = from.components().rev().find_map(|part| {
            let name = part.as_os_str().to_str()?;
            [web, locked, kept, binned, image, protected, draft].into_iter().find(|id| name == id.to_string())
        });
        let id = number.or_else(|| match from.file_name()?.to_str()? {
            "web" => Some(web),
            "locked" => Some(locked),
            "binned" => Some(binned),
            _ => None,
        });
        let told = id.and_then(|id| {
            let homes = ["instances", "images", "trash"].map(|class| daemon.path(format!("{class}/{id}/last_error")));
            homes.into_iter().find_map(|path| fs::read_to_string(path).ok())
        });
        let told = told.unwrap_or_else(|| daemon.read("last_error"));
        assert!(told.contains(why), "{what}: {told}");
        if to.symlink_metadata().is_err() {
            assert!(mv(&["-T"], &from, &to).starts_with("mv: cannot"), "{what}");
            let script = "import shutil, sys\ntry: shutil.move(sys.argv[1], sys.argv[2])\nexcept OSError: sys.exit(3)";
            let status = Command::new("python3").args(["-c", script]).args([&from, &to]).status();
            assert!(matches!(status.expect("python runs").code(), Some(0 | 3)), "{what}");
        }
        assert!(from.symlink_metadata().is_ok(), "{what}");
    }
    assert!(daemon.read(format!("instances/{draft}/last_error")).contains(" mv: EPERM: "), "the errno that mv got");
    let locked_said = daemon.read(format!("instances/{locked}/last_error"));
    let by = daemon.read(format!("instances/{locked}/locked_by"));
    assert!(locked_said.contains(&format!("locked by {by}")) && locked_said.contains(" since 20"), "{locked_said}");
    assert_eq!(errno(fs::create_dir(daemon.path(format!("trash/{}", Uuid::new_v4())))), libc::EPERM);
    for arguments in [vec!["-rf"], vec!["-r", "--one-file-system", "-f"]] {
        let status = Command::new("rm").args(&arguments).arg(daemon.path("trash")).output().expect("rm runs");
        assert!(!status.status.success());
    }
    assert_eq!(errno(fs::remove_dir(daemon.path(format!("trash/{binned}")))), libc::ENOTEMPTY);
    assert_eq!(daemon.read(format!("trash/{binned}/state")), "soft_deleted");
    assert_eq!(daemon.read(format!("instances/{web}/state")), "active");
    assert_eq!(daemon.read(format!("instances/{draft}/name")), "written");
    let calls = daemon.host_does(json!({"do": "calls"}));
    for call in ["power_off", "shutdown", "undefine", "rename"] {
        assert_eq!(calls["calls"][call].as_u64().unwrap_or(0), 0, "{call}");
    }
}
