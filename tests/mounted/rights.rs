//! Who may read and open what: the modes of the documents, for everybody.

use std::fs::{self, File, OpenOptions};
use std::path::Path;

use uuid::Uuid;

use crate::support::{Daemon, User, errno, gid, wait_until, write};

/// Their rights to an object of user 2001 and group `games`, and to the class directories.
struct Person {
    who: &'static str,
    user: User,
    /// Of the owner, group and other bits.
    bits: u32,
    sees_names: bool,
}

fn people() -> Vec<Person> {
    let (access, project) = (gid("users"), gid("games"));
    let person =
        |who, uid, gid, groups, bits, sees_names| Person { who, user: User { uid, gid, groups }, bits, sees_names };
    vec![
        person("owner", 2001, project, vec![access], 0o700, true),
        person("owner without the project", 2001, 2001, vec![access], 0o700, true),
        person("member", 2002, project, vec![access], 0o070, true),
        person("member by a supplementary group", 2003, 2003, vec![access, project], 0o070, true),
        person("stranger", 2004, 2004, vec![access], 0o007, true),
        person("stranger whose access group is his primary one", 2004, access, vec![], 0o007, true),
        person("outsider", 2005, 2005, vec![], 0o007, false),
        person("outsider in the project", 2006, 2006, vec![project], 0o070, false),
        person("nobody", 65534, 65534, vec![access], 0o007, false),
    ]
}

fn documented(document: &str) -> Vec<(String, u32)> {
    let rows = document.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.filter_map(|row| {
        let (name, rest) = row.split_once("` | ")?;
        let mode = u32::from_str_radix(rest.split(' ').next()?, 8).ok()?;
        Some((name.to_owned(), mode))
    })
    .collect()
}

fn try_open(path: &Path, writing: bool) -> i32 {
    let opened = if writing { OpenOptions::new().write(true).open(path) } else { File::open(path) };
    errno(opened)
}

#[test]
fn everybody_may_open_exactly_what_the_documents_give_him() {
    let daemon = Daemon::start(&["-o", "access_group=users,projects=games"]);
    let instance = daemon.domain("web");
    daemon.domain_does(instance, "start", "active");
    let image = daemon.image();
    let task = fs::read_link(daemon.path(format!("images/{image}/last_task"))).expect("a task");
    let task: Uuid = task.file_name().and_then(|name| name.to_str()).expect("an id").parse().expect("an id");
    for object in [format!("instances/{instance}"), format!("images/{image}")] {
        daemon.set(format!("{object}/owner"), "2001");
        daemon.set(format!("{object}/project"), "games");
    }
    wait_until("the definition is there", || daemon.path(format!("instances/{instance}/domain.xml")).exists());
    let mut wrong = Vec::new();
    for (document, directory, is_his) in [
        (include_str!("../../docs/abi/instances.md"), format!("instances/{instance}"), true),
        (include_str!("../../docs/abi/images.md"), format!("images/{image}"), true),
        (include_str!("../../docs/abi/tasks.md"), format!("tasks/{task}"), false),
    ] {
        for (name, mode) in documented(document) {
            // An active image's data is frozen.
            let mode = if name == "data" { 0o440 } else { mode };
            let path = daemon.path(format!("{directory}/{name}"));
            if !path.exists() {
                continue;
            }
            for Person { who, user, bits, sees_names } in people() {
                for (writing, right) in [(false, 0o444), (true, 0o222)] {
                    let may = sees_names && is_his && mode & bits & right != 0;
                    let got = user.act(|| try_open(&path, writing));
                    // Whoever gets as far as to a directory hears what it is, whatever its bits say.
                    let reaches = sees_names && is_his && mode & bits != 0;
                    let want = match may {
                        _ if reaches && writing && path.is_dir() => libc::EISDIR,
                        true => 0,
                        false => libc::EACCES,
                    };
                    if got != want {
                        wrong.push(format!("{who}, {directory}/{name}, writing {writing}: {got}, not {want}"));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_class_directories_are_for_the_access_group_and_the_root_hides_them() {
    let daemon = Daemon::start(&["-o", "access_group=users,admin_group=games"]);
    let id = daemon.domain("web");
    wait_until("the name stands", || daemon.path("by-name/instances/web").is_symlink());
    let person = |uid, groups| User { uid, gid: uid, groups };
    let (member, outsider) = (person(2001, vec![gid("users")]), person(2002, vec![]));
    let admin = person(2003, vec![gid("users"), gid("games")]);
    for name in ["instances", "images", "tasks", "trash", "by-name/instances", "by-state/instances/stopped", "summary"]
    {
        let list = || errno(fs::read_dir(daemon.path(name)));
        assert_eq!(member.act(list), 0, "{name}");
        assert_eq!(outsider.act(list), libc::EACCES, "{name}");
    }
    for (name, of_member, of_outsider) in [
        ("README", 0, 0),
        ("health", 0, 0),
        ("abi_version", 0, libc::EACCES),
        ("last_error", 0, libc::EACCES),
        ("summary/instances", 0, libc::EACCES),
        ("events", libc::EACCES, libc::EACCES),
        ("metrics", libc::EACCES, libc::EACCES),
    ] {
        let open = || try_open(&daemon.path(name), false);
        assert_eq!(member.act(open), of_member, "{name}");
        assert_eq!(outsider.act(open), of_outsider, "{name}");
    }
    for name in ["events", "metrics"] {
        assert_eq!(admin.act(|| try_open(&daemon.path(name), false)), 0, "{name}");
    }
    member.act(|| {
        assert_eq!(errno(fs::read_dir(daemon.path(format!("instances/{id}")))), libc::EACCES);
        assert!(fs::read_link(daemon.path("by-name/instances/web")).is_ok(), "names are seen");
        for (from, to) in [
            (format!("instances/{id}"), format!("trash/{id}")),
            ("by-name/instances/web".to_owned(), "by-name/instances/mine".to_owned()),
            ("by-name/instances/web".to_owned(), "trash/web".to_owned()),
            (format!("by-state/instances/stopped/{id}"), format!("by-state/instances/active/{id}")),
        ] {
            assert_eq!(errno(fs::rename(daemon.path(&from), daemon.path(to))), libc::EACCES, "{from}");
        }
        assert_eq!(errno(fs::remove_dir(daemon.path(format!("instances/{id}")))), libc::EACCES);
    });
    outsider.act(|| {
        assert_eq!(errno(fs::create_dir(daemon.path(format!("instances/{}", Uuid::new_v4())))), libc::EACCES);
    });
    assert_eq!(daemon.read(format!("instances/{id}/name")), "web");
    assert_eq!(daemon.read(format!("instances/{id}/state")), "stopped");
}

#[test]
fn only_root_gives_objects_away() {
    let daemon = Daemon::start(&["-o", "access_group=users,projects=games"]);
    let owner = User { uid: 2001, gid: gid("games"), groups: vec![gid("users")] };
    let id = Uuid::new_v4();
    owner.act(|| fs::create_dir(daemon.path(format!("instances/{id}"))).expect("a draft"));
    let file = |name: &str| daemon.path(format!("instances/{id}/{name}"));
    assert_eq!(daemon.read(format!("instances/{id}/owner")), "2001");
    assert_eq!(daemon.read(format!("instances/{id}/project")), "games", "his primary group is a project");
    owner.act(|| {
        for name in ["owner", "project"] {
            let refused = errno(write(&file(name), b"root\n"));
            assert!(matches!(refused, libc::EPERM | libc::EACCES), "{name}: {refused}");
        }
        write(&file("reset_state"), b"1\n").expect_err("root's alone");
    });
    assert_eq!(daemon.read(format!("instances/{id}/owner")), "2001");
}
