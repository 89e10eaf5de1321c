//! The commands of docs/recovery.md, run on a state directory whose daemon was killed in the middle of its work.

mod support;

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use serde_json::json;
use support::{Daemon, wait_until};
use uuid::Uuid;

const MARK: &str = "<!-- tested -->\n```sh\n";

/// The blocks that the document says are tested, in its order.
fn blocks() -> Vec<String> {
    let document = include_str!("../docs/recovery.md");
    let blocks = document.split(MARK).skip(1);
    blocks.map(|rest| rest.split("```").next().expect("the end of a block").to_owned()).collect()
}

struct Wreck {
    daemon: Daemon,
    backup: std::path::PathBuf,
    kept: Uuid,
    binned: Uuid,
    shelved: Uuid,
    volume: Uuid,
}

fn instance(daemon: &Daemon, image: Uuid, name: &str) -> Uuid {
    let id = Uuid::new_v4();
    fs::create_dir(daemon.path(format!("instances/{id}"))).expect("a draft");
    daemon.set(format!("instances/{id}/name"), name);
    daemon.set(format!("instances/{id}/image"), &image.to_string());
    daemon.set(format!("instances/{id}/state"), "stopped");
    daemon.wait_state(id, "stopped");
    wait_until("its definition is known", || daemon.path(format!("instances/{id}/domain.xml")).exists());
    id
}

fn wreck() -> Wreck {
    let mut daemon = Daemon::start(&["--settle", "1s"]);
    let image = daemon.image();
    let [kept, binned, shelved] = ["kept", "binned", "shelved"].map(|name| instance(&daemon, image, name));
    daemon.set(format!("instances/{kept}/disable_terminate"), "1");
    let disk = daemon.state_directory().join(format!("disks/{kept}/root.qcow2"));
    wait_until("its disk has a second name", || disk.metadata().expect("a disk").nlink() == 2);
    daemon.write(format!("instances/{kept}/state"), "soft_deleted").expect_err("it is protected");
    daemon.set(format!("instances/{binned}/state"), "soft_deleted");
    wait_until("the bin is done", || daemon.path(format!("trash/{binned}")).exists());
    daemon.set(format!("instances/{shelved}/state"), "shelved_offloaded");
    daemon.wait_state(shelved, "shelved_offloaded");
    let volume = Uuid::new_v4();
    fs::create_dir(daemon.path(format!("volumes/{volume}"))).expect("a draft");
    for (file, value) in [("name", "data"), ("size_bytes", "1M"), ("state", "available")] {
        daemon.set(format!("volumes/{volume}/{file}"), value);
    }
    let is_made = || daemon.read(format!("volumes/{volume}/state")) == "available";
    wait_until("the volume is made", || is_made() && daemon.read(format!("volumes/{volume}/task")).is_empty());
    fs::create_dir(daemon.path(format!("volumes/{volume}/snapshots/before"))).expect("a snapshot");
    wait_until("it is taken", || daemon.read(format!("volumes/{volume}/task")).is_empty());
    daemon.host_does(json!({ "do": "fault", "call": "start", "mode": "hang" }));
    daemon.set(format!("instances/{kept}/state"), "active");
    daemon.kill();
    let backup = daemon.scratch().join("backup");
    fs::create_dir(&backup).expect("a directory");
    Wreck { daemon, backup, kept, binned, shelved, volume }
}

impl Wreck {
    fn run(&self, block: &str) -> String {
        let script = if block == blocks()[0] { block.to_owned() } else { blocks()[0].clone() + block };
        let mut command = Command::new("bash");
        command.args(["-euo", "pipefail", "-c", &script]);
        command.env("STATE", self.daemon.state_directory()).env("BACKUP", &self.backup);
        command.env("u", self.kept.to_string()).env("shelved", self.shelved.to_string());
        let output = command.output().expect("bash runs");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let complained = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && complained.is_empty(), "{block}\n{said}\n{complained}");
        said
    }

    /// What the block that contains these words has to print.
    fn expectations(&self) -> Vec<(&'static str, Vec<String>)> {
        let state = self.daemon.state_directory().display().to_string();
        let id = self.kept.to_string();
        vec![
            ("store() {", vec![]),
            ("'$.name'", vec!["kept".into(), self.binned.to_string()]),
            ("('pending', 'processing')", vec!["start".into(), id.clone(), "shelve".into(), "root_disk".into()]),
            ("'$.errors.lines'", vec!["state|EPERM|".into()]),
            ("--backing-chain", vec![format!("{state}/disks/{id}/root.qcow2"), "backing file: ".into()]),
            ("definitions/", vec![]),
            ("'$.bin.entry.deleted_by'", vec![format!("{}|", self.binned)]),
            ("sha512sum", vec!["root.qcow2: OK".into()]),
            ("preserve=xattr", vec![]),
            (
                "'$.attachments.entries'",
                vec![
                    format!("{0}|data|qcow2|{state}/volumes/{0}/data|", self.volume),
                    format!("{}|before|{state}/volumes/{}/", self.volume, self.volume),
                ],
            ),
            ("'$.kept'", vec![".instancefs-kept/".into(), format!("{state}/disks/{id}/root.qcow2")]),
            (".backup", vec![]),
            ("delete from record", vec![]),
            ("integrity_check", vec!["ok".into()]),
            ("vacuum", vec![]),
        ]
    }
}

#[test]
fn the_commands_for_the_night_work() {
    let mut wreck = wreck();
    let (blocks, expectations) = (blocks(), wreck.expectations());
    assert_eq!(blocks.len(), expectations.len(), "a block is not tested, or a test has no block");
    let mut used = HashSet::new();
    for block in &blocks {
        let known = |(words, _): &&(&str, Vec<String>)| block.contains(words) && !used.contains(words);
        let (words, expected) = expectations.iter().find(known).unwrap_or_else(|| panic!("nobody knows {block}"));
        used.insert(words);
        let said = wreck.run(block);
        for text in expected {
            assert!(said.contains(text), "{block}\nsays no {text:?}:\n{said}");
        }
    }

    let of = |name: &str| wreck.backup.join(name);
    let disk = format!("disks/{}/root.qcow2", wreck.kept);
    assert!(fs::read_to_string(of(&format!("{}.xml", wreck.kept))).expect("a definition").contains("<domain"));
    assert!(of("root.qcow2").exists() && of("instancefs.db").exists());
    assert_eq!(of(&disk).metadata().expect("a copy").nlink(), 2, "names of one file are one file in the backup");
    assert!(of(&format!("volumes/{}/data", wreck.volume)).exists(), "volumes are in the backup");
    let state = wreck.daemon.state_directory();
    assert!(state.join(format!("disks/{}/root.qcow2", wreck.shelved)).exists());

    // Another host, with the store that was recovered.
    for suffix in ["", "-wal", "-shm"] {
        let _may_be_absent = fs::remove_file(state.join(format!("instancefs.db{suffix}")));
    }
    fs::copy(of("damaged/recovered.db"), state.join("instancefs.db")).expect("put in place");
    fs::remove_dir_all(wreck.daemon.host()).expect("removed");
    fs::create_dir(wreck.daemon.host()).expect("another host");
    wreck.daemon.spawn();
    let daemon = &wreck.daemon;
    let reason = format!("instances/{}/state_reason", wreck.kept);
    wait_until("the interrupted start has failed", || daemon.read(format!("instances/{}/task", wreck.kept)).is_empty());
    daemon.wait_state(wreck.kept, "error");
    assert_eq!(daemon.read(&reason), "undefined_outside");
    daemon.set(format!("instances/{}/state", wreck.kept), "stopped");
    daemon.wait_state(wreck.kept, "stopped");
    assert_eq!(daemon.read(format!("instances/{}/disable_terminate", wreck.kept)), "1");
    assert!(daemon.path(format!("trash/{}", wreck.binned)).exists());
}

#[test]
fn a_host_that_lost_its_store_has_its_machines_and_their_disks_back() {
    let mut wreck = wreck();
    let block = blocks().into_iter().find(|block| block.contains("vacuum")).expect("the block is there");
    let disk = wreck.daemon.state_directory().join(format!("disks/{}/root.qcow2", wreck.kept));
    wreck.run(&block);
    wreck.daemon.spawn();
    let daemon = &wreck.daemon;
    for id in [wreck.kept, wreck.binned, wreck.shelved] {
        daemon.wait_state(id, "stopped");
    }
    daemon.set(format!("instances/{}/state", wreck.kept), "active");
    daemon.wait_state(wreck.kept, "active");
    assert!(disk.exists() && daemon.state_directory().join(format!("volumes/{}/data", wreck.volume)).exists());
}
