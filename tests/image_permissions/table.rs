//! Every actor, every file, every kind of access, in every state and visibility, against rules written from the contract.

use std::fs::{self, OpenOptions};
use std::path::Path;
use std::path::PathBuf;

use uuid::Uuid;

use crate::support::{Daemon, User, errno, gid, wait_until, write};
use crate::{ACCESS, daemon, read, rename_over};

const PROJECT: &str = "games";
/// Projects that the image is shared with, by what they say of it.
const MEMBERS: [(&str, &str); 3] = [("audio", "pending"), ("video", "accepted"), ("cdrom", "rejected")];
/// One that it is not shared with.
const OTHER: &str = "tape";

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Draft,
    Active,
    Deactivated,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Role {
    Root,
    Owner,
    Project,
    Else,
}

#[derive(Debug)]
struct Actor {
    who: &'static str,
    user: User,
    role: Role,
    /// The member project that he is in.
    member: Option<&'static str>,
    in_access: bool,
}

fn actors() -> Vec<Actor> {
    let mut actors = Vec::new();
    let mut add = |who, uid, primary: u32, groups: &[&str], role, member| {
        let in_access = role == Role::Root || groups.contains(&ACCESS) || primary == gid(ACCESS);
        let user = User { uid, gid: primary, groups: groups.iter().map(|name| gid(name)).collect() };
        actors.push(Actor { who, user, role, member, in_access });
    };
    add("root", 0, 0, &[], Role::Root, None);
    add("owner", 2001, gid(PROJECT), &[ACCESS], Role::Owner, None);
    add("owner in a member", 2001, gid("video"), &[ACCESS], Role::Owner, Some("video"));
    add("project", 2002, gid(PROJECT), &[ACCESS], Role::Project, None);
    add("project by a supplementary group", 2003, gid(ACCESS), &[PROJECT], Role::Project, None);
    add("project outside", 2004, gid(PROJECT), &[], Role::Project, None);
    add("pending", 2011, gid("audio"), &[ACCESS], Role::Else, Some("audio"));
    add("pending by a supplementary group", 2012, 2012, &["audio", ACCESS], Role::Else, Some("audio"));
    add("accepted", 2013, gid("video"), &[ACCESS], Role::Else, Some("video"));
    add("accepted by a supplementary group", 2014, gid(ACCESS), &["video"], Role::Else, Some("video"));
    add("rejected", 2015, gid("cdrom"), &[ACCESS], Role::Else, Some("cdrom"));
    add("rejected by a supplementary group", 2016, 2016, &[ACCESS, "cdrom"], Role::Else, Some("cdrom"));
    add("member outside", 2017, gid("video"), &["audio"], Role::Else, Some("video"));
    add("stranger", 2021, 2021, &[ACCESS], Role::Else, None);
    add("outsider", 2022, 2022, &[], Role::Else, None);
    actors
}

/// An image in a state and a visibility, after it was shared.
struct Scene<'a> {
    daemon: &'a Daemon,
    id: Uuid,
    state: State,
    visibility: &'static str,
}

impl<'a> Scene<'a> {
    /// Shares an image, has everybody look at it, and only then gives it its visibility: what the kernel believes by
    /// then must not last.
    fn new(daemon: &'a Daemon, state: State, visibility: &'static str) -> Scene<'a> {
        let id = match state {
            State::Draft => {
                let id = Uuid::new_v4();
                fs::create_dir(daemon.path(format!("images/{id}"))).expect("a draft");
                daemon.set(format!("images/{id}/disk_format"), "qcow2");
                id
            }
            State::Active | State::Deactivated => daemon.image(),
        };
        let scene = Scene { daemon, id, state, visibility };
        scene.set("owner", "2001");
        scene.set("project", PROJECT);
        scene.set("visibility", "shared");
        for (project, status) in MEMBERS {
            scene.set("share", project);
            scene.set(&format!("members/{project}"), status);
        }
        for actor in actors() {
            let (data, name) = (scene.path("data"), scene.path("name"));
            let seen = actor.user.act(|| (read(&scene.path("")), read(&name), read(&data)));
            let want = if scene.reads("shared", &actor) { 0 } else { libc::EACCES };
            assert_eq!(seen, (want, want, want), "{} looks at a shared {state:?} image", actor.who);
        }
        scene.set("visibility", visibility);
        if state == State::Deactivated {
            scene.set("state", "deactivated");
        }
        scene
    }

    fn path(&self, file: &str) -> PathBuf {
        self.daemon.path(format!("images/{}/{file}", self.id))
    }

    fn set(&self, file: &str, value: &str) {
        self.daemon.set(format!("images/{}/{file}", self.id), value);
    }

    /// Whether he reads it under a visibility: a draft is nobody else's business.
    fn reads(&self, visibility: &str, actor: &Actor) -> bool {
        let by_sharing = match visibility {
            "public" => true,
            "shared" => actor.member.is_some(),
            _ => false,
        };
        actor.in_access && (actor.role != Role::Else || self.state != State::Draft && by_sharing)
    }

    fn may_speak(&self, actor: &Actor, project: &str) -> bool {
        let is_member = actor.member == Some(project) && self.visibility == "shared" && self.state != State::Draft;
        is_member || actor.role == Role::Root
    }

    fn read_expected(&self, actor: &Actor, file: &str) -> i32 {
        let may = match file {
            "share" | "unshare" => actor.role == Role::Root,
            "data" if self.state == State::Deactivated => actor.role == Role::Root,
            _ => self.reads(self.visibility, actor),
        };
        if may { 0 } else { libc::EACCES }
    }

    /// Of a write in place; `by_rename` of a file made next to it.
    fn write_expected(&self, actor: &Actor, file: &str, value: &str, by_rename: bool) -> i32 {
        if !self.reads(self.visibility, actor) {
            return libc::EACCES;
        }
        if let Some(project) = file.strip_prefix("members/") {
            return match (actor.role, self.may_speak(actor, project)) {
                (Role::Else, true) if by_rename => libc::EACCES,
                (_, true) => 0,
                (Role::Else, false) => libc::EACCES,
                (_, false) => libc::EPERM,
            };
        }
        if actor.role == Role::Else {
            return libc::EACCES;
        }
        let in_draft = if self.state == State::Draft { 0 } else { libc::EINVAL };
        match file {
            "data" => {
                if self.state == State::Draft && !by_rename {
                    0
                } else {
                    libc::EACCES
                }
            }
            "disk_format" | "import_from" => in_draft,
            "owner" | "project" => match actor.role {
                Role::Root => 0,
                Role::Project if !by_rename => libc::EACCES,
                Role::Owner | Role::Project | Role::Else => libc::EPERM,
            },
            "visibility" if value == "public" && self.visibility != "public" && actor.role != Role::Root => libc::EPERM,
            "share" if self.visibility != "shared" => libc::EINVAL,
            "name" | "description" | "visibility" | "share" | "unshare" | "delete_protection" | "min_disk_bytes"
            | "min_memory_bytes" | "spec.json" => 0,
            _ => libc::EACCES,
        }
    }

    fn word_expected(&self, actor: &Actor, word: &str, protected: bool) -> i32 {
        if actor.role == Role::Else || !actor.in_access {
            return libc::EACCES;
        }
        match (word, self.state) {
            ("active", State::Active | State::Deactivated) => 0,
            // Nothing is in it.
            ("active", State::Draft) => libc::EINVAL,
            ("deactivated", State::Active | State::Deactivated) => 0,
            ("soft_deleted", State::Active | State::Deactivated) if !protected => 0,
            ("soft_deleted", State::Draft) if !protected => libc::EINVAL,
            ("deleted", State::Draft) if !protected => 0,
            ("deleted" | "soft_deleted", _) => libc::EPERM,
            _ => libc::EINVAL,
        }
    }
}

/// What is written into a file.
struct Change {
    file: String,
    /// Valid ones.
    values: Vec<&'static str>,
    /// How root undoes it, if not by writing what was there before.
    undo: Option<(&'static str, &'static str)>,
}

/// What is written into each file.
fn changes(daemon: &Scene<'_>) -> Vec<Change> {
    let mut files = Vec::new();
    for entry in fs::read_dir(daemon.path("")).expect("the image's directory") {
        let entry = entry.expect("an entry");
        let name = entry.file_name().into_string().expect("UTF-8");
        if entry.file_type().expect("a type").is_file() {
            files.push(name);
        }
    }
    files.extend(MEMBERS.map(|(project, _)| format!("members/{project}")));
    let with_values = files.into_iter().map(|file| {
        let (values, undo): (&[&'static str], _) = match file.as_str() {
            "name" | "description" => (&["other"], None),
            "disk_format" => (&["raw"], None),
            "import_from" => (&["https://localhost/image"], None),
            "visibility" => (&["private", "shared", "public"], None),
            "spec.json" => (&["{\"description\": \"other\"}"], Some(("description", ""))),
            "share" => (&[OTHER], Some(("unshare", OTHER))),
            "unshare" => (&[OTHER], None),
            "delete_protection" | "min_disk_bytes" | "min_memory_bytes" => (&["1"], None),
            "owner" => (&["2099"], None),
            "project" => (&["src"], None),
            "members/cdrom" => (&["accepted"], None),
            name if name.starts_with("members/") => (&["rejected"], None),
            _ => (&["1"], None),
        };
        Change { file, values: values.to_vec(), undo }
    });
    with_values.filter(|change| change.file != "state").collect()
}

/// Data is opened only: a byte in it would make another draft of it.
fn write_in_place(path: &Path, value: &str) -> i32 {
    match path.ends_with("data") {
        true => errno(OpenOptions::new().write(true).open(path)),
        false => errno(write(path, value.as_bytes())),
    }
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

    fn assert(self) {
        println!("{} cells: {} differ", self.cells, self.differ.len());
        assert!(self.cells > 0 && self.differ.is_empty(), "{}", self.differ.join("\n"));
    }
}

fn scenes(daemon: &Daemon) -> Vec<Scene<'_>> {
    let states = [State::Draft, State::Active, State::Deactivated];
    let visibilities = ["private", "shared", "public"];
    states.into_iter().flat_map(|state| visibilities.map(|visibility| Scene::new(daemon, state, visibility))).collect()
}

#[test]
fn everybody_reads_and_writes_exactly_what_the_contract_gives_him() {
    let daemon = daemon();
    let actors = actors();
    let mut table = Table::default();
    for scene in scenes(&daemon) {
        let changes = changes(&scene);
        assert!(changes.len() > 25, "the files are there");
        for actor in &actors {
            let what = |op: &str| format!("{}, {op}, {:?} {}", actor.who, scene.state, scene.visibility);
            for directory in ["", "members", "metadata"] {
                let want = if scene.reads(scene.visibility, actor) { 0 } else { libc::EACCES };
                let path = scene.path(directory);
                // stat(2) of what lies in it needs the same right.
                table.cell(actor.user.act(|| errno(fs::read_dir(&path))), want, || what("list"));
                let inside = path.join(".");
                table.cell(actor.user.act(|| errno(fs::metadata(&inside))), want, || what("pass"));
            }
            for Change { file, values, undo } in &changes {
                let path = scene.path(file);
                let got = actor.user.act(|| read(&path));
                table.cell(got, scene.read_expected(actor, file), || what(&format!("read {file}")));
                for value in values {
                    for by_rename in [false, true] {
                        let before = fs::read_to_string(&path).unwrap_or_default();
                        let got = actor.user.act(|| match by_rename {
                            true => rename_over(&path, value),
                            false => write_in_place(&path, value),
                        });
                        let want = scene.write_expected(actor, file, value, by_rename);
                        table.cell(got, want, || what(&format!("{value} > {file}, by rename {by_rename}")));
                        match undo {
                            Some((file, value)) => scene.set(file, value),
                            None if got == 0 && file != "data" && file != "unshare" => scene.set(file, before.trim()),
                            None => {}
                        }
                    }
                }
            }
        }
    }
    table.assert();
}

#[test]
fn everybody_changes_the_state_and_names_the_image_exactly_as_the_contract_gives_him() {
    let daemon = daemon();
    let actors = actors();
    let mut table = Table::default();
    let instance = |actor: &Actor| {
        let id = Uuid::new_v4();
        actor.user.act(|| fs::create_dir(daemon.path(format!("instances/{id}"))).expect("a draft"));
        id
    };
    let instances: Vec<_> = actors.iter().map(|actor| actor.in_access.then(|| instance(actor))).collect();
    for mut scene in scenes(&daemon) {
        for (actor, instance) in actors.iter().zip(&instances) {
            let (state, visibility) = (scene.state, scene.visibility);
            let what = |op: &str| format!("{}, {op}, {state:?} {visibility}", actor.who);
            if let Some(instance) = instance {
                let path = daemon.path(format!("instances/{instance}/image"));
                let want = if scene.reads(scene.visibility, actor) { 0 } else { libc::EACCES };
                let id = scene.id.to_string();
                table.cell(actor.user.act(|| errno(write(&path, id.as_bytes()))), want, || what("name it"));
            }
            for protected in [false, true] {
                scene.set("delete_protection", if protected { "1" } else { "0" });
                for word in ["active", "deactivated", "soft_deleted", "deleted", "draft", "error", "bogus"] {
                    let path = scene.path("state");
                    let before = fs::read_to_string(&path).expect("a state");
                    let want = match (word == before.trim(), actor.role) {
                        (true, Role::Root | Role::Owner | Role::Project) if actor.in_access => 0,
                        _ => scene.word_expected(actor, word, protected),
                    };
                    let got = actor.user.act(|| errno(write(&path, word.as_bytes())));
                    table.cell(got, want, || what(&format!("{word} > state, protected {protected}")));
                    if got == 0 && word == "deleted" {
                        wait_until("it is gone", || !path.exists());
                        scene = Scene::new(&daemon, scene.state, scene.visibility);
                    } else if got == 0 && word == "soft_deleted" {
                        wait_until("it is in the bin", || !path.exists());
                        daemon.set(format!("trash/{}/state", scene.id), before.trim());
                        wait_until("it is back", || path.exists());
                    } else if got == 0 {
                        scene.set("state", before.trim());
                    }
                }
            }
            if scene.state != State::Draft {
                scene.set("delete_protection", "0");
                let (from, to) = match scene.state {
                    State::Active => ("active", "deactivated"),
                    State::Draft | State::Deactivated => ("deactivated", "active"),
                };
                let link = |word: &str| daemon.path(format!("by-state/images/{word}/{}", scene.id));
                wait_until("the link stands", || link(from).is_symlink());
                let want = scene.word_expected(actor, to, false);
                let got = actor.user.act(|| errno(fs::rename(link(from), link(to))));
                table.cell(got, want, || what(&format!("mv from {from} to {to}")));
                if got == 0 {
                    assert_eq!(fs::read_to_string(scene.path("state")).expect("a state").trim(), to);
                    scene.set("state", from);
                }
            }
        }
    }
    table.assert();
}
