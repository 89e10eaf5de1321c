//! Somebody tries keys.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdout, Command, Stdio};

use crate::support::gid;
use crate::{ACCESS, daemon, key, offer, owner, user, volume, writes};

const PROCESSES: usize = 50;
const USERS: usize = 5;
const FIRST_USER: u32 = 2200;

/// Tries keys as a user, and prints what each attempt was answered, counted.
const GUESSER: &str = "
import collections, errno, os, secrets, sys
path, uid, group, count = sys.argv[1], *map(int, sys.argv[2:5])
os.setgroups([group]); os.setgid(uid); os.setuid(uid)
answers = collections.Counter()
for _ in range(count):
    try:
        file = os.open(path, os.O_WRONLY)
        try: os.write(file, secrets.token_hex(16).encode())
        finally: os.close(file)
        answers['accepted'] += 1
    except OSError as error:
        answers[errno.errorcode[error.errno]] += 1
print(' '.join(f'{name}={number}' for name, number in answers.items()))
";

#[test]
fn no_wrong_key_of_many_is_taken_and_their_users_are_shut_out_after_five_and_the_offer_is_good() {
    let attempts = if std::env::var_os("INSTANCEFS_LONG").is_some() { 100_000 } else { 2_000 };
    let daemon = daemon();
    let id = volume(&daemon);
    let offer = offer(&daemon, &owner(), id, "gift");
    let key = key(&daemon, &owner(), offer);
    let accept = daemon.path(format!("transfers/{offer}/accept"));
    let guessers: Vec<_> = (0..PROCESSES)
        .map(|index| {
            let uid = FIRST_USER + u32::try_from(index % USERS).expect("few");
            let mut command = Command::new("python3");
            command.args(["-c", GUESSER]).arg(&accept).args([uid.to_string(), gid(ACCESS).to_string()]);
            command.arg((attempts / PROCESSES).to_string()).stdout(Stdio::piped());
            (uid, command.spawn().expect("python3 runs"))
        })
        .collect();
    let mut answers: BTreeMap<(u32, String), usize> = BTreeMap::new();
    for (uid, guesser) in guessers {
        let output = guesser.wait_with_output().expect("it ends");
        assert!(output.status.success());
        for answer in String::from_utf8(output.stdout).expect("UTF-8").split_whitespace() {
            let (name, count) = answer.split_once('=').expect("an answer");
            *answers.entry((uid, name.to_owned())).or_default() += count.parse::<usize>().expect("a number");
        }
    }
    println!("{answers:?}");
    let mut expected = BTreeMap::new();
    for uid in (FIRST_USER..).take(USERS) {
        expected.insert((uid, "EKEYREJECTED".to_owned()), 5);
        expected.insert((uid, "EACCES".to_owned()), attempts / USERS - 5);
    }
    assert_eq!(answers, expected);
    assert_eq!(daemon.read(format!("volumes/{id}/owner")), "2001");
    assert_eq!(daemon.read(format!("transfers/{offer}/state")), "pending");
    assert_eq!(writes(&user(FIRST_USER), &accept, &key), libc::EACCES, "he is shut out with the right one too");
    assert!(daemon.read(format!("transfers/{offer}/last_error")).contains("five wrong keys"));
    assert_eq!(writes(&user(2002), &accept, &key), 0);
    assert_eq!(daemon.read(format!("volumes/{id}/owner")), "2002");
}

/// Takes offers as a user: of each line, the path and the key, it opens the path, says so, waits for the next line, writes
/// the key, and prints what that was answered.
const TAKER: &str = "
import errno, os, sys
uid, group = map(int, sys.argv[1:3])
os.setgroups([group]); os.setgid(uid); os.setuid(uid)
while line := sys.stdin.readline():
    path, key = line.split()
    file = os.open(path, os.O_WRONLY)
    print('open', flush=True)
    sys.stdin.readline()
    try: os.write(file, key.encode()); answer = 'accepted'
    except OSError as error: answer = errno.errorcode[error.errno]
    finally: os.close(file)
    print(answer, flush=True)
";

/// A process of a user's that takes offers.
struct Taker {
    uid: u32,
    process: Child,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Taker {
    fn start(uid: u32) -> Taker {
        let mut command = Command::new("python3");
        command.args(["-c", TAKER, &uid.to_string(), &gid(ACCESS).to_string()]);
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("python3 runs");
        let answers = BufReader::new(process.stdout.take().expect("its words")).lines();
        Taker { uid, process, answers }
    }

    fn tell(&mut self, line: &str) {
        let words = format!("{line}\n");
        self.process.stdin.as_mut().expect("it listens").write_all(words.as_bytes()).expect("it hears");
    }

    fn answer(&mut self) -> String {
        self.answers.next().expect("it lives").expect("it answers")
    }
}

impl Drop for Taker {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ended = self.process.wait();
    }
}

/// Two processes of these users write the right key at once, again and again.
fn race(uids: [u32; 2]) {
    let rounds = if std::env::var_os("INSTANCEFS_LONG").is_some() { 1_000 } else { 60 };
    let daemon = daemon();
    let id = volume(&daemon);
    let mut takers = uids.map(Taker::start);
    let mut by = owner();
    for round in 0..rounds {
        let offer = offer(&daemon, &by, id, &format!("round {round}"));
        let key = key(&daemon, &by, offer);
        let accept = daemon.path(format!("transfers/{offer}/accept"));
        for taker in &mut takers {
            taker.tell(&format!("{} {key}", accept.display()));
        }
        assert_eq!(takers.each_mut().map(Taker::answer), ["open", "open"]);
        // Who hears it first changes.
        let (first, second) = if round % 2 == 0 { (0, 1) } else { (1, 0) };
        takers[first].tell("now");
        takers[second].tell("now");
        let answers = takers.each_mut().map(Taker::answer);
        let winner = match answers.each_ref().map(String::as_str) {
            ["accepted", "EINVAL"] => &takers[0],
            ["EINVAL", "accepted"] => &takers[1],
            _ => panic!("round {round}: {answers:?}"),
        };
        assert_eq!(daemon.read(format!("volumes/{id}/owner")), winner.uid.to_string());
        assert_eq!(daemon.read(format!("transfers/{offer}/state")), "accepted");
        by = user(winner.uid);
    }
}

#[test]
fn of_two_users_whose_processes_write_the_right_key_at_once_one_gets_the_volume() {
    race([2100, 2101]);
}

#[test]
fn of_two_processes_of_one_user_that_write_the_right_key_at_once_one_succeeds() {
    race([2100, 2100]);
}
