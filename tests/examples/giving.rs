//! A volume goes from one user of the host to another.

use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use uuid::Uuid;

use crate::stage::{Stage, examples};
use crate::support::{Daemon, User, errno, gid, wait_until};

const GIVER: u32 = 2001;
const TAKER: u32 = 2002;

/// Runs the example as somebody, who types this, and returns whether it succeeded and what it said.
fn transfer(stage: &Stage, uid: u32, arguments: &[&str], typed: &str) -> (bool, String) {
    let mut command = Command::new("bash");
    command.arg(examples().join("transfer")).args(arguments).env("INSTANCEFS", stage.daemon.root()).env("LC_ALL", "C");
    command.uid(uid).gid(gid("users")).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("bash runs");
    // It may end without having read.
    let _ended = child.stdin.take().expect("a pipe").write_all(typed.as_bytes());
    let output = child.wait_with_output().expect("it ends");
    (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).trim().to_owned())
}

fn opens(stage: &Stage, uid: u32, volume: Uuid) -> i32 {
    let name = stage.daemon.path(format!("volumes/{volume}/name"));
    User { uid, gid: gid("users"), groups: vec![] }.act(|| errno(fs::File::open(name)))
}

#[test]
fn a_volume_is_offered_and_taken_and_closed_to_one_and_then_to_the_other() {
    for settle in ["3s", "0s"] {
        let stage = Stage { daemon: Daemon::start(&["-o", "access_group=users", "--settle", settle]) };
        let id = Uuid::new_v4();
        let file = |name: &str| format!("volumes/{id}/{name}");
        fs::create_dir(stage.daemon.path(format!("volumes/{id}"))).expect("a draft");
        for (name, value) in
            [("name", "int32bit-test-transfer"), ("size_bytes", "1M"), ("owner", "2001"), ("state", "available")]
        {
            stage.daemon.set(file(name), value);
        }
        wait_until("it is made", || {
            stage.daemon.read(file("state")) == "available" && stage.daemon.read(file("task")).is_empty()
        });
        wait_until("its name stands", || stage.daemon.path("by-name/volumes/int32bit-test-transfer").is_symlink());
        assert_eq!((opens(&stage, GIVER, id), opens(&stage, TAKER, id)), (0, libc::EACCES));
        let (ok, said) = transfer(&stage, GIVER, &["offer", "int32bit-test-transfer", "test-transfer"], "");
        assert!(ok, "{said}");
        let (offer, key) = said.split_once(' ').expect("an offer and its key");
        assert_eq!(stage.daemon.read(file("state")), "awaiting_transfer");
        let (ok, said) = transfer(&stage, TAKER, &["accept", offer, "c259b651426121fd"], "");
        assert!(!ok && said.contains("Key was rejected"), "{said}");
        let (ok, said) = transfer(&stage, TAKER, &["accept", offer], &format!("{key}\n"));
        assert!(ok, "{said}");
        assert_eq!((opens(&stage, GIVER, id), opens(&stage, TAKER, id)), (libc::EACCES, 0));
        assert_eq!(stage.daemon.read(file("state")), "available");
        assert!(!transfer(&stage, GIVER, &["cancel", offer], "").0, "it is taken");
        // And back again, to nobody else, after he has thought about it.
        let back = |name: &str| {
            let (ok, said) = transfer(&stage, TAKER, &["offer", &id.to_string(), name, &GIVER.to_string()], "");
            assert!(ok, "{said}");
            said
        };
        let first = back("back");
        assert!(transfer(&stage, TAKER, &["cancel", &first], "").0);
        assert!(!transfer(&stage, GIVER, &["accept", &first, "1"], "").0, "it was taken back");
        let second = back("back again");
        assert!(transfer(&stage, GIVER, &["accept", &second, "1"], "").0);
        assert_eq!((opens(&stage, GIVER, id), opens(&stage, TAKER, id)), (0, libc::EACCES));
        let (ok, said) = transfer(&stage, GIVER, &[], "");
        assert!(!ok && said.contains("usage: transfer offer"), "{said}");
    }
}
