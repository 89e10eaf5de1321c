//! Reading, writing, polling, refusing, ending.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::select::{FdSet, select};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::gettid;

use crate::world::{PATIENCE, World, wait_until};

/// System calls that wait for an event.
const WAITING: [i64; 5] = [libc::SYS_poll, libc::SYS_ppoll, libc::SYS_epoll_wait, libc::SYS_select, libc::SYS_pselect6];

fn read(file: &mut File) -> String {
    let mut text = String::new();
    file.seek(SeekFrom::Start(0)).expect("a beginning");
    file.read_to_string(&mut text).expect("a value");
    text
}

#[test]
fn a_handle_serves_one_version_until_it_is_read_from_the_beginning_again() {
    let mut world = World::new();
    world.tell("set value first");
    let file = File::open(world.path("value")).expect("a file");
    let mut start = [0; 2];
    assert_eq!(file.read_at(&mut start, 0).expect("bytes"), 2);
    world.tell("set value second");
    let mut rest = [0; 16];
    let count = file.read_at(&mut rest, 2).expect("bytes");
    assert_eq!(&rest[..count], b"rst\n");
    let count = file.read_at(&mut rest, 0).expect("bytes");
    assert_eq!(&rest[..count], b"second\n");
}

#[test]
fn the_size_is_true_after_a_change_and_the_time_is_the_changes() {
    // An announcement would mend what the invalidation missed.
    let mut world = World::with("silent");
    let before = std::fs::metadata(world.path("value")).expect("a file");
    assert_eq!((before.size(), before.mtime(), before.nlink()), (6, 1_000_000_000, 2));
    world.tell("set value something-longer");
    let is_true = || std::fs::metadata(world.path("value")).is_ok_and(|now| now.size() == 17 && now.mtime() > 1 << 30);
    assert!(wait_until(PATIENCE, is_true));
}

#[test]
fn a_stream_is_read_live() {
    let mut world = World::new();
    let mut file = File::open(world.path("stream")).expect("a file");
    world.tell("append one");
    assert_eq!(read(&mut file), "one");
    world.tell("append two");
    let mut rest = String::new();
    file.read_to_string(&mut rest).expect("bytes");
    assert_eq!(rest, "two");
}

#[test]
fn one_write_is_one_command_with_its_own_errno() {
    let world = World::new();
    assert_eq!(world.shell("echo good > $m/value && cat $m/value").as_deref(), Ok("good"));
    assert_eq!(world.shell("echo better >> $m/value && cat $m/value").as_deref(), Ok("better"));
    assert!(world.shell("echo > $m/value").unwrap_err().contains("Invalid argument"));
    let mut file = File::options().write(true).open(world.path("value")).expect("a file");
    file.write_all(b"word").and_then(|()| file.write_all(b"\n")).expect("a lone newline after a good value");
    let error = file.write_all(&[b'x'; 4097]).expect_err("too long");
    assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    assert_eq!(world.shell("cat $m/value").as_deref(), Ok("word"));
}

#[test]
fn the_caller_is_known_with_his_groups_and_login() {
    let world = World::new();
    let as_somebody = "setpriv --reuid 3456 --regid 3457 --groups 3458,3459 sh -c 'echo who > $m/value'";
    world.shell(&format!("chmod 755 $(dirname $m) && {as_somebody}")).expect("a write");
    let who = world.shell("cat $m/value").expect("a value");
    let login = std::fs::read_to_string("/proc/self/loginuid").unwrap_or_default();
    if ["", "4294967295"].contains(&login.trim()) {
        assert_eq!(who, "3456/3456/[3458, 3459]/3");
    } else {
        assert!(who.starts_with("3456/") && who.ends_with("/[3458, 3459]/3"), "{who}");
    }
}

#[test]
fn a_read_only_attribute_cannot_be_opened_for_writing_by_root() {
    let world = World::new();
    let refused = File::options().write(true).open(world.path("readonly")).expect_err("refused");
    assert_eq!(refused.raw_os_error(), Some(libc::EACCES));
}

#[test]
fn metadata_can_be_set_to_what_it_is_and_to_nothing_else() {
    let world = World::new();
    world
        .shell("chmod 666 $m/value && chown 0:0 $m/value && touch $m/value && truncate -s 0 $m/value")
        .expect("no-ops");
    assert_eq!(world.shell("cat $m/value").as_deref(), Ok("unset"));
    assert!(world.shell("chmod 600 $m/value").unwrap_err().contains("not permitted"));
    assert!(world.shell("chown 1 $m/value").unwrap_err().contains("not permitted"));
}

#[test]
fn what_nobody_may_do_leaves_the_tree_as_it_is() {
    let world = World::new();
    assert!(world.shell("echo x > $m/misspelt").unwrap_err().contains("o such file"));
    assert!(world.shell("ln $m/value $m/other").unwrap_err().contains("not permitted"));
    assert!(world.shell("mkfifo $m/pipe").unwrap_err().contains("not permitted"));
    assert!(world.shell("rm -f $m/value").unwrap_err().contains("not permitted"));
    assert!(world.shell("mv $m/value $m/other").unwrap_err().contains("not permitted"));
    assert!(world.shell("rmdir $m/trash").unwrap_err().contains("not empty"));
    assert_eq!(
        world.shell("ls -aU $m | sort | tr '\\n' ' '").as_deref(),
        Ok(". .. by-name images instances readonly slow slow2 slow3 slow4 slow5 stream trash value ".trim_end())
    );
    assert_eq!(world.shell("stat -f -c '%b %l' $m").as_deref(), Ok("0 255"));
}

#[test]
fn bulk_data_is_written_and_read_at_its_offsets() {
    let world = World::new();
    world.shell("head -c 3000000 /dev/urandom > $m/../random && cp $m/../random $m/images/image/data").expect("a copy");
    world.shell("cmp $m/../random $m/images/image/data").expect("the same bytes");
    world.shell("dd if=/dev/zero of=$m/images/image/data bs=1 count=5 seek=7 conv=notrunc,fsync").expect("a write");
    world.shell("truncate -s 4096 $m/images/image/data").expect("a truncation");
    assert_eq!(world.shell("stat -c %s $m/images/image/data").as_deref(), Ok("4096"));
    assert_eq!(
        world.shell("dd if=$m/images/image/data bs=1 skip=7 count=5 | od -An -tx1").as_deref(),
        Ok(" 00 00 00 00 00")
    );
}

#[test]
fn a_mount_that_only_observes_refuses_every_change_and_still_announces() {
    let mut world = World::with("read-only");
    world.expect("announcer up");
    for change in ["echo x > $m/value", "mkdir $m/instances/77", "mv $m/value $m/v", "rm $m/value", "touch $m/value"] {
        assert!(world.shell(change).unwrap_err().contains("ead-only file system"), "{change}");
    }
    let watch = world.watch(&["value"]);
    world.tell("set value seen");
    watch.expect(&["value MODIFY", "value CLOSE_WRITE,CLOSE"]);
}

#[test]
fn poll_epoll_and_select_are_woken_by_a_change_until_it_is_read() {
    let mut world = World::new();
    let mut file = File::open(world.path("value")).expect("a file");
    let urgent = PollFlags::POLLPRI | PollFlags::POLLERR;
    let is_urgent = move |file: &File, timeout: Duration| {
        let mut polled = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
        let timeout = PollTimeout::try_from(timeout).expect("short");
        poll(&mut polled, timeout).expect("poll");
        polled[0].revents().is_some_and(|events| events.contains(urgent))
    };
    assert!(is_urgent(&file, Duration::ZERO), "never read");
    read(&mut file);
    assert!(!is_urgent(&file, Duration::ZERO), "just read");

    for round in 0..3 {
        let polled = file.try_clone().expect("a descriptor");
        let (sender, thread) = channel();
        let waiter = std::thread::spawn(move || {
            sender.send(gettid()).expect("a listener");
            let start = Instant::now();
            let woken = match round {
                0 => is_urgent(&polled, PATIENCE),
                1 => {
                    let epoll = Epoll::new(EpollCreateFlags::empty()).expect("epoll");
                    let interest = EpollEvent::new(EpollFlags::EPOLLPRI | EpollFlags::EPOLLET, 1);
                    epoll.add(&polled, interest).expect("a poller");
                    let mut events = [EpollEvent::empty()];
                    epoll.wait(&mut events, EpollTimeout::try_from(PATIENCE).expect("short")) == Ok(1)
                }
                _ => {
                    let mut exceptional = FdSet::new();
                    exceptional.insert(polled.as_fd());
                    let mut patience = TimeVal::seconds(5);
                    select(None, None, None, &mut exceptional, &mut patience) == Ok(1)
                }
            };
            // At the end of its patience it would look once more, and find the change as well.
            woken && start.elapsed() < PATIENCE / 2
        });
        let call = format!("/proc/self/task/{}/syscall", thread.recv().expect("a thread"));
        let waits = || {
            let call = std::fs::read_to_string(&call).unwrap_or_default();
            let number = call.split(' ').next().and_then(|number| number.parse().ok());
            number.is_some_and(|number| WAITING.contains(&number))
        };
        assert!(wait_until(PATIENCE, waits));
        world.tell(&format!("set value round-{round}"));
        assert!(waiter.join().expect("a waiter"), "round {round}");
        assert_eq!(read(&mut file), format!("round-{round}\n"));
        assert!(wait_until(PATIENCE, || !is_urgent(&file, Duration::ZERO)));
    }
}

#[test]
fn the_mount_goes_away_while_a_file_is_open() {
    let mut world = World::new();
    let file = File::open(world.path("value")).expect("a file");
    world.tell("stop");
    assert!(file.read_at(&mut [0; 4], 0).is_err(), "nobody answers any more");
    assert_eq!(std::fs::read_dir(&world.root).expect("the directory below").count(), 0);
    assert!(wait_until(PATIENCE, || world.announcer().is_none()));
}

#[test]
fn umount_finds_an_idle_mount_idle_and_the_daemon_hears_of_it() {
    let mut world = World::new();
    world.tell("set value x");
    // The announcement of that change may still be inside.
    assert!(wait_until(PATIENCE, || world.shell("umount $m").is_ok()));
    world.expect("unmounted true");
    world.tell("stop");
}

#[test]
fn a_killed_daemon_leaves_nobody_waiting() {
    let mut world = World::new();
    let announcer = world.announcer().expect("an announcer");
    let scripts = [
        "while cat $m/value; do :; done",
        "while echo x > $m/value; do :; done",
        "while ls -l $m; do :; done",
        "echo x > $m/slow",
    ];
    let mut users: Vec<_> = scripts
        .iter()
        .map(|script| {
            let mut shell = Command::new("sh");
            shell.args(["-c", script]).env("m", &world.root).stdout(Stdio::null()).stderr(Stdio::null());
            shell.spawn().expect("a shell")
        })
        .collect();
    for round in 0..300 {
        world.tell(&format!("set value {round}"));
        world.tell(&format!("set readonly {round}"));
    }
    world.daemon.kill().expect("a kill");
    let start = Instant::now();
    let limit = Duration::from_secs(1);
    let all_ended = wait_until(limit, || {
        let users_ended = users.iter_mut().all(|user| matches!(user.try_wait(), Ok(Some(_))));
        users_ended && matches!(world.daemon.try_wait(), Ok(Some(_)))
    });
    for user in &mut users {
        let _ = user.kill();
    }
    assert!(all_ended, "somebody still waits after {:?}", start.elapsed());
    let is_gone = || !std::path::Path::new(&format!("/proc/{announcer}/exe")).exists();
    assert!(wait_until(limit, is_gone), "the announcer outlives its daemon");
}
