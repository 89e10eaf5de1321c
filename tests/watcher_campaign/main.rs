//! Random changes under every watcher that people use: at the end each has the right picture, and none has heard of a file
//! that never changed.
//!
//! incron is not among them: 0.5.12 loses events on every file system, and dies under so many.
//!
//! 2 000 changes, or as many as `INSTANCEFS_CHANGES` says; 100 000 in the long form, which has the watchers that Debian's small packages have not.

mod changes;
mod picture;
#[path = "../support/mod.rs"]
mod support;
mod tools;

use std::sync::Arc;
use std::time::{Duration, Instant};

use changes::Changes;
use picture::{Picture, Tracked};
use support::{Daemon, wait_until};
use tools::Tool;
use uuid::Uuid;

/// How long the last events may take, on a busy machine.
const LAST: Duration = Duration::from_secs(120);

#[test]
fn no_watcher_misses_the_last_change_of_anything_or_hears_of_what_never_changed() {
    let long = std::env::var_os("INSTANCEFS_LONG").is_some();
    let number = std::env::var("INSTANCEFS_CHANGES").ok().and_then(|number| number.parse().ok());
    let number = number.unwrap_or(if long { 100_000 } else { 2_000 });
    let daemon = Daemon::start(&[]);
    let stayers: Vec<Uuid> = (0..8).map(|index| daemon.domain(&format!("stayer-{index}"))).collect();
    let quiet = daemon.domain("quiet");
    wait_until("definitions are fetched", || {
        stayers.iter().chain([&quiet]).all(|id| daemon.path(format!("instances/{id}/domain.xml")).exists())
    });
    // A later change that is published says that what the definitions changed is queued, if it was not announced already;
    // what nobody watches yet must be over.
    daemon.domain("last");
    wait_until("the definitions are announced", || is_all_announced(&daemon));
    let tracked = Arc::new(Tracked::new(&daemon.root(), &stayers, quiet));
    let tools = Tool::all(&daemon, &tracked, long);
    let pictures: Vec<_> = tools.into_iter().map(|tool| Picture::of(tool, &tracked)).collect();

    let began = Instant::now();
    let changes = Changes::make(&daemon, &stayers, number);
    eprintln!("{changes} in {:.1} s", began.elapsed().as_secs_f64());
    wait_until("the work is done", || daemon.read("summary/instances").lines().skip(1).all(is_idle));

    let end = Instant::now() + LAST;
    for picture in &pictures {
        while let Some(wrong) = picture.wrong() {
            assert!(Instant::now() < end, "{}: {wrong}", picture.name());
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(picture.invented(), [] as [&str; 0], "{} heard of what never changed", picture.name());
        eprintln!(
            "{}: woken {} times, all right {:.1} s after the beginning",
            picture.name(),
            picture.woken(),
            began.elapsed().as_secs_f64()
        );
    }
}

/// Whether every change that is queued was announced.
fn is_all_announced(daemon: &Daemon) -> bool {
    daemon.read("metrics").lines().any(|line| line == "instancefs_announcer_queue_length 0")
}

/// Whether a line of the summary names no task.
fn is_idle(line: &str) -> bool {
    line.split('\t').nth(3).is_some_and(str::is_empty)
}
