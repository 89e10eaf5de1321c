//! The table of renames is closed: what it says happens, and everything else is refused without harm.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;
use uuid::Uuid;

use crate::support::{Daemon, errno, wait_until};

fn python_move(from: &Path, to: &Path) -> bool {
    let script = "import shutil, sys\ntry: shutil.move(sys.argv[1], sys.argv[2])\nexcept OSError: sys.exit(3)";
    let status = Command::new("python3").args(["-c", script]).args([from, to]).status().expect("python runs");
    assert!(matches!(status.code(), Some(0 | 3)), "{status}");
    status.success()
}

fn mv(from: &Path, to: &Path) -> (bool, String) {
    let output = Command::new("mv").arg("-T").args([from, to]).env("LC_ALL", "C").output().expect("mv runs");
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn every_move_that_means_nothing_is_refused_and_leaves_its_source() {
    let daemon = Daemon::start(&[]);
    let (web, db) = (daemon.domain("web"), daemon.domain("db"));
    daemon.domain_does(web, "start", "active");
    for name in ["web", "db"] {
        let link = daemon.path(format!("by-name/instances/{name}"));
        wait_until("the name stands", || link.is_symlink());
    }
    wait_until("the link stands", || daemon.path(format!("by-state/instances/active/{web}")).is_symlink());
    daemon.set(format!("instances/{db}/locked"), "1");
    let new = Uuid::new_v4();
    let mut table = vec![
        (format!("instances/{db}"), format!("trash/{db}"), libc::EPERM),
        (format!("instances/{web}"), "trash/other".to_owned(), libc::EPERM),
        ("by-name/instances/db".to_owned(), "trash/db".to_owned(), libc::EPERM),
        (format!("instances/{web}"), format!("instances/{new}"), libc::EPERM),
        (format!("instances/{web}"), format!("instances/{db}"), libc::EPERM),
        (format!("instances/{web}"), format!("images/{web}"), libc::EPERM),
        (format!("instances/{web}"), "by-name/instances/x".to_owned(), libc::EPERM),
        (format!("instances/{web}"), format!("by-state/instances/stopped/{web}"), libc::EPERM),
        ("by-name/instances/web".to_owned(), "by-name/instances/db".to_owned(), libc::EEXIST),
        ("by-name/instances/web".to_owned(), "by-name/instances/a%2Fb".to_owned(), libc::EPERM),
        ("by-name/instances/web".to_owned(), "by-name/instances/a%zz".to_owned(), libc::EPERM),
        ("by-name/instances/web".to_owned(), "by-name/instances/%0A".to_owned(), libc::EPERM),
        ("by-name/instances/web".to_owned(), "by-name/images/web".to_owned(), libc::EPERM),
        ("by-name/instances/db".to_owned(), "by-name/instances/locked".to_owned(), libc::EPERM),
        ("by-name/instances/web".to_owned(), "by-name/web".to_owned(), libc::EPERM),
        ("by-name/instances".to_owned(), "by-name/other".to_owned(), libc::EPERM),
        ("instances".to_owned(), "by-name/instances/x".to_owned(), libc::EPERM),
        ("health".to_owned(), "README".to_owned(), libc::EPERM),
        ("events".to_owned(), "events.1".to_owned(), libc::EPERM),
        (format!("instances/{web}/name"), format!("instances/{web}/description"), libc::EPERM),
        (format!("instances/{web}/name"), format!("instances/{db}/name"), libc::EPERM),
        (format!("instances/{web}/last_error"), "by-name/x".to_owned(), libc::EPERM),
    ];
    let active = format!("by-state/instances/active/{web}");
    for (word, want) in [
        ("starting", libc::EPERM),
        ("stopping", libc::EPERM),
        ("draft", libc::EPERM),
        ("error", libc::EPERM),
        ("rescued", libc::EOPNOTSUPP),
    ] {
        table.push((active.clone(), format!("by-state/instances/{word}/{web}"), want));
    }
    table.push((active.clone(), "by-state/instances/stopped/other".to_owned(), libc::EPERM));
    table.push((active.clone(), format!("by-state/images/active/{web}"), libc::EPERM));
    table.push((active.clone(), format!("by-name/instances/{web}"), libc::EPERM));
    table.push((active.clone(), format!("trash/{web}"), libc::EPERM));
    table.push((format!("by-state/instances/stopped/{db}"), format!("by-state/instances/active/{db}"), libc::EPERM));
    for (from, to, want) in table {
        let (from, to) = (daemon.path(from), daemon.path(to));
        assert_eq!(errno(fs::rename(&from, &to)), want, "{} -> {}", from.display(), to.display());
        let existed = to.symlink_metadata().is_ok();
        let (moved, said) = mv(&from, &to);
        assert!(!moved && said.starts_with("mv: cannot"), "{} -> {}: {said}", from.display(), to.display());
        if !existed {
            python_move(&from, &to);
        }
        assert!(from.symlink_metadata().is_ok(), "{}", from.display());
    }
    assert_eq!(daemon.read(format!("instances/{web}/state")), "active");
    assert_eq!(daemon.read(format!("instances/{web}/name")), "web");
    assert_eq!(daemon.read(format!("instances/{db}/name")), "db");
    let answer = daemon.host_does(json!({"do": "calls"}));
    for call in ["power_off", "shutdown", "undefine", "rename"] {
        assert_eq!(answer["calls"][call].as_u64().unwrap_or(0), 0, "{call}");
    }
    let locked = daemon.read(format!("instances/{db}/last_error"));
    assert!(locked.contains("locked"), "{locked}");
}

#[test]
fn moving_a_name_renames_the_domain_under_every_escape() {
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("web");
    let link = |name: &str| daemon.path(format!("by-name/instances/{name}"));
    wait_until("the name stands", || link("web").is_symlink());
    let mut present = "web".to_owned();
    for (moved_to, name, shown) in [
        ("db", "db", "db"),
        ("a%25b", "a%b", "a%25b"),
        ("sp ace ☃", "sp ace ☃", "sp ace ☃"),
        (".hidden", ".hidden", "%2Ehidden"),
        ("%41bc", "Abc", "Abc"),
        ("web", "web", "web"),
    ] {
        fs::rename(link(&present), link(moved_to)).unwrap_or_else(|error| panic!("{moved_to}: {error}"));
        wait_until(shown, || link(shown).is_symlink() && !link(&present).is_symlink());
        let home = daemon.path(format!("instances/{id}"));
        wait_until("the name is taken", || {
            // It stays where it was put, or goes on to how the name is written; it never goes back.
            let stands = (0..3).any(|_| {
                [moved_to, shown].iter().any(|name| fs::canonicalize(link(name)).is_ok_and(|path| path == home))
            });
            assert!(stands, "{moved_to}");
            daemon.read(format!("instances/{id}/name")) == name
                && daemon.read(format!("instances/{id}/task")).is_empty()
                && link(shown).is_symlink()
        });
        assert_eq!(fs::canonicalize(link(shown)).expect("resolves"), daemon.path(format!("instances/{id}")));
        let listed = fs::read_dir(daemon.path("by-name/instances")).expect("a directory");
        let listed: Vec<_> = listed.map(|entry| entry.expect("an entry").file_name()).collect();
        assert_eq!(listed, [shown], "one name each");
        let domains = daemon.host_does(json!({"do": "list"}));
        assert!(domains.to_string().contains(&json!(name).to_string()), "{name}: {domains}");
        present = shown.to_owned();
    }
    let other = daemon.domain("other");
    wait_until("the other stands", || link("other").is_symlink());
    assert_eq!(errno(fs::rename(link("other"), link("web"))), libc::EEXIST);
    assert_eq!(daemon.read(format!("instances/{other}/name")), "other");
    daemon.domain_does(id, "start", "active");
    let refused = fs::rename(link("web"), link("later"));
    assert_eq!(errno(refused), libc::EPERM, "a running domain keeps its name, and no move says EINVAL");
    assert!(link("web").is_symlink() && !link("later").is_symlink());
}

#[test]
fn a_link_by_state_resolves_at_every_moment_of_its_task() {
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("web");
    daemon.domain_does(id, "start", "active");
    daemon.host_does(json!({"do": "guest", "uuid": id.to_string(), "acpi_delay_ms": 300}));
    let link = |word: &str| -> PathBuf { daemon.path(format!("by-state/instances/{word}/{id}")) };
    wait_until("the link stands", || link("active").is_symlink());
    fs::rename(link("active"), link("stopped")).expect("moved");
    assert!(!link("active").is_symlink(), "it left at once");
    let home = daemon.path(format!("instances/{id}"));
    let mut seen = Vec::new();
    wait_until("it is stopped", || {
        // In one of the three at every moment; a move between two looks is seen by looking again.
        let standing = (0..3).find_map(|_| {
            ["stopping", "stopped"].into_iter().find(|word| fs::canonicalize(link(word)).is_ok_and(|path| path == home))
        });
        let word = standing.expect("the link stands somewhere");
        if seen.last() != Some(&word) {
            seen.push(word);
        }
        daemon.read(format!("instances/{id}/state")) == "stopped" && word == "stopped"
    });
    assert!(seen.contains(&"stopping"), "{seen:?}: it goes on to the directory of its task");
    let stopping = link("stopping");
    wait_until("one link is left", || !stopping.is_symlink());
}
