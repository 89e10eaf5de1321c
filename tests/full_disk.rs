//! A state directory whose disk is full.

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;
use support::{Daemon, errno, wait_until};
use uuid::Uuid;

struct Disk {
    directory: tempfile::TempDir,
}

impl Disk {
    fn new() -> Disk {
        Disk::of(16)
    }

    fn of(mebibytes: usize) -> Disk {
        let directory = tempfile::tempdir().expect("a directory");
        let options = format!("size={mebibytes}m,mode=0700");
        mount(Some("tmpfs"), directory.path(), Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
            .expect("a small file system");
        Disk { directory }
    }

    fn state(&self) -> String {
        self.directory.path().join("state").display().to_string()
    }

    /// Takes all the room there is.
    fn fill(&self) {
        let mut file = File::create(self.directory.path().join("filler")).expect("a file");
        for size in [64 << 10, 4096, 1] {
            while file.write_all(&vec![0; size]).is_ok() {}
        }
    }

    fn free(&self) {
        fs::remove_file(self.directory.path().join("filler")).expect("removed");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(self.directory.path(), MntFlags::MNT_DETACH);
    }
}

/// Every readable file of an instance, but what the refusals themselves change.
fn content(home: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(home).expect("listed").map(|entry| entry.expect("an entry"));
    entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().expect("UTF-8");
            let is_refusal = matches!(name.as_str(), "last_error" | "errors" | "updated_at");
            let bytes = fs::read(entry.path()).ok()?;
            (!is_refusal).then_some((name, bytes))
        })
        .collect()
}

#[test]
fn writes_answer_that_the_disk_is_full_nothing_is_half_made_and_reads_go_on() {
    let disk = Disk::new();
    let mut daemon = Daemon::start_in(&disk.state(), &[]);
    let id = daemon.domain("kept");
    daemon.domain_does(id, "start", "active");
    daemon.set(format!("instances/{id}/description"), "before");
    let home = daemon.path(format!("instances/{id}"));
    wait_until("the definition is there", || home.join("domain.xml").exists());
    let instances = || fs::read_dir(daemon.path("instances")).expect("listed").count();
    disk.fill();
    // The store may have some pages left from before.
    let end = Instant::now() + Duration::from_secs(20);
    while errno(support::write(&home.join("description"), b"before")) == 0
        && errno(support::write(&home.join("description"), Uuid::new_v4().to_string().as_bytes())) == 0
    {
        assert!(Instant::now() < end, "the disk never gets full");
        disk.fill();
    }
    let before = content(&home);
    for (name, value) in [("description", "after"), ("locked", "1"), ("stop_timeout_seconds", "9"), ("state", "paused")]
    {
        assert_eq!(errno(support::write(&home.join(name), value.as_bytes())), libc::ENOSPC, "{name}");
    }
    assert_eq!(errno(fs::create_dir(daemon.path(format!("instances/{}", Uuid::new_v4())))), libc::ENOSPC);
    assert_eq!(content(&home), before, "nothing is half-made");
    assert_eq!(instances(), 1);
    assert_eq!(daemon.host_does(json!({"do": "calls"}))["calls"]["pause"].as_u64().unwrap_or(0), 0);
    wait_until("health says so", || !daemon.read("health").contains("store ok"));
    println!("health on a full disk:\n{}", daemon.read("health"));

    daemon.domain_does(id, "pause", "paused");
    daemon.domain_does(id, "unpause", "active");

    disk.free();
    daemon.set(format!("instances/{id}/description"), "after");
    wait_until("health recovers", || daemon.read("health").contains("store ok"));
    daemon.set(format!("instances/{id}/locked"), "1");
    assert!(daemon.stop(), "a clean end");
    daemon.spawn();
    assert_eq!(daemon.read(format!("instances/{id}/description")), "after");
    assert_eq!(daemon.read(format!("instances/{id}/locked")), "1");
}

#[test]
fn an_image_that_does_not_fit_says_so_and_its_draft_can_be_written_again() {
    let disk = Disk::new();
    let daemon = Daemon::start_in(&disk.state(), &[]);
    let id = Uuid::new_v4();
    fs::create_dir(daemon.path(format!("images/{id}"))).expect("a draft");
    let data = daemon.path(format!("images/{id}/data"));
    let mut file = File::create(&data).expect("opened");
    assert_eq!(errno(file.write_all(&vec![1; 32 << 20])), libc::ENOSPC);
    assert_eq!(errno(file.write_all(&vec![1; 1 << 20])), libc::ENOSPC, "again");
    file.set_len(0).expect("cut");
    drop(file);
    // What a disk says of the largest file differs from disk to disk.
    let beside = File::create(disk.directory.path().join("beside")).expect("made");
    for length in [1 << 44, 1 << 60, i64::MAX as u64] {
        let draft = fs::OpenOptions::new().write(true).open(&data).expect("opened");
        assert_eq!(errno(draft.set_len(length)), errno(beside.set_len(length)), "{length}");
        assert_eq!(errno(draft.write_at(b"x", length - 1)), errno(beside.write_at(b"x", length - 1)), "{length}");
    }
    fs::write(&data, vec![2; 1 << 20]).expect("a smaller one fits");
    daemon.set(format!("images/{id}/disk_format"), "raw");
    daemon.set(format!("images/{id}/state"), "active");
    wait_until("it is active", || daemon.read(format!("images/{id}/state")) == "active");
    assert!(fs::read(&data).expect("readable") == vec![2; 1 << 20]);
}

#[test]
fn the_write_that_does_not_fit_says_so_itself_and_all_before_it_are_there() {
    const PART: usize = 1 << 20;
    let disk = Disk::of(200);
    let daemon = Daemon::start_in(&disk.state(), &[]);
    let id = Uuid::new_v4();
    fs::create_dir(daemon.path(format!("images/{id}"))).expect("a draft");
    let data = daemon.path(format!("images/{id}/data"));
    let file = File::create(&data).expect("opened");
    let mut written = 0;
    let error = loop {
        match file.write_at(&vec![written as u8; PART], (written * PART) as u64) {
            Ok(PART) => written += 1,
            Ok(_) => {}
            Err(error) => break error,
        }
        assert!(written < 200, "it cannot fit");
    };
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    assert!(written > 150, "{written} MiB of 200");
    assert_eq!(errno(file.sync_all()), 0, "nothing that was acknowledged is lost");
    assert_eq!(nix::unistd::close(file), Ok(()));
    let mut part = vec![0; PART];
    let file = File::open(&data).expect("readable");
    for index in 0..written {
        file.read_exact_at(&mut part, (index * PART) as u64).expect("it is there");
        assert!(part.iter().all(|byte| *byte == index as u8), "part {index}");
    }
}
