//! Growth of console logs.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use instancefs::inventory::Change;
use instancefs::model::instance::State;
use uuid::Uuid;

use crate::world::World;

/// The ids of the console changes in the next batch that has some.
fn next_console(changes: &Receiver<Arc<Vec<Change>>>, patience: Duration) -> Option<Uuid> {
    let deadline = Instant::now() + patience;
    while let Ok(batch) = changes.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        for change in batch.iter() {
            if let Change::Console(id, _) = change {
                return Some(id.id);
            }
        }
    }
    None
}

fn print(path: &Path, text: &str) {
    OpenOptions::new().create(true).append(true).open(path).unwrap().write_all(text.as_bytes()).unwrap();
}

#[test]
fn growth_of_a_console_log_is_announced_whoever_named_the_log() {
    let world = World::new();
    let foreign = world.directory.path().join("foreign.log");
    print(&foreign, "old\n");
    let log = format!("<devices><serial type='pty'><log file='{}'/></serial></devices>", foreign.display());
    let (ours, theirs) = (world.define("ours"), world.define_with("theirs", &log));
    for id in [ours, theirs] {
        world.on_domain("start", id);
        world.is(id, State::Active);
    }
    let console = world.directory.path().join("state/consoles").join(format!("{ours}.log"));
    let changes = world.inventory().subscribe();
    for (id, path) in [(theirs, &foreign), (ours, &console)] {
        // The watch begins soon after the start shows.
        world.until("it is announced", || {
            print(path, "x");
            next_console(&changes, Duration::from_millis(300)) == Some(id)
        });
        // The last growth of a burst is not lost, and a burst is not a storm.
        let began = Instant::now();
        while next_console(&changes, Duration::from_millis(300)).is_some() {}
        for _ in 0..1000 {
            print(path, "y");
        }
        let burst = began.elapsed();
        let mut announced = 0;
        while let Some(found) = next_console(&changes, Duration::from_millis(300)) {
            assert_eq!(found, id);
            announced += 1;
        }
        assert!(announced >= 1 && announced <= 3 + burst.as_millis() / 100, "{announced} in {burst:?}");
    }
}

#[test]
fn a_console_log_on_our_own_mount_is_never_watched() {
    let world = World::new();
    let device = world.directory.path().metadata().unwrap().dev();
    // This device plays our mount: nothing outside the state directory may be watched on it.
    world.reconciler.set_mount_device(device);
    let foreign = world.directory.path().join("foreign.log");
    print(&foreign, "old\n");
    let roundabout = world.directory.path().join("state/../foreign.log");
    let log = |path: &Path| format!("<devices><serial type='pty'><log file='{}'/></serial></devices>", path.display());
    let ours = world.define("ours");
    let theirs = world.define_with("theirs", &log(&foreign));
    let sly = world.define_with("sly", &log(&roundabout));
    for id in [theirs, sly, ours] {
        world.on_domain("start", id);
        world.is(id, State::Active);
    }
    let console = world.directory.path().join("state/consoles").join(format!("{ours}.log"));
    let changes = world.inventory().subscribe();
    world.until("ours is announced", || {
        print(&foreign, "x");
        print(&console, "x");
        match next_console(&changes, Duration::from_millis(300)) {
            Some(id) => {
                assert_eq!(id, ours);
                true
            }
            None => false,
        }
    });
}
