//! Who may move what.

use std::fs;

use uuid::Uuid;

use crate::support::{Daemon, User, errno, gid, wait_until};

fn user(uid: u32, primary: &str, more: &[&str]) -> User {
    User { uid, gid: gid(primary), groups: more.iter().map(|name| gid(name)).collect() }
}

#[test]
fn owner_project_member_and_root_move_an_object_and_nobody_else_does() {
    let daemon = Daemon::start(&["-o", "access_group=users,projects=games"]);
    let (instance, image) = (daemon.domain("web"), daemon.image());
    for object in [format!("instances/{instance}"), format!("images/{image}")] {
        daemon.set(format!("{object}/owner"), "2001");
        daemon.set(format!("{object}/project"), "games");
    }
    daemon.set(format!("images/{image}/name"), "golden");
    let (owner, member) = (user(2001, "users", &[]), user(2002, "games", &["users"]));
    let strangers = [user(2004, "users", &[]), user(2005, "nogroup", &[])];
    let root = User { uid: 0, gid: 0, groups: vec![] };
    wait_until("the name stands", || daemon.path("by-name/images/golden").exists());
    let public = [("private", false), ("public", true)];
    for (visibility, _) in public {
        daemon.set(format!("images/{image}/visibility"), visibility);
        for (class, id, name) in [("instances", instance, "web"), ("images", image, "golden")] {
            let (home, bin) = (daemon.path(format!("{class}/{id}")), daemon.path(format!("trash/{id}")));
            let by_name = daemon.path(format!("by-name/{class}/{name}"));
            let back = daemon.path(format!("by-name/trash/{name}"));
            for mover in [&owner, &member, &root] {
                for stranger in &strangers {
                    let moved = stranger.act(|| {
                        [errno(fs::rename(&home, &bin)), errno(fs::rename(&by_name, daemon.path("trash").join(name)))]
                    });
                    assert_eq!(moved, [libc::EACCES; 2], "{stranger:?} {class}");
                }
                mover.act(|| fs::rename(&home, &bin)).unwrap_or_else(|error| panic!("{mover:?} {class}: {error}"));
                wait_until("it is put away", || {
                    daemon.read(bin.join("task")).is_empty() && back.is_symlink() && !by_name.is_symlink()
                });
                let said = mover.act(|| fs::read_to_string(bin.join("class"))).expect("his to read");
                assert_eq!(said.trim(), class);
                for stranger in &strangers {
                    let moved = stranger.act(|| [errno(fs::rename(&bin, &home)), errno(fs::rename(&back, &by_name))]);
                    assert_eq!(moved, [libc::EACCES; 2], "{stranger:?} {class} back");
                    let seen = stranger.act(|| {
                        let written = fs::OpenOptions::new().write(true).open(bin.join("expires_at"));
                        let listed = fs::read_dir(daemon.path("trash"));
                        (errno(written), listed.is_ok())
                    });
                    assert_eq!(seen, (libc::EACCES, stranger.uid != 2005), "{stranger:?} {class}");
                }
                mover.act(|| fs::rename(&bin, &home)).unwrap_or_else(|error| panic!("{mover:?} {class}: {error}"));
                wait_until("it is back", || {
                    daemon.read(home.join("task")).is_empty() && by_name.is_symlink() && !back.is_symlink()
                });
            }
        }
    }
}

#[test]
fn two_users_put_away_what_is_theirs_and_see_who_did() {
    let daemon = Daemon::start(&["-o", "access_group=users"]);
    let users = [user(2001, "users", &[]), user(2002, "users", &[])];
    let mut theirs = Vec::new();
    for user in &users {
        let id = daemon.domain(&format!("of-{}", user.uid));
        daemon.set(format!("instances/{id}/owner"), &user.uid.to_string());
        let state = daemon.path(format!("instances/{id}/state"));
        wait_until("it is his", || user.act(|| fs::read(&state).is_ok()));
        user.act(|| fs::rename(daemon.path(format!("instances/{id}")), daemon.path(format!("trash/{id}"))))
            .expect("his own");
        theirs.push(id);
    }
    for (user, id) in users.iter().zip(&theirs) {
        let other: &Uuid = theirs.iter().find(|other| *other != id).expect("two");
        user.act(|| {
            assert_eq!(fs::read_to_string(daemon.path(format!("trash/{id}/state"))).expect("his"), "soft_deleted\n");
            assert_eq!(errno(fs::read(daemon.path(format!("trash/{other}/state")))), libc::EACCES);
            assert_eq!(fs::read_dir(daemon.path("trash")).expect("listed").count(), 2);
        });
    }
}
