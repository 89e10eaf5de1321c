//! `spec.json` and `user_data`: documents written by ordinary tools, taken or refused as a whole.

mod support;

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use support::{Daemon, User, errno, gid, wait_until, write};
use uuid::Uuid;

const MEBIBYTE: usize = 1 << 20;

fn draft(daemon: &Daemon) -> String {
    let instance = format!("instances/{}", Uuid::new_v4());
    fs::create_dir(daemon.path(&instance)).expect("a draft");
    instance
}

fn spec(daemon: &Daemon, object: &str) -> Value {
    serde_json::from_str(&daemon.read(format!("{object}/spec.json"))).expect("JSON")
}

/// One write of a document, and its errno.
fn put(daemon: &Daemon, object: &str, document: &Value) -> i32 {
    errno(write(&daemon.path(format!("{object}/spec.json")), document.to_string().as_bytes()))
}

fn last_error(daemon: &Daemon, object: &str) -> String {
    daemon.read(format!("{object}/last_error"))
}

fn bash(script: &str, file: &Path) -> Output {
    let mut command = Command::new("bash");
    command.args(["-c", script, "bash"]).arg(file).stdin(Stdio::null()).current_dir("/");
    command.output().expect("bash runs")
}

/// Everything that a change leaves behind: events, time of change, tasks.
fn traces(daemon: &Daemon, object: &str) -> (Vec<String>, String, Vec<String>) {
    // Events are written in order, a moment later: a refusal after all others marks the end.
    let mark = "\"what\":\"mkdir\"";
    let marks = || daemon.read("events").matches(mark).count();
    let before = marks();
    assert_eq!(errno(fs::create_dir(daemon.path("instances/mark"))), libc::EINVAL);
    wait_until("the mark is there", || marks() > before);
    let events = daemon.read("events").lines().filter(|line| !line.contains(mark)).map(str::to_owned).collect();
    let tasks = fs::read_dir(daemon.path("tasks")).expect("tasks");
    let tasks = tasks.map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"));
    let mut tasks: Vec<_> = tasks.collect();
    tasks.sort();
    (events, daemon.read(format!("{object}/updated_at")), tasks)
}

#[test]
fn every_tool_writes_a_document() {
    let daemon = Daemon::start(&[]);
    let instance = draft(&daemon);
    let file = daemon.path(format!("{instance}/spec.json"));
    let ways = [
        ("heredoc", "cat >\"$1\" <<END\n{\n  \"description\": \"heredoc\",\n  \"vcpus\": 2\n}\n\nEND"),
        ("lines", "printf '%s\\n' '{' '\"description\":' '\"lines\"' ',\"vcpus\":3}' '' >\"$1\""),
        ("append", "echo '{\"description\": \"append\"}' >>\"$1\""),
        ("tee", "printf '{\\n\"description\": \"tee\"}' | tee \"$1\" >/dev/null"),
        (
            "cp",
            "d=$(mktemp -d); echo '{\"description\": \"cp\"}' >\"$d/x\"; cp \"$d/x\" \"$1\"; s=$?; rm -r \"$d\"; exit $s",
        ),
        ("dd", "printf '{\"description\": \"dd\"}\\n' | dd bs=1 of=\"$1\" status=none"),
        ("sed", "sed -i 's/\"description\": \"dd\"/\"description\": \"sed\"/' \"$1\""),
        (
            "python",
            "python3 -c 'import json, sys\nwith open(sys.argv[1], \"w\", buffering=1) as file:\n  \
             json.dump({\"description\": \"python\", \"metadata\": {\"a\": \"b\"}}, file, indent=1)' \"$1\"",
        ),
        (
            "rsync",
            "d=$(mktemp -d); echo '{\"description\": \"rsync\"}' >\"$d/spec.json\"; rsync \"$d/spec.json\" \"$1\"; s=$?; \
             rm -r \"$d\"; exit $s",
        ),
        (
            "rsync --inplace",
            "d=$(mktemp -d); echo '{\"description\": \"rsync --inplace\"}' >\"$d/spec.json\"; \
             rsync --inplace \"$d/spec.json\" \"$1\"; s=$?; rm -r \"$d\"; exit $s",
        ),
    ];
    for (name, script) in ways {
        let output = bash(script, &file);
        assert!(output.status.success(), "{name}: {output:?} {}", last_error(&daemon, &instance));
        assert_eq!(daemon.read(format!("{instance}/description")), name);
        assert_eq!(last_error(&daemon, &instance), "ok", "{name}");
    }
    assert_eq!(daemon.read(format!("{instance}/vcpus")), "3");
}

#[test]
fn every_tool_reports_a_document_that_is_refused() {
    let daemon = Daemon::start(&[]);
    let instance = draft(&daemon);
    let file = daemon.path(format!("{instance}/spec.json"));
    let before = daemon.read(format!("{instance}/spec.json"));
    for script in [
        "cat >\"$1\" <<END\n{\n  \"vcpus\": 2,\n\"vcpu\": 2\n}\nEND",
        "printf '%s\\n' '{' '\"vcpu\":' '2}' >\"$1\"",
        "echo '[' >\"$1\"",
        "printf '%s\\n' '[' '{\"description\": \"in a list\"}' ']' >\"$1\"",
        "echo '{\"vcpus\": 2} {\"vcpus\": 3}' >\"$1\"",
        "echo '{\"vcpus\": 2, \"vcpus\": 2}' | tee \"$1\" >/dev/null",
        "sed -i 's/\"vcpus\"/\"vcpu\"/' \"$1\"",
        "python3 -c 'import json, sys; json.dump({\"vcpu\": 1}, open(sys.argv[1], \"w\"))' \"$1\" || exit 1",
    ] {
        let output = bash(script, &file);
        assert_eq!(daemon.read(format!("{instance}/spec.json")), before, "{script}");
        assert_ne!(last_error(&daemon, &instance), "ok", "{script}");
        // CPython drops the error of an implicit close.
        if !script.starts_with("python3") {
            assert!(!output.status.success(), "{script}: {output:?}");
        }
    }
    assert_eq!(daemon.read(format!("{instance}/description")), "");
}

#[test]
fn a_document_sets_what_it_names_in_any_form_that_the_files_take() {
    let daemon = Daemon::start(&[]);
    let instance = draft(&daemon);
    let image = daemon.image();
    daemon.set(format!("images/{image}/name"), "cirros");
    let document = json!({
        "name": "web", "memory_bytes": "256M", "vcpus": "2", "disable_terminate": "yes", "image": "cirros",
        "root_disk_bytes": 33_554_432, "locked": false, "metadata": {"role": "web", "a/b": "c"},
    });
    assert_eq!(put(&daemon, &instance, &document), 0, "{}", last_error(&daemon, &instance));
    assert_eq!(
        spec(&daemon, &instance),
        json!({
            "autostart": false, "description": null, "disable_terminate": true, "flavor": null, "image": image.to_string(),
            "locked": false, "locked_reason": null, "memory_bytes": 268_435_456,
            "metadata": {"a/b": "c", "role": "web"}, "name": "web", "network": "network:default", "owner": "root", "project": "nogroup", "root_disk_bytes": 33_554_432, "state": "draft",
            "stop_timeout_seconds": 60, "vcpus": 2,
        })
    );
    let text = daemon.read(format!("{instance}/spec.json"));
    let keys: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("  \"")).collect();
    assert!(keys.is_sorted() && keys.len() > 10, "{text}");
    // RFC 7396 merges metadata; null empties what can be empty.
    let merged = json!({"metadata": {"role": null, "new": "x"}, "description": "d"});
    assert_eq!(put(&daemon, &instance, &merged), 0);
    assert_eq!(spec(&daemon, &instance)["metadata"], json!({"a/b": "c", "new": "x"}));
    assert_eq!(daemon.read(format!("{instance}/metadata/a%2Fb")), "c");
    wait_until("the removed key is gone", || !daemon.path(format!("{instance}/metadata/role")).exists());
    assert_eq!(put(&daemon, &instance, &json!({"description": null, "metadata": null})), 0);
    assert_eq!(spec(&daemon, &instance)["metadata"], json!({}));
    assert_eq!(daemon.read(format!("{instance}/description")), "");
}

#[test]
fn a_refused_document_names_every_key_that_is_wrong_and_changes_nothing() {
    let daemon = Daemon::start(&[]);
    let instance = draft(&daemon);
    let before = daemon.read(format!("{instance}/spec.json"));
    let bad = json!({
        "description": "not taken", "vcpu": 1, "vcpus": "many", "created_at": 1, "reboot": "soft", "memory_bytes": null,
        "locked": null, "name": 7, "metadata": {"fine": "x", "wrong": 1}, "uuid": "x", "disable_terminate": [],
    });
    assert_eq!(put(&daemon, &instance, &bad), libc::EINVAL);
    let said = last_error(&daemon, &instance);
    for key in ["vcpu", "vcpus", "created_at", "reboot", "memory_bytes", "locked", "name", "uuid", "disable_terminate"]
    {
        assert!(said.contains(&format!(" {key}: ")), "{key} in {said}");
    }
    assert!(said.contains("metadata/wrong: ") && !said.contains("description") && !said.contains("metadata/fine"));
    assert_eq!(daemon.read(format!("{instance}/spec.json")), before);
    for (document, refusal) in [
        (json!({"vcpus": 100_000}), libc::ERANGE),
        (json!({"image": "nosuchimage"}), libc::ENOENT),
        (json!({"vcpus": 1.5}), libc::EINVAL),
        (json!({"vcpus": -1}), libc::EINVAL),
        (json!({"description": "two\nlines"}), libc::EINVAL),
        (json!({"metadata": {"../x": 1}}), libc::EINVAL),
    ] {
        assert_eq!(put(&daemon, &instance, &document), refusal, "{document}: {}", last_error(&daemon, &instance));
    }
    let many: serde_json::Map<_, _> = (0..5000).map(|key| (format!("{key}{}", "x".repeat(150)), json!(1))).collect();
    assert_eq!(put(&daemon, &instance, &Value::Object(many)), libc::EINVAL);
    let said = last_error(&daemon, &instance);
    assert!(said.ends_with("and 4952 more") && said.len() < 64 << 10, "{} bytes", said.len());
    let web = daemon.domain("web");
    daemon.domain_does(web, "start", "active");
    let web = format!("instances/{web}");
    let image = daemon.image();
    let late =
        json!({"description": "not taken", "image": image.to_string(), "name": "other", "user_data": "#!/bin/sh"});
    assert_eq!(put(&daemon, &web, &late), libc::EINVAL);
    let said = last_error(&daemon, &web);
    assert!(said.contains("spec.json: EINVAL: ") && said.contains("image: ") && said.contains("user_data: "), "{said}");
    assert!(said.contains("name: ") && said.contains("stopped") && !said.contains("description"), "{said}");
    daemon.set(format!("{web}/locked"), "1");
    assert_eq!(put(&daemon, &web, &late), libc::EPERM);
    let said = last_error(&daemon, &web);
    assert!(["image: ", "name: ", "user_data: ", "description: "].iter().all(|key| said.contains(key)), "{said}");
    assert_eq!(daemon.read(format!("{web}/description")), "");
    // What opens the lock in the same document opens the way for the rest.
    assert_eq!(put(&daemon, &web, &json!({"locked": false, "description": "taken"})), 0);
    assert_eq!(daemon.read(format!("{web}/description")), "taken");
}

#[test]
fn the_same_document_twice_changes_nothing() {
    let daemon = Daemon::start(&[]);
    let instance = draft(&daemon);
    let image = daemon.image();
    daemon.set(format!("images/{image}/name"), "cirros");
    let document = json!({
        "name": "web", "memory_bytes": "64M", "image": "cirros", "metadata": {"a": "b", "gone": null},
        "user_data": "#cloud-config\n", "description": "twice", "state": "active", "disable_terminate": true,
    });
    assert_eq!(put(&daemon, &instance, &document), 0, "{}", last_error(&daemon, &instance));
    let id = instance.strip_prefix("instances/").expect("a path").parse().expect("an id");
    daemon.wait_state(id, "active");
    wait_until("it is idle", || daemon.read(format!("{instance}/task")).is_empty());
    let before = traces(&daemon, &instance);
    for _ in 0..2 {
        assert_eq!(put(&daemon, &instance, &document), 0, "{}", last_error(&daemon, &instance));
    }
    assert_eq!(traces(&daemon, &instance), before);
}

#[test]
fn what_was_read_can_be_written_back_in_every_state() {
    let daemon = Daemon::start(&["-o", "access_group=users"]);
    let user = User { uid: 2001, gid: 2001, groups: vec![gid("users")] };
    let back = |object: &str, who: &str| {
        let file = daemon.path(format!("{object}/spec.json"));
        let before = traces(&daemon, object);
        let write_back = || write(&file, &fs::read(&file).expect(who));
        for outcome in [user.act(write_back), write_back()] {
            assert_eq!(errno(outcome), 0, "{who}: {}", last_error(&daemon, object));
        }
        assert_eq!(traces(&daemon, object), before, "{who}");
    };
    let image = daemon.image();
    daemon.set(format!("images/{image}/owner"), "2001");
    back(&format!("images/{image}"), "an active image");
    let new = draft(&daemon);
    daemon.set(format!("{new}/image"), &image.to_string());
    daemon.set(format!("{new}/owner"), "2001");
    fs::create_dir(daemon.path("flavors/gone")).expect("a draft");
    daemon.set("flavors/gone/is_public", "1");
    daemon.set("flavors/gone/state", "active");
    daemon.set(format!("{new}/flavor"), "gone");
    back(&new, "a draft");
    for (file, value) in [(format!("images/{image}/owner"), "root"), ("flavors/gone/state".to_owned(), "draft")] {
        daemon.set(file, value);
    }
    daemon.set("flavors/gone/state", "deleted");
    back(&new, "a draft whose owner sees its image and flavor no longer");
    let id = daemon.domain("web");
    let instance = format!("instances/{id}");
    daemon.set(format!("{instance}/owner"), "2001");
    back(&instance, "stopped");
    for (what, state) in [("start", "active"), ("pause", "paused"), ("unpause", "active"), ("crash", "error")] {
        daemon.domain_does(id, what, state);
        wait_until("it is idle", || daemon.read(format!("{instance}/task")).is_empty());
        back(&instance, state);
    }
    daemon.set(format!("{instance}/state"), "active");
    daemon.set(format!("{instance}/state"), "suspended");
    daemon.wait_state(id, "suspended");
    back(&instance, "suspended");
    user.act(|| write(&daemon.path(format!("{instance}/locked")), b"1").expect("locked"));
    back(&instance, "locked by its owner");
    assert_eq!(daemon.read(format!("{instance}/locked_level")), "owner");
    daemon.set(format!("{instance}/locked"), "1");
    assert_eq!(daemon.read(format!("{instance}/locked_level")), "admin");
    back(&instance, "locked by root");
    fs::create_dir(daemon.path("flavors/small")).expect("a draft");
    let before = traces(&daemon, "flavors/small");
    let text = daemon.read("flavors/small/spec.json");
    assert_eq!(errno(daemon.write("flavors/small/spec.json", &text)), 0);
    assert_eq!(traces(&daemon, "flavors/small"), before);
}

#[test]
fn a_state_in_a_document_comes_last_and_is_waited_for() {
    let daemon = Daemon::start(&["-o", "settle=20s"]);
    let image = daemon.image();
    let instance = draft(&daemon);
    let document =
        json!({"state": "active", "name": "web", "image": image.to_string(), "memory_bytes": "64M", "locked": 1});
    assert_eq!(put(&daemon, &instance, &document), 0, "{}", last_error(&daemon, &instance));
    assert_eq!(daemon.read(format!("{instance}/state")), "active");
    assert_eq!(daemon.read(format!("{instance}/locked")), "1");
    let second = draft(&daemon);
    assert_eq!(put(&daemon, &second, &json!({"state": "active", "description": "no image"})), libc::EINVAL);
    assert_eq!(daemon.read(format!("{second}/description")), "");
}

#[test]
fn during_a_task_the_document_says_what_is_wanted_and_joins_it() {
    let daemon = Daemon::start(&["-o", "settle=10ms"]);
    let id = daemon.domain("web");
    daemon.domain_does(id, "start", "active");
    daemon.host_does(json!({"do": "guest", "uuid": id.to_string(), "ignores_acpi": true}));
    let instance = format!("instances/{id}");
    daemon.set(format!("{instance}/state"), "stopped");
    assert_eq!(daemon.read(format!("{instance}/task")), "stopping");
    assert_eq!(spec(&daemon, &instance)["state"], "stopped");
    let text = daemon.read(format!("{instance}/spec.json"));
    assert_eq!(errno(daemon.write(format!("{instance}/spec.json"), &text)), 0);
    assert_eq!(put(&daemon, &instance, &json!({"state": "active"})), libc::EBUSY);
    assert_eq!(put(&daemon, &instance, &json!({"state": "stopped", "description": "taken meanwhile"})), 0);
    assert_eq!(daemon.read(format!("{instance}/description")), "taken meanwhile");
    assert_eq!(daemon.read(format!("{instance}/task")), "stopping");
}

#[test]
fn an_unfinished_document_is_dropped_and_said() {
    let daemon = Daemon::start(&[]);
    let instance = draft(&daemon);
    let mut file = File::create(daemon.path(format!("{instance}/spec.json"))).expect("open");
    file.write_all(b"{\"description\": \"half").expect("taken");
    assert_eq!(last_error(&daemon, &instance), "ok");
    drop(file);
    wait_until("it is said", || last_error(&daemon, &instance).contains("spec.json: EINVAL: "));
    assert!(last_error(&daemon, &instance).contains("closed before"));
    assert_eq!(daemon.read(format!("{instance}/description")), "");
    // Several documents through one handle, and blank lines between them.
    let mut file = File::create(daemon.path(format!("{instance}/spec.json"))).expect("open");
    for piece in ["\n", "{\"description\":", "\"first\"}\n", "\n\n", "{\"vcpus\": 4}", "\n"] {
        file.write_all(piece.as_bytes()).expect("taken");
    }
    drop(file);
    assert_eq!(daemon.read(format!("{instance}/description")), "first");
    assert_eq!(daemon.read(format!("{instance}/vcpus")), "4");
    let large = format!("{{\"description\": \"{}\"}}", " ".repeat(MEBIBYTE));
    let written = fs::write(daemon.path(format!("{instance}/spec.json")), large);
    assert_eq!(errno(written), libc::EFBIG);
    assert_eq!(daemon.read(format!("{instance}/description")), "first");
}

#[test]
fn user_data_is_any_text_of_a_mebibyte_of_which_nothing_is_told() {
    let daemon = Daemon::start(&[]);
    let instance = draft(&daemon);
    let file = daemon.path(format!("{instance}/user_data"));
    assert_eq!(fs::metadata(&file).expect("stat").mode() & 0o7777, 0o660);
    let source = daemon.scratch().join("user-data");
    let mut text = "#cloud-config\npassword: Geheimnis\nmotd: ".to_owned() + &"äöü€".repeat(60_000);
    text.push('\n');
    fs::write(&source, &text).expect("a file");
    for tool in
        ["cp SOURCE \"$1\"", "cat SOURCE >\"$1\"", "dd if=SOURCE of=\"$1\" bs=7777 status=none", "rsync SOURCE \"$1\""]
    {
        fs::write(&file, "other").expect("taken");
        let output = bash(&tool.replace("SOURCE", source.to_str().expect("UTF-8")), &file);
        assert!(output.status.success(), "{tool}: {output:?}");
        assert!(fs::read_to_string(&file).expect("readable") == text, "{tool}");
        assert_eq!(fs::metadata(&file).expect("stat").len(), text.len() as u64);
    }
    assert!(!daemon.read("events").contains("Geheimnis") && daemon.read("events").contains("\"user_data\""));
    assert!(!daemon.log_text().contains("Geheimnis"));
    assert!(!daemon.read(format!("{instance}/spec.json")).contains("Geheimnis"));
    assert!(bash("sed -i s/Geheimnis/geaendert/ \"$1\"", &file).status.success());
    assert!(fs::read_to_string(&file).expect("readable").contains("password: geaendert\n"));
    // What begins anew at offset 0 begins anew.
    let mut open = OpenOptions::new().write(true).open(&file).expect("open");
    open.write_all(b"first").expect("taken");
    open.seek(SeekFrom::Start(0)).expect("seek");
    open.write_all(b"second ").expect("taken");
    open.write_all(b"third").expect("taken");
    assert_eq!(fs::read_to_string(&file).expect("readable"), "second third");
    drop(open);
    fs::write(&file, vec![b'a'; MEBIBYTE]).expect("a mebibyte is taken");
    assert_eq!(errno(fs::write(&file, vec![b'b'; MEBIBYTE + 1])), libc::EFBIG);
    assert_eq!(errno(fs::write(&file, b"\xff\xfe")), libc::EINVAL);
    fs::write(&file, "\n").expect("empty clears it");
    assert_eq!(fs::read_to_string(&file).expect("readable"), "");
    assert_eq!(put(&daemon, &instance, &json!({"user_data": "#!/bin/sh\ntrue\n"})), 0);
    assert_eq!(fs::read_to_string(&file).expect("readable"), "#!/bin/sh\ntrue\n");
    let web = daemon.domain("web");
    assert_eq!(errno(daemon.write(format!("instances/{web}/user_data"), "x")), libc::EINVAL);
    assert!(last_error(&daemon, &format!("instances/{web}")).contains("in a draft only"));
}

#[test]
fn who_may_not_write_an_object_writes_no_document_of_it() {
    let daemon = Daemon::start(&["-o", "access_group=users"]);
    let instance = draft(&daemon);
    let stranger = User { uid: 2001, gid: 2001, groups: vec![gid("users")] };
    let file = daemon.path(format!("{instance}/spec.json"));
    assert_eq!(stranger.act(|| errno(File::create(&file))), libc::EACCES);
    daemon.set(format!("{instance}/owner"), "2001");
    let mut held = stranger.act(|| File::create(&file).expect("his own"));
    stranger.act(|| {
        write(&file, b"{\"description\": \"mine\", \"owner\": \"2001\"}").expect("his own");
        assert_eq!(errno(write(&file, b"{\"owner\": \"root\", \"project\": \"games\"}")), libc::EPERM);
    });
    assert!(last_error(&daemon, &instance).contains("owner: only root may change this; project: only root"));
    daemon.set(format!("{instance}/owner"), "root");
    assert_eq!(stranger.act(|| errno(held.write_all(b"{\"description\": \"late\"}"))), libc::EACCES);
    assert_eq!(daemon.read(format!("{instance}/description")), "mine");
}

/// Validates documents against a published schema; what the validator says of the first that is not valid.
fn validate(schema: &Path, documents: &[Value]) -> Result<(), String> {
    let script = "import json, sys\nfrom jsonschema import Draft202012Validator as Validator\n\
                  schema = json.load(open(sys.argv[1]))\nValidator.check_schema(schema)\n\
                  [Validator(schema).validate(document) for document in json.load(sys.stdin)]";
    // Debian's own interpreter, for which its package is.
    let mut command = Command::new("/usr/bin/python3");
    command.args(["-c", script]).arg(schema).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("python3 runs");
    let input = Value::from(documents).to_string();
    child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("written");
    let output = child.wait_with_output().expect("it ends");
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

fn published(class: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("docs/abi/{class}.schema.json"))
}

#[test]
fn what_is_read_is_valid_and_every_key_of_the_schema_can_be_written() {
    let daemon = Daemon::start(&[]);
    let image = daemon.image();
    fs::create_dir(daemon.path("flavors/small")).expect("a draft");
    daemon.set("flavors/small/access", "games users");
    daemon.set("flavors/small/state", "active");
    let new = draft(&daemon);
    let web = daemon.domain("web");
    let instance = format!("instances/{web}");
    let mut read = vec![spec(&daemon, &new), spec(&daemon, &instance)];
    daemon.domain_does(web, "start", "active");
    daemon.set(format!("{instance}/locked"), "1");
    read.push(spec(&daemon, &instance));
    let full = json!({
        "autostart": "on", "description": "d", "disable_terminate": "no", "flavor": "small", "image": image.to_string(),
        "locked": 1, "locked_reason": "r", "memory_bytes": "64M", "metadata": {"a": "b", "c": null}, "name": "full",
        "network": "bridge:br0", "owner": "root",
        "project": "games", "root_disk_bytes": "32M", "state": "draft", "stop_timeout_seconds": 5, "vcpus": 2,
        "user_data": "x",
    });
    assert_eq!(put(&daemon, &new, &full), 0, "{}", last_error(&daemon, &new));
    read.extend([spec(&daemon, &new), full.clone(), json!({})]);
    validate(&published("instances"), &read).expect("valid");
    let schema: Value = serde_json::from_slice(&fs::read(published("instances")).expect("a schema")).expect("JSON");
    // What there is in the bin only can be written there only.
    let stays = |key: &&String| *key != "expires_at";
    let described = schema["properties"].as_object().expect("properties").keys().filter(stays);
    assert_eq!(described.collect::<Vec<_>>(), full.as_object().expect("an object").keys().collect::<Vec<_>>());
    for bad in [json!({"vcpu": 1}), json!({"vcpus": "many"}), json!({"locked": "maybe"}), json!([]), json!({"name": 1})]
    {
        assert!(validate(&published("instances"), std::slice::from_ref(&bad)).is_err(), "{bad}");
        assert_eq!(put(&daemon, &draft(&daemon), &bad), libc::EINVAL, "{bad}");
    }
    for (class, object) in [("images", format!("images/{image}")), ("flavors", "flavors/small".to_owned())] {
        let document = spec(&daemon, &object);
        validate(&published(class), std::slice::from_ref(&document)).expect("valid");
        let schema: Value = serde_json::from_slice(&fs::read(published(class)).expect("a schema")).expect("JSON");
        for key in schema["properties"].as_object().expect("properties").keys().filter(stays) {
            assert_eq!(put(&daemon, &object, &json!({ key: document[key] })), 0, "{class} {key}");
        }
    }
}
