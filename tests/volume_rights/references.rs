//! Whoever names an object inside a value has to have a right to that very object: every kind of value, every form of a
//! name, everybody who names.

use std::fs;
use std::os::unix::fs::symlink;

use uuid::Uuid;

use crate::support::{Daemon, User, errno, gid, wait_until, write};
use crate::{ACCESS, PROJECT, daemon, draft, member, owner, root, snapshot, user, volume};

/// What is named: it belongs to the owner and the project.
struct Named {
    class: &'static str,
    id: Uuid,
    name: String,
}

impl Named {
    fn new(daemon: &Daemon, class: &'static str, id: Uuid) -> Named {
        let name = format!("{class}-{id}");
        daemon.set(format!("{class}/{id}/name"), &name);
        daemon.set(format!("{class}/{id}/owner"), "2001");
        daemon.set(format!("{class}/{id}/project"), PROJECT);
        let link = daemon.path(format!("by-name/{class}/{name}"));
        wait_until("its name stands", || link.is_symlink());
        Named { class, id, name }
    }

    fn forms(&self, daemon: &Daemon) -> Vec<String> {
        let Named { class, id, name } = self;
        vec![
            id.to_string(),
            name.clone(),
            format!("{class}/{id}"),
            format!("../../../{class}/{id}"),
            format!("by-name/{class}/{name}"),
            daemon.path(format!("{class}/{id}")).display().to_string(),
            format!("./../../{class}/./{id}"),
        ]
    }
}

#[test]
fn nobody_names_what_he_has_no_right_to_in_any_value_or_form() {
    let daemon = daemon();
    let image = Named::new(&daemon, "images", daemon.image());
    let disk = volume(&daemon);
    snapshot(&daemon, disk, "before");
    let disk = Named::new(&daemon, "volumes", disk);
    let guest = Named::new(&daemon, "instances", daemon.domain("guest"));
    let actors = [
        ("root", root(), true),
        ("owner", owner(), true),
        ("project", member(), true),
        ("stranger", user(2009), false),
        ("other project", User { uid: 2010, gid: gid("audio"), groups: vec![gid(ACCESS)] }, false),
    ];
    let (mut cells, mut differ) = (0, Vec::new());
    let mut cell = |what: String, got: i32, want: i32| {
        cells += 1;
        if got != want {
            differ.push(format!("{what}: {got}, not {want}"));
        }
    };
    for (who, actor, may) in &actors {
        let make = |class: &str| {
            let id = Uuid::new_v4();
            actor.act(|| fs::create_dir(daemon.path(format!("{class}/{id}"))).expect("his own"));
            id
        };
        let (own_volume, own_instance) = (make("volumes"), make("instances"));
        let at = |class: &str, id: Uuid, file: &str| daemon.path(format!("{class}/{id}/{file}"));
        // His draft cannot be attached, which is said once what he names is his to name.
        let (named, draft) = if *may { (0, libc::EINVAL) } else { (libc::EACCES, libc::EACCES) };
        let values = [
            ("image", at("instances", own_instance, "image"), &image, "", "", named),
            ("created_from", at("volumes", own_volume, "created_from"), &image, "image:", "", named),
            ("created_from", at("volumes", own_volume, "created_from"), &disk, "volume:", "", named),
            ("created_from", at("volumes", own_volume, "created_from"), &disk, "snapshot:", "/before", named),
            ("attach", at("volumes", own_volume, "attach"), &guest, "", "", draft),
            ("attach", at("volumes", own_volume, "attach"), &guest, "", " vdb", draft),
            ("detach", at("volumes", own_volume, "detach"), &guest, "", "", named),
        ];
        for (file, path, object, before, after, want) in values {
            for form in object.forms(&daemon) {
                let value = format!("{before}{form}{after}");
                let got = actor.act(|| errno(write(&path, value.as_bytes())));
                cell(format!("{who}: {value} > {file}"), got, want);
            }
        }
        for form in disk.forms(&daemon) {
            for device in ["vdb", ".vdb"] {
                let directory = at("instances", own_instance, "volumes");
                let got = actor.act(|| {
                    let link = directory.join(device);
                    errno(symlink(&form, &link).and_then(|()| match device {
                        "vdb" => Ok(()),
                        _ => fs::rename(&link, directory.join("vdb")).inspect_err(|_| drop(fs::remove_file(&link))),
                    }))
                });
                cell(format!("{who}: ln -s {form} {device}"), got, if *may { 0 } else { libc::EACCES });
                if got == 0 {
                    let state = || daemon.read(format!("volumes/{}/state", disk.id));
                    wait_until("it is attached", || state() == "in_use");
                    daemon.set(format!("volumes/{}/detach", disk.id), "1");
                    wait_until("it is free", || state() == "available");
                }
            }
        }
    }
    println!("{cells} cells: {} differ", differ.len());
    assert!(cells > 300 && differ.is_empty(), "{cells} cells\n{}", differ.join("\n"));
}

#[test]
fn a_volume_is_attached_by_who_has_a_right_to_both_it_and_the_instance() {
    let daemon = daemon();
    let (disk, guest) = (volume(&daemon), daemon.domain("roots"));
    let attach = daemon.path(format!("volumes/{disk}/attach"));
    let own = draft(&daemon, "instances");
    assert_eq!(owner().act(|| errno(write(&attach, guest.to_string().as_bytes()))), libc::EACCES);
    assert_eq!(user(2009).act(|| errno(write(&attach, own.to_string().as_bytes()))), libc::EACCES);
    let link = daemon.path(format!("instances/{guest}/volumes/vdb"));
    let target = format!("../../../volumes/{disk}");
    assert_eq!(owner().act(|| errno(symlink(&target, &link))), libc::EACCES);
    assert_eq!(daemon.read(format!("volumes/{disk}/state")), "available");
    // Given away meanwhile: the right is the one of the moment.
    daemon.set(format!("instances/{guest}/owner"), "2001");
    assert_eq!(owner().act(|| errno(symlink(&target, &link))), 0);
}
