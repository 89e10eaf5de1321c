//! What a handle shows and may do, and what the streams and summaries say.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;

use serde_json::Value;
use uuid::Uuid;

use crate::support::{DEADLINE, Daemon, User, errno, gid, wait_until, write};

fn open(path: std::path::PathBuf) -> File {
    OpenOptions::new().read(true).write(true).open(path).expect("opened")
}

#[test]
fn a_handle_opened_before_a_change_of_owner_writes_nothing_any_more() {
    let daemon = Daemon::start(&["-o", "access_group=users"]);
    let user = User { uid: 2001, gid: 2001, groups: vec![gid("users")] };
    let (instance, image) = (Uuid::new_v4(), Uuid::new_v4());
    user.act(|| {
        fs::create_dir(daemon.path(format!("instances/{instance}"))).expect("a draft");
        fs::create_dir(daemon.path(format!("images/{image}"))).expect("a draft");
    });
    let description = format!("instances/{instance}/description");
    let (mut value, mut data) = user.act(|| {
        let mut value = open(daemon.path(&description));
        value.write_all(b"before\n").expect("his own");
        let mut data = open(daemon.path(format!("images/{image}/data")));
        data.write_all(b"before").expect("his own");
        (value, data)
    });
    let mut of_root = open(daemon.path(&description));
    daemon.set(format!("instances/{instance}/owner"), "2002");
    daemon.set(format!("images/{image}/owner"), "2002");
    user.act(|| {
        assert_eq!(errno(value.write(b"after\n")), libc::EACCES);
        assert_eq!(errno(data.write(b"after")), libc::EACCES);
        assert_eq!(errno(data.set_len(0)), libc::EACCES);
    });
    assert_eq!(errno(of_root.write(b"after\n")), libc::EACCES, "he decided for another owner's object");
    assert_eq!(daemon.read(&description), "before");
    assert_eq!(daemon.read(format!("images/{image}/data")), "before");
    // Back again is not as if nothing had happened.
    daemon.set(format!("instances/{instance}/owner"), "2001");
    user.act(|| assert_eq!(errno(value.write(b"after\n")), libc::EACCES));
    assert_eq!(daemon.read(&description), "before");
}

#[test]
fn a_change_of_owner_or_project_takes_and_gives_every_right_to_what_was_seen_before() {
    let daemon = Daemon::start(&["-o", "access_group=users,projects=games"]);
    let person = |uid, groups: &[u32]| User { uid, gid: uid, groups: [&[gid("users")], groups].concat() };
    let (before, after, member) = (person(2001, &[]), person(2002, &[]), person(2003, &[gid("games")]));
    let id = daemon.domain("web");
    let image = daemon.image();
    for object in [format!("instances/{id}"), format!("images/{image}")] {
        let directory = daemon.path(&object);
        let owned_by = |uid: u32, gid: u32| {
            let files = fs::read_dir(&directory).expect("a directory").map(|entry| entry.expect("an entry").path());
            for path in files.chain([directory.clone()]) {
                let metadata = fs::symlink_metadata(&path).expect("attributes");
                assert_eq!((metadata.uid(), metadata.gid()), (uid, gid), "{}", path.display());
            }
        };
        let may =
            |user: &User| user.act(|| fs::read_dir(&directory).is_ok() && File::open(directory.join("name")).is_ok());
        daemon.set(format!("{object}/owner"), "2001");
        owned_by(2001, 65534);
        assert_eq!([&before, &after, &member].map(may), [true, false, false]);
        daemon.set(format!("{object}/owner"), "2002");
        owned_by(2002, 65534);
        assert_eq!([&before, &after, &member].map(may), [false, true, false]);
        daemon.set(format!("{object}/project"), "games");
        owned_by(2002, gid("games"));
        assert_eq!([&before, &after, &member].map(may), [false, true, true]);
        daemon.set(format!("{object}/project"), "nogroup");
        owned_by(2002, 65534);
        assert_eq!([&before, &after, &member].map(may), [false, true, false]);
    }
}

#[test]
fn a_handle_serves_one_version_until_it_is_read_from_the_start_again() {
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("web");
    for (path, first, second) in [
        (format!("instances/{id}/description"), "a long first value", "another"),
        (format!("instances/{id}/description"), "short", "a much longer second value"),
    ] {
        daemon.set(&path, first);
        let file = File::open(daemon.path(&path)).expect("opened");
        let read = |offset: u64| {
            let mut bytes = [0; 64];
            let count = file.read_at(&mut bytes, offset).expect("read");
            String::from_utf8(bytes[..count].to_vec()).expect("UTF-8")
        };
        assert_eq!(read(0), format!("{first}\n"));
        daemon.set(&path, second);
        assert_eq!(read(2), format!("{first}\n")[2..], "the rest of the same version");
        assert_eq!(read(4), format!("{first}\n")[4..]);
        assert_eq!(read(64), "", "and its end");
        assert_eq!(read(0), format!("{second}\n"), "a new one");
        assert_eq!(read(3), format!("{second}\n")[3..]);
    }
    // A first read in the middle shows the present version.
    let file = File::open(daemon.path(format!("instances/{id}/description"))).expect("opened");
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, 2).expect("read");
    assert_eq!(&bytes, b"much");
}

#[test]
fn no_read_only_file_can_be_opened_for_writing_by_root() {
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("web");
    let image = daemon.image();
    let documents = [
        (include_str!("../../docs/abi/instances.md"), format!("instances/{id}")),
        (include_str!("../../docs/abi/images.md"), format!("images/{image}")),
        (include_str!("../../docs/abi/summary.md"), "summary".to_owned()),
        (include_str!("../../docs/abi/root.md"), String::new()),
    ];
    let mut tried = 0;
    for (document, directory) in documents {
        for row in document.lines().filter(|line| line.contains("` | 0440 |") || line.contains("` | 0444 |")) {
            let name = row.split('`').nth(1).expect("a name");
            let path = daemon.path(&directory).join(name);
            if !path.exists() {
                continue;
            }
            tried += 1;
            for append in [false, true] {
                let refused = OpenOptions::new().write(true).append(append).open(&path);
                assert_eq!(errno(refused), libc::EACCES, "{}", path.display());
            }
            assert_eq!(errno(OpenOptions::new().read(true).write(true).open(&path)), libc::EACCES);
            assert_eq!(errno(fs::remove_file(&path)), libc::EPERM);
        }
    }
    assert!(tried > 30, "{tried}");
}

/// `tail -F` of a file, ended with the test.
struct Tail(Child);

impl Drop for Tail {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn events_are_json_lines_in_sequence_for_changes_and_refusals_and_tail_follows_them() {
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("web");
    let mut tail = Command::new("tail");
    tail.args(["-n", "+1", "-F"]).arg(daemon.path("events")).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut tail = Tail(tail.spawn().expect("tail runs"));
    let output = BufReader::new(tail.0.stdout.take().expect("piped"));
    let (sender, lines) = channel();
    thread::spawn(move || {
        for line in output.lines() {
            let Ok(line) = line else { return };
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    let mut sequence = 0;
    let mut next = |what: &str, errno: &str| -> Value {
        loop {
            let line = lines.recv_timeout(DEADLINE).unwrap_or_else(|_| panic!("no line says {what} {errno}"));
            let line: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line}: {error}"));
            let number = line["seq"].as_u64().expect("a number");
            assert!(number > sequence, "{line}");
            sequence = number;
            for key in ["seq", "time", "class", "uuid", "name", "uid", "login", "what", "from", "to", "errno", "reason"]
            {
                assert!(line.get(key).is_some(), "{key} in {line}");
            }
            if line["what"] == what && line["errno"] == errno && line["uuid"] == id.to_string() {
                return line;
            }
        }
    };
    daemon.set(format!("instances/{id}/description"), "a \"quoted\" text");
    let line = next("description", "");
    assert_eq!((line["to"].as_str(), line["uid"].as_u64()), (Some("a \"quoted\" text"), Some(0)));
    assert_eq!((line["class"].as_str(), line["name"].as_str()), (Some("instance"), Some("web")));
    assert!(!line["login"].as_str().expect("a login").is_empty());
    assert_eq!(errno(daemon.write(format!("instances/{id}/vcpus"), "many")), libc::EINVAL);
    let line = next("vcpus", "EINVAL");
    assert!(line["reason"].as_str().expect("a reason").contains("decimal"), "{line}");
    daemon.set(format!("instances/{id}/locked"), "1");
    next("locked", "");
    assert_eq!(errno(daemon.write(format!("instances/{id}/state"), "active")), libc::EPERM);
    let line = next("state", "EPERM");
    assert!(line["reason"].as_str().expect("a reason").contains("locked"), "{line}");
    daemon.set(format!("instances/{id}/locked"), "0");
    next("locked", "");
    daemon.set(format!("instances/{id}/state"), "active");
    loop {
        let line = next("state", "");
        if line["to"] == "active" {
            break;
        }
    }
}

#[test]
fn a_summary_has_its_columns_and_one_line_for_each_object() {
    let daemon = Daemon::start(&[]);
    let (web, db) = (daemon.domain("web"), daemon.domain("db"));
    daemon.domain_does(web, "start", "active");
    daemon.set(format!("instances/{db}/disable_terminate"), "yes");
    daemon.set(format!("instances/{db}/locked"), "1");
    daemon.set(format!("instances/{web}/owner"), "2001");
    let image = daemon.image();
    let rows = |class: &str| -> Vec<Vec<String>> {
        let text = fs::read_to_string(daemon.path(format!("summary/{class}"))).expect("readable");
        assert!(text.ends_with('\n'));
        let size = fs::metadata(daemon.path(format!("summary/{class}"))).expect("attributes").len();
        assert_eq!(size, text.len() as u64);
        text.lines().map(|line| line.split('\t').map(str::to_owned).collect()).collect()
    };
    let instances = rows("instances");
    assert_eq!(instances[0].join(" "), "uuid name state task locked disable_terminate owner project");
    assert_eq!(instances.len(), 3);
    let row = |id: Uuid| instances.iter().find(|row| row[0] == id.to_string()).expect("a line").join(" ");
    assert_eq!(row(web), format!("{web} web active  0 0 2001 nogroup"));
    assert_eq!(row(db), format!("{db} db stopped  1 1 root nogroup"));
    let images = rows("images");
    assert_eq!(images[0].join(" "), "uuid name state task disk_format size_bytes owner project");
    assert_eq!(images.len(), 2);
    assert_eq!((images[1][0].as_str(), images[1][2].as_str()), (image.to_string().as_str(), "active"));
    assert_eq!(images[1][5], daemon.read(format!("images/{image}/size_bytes")));
}

#[test]
fn a_refused_caller_finds_his_own_last_error_in_the_root() {
    let daemon = Daemon::start(&["-o", "access_group=users"]);
    let (one, two) = (
        User { uid: 2001, gid: 2001, groups: vec![gid("users")] },
        User { uid: 2002, gid: 2002, groups: vec![gid("users")] },
    );
    let read = |user: &User| user.act(|| fs::read_to_string(daemon.path("last_error")).expect("readable"));
    assert_eq!(read(&one), "ok\n");
    let refused = one.act(|| fs::create_dir(daemon.path("instances/web1")));
    assert_eq!(errno(refused), libc::EINVAL);
    wait_until("he finds it", || read(&one).contains(" mkdir: EINVAL: "));
    assert_eq!(read(&two), "ok\n", "it is nobody else's");
    let id = Uuid::new_v4();
    one.act(|| fs::create_dir(daemon.path(format!("instances/{id}"))).expect("a draft"));
    let path = daemon.path(format!("instances/{id}/name"));
    two.act(|| assert_eq!(errno(write(&path, b"x")), libc::EACCES));
}
