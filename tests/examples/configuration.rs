//! Configuration management: the first run changes what differs, the second nothing.

use std::fs;
use std::process::Command;

use uuid::Uuid;

use crate::stage::{Stage, examples, long_tool, twice};
use crate::support::wait_until;

/// Two machines, of which all of these examples say what must hold.
struct Scene<'a> {
    stage: &'a Stage,
    ids: [Uuid; 2],
}

impl<'a> Scene<'a> {
    fn on(stage: &'a Stage) -> Scene<'a> {
        let ids = [stage.running("db1"), stage.domain("web1")];
        // Not by us, and no obstacle.
        stage.set(ids[1], "description", "what?");
        Scene { stage, ids }
    }

    fn settings(&self) -> [String; 8] {
        let names = ["description", "stop_timeout_seconds", "disable_terminate", "autostart"];
        let all: Vec<_> = self.ids.iter().flat_map(|id| names.map(|name| self.stage.read(*id, name))).collect();
        all.try_into().expect("eight")
    }

    /// The tool is run thrice: it changes what differs, then nothing, then what somebody else has changed.
    fn converges(&self, run: impl Fn() -> String, changed: impl Fn(&str) -> bool) {
        let wanted =
            ["customer database (ask ann)", "300", "1", "1", "web shop (ask bob)", "60", "1", "1"].map(str::to_owned);
        let said = run();
        assert!(changed(&said), "the first run changes something: {said}");
        wait_until("all is as it says", || self.settings() == wanted);
        self.idle();
        let quiet = self.stage.events();
        let said = run();
        assert!(!changed(&said), "the second run changes nothing: {said}");
        assert_eq!(self.stage.events(), quiet, "nor does it try");
        self.stage.host_does("start", self.ids[1]);
        self.stage.daemon.wait_state(self.ids[1], "active");
        self.stage.set(self.ids[0], "disable_terminate", "0");
        let said = run();
        assert!(changed(&said), "the third run has something to do: {said}");
        assert_eq!(self.settings(), wanted);
        for id in self.ids {
            assert_eq!(self.stage.read(id, "last_error"), "ok");
        }
    }

    fn idle(&self) {
        wait_until("the work is done", || self.ids.iter().all(|id| self.stage.read(*id, "task").is_empty()));
        // A line follows a moment later.
        wait_until("the work is told of", || {
            let ends = self.stage.events().iter().filter(|line| line.contains(r#""from":"processing""#)).count();
            ends == fs::read_dir(format!("{}/tasks", self.stage.root())).unwrap().count()
        });
    }

    /// An example for this tree, as its reader would edit it.
    fn edited(&self, name: &str) -> String {
        self.stage.edited(name, &[("/vm", &self.stage.root())]).to_str().expect("UTF-8").to_owned()
    }
}

#[test]
fn ansible_sets_what_differs() {
    twice(|stage| {
        let scene = Scene::on(stage);
        let play = || {
            let mut command = stage.command("ansible-playbook");
            command
                .env("ANSIBLE_LOCALHOST_WARNING", "false")
                .env("ANSIBLE_NOCOLOR", "1")
                .env("ANSIBLE_PIPELINING", "1");
            command.args(["-i", "localhost,", "-e", &format!("tree={}", stage.root())]);
            stage.succeeds(command.arg(examples().join("ansible/settings.yml")))
        };
        scene.converges(play, |said| !said.contains("changed=0"));
        // The uuid that Ansible's to_uuid makes of the name.
        let drafts = stage.daemon.read("summary/instances").lines().filter(|line| line.contains("\tdraft\t")).count();
        assert_eq!(drafts, 1);
    });
}

#[test]
fn ansible_makes_an_instance_and_runs_it() {
    twice(|stage| {
        let image = stage.daemon.image();
        let inventory = stage.daemon.scratch().join("inventory");
        std::fs::write(&inventory, "[hypervisors]\nlocalhost ansible_connection=local\n").expect("written");
        let file = stage.edited("instance.yml", &[("/vm", &stage.root()), ("become: true", "become: false")]);
        let play = || {
            let mut command = stage.command("ansible-playbook");
            command
                .env("ANSIBLE_NOCOLOR", "1")
                .env("ANSIBLE_PIPELINING", "1")
                .arg("-i")
                .arg(&inventory)
                .args(["-e", &format!("image={image}")]);
            stage.succeeds(command.arg(&file))
        };
        let said = play();
        assert!(!said.contains("changed=0"), "{said}");
        let line = stage.daemon.read("summary/instances");
        assert!(line.contains("\tweb1\tactive\t\t0\t1\t"), "{line}");
        let quiet = stage.events();
        let said = play();
        assert!(said.contains("changed=0"), "{said}");
        assert_eq!(stage.events(), quiet, "nor does it try");
    });
}

#[test]
fn puppet_sets_what_differs() {
    let Some(puppet) = long_tool("puppet_sets_what_differs", "puppet") else { return };
    twice(|stage| {
        let scene = Scene::on(stage);
        let manifest = scene.edited("settings.pp");
        let apply = || stage.succeeds(own_directories(stage.command(&puppet).args(["apply", &manifest]), stage));
        scene.converges(apply, |said| said.contains("content changed"));
    });
}

/// Puppet's own files, away from the machine's.
fn own_directories<'a>(command: &'a mut Command, stage: &Stage) -> &'a mut Command {
    for name in ["confdir", "vardir", "codedir", "logdir", "rundir"] {
        command.arg(format!("--{name}")).arg(stage.directory(&format!("puppet/{name}")));
    }
    command
}

#[test]
fn cfengine_sets_what_differs() {
    let Some(agent) = long_tool("cfengine_sets_what_differs", "cf-agent") else { return };
    twice(|stage| {
        let scene = Scene::on(stage);
        let policy = scene.edited("settings.cf");
        // It looks for its checker in its own directory.
        let bin = stage.directory("cfengine/bin");
        std::os::unix::fs::symlink(agent.with_file_name("cf-promises"), bin.join("cf-promises")).expect("linked");
        let apply = || {
            let mut command = stage.command(&agent);
            command.env("CFENGINE_TEST_OVERRIDE_WORKDIR", stage.directory("cfengine"));
            stage.succeeds(command.args(["--no-lock", "--inform", "--file", &policy]))
        };
        scene.converges(apply, |said| said.contains("Edited file"));
    });
}

#[test]
fn salt_sets_what_differs() {
    let Some(salt) = long_tool("salt_sets_what_differs", "salt/bin/salt-call") else { return };
    twice(|stage| {
        let scene = Scene::on(stage);
        let state = scene.edited("salt/settings.sls");
        let states = stage.directory("states");
        std::fs::copy(state, states.join("settings.sls")).expect("copied");
        let apply = || {
            let mut command = stage.command(&salt);
            for (option, name) in [("config-dir", "salt-etc"), ("cachedir", "salt-cache")] {
                command.arg(format!("--{option}")).arg(stage.directory(name));
            }
            command.arg("--log-file").arg(stage.directory("salt-cache").join("log")).arg("--file-root").arg(&states);
            stage.succeeds(command.args(["--local", "--no-color", "--id", "host", "state.apply", "settings"]))
        };
        scene.converges(apply, |said| said.contains("(changed="));
    });
}
