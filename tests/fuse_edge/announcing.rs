//! Events for what the daemon changes.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::world::{PATIENCE, World, wait_until};

#[test]
fn a_change_raises_modify_and_close_write_also_on_a_file_that_nobody_may_write() {
    let mut world = World::new();
    let watch = world.watch(&["value", "readonly"]);
    world.tell("set value new");
    watch.expect(&["value MODIFY", "value CLOSE_WRITE,CLOSE"]);
    world.tell("set readonly new");
    watch.expect(&["readonly MODIFY", "readonly CLOSE_WRITE,CLOSE"]);
}

#[test]
fn the_last_of_many_changes_is_announced_and_few_of_the_others() {
    let mut world = World::new();
    let watch = world.watch(&["value"]);
    let start = Instant::now();
    for round in 0..400 {
        world.tell(&format!("set value {round}"));
    }
    let most = 2 + start.elapsed().as_millis() / 50;
    let mut modified = 0;
    let mut last = String::new();
    while let Some(event) = watch.next(Duration::from_millis(500)) {
        if event == "value MODIFY" {
            modified += 1;
            last = world.shell("cat $m/value").expect("a value");
        }
    }
    assert_eq!(last, "399");
    assert!((1..=most).contains(&modified), "{modified} announcements of 400 changes, not {most}");
}

#[test]
fn objects_that_come_move_and_go_raise_their_events() {
    let mut world = World::new();
    let watch = world.watch(&["instances", "trash", "by-name"]);
    world.tell("place 100 home instances/100");
    watch.expect(&["100 CREATE,ISDIR"]);
    world.tell("place 100 name by-name/web");
    watch.expect(&["web CREATE"]);
    assert_eq!(world.shell("cat $m/by-name/web/number").as_deref(), Ok("100"));
    world.tell("place 100 name by-name/db");
    watch.expect(&["web MOVED_FROM", "db MOVED_TO"]);
    world.tell("place 100 home trash/100");
    watch.expect(&["100 MOVED_FROM,ISDIR", "100 MOVED_TO,ISDIR"]);
    assert_eq!(world.shell("cat $m/trash/100/number").as_deref(), Ok("100"));
    world.tell("place 100 name -");
    watch.expect(&["db DELETE"]);
    world.tell("place 100 home -");
    watch.expect(&["100 DELETE,ISDIR"]);
    assert_eq!(world.shell("ls $m/instances $m/trash $m/by-name | grep -v : | tr -d '\\n'").as_deref(), Ok(""));
}

#[test]
fn what_a_user_made_is_not_announced_again() {
    let mut world = World::new();
    let watch = world.watch(&["instances"]);
    world.shell("mkdir $m/instances/200").expect("a directory");
    world.tell("place 201 home instances/201");
    let mut created = Vec::new();
    while !created.contains(&"201 CREATE,ISDIR".to_owned()) {
        created.push(watch.next(PATIENCE).expect("an event"));
    }
    assert_eq!(created, ["200 CREATE,ISDIR", "201 CREATE,ISDIR"]);
}

#[test]
fn two_objects_can_swap_names() {
    let mut world = World::new();
    for number in [300, 301] {
        world.tell(&format!("place {number} home instances/{number}"));
        world.tell(&format!("place {number} name by-name/n{number}"));
    }
    let reads = |world: &World, name: &str| world.shell(&format!("cat $m/by-name/{name}/number")).unwrap_or_default();
    assert!(wait_until(PATIENCE, || reads(&world, "n300") == "300" && reads(&world, "n301") == "301"));
    world.tell("swap 300 301");
    assert!(wait_until(PATIENCE, || reads(&world, "n300") == "301" && reads(&world, "n301") == "300"));
}

#[test]
fn names_are_published_also_without_an_announcer_and_old_ones_forgotten() {
    let mut world = World::with("silent");
    world.tell("place 400 home instances/400");
    assert!(wait_until(PATIENCE, || world.shell("cat $m/instances/400/number").as_deref() == Ok("400")));
    world.tell("place 400 home trash/400");
    assert!(wait_until(PATIENCE, || world.shell("cat $m/trash/400/number").as_deref() == Ok("400")));
    assert!(wait_until(PATIENCE, || world.shell("stat $m/instances/400").is_err()));
}

#[test]
fn an_announcer_that_does_not_answer_delays_a_name_by_a_moment_only() {
    let mut world = World::new();
    let announcer = Pid::from_raw(world.announcer().expect("an announcer"));
    kill(announcer, Signal::SIGSTOP).expect("a stop");
    world.tell("place 500 home instances/500");
    assert!(wait_until(PATIENCE, || world.shell("cat $m/instances/500/number").as_deref() == Ok("500")));
    kill(announcer, Signal::SIGCONT).expect("a continuation");
    world.tell("place 500 home -");
    assert!(wait_until(PATIENCE, || world.shell("stat $m/instances/500").is_err()));
}

#[test]
fn a_killed_announcer_is_started_again_and_announces() {
    let mut world = World::new();
    let watch = world.watch(&["value", "instances"]);
    kill(Pid::from_raw(world.announcer().expect("an announcer")), Signal::SIGKILL).expect("a kill");
    world.expect("announcer down");
    world.tell("set value between");
    world.expect("announcer up");
    watch.expect(&["value MODIFY", "value CLOSE_WRITE,CLOSE"]);
    world.tell("place 600 home instances/600");
    watch.expect(&["600 CREATE,ISDIR"]);
}

#[test]
fn a_large_batch_of_objects_is_there_at_once() {
    let mut world = World::new();
    world.tell("many 1000 3000");
    let count = |world: &World| world.shell("ls -U $m/instances | wc -l");
    assert!(wait_until(PATIENCE, || count(&world).as_deref() == Ok("3000")));
    assert_eq!(world.shell("cat $m/instances/3999/number").as_deref(), Ok("3999"));
}

#[test]
fn the_end_of_an_object_that_the_kernel_never_saw_raises_its_event_too() {
    let mut world = World::new();
    world.tell("many 1000 501");
    // Published in order; looking at the last one shows the kernel no other.
    assert!(wait_until(PATIENCE, || world.path("instances/1500").exists()));
    let watch = world.watch(&["instances"]);
    world.tell("place 1400 home -");
    watch.expect(&["1400 DELETE,ISDIR"]);
}

#[test]
fn the_announcer_holds_nothing_of_the_daemon_and_is_not_inside_the_mount() {
    let world = World::new();
    let announcer = world.announcer().expect("an announcer");
    let open = world.shell(&format!("readlink /proc/{announcer}/fd/* /proc/{announcer}/cwd")).expect("descriptors");
    assert!(!open.contains("/dev/fuse"), "{open}");
    assert!(!open.contains(world.root.to_str().expect("a path")), "{open}");
}

/// Starts a user whose write to a file is not answered for a while, and waits until it is under way.
fn hold(world: &World, file: &str) -> Child {
    let writer = Command::new("sh")
        .args(["-c", &format!("echo x > $m/{file}")])
        .env("m", &world.root)
        .stderr(Stdio::null())
        .spawn()
        .expect("a writer");
    let writes = format!("{} ", libc::SYS_write);
    let call = format!("/proc/{}/syscall", writer.id());
    assert!(wait_until(PATIENCE, || std::fs::read_to_string(&call).is_ok_and(|call| call.starts_with(&writes))));
    writer
}

#[test]
fn a_user_who_holds_a_files_lock_delays_no_other_announcement() {
    let mut world = World::new();
    let watch = world.watch(&["value", "instances"]);
    let mut writer = hold(&world, "slow");
    world.tell("set slow changed");
    for round in 0..5 {
        world.tell(&format!("set value {round}"));
        watch.expect(&["value MODIFY", "value CLOSE_WRITE,CLOSE"]);
        world.tell(&format!("place {} home instances/{}", 700 + round, 700 + round));
        watch.expect(&[&format!("{} CREATE,ISDIR", 700 + round)]);
    }
    assert!(matches!(writer.try_wait(), Ok(None)), "the writer held the lock all the time");
    let late = world.watch(&["slow"]);
    assert!(writer.wait().expect("an end").success());
    late.expect(&["slow MODIFY", "slow CLOSE_WRITE,CLOSE"]);
}

#[test]
fn workers_that_are_stuck_are_left_behind() {
    let mut world = World::new();
    let watch = world.watch(&["value"]);
    let files = ["slow", "slow2", "slow3", "slow4", "slow5"];
    let mut writers = files.map(|file| hold(&world, file));
    for file in files {
        world.tell(&format!("set {file} changed"));
    }
    world.tell("set value changed");
    watch.expect(&["value MODIFY", "value CLOSE_WRITE,CLOSE"]);
    for writer in &mut writers {
        assert!(matches!(writer.try_wait(), Ok(None)), "every lock is still held");
    }
    for writer in &mut writers {
        assert!(writer.wait().expect("an end").success());
    }
}
