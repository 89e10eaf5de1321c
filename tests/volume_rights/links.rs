//! Links in an instance's `volumes/` attach, directories in a volume's `snapshots/` take snapshots, and nothing else that
//! is made or removed there means anything.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::Command;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use uuid::Uuid;

use crate::support::{Daemon, errno, wait_until};
use crate::{daemon, opens, owner, snapshot, user, volume, writes};

/// An instance of the owner's, which is off.
fn instance(daemon: &Daemon, name: &str) -> Uuid {
    let id = daemon.domain(name);
    daemon.set(format!("instances/{id}/owner"), "2001");
    id
}

fn detach(daemon: &Daemon, volume: Uuid) {
    daemon.set(format!("volumes/{volume}/detach"), "1");
    wait_until("it is free", || daemon.read(format!("volumes/{volume}/state")) == "available");
}

fn bash(directory: &Path, script: &str) -> (bool, String) {
    let output = Command::new("bash").args(["-ec", script]).current_dir(directory).env("LC_ALL", "C").output();
    let output = output.expect("bash runs");
    (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

#[test]
fn a_link_by_any_path_of_a_volume_attaches_it_and_leads_there() {
    let daemon = daemon();
    let (instance, volume) = (instance(&daemon, "holder"), volume(&daemon));
    daemon.set(format!("volumes/{volume}/name"), "da/ta");
    wait_until("its name stands", || daemon.path("by-name/volumes/da%2Fta").is_symlink());
    let link = daemon.path(format!("instances/{instance}/volumes/vdb"));
    let targets = [
        format!("../../../volumes/{volume}"),
        format!("{}/volumes/{volume}", daemon.root().display()),
        format!("volumes/{volume}"),
        "../../../by-name/volumes/da%2Fta".to_owned(),
        format!("../../../by-state/volumes/available/{volume}"),
        volume.to_string(),
    ];
    for target in targets {
        owner().act(|| symlink(&target, &link)).unwrap_or_else(|error| panic!("{target}: {error}"));
        wait_until("it is attached", || daemon.read(format!("volumes/{volume}/state")) == "in_use");
        let home = daemon.path(format!("volumes/{volume}"));
        assert_eq!(fs::read_link(&link).expect("a link"), Path::new(&format!("../../../volumes/{volume}")));
        assert_eq!(
            link.symlink_metadata().expect("stat").len(),
            fs::read_link(&link).expect("a link").as_os_str().len() as u64
        );
        assert_eq!(fs::canonicalize(&link).expect("it leads somewhere"), fs::canonicalize(&home).expect("there"));
        let back = home.join(format!("attachments/{instance}"));
        assert_eq!(fs::canonicalize(&back).ok(), fs::canonicalize(daemon.path(format!("instances/{instance}"))).ok());
        assert_eq!(errno(symlink(&target, &link)), libc::EEXIST);
        detach(&daemon, volume);
        assert!(!link.is_symlink() && !back.is_symlink());
    }
}

#[test]
fn ln_with_force_and_other_tools_go_by_a_temporary_link_and_take_nobodys_place() {
    let daemon = daemon();
    let (instance, volume, other) = (instance(&daemon, "holder"), volume(&daemon), volume(&daemon));
    let directory = daemon.path(format!("instances/{instance}/volumes"));
    let link = directory.join("vdb");
    let attached = |id: Uuid| daemon.read(format!("volumes/{id}/state")) == "in_use";
    for script in [
        format!("ln -s ../../../volumes/{volume} vdb; ls -l vdb"),
        format!("ln -sfn ../../../volumes/{volume} vdb; ln -sfT ../../../volumes/{volume} vdb"),
        format!("ln -s ../../../volumes/{volume} .vdb.Xy12; mv -T .vdb.Xy12 vdb"),
    ] {
        let (ok, said) = bash(&directory, &script);
        assert!(ok, "{script}: {said}");
        wait_until("it is attached", || attached(volume));
    }
    let (ok, said) = bash(&directory, &format!("ln -sfn ../../../volumes/{other} vdb"));
    assert!(!ok && said.contains("busy"), "{said}");
    assert!(!attached(other) && attached(volume));
    // A copy of the link names the same volume, which one instance has already.
    let elsewhere = daemon.scratch().join("copy");
    let (ok, said) =
        bash(&directory, &format!("rsync -a ./ {0}/; cp -a . {0}.too; cp -a vdb vdc", elsewhere.display()));
    assert!(!ok && said.contains("busy"), "{said}");
    assert!(elsewhere.join("vdb").is_symlink());
    for script in ["rm vdb", "rm -rf ./*", "find . -delete", "unlink vdb", "mv vdb vdd", "rmdir ../volumes"] {
        let (ok, _) = bash(&directory, script);
        assert!(!ok && link.is_symlink() && attached(volume), "{script}");
    }
    let names: Vec<_> =
        fs::read_dir(&directory).expect("links").map(|entry| entry.expect("an entry").file_name()).collect();
    assert_eq!(names, ["vdb"], "no temporary link is left");
}

#[test]
fn links_that_name_no_volume_or_no_device_or_stand_elsewhere_are_refused() {
    let daemon = daemon();
    let (instance, volume) = (instance(&daemon, "holder"), volume(&daemon));
    let directory = daemon.path(format!("instances/{instance}/volumes"));
    let outside = daemon.scratch().join("swapped");
    symlink(daemon.path(format!("volumes/{volume}")), &outside).expect("a link outside");
    let upper = volume.to_string().to_uppercase();
    let outside = outside.display().to_string();
    let refused = [
        ("..", libc::ENOENT),
        ("/", libc::EINVAL),
        ("../../../volumes", libc::EINVAL),
        ("../../../volumes/..", libc::EINVAL),
        ("a\nb", libc::ENOENT),
        (outside.as_str(), libc::EINVAL),
        ("no such volume", libc::ENOENT),
        ("../../../by-name/volumes/%2", libc::EINVAL),
        ("../../../by-name/volumes/nothing", libc::ENOENT),
    ];
    let refused = refused.map(|(target, errno)| (target.to_owned(), errno)).into_iter().chain([
        (format!("../../../volumes/{volume}/state"), libc::EINVAL),
        (format!("../../../instances/{instance}"), libc::EINVAL),
        (format!("../../../volumes/{upper}"), libc::EINVAL),
        (format!("../../../volumes/{}", Uuid::new_v4()), libc::ENOENT),
        (format!("../../../volumes/{volume}\n"), libc::EINVAL),
        ("x".repeat(4096), libc::ENAMETOOLONG),
    ]);
    for (target, want) in refused {
        let got = owner().act(|| errno(symlink(&target, directory.join("vdb"))));
        assert_eq!(got, want, "ln -s {target:?}");
        // To that verb an instance is what to name.
        if want != libc::ENAMETOOLONG && !target.contains("/instances/") {
            let got = writes(&owner(), &daemon.path(format!("volumes/{volume}/attach")), &target);
            assert!([libc::EINVAL, libc::ENOENT].contains(&got), "{target:?} > attach: {got}");
        }
    }
    for value in ["\0", "vdb\0", &format!("{instance} vdb vdc"), &format!("{instance} ../vdb"), &"x".repeat(4097)] {
        assert_eq!(
            writes(&owner(), &daemon.path(format!("volumes/{volume}/attach")), value),
            libc::EINVAL,
            "{value:?}"
        );
    }
    let target = format!("../../../volumes/{volume}");
    for name in ["vd", "vdB", "vdbb", "sdb", "disk", "vd1", "web"] {
        assert_eq!(errno(symlink(&target, directory.join(name))), libc::EPERM, "{name}");
    }
    for place in
        ["", "instances", "volumes", "transfers", "backends", "by-name/volumes", "trash", "by-state/volumes/available"]
    {
        assert_eq!(errno(symlink(&target, daemon.path(place).join("vdb"))), libc::EPERM, "{place}");
    }
    for place in ["", "snapshots", "attachments"] {
        let place = daemon.path(format!("volumes/{volume}")).join(place);
        assert_eq!(errno(symlink(&target, place.join("vdb"))), libc::EPERM, "{}", place.display());
    }
    assert_eq!(errno(symlink(&target, daemon.path(format!("instances/{instance}/vdb")))), libc::EPERM);
    assert_eq!(errno(fs::create_dir(directory.join("vdb"))), libc::EPERM);
    assert_eq!(errno(fs::write(directory.join("vdb"), "x")), libc::ENOENT);
    assert_eq!(user(2009).act(|| errno(symlink(&target, directory.join("vdb")))), libc::EACCES);
    assert_eq!(daemon.read(format!("volumes/{volume}/state")), "available");
    assert!(fs::read_dir(&directory).expect("links").next().is_none());
}

#[test]
fn a_snapshot_is_made_by_mkdir_under_any_name_and_deleted_by_a_word_alone() {
    let daemon = daemon();
    let volume = volume(&daemon);
    let snapshots = daemon.path(format!("volumes/{volume}/snapshots"));
    let made = snapshot(&daemon, volume, "be%2Ffore");
    assert_eq!(
        (daemon.read(made.join("size_bytes")), opens(&user(2009), &made)),
        ((1 << 20).to_string(), libc::EACCES)
    );
    let inode = made.metadata().expect("stat").ino();
    let make = |name: &str| owner().act(|| errno(fs::create_dir(snapshots.join(name))));
    assert_eq!(make("be%2Ffore"), libc::EEXIST);
    for name in [".hidden", "%2e", "a%", "a%2", "space ", "%0A", "a\nb", &"a".repeat(219)] {
        assert_eq!(make(name), libc::EINVAL, "{name:?}");
    }
    assert_eq!(errno(fs::create_dir(made.join("more"))), libc::EPERM);
    for script in
        ["rmdir be*", "rm be*/state", "rm -rf ./*", "find . -delete", "mv be* after", "chmod -R 0 .", "touch be*/x"]
    {
        let (ok, said) = bash(&snapshots, script);
        assert!(!ok && daemon.read(made.join("state")) == "available", "{script}: {said}");
    }
    for word in ["available", "creating", "delete", "soft_deleted"] {
        assert_eq!(writes(&owner(), &made.join("state"), word), libc::EINVAL, "{word}");
    }
    daemon.set(format!("volumes/{volume}/delete_protection"), "1");
    assert_eq!(writes(&owner(), &made.join("state"), "deleted"), libc::EPERM);
    daemon.set(format!("volumes/{volume}/delete_protection"), "0");
    assert_eq!(writes(&owner(), &made.join("state"), "deleted"), 0);
    wait_until("it is gone", || !made.exists());
    let again = snapshot(&daemon, volume, "be%2Ffore");
    assert_ne!(again.metadata().expect("stat").ino(), inode, "no inode is used again");
    daemon.set(format!("volumes/{volume}/locked"), "1");
    assert_eq!(make("locked"), libc::EPERM);
}

#[test]
fn who_watches_a_directory_learns_that_links_and_snapshots_come_and_go() {
    let daemon = daemon();
    let (instance, volume) = (instance(&daemon, "holder"), volume(&daemon));
    let places =
        [daemon.path(format!("instances/{instance}/volumes")), daemon.path(format!("volumes/{volume}/attachments"))];
    let watches = places.each_ref().map(|place| watch(place));
    let snapshots = watch(&daemon.path(format!("volumes/{volume}/snapshots")));
    let changes: [(&[Inotify], &dyn Fn()); 3] = [
        (&watches, &|| daemon.set(format!("volumes/{volume}/attach"), &instance.to_string())),
        (&watches, &|| detach(&daemon, volume)),
        (std::slice::from_ref(&snapshots), &|| drop(snapshot(&daemon, volume, "before"))),
    ];
    for (watches, change) in changes {
        change();
        for watch in watches {
            wait_until("the directory's watcher hears of it", || {
                watch
                    .read_events()
                    .is_ok_and(|events| events.iter().any(|event| event.mask.contains(AddWatchFlags::IN_ATTRIB)))
            });
        }
    }
}

fn watch(directory: &Path) -> Inotify {
    let watch = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).expect("inotify");
    watch.add_watch(directory, AddWatchFlags::IN_ATTRIB).expect("a watch");
    watch
}
