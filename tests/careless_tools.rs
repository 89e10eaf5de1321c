//! What careless commands on the whole mount, as root, do not do.

mod support;

use std::fs;
use std::process::{Command, Stdio};

use serde_json::json;
use support::Daemon;
use uuid::Uuid;

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.unwrap_or_else(|error| panic!("{program}: {error}"));
}

struct Precious {
    daemon: Daemon,
    running: Uuid,
    stopped: Uuid,
    image: Uuid,
    written_draft: Uuid,
    image_draft: Uuid,
}

impl Precious {
    fn new() -> Precious {
        let daemon = Daemon::start(&[]);
        let running = daemon.domain("running");
        daemon.domain_does(running, "start", "active");
        let stopped = daemon.domain("stopped");
        let image = daemon.image();
        let written_draft = Uuid::new_v4();
        fs::create_dir(daemon.path(format!("instances/{written_draft}"))).expect("a draft");
        daemon.set(format!("instances/{written_draft}/name"), "half-written");
        let image_draft = Uuid::new_v4();
        fs::create_dir(daemon.path(format!("images/{image_draft}"))).expect("a draft");
        fs::write(daemon.path(format!("images/{image_draft}/data")), b"precious bytes").expect("data");
        Precious { daemon, running, stopped, image, written_draft, image_draft }
    }

    fn assert_unharmed(&self, tool: &str) {
        let daemon = &self.daemon;
        let state = |class: &str, id: Uuid| daemon.read(format!("{class}/{id}/state"));
        assert_eq!(state("instances", self.running), "active", "{tool}");
        assert_eq!(state("instances", self.stopped), "stopped", "{tool}");
        assert_eq!(state("images", self.image), "active", "{tool}");
        assert_eq!(state("instances", self.written_draft), "draft", "{tool}");
        assert_eq!(daemon.read(format!("instances/{}/name", self.written_draft)), "half-written", "{tool}");
        let bytes = fs::read(daemon.path(format!("images/{}/data", self.image_draft))).expect("the draft's data");
        assert_eq!(bytes, b"precious bytes", "{tool}");
        let answer = daemon.host_does(json!({"do": "calls"}));
        for call in ["power_off", "shutdown", "undefine", "define", "save", "pause", "reboot"] {
            assert_eq!(answer["calls"][call].as_u64().unwrap_or(0), 0, "{tool} reached the hypervisor's {call}");
        }
    }
}

#[test]
fn no_careless_tool_stops_changes_or_removes_anything() {
    let precious = Precious::new();
    let root = precious.daemon.root();
    let root = root.to_str().expect("UTF-8");
    let everything = format!("{root}/");
    let empty = tempfile::tempdir().expect("a directory");
    let empty = format!("{}/", empty.path().display());
    run("rm", &["-rf", "--one-file-system", root]);
    precious.assert_unharmed("rm -rf");
    run("find", &[root, "-mindepth", "1", "-delete"]);
    precious.assert_unharmed("find -delete");
    run("python3", &["-c", &format!("import shutil; shutil.rmtree({root:?}, ignore_errors=True)")]);
    precious.assert_unharmed("shutil.rmtree");
    run(
        "perl",
        &["-MFile::Path=remove_tree", "-e", &format!("remove_tree('{root}', {{keep_root => 1, error => \\my $e}})")],
    );
    precious.assert_unharmed("remove_tree");
    run("rsync", &["-a", "--delete", "--ignore-errors", &empty, &everything]);
    precious.assert_unharmed("rsync --delete");
    run("chmod", &["-R", "0", root]);
    run("chown", &["-R", "65534:65534", root]);
    precious.assert_unharmed("chmod and chown");
    let id = precious.running;
    // mv copies what it can read before it fails to remove the original.
    let elsewhere = tempfile::tempdir().expect("a directory");
    run("mv", &[&format!("{root}/instances/{id}"), elsewhere.path().to_str().expect("UTF-8")]);
    precious.assert_unharmed("mv to another file system");
}

#[test]
fn an_empty_draft_is_discarded_by_rmdir_and_a_written_one_is_not() {
    let precious = Precious::new();
    let daemon = &precious.daemon;
    let id = Uuid::new_v4();
    fs::create_dir(daemon.path(format!("instances/{id}"))).expect("a draft");
    fs::remove_dir(daemon.path(format!("instances/{id}"))).expect("an empty draft goes");
    assert!(!daemon.path(format!("instances/{id}")).exists());
    let refused = fs::remove_dir(daemon.path(format!("instances/{}", precious.written_draft)));
    assert_eq!(support::errno(refused), libc::ENOTEMPTY);
    let refused = fs::remove_dir(daemon.path(format!("images/{}", precious.image_draft)));
    assert_eq!(support::errno(refused), libc::ENOTEMPTY);
}
