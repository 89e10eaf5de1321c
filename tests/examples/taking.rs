//! A disk that is there already becomes a volume, and is one no more.

use std::fs;
use std::process::{Command, Output};

use crate::stage::{Stage, examples};
use crate::support::{Daemon, wait_until};

fn manage(stage: &Stage, arguments: &[&str]) -> Output {
    let program = std::path::Path::new(env!("CARGO_BIN_EXE_instancefs")).parent().expect("a directory");
    let path = format!("{}:{}", program.display(), std::env::var("PATH").expect("a path"));
    let mut command = Command::new("bash");
    command.arg(examples().join("manage")).args(arguments);
    command.env("INSTANCEFS", stage.daemon.root()).env("PATH", path).output().expect("bash runs")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.clone(), output.stderr.clone()].concat()).into_owned()
}

#[test]
fn a_disk_is_taken_over_where_it_lies_and_forgotten_and_taken_over_again_by_its_old_name() {
    for settle in ["3s", "0s"] {
        let place = tempfile::tempdir().expect("a directory");
        let [configuration, disks] = ["instancefs.toml", "disks"].map(|name| place.path().join(name));
        fs::write(&configuration, format!("[backends.directory]\nmanage = [{disks:?}]\n")).expect("the configuration");
        fs::create_dir(&disks).expect("a directory");
        let file = disks.join("int32bit-test.img");
        fs::write(&file, vec![7; 1 << 20]).expect("a disk");
        let options = ["--settle", settle, "--config", configuration.to_str().expect("text")];
        let stage = Stage { daemon: Daemon::start(&options) };
        let disk = file.to_str().expect("text");

        for _ in 0..2 {
            let output = manage(&stage, &[disk, "int32bit-test-manage"]);
            assert!(output.status.success(), "{}", said(&output));
            assert!(said(&output).contains("1048576 bytes of raw"), "{}", said(&output));
            let link = stage.daemon.path("by-name/volumes/int32bit-test-manage");
            wait_until("its name stands", || link.is_symlink());
            let again = manage(&stage, &[disk, "twice"]);
            assert!(!again.status.success(), "it is a volume already");

            assert!(manage(&stage, &["--forget", "int32bit-test-manage"]).status.success());
            wait_until("it is forgotten", || !link.is_symlink());
            // Unlike an LV that Cinder managed, it bears its old name and its old bytes.
            assert_eq!(fs::read(&file).expect("the disk"), vec![7; 1 << 20]);
        }
        let outside = place.path().join("outside.img");
        fs::write(&outside, [0; 512]).expect("a disk");
        let refused = manage(&stage, &[outside.to_str().expect("text"), "outside"]);
        assert!(!refused.status.success() && said(&refused).contains("manage"), "{}", said(&refused));
    }
}
