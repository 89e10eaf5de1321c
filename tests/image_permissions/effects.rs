//! What else follows from sharing, protecting and deactivating an image.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};

use uuid::Uuid;

use crate::support::{Daemon, User, errno, gid, wait_until, write};
use crate::{ACCESS, daemon, read, rename_over};

/// Takes a right, or gives it back.
type Act<'a> = &'a dyn Fn();

fn shared(daemon: &Daemon, members: &[&str]) -> Uuid {
    let id = daemon.image();
    daemon.set(format!("images/{id}/owner"), "2001");
    daemon.set(format!("images/{id}/visibility"), "shared");
    for project in members {
        daemon.set(format!("images/{id}/share"), project);
    }
    id
}

fn member(project: &str) -> User {
    User { uid: 2012, gid: 2012, groups: vec![gid(ACCESS), gid(project)] }
}

#[test]
fn a_right_taken_back_is_gone_when_the_write_returns_and_what_was_open_stays_open() {
    let daemon = daemon();
    let id = shared(&daemon, &["audio", "video"]);
    let path = |file: &str| daemon.path(format!("images/{id}/{file}"));
    let (audio, video) = (member("audio"), member("video"));
    let opens = |user: &User, file: &str| user.act(|| read(&path(file)));
    let takings: [(&str, Act<'_>, Act<'_>); 5] = [
        ("unshare", &|| daemon.set(format!("images/{id}/unshare"), "audio"), &|| {
            daemon.set(format!("images/{id}/share"), "audio");
        }),
        ("private", &|| daemon.set(format!("images/{id}/visibility"), "private"), &|| {
            daemon.set(format!("images/{id}/visibility"), "shared");
        }),
        ("private by rename", &|| assert_eq!(rename_over(&path("visibility"), "private"), 0), &|| {
            assert_eq!(rename_over(&path("visibility"), "shared"), 0);
        }),
        ("deactivated", &|| daemon.set(format!("images/{id}/state"), "deactivated"), &|| {
            daemon.set(format!("images/{id}/state"), "active");
        }),
        (
            "deactivated by a move",
            &|| {
                let link = |word: &str| daemon.path(format!("by-state/images/{word}/{id}"));
                // The link follows the state a little later, and may be on its way.
                wait_until("the link is moved", || fs::rename(link("active"), link("deactivated")).is_ok());
            },
            &|| daemon.set(format!("images/{id}/state"), "active"),
        ),
    ];
    for (what, take, give) in takings {
        for _ in 0..20 {
            assert_eq!(opens(&audio, "data"), 0, "{what}");
            let mut held = audio.act(|| File::open(path("data"))).expect("readable");
            take();
            assert_eq!(opens(&audio, "data"), libc::EACCES, "{what}");
            assert_eq!(opens(&video, "data"), if what == "unshare" { 0 } else { libc::EACCES }, "{what}");
            let metadata = if what.starts_with("deactivated") { 0 } else { libc::EACCES };
            assert_eq!(opens(&audio, "name"), metadata, "{what}");
            let mut bytes = Vec::new();
            io::Read::read_to_end(&mut held, &mut bytes).expect("what is open stays open");
            assert!(!bytes.is_empty(), "{what}");
            give();
        }
    }
    // A project that is a member again has said nothing yet.
    audio.act(|| write(&path("members/audio"), b"accepted\n")).expect("its own word");
    let file = audio.act(|| OpenOptions::new().write(true).open(path("members/audio"))).expect("its own file");
    daemon.set(format!("images/{id}/unshare"), "audio");
    daemon.set(format!("images/{id}/unshare"), "audio");
    daemon.set(format!("images/{id}/share"), "audio");
    assert_eq!(daemon.read(format!("images/{id}/members/audio")), "pending");
    assert_ne!(audio.act(|| errno((&file).write(b"accepted\n"))), 0, "that was another membership");
}

#[test]
fn an_image_has_128_members_and_they_are_kept_over_a_restart_and_while_it_is_private() {
    let mut daemon = daemon();
    let id = shared(&daemon, &[]);
    for project in 0..128 {
        daemon.set(format!("images/{id}/share"), &format!("{}", 700_000 + project));
    }
    assert_eq!(errno(daemon.write(format!("images/{id}/share"), "audio")), libc::EDQUOT);
    daemon.set(format!("images/{id}/share"), "700000");
    daemon.set(format!("images/{id}/unshare"), "700127");
    daemon.set(format!("images/{id}/share"), "audio");
    let name = daemon.path(format!("images/{id}/name"));
    assert_eq!(member("audio").act(|| read(&name)), 0);
    daemon.set(format!("images/{id}/visibility"), "private");
    assert!(daemon.stop());
    daemon.spawn();
    let members = || fs::read_dir(daemon.path(format!("images/{id}/members"))).expect("members").count();
    assert_eq!(members(), 128);
    assert_eq!(member("audio").act(|| read(&name)), libc::EACCES);
    assert_eq!(errno(daemon.write(format!("images/{id}/share"), "audio")), libc::EINVAL);
    assert!(daemon.read(format!("images/{id}/last_error")).contains("write shared to visibility first"));
    daemon.set(format!("images/{id}/visibility"), "shared");
    assert_eq!(member("audio").act(|| read(&name)), 0);
}

#[test]
fn nothing_boots_from_what_is_deactivated_demands_more_or_was_taken_back_and_guests_go_on() {
    let daemon = daemon();
    let id = shared(&daemon, &["audio"]);
    let user = member("audio");
    let draft = || {
        let instance = Uuid::new_v4();
        user.act(|| fs::create_dir(daemon.path(format!("instances/{instance}"))).expect("a draft"));
        daemon.set(format!("instances/{instance}/memory_bytes"), "64M");
        user.act(|| write(&daemon.path(format!("instances/{instance}/image")), id.to_string().as_bytes()))
            .expect("his");
        instance
    };
    let boot =
        |instance: Uuid| user.act(|| errno(write(&daemon.path(format!("instances/{instance}/state")), b"active")));
    let reason = |instance: Uuid| daemon.read(format!("instances/{instance}/last_error"));
    let running = draft();
    assert_eq!(boot(running), 0, "{}", reason(running));
    daemon.wait_state(running, "active");
    let waiting = draft();
    daemon.set(format!("images/{id}/min_memory_bytes"), "128M");
    assert_eq!(boot(waiting), libc::ERANGE);
    assert!(reason(waiting).contains("67108864") && reason(waiting).contains("134217728"), "{}", reason(waiting));
    daemon.set(format!("images/{id}/min_memory_bytes"), "64M");
    daemon.set(format!("images/{id}/min_disk_bytes"), "16M");
    assert_eq!(boot(waiting), libc::ERANGE);
    assert!(reason(waiting).contains("8388608") && reason(waiting).contains("16777216"), "{}", reason(waiting));
    daemon.set(format!("images/{id}/min_disk_bytes"), "0");
    daemon.set(format!("images/{id}/state"), "deactivated");
    assert_eq!(boot(waiting), libc::EINVAL);
    assert!(reason(waiting).contains("deactivated"), "{}", reason(waiting));
    daemon.set(format!("images/{id}/state"), "active");
    daemon.set(format!("images/{id}/unshare"), "audio");
    assert_eq!(boot(waiting), libc::EACCES);
    daemon.set(format!("images/{id}/share"), "audio");
    user.act(|| write(&daemon.path(format!("images/{id}/members/audio")), b"rejected")).expect("its own word");
    assert_eq!(boot(waiting), 0, "who rejects an image may still use it: {}", reason(waiting));
    assert_eq!(daemon.read(format!("instances/{running}/state")), "active");
}

#[test]
fn a_protected_image_is_deleted_by_nobody_and_changed_by_everybody_who_may() {
    let daemon = daemon();
    let draft = Uuid::new_v4();
    fs::create_dir(daemon.path(format!("images/{draft}"))).expect("a draft");
    daemon.set(format!("images/{draft}/delete_protection"), "yes");
    assert_eq!(daemon.read(format!("images/{draft}/state_available")), "active");
    assert_eq!(errno(daemon.write(format!("images/{draft}/state"), "deleted")), libc::EPERM);
    assert!(daemon.read(format!("images/{draft}/last_error")).contains("delete_protection is 1"));
    daemon.set(format!("images/{draft}/name"), "precious");
    daemon.set(format!("images/{draft}/delete_protection"), "0");
    assert_eq!(daemon.read(format!("images/{draft}/state_available")), "active deleted");
    daemon.set(format!("images/{draft}/state"), "deleted");
    let active = daemon.image();
    daemon.set(format!("images/{active}/delete_protection"), "1");
    assert_eq!(daemon.read(format!("images/{active}/state_available")), "deactivated");
    daemon.set(format!("images/{active}/state"), "deactivated");
    assert_eq!(daemon.read(format!("images/{active}/state_available")), "active");
    let trash = daemon.path(format!("trash/{active}"));
    assert_eq!(errno(fs::rename(daemon.path(format!("images/{active}")), trash)), libc::EPERM);
}

#[test]
fn ordinary_tools_work_on_a_shared_image_and_cannot_change_its_access_control_list() {
    let daemon = daemon();
    let id = shared(&daemon, &["audio"]);
    let bash = |script: &str| {
        let directory = daemon.path(format!("images/{id}"));
        let mut command = std::process::Command::new("bash");
        let output = command.args(["-ec", script]).current_dir(directory).env("T", daemon.scratch()).env("LC_ALL", "C");
        let output = output.output().expect("bash runs");
        (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    let works = |script: &str| {
        let (ok, said) = bash(script);
        assert!(ok && said.is_empty(), "{script}: {said}");
    };
    works("sed -i s/.*/one/ name; grep -qx one name");
    works("sed -i s/.*/two/ name; grep -qx two name");
    works("echo three > $T/name; cp $T/name name; grep -qx three name");
    works(
        "echo four > $T/name; chgrp nogroup $T/name; chown 2001 $T/name; chmod 660 $T/name; cp -p $T/name name; grep -qx four name",
    );
    works("echo five > $T/name; rsync --checksum $T/name .; grep -qx five name");
    works("cp -p name $T/copy; cp -a data $T/data; cmp data $T/data; grep -qx five $T/copy");
    works("vim -es -u NONE -c '%s/.*/six/' -c wq name; grep -qx six name");
    works("getfacl -cp name | grep -qx group:audio:r--; getfacl -cp . | grep -qx group:audio:r-x");
    works("getfacl -cp members/audio | grep -qx group:audio:rw-; getfacl -cp name | grep -qx mask::rw-");
    works("getfacl -cp name > $T/list; setfacl --set-file=$T/list name");
    for script in [
        "setfacl -m g:tape:r name",
        "python3 -c \"import os; os.removexattr('name', 'system.posix_acl_access')\"",
        "setfacl -m u:2021:rwx .",
        "setfacl -d -m u:1:r .",
    ] {
        let (ok, said) = bash(script);
        assert!(!ok && said.contains("not supported"), "{script}: {said}");
    }
    assert_eq!(member("audio").act(|| read(&daemon.path(format!("images/{id}/name")))), 0);
    assert_eq!(member("tape").act(|| read(&daemon.path(format!("images/{id}/name")))), libc::EACCES);
}
