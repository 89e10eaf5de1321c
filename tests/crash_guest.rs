//! The program is killed (`kill -9`) at its commits while it works on a real guest: libvirt's QEMU driver in its own
//! process, a small Linux that counts its boots on its own disk. A second life goes on and is killed too, a third ends it.
//!
//! A life is this test program again, so that the store that kills is part of no program but this one.

#[path = "crash_guest/life.rs"]
mod life;
mod support;

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use instancefs::inventory::{Image, Inventory, Object};
use instancefs::model::caller::{NO_PROJECT, Ownership};
use instancefs::model::image::Format;
use instancefs::model::record::ImageRecord;
use instancefs::store::power_loss::Moment;
use instancefs::store::sqlite::SqliteStore;
use instancefs::workflow::ledger::Ledger;
use serde_json::Value;
use support::guests::{Guests, long_wait};
use uuid::Uuid;

use life::{LIFE, Order};

/// Where the program is killed: at the n-th commit of its work, counted from 1.
type Kill = Option<(u64, Moment)>;

struct Bed {
    /// Dropped first, since it looks for them in the directory.
    guests: Guests,
    directory: tempfile::TempDir,
    image: Uuid,
}

/// What a life that was not killed saw at its end.
struct Seen(Value);

impl Seen {
    fn state(&self) -> &str {
        self.0["state"].as_str().expect("a state")
    }
}

impl Bed {
    fn new(guest: &Path) -> Bed {
        let directory = tempfile::tempdir().expect("a directory");
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o711)).expect("permissions");
        let image = Uuid::new_v4();
        let data = directory.path().join(format!("images/{image}/data"));
        fs::create_dir_all(data.parent().expect("a parent")).expect("a directory");
        for directory in [data.parent().expect("a parent"), &directory.path().join("images")] {
            fs::set_permissions(directory, fs::Permissions::from_mode(0o711)).expect("permissions");
        }
        fs::copy(guest, &data).expect("the image");
        fs::set_permissions(&data, fs::Permissions::from_mode(0o444)).expect("permissions");
        let store = SqliteStore::open(&directory.path().join("store.sqlite")).expect("a store");
        let ledger = Ledger::open(Arc::new(store), Arc::new(Inventory::new())).expect("a ledger");
        let bytes = fs::metadata(&data).expect("the image").len();
        let virtual_size_bytes = instancefs::image::qemu_img::info(&data, Format::Qcow2).expect("its size");
        let added = ledger.transact(|batch| {
            let ownership = Ownership { owner: 0, project: NO_PROJECT, generation: 0 };
            let record = ImageRecord {
                disk_format: Some(Format::Qcow2),
                size_bytes: bytes,
                virtual_size_bytes: virtual_size_bytes.virtual_size_bytes,
                sha512: Some("00".to_owned()),
                ..ImageRecord::new(batch.next_number(), "guest".to_owned(), ownership, 1)
            };
            batch.put(Object::Image(Arc::new(Image { id: image, record, task: None, data_bytes: bytes })));
        });
        added.expect("stored");
        let guests = Guests(directory.path().to_owned());
        Bed { guests, directory, image }
    }

    /// One life; `None` if it was killed.
    fn live(&self, id: Uuid, word: Option<&str>, kill: Kill) -> Option<Seen> {
        let order = Order { directory: self.directory.path().to_owned(), image: self.image, id, word, kill };
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["--exact", "a_life_of_the_program", "--nocapture"]).env(LIFE, order.to_text());
        let output = command.output().expect("a life");
        let text = String::from_utf8_lossy(&output.stdout);
        match text.lines().find_map(|line| line.split_once("SEEN ")) {
            Some((_, seen)) => Some(Seen(serde_json::from_str(seen).expect("JSON"))),
            None => {
                use std::os::unix::process::ExitStatusExt;
                let errors = String::from_utf8_lossy(&output.stderr);
                assert_eq!(output.status.signal(), Some(libc::SIGKILL), "a life ended by itself: {text}{errors}");
                None
            }
        }
    }

    fn console(&self, id: Uuid) -> String {
        let bytes = fs::read(self.directory.path().join(format!("consoles/{id}.log"))).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// How often the guest says that it booted, by the count on its disk.
    fn boots(&self, id: Uuid) -> usize {
        let console = self.console(id);
        let count = console.rsplit("BOOTS=").next().filter(|_| console.contains("BOOTS="));
        count.map_or(0, |text| text.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap_or(0))
    }

    /// Waits until a guest that runs has come up once more.
    fn wait_for_boot(&self, id: Uuid, before: usize) {
        long_wait("the guest counts its boot", || self.boots(id) > before);
        let ready = |text: &str| text.rsplit("BOOTS=").next().is_some_and(|last| last.contains("READY"));
        long_wait("the guest is ready", || ready(&self.console(id)));
    }
}

/// The words of a guest's life, the state that each leads to, and whether it boots with it.
const COURSE: [(&str, &str, bool); 8] = [
    ("active", "active", true),
    ("stopped", "stopped", false),
    ("active", "active", true),
    ("shelved_offloaded", "shelved_offloaded", false),
    ("active", "active", true),
    ("soft_deleted", "soft_deleted", false),
    ("stopped", "stopped", false),
    ("soft_deleted", "soft_deleted", false),
];

/// A guest from its draft to its end, killed at the n-th commit of each word, and in the recovery. Returns the kills.
fn course(bed: &Bed, kill_at: &dyn Fn(usize) -> (Kill, Kill)) -> usize {
    let id = Uuid::new_v4();
    let mut kills = 0;
    let mut boots = 0;
    let mut state = "draft".to_owned();
    for (index, (word, target, starts)) in COURSE.into_iter().chain([("deleted", "gone", false)]).enumerate() {
        let (first, again) = kill_at(index);
        let what = format!("{word} from {state}, killed at {first:?} and {again:?}");
        let mut seen = bed.live(id, Some(word), first);
        if seen.is_none() {
            kills += 1;
            seen = bed.live(id, None, again);
            if seen.is_none() {
                kills += 1;
                seen = bed.live(id, None, None);
            }
        }
        let seen = seen.expect("a life that nobody killed ends");
        assert!([state.as_str(), target].contains(&seen.state()), "{what}: {}", seen.0);
        assert_eq!(seen.0["lost"], Value::from(Vec::<String>::new()), "{what}");
        let last = match seen.state() == target {
            true => seen,
            false => bed.live(id, Some(word), None).expect("nobody kills it"),
        };
        assert_eq!(last.state(), target, "{what}, and the same word again: {}", last.0);
        if starts {
            bed.wait_for_boot(id, boots);
            // A disk that was made anew, or lost, would count from 1 again.
            assert_eq!(bed.boots(id), boots + 1, "{what}: {}", bed.console(id));
            boots += 1;
        }
        state = target.to_owned();
    }
    let left: Vec<_> = [bed.directory.path().join("disks"), bed.directory.path().join("shelf")]
        .into_iter()
        .flat_map(|place| fs::read_dir(place).into_iter().flatten())
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.ends_with(id.to_string()))
        .collect();
    assert_eq!(left, Vec::<PathBuf>::new(), "something is left of what was deleted for good");
    assert!(bed.guests.pids().is_empty(), "a guest runs on");
    kills
}

#[test]
fn a_real_guest_loses_nothing_when_the_program_is_killed_at_its_commits() {
    let Some(guest) = std::env::var_os("INSTANCEFS_GUEST_IMAGE") else {
        panic!("run scripts/test, or set INSTANCEFS_GUEST_IMAGE to what scripts/guest-image made");
    };
    let bed = Bed::new(Path::new(&guest));
    let moments = [Moment::Before, Moment::After];
    let mut kills = 0;
    if std::env::var_os("INSTANCEFS_LONG").is_some() {
        for moment in moments {
            for at in 1.. {
                let now = course(&bed, &|index| (Some((at, moment)), Some((1 + (at + index as u64) % 3, moment))));
                kills += now;
                if now == 0 {
                    break;
                }
            }
        }
    } else {
        // Another commit for each word.
        kills = course(&bed, &|index| {
            let moment = moments[index % 2];
            (Some((2 + index as u64 % 3, moment)), Some((1 + index as u64 % 2, moment)))
        });
        assert!(kills >= 6, "only {kills} kills: the program never died where it matters");
    }
    println!("{kills} kills");
    if let Some(path) = std::env::var_os("INSTANCEFS_POINTS") {
        let file = fs::OpenOptions::new().create(true).append(true).open(path);
        file.and_then(|mut file| writeln!(file, "real_guest {kills}")).expect("the points are reported");
    }
}

/// Not a test: what [`Bed::live`] runs.
#[test]
fn a_life_of_the_program() {
    let Ok(text) = std::env::var(LIFE) else { return };
    life::live(&Order::from_text(&text).expect("an order"));
}
