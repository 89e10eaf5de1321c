//! Every state, word, protection and caller, through the mount, against a table written from the interface's contract.

mod support;

use std::fs;
use std::io;
use std::path::PathBuf;

use support::{Daemon, User, errno, gid, wait_until, write};
use uuid::Uuid;

const STATES: [&str; 9] =
    ["draft", "active", "stopped", "paused", "suspended", "shelved", "shelved_offloaded", "error", "soft_deleted"];
const WORDS: [&str; 9] =
    ["active", "stopped", "paused", "suspended", "rescued", "shelved", "shelved_offloaded", "soft_deleted", "deleted"];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Protected {
    Not,
    Locked,
    Terminate,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Who {
    Root,
    Owner,
    Member,
    Stranger,
    Outsider,
}

const WHO: [Who; 5] = [Who::Root, Who::Owner, Who::Member, Who::Stranger, Who::Outsider];

impl Who {
    fn user(self) -> User {
        let (access, project) = (gid("users"), gid("games"));
        match self {
            Who::Root => User { uid: 0, gid: 0, groups: vec![] },
            Who::Owner => User { uid: 2001, gid: project, groups: vec![access] },
            Who::Member => User { uid: 2002, gid: 2002, groups: vec![access, project] },
            Who::Stranger => User { uid: 2003, gid: 2003, groups: vec![access] },
            Who::Outsider => User { uid: 2004, gid: 2004, groups: vec![] },
        }
    }
}

/// What the contract says: 0, or the errno, in its order of refusals. A success from another state than the word's
/// changes the instance.
fn expected(state: &str, word: &str, protected: Protected, who: Who) -> i32 {
    if matches!(who, Who::Stranger | Who::Outsider) {
        return libc::EACCES;
    }
    if satisfies(state, word) {
        return 0;
    }
    let deletes = matches!(word, "soft_deleted" | "deleted");
    if protected == Protected::Locked || (deletes && protected == Protected::Terminate) {
        return libc::EPERM;
    }
    if word == "deleted" && !matches!(state, "draft" | "soft_deleted") {
        return libc::EPERM;
    }
    if word == "rescued" {
        return libc::EOPNOTSUPP;
    }
    let allowed = match word {
        "active" => true,
        "stopped" => matches!(state, "draft" | "active" | "shelved" | "shelved_offloaded" | "error" | "soft_deleted"),
        "shelved" => matches!(state, "active" | "stopped"),
        "shelved_offloaded" => matches!(state, "active" | "stopped" | "shelved"),
        "paused" | "suspended" => state == "active",
        "soft_deleted" => state != "draft",
        "deleted" => true,
        _ => unreachable!("{word}"),
    };
    if allowed { 0 } else { libc::EINVAL }
}

fn satisfies(state: &str, word: &str) -> bool {
    state == word || (state == "shelved_offloaded" && word == "shelved")
}

struct Table {
    daemon: Daemon,
    image: Uuid,
    made: usize,
}

impl Table {
    fn new() -> Table {
        let daemon = Daemon::start(&["-o", "access_group=users,projects=games"]);
        let image = daemon.image();
        daemon.set(format!("images/{image}/owner"), "2001");
        daemon.set(format!("images/{image}/project"), "games");
        Table { daemon, image, made: 0 }
    }

    fn make(&mut self, state: &str, protected: Protected) -> Uuid {
        self.made += 1;
        let daemon = &self.daemon;
        let id = if state == "draft" {
            let id = Uuid::new_v4();
            let path = daemon.path(format!("instances/{id}"));
            Who::Owner.user().act(|| fs::create_dir(path)).expect("the owner makes a draft");
            daemon.set(format!("instances/{id}/image"), &self.image.to_string());
            id
        } else {
            let id = daemon.domain(&format!("table-{}", self.made));
            let steps: &[(&str, &str)] = match state {
                "active" => &[("start", "active")],
                "stopped" | "shelved" | "shelved_offloaded" | "soft_deleted" => &[],
                "paused" => &[("start", "active"), ("pause", "paused")],
                "suspended" => &[("start", "active"), ("save", "suspended")],
                "error" => &[("start", "active"), ("crash", "error")],
                _ => unreachable!("{state}"),
            };
            for (what, state) in steps {
                daemon.domain_does(id, what, state);
            }
            if state.starts_with("shelved") {
                daemon.set(format!("instances/{id}/state"), state);
                daemon.wait_state(id, state);
            }
            daemon.set(format!("instances/{id}/owner"), "2001");
            daemon.set(format!("instances/{id}/project"), "games");
            id
        };
        if state == "soft_deleted" {
            daemon.set(format!("instances/{id}/state"), state);
            wait_until("it is in the bin", || self.state(id) == state);
            wait_until("it is at rest", || daemon.read(self.file(id, "task")).is_empty());
        }
        match protected {
            Protected::Not => {}
            Protected::Locked => daemon.set(self.file(id, "locked"), "1"),
            Protected::Terminate => daemon.set(self.file(id, "disable_terminate"), "1"),
        }
        assert_eq!(self.state(id), state);
        id
    }

    /// A file of an instance, in the bin or not.
    fn file(&self, id: Uuid, name: &str) -> String {
        let binned = format!("trash/{id}");
        let directory = if self.daemon.path(&binned).exists() { binned } else { format!("instances/{id}") };
        format!("{directory}/{name}")
    }

    fn state(&self, id: Uuid) -> String {
        self.daemon.read(self.file(id, "state"))
    }
}

#[test]
fn every_word_from_every_state_for_everybody_does_what_the_contract_says() {
    let mut table = Table::new();
    let mut wrong = Vec::new();
    for state in STATES {
        for protected in [Protected::Not, Protected::Locked, Protected::Terminate] {
            let mut id = table.make(state, protected);
            for who in WHO {
                for word in WORDS {
                    let path = table.daemon.path(table.file(id, "state"));
                    let got = errno(who.user().act(|| write(&path, format!("{word}\n").as_bytes())));
                    let want = expected(state, word, protected, who);
                    if got != want {
                        wrong.push(format!("{state} {word} {protected:?} {who:?}: got {got}, want {want}"));
                    }
                    if got != 0 && table.state(id) != state {
                        wrong.push(format!("{state} {word} {protected:?} {who:?}: refused, but the state changed"));
                    }
                    if got == 0 && !satisfies(state, word) {
                        if word == "deleted" {
                            wait_until("it is gone", || !path.exists());
                        } else {
                            wait_until(word, || table.state(id) == word);
                        }
                        id = table.make(state, protected);
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} cells differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn moving_a_link_between_states_is_judged_like_writing_the_word() {
    let mut table = Table::new();
    for (state, word, who, want) in [
        ("active", "stopped", Who::Stranger, libc::EACCES),
        ("active", "stopped", Who::Outsider, libc::EACCES),
        ("paused", "stopped", Who::Owner, libc::EPERM),
        ("active", "rescued", Who::Owner, libc::EOPNOTSUPP),
        ("paused", "shelved", Who::Owner, libc::EPERM),
        ("active", "shelved", Who::Owner, 0),
        ("active", "stopping", Who::Owner, libc::EPERM),
        ("active", "stopped", Who::Member, 0),
        ("stopped", "active", Who::Root, 0),
    ] {
        let id = table.make(state, Protected::Not);
        let link = |word: &str| -> PathBuf { table.daemon.path(format!("by-state/instances/{word}/{id}")) };
        wait_until("the link stands", || link(state).is_symlink());
        let moved: io::Result<()> = who.user().act(|| fs::rename(link(state), link(word)));
        assert_eq!(errno(moved), want, "{state} -> {word} by {who:?}");
        if want == 0 {
            table.daemon.wait_state(id, word);
            wait_until("the link arrives", || link(word).is_symlink() && !link(state).is_symlink());
        } else {
            assert!(link(state).is_symlink() && !link(word).is_symlink());
        }
    }
}

#[test]
fn a_locked_instance_refuses_root_and_says_who_locked_it_when_and_why() {
    let mut table = Table::new();
    let id = table.make("active", Protected::Not);
    let file = |name: &str| format!("instances/{id}/{name}");
    let path = table.daemon.path(file("locked"));
    Who::Owner.user().act(|| write(&path, b"1\n")).expect("the owner locks");
    let path = table.daemon.path(file("locked_reason"));
    Who::Member.user().act(|| write(&path, b"quarterly closing\n")).expect("a member gives the reason");
    assert_eq!(table.daemon.read(file("locked_level")), "owner");
    for (target, want) in [("state", "stopped"), ("description", "x"), ("disable_terminate", "1"), ("reboot", "hard")] {
        assert_eq!(errno(table.daemon.write(file(target), want)), libc::EPERM, "{target}");
    }
    let moved = fs::rename(table.daemon.path(file("")), table.daemon.path(format!("trash/{id}")));
    assert_eq!(errno(moved), libc::EPERM);
    let last = table.daemon.read(file("last_error"));
    assert!(last.contains("2001") && last.contains("quarterly closing") && last.contains("EPERM"), "{last}");
    table.daemon.set(file("locked"), "1");
    assert_eq!(table.daemon.read(file("locked_level")), "admin", "root's 1 raises an owner's lock");
    let path = table.daemon.path(file("locked"));
    assert_eq!(
        errno(Who::Owner.user().act(|| write(&path, b"0\n"))),
        libc::EPERM,
        "an admin's lock is not the owner's"
    );
    table.daemon.set(file("locked"), "0");
    assert_eq!(table.daemon.read(file("locked_reason")), "", "unlocking clears the reason");
    table.daemon.set(file("state"), "stopped");
    table.daemon.wait_state(id, "stopped");
    assert_eq!(table.daemon.read(file("last_error")), "ok");
}
