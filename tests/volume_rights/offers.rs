//! A volume changes hands: by a key, by a name, not at all.

use std::fs::{self, OpenOptions};
use std::io::Write;

use crate::support::{User, errno, gid};
use crate::{
    ACCESS, OWNER, PROJECT, daemon, draft, key, member, offer, opens, owner, root, snapshot, user, volume, writes,
};

const TAKER: u32 = 2002;

fn taker() -> User {
    user(TAKER)
}

#[test]
fn with_its_key_a_volume_and_its_snapshots_are_closed_to_one_and_open_to_the_other() {
    let mut daemon = daemon();
    let id = volume(&daemon);
    snapshot(&daemon, id, "before");
    let path = |file: &str| daemon.path(format!("volumes/{id}/{file}"));
    let (owner, taker) = (owner(), taker());
    for file in ["name", "snapshots/before/state"] {
        assert_eq!((opens(&owner, &path(file)), opens(&taker, &path(file))), (0, libc::EACCES), "{file}");
    }
    let mut held = owner.act(|| OpenOptions::new().write(true).open(path("name"))).expect("his own");
    let offer = offer(&daemon, &owner, id, "gift");
    assert_eq!(daemon.read(path("state")), "awaiting_transfer");
    assert_eq!(writes(&owner, &path("transfer"), "gift"), 0, "it can be said twice");
    assert_eq!(writes(&owner, &path("transfer"), "another"), libc::EINVAL);
    for (file, word) in [("state", "soft_deleted"), ("size_bytes", "2M"), ("owner", "2003")] {
        assert_eq!(errno(daemon.write(path(file), word)), libc::EINVAL, "{word} > {file} while it is offered");
    }
    let accept = daemon.path(format!("transfers/{offer}/accept"));
    let key = key(&daemon, &owner, offer);
    for other in [&taker, &root()] {
        assert_eq!(opens(other, &daemon.path(format!("transfers/{offer}/auth_key"))), libc::EACCES);
    }
    assert_eq!(fs::metadata(daemon.path(format!("transfers/{offer}/auth_key"))).expect("stat").len(), 0);
    assert_eq!(writes(&taker, &accept, "wrong"), libc::EKEYREJECTED);
    assert_eq!(opens(&taker, &path("name")), libc::EACCES);
    assert_eq!(writes(&taker, &accept, &key), 0);
    for file in ["name", "snapshots/before/state"] {
        assert_eq!((opens(&owner, &path(file)), opens(&taker, &path(file))), (libc::EACCES, 0), "{file}");
    }
    assert_eq!(owner.act(|| errno(held.write(b"mine"))), libc::EACCES, "a handle outlives no owner");
    let owned = (daemon.read(path("owner")), daemon.read(path("project")), daemon.read(path("state")));
    assert_eq!(owned, (TAKER.to_string(), "nogroup".to_owned(), "available".to_owned()));
    assert_eq!(daemon.read(path("transfer")), "");
    assert_eq!(writes(&taker, &accept, &key), libc::EINVAL, "once");
    assert_eq!(writes(&taker, &path("name"), "mine"), 0);
    assert_eq!(opens(&owner, &daemon.path(format!("transfers/{offer}/auth_key"))), 0);
    let gone = owner.act(|| errno(fs::read(daemon.path(format!("transfers/{offer}/auth_key")))));
    assert_eq!(gone, libc::ENOENT, "the key is forgotten");
    drop(held);
    assert!(daemon.stop());
    daemon.spawn();
    assert_eq!(daemon.read(format!("volumes/{id}/owner")), TAKER.to_string());
    assert_eq!(daemon.read(format!("transfers/{offer}/state")), "accepted");
}

#[test]
fn a_key_is_in_no_file_of_the_daemon_and_gone_after_a_restart_and_the_offer_is_still_good() {
    let mut daemon = daemon();
    let id = volume(&daemon);
    let offer = offer(&daemon, &owner(), id, "gift");
    let key = key(&daemon, &owner(), offer);
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
    let gone = owner().act(|| errno(fs::read(daemon.path(format!("transfers/{offer}/auth_key")))));
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
    let daemon = daemon();
    let ids = [volume(&daemon), volume(&daemon)];
    let in_group = User { uid: 2006, gid: 2006, groups: vec![gid(ACCESS), gid("audio")] };
    for (id, to, right) in [(ids[0], "gift to=2002", taker()), (ids[1], "gift to=:audio", in_group.clone())] {
        let offer = offer(&daemon, &owner(), id, to);
        let path = |file: &str| daemon.path(format!("transfers/{offer}/{file}"));
        assert_eq!(owner().act(|| errno(fs::read(path("auth_key")))), libc::ENOENT, "there is none");
        for other in [user(2009), owner(), root(), if right.uid == TAKER { in_group.clone() } else { taker() }] {
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
    let daemon = daemon();
    let id = volume(&daemon);
    daemon.set(format!("volumes/{id}/project"), PROJECT);
    for by in [owner(), member(), root()] {
        let offer = offer(&daemon, &member(), id, &format!("for {}", by.uid));
        let key = key(&daemon, &member(), offer);
        assert_eq!(opens(&owner(), &daemon.path(format!("transfers/{offer}/auth_key"))), libc::EACCES, "not his offer");
        let path = |file: &str| daemon.path(format!("transfers/{offer}/{file}"));
        assert_eq!(writes(&taker(), &path("state"), "cancelled"), libc::EACCES);
        assert_eq!(writes(&by, &path("state"), "accepted"), libc::EINVAL);
        assert_eq!(writes(&by, &path("state"), "cancelled"), 0);
        assert_eq!(writes(&by, &path("state"), "cancelled"), 0, "it can be said twice");
        assert_eq!(daemon.read(path("state")), "cancelled");
        assert_eq!(daemon.read(format!("volumes/{id}/state")), "available");
        assert_eq!(writes(&taker(), &path("accept"), &key), libc::EINVAL);
        assert_eq!(daemon.read(format!("volumes/{id}/owner")), OWNER.to_string());
    }
}

#[test]
fn a_lock_holds_an_offered_volume_until_it_is_opened() {
    let daemon = daemon();
    let id = volume(&daemon);
    let offer = offer(&daemon, &owner(), id, "gift");
    let key = key(&daemon, &owner(), offer);
    daemon.set(format!("volumes/{id}/locked"), "1");
    let accept = daemon.path(format!("transfers/{offer}/accept"));
    assert_eq!(writes(&taker(), &accept, &key), libc::EPERM);
    assert!(daemon.read(format!("transfers/{offer}/last_error")).contains("locked by"));
    assert_eq!(daemon.read(format!("volumes/{id}/owner")), OWNER.to_string());
    daemon.set(format!("volumes/{id}/locked"), "0");
    assert_eq!(writes(&taker(), &accept, &key), 0);
    daemon.set(format!("volumes/{id}/locked"), "1");
    assert_eq!(writes(&taker(), &daemon.path(format!("volumes/{id}/transfer")), "back"), libc::EPERM);
}

#[test]
fn only_what_is_available_and_ones_own_is_offered() {
    let daemon = daemon();
    let (busy, binned, draft) = (volume(&daemon), volume(&daemon), draft(&daemon, "volumes"));
    let instance = daemon.domain("holder");
    daemon.set(format!("volumes/{busy}/attach"), &instance.to_string());
    assert_eq!(daemon.read(format!("volumes/{busy}/state")), "in_use");
    for (id, place) in [(busy, "volumes"), (draft, "volumes")] {
        let path = daemon.path(format!("{place}/{id}/transfer"));
        assert_eq!(writes(&owner(), &path, "gift"), libc::EINVAL);
        assert_eq!(writes(&taker(), &path, "gift"), libc::EACCES);
    }
    let offer = offer(&daemon, &owner(), binned, "gift");
    assert_eq!(writes(&owner(), &daemon.path(format!("transfers/{offer}/state")), "cancelled"), 0);
    fs::rename(daemon.path(format!("volumes/{binned}")), daemon.path(format!("trash/{binned}"))).expect("to the bin");
    assert_eq!(writes(&owner(), &daemon.path(format!("trash/{binned}/transfer")), "gift"), libc::EINVAL);
    for bad in ["to=root", "gift to=no.such.user", "gift\nto=root", "tab\there"] {
        assert_eq!(writes(&owner(), &daemon.path(format!("volumes/{busy}/transfer")), bad), libc::EINVAL, "{bad:?}");
    }
}
