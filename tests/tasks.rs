//! Tasks that users make themselves, and the end that users put to any.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use serde_json::{Value, json};
use support::{Daemon, User, errno, gid, wait_until};
use uuid::Uuid;

const BYTES: usize = 1 << 20;

/// What OpenStack's own clients send.
fn order(source: &str) -> Value {
    json!({
        "input": {
            "image_properties": {"container_format": "bare", "disk_format": "raw", "name": "cirros-0.3.5-x86_64"},
            "import_from": source,
            "import_from_format": "raw",
        },
        "type": "import",
    })
}

fn image() -> Vec<u8> {
    (0..BYTES as u32).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect()
}

/// A file to be imported, by its name in the import directory.
fn importable(daemon: &Daemon) -> &'static str {
    fs::write(daemon.state_directory().join("import/cirros.img"), image()).expect("written");
    "cirros.img"
}

fn draft(daemon: &Daemon) -> String {
    let task = format!("tasks/{}", Uuid::new_v4());
    fs::create_dir(daemon.path(&task)).expect("a task");
    task
}

fn images(daemon: &Daemon) -> usize {
    fs::read_dir(daemon.path("images")).expect("listed").count()
}

#[test]
fn a_task_of_ones_own_imports_an_image_and_says_which() {
    let daemon = Daemon::start(&["--settle", "20s"]);
    let source = importable(&daemon);
    let task = draft(&daemon);
    for (file, value) in [("state", "pending"), ("type", ""), ("object", ""), ("result", ""), ("started_at", "")] {
        assert_eq!(daemon.read(format!("{task}/{file}")), value, "{file}");
    }
    assert_eq!(daemon.read(format!("{task}/spec.json")), "{}");
    let file = daemon.scratch().join("import.json");
    fs::write(&file, order(source).to_string()).expect("written");
    let status = Command::new("cp").arg(&file).arg(daemon.path(format!("{task}/spec.json"))).status();
    assert!(status.expect("cp runs").success(), "{}", daemon.read(format!("{task}/message")));
    wait_until("it is done", || daemon.read(format!("{task}/state")) == "success");
    let image_path = daemon.read(format!("{task}/result"));
    assert!(image_path.starts_with("images/"), "{image_path}");
    assert_eq!(daemon.read(format!("{task}/object")), image_path);
    assert_eq!(daemon.read(format!("{task}/type")), "importing");
    assert_eq!(daemon.read(format!("{task}/progress")), "100");
    assert_eq!(daemon.read(format!("{task}/message")), "");
    let ended: u64 = daemon.read(format!("{task}/ended_at")).parse().expect("a time");
    assert_eq!(daemon.read(format!("{task}/expires_at")), (ended + 48 * 3600).to_string());
    for (file, value) in [("state", "active"), ("name", "cirros-0.3.5-x86_64"), ("disk_format", "raw")] {
        assert_eq!(daemon.read(format!("{image_path}/{file}")), value, "{file}");
    }
    assert!(fs::read(daemon.path(format!("{image_path}/data"))).expect("readable") == image());
    let last = fs::canonicalize(daemon.path(format!("{image_path}/last_task"))).expect("resolves");
    assert_eq!(last, daemon.path(&task));
    let shown: Value = serde_json::from_str(&daemon.read(format!("{task}/spec.json"))).expect("JSON");
    assert_eq!(shown, order(source));
    daemon.set(format!("{task}/spec.json"), &order(source).to_string());
    assert_eq!(errno(daemon.write(format!("{task}/spec.json"), &order("other").to_string())), libc::EINVAL);
    assert_eq!(errno(fs::remove_dir(daemon.path(&task))), libc::ENOTEMPTY);
    assert_eq!(images(&daemon), 1, "said twice, done once");
    // The bin takes the image, and the task knows.
    fs::rename(daemon.path(&image_path), daemon.path(image_path.replace("images", "trash"))).expect("moved");
    wait_until("it follows", || daemon.read(format!("{task}/result")) == image_path.replace("images", "trash"));
}

#[test]
fn what_is_wrong_with_an_order_is_said_by_key_and_makes_nothing() {
    let daemon = Daemon::start(&["--settle", "20s"]);
    let source = importable(&daemon);
    let task = draft(&daemon);
    let file = format!("{task}/spec.json");
    let with = |change: &dyn Fn(&mut Value)| {
        let mut document = order(source);
        change(&mut document);
        document
    };
    let property = |key: &'static str, value: Value| {
        with(&move |document| document["input"]["image_properties"][key] = value.clone())
    };
    let input = |key: &'static str, value: Value| with(&move |document| document["input"][key] = value.clone());
    let table = [
        (json!({}), libc::EINVAL, "type: it is missing"),
        (json!({"type": "import"}), libc::EINVAL, "input: it is missing"),
        (json!({"type": "import", "input": {}}), libc::EINVAL, "input.import_from: it is missing"),
        (with(&|document| document["type"] = json!("export")), libc::EINVAL, "type: write import"),
        (with(&|document| document["owner"] = json!("root")), libc::EINVAL, "owner: there is no such key"),
        (input("import_form", json!("x")), libc::EINVAL, "input.import_form: there is no such key"),
        (input("import_from", json!(7)), libc::EINVAL, "input.import_from: write a string"),
        (input("import_from", json!("")), libc::EINVAL, "input.import_from: "),
        (input("import_from_format", json!("qcow2")), libc::EINVAL, "input.import_from_format: it differs"),
        (input("image_properties", json!([])), libc::EINVAL, "input.image_properties: write an object"),
        (property("container_format", json!("ovf")), libc::EINVAL, "image_properties.container_format: write bare"),
        (property("disk_format", json!("vhd")), libc::EINVAL, "image_properties.disk_format: write qcow2 or raw"),
        (property("min_disk_byte", json!(1)), libc::EINVAL, "image_properties.min_disk_byte: there is no such key"),
        (property("min_disk_bytes", json!("big")), libc::EINVAL, "image_properties.min_disk_bytes: "),
        (property("owner", json!("2001")), libc::EINVAL, "image_properties.owner: a task cannot set this"),
        (property("state", json!("active")), libc::EINVAL, "image_properties.state: a task cannot set this"),
        (property("data", json!("x")), libc::EINVAL, "image_properties.data: "),
        (input("import_from", json!("ftp://example.org/x")), libc::EINVAL, "input.import_from: "),
    ];
    for (document, want, why) in table {
        assert_eq!(errno(daemon.write(&file, &document.to_string())), want, "{document}");
        let message = daemon.read(format!("{task}/message"));
        assert!(message.contains(why), "{document}: {message}");
        assert_eq!(daemon.read(format!("{task}/state")), "pending", "{document}");
    }
    let both = json!({"type": "export", "imput": {}});
    assert_eq!(errno(daemon.write(&file, &both.to_string())), libc::EINVAL);
    let message = daemon.read(format!("{task}/message"));
    assert!(["type: ", "imput: ", "input: "].iter().all(|key| message.contains(key)), "{message}");
    assert_eq!(errno(daemon.write(&file, "{\"type\": \"import\",}")), libc::EINVAL);
    assert_eq!(errno(daemon.write(format!("{task}/cancel"), "1")), libc::EINVAL);
    assert_eq!(images(&daemon), 0, "nothing is left of what was refused");
    // In pieces, as a shell writes it, the right one is taken after all.
    let script = "printf '%s' \"$2\" | dd bs=7 status=none of=\"$1\"";
    let text = property("min_disk_bytes", json!("1M")).to_string();
    let status = Command::new("sh").args(["-c", script, "sh"]).arg(daemon.path(&file)).arg(text).status();
    assert!(status.expect("a shell").success(), "{}", daemon.read(format!("{task}/message")));
    wait_until("it is done", || daemon.read(format!("{task}/state")) == "success");
    let result = daemon.read(format!("{task}/result"));
    assert_eq!(daemon.read(format!("{result}/min_disk_bytes")), BYTES.to_string());
}

#[test]
fn an_import_that_fails_says_why_and_leaves_an_empty_draft() {
    let daemon = Daemon::start(&["--settle", "20s"]);
    let file = daemon.state_directory().join("import/image");
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&file).arg("8M").status();
    assert!(made.expect("qemu-img runs").success());
    let task = draft(&daemon);
    assert_eq!(errno(daemon.write(format!("{task}/spec.json"), &order("image").to_string())), libc::EINVAL);
    wait_until("it is over", || daemon.read(format!("{task}/state")) == "failure");
    let message = daemon.read(format!("{task}/message"));
    assert!(message.contains("qcow2") && message.contains("raw"), "{message}");
    assert_eq!(daemon.read(format!("{task}/result")), "");
    let object = daemon.read(format!("{task}/object"));
    assert_eq!(daemon.read(format!("{object}/state")), "draft");
    assert_eq!(fs::metadata(daemon.path(format!("{object}/data"))).expect("stat").len(), 0);
    assert!(daemon.read(format!("{object}/last_error")).contains("EINVAL"));
    // What was wrong is put right, and tried again.
    daemon.set(format!("{object}/disk_format"), "qcow2");
    daemon.set(format!("{object}/state"), "active");
    assert_eq!(daemon.read(format!("{object}/state")), "active");
    assert_eq!(daemon.read(format!("{task}/state")), "failure", "that was another task");
}

#[test]
fn a_draft_of_a_task_is_one_of_its_owners_drafts_and_nobody_elses() {
    let mut daemon = Daemon::start(&["-o", "access_group=users", "--settle", "20s"]);
    let source = importable(&daemon);
    let user = User { uid: 2001, gid: gid("users"), groups: vec![] };
    let other = User { uid: 2002, gid: gid("users"), groups: vec![] };
    let make = |user: &User, path: &str| user.act(|| errno(fs::create_dir(daemon.path(path))));
    let id = Uuid::new_v4();
    let task = format!("tasks/{id}");
    assert_eq!(make(&user, &task), 0);
    for class in ["tasks", "images", "instances"] {
        assert_eq!(make(&user, &format!("{class}/{id}")), libc::EEXIST, "{class}");
    }
    assert_eq!(make(&user, &format!("tasks/{}", Uuid::new_v4().to_string().to_uppercase())), libc::EINVAL);
    assert_eq!(make(&user, "tasks/mine"), libc::EINVAL);
    other.act(|| {
        assert_eq!(errno(fs::read(daemon.path(format!("{task}/state")))), libc::EACCES);
        let written = support::write(&daemon.path(format!("{task}/spec.json")), order(source).to_string().as_bytes());
        assert_eq!(errno(written), libc::EACCES);
        assert_eq!(errno(fs::remove_dir(daemon.path(&task))), libc::EACCES);
    });
    let mut made = 1;
    let mut last = None;
    while make(&user, &format!("tasks/{}", last.insert(Uuid::new_v4()))) == 0 {
        made += 1;
        assert!(made <= 100, "there is a limit");
    }
    assert_eq!(made, 100);
    assert_eq!(make(&user, &format!("images/{}", Uuid::new_v4())), libc::EDQUOT);
    assert_eq!(make(&other, &format!("tasks/{}", Uuid::new_v4())), 0);
    user.act(|| {
        let spec = daemon.path(format!("{task}/spec.json"));
        support::write(&spec, order(source).to_string().as_bytes()).expect("his own, and no draft more than before");
    });
    wait_until("it is done", || daemon.read(format!("{task}/state")) == "success");
    let result = daemon.read(format!("{task}/result"));
    assert_eq!(daemon.read(format!("{result}/owner")), "2001");
    let drafts: Vec<_> = fs::read_dir(daemon.path("tasks")).expect("listed").flatten().collect();
    let mut discarded = 0;
    for draft in drafts.iter().filter(|entry| entry.file_name() != id.to_string().as_str()) {
        discarded += usize::from(user.act(|| fs::remove_dir(draft.path())).is_ok());
    }
    assert_eq!(discarded, 99);
    assert_eq!(make(&user, &format!("images/{}", Uuid::new_v4())), 0);
    // Drafts are still drafts after a restart, and wait.
    let waiting = format!("tasks/{}", Uuid::new_v4());
    assert_eq!(make(&user, &waiting), 0);
    daemon.kill();
    daemon.spawn();
    assert_eq!(daemon.read(format!("{waiting}/state")), "pending");
    assert_eq!(daemon.read(format!("{task}/result")), result);
    daemon.set(format!("{waiting}/spec.json"), &order(source).to_string());
    wait_until("it is done", || daemon.read(format!("{waiting}/state")) == "success");
    let result = daemon.read(format!("{waiting}/result"));
    assert_eq!(daemon.read(format!("{result}/owner")), "2001", "it is whose task it is, whoever wrote it");
}

/// A running guest that will not shut down, and the task that has been asking it to.
fn stopping(daemon: &Daemon, name: &str) -> (Uuid, PathBuf) {
    let id = daemon.domain(name);
    daemon.domain_does(id, "start", "active");
    daemon.host_does(json!({"do": "guest", "uuid": id.to_string(), "ignores_acpi": true}));
    daemon.set(format!("instances/{id}/stop_timeout_seconds"), "600");
    daemon.set(format!("instances/{id}/state"), "stopped");
    wait_until("it is asked", || daemon.read(format!("instances/{id}/task")) == "stopping");
    (id, last_task(daemon, id))
}

/// The directory of an instance's last operation, once it stands.
fn last_task(daemon: &Daemon, id: Uuid) -> PathBuf {
    let link = daemon.path(format!("instances/{id}/last_task"));
    wait_until("the task stands", || link.exists());
    fs::canonicalize(link).expect("resolves")
}

#[test]
fn whoever_may_change_an_object_may_cancel_what_runs_on_it_and_nobody_else() {
    let daemon = Daemon::start(&["-o", "access_group=users", "--settle", "0s"]);
    let owner = User { uid: 2001, gid: gid("users"), groups: vec![] };
    let stranger = User { uid: 2002, gid: gid("users"), groups: vec![] };
    let id = daemon.domain("web");
    daemon.set(format!("instances/{id}/owner"), "2001");
    daemon.domain_does(id, "start", "active");
    daemon.host_does(json!({"do": "guest", "uuid": id.to_string(), "ignores_acpi": true}));
    daemon.set(format!("instances/{id}/stop_timeout_seconds"), "600");
    owner.act(|| support::write(&daemon.path(format!("instances/{id}/state")), b"stopped").expect("his own"));
    let link = last_task(&daemon, id);
    let cancel = link.join("cancel");
    let write = |user: &User, value: &str| user.act(|| errno(support::write(&cancel, value.as_bytes())));
    assert_eq!(write(&stranger, "1"), libc::EACCES);
    assert_eq!(write(&owner, "yes please"), libc::EINVAL);
    assert_eq!(write(&owner, "0"), libc::EINVAL);
    daemon.set(format!("instances/{id}/locked"), "1");
    assert_eq!(write(&owner, "1"), libc::EPERM);
    assert_eq!(write(&User { uid: 0, gid: 0, groups: vec![] }, "1"), libc::EPERM, "a lock binds root");
    let last = daemon.read(format!("instances/{id}/last_error"));
    assert!(last.contains(" cancel: EPERM: locked by"), "{last}");
    assert_eq!(daemon.read(format!("instances/{id}/task")), "stopping");
    daemon.set(format!("instances/{id}/locked"), "0");
    assert_eq!(write(&owner, "1"), 0);
    wait_until("it gave up", || daemon.read(link.join("state")) == "cancelled");
    assert_eq!(daemon.read(format!("instances/{id}/state")), "active");
    assert_eq!(daemon.read(format!("instances/{id}/task")), "");
    assert!(daemon.read(link.join("message")).contains("given up on request"));
    assert_eq!(write(&owner, "1"), libc::EINVAL);
    let last = daemon.read(format!("instances/{id}/last_error"));
    assert!(last.contains("there is nothing to cancel"), "{last}");
    let calls = daemon.host_does(json!({"do": "calls"}));
    assert_eq!(calls["calls"]["power_off"].as_u64().unwrap_or(0), 0);
}

#[test]
fn what_was_cancelled_gives_up_after_a_kill_too_and_what_came_too_far_says_so() {
    let mut daemon = Daemon::start(&["--settle", "0s"]);
    let (id, task) = stopping(&daemon, "web");
    // Its call does not return, so it cannot give up yet: the outcome is not known.
    daemon.host_does(json!({"do": "fault", "call": "shutdown", "uuid": id.to_string(), "mode": "hang"}));
    daemon.host_does(json!({"do": "fault", "call": "domain", "uuid": id.to_string(), "mode": "hang"}));
    daemon.set(task.join("cancel"), "1");
    daemon.kill();
    daemon.spawn();
    wait_until("it gave up", || daemon.read(task.join("state")) == "cancelled");
    daemon.wait_state(id, "active");

    let late = daemon.domain("late");
    daemon.host_does(json!({"do": "fault", "call": "start", "uuid": late.to_string(), "mode": "hang"}));
    daemon.set(format!("instances/{late}/state"), "active");
    let link = last_task(&daemon, late);
    wait_until("it starts", || daemon.read(link.join("phase")) == "start");
    daemon.set(link.join("cancel"), "1");
    daemon.set(link.join("cancel"), "1");
    assert_eq!(daemon.read(link.join("state")), "processing", "a call that was made has an end");
    daemon.host_does(json!({"do": "release", "call": "start"}));
    wait_until("it is over", || !daemon.read(link.join("ended_at")).is_empty());
    assert_eq!(daemon.read(link.join("state")), "success");
    assert!(daemon.read(link.join("message")).contains("too late"));
    assert_eq!(daemon.read(format!("instances/{late}/state")), "active");
}

/// A server whose image never comes to its end.
struct Slow {
    port: u16,
    ended: Arc<AtomicBool>,
}

impl Slow {
    fn start() -> Slow {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let ended = Arc::new(AtomicBool::new(false));
        let of_thread = ended.clone();
        thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                if of_thread.load(Ordering::SeqCst) {
                    return;
                }
                thread::spawn(move || {
                    let _request = stream.read(&mut [0; 4096]);
                    let _head =
                        stream.write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: {BYTES}\r\n\r\n").as_bytes());
                    let _half = stream.write_all(&image()[..BYTES / 2]);
                    // Until the other side has had enough.
                    let _end = stream.read(&mut [0]);
                });
            }
        });
        Slow { port, ended }
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        let _wakes_the_listener = TcpStream::connect(("127.0.0.1", self.port));
    }
}

#[test]
fn an_import_that_is_cancelled_leaves_nothing_of_what_it_fetched() {
    let server = Slow::start();
    let config = tempfile::NamedTempFile::new().expect("a file");
    fs::write(config.path(), "import_hosts = ['127.0.0.1']\nsettle = '0s'\n").expect("written");
    let daemon = Daemon::start(&["--config", config.path().to_str().expect("UTF-8")]);
    let task = draft(&daemon);
    let source = format!("http://127.0.0.1:{}/image", server.port);
    daemon.set(format!("{task}/spec.json"), &order(&source).to_string());
    let object = daemon.read(format!("{task}/object"));
    wait_until("the image stands", || daemon.path(&object).exists());
    let fetched = daemon.state_directory().join(&object).join("data.part");
    wait_until("some of it is there", || {
        daemon.read(format!("{task}/phase")) == "fetch" && fs::metadata(&fetched).is_ok_and(|data| data.len() > 0)
    });
    assert_eq!(errno(daemon.write(format!("{object}/state"), "deleted")), libc::EBUSY);
    daemon.set(format!("{task}/cancel"), "1");
    wait_until("it gave up", || daemon.read(format!("{task}/state")) == "cancelled");
    assert_eq!(daemon.read(format!("{object}/state")), "draft");
    assert_eq!(fs::metadata(daemon.path(format!("{object}/data"))).expect("stat").len(), 0);
    assert_eq!(daemon.read(format!("{task}/result")), "");
    daemon.set(format!("{object}/state"), "deleted");
    wait_until("the draft is gone", || !daemon.path(&object).exists());
    assert_eq!(daemon.read(format!("{task}/object")), object, "which object it was is remembered");
}
