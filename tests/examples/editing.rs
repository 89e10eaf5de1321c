//! Tools that copy and edit files.

use std::fs;
use std::path::Path;
use std::process::Command;

use uuid::Uuid;

use crate::stage::{Stage, twice};
use crate::support::wait_until;

/// All that an instance says of itself, but for what changes with each refusal and what follows in the background.
fn all(stage: &Stage, id: Uuid) -> Vec<(String, String)> {
    let entries = fs::read_dir(stage.daemon.path(format!("instances/{id}"))).expect("listed");
    let names = entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"));
    let mut all: Vec<_> = names
        .filter(|name| !matches!(name.as_str(), "last_error" | "errors" | "domain.xml" | "updated_at"))
        .filter_map(|name| Some((fs::read_to_string(stage.daemon.path(stage.file(id, &name))).ok()?, name)))
        .map(|(value, name)| (name, value))
        .collect();
    all.sort();
    all
}

#[test]
fn settings_go_from_a_directory_into_the_tree_and_back_and_only_what_differs() {
    twice(|stage| {
        let [web, db] = ["web", "db"].map(|name| stage.running(name));
        stage.set(web, "description", "web shop");
        let directory = stage.daemon.scratch().join("settings");
        let settings = |word: &str| {
            let mut command = stage.example("settings-rsync");
            command.arg(word).arg(&directory);
            stage.succeeds(&mut command)
        };
        let said = settings("save");
        assert!(said.contains("web/description\n") && said.contains("db/stop_timeout_seconds\n"), "{said}");
        assert!(!said.contains("state"), "{said}");
        assert_eq!(fs::read_to_string(directory.join("web/description")).expect("copied"), "web shop\n");
        let quiet = stage.events().len();
        assert_eq!(settings("apply"), "", "writing back what was read");
        fs::write(directory.join("db/description"), "customers\n").expect("edited");
        fs::create_dir(directory.join("none")).expect("a machine that is not there");
        fs::write(directory.join("none/description"), "nobody\n").expect("edited");
        assert_eq!(stage.events().len(), quiet, "nothing is written that is the same");
        assert_eq!(settings("apply"), "db/description\n");
        assert_eq!(stage.read(db, "description"), "customers");
        stage.set(web, "stop_timeout_seconds", "7");
        assert_eq!(settings("save"), "web/stop_timeout_seconds\n");
        assert_eq!(fs::read_to_string(directory.join("web/stop_timeout_seconds")).expect("copied"), "7\n");
    });
}

#[test]
fn settings_and_states_that_were_copied_away_come_back() {
    twice(|stage| {
        let [web, off] = [stage.running("web"), stage.domain("off")];
        stage.set(web, "description", "web shop");
        let copy = |word: &str| stage.succeeds(stage.example("settings-copy").args([word, "copy"]));
        copy("away");
        let before = [web, off].map(|id| all(stage, id));
        let quiet = stage.events().len();
        assert_eq!(copy("back"), "");
        assert_eq!([web, off].map(|id| all(stage, id)), before, "nothing has changed, so nothing changes");
        assert_eq!(stage.events().len(), quiet, "{:?}", stage.events().last());
        stage.set(web, "state", "stopped");
        stage.daemon.wait_state(web, "stopped");
        stage.set(web, "description", "spoilt");
        stage.set(off, "stop_timeout_seconds", "7");
        assert_eq!(copy("back"), "");
        stage.daemon.wait_state(web, "active");
        assert_eq!(
            (stage.read(web, "description"), stage.read(off, "stop_timeout_seconds")),
            ("web shop".into(), "60".into())
        );
    });
}

#[test]
fn a_copy_of_the_whole_tree_written_back_changes_nothing() {
    twice(|stage| {
        let ids = [stage.running("web"), stage.domain("off"), Uuid::new_v4()];
        fs::create_dir(stage.daemon.path(format!("instances/{}", ids[2]))).expect("a draft");
        stage.daemon.image();
        stage.set(ids[0], "locked", "1");
        stage.set(ids[1], "spec.json", r#"{"metadata": {"ticket": "4711"}, "description": "a text"}"#);
        wait_until("definitions are fetched", || {
            ids[..2].iter().all(|id| stage.daemon.path(stage.file(*id, "domain.xml")).exists())
        });
        let states = || {
            let mut lines: Vec<_> = tree(&stage.daemon.root());
            lines.extend(
                ids.iter().flat_map(|id| all(stage, *id).into_iter().map(|(name, value)| format!("{name}: {value}"))),
            );
            lines.push(stage.daemon.read("summary/images"));
            lines
        };
        let before = states();
        let changed = || states().into_iter().filter(|line| !before.contains(line)).collect::<Vec<_>>();
        let [from, to] = [stage.daemon.root(), stage.daemon.scratch().join("copy")];
        for (away, back) in [
            (&["cp", "-a"][..], &["cp", "-a"][..]),
            (&["cp", "-a"], &["cp", "-a", "--no-preserve=links"]),
            (&["cp", "-r"], &["cp", "-r"]),
            (&["rsync", "-a"], &["rsync", "-a"]),
            (&["rsync", "-a"], &["rsync", "-ac", "--inplace"]),
        ] {
            let copy = |tool: &[&str], from: &Path, to: &Path| {
                let mut command = stage.command(tool[0]);
                command.args(&tool[1..]).arg(format!("{}/.", from.display())).arg(to);
                let output = command.output().expect("it runs");
                String::from_utf8_lossy(&output.stderr).into_owned()
            };
            fs::create_dir(&to).expect("a directory");
            // Consoles are no data: of a running guest without one, of one that is off, of a draft.
            let said = copy(away, &from, &to);
            let odd = said.lines().filter(|line| !line.contains("/console") && !line.contains("some files"));
            assert_eq!(odd.collect::<Vec<_>>(), [] as [&str; 0], "{away:?}");
            let said = copy(back, &to, &from);
            assert_eq!(changed(), [] as [&str; 0], "{back:?}");
            // Of the files that can be written, each takes back what it read; plain cp -a wants to unlink them.
            if back[..] != ["cp", "-a"] {
                let refused = |file: &&&str| {
                    said.lines().any(|line| !line.contains("/tasks/") && line.contains(&format!("/{file}'")))
                };
                let written = [
                    "state",
                    "image",
                    "flavor",
                    "vcpus",
                    "root_disk_bytes",
                    "user_data",
                    "metadata/ticket",
                    "spec.json",
                ];
                assert_eq!(written.iter().filter(refused).collect::<Vec<_>>(), [] as [&&str; 0], "{back:?}: {said}");
            }
            fs::remove_dir_all(&to).expect("removed");
        }
    });
}

/// Every name in the tree and where every link leads, without the tasks and the events that grow with refusals.
fn tree(root: &Path) -> Vec<String> {
    let mut find = Command::new("find");
    find.current_dir(root).args([".", "-path", "./tasks/*", "-prune", "-o", "-printf", "%p %y %l %m %u %g\\n"]);
    let output = find.output().expect("find runs");
    String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
}

#[test]
fn settings_are_edited_in_vim() {
    twice(|stage| {
        let id = stage.domain("web");
        let edit = |name: &str, change: &str| {
            let mut command = stage.example("edit-settings");
            command.arg(name).env("EDITOR", format!("vim -es -u NONE -c {change} -c wq"));
            command
        };
        stage.succeeds(&mut edit("web", r#"%s/"vcpus":.1/"vcpus":4/"#));
        wait_until("it has them", || stage.read(id, "vcpus") == "4");
        wait_until("the work is done", || stage.read(id, "task").is_empty());
        let said = stage.fails(&mut edit("web", r#"%s/"vcpus":.4/"vcpus":0/"#));
        assert!(said.contains("web: ") && said.contains("ERANGE"), "{said}");
        assert_eq!(stage.read(id, "vcpus"), "4");
        stage.succeeds(&mut edit("web", r#"%s/"web"/"shop"/"#));
        wait_until("it is renamed", || stage.read(id, "name") == "shop");
        let left = fs::read_dir(stage.daemon.path(format!("instances/{id}"))).expect("listed");
        let left: Vec<_> = left.map(|entry| entry.expect("an entry").file_name()).collect();
        assert!(!left.iter().any(|name| name.to_string_lossy().ends_with(".swp")), "{left:?}");
    });
}

#[test]
fn a_successor_is_named_everywhere_by_sed() {
    twice(|stage| {
        let [web, db, locked, other] = ["web", "db", "locked", "other"].map(|name| stage.domain(name));
        stage.set(web, "description", "web shop (ask ann)");
        stage.set(db, "spec.json", r#"{"metadata": {"contact": "ann, ann@example.org"}}"#);
        stage.set(locked, "description", "ann's");
        stage.set(locked, "locked", "1");
        stage.set(other, "description", "joanna's");
        let mut replace = stage.example("replace-contact");
        let said = stage.fails(replace.args(["ann", "bob"]));
        assert!(said.contains("locked by root"), "{said}");
        assert_eq!(stage.read(web, "description"), "web shop (ask bob)");
        assert_eq!(stage.read(db, "metadata/contact"), "bob, bob@example.org");
        assert_eq!(stage.read(locked, "description"), "ann's");
        assert_eq!(stage.read(other, "description"), "joanna's");
    });
}
