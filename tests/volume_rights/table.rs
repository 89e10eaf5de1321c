//! Every actor, every file of a volume, an offer and a backend: read, written in place and by a rename, against rules
//! written from the contract.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::support::{Daemon, User, errno, gid, wait_until, write};
use crate::{ACCESS, PROJECT, daemon, draft, member, offer, opens, owner, root, snapshot, user, volume};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Role {
    Root,
    Owner,
    Project,
    Else,
}

struct Actor {
    who: &'static str,
    user: User,
    role: Role,
    in_access: bool,
}

fn actors() -> Vec<Actor> {
    let actor = |who, user: User, role| {
        let in_access = role == Role::Root || user.groups.contains(&gid(ACCESS)) || user.gid == gid(ACCESS);
        Actor { who, user, role, in_access }
    };
    vec![
        actor("root", root(), Role::Root),
        actor("owner", owner(), Role::Owner),
        actor("project", member(), Role::Project),
        actor(
            "project by a supplementary group",
            User { uid: 2006, gid: gid(ACCESS), groups: vec![gid(PROJECT)] },
            Role::Project,
        ),
        actor("project outside", User { uid: 2007, gid: gid(PROJECT), groups: vec![] }, Role::Project),
        actor("stranger", user(2021), Role::Else),
        actor(
            "stranger of another project",
            User { uid: 2022, gid: gid("audio"), groups: vec![gid(ACCESS)] },
            Role::Else,
        ),
        actor("owner outside", User { uid: 2001, gid: 2001, groups: vec![] }, Role::Owner),
        actor("outsider", User { uid: 2023, gid: 2023, groups: vec![] }, Role::Else),
    ]
}

#[derive(Default)]
struct Table {
    cells: usize,
    differ: Vec<String>,
}

impl Table {
    fn cell(&mut self, got: i32, want: i32, what: impl FnOnce() -> String) {
        self.cells += 1;
        if got != want {
            self.differ.push(format!("{}: {got}, not {want}", what()));
        }
    }

    fn assert(self, least: usize) {
        println!("{} cells: {} differ", self.cells, self.differ.len());
        assert!(self.cells >= least && self.differ.is_empty(), "{} cells\n{}", self.cells, self.differ.join("\n"));
    }
}

/// All files and directories below a directory, relative.
fn below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        let name = PathBuf::from(path.file_name().expect("a name"));
        let kind = path.symlink_metadata().expect("stat").file_type();
        if kind.is_dir() {
            found.extend(below(&path).into_iter().map(|inner| name.join(inner)));
        }
        if !kind.is_symlink() {
            found.push(name);
        }
    }
    found
}

fn rename_over(path: &Path, value: &str) -> i32 {
    let temporary = path.with_file_name(".new");
    let make = || -> io::Result<()> {
        fs::OpenOptions::new().write(true).create_new(true).open(&temporary)?;
        write(&temporary, value.as_bytes())?;
        fs::rename(&temporary, path).inspect_err(|_| drop(fs::remove_file(&temporary)))
    };
    errno(make())
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Draft,
    Available,
    Offered,
}

/// The file of a snapshot, whatever it is called.
fn file_name(file: &Path) -> String {
    match file.strip_prefix("snapshots/before") {
        Ok(inner) if inner.as_os_str().is_empty() => "snapshots/*".to_owned(),
        Ok(inner) => format!("snapshots/*/{}", inner.display()),
        Err(_) => file.display().to_string(),
    }
}

/// A value, what writing it is answered to whom the file is open, and how root undoes it.
type Written = (&'static str, fn(Role, State) -> i32, Option<(&'static str, &'static str)>);

fn value(file: &str) -> Option<Written> {
    const fn fine(_: Role, _: State) -> i32 {
        0
    }
    const fn in_draft(_: Role, state: State) -> i32 {
        if matches!(state, State::Draft) { 0 } else { libc::EINVAL }
    }
    const fn malformed(_: Role, _: State) -> i32 {
        libc::EINVAL
    }
    const fn roots(role: Role, state: State) -> i32 {
        match (role, state) {
            (Role::Root, State::Offered) => libc::EINVAL,
            (Role::Root, _) => 0,
            _ => libc::EPERM,
        }
    }
    Some(match file {
        "name" => ("other", fine, Some(("name", "named"))),
        "description" => ("other", fine, Some(("description", ""))),
        "spec.json" => ("{\"description\": \"other\"}", fine, Some(("description", ""))),
        "delete_protection" => ("1", fine, Some(("delete_protection", "0"))),
        "bootable" => ("1", fine, Some(("bootable", "0"))),
        "locked" => ("1", fine, Some(("locked", "0"))),
        "locked_reason" => ("why", malformed, None),
        "size_bytes" => ("0", |_, _| libc::ERANGE, None),
        "multiattach" => ("1", fine, Some(("multiattach", "0"))),
        "backend" => ("other", |_, state| if state == State::Draft { libc::ENOENT } else { libc::EINVAL }, None),
        "disk_format" => ("raw", in_draft, Some(("disk_format", "qcow2"))),
        "created_from" => ("image:", malformed, None),
        "state" => ("in_use", malformed, None),
        "owner" => ("2099", roots, Some(("owner", "2001"))),
        "project" => ("src", roots, Some(("project", PROJECT))),
        "local_attach" => ("maybe", malformed, None),
        "transfer" => ("gift to=no.such.user", malformed, None),
        "attach" => ("../..", malformed, None),
        "detach" => ("1", fine, None),
        "unmanage" => ("yes", malformed, None),
        "snapshots/*/state" => ("available", malformed, None),
        _ => return None,
    })
}

#[test]
fn everybody_reads_and_writes_exactly_what_the_contract_gives_him_of_a_volume() {
    let daemon = daemon();
    let mut table = Table::default();
    for state in [State::Draft, State::Available, State::Offered] {
        let id = match state {
            State::Draft => draft(&daemon, "volumes"),
            State::Available | State::Offered => volume(&daemon),
        };
        let path = |file: &Path| daemon.path(format!("volumes/{id}")).join(file);
        if state == State::Draft {
            daemon.set(path(Path::new("disk_format")), "qcow2");
        } else {
            snapshot(&daemon, id, "before");
        }
        daemon.set(path(Path::new("name")), "named");
        daemon.set(path(Path::new("project")), PROJECT);
        if state == State::Offered {
            offer(&daemon, &owner(), id, "gift");
        }
        let files = below(&path(Path::new("")));
        assert!(files.len() > 30, "the files are there");
        for actor in actors() {
            let passes = actor.in_access && actor.role != Role::Else;
            for file in &files {
                let (place, name) = (path(file), file_name(file));
                let what = |op: &str| format!("{}, {op} {name}, {state:?}", actor.who);
                let is_verb = ["attach", "detach", "unmanage"].contains(&name.as_str());
                let reads = passes && (!is_verb || actor.role == Role::Root);
                table.cell(opens(&actor.user, &place), if reads { 0 } else { libc::EACCES }, || what("read"));
                if place.is_dir() {
                    let made = place.join("made");
                    let got = actor.user.act(|| errno(fs::write(&made, "x")));
                    let closed = !passes || name == "attachments" && actor.role != Role::Root;
                    let want = if closed { libc::EACCES } else { libc::ENOENT };
                    table.cell(got, want, || what("make a file in"));
                    continue;
                }
                let is_owners = ["owner", "project", "local_attach"].contains(&name.as_str());
                for by_rename in [false, true] {
                    let (text, answer, undo) = value(&name).unwrap_or(("1", |_, _| libc::EACCES, None));
                    let want = match actor.role {
                        _ if !passes => libc::EACCES,
                        // Its mode closes it, which a rename does not ask.
                        Role::Project if is_owners && !by_rename => libc::EACCES,
                        role => answer(role, state),
                    };
                    let got = actor.user.act(|| match by_rename {
                        true => rename_over(&place, text),
                        false => errno(write(&place, text.as_bytes())),
                    });
                    table.cell(got, want, || what(&format!("{text} > by rename {by_rename}")));
                    if let Some((file, value)) = undo.filter(|_| got == 0) {
                        daemon.set(path(Path::new(file)), value);
                    }
                }
            }
            let snapshots = path(Path::new("snapshots"));
            let got = actor.user.act(|| errno(fs::create_dir(snapshots.join(".bad"))));
            table.cell(got, if passes { libc::EINVAL } else { libc::EACCES }, || {
                format!("{}, mkdir {state:?}", actor.who)
            });
        }
    }
    table.assert(2000);
}

#[test]
fn everybody_reads_and_writes_exactly_what_the_contract_gives_him_of_an_offer() {
    let daemon = daemon();
    let mut table = Table::default();
    for by in [owner(), member()] {
        let id = volume(&daemon);
        daemon.set(format!("volumes/{id}/project"), PROJECT);
        let offer = offer(&daemon, &by, id, "gift");
        let directory = daemon.path(format!("transfers/{offer}"));
        for actor in actors() {
            let passes = actor.in_access && actor.role != Role::Else;
            // Who knows a name in it needs no list of them.
            let lists = passes && actor.role != Role::Project;
            let want = if lists { 0 } else { libc::EACCES };
            table.cell(opens(&actor.user, &directory), want, || format!("{}, list", actor.who));
            for file in below(&directory) {
                let (place, name) = (directory.join(&file), file.display().to_string());
                let what = |op: &str| format!("{}, {op} {name}", actor.who);
                let reads = match name.as_str() {
                    "auth_key" => actor.user.uid == by.uid && actor.in_access,
                    "accept" => actor.role == Role::Root,
                    _ => passes,
                };
                table.cell(opens(&actor.user, &place), if reads { 0 } else { libc::EACCES }, || what("read"));
                let want = match name.as_str() {
                    "accept" if actor.in_access => 0,
                    "state" if passes => 0,
                    _ => libc::EACCES,
                };
                // Opened only: each key that is tried counts.
                let got = actor.user.act(|| errno(fs::OpenOptions::new().write(true).open(&place)));
                table.cell(got, want, || what("open for writing"));
            }
            let want = if passes { libc::EINVAL } else { libc::EACCES };
            let got = actor.user.act(|| errno(write(&directory.join("state"), b"accepted")));
            table.cell(got, want, || format!("{}, accepted > state", actor.who));
            for remove in [fs::remove_dir, fs::remove_file] {
                assert_ne!(actor.user.act(|| errno(remove(&directory))), 0, "{}", actor.who);
            }
        }
        let strange = Uuid::new_v4();
        assert_eq!(errno(fs::create_dir(daemon.path(format!("transfers/{strange}")))), libc::EPERM);
    }
    table.assert(250);
}

#[test]
fn the_access_group_reads_backends_and_nobody_changes_one() {
    let daemon = daemon();
    let mut table = Table::default();
    let backend = daemon.path("backends/directory");
    wait_until("it is there", || backend.is_dir());
    let files = below(&backend);
    assert_eq!(files.len(), 3);
    for actor in actors() {
        let want = if actor.in_access { 0 } else { libc::EACCES };
        table.cell(opens(&actor.user, &backend), want, || format!("{}, list", actor.who));
        for file in &files {
            let place = backend.join(file);
            table.cell(opens(&actor.user, &place), want, || format!("{}, read {}", actor.who, file.display()));
            let got = actor.user.act(|| errno(write(&place, b"1")));
            table.cell(got, libc::EACCES, || format!("{}, write {}", actor.who, file.display()));
        }
    }
    assert_eq!(errno(fs::create_dir(daemon.path("backends/another"))), libc::EPERM);
    assert_eq!(errno(fs::remove_dir(&backend)), libc::ENOTEMPTY);
    table.assert(60);
}

/// Whoever holds something open, or has looked before, has no more than the contract gives him afterwards.
#[test]
fn a_change_of_owner_of_a_volume_takes_and_gives_every_right_at_once() {
    let daemon: Daemon = daemon();
    let id = volume(&daemon);
    let place = snapshot(&daemon, id, "before");
    for round in 0..10 {
        let (to, from) = if round % 2 == 0 { (2002, 2001) } else { (2001, 2002) };
        for file in [place.join("state"), daemon.path(format!("volumes/{id}/name"))] {
            assert_eq!((opens(&user(from), &file), opens(&user(to), &file)), (0, libc::EACCES), "round {round}");
        }
        daemon.set(format!("volumes/{id}/owner"), &to.to_string());
        for file in [place.join("state"), daemon.path(format!("volumes/{id}/name"))] {
            assert_eq!((opens(&user(from), &file), opens(&user(to), &file)), (libc::EACCES, 0), "round {round}");
        }
    }
}
