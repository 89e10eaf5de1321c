//! The corpus through the mounted tree: each image is written as a draft, and committed.

use std::fs;
use std::path::{Path, PathBuf};

use instancefs::image::Format;
use uuid::Uuid;

use super::corpus::{controls, corpus};
use super::support::{Daemon, errno, wait_until};
use super::witness::Witness;

const SECRET: &[u8] = b"the canary's secret, which nobody may see";

/// The program that the daemon runs: it gives its children this search path.
fn qemu_img() -> PathBuf {
    let places = ["/usr/local/bin", "/usr/bin", "/bin"];
    let found = places.iter().map(|place| Path::new(place).join("qemu-img")).find(|path| path.exists());
    fs::canonicalize(found.expect("qemu-img is installed")).expect("a path")
}

/// Writes a draft and tries to make it active.
fn commit(daemon: &Daemon, witness: &Witness, bytes: &[u8], claim: Option<Format>) -> (Uuid, i32) {
    let id = Uuid::new_v4();
    fs::create_dir(daemon.path(format!("images/{id}"))).expect("a draft");
    fs::write(daemon.path(format!("images/{id}/data")), bytes).expect("written");
    if let Some(format) = claim {
        daemon.set(format!("images/{id}/disk_format"), format.word());
    }
    let file = draft_file(daemon, id);
    if file.exists() {
        witness.watch(&file);
    }
    (id, errno(daemon.write(format!("images/{id}/state"), "active")))
}

fn draft_file(daemon: &Daemon, id: Uuid) -> PathBuf {
    daemon.state_directory().join(format!("images/{id}/data.part"))
}

/// All files below a directory.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).expect("a directory").map(|entry| entry.expect("an entry").path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

fn holds_secret(bytes: &[u8]) -> bool {
    bytes.windows(SECRET.len()).any(|window| window == SECRET)
}

#[test]
fn no_hostile_image_becomes_active_or_makes_anybody_read_what_it_names() {
    let daemon = Daemon::start(&[]);
    let canary = daemon.scratch().join("canary");
    fs::write(&canary, SECRET.repeat(100)).expect("written");
    let witness = Witness::new(&qemu_img(), daemon.pid());
    witness.watch(&canary);
    for (name, bytes, claim, format) in controls() {
        let before = witness.runs();
        let (id, refused) = commit(&daemon, &witness, &bytes, claim);
        assert_eq!(refused, 0, "{name}: {}", daemon.read(format!("images/{id}/last_error")));
        assert_eq!(daemon.read(format!("images/{id}/state")), "active", "{name}");
        assert_eq!(daemon.read(format!("images/{id}/disk_format")), format.word(), "{name}");
        assert!(witness.runs() > before, "{name}: qemu-img was asked, and the witness has seen it");
    }
    let runs = witness.runs();
    let corpus = corpus(&canary);
    let (mut accepted, mut disclosed) = (0, 0);
    for case in &corpus {
        let (id, refused) = commit(&daemon, &witness, &case.bytes, case.claims[0]);
        let state = daemon.read(format!("images/{id}/state"));
        if refused == 0 || state != "draft" {
            println!("accepted: {}", case.name);
            accepted += 1;
        }
        assert_eq!(refused, libc::EINVAL, "{}", case.name);
        let last = daemon.read(format!("images/{id}/last_error"));
        assert!(last.contains(" state: EINVAL: ") && last.contains(case.reason), "{}: {last}", case.name);
        assert!(last.chars().all(|letter| !letter.is_control()), "{}: {last:?}", case.name);
        disclosed += usize::from(holds_secret(last.as_bytes()));
        for name in ["disk_format", "sha512", "virtual_size_bytes"] {
            let shown = daemon.read(format!("images/{id}/{name}"));
            let claimed = case.claims[0].map_or("", Format::word);
            let expected = if name == "disk_format" { claimed } else { "" };
            assert!(shown == expected || shown == "0", "{}: {name} is {shown}", case.name);
        }
        assert!(fs::read(daemon.path(format!("images/{id}/data"))).expect("readable") == case.bytes, "{}", case.name);
        for name in ["errors", "last_error"] {
            let text = fs::read(daemon.path(format!("images/{id}/{name}"))).expect("readable");
            disclosed += usize::from(holds_secret(&text));
        }
        // A user may have a hundred drafts.
        daemon.set(format!("images/{id}/state"), "deleted");
    }
    assert_eq!(witness.runs() - runs, 0, "qemu-img was run for images that our inspector refuses");
    for name in ["events", "health", "last_error"] {
        disclosed += usize::from(fs::read(daemon.path(name)).is_ok_and(|text| holds_secret(&text)));
    }
    disclosed += usize::from(holds_secret(daemon.log_text().as_bytes()));
    for path in files(&daemon.state_directory()) {
        // Sockets and what is gone meanwhile have no content.
        disclosed += usize::from(fs::read(&path).is_ok_and(|bytes| holds_secret(&bytes)));
    }
    assert_eq!(witness.readers(&canary), [0; 0], "the canary was opened");
    for (path, readers) in witness.all() {
        let us = std::process::id();
        let others: Vec<_> = readers.iter().filter(|reader| **reader != daemon.pid() && **reader != us).collect();
        assert!(others.is_empty(), "{} was read by {others:?}", path.display());
    }
    fs::read(&canary).expect("readable");
    wait_until("the witness sees who reads the canary", || !witness.readers(&canary).is_empty());
    println!("{} hostile images: {accepted} accepted, {disclosed} disclosed", corpus.len());
    assert_eq!((accepted, disclosed), (0, 0));
}
