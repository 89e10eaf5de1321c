//! `flavors/`: who makes and uses them, and what an instance takes from one.

mod support;

use std::fs;
use std::os::unix::fs::symlink;

use support::{Daemon, User, errno, gid, wait_until, write};
use uuid::Uuid;

fn start() -> Daemon {
    Daemon::start(&["-o", "access_group=users,projects=games"])
}

fn flavor(daemon: &Daemon, name: &str) {
    fs::create_dir(daemon.path(format!("flavors/{name}"))).expect("a draft");
    daemon.set(format!("flavors/{name}/vcpus"), "2");
    daemon.set(format!("flavors/{name}/memory_bytes"), "1G");
    daemon.set(format!("flavors/{name}/root_disk_bytes"), "16M");
    daemon.set(format!("flavors/{name}/is_public"), "yes");
    daemon.set(format!("flavors/{name}/state"), "active");
}

fn draft(daemon: &Daemon) -> String {
    let instance = format!("instances/{}", Uuid::new_v4());
    fs::create_dir(daemon.path(&instance)).expect("a draft");
    instance
}

#[test]
fn root_makes_a_flavor_and_its_name_is_its_directory() {
    let mut daemon = start();
    flavor(&daemon, "small");
    for (file, value) in
        [("vcpus", "2"), ("memory_bytes", "1073741824"), ("root_disk_bytes", "16777216"), ("state", "active")]
    {
        assert_eq!(daemon.read(format!("flavors/small/{file}")), value);
    }
    daemon.stop();
    daemon.spawn();
    assert_eq!(daemon.read("flavors/small/vcpus"), "2");
    assert!(daemon.path("by-state/flavors/active/small/vcpus").exists());
    assert_eq!(errno(fs::create_dir(daemon.path("flavors/small"))), libc::EEXIST);
    for bad in ["trailing ", ".hidden", "100%", "%2e", "%zz", "line%0A", &"x".repeat(219)] {
        assert_eq!(errno(fs::create_dir(daemon.path("flavors").join(bad))), libc::EINVAL, "{bad:?}");
    }
    fs::create_dir(daemon.path("flavors/a%2Fb c")).expect("a name with a slash, as by-name writes it");
    fs::remove_dir(daemon.path("flavors/a%2Fb c")).expect("nothing was written into it");
}

#[test]
fn others_neither_make_nor_change_flavors() {
    let daemon = start();
    flavor(&daemon, "small");
    let user = User { uid: 2001, gid: 2001, groups: vec![gid("users")] };
    user.act(|| {
        assert_eq!(errno(fs::create_dir(daemon.path("flavors/mine"))), libc::EPERM);
        assert_eq!(errno(write(&daemon.path("flavors/small/vcpus"), b"4")), libc::EPERM);
        assert_eq!(errno(write(&daemon.path("flavors/small/state"), b"draft")), libc::EPERM);
        write(&daemon.path("flavors/small/vcpus"), b"2").expect("true already");
    });
    assert!(daemon.read("flavors/small/errors").contains("only root"));
    assert_eq!(daemon.read("flavors/small/vcpus"), "2");
}

#[test]
fn a_private_flavor_is_read_and_used_by_root_and_the_members_of_access() {
    let daemon = start();
    flavor(&daemon, "private");
    daemon.set("flavors/private/access", "games");
    assert_eq!(daemon.read("flavors/private/access"), "games");
    daemon.set("flavors/private/is_public", "0");
    let member = User { uid: 2001, gid: 2001, groups: vec![gid("users"), gid("games")] };
    let other = User { uid: 2002, gid: 2002, groups: vec![gid("users")] };
    let uses = |user: &User| {
        user.act(|| {
            let instance = draft(&daemon);
            let used = errno(write(&daemon.path(format!("{instance}/flavor")), b"private"));
            (errno(fs::read(daemon.path("flavors/private/vcpus"))), used)
        })
    };
    assert_eq!(uses(&member), (0, 0));
    assert_eq!(uses(&other), (libc::EACCES, libc::EACCES));
    write(&daemon.path("flavors/private/access"), b"games\nusers\n").expect("a list of lines");
    assert_eq!(uses(&other), (0, 0));
    daemon.set("flavors/private/access", "\n");
    assert_eq!(daemon.read("flavors/private/access"), "");
    assert_eq!(uses(&member), (libc::EACCES, libc::EACCES));
    assert_eq!(errno(daemon.write("flavors/private/access", "nosuchgroup")), libc::EINVAL);
}

#[test]
fn a_draft_takes_a_flavors_values_and_may_deviate_from_them() {
    let daemon = start();
    flavor(&daemon, "small");
    let instance = draft(&daemon);
    assert_eq!(daemon.read(format!("{instance}/flavor")), "");
    daemon.set(format!("{instance}/flavor"), "small");
    let sizes =
        || ["flavor", "vcpus", "memory_bytes", "root_disk_bytes"].map(|file| daemon.read(format!("{instance}/{file}")));
    assert_eq!(sizes(), ["small", "2", "1073741824", "16777216"]);
    daemon.set(format!("{instance}/vcpus"), "3");
    daemon.set("flavors/small/memory_bytes", "2G");
    daemon.set(format!("{instance}/flavor"), "../flavors/small");
    assert_eq!(sizes(), ["small", "3", "1073741824", "16777216"], "true already");
    daemon.set("flavors/small/state", "draft");
    daemon.set("flavors/small/state", "deleted");
    wait_until("the flavor is gone", || !daemon.path("flavors/small").exists());
    daemon.set(format!("{instance}/flavor"), "small");
    for (value, refusal) in [("gone", libc::ENOENT), ("\n", libc::EINVAL), ("images/small", libc::EINVAL)] {
        assert_eq!(errno(daemon.write(format!("{instance}/flavor"), value)), refusal, "{value:?}");
    }
    assert_eq!(sizes(), ["small", "3", "1073741824", "16777216"]);
}

#[test]
fn only_a_draft_of_a_flavor_is_deleted() {
    let daemon = start();
    flavor(&daemon, "small");
    assert_eq!(errno(daemon.write("flavors/small/state", "deleted")), libc::EPERM);
    assert_eq!(errno(fs::remove_dir(daemon.path("flavors/small"))), libc::ENOTEMPTY);
    assert_eq!(errno(fs::remove_file(daemon.path("flavors/small/vcpus"))), libc::EPERM);
    assert_eq!(errno(symlink("x", daemon.path("flavors/y"))), libc::EPERM);
    wait_until("it is offered", || daemon.path("by-state/flavors/active/small").exists());
    fs::rename(daemon.path("by-state/flavors/active/small"), daemon.path("by-state/flavors/draft/small"))
        .expect("out of use");
    assert_eq!(daemon.read("flavors/small/state"), "draft");
    let instance = draft(&daemon);
    assert_eq!(errno(daemon.write(format!("{instance}/flavor"), "small")), libc::EINVAL);
    assert!(daemon.read(format!("{instance}/last_error")).contains("writes active to its state"));
    daemon.set("flavors/small/state", "deleted");
    wait_until("the flavor is gone", || !daemon.path("flavors/small").exists());
}
