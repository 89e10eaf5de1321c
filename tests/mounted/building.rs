//! Instances that are built from images.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::json;
use uuid::Uuid;

use crate::images::{draft, run, text};
use crate::support::{Daemon, User, errno, gid, wait_until, write};

fn instance(daemon: &Daemon) -> Uuid {
    let id = Uuid::new_v4();
    fs::create_dir(daemon.path(format!("instances/{id}"))).expect("a draft");
    id
}

#[test]
fn an_instance_is_built_from_an_image_with_sensible_defaults() {
    let daemon = Daemon::start(&[]);
    let image = daemon.image();
    let id = instance(&daemon);
    let file = |name: &str| format!("instances/{id}/{name}");
    assert_eq!(daemon.read(file("name")), id.to_string());
    assert_eq!(daemon.read(file("vcpus")), "1");
    assert_eq!(daemon.read(file("memory_bytes")), (512 << 20).to_string());
    assert_eq!(errno(daemon.write(file("state"), "active")), libc::EINVAL, "no image");
    assert!(daemon.read(file("last_error")).contains("write an image first"));
    daemon.set(file("image"), &format!("../../images/{image}"));
    assert_eq!(daemon.read(file("image")), image.to_string());
    daemon.set(file("root_disk_bytes"), "4M");
    assert_eq!(errno(daemon.write(file("state"), "active")), libc::ERANGE, "smaller than the image");
    assert!(daemon.read(file("last_error")).contains("the image's size"));
    assert_eq!(daemon.read(file("state")), "draft");
    daemon.set(file("root_disk_bytes"), "16M");
    daemon.set(file("name"), "a<&\"'b");
    daemon.set(file("description"), "]]> <b>&amp;");
    daemon.set(file("vcpus"), "3");
    daemon.set(file("memory_bytes"), "64M");
    daemon.set(file("state"), "stopped");
    assert_eq!(daemon.read(file("state")), "stopped");
    wait_until("the definition is there", || daemon.path(file("domain.xml")).exists());
    let xml = daemon.read(file("domain.xml"));
    let document = roxmltree::Document::parse(&xml).expect("well-formed");
    let element = |name: &str| {
        let node =
            document.descendants().find(|node| node.has_tag_name(name)).unwrap_or_else(|| panic!("{name}: {xml}"));
        node.text().unwrap_or_default().to_owned()
    };
    assert_eq!(element("name"), "a<&\"'b");
    assert_eq!(element("description"), "]]> <b>&amp;");
    assert_eq!(element("uuid"), id.to_string());
    assert_eq!(element("vcpu"), "3");
    let memory = document.descendants().find(|node| node.has_tag_name("memory")).expect("memory");
    assert_eq!((memory.attribute("unit"), memory.text()), (Some("KiB"), Some("65536")));
    let disk = document.descendants().find(|node| node.has_tag_name("source")).expect("a disk");
    let disk = PathBuf::from(disk.attribute("file").expect("a file"));
    let information = run("qemu-img", &["info", "--output=json", text(&disk)]);
    let information: serde_json::Value = serde_json::from_str(&information).expect("JSON");
    assert_eq!(information["virtual-size"], json!(16 << 20));
    assert_eq!(information["backing-filename"], json!(daemon.state_directory().join(format!("images/{image}/data"))));
    let attribute = Command::new("python3")
        .args(["-c", "import os, sys; print(os.getxattr(sys.argv[1], sys.argv[2]).decode())"])
        .args([text(&disk), "user.instancefs.operation"])
        .output()
        .expect("python runs");
    let provenance = String::from_utf8_lossy(&attribute.stdout).trim().to_owned();
    let task = fs::read_link(daemon.path(file("last_task"))).expect("a task");
    assert_eq!(Some(provenance.as_str()), task.file_name().and_then(|name| name.to_str()), "the disk knows its maker");
    let calls = daemon.host_does(json!({"do": "calls"}));
    assert_eq!(calls["calls"]["start"].as_u64().unwrap_or(0), 0, "stopped defines only");
    daemon.set(file("state"), "active");
    assert_eq!(daemon.read(file("state")), "active");
}

#[test]
fn a_start_that_fails_leaves_the_draft_with_the_reason_and_removes_its_disk_only() {
    let daemon = Daemon::start(&[]);
    let image = daemon.image();
    let (kept, failing) = (instance(&daemon), instance(&daemon));
    for id in [kept, failing] {
        daemon.set(format!("instances/{id}/image"), &image.to_string());
    }
    daemon.set(format!("instances/{kept}/state"), "active");
    daemon.host_does(json!({"do": "fault", "call": "start", "mode": "fail", "message": "no KVM", "times": 1}));
    assert_ne!(errno(daemon.write(format!("instances/{failing}/state"), "active")), 0);
    assert_eq!(daemon.read(format!("instances/{failing}/state")), "draft");
    let last = daemon.read(format!("instances/{failing}/last_error"));
    assert!(last.contains("no KVM"), "{last}");
    let disks = || {
        let disks = fs::read_dir(daemon.state_directory().join("disks")).expect("disks");
        let mut disks: Vec<_> =
            disks.map(|entry| entry.expect("an entry").file_name().into_string().expect("text")).collect();
        disks.sort();
        disks
    };
    assert_eq!(disks(), [kept.to_string()], "its own disk went, and no other");
    let domains = daemon.host_does(json!({"do": "list"})).to_string();
    assert!(!domains.contains(&failing.to_string()), "{domains}");
    daemon.set(format!("instances/{failing}/state"), "active");
    assert_eq!(daemon.read(format!("instances/{failing}/state")), "active");
    assert_eq!(disks().len(), 2);
}

#[test]
fn somebody_elses_image_cannot_be_named_and_a_draft_image_cannot_be_used() {
    let daemon = Daemon::start(&["-o", "access_group=users"]);
    let image = daemon.image();
    daemon.set(format!("images/{image}/name"), "secret");
    let user = User { uid: 2001, gid: 2001, groups: vec![gid("users")] };
    user.act(|| {
        let id = instance(&daemon);
        let path = daemon.path(format!("instances/{id}/image"));
        for name in
            [image.to_string(), "secret".to_owned(), format!("images/{image}"), "by-name/images/secret".to_owned()]
        {
            assert_eq!(errno(write(&path, name.as_bytes())), libc::EACCES, "{name}");
        }
        assert_eq!(fs::read_to_string(&path).expect("readable"), "\n");
        let own = draft(&daemon);
        write(&path, own.to_string().as_bytes()).expect("his own, which can become active before the instance does");
        let state = daemon.path(format!("instances/{id}/state"));
        assert_eq!(errno(write(&state, b"active\n")), libc::EINVAL);
        let last = fs::read_to_string(daemon.path(format!("instances/{id}/last_error"))).expect("readable");
        assert!(last.contains("image"), "{last}");
    });
}
