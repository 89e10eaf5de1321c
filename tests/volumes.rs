//! Volumes with plain tools: made, filled from an image, grown, put into the bin and back, deleted for good.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::{Daemon, errno, wait_until};
use uuid::Uuid;

/// Runs a script in the tree, as an administrator would type it.
fn shell(daemon: &Daemon, script: &str) -> Result<String, String> {
    let output = Command::new("bash").args(["-c", script]).current_dir(daemon.root()).output().expect("bash");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text").trim().to_owned();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

fn draft(daemon: &Daemon) -> Uuid {
    let id = Uuid::new_v4();
    shell(daemon, &format!("mkdir volumes/{id}")).expect("a draft");
    id
}

fn made(daemon: &Daemon, origin: &str, size: &str) -> Uuid {
    let id = draft(daemon);
    if !origin.is_empty() {
        daemon.set(format!("volumes/{id}/created_from"), origin);
    }
    if !size.is_empty() {
        daemon.set(format!("volumes/{id}/size_bytes"), size);
    }
    daemon.set(format!("volumes/{id}/state"), "available");
    wait_until("it is made", || daemon.read(format!("volumes/{id}/state")) == "available");
    id
}

fn file(daemon: &Daemon, volume: Uuid) -> PathBuf {
    daemon.state_directory().join("volumes").join(volume.to_string()).join("data")
}

fn virtual_size(path: &Path) -> u64 {
    let output = Command::new("qemu-img").args(["info", "--output=json"]).arg(path).output().expect("qemu-img");
    let info: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    info["virtual-size"].as_u64().expect("a size")
}

#[test]
fn a_volume_is_made_grown_put_away_brought_back_and_deleted_with_plain_tools() {
    let daemon = Daemon::start(&[]);
    let id = draft(&daemon);
    let result = shell(
        &daemon,
        &format!(
            "set -e; v=volumes/{id}; echo data > $v/name; echo 16M > $v/size_bytes; echo available > $v/state; cat $v/state \
             $v/size_bytes $v/disk_format; echo 32M > $v/size_bytes; cat $v/size_bytes"
        ),
    );
    assert_eq!(result.as_deref(), Ok("available\n16777216\nqcow2\n33554432"));
    assert_eq!(virtual_size(&file(&daemon, id)), 32 << 20);
    let refused = shell(&daemon, &format!("echo 16M > volumes/{id}/size_bytes")).unwrap_err();
    assert!(refused.contains("out of range"), "{refused}");
    shell(&daemon, &format!("mv volumes/{id} trash/{id}")).expect("the bin");
    assert!(file(&daemon, id).exists());
    shell(&daemon, &format!("mv trash/{id} volumes/{id}; cat volumes/{id}/state")).expect("back");
    assert_eq!(errno(daemon.write(format!("volumes/{id}/state"), "deleted")), libc::EPERM);
    shell(&daemon, &format!("mv volumes/{id} trash/{id}; echo deleted > trash/{id}/state")).expect("deleted");
    wait_until("it is gone", || !daemon.path(format!("trash/{id}")).exists());
    assert!(!file(&daemon, id).exists() && !file(&daemon, id).parent().unwrap().exists());
}

#[test]
fn a_volume_of_an_image_is_independent_of_it() {
    let daemon = Daemon::start(&[]);
    let image = daemon.image();
    let id = made(&daemon, &format!("image:{image}"), "");
    let data = daemon.state_directory().join("images").join(image.to_string()).join("data");
    let compared = Command::new("qemu-img").arg("compare").arg(&data).arg(file(&daemon, id)).status().unwrap();
    assert!(compared.success());
    assert_eq!(daemon.read(format!("volumes/{id}/bootable")), "1");
    daemon.set(format!("images/{image}/state"), "soft_deleted");
    daemon.set(format!("trash/{image}/state"), "deleted");
    wait_until("the image is gone", || !data.exists());
    assert!(virtual_size(&file(&daemon, id)) > 0);
    fs::remove_file(file(&daemon, id)).unwrap();
    assert_eq!(errno(daemon.write(format!("volumes/{id}/size_bytes"), "1T")), libc::ENOENT);
    assert_eq!(daemon.read(format!("volumes/{id}/state")), "error");
}
