//! A volume changes hands: by a key, by a name, not at all.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::sync::Barrier;
use std::thread;

use instancefs::model::caller::NO_PROJECT;
use uuid::Uuid;

use crate::stored::{snapshot, store};
use crate::support::{Daemon, User, errno, gid};
use crate::{ACCESS, PROJECT, daemon, key, offer, opens, user, writes};

const GIVER: u32 = 2001;
const TAKER: u32 = 2002;

fn giver() -> User {
    user(GIVER)
}

fn taker() -> User {
    user(TAKER)
}

fn member() -> User {
    User { uid: 2005, gid: gid(PROJECT), groups: vec![gid(ACCESS)] }
}

fn root() -> User {
    User { uid: 0, gid: 0, groups: vec![] }
}

/// A daemon with an available volume of the giver, which has a snapshot.
fn with_volume(project: u32) -> (Daemon, Uuid) {
    let mut daemon = daemon();
    let mut id = Uuid::nil();
    store(&mut daemon, |stored| {
        id = stored.volume((GIVER, project), |record| {
            record.snapshots.set("before", snapshot()).expect("there is room");
        });
    });
    (daemon, id)
}

#[test]
fn with_its_key_a_volume_and_its_snapshots_are_closed_to_one_and_open_to_the_other() {
    let (mut daemon, id) = with_volume(NO_PROJECT);
    let path = |file: &str| daemon.path(format!("volumes/{id}/{file}"));
    let (giver, taker) = (giver(), taker());
    for file in ["name", "snapshots/before/state"] {
        assert_eq!((opens(&giver, &path(file)), opens(&taker, &path(file))), (0, libc::EACCES), "{file}");
    }
    let mut held = giver.act(|| OpenOptions::new().write(true).open(path("name"))).expect("his own");
    let offer = offer(&daemon, &giver, id, "gift");
    assert_eq!(daemon.read(path("state")), "awaiting_transfer");
    assert_eq!(writes(&giver, &path("transfer"), "gift"), 0, "it can be said twice");
    assert_eq!(writes(&giver, &path("transfer"), "another"), libc::EINVAL);
    for (file, word) in [("state", "soft_deleted"), ("size_bytes", "2M"), ("owner", "2003")] {
        assert_eq!(errno(daemon.write(path(file), word)), libc::EINVAL, "{word} > {file} while it is offered");
    }
    let accept = daemon.path(format!("transfers/{offer}/accept"));
    let key = key(&daemon, &giver, offer);
    for other in [&taker, &root()] {
        assert_eq!(opens(other, &daemon.path(format!("transfers/{offer}/auth_key"))), libc::EACCES);
    }
    assert_eq!(fs::metadata(daemon.path(format!("transfers/{offer}/auth_key"))).expect("stat").len(), 0);
    assert_eq!(writes(&taker, &accept, "wrong"), libc::EKEYREJECTED);
    assert_eq!(opens(&taker, &path("name")), libc::EACCES);
    assert_eq!(writes(&taker, &accept, &key), 0);
    for file in ["name", "snapshots/before/state"] {
        assert_eq!((opens(&giver, &path(file)), opens(&taker, &path(file))), (libc::EACCES, 0), "{file}");
    }
    assert_eq!(giver.act(|| errno(held.write(b"mine"))), libc::EACCES, "a handle outlives no owner");
    let owned = (daemon.read(path("owner")), daemon.read(path("project")), daemon.read(path("state")));
    assert_eq!(owned, (TAKER.to_string(), "nogroup".to_owned(), "available".to_owned()));
    assert_eq!(daemon.read(path("transfer")), "");
    assert_eq!(writes(&taker, &accept, &key), libc::EINVAL, "once");
    assert_eq!(writes(&taker, &path("name"), "mine"), 0);
    assert_eq!(opens(&giver, &daemon.path(format!("transfers/{offer}/auth_key"))), 0);
    let gone = giver.act(|| errno(fs::read(daemon.path(format!("transfers/{offer}/auth_key")))));
    assert_eq!(gone, libc::ENOENT, "the key is forgotten");
    drop(held);
    assert!(daemon.stop());
    daemon.spawn();
    assert_eq!(daemon.read(format!("volumes/{id}/owner")), TAKER.to_string());
    assert_eq!(daemon.read(format!("transfers/{offer}/state")), "accepted");
}

#[test]
fn a_key_is_in_no_file_of_the_daemon_and_gone_after_a_restart_and_the_offer_is_still_good() {
    let (mut daemon, id) = with_volume(NO_PROJECT);
    let offer = offer(&daemon, &giver(), id, "gift");
    let key = key(&daemon, &giver(), offer);
    let accept = daemon.path(format!("transfers/{offer}/accept"));
    assert_eq!(writes(&taker(), &accept, &format!("{key}0")), libc::EKEYREJECTED);
    let mut looked = 0;
    let mut look = |directory: std::path::PathBuf| {
        for file in find(&directory) {
            // A secret is not to be found there, whoever may read the file; write-only ones have no content.
            let Ok(bytes) = fs::read(&file) else { continue };
            looked += 1;
            let shown = bytes.windows(key.len()).any(|window| window == key.as_bytes());
            assert!(!shown || file.ends_with("auth_key"), "{} shows the key", file.display());
        }
    };
    look(daemon.root());
    assert!(!daemon.log_text().contains(&key));
    assert!(daemon.stop());
    look(daemon.state_directory());
    assert!(looked > 50, "the files are there: {looked}");
    daemon.spawn();
    assert!(!daemon.log_text().contains(&key));
    let gone = giver().act(|| errno(fs::read(daemon.path(format!("transfers/{offer}/auth_key")))));
    assert_eq!(gone, libc::ENOENT);
    assert_eq!(writes(&taker(), &accept, &key), 0);
}

fn find(directory: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(directory).expect("a directory").map(|entry| entry.expect("an entry").path());
    entries
        .flat_map(|path| match path.symlink_metadata().expect("stat") {
            metadata if metadata.is_dir() => find(&path),
            metadata if metadata.is_file() => vec![path],
            _ => Vec::new(),
        })
        .collect()
}

#[test]
fn an_offer_to_a_user_or_a_group_is_taken_by_them_alone_and_without_a_key() {
    let project = gid(PROJECT);
    let mut daemon = daemon();
    let mut ids = Vec::new();
    store(&mut daemon, |stored| ids.extend((0..2).map(|_| stored.volume((GIVER, NO_PROJECT), |_| {}))));
    let in_group = User { uid: 2006, gid: 2006, groups: vec![gid(ACCESS), gid("audio")] };
    for (id, to, right) in [(ids[0], "gift to=2002", taker()), (ids[1], "gift to=:audio", in_group.clone())] {
        let offer = offer(&daemon, &giver(), id, to);
        let path = |file: &str| daemon.path(format!("transfers/{offer}/{file}"));
        assert_eq!(giver().act(|| errno(fs::read(path("auth_key")))), libc::ENOENT, "there is none");
        for other in [user(2009), giver(), root(), if right.uid == TAKER { in_group.clone() } else { taker() }] {
            assert_eq!(writes(&other, &path("accept"), "1"), libc::EACCES, "{other:?}");
        }
        assert_eq!(writes(&right, &path("accept"), "yes please"), libc::EINVAL);
        assert_eq!(writes(&right, &path("accept"), "1"), 0);
        assert_eq!(daemon.read(format!("volumes/{id}/owner")), right.uid.to_string());
    }
    // Into whose project it comes is what that of a new object would be.
    daemon.set(format!("volumes/{}/transfer", ids[0]), "gift to=2005");
    let offer = daemon.read(format!("volumes/{}/transfer", ids[0]));
    assert_eq!(writes(&member(), &daemon.path(format!("transfers/{offer}/accept")), "1"), 0);
    assert_eq!(
        fs::metadata(daemon.path(format!("volumes/{}", ids[0]))).map(|found| gid_of(&found)).ok(),
        Some(project)
    );
}

fn gid_of(metadata: &fs::Metadata) -> u32 {
    std::os::unix::fs::MetadataExt::gid(metadata)
}

#[test]
fn an_offer_is_taken_back_by_owner_project_and_root_and_nobody_else_and_frees_the_volume() {
    let (daemon, id) = with_volume(gid(PROJECT));
    for by in [giver(), member(), root()] {
        let offer = offer(&daemon, &member(), id, &format!("for {}", by.uid));
        let key = key(&daemon, &member(), offer);
        assert_eq!(opens(&giver(), &daemon.path(format!("transfers/{offer}/auth_key"))), libc::EACCES, "not his offer");
        let path = |file: &str| daemon.path(format!("transfers/{offer}/{file}"));
        assert_eq!(writes(&taker(), &path("state"), "cancelled"), libc::EACCES);
        assert_eq!(writes(&by, &path("state"), "accepted"), libc::EINVAL);
        assert_eq!(writes(&by, &path("state"), "cancelled"), 0);
        assert_eq!(writes(&by, &path("state"), "cancelled"), 0, "it can be said twice");
        assert_eq!(daemon.read(path("state")), "cancelled");
        assert_eq!(daemon.read(format!("volumes/{id}/state")), "available");
        assert_eq!(writes(&taker(), &path("accept"), &key), libc::EINVAL);
        assert_eq!(daemon.read(format!("volumes/{id}/owner")), GIVER.to_string());
    }
}

#[test]
fn a_lock_holds_an_offered_volume_until_it_is_opened() {
    let (daemon, id) = with_volume(NO_PROJECT);
    let offer = offer(&daemon, &giver(), id, "gift");
    let key = key(&daemon, &giver(), offer);
    daemon.set(format!("volumes/{id}/locked"), "1");
    let accept = daemon.path(format!("transfers/{offer}/accept"));
    assert_eq!(writes(&taker(), &accept, &key), libc::EPERM);
    assert!(daemon.read(format!("transfers/{offer}/last_error")).contains("locked by"));
    assert_eq!(daemon.read(format!("volumes/{id}/owner")), GIVER.to_string());
    daemon.set(format!("volumes/{id}/locked"), "0");
    assert_eq!(writes(&taker(), &accept, &key), 0);
    daemon.set(format!("volumes/{id}/locked"), "1");
    assert_eq!(writes(&taker(), &daemon.path(format!("volumes/{id}/transfer")), "back"), libc::EPERM);
}

#[test]
fn the_right_key_by_two_at_once_succeeds_once() {
    let (daemon, id) = with_volume(NO_PROJECT);
    let mut by = giver();
    for round in 0..20 {
        let offer = offer(&daemon, &by, id, &format!("round {round}"));
        let key = key(&daemon, &by, offer);
        let accept = daemon.path(format!("transfers/{offer}/accept"));
        let users = [user(2100), user(2101)];
        let start = Barrier::new(users.len());
        let outcomes: Vec<_> = thread::scope(|scope| {
            let taking = users.each_ref().map(|user| {
                scope.spawn(|| {
                    user.act(|| {
                        start.wait();
                        errno(crate::write(&accept, key.as_bytes()))
                    })
                })
            });
            taking.into_iter().map(|taking| taking.join().expect("it ends")).collect()
        });
        let winner = users.iter().zip(&outcomes).filter(|(_, outcome)| **outcome == 0).map(|(user, _)| user);
        let winners: Vec<_> = winner.collect();
        assert!(winners.len() == 1 && outcomes.contains(&libc::EINVAL), "{outcomes:?}");
        assert_eq!(daemon.read(format!("volumes/{id}/owner")), winners[0].uid.to_string());
        by = winners[0].clone();
    }
}

#[test]
fn only_what_is_available_and_ones_own_is_offered() {
    let mut daemon = daemon();
    let (mut busy, mut binned) = (Uuid::nil(), Uuid::nil());
    store(&mut daemon, |stored| {
        let attachment = || instancefs::model::volume::record::Attachment { device: "vdb".to_owned(), attached_at: 1 };
        busy = stored.volume((GIVER, NO_PROJECT), |record| {
            record.attachments.set(&Uuid::new_v4().to_string(), attachment()).expect("there is room");
        });
        binned = stored.volume((GIVER, NO_PROJECT), |_| {});
    });
    let draft = Uuid::new_v4();
    giver().act(|| fs::create_dir(daemon.path(format!("volumes/{draft}"))).expect("a draft"));
    for (id, place) in [(busy, "volumes"), (draft, "volumes")] {
        let path = daemon.path(format!("{place}/{id}/transfer"));
        assert_eq!(writes(&giver(), &path, "gift"), libc::EINVAL);
        assert_eq!(writes(&taker(), &path, "gift"), libc::EACCES);
    }
    let offer = offer(&daemon, &giver(), binned, "gift");
    assert_eq!(writes(&giver(), &daemon.path(format!("transfers/{offer}/state")), "cancelled"), 0);
    fs::rename(daemon.path(format!("volumes/{binned}")), daemon.path(format!("trash/{binned}"))).expect("to the bin");
    assert_eq!(writes(&giver(), &daemon.path(format!("trash/{binned}/transfer")), "gift"), libc::EINVAL);
    for bad in [" ", "to=root", "gift to=no.such.user", "gift\nto=root", "tab\there"] {
        assert_eq!(writes(&giver(), &daemon.path(format!("volumes/{busy}/transfer")), bad), libc::EINVAL, "{bad:?}");
    }
}
