//! The mounted tree, the tables and `docs/abi/` say the same.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use support::{Daemon, wait_until};
use uuid::Uuid;

/// The files that an object has in the bin only; `tests/bin` sees them there.
const IN_THE_BIN: [&str; 4] = ["class", "deleted_at", "deleted_by", "expires_at"];

/// File name and mode of each row of a document.
fn documented(name: &str) -> BTreeSet<(String, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/abi").join(name);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.lines()
        .filter_map(|line| line.strip_prefix("| `"))
        .map(|line| {
            let (file, rest) = line.split_once("` | ").expect("a row");
            (file.to_owned(), rest.split(' ').next().expect("a mode").to_owned())
        })
        .collect()
}

/// The files of a directory that is no object's.
fn mounted(directory: &Path) -> BTreeSet<(String, String)> {
    let files = entries(directory).into_iter().filter(|(_, path, _)| !is_directory(path));
    files.map(|(name, _, mode)| (name, mode)).collect()
}

/// Everything in an object's directory, also in the directories there.
fn mounted_object(directory: &Path) -> BTreeSet<(String, String)> {
    let mut found = BTreeSet::new();
    for (name, path, mode) in entries(directory) {
        if is_directory(&path) {
            found.extend(mounted_object(&path).into_iter().map(|(file, mode)| (format!("{name}/{file}"), mode)));
        }
        found.insert((name, mode));
    }
    found
}

fn is_directory(path: &Path) -> bool {
    path.symlink_metadata().expect("stat").is_dir()
}

fn entries(directory: &Path) -> Vec<(String, PathBuf, String)> {
    let entries = fs::read_dir(directory).expect("a directory").map(|entry| entry.expect("an entry"));
    entries
        .map(|entry| {
            let metadata = entry.path().symlink_metadata().expect("stat");
            let mode =
                if metadata.is_symlink() { "symlink".to_owned() } else { format!("0{:o}", metadata.mode() & 0o7777) };
            (entry.file_name().into_string().expect("UTF-8"), entry.path(), mode)
        })
        .collect()
}

#[test]
fn the_documents_are_up_to_date() {
    for (name, text) in instancefs::tree::abi::documents() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/abi").join(name);
        assert_eq!(fs::read_to_string(path).expect("readable"), text, "{name}: run `instancefs abi docs/abi`");
    }
}

#[test]
fn the_mounted_tree_has_exactly_the_documented_files_with_their_modes() {
    let daemon = Daemon::start(&[]);
    let instance = daemon.domain("documented");
    daemon.set(format!("instances/{instance}/state"), "active");
    wait_until("the definition is there", || daemon.path(format!("instances/{instance}/domain.xml")).exists());
    let mut of_instance = documented("instances.md");
    of_instance.retain(|(name, _)| name != "console.log.1" && !IN_THE_BIN.contains(&name.as_str()));
    assert_eq!(mounted_object(&daemon.path(format!("instances/{instance}"))), of_instance);
    let draft = Uuid::new_v4();
    fs::create_dir(daemon.path(format!("images/{draft}"))).expect("a draft");
    let mut of_draft = documented("images.md");
    of_draft.retain(|(name, _)| name != "last_task" && !IN_THE_BIN.contains(&name.as_str()));
    assert_eq!(mounted_object(&daemon.path(format!("images/{draft}"))), of_draft);
    let task = fs::read_dir(daemon.path("tasks")).expect("tasks").next().expect("one").expect("an entry").path();
    let mut of_task = documented("tasks.md");
    of_task.retain(|(name, _)| name != "spec.json");
    assert_eq!(mounted_object(&task), of_task);
    let own = daemon.path(format!("tasks/{}", Uuid::new_v4()));
    fs::create_dir(&own).expect("a draft");
    assert_eq!(mounted_object(&own), documented("tasks.md"), "a task of one's own has an order beside");
    let volume = daemon.path(format!("volumes/{}", Uuid::new_v4()));
    fs::create_dir(&volume).expect("a draft");
    let mut of_volume = documented("volumes.md");
    of_volume.retain(|(name, _)| !["last_task"].contains(&name.as_str()) && !name.contains('*'));
    of_volume.retain(|(name, _)| !IN_THE_BIN.contains(&name.as_str()));
    assert_eq!(mounted_object(&volume), of_volume);
    fs::create_dir(daemon.path("flavors/documented")).expect("a draft");
    assert_eq!(mounted_object(&daemon.path("flavors/documented")), documented("flavors.md"));
    assert_eq!(mounted(&daemon.path("summary")), documented("summary.md"));
    let mut of_root = documented("root.md");
    of_root.retain(|(name, _)| name != "events.1");
    assert_eq!(mounted(&daemon.root()), of_root);
}

#[test]
fn the_size_of_every_file_is_the_length_of_what_a_read_returns() {
    let daemon = Daemon::start(&[]);
    let instance = daemon.domain("sized");
    daemon.set(format!("instances/{instance}/state"), "active");
    for directory in [format!("instances/{instance}"), "summary".to_owned()] {
        for (name, mode) in mounted(&daemon.path(&directory)) {
            let path = daemon.path(&directory).join(&name);
            if mode == "symlink" || mode == "0220" || name == "console.log" {
                continue;
            }
            wait_until(&format!("{name} has its size"), || {
                let before = fs::metadata(&path).expect("stat").len();
                let length = fs::read(&path).expect("readable").len() as u64;
                before == length && fs::metadata(&path).expect("stat").len() == length
            });
        }
    }
}

#[test]
fn who_is_outside_the_access_group_opens_readme_and_health_only() {
    let daemon = Daemon::start(&["-o", "access_group=users"]);
    let outsider = support::User { uid: 2004, gid: 2004, groups: vec![] };
    for (name, opens) in
        [("README", true), ("health", true), ("abi_version", false), ("events", false), ("last_error", false)]
    {
        let path = daemon.path(name);
        assert_eq!(outsider.act(|| fs::read(path).is_ok()), opens, "{name}");
    }
    for name in ["instances", "images", "by-name", "by-state", "summary", "tasks", "trash"] {
        let path = daemon.path(name);
        assert!(outsider.act(|| fs::read_dir(path).is_err()), "{name}");
    }
}
