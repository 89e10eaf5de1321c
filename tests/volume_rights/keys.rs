//! Somebody tries keys.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};

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
