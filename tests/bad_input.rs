//! Bad input: a clear errno and reason, and nothing changed.

mod support;

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::thread;

use serde_json::json;
use support::{Daemon, errno, wait_until, write};
use uuid::Uuid;

fn draft(daemon: &Daemon) -> Uuid {
    let id = Uuid::new_v4();
    fs::create_dir(daemon.path(format!("instances/{id}"))).expect("a draft");
    id
}

const WRITABLE: [&str; 13] = [
    "name",
    "description",
    "state",
    "locked",
    "locked_reason",
    "disable_terminate",
    "owner",
    "project",
    "image",
    "vcpus",
    "memory_bytes",
    "root_disk_bytes",
    "stop_timeout_seconds",
];

#[test]
fn no_malformed_value_is_taken_by_any_file_and_none_changes_anything() {
    let daemon = Daemon::start(&[]);
    let id = draft(&daemon);
    daemon.set(format!("instances/{id}/locked"), "1");
    daemon.set(format!("instances/{id}/locked"), "0");
    let file = |name: &str| format!("instances/{id}/{name}");
    let long = vec![b'7'; 5000];
    let malformed: [&[u8]; 6] = [b"a\0b\n", b"\xff\xfe\n", b"one\ntwo\n", &long, b"\x1b[31m\n", b"\0"];
    for name in WRITABLE {
        let before = daemon.read(file(name));
        let mut values = malformed.to_vec();
        // Elsewhere empty is what it reads already, or clears it.
        if !before.is_empty() {
            values.extend([&b"\n"[..], b"  \t\n"]);
        }
        for value in values {
            let refused = write(&daemon.path(file(name)), value);
            assert_eq!(
                errno(refused),
                libc::EINVAL,
                "{name} took {:?}",
                String::from_utf8_lossy(&value[..value.len().min(9)])
            );
            let last = daemon.read(file("last_error"));
            assert!(last.contains(&format!(" {name}: EINVAL: ")), "{name}: {last}");
        }
        assert_eq!(daemon.read(file(name)), before, "{name}");
    }
    for (name, value, want) in [
        ("state", "running", libc::EINVAL),
        ("state", "error", libc::EINVAL),
        ("locked", "2", libc::EINVAL),
        ("vcpus", "0", libc::ERANGE),
        ("vcpus", "1000000", libc::ERANGE),
        ("vcpus", "two", libc::EINVAL),
        ("vcpus", "-1", libc::EINVAL),
        ("memory_bytes", "1", libc::ERANGE),
        ("memory_bytes", "99999999999999999999999", libc::ERANGE),
        ("memory_bytes", "512X", libc::EINVAL),
        ("root_disk_bytes", "1.5G", libc::EINVAL),
        ("stop_timeout_seconds", "86401", libc::ERANGE),
        ("owner", "no-such-user", libc::EINVAL),
        ("project", "no-such-group", libc::EINVAL),
        ("image", "no-such-image", libc::ENOENT),
        ("image", "../instances/x", libc::EINVAL),
        ("name", "a/b", libc::EINVAL),
        ("locked_reason", "not locked", libc::EINVAL),
    ] {
        let before = daemon.read(file(name));
        assert_eq!(errno(daemon.write(file(name), value)), want, "{value} > {name}");
        assert_eq!(daemon.read(file(name)), before);
    }
    assert_eq!(daemon.read(file("errors")).lines().count(), 16, "the last sixteen are kept");
}

#[test]
fn a_misspelt_file_does_not_exist_and_a_read_only_one_cannot_be_opened() {
    let daemon = Daemon::start(&[]);
    let id = draft(&daemon);
    let open = |name: &str| OpenOptions::new().write(true).create(true).truncate(true).open(daemon.path(name));
    for name in ["stat", "sate", "locked_resaon"] {
        assert_eq!(errno(open(&format!("instances/{id}/{name}"))), libc::ENOENT, "{name}");
    }
    for name in ["power_state", "created_at", "locked_by", "task", "last_error"] {
        assert_eq!(errno(open(&format!("instances/{id}/{name}"))), libc::EACCES, "{name}");
    }
    assert_eq!(errno(open("instances/x")), libc::ENOENT);
    assert_eq!(errno(open("healt")), libc::ENOENT);
}

#[test]
fn only_a_new_lower_case_uuid_makes_a_draft() {
    let daemon = Daemon::start(&[]);
    let id = draft(&daemon);
    let make = |name: &str| errno(fs::create_dir(daemon.path(name)));
    assert_eq!(make(&format!("instances/{id}")), libc::EEXIST);
    assert_eq!(make(&format!("images/{id}")), libc::EEXIST, "a uuid is unique over all classes");
    let upper = Uuid::new_v4().to_string().to_uppercase();
    for bad in ["web1", "", &upper, "00000000-0000-0000-0000-000000000000"] {
        let path = format!("instances/{bad}");
        let want = if bad.is_empty() { libc::EEXIST } else { libc::EINVAL };
        assert_eq!(make(&path), want, "{bad:?}");
    }
    assert_eq!(make("trash/x"), libc::EPERM);
    assert_eq!(make("by-name/instances/x"), libc::EPERM);
    assert_eq!(make(&format!("instances/{id}/notes")), libc::EPERM);
    assert_eq!(make(&format!("instances/{id}/volumes/vdb")), libc::EPERM, "it takes a link");
}

#[test]
fn names_at_the_limit_and_of_every_kind_are_taken_and_one_byte_more_is_not() {
    let daemon = Daemon::start(&[]);
    let id = draft(&daemon);
    let name = format!("instances/{id}/name");
    for good in ["a".repeat(218), "100%<\"'&>".to_owned(), "größe ☃".to_owned(), "%".repeat(72), "-rf *".to_owned()]
    {
        daemon.set(&name, &good);
        assert_eq!(daemon.read(&name), good);
    }
    for bad in ["a".repeat(219), "%".repeat(73)] {
        assert_eq!(errno(daemon.write(&name, &bad)), libc::EINVAL);
    }
    let spec: serde_json::Value =
        serde_json::from_slice(&fs::read(daemon.path(format!("instances/{id}/spec.json"))).expect("spec"))
            .expect("JSON");
    assert_eq!(spec["name"], json!("-rf *"));
}

#[test]
fn foreign_domains_with_the_worst_names_are_escaped_everywhere() {
    let daemon = Daemon::start(&[]);
    for (name, link) in [
        ("tab\there", None),
        ("per%cent", Some("per%25cent")),
        (".hidden", Some("%2Ehidden")),
        ("&lt;b&gt;&amp;&quot;&apos;", Some("<b>&\"'")),
        ("sp ace ☃", Some("sp ace ☃")),
    ] {
        let id = daemon.domain(name);
        let link = link.map_or_else(|| id.to_string(), str::to_owned);
        let link = daemon.path("by-name/instances").join(link);
        wait_until(&format!("{} stands", link.display()), || link.is_symlink());
        assert_eq!(fs::canonicalize(&link).expect("resolves"), daemon.path(format!("instances/{id}")));
        let summary = fs::read(daemon.path("summary/instances")).expect("a summary");
        let text = String::from_utf8(summary).expect("UTF-8");
        assert!(text.lines().all(|line| line.split('\t').count() == 8), "{text}");
        let spec = fs::read(daemon.path(format!("instances/{id}/spec.json"))).expect("a spec");
        serde_json::from_slice::<serde_json::Value>(&spec).expect("JSON");
        daemon.set(format!("instances/{id}/locked"), "1");
    }
}

#[test]
fn a_value_in_pieces_is_several_commands_and_a_lone_newline_after_a_good_one_is_nothing() {
    let daemon = Daemon::start(&[]);
    let id = draft(&daemon);
    let open = |name: &str| {
        OpenOptions::new()
            .write(true)
            .truncate(true)
            .open(daemon.path(format!("instances/{id}/{name}")))
            .expect("opens")
    };
    let mut file = open("locked");
    file.write_all(b"1").expect("a value");
    file.write_all(b"\n").expect("a lone newline after it");
    assert_eq!(errno(file.write_all(b"0x")), libc::EINVAL);
    file.write_all(b"0\n").expect("the next command");
    let mut file = open("state");
    assert_eq!(errno(file.write_all(b"act")), libc::EINVAL);
    assert_eq!(errno(open("vcpus").write_all(b"\n")), libc::EINVAL, "a newline alone is an empty value");
    let mut append = OpenOptions::new().append(true).open(daemon.path(format!("instances/{id}/name"))).expect("opens");
    append.write_all(b"appended\n").expect("offset means nothing");
    assert_eq!(daemon.read(format!("instances/{id}/name")), "appended");
}

#[test]
fn of_many_writers_at_once_every_one_is_taken_whole() {
    let daemon = Daemon::start(&[]);
    let id = draft(&daemon);
    let path = daemon.path(format!("instances/{id}/description"));
    thread::scope(|scope| {
        for writer in 0..8 {
            let path = &path;
            scope.spawn(move || {
                for round in 0..50 {
                    write(path, format!("{writer} {}", "x".repeat(round)).as_bytes()).expect("taken");
                }
            });
        }
    });
    let last = fs::read_to_string(&path).expect("readable");
    let (_, text) = last.trim_end().split_once(' ').expect("one whole value");
    assert!(text.bytes().all(|byte| byte == b'x'));
}

#[test]
fn a_name_that_is_no_text_is_refused() {
    let daemon = Daemon::start(&[]);
    let name = Path::new(std::ffi::OsStr::from_bytes(b"instances/\xff\xfe"));
    assert_eq!(errno(fs::metadata(daemon.path(name))), libc::ENOENT);
    assert_eq!(errno(fs::create_dir(daemon.path(name))), libc::EINVAL);
}
