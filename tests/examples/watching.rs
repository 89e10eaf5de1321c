//! Tools that wait for something to happen, whoever made it.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use uuid::Uuid;

use crate::stage::{examples, long_tool, twice};
use crate::support::{DEADLINE, wait_until};

#[test]
fn a_crash_is_a_mail_and_the_next_crash_another() {
    twice(|stage| {
        let broken = stage.running("broken-before");
        stage.host_does("crash", broken);
        stage.daemon.wait_state(broken, "error");
        let id = stage.running("fragile");
        stage.stand_in("mail", r#"{ printf '%s|' "$@"; cat; } >"$OUT/$$.new"; mv "$OUT/$$.new" "$OUT/mail.$$""#);
        let mails = || {
            let names = fs::read_dir(stage.directory("out")).expect("listed").map(|entry| entry.expect("an entry"));
            let mails = names.filter(|entry| entry.file_name().to_string_lossy().starts_with("mail."));
            mails.map(|entry| fs::read_to_string(entry.path()).expect("readable")).collect::<Vec<_>>()
        };
        let about = |name: &str| mails().iter().filter(|mail| mail.contains(name)).cloned().collect::<Vec<_>>();
        let _running = stage.background(stage.example("mail-on-crash").arg("ann"), "mailer");
        wait_until("a mail of what was broken before", || about("broken-before").len() == 1);
        stage.host_does("crash", id);
        wait_until("a mail of the crash", || about("fragile").len() == 1);
        let mail = about("fragile").remove(0);
        assert!(mail.starts_with("-s|instance fragile is broken|ann|fragile"), "{mail}");
        assert!(mail.contains(": crashed\n"), "{mail}");
        stage.host_does("start", id);
        stage.daemon.wait_state(id, "active");
        stage.host_does("ioerror", id);
        wait_until("a mail of the next one", || about("fragile").len() == 2);
        assert!(about("fragile").iter().any(|mail| mail.contains(": ioerror\n")));
        assert_eq!(about("broken-before").len(), 1, "one mail each");
    });
}

/// Whether a process has this file among its arguments.
fn runs(script: &Path) -> bool {
    let processes = fs::read_dir("/proc").expect("processes").filter_map(Result::ok);
    let mut arguments = processes.filter_map(|process| fs::read(process.path().join("cmdline")).ok());
    let script = script.to_str().expect("UTF-8").as_bytes();
    arguments.any(|arguments| arguments.split(|byte| *byte == 0).any(|argument| argument == script))
}

#[test]
fn incron_starts_again_what_crashed_if_its_owner_wants_that() {
    twice(|stage| {
        let [wanted, unwanted] = ["wanted", "unwanted"].map(|name| stage.running(name));
        stage.set(wanted, "spec.json", r#"{"metadata": {"restart": "yes"}}"#);
        let tables = stage.directory("incron.d");
        let script = examples().join("restart-crashed");
        let edits = [("/usr/local/bin/restart-crashed", script.to_str().expect("UTF-8"))];
        let table = fs::read_to_string(stage.edited("instancefs.incron", &edits)).expect("readable");
        fs::write(tables.join("instancefs"), table.replace("/vm", &stage.root())).expect("written");
        let configuration = stage.daemon.scratch().join("incron.conf");
        let directory = stage.directory("incron").display().to_string();
        let text = format!(
            "system_table_dir = {}\nuser_table_dir = {directory}\nlockfile_dir = {directory}\nlockfile_name = lock\n",
            tables.display()
        );
        fs::write(&configuration, text).expect("written");
        // incron 0.5.12 ended now and then: a supervisor starts it again.
        let supervisor =
            "ulimit -n 1024; while :; do rm -f \"$2\"/lock*; /usr/sbin/incrond -n -f \"$1\"; sleep 0.2; done";
        let mut incron = stage.command("sh");
        let incron = incron.args(["-c", supervisor, "sh"]).arg(&configuration).arg(&directory);
        let _incron = stage.background(incron, "incrond");
        let errors = || stage.daemon.read("events").matches("\"to\":\"error\"").count();
        for round in 1..=3 {
            stage.host_does("crash", wanted);
            let mut last = Instant::now();
            wait_until("it crashed, and is back", || {
                // incron loses events, on a plain directory too: the next one makes it look again.
                if last.elapsed() > Duration::from_secs(2) {
                    let protected = stage.read(unwanted, "disable_terminate");
                    stage.set(unwanted, "disable_terminate", if protected == "0" { "1" } else { "0" });
                    last = Instant::now();
                }
                errors() >= round && stage.read(wanted, "state") == "active"
            });
        }
        // One that looked before would start again what fails after.
        wait_until("nobody looks any more", || !runs(&script));
        stage.host_does("crash", unwanted);
        stage.host_does("ioerror", wanted);
        stage.daemon.wait_state(unwanted, "error");
        stage.daemon.wait_state(wanted, "error");
        stage.set(wanted, "description", "a disk that fails wants a person");
        thread::sleep(Duration::from_millis(300));
        assert_eq!([wanted, unwanted].map(|id| stage.read(id, "state")), ["error", "error"]);
    });
}

#[test]
fn every_change_of_a_definition_is_a_commit() {
    twice(|stage| {
        let id = stage.running("kept");
        fs::write(stage.daemon.scratch().join("gitconfig"), "[user]\nname = ann\nemail = ann@example.org\n")
            .expect("written");
        let repository = stage.daemon.scratch().join("definitions");
        let _recorder = stage.background(stage.example("definitions-in-git").arg(&repository), "recorder");
        let git = |arguments: &[&str]| {
            let mut command = stage.command("git");
            command.arg("-C").arg(&repository).args(arguments);
            String::from_utf8_lossy(&command.output().expect("git runs").stdout).into_owned()
        };
        let committed = |id: Uuid, text: &str| git(&["show", &format!("HEAD:{id}.json")]).contains(text);
        wait_until("the first commit", || committed(id, "\"name\": \"kept\""));
        stage.set(id, "description", "customer database");
        wait_until("a change by the tree", || committed(id, "customer database"));
        stage.host_does("stop", id);
        stage.daemon.wait_state(id, "stopped");
        stage.daemon.host_does(json!({"do": "rename", "uuid": id.to_string(), "name": "elsewhere"}));
        wait_until("a change by virsh", || committed(id, "\"name\": \"elsewhere\""));
        let newcomer = stage.domain("newcomer");
        wait_until("one that comes", || committed(newcomer, "newcomer"));
        stage.set(newcomer, "description", "the new one");
        wait_until("its changes", || committed(newcomer, "the new one"));
        stage.host_does("undefine", newcomer);
        wait_until("one that goes", || !git(&["ls-tree", "HEAD"]).contains(&newcomer.to_string()));
        assert!(git(&["log", "-p", "--", &format!("{newcomer}.json")]).contains("the new one"), "history has it");
    });
}

#[test]
fn a_hosts_file_follows_addresses_and_names() {
    twice(|stage| {
        let id = stage.domain("web");
        let hosts = stage.daemon.scratch().join("hosts");
        let lines = || fs::read_to_string(&hosts).unwrap_or_default();
        let _writer = stage.background(stage.example("hosts-file").arg(&hosts), "writer");
        wait_until("the first file", || hosts.exists());
        assert_eq!(lines(), "");
        stage.daemon.host_does(
            json!({"do": "addresses", "uuid": id.to_string(), "agent": ["192.0.2.7", "2001:db8::7"], "host": []}),
        );
        stage.host_does("start", id);
        wait_until("addresses of one that starts", || lines() == "192.0.2.7\tweb\n2001:db8::7\tweb\n");
        stage.host_does("stop", id);
        wait_until("none of one that is off", || lines().is_empty());
        let newcomer = stage.domain("newcomer");
        stage
            .daemon
            .host_does(json!({"do": "addresses", "uuid": newcomer.to_string(), "agent": ["192.0.2.8"], "host": []}));
        stage.host_does("start", newcomer);
        wait_until("addresses of one that came later", || lines() == "192.0.2.8\tnewcomer\n");
    });
}

#[test]
fn the_list_of_monitored_hosts_follows_states_locks_and_names() {
    let Some(watchman) = long_tool("the_list_of_monitored_hosts_follows_states_locks_and_names", "watchman") else {
        return;
    };
    twice(|stage| {
        let [one, other] = ["one", "other"].map(|name| stage.running(name));
        let list = stage.daemon.scratch().join("monitored");
        let run = |arguments: &[&str]| {
            let mut command = stage.command(&watchman);
            for (option, name) in
                [("sockname", "socket"), ("logfile", "log"), ("statefile", "state"), ("pidfile", "pid")]
            {
                command.arg(format!("--{option}={}", stage.directory("watchman").join(name).display()));
            }
            command.args(arguments);
            command
        };
        let _server = stage.background(&mut run(&["--foreground"]), "watchman");
        let root = stage.daemon.path("instances");
        let watch = || run(&["--no-spawn", "watch", root.to_str().expect("UTF-8")]).output().expect("watchman runs");
        wait_until("the server answers", || watch().status.success());
        let script = examples().join("monitored-hosts");
        let edits = [
            ("/usr/local/bin/monitored-hosts", script.to_str().expect("UTF-8")),
            ("/etc/monitored-hosts", list.to_str().expect("UTF-8")),
            ("/vm", &stage.root()),
        ];
        let trigger = fs::File::open(stage.edited("watchman-trigger.json", &edits)).expect("an edited trigger");
        let status = run(&["--no-spawn", "-j"]).stdin(trigger).status();
        assert!(status.expect("watchman runs").success());
        let listed = |wanted: &str| {
            wait_until(&format!("the list is {wanted:?}"), || {
                fs::read_to_string(&list).is_ok_and(|list| list == wanted)
            });
        };
        listed("one\nother\n");
        stage.set(one, "locked", "1");
        listed("other\n");
        stage.host_does("stop", other);
        listed("");
        stage.set(one, "locked", "0");
        listed("one\n");
        stage.running("newcomer");
        listed("newcomer\none\n");
    });
}

#[test]
fn a_web_hook_hears_of_every_state_once() {
    let Some(node) = long_tool("a_web_hook_hears_of_every_state_once", "node") else { return };
    let Some(modules) = long_tool("a_web_hook_hears_of_every_state_once", "node_modules/chokidar") else { return };
    twice(|stage| {
        let id = stage.running("web");
        // Node looks for modules beside the script.
        let home = stage.directory("hook");
        let _ = std::os::unix::fs::symlink(modules.parent().expect("a directory"), home.join("node_modules"));
        fs::copy(examples().join("state-webhook.mjs"), home.join("state-webhook.mjs")).expect("copied");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}/hook", listener.local_addr().expect("an address"));
        let heard = hook(listener);
        let mut command = stage.command(&node);
        let mut hook = stage.background(command.arg(home.join("state-webhook.mjs")).arg(url), "hook");
        hook.says("ready");
        let next = || {
            let said: Value = heard.recv_timeout(DEADLINE).unwrap_or_else(|_| panic!("no news: {}", hook.said()));
            [&said["name"], &said["from"], &said["to"]].map(|word| word.as_str().unwrap_or_default().to_owned())
        };
        stage.host_does("pause", id);
        assert_eq!(next(), ["web", "active", "paused"]);
        stage.set(id, "state", "active");
        assert_eq!(next(), ["web", "paused", "active"]);
        stage.set(id, "description", "is no state");
        let newcomer = stage.domain("newcomer");
        wait_until("it is seen before it starts, or after", || stage.read(newcomer, "state") == "stopped");
        stage.host_does("crash", id);
        assert_eq!(next(), ["web", "active", "error"]);
        assert!(heard.try_recv().is_err(), "each once");
    });
}

/// The other side of a web hook: what was posted.
fn hook(listener: TcpListener) -> mpsc::Receiver<Value> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            let mut reader = BufReader::new(stream);
            let mut length = 0;
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line).unwrap_or(0) == 0 || line.trim().is_empty() {
                    break;
                }
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap_or(0);
                }
            }
            let mut body = vec![0; length];
            if reader.read_exact(&mut body).is_err() {
                continue;
            }
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
            if reader.get_mut().write_all(answer).is_err()
                || sender.send(serde_json::from_slice(&body).unwrap_or_default()).is_err()
            {
                return;
            }
        }
    });
    receiver
}
