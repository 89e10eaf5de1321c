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
    shell(&daemon, &format!("mv images/{image} trash/{image}; echo deleted > trash/{image}/state")).expect("deleted");
    wait_until("the image is gone", || !data.exists());
    assert!(virtual_size(&file(&daemon, id)) > 0);
    fs::remove_file(file(&daemon, id)).unwrap();
    assert_eq!(errno(daemon.write(format!("volumes/{id}/size_bytes"), "1T")), libc::ENOENT);
    assert_eq!(daemon.read(format!("volumes/{id}/state")), "error");
}

#[test]
fn snapshots_are_directories_that_mkdir_makes_and_volumes_are_made_of() {
    let daemon = Daemon::start(&[]);
    let id = made(&daemon, "", "16M");
    shell(&daemon, &format!("mkdir volumes/{id}/snapshots/monday")).expect("taken");
    let monday = format!("volumes/{id}/snapshots/monday");
    wait_until("it is complete", || daemon.read(format!("{monday}/state")) == "available");
    assert_eq!(daemon.read(format!("{monday}/size_bytes")), "16777216");
    let refused = shell(&daemon, &format!("mkdir {monday}")).unwrap_err();
    assert!(refused.contains("exists"), "{refused}");
    let copy = made(&daemon, &format!("snapshot:{id}/monday"), "32M");
    assert_eq!(virtual_size(&file(&daemon, copy)), 32 << 20);
    assert_eq!(fs::read_dir(file(&daemon, id).parent().unwrap()).unwrap().count(), 2);
    daemon.set(format!("{monday}/state"), "deleted");
    wait_until("it is gone", || fs::read_dir(file(&daemon, id).parent().unwrap()).unwrap().count() == 1);
}

#[test]
fn backends_of_the_configuration_keep_volumes_and_take_over_what_lies_in_their_directories() {
    let place = tempfile::tempdir().expect("a directory");
    let [configuration, fast, disks] = ["configuration", "fast", "disks"].map(|name| place.path().join(name));
    fs::create_dir(&disks).unwrap();
    let text =
        format!("[backends.directory]\nmanage = [{disks:?}]\n[backends.fast]\ntype = \"directory\"\npath = {fast:?}\n");
    fs::write(&configuration, text).unwrap();
    let mut daemon = Daemon::start(&["--config", configuration.to_str().unwrap()]);
    wait_until("they are asked", || {
        let free = |name: &str| fs::read_to_string(daemon.path(format!("backends/{name}/free_bytes")));
        ["directory", "fast"].iter().all(|name| free(name).is_ok_and(|free| free.trim().parse::<u64>().is_ok()))
    });
    assert!(daemon.read("health").contains("fast ok"));
    let id = draft(&daemon);
    daemon.set(format!("volumes/{id}/backend"), "fast");
    daemon.set(format!("volumes/{id}/size_bytes"), "16M");
    daemon.set(format!("volumes/{id}/state"), "available");
    wait_until("it is made", || fast.join(id.to_string()).join("data").exists());

    let disk = disks.join("mine");
    fs::write(&disk, vec![7; 1 << 20]).unwrap();
    let mine = made(&daemon, &format!("existing:directory:{}", disk.display()), "");
    assert_eq!(daemon.read(format!("volumes/{mine}/size_bytes")), "1048576");
    shell(&daemon, &format!("mv volumes/{mine} trash/{mine}; echo deleted > trash/{mine}/state")).expect("deleted");
    wait_until("it is forgotten", || !daemon.path(format!("trash/{mine}")).exists());
    assert_eq!(fs::read(&disk).unwrap(), vec![7; 1 << 20]);

    daemon.stop();
    fs::write(&configuration, "").unwrap();
    daemon.spawn();
    assert!(!daemon.path("backends/fast").exists() && daemon.path("backends/directory").exists());
    assert_eq!(errno(daemon.write(format!("volumes/{id}/size_bytes"), "32M")), libc::ENOENT);
    assert!(daemon.read(format!("volumes/{id}/last_error")).contains("fast"));
    assert_eq!(virtual_size(&fast.join(id.to_string()).join("data")), 16 << 20);
}
