//! Ordinary tools on the files of an object, unmodified: their exit code and their effect.

mod support;

use std::fs;
use std::process::Command;

use support::{Daemon, errno, gid, wait_until, write};
use uuid::Uuid;

/// A draft to play with.
struct Bench {
    daemon: Daemon,
    id: Uuid,
}

impl Bench {
    fn new() -> Bench {
        let daemon = Daemon::start(&["-o", "access_group=users,projects=games"]);
        let id = Uuid::new_v4();
        fs::create_dir(daemon.path(format!("instances/{id}"))).expect("a draft");
        Bench { daemon, id }
    }

    fn read(&self, file: &str) -> String {
        self.daemon.read(format!("instances/{}/{file}", self.id))
    }

    /// Runs a script in the object's directory; `$T` is a directory elsewhere.
    fn bash(&self, script: &str) -> (i32, String) {
        let elsewhere = self.daemon.scratch().join("elsewhere");
        fs::create_dir_all(&elsewhere).expect("a directory");
        let directory = self.daemon.path(format!("instances/{}", self.id));
        let mut command = Command::new("bash");
        command.args(["-c", script]).current_dir(directory).env("T", &elsewhere).env("LC_ALL", "C");
        let output = command.output().expect("bash runs");
        let said = [output.stdout, output.stderr].concat();
        (output.status.code().expect("an exit code"), String::from_utf8_lossy(&said).into_owned())
    }

    /// The tool succeeds and the number is then this.
    fn sets(&self, vcpus: u32, script: &str) {
        let (code, said) = self.bash(script);
        assert_eq!(code, 0, "{script}: {said}");
        assert_eq!(self.read("vcpus"), vcpus.to_string(), "{script}: {said}");
        assert_eq!(self.leftovers(), Vec::<String>::new(), "{script}");
    }

    /// The tool fails with this message, and nothing changes.
    fn fails(&self, message: &str, script: &str) {
        let before = self.read("vcpus");
        let (code, said) = self.bash(script);
        assert_ne!(code, 0, "{script}: {said}");
        assert!(said.contains(message), "{script}: {said}");
        assert_eq!(self.read("vcpus"), before, "{script}");
        assert_eq!(self.leftovers(), Vec::<String>::new(), "{script}");
    }

    /// What is in the directory and is no attribute.
    fn leftovers(&self) -> Vec<String> {
        let names = fs::read_dir(self.daemon.path(format!("instances/{}", self.id))).expect("a directory");
        let names = names.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"));
        let documented = include_str!("../docs/abi/instances.md");
        names.filter(|name| !documented.contains(&format!("`{name}`"))).collect()
    }
}

#[test]
fn whatever_writes_in_place_changes_the_value_or_reports_the_refusal() {
    let bench = Bench::new();
    bench.sets(2, "echo 2 > vcpus");
    bench.sets(3, "echo 3 >> vcpus");
    bench.sets(4, "set -C; echo 4 >| vcpus");
    bench.sets(5, "dash -c 'echo 5 > vcpus'");
    bench.sets(6, "{ printf 6; printf '\\n'; } > vcpus");
    bench.sets(7, "printf 7 > vcpus");
    bench.sets(8, "echo 8 | tee vcpus");
    bench.sets(9, "echo 9 | tee -a vcpus");
    bench.sets(10, "echo 10 | dd of=vcpus status=none");
    bench.sets(11, "echo 11 | dd of=vcpus status=none conv=notrunc,fsync");
    bench.sets(12, "echo 12 > $T/new; cp $T/new vcpus");
    bench.sets(13, "echo 13 > $T/new; chmod 660 $T/new; chgrp nogroup $T/new; cp -p $T/new vcpus");
    bench.sets(14, "echo 14 > $T/new; cat $T/new > vcpus");
    bench.sets(15, "echo 15 > $T/vcpus; rsync --checksum --inplace $T/vcpus vcpus");
    bench.sets(16, "python3 -c \"open('vcpus', 'w').write('16\\n')\"");
    bench.sets(17, "perl -e 'open(F, \">vcpus\"); print F \"17\\n\"; close(F) or die'");
    bench.sets(18, "printf '1s/.*/18/\\nw\\nq\\n' | ed -s vcpus");
    bench.fails("Invalid argument", "echo many > vcpus");
    bench.fails("I/O error", "dash -c 'echo many > vcpus'");
    bench.fails("Invalid argument", "echo many | tee vcpus");
    bench.fails("Invalid argument", "echo many | dd of=vcpus status=none");
    bench.fails("Invalid argument", "echo many > $T/bad; cp $T/bad vcpus");
    bench.fails("Numerical result out of range", "echo 9999 > $T/bad; cat $T/bad > vcpus");
    bench.fails("Invalid argument", "echo many > $T/bad; rsync --checksum --inplace $T/bad vcpus");
    bench.fails("cannot overwrite", "set -C; echo 3 > vcpus");
    bench.fails("No such file", "echo 3 > vcpu");
    bench.fails("No such file", "echo 3 > .hidden");
    bench.fails("Permission denied", "echo 3 > power_state");
    bench.fails("Operation not permitted", "install $T/new vcpus");
    bench.fails("Operation not permitted", "rm -f vcpus");
    bench.fails("Operation not permitted", "cp --remove-destination $T/new vcpus");
    assert!(bench.read("last_error").contains("state instead"), "{}", bench.read("last_error"));
}

#[test]
fn whatever_replaces_a_file_changes_the_value_and_leaves_nothing_behind() {
    let bench = Bench::new();
    bench.sets(2, "sed -i s/.*/2/ vcpus");
    bench.sets(3, "sed -i s/.*/3/ vcpus && sed -i s/3/4/ vcpus && grep -qx 4 vcpus && sed -i s/4/3/ vcpus");
    bench.sets(5, "echo 5 > $T/vcpus; rsync --checksum $T/vcpus .");
    bench.sets(6, "echo 6 > $T/vcpus; chmod 660 $T/vcpus; chgrp nogroup $T/vcpus; rsync -a --checksum $T/vcpus vcpus");
    bench.sets(7, "vim -es -u NONE -c '%s/.*/7/' -c wq vcpus");
    bench.sets(8, "vim -es -u NONE -c 'set backup writebackup backupdir=.' -c '%s/.*/8/' -c wq vcpus; rm -f vcpus~");
    bench.sets(
        9,
        "python3 -c \"
import os, tempfile
descriptor, name = tempfile.mkstemp(dir='.')
os.write(descriptor, b'9\\n'); os.fsync(descriptor); os.close(descriptor); os.replace(name, 'vcpus')\"",
    );
    bench.sets(10, "set -C; echo 10 > .new; mv .new vcpus");
    bench.sets(11, "set -C; echo 11 > vcpus.new; chmod 660 vcpus.new; mv -f vcpus.new vcpus");
    // One name in a thousand that perl makes looks like a misspelt attribute.
    bench.sets(12, "for try in 1 2 3; do perl -i -pe 's/.*/12/' vcpus; grep -qx 12 vcpus && break; done");
    // As Puppet does it: a directory reserves the name.
    bench.sets(
        13,
        "set -C; mkdir vcpus20261122-1-x.lock && echo 13 > vcpus20261122-1-x && rmdir vcpus20261122-1-x.lock && mv -f vcpus20261122-1-x vcpus",
    );
    // As Salt does it.
    bench.sets(14, "set -C; echo 14 > vcpus_aq4p92x && mv -f vcpus_aq4p92x vcpus");
    bench.fails("Operation not permitted", "mkdir vcpus.lock");
    bench.fails("not permitted", "mkdir vcpus1.lock && { mkdir vcpus1.lock/x || { rmdir vcpus1.lock; false; }; }");
    bench.fails("overwrite", "mkdir vcpus1.lock && { mv -T vcpus1.lock vcpus || { rmdir vcpus1.lock; false; }; }");
    bench.fails("Invalid argument", "sed -i s/.*/many/ vcpus");
    let last = bench.read("last_error");
    assert!(last.contains(" vcpus: EINVAL: write a plain decimal number"), "{last}");
    bench.fails("Numerical result out of range", "sed -i s/.*/9999/ vcpus");
    bench.fails("Invalid argument", "echo many > $T/vcpus; rsync --checksum $T/vcpus .");
    bench.fails("Permission denied", "sed -i s/.*/x/ power_state");
    bench.fails("No such file", "set -C; echo 3 > .new; mv .new vcpu || { rm .new; false; }");
}

#[test]
fn metadata_is_what_it_is_and_setting_it_to_that_succeeds() {
    let bench = Bench::new();
    for script in [
        "touch vcpus",
        "touch -d 2001-01-01 vcpus",
        "truncate -s 0 vcpus",
        "truncate -s 100 vcpus",
        "chmod 660 vcpus",
        "chown root:nogroup vcpus",
        "chmod 440 power_state",
        "sync vcpus",
    ] {
        bench.sets(1, script);
    }
    for script in ["chmod 600 vcpus", "chmod 444 vcpus", "chown 1 vcpus", "chgrp users vcpus", "chmod 777 ."] {
        bench.fails("Operation not permitted", script);
    }
    for script in
        ["ln vcpus .x", "mkfifo .x", "mkdir .x", "ln -s x .x", "mkdir snapshots", "mknod .x c 1 3", "ln -s a vda"]
    {
        bench.fails("not permitted", script);
    }
    bench.fails("Operation not supported", "python3 -c \"import os; os.setxattr('vcpus', 'user.x', b'1')\"");
}

#[test]
fn whatever_reads_reads_the_whole_tree_without_complaint() {
    let bench = Bench::new();
    let daemon = &bench.daemon;
    let running = daemon.domain("running");
    daemon.domain_does(running, "start", "active");
    let image = daemon.image();
    bench.sets(1, "test $(stat -c %s vcpus) = $(wc -c < vcpus) && head -n 1 vcpus && tail -n 1 vcpus && md5sum vcpus");
    let clean = |script: &str| {
        let (code, said) = bench.bash(&format!("cd ../..; {script}"));
        assert_eq!((code, said.as_str()), (0, ""), "{script}");
    };
    clean("find . > $T/names");
    clean("ls -lR . > $T/names");
    clean("du -s . > $T/sizes");
    clean("find . -type f -print0 | xargs -0 stat > $T/stat");
    clean("find . -type l -print0 | xargs -0 stat -L > $T/stat");
    clean("tar cf $T/tree.tar .");
    clean("rsync -a . $T/copy");
    // A console that cannot be had says so.
    clean("find . -type f ! -name console.log ! -path '*/console/*' -print0 | xargs -0 cat > $T/text");
    clean("df . > $T/df");
    clean("! grep -rs --exclude=console.log no-such-text .");
    let copy = daemon.scratch().join("elsewhere/copy");
    for file in [format!("instances/{running}/state"), "README".to_owned(), format!("images/{image}/data")] {
        let (copied, original) = (fs::read(copy.join(&file)), fs::read(daemon.path(&file)));
        assert_eq!(copied.expect("copied"), original.expect("read"), "{file}");
    }
    // The one file that can say that there is nothing to read.
    let console = |id: uuid::Uuid| daemon.path(format!("instances/{id}/console.log"));
    wait_until("the definition, which names no log, is fetched", || {
        errno(fs::read(console(running))) == libc::EOPNOTSUPP
    });
}

#[test]
fn whoever_follows_the_console_of_a_draft_waits_for_its_first_word() {
    let bench = Bench::new();
    let draft = uuid::Uuid::new_v4();
    fs::create_dir(bench.daemon.path(format!("instances/{draft}"))).expect("a draft");
    let console = fs::read(bench.daemon.path(format!("instances/{draft}/console.log")));
    assert_eq!(console.expect("it is empty, not an error"), b"");
}

#[test]
fn a_replaced_file_is_the_attribute_again_and_a_watch_on_it_goes_on() {
    let bench = Bench::new();
    let path = bench.daemon.path(format!("instances/{}/vcpus", bench.id));
    let inode = |path: &std::path::Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).expect("attributes"));
    let before = inode(&path);
    let inotify = nix::sys::inotify::Inotify::init(nix::sys::inotify::InitFlags::IN_NONBLOCK).expect("inotify");
    let flags = nix::sys::inotify::AddWatchFlags::IN_MODIFY
        | nix::sys::inotify::AddWatchFlags::IN_DELETE_SELF
        | nix::sys::inotify::AddWatchFlags::IN_IGNORED;
    inotify.add_watch(&path, flags).expect("a watch");
    let modified = |what: &str| {
        wait_until(what, || {
            let events = inotify.read_events().unwrap_or_default();
            let ended = nix::sys::inotify::AddWatchFlags::IN_IGNORED;
            assert!(!events.iter().any(|event| event.mask.contains(ended)), "{what}: the watch ended");
            events.iter().any(|event| event.mask.contains(nix::sys::inotify::AddWatchFlags::IN_MODIFY))
        });
    };
    bench.sets(2, "sed -i s/.*/2/ vcpus");
    assert_eq!(inode(&path), before);
    modified("the first replacement");
    bench.sets(3, "sed -i s/.*/3/ vcpus");
    assert_eq!(inode(&path), before);
    modified("the second replacement");
    write(&path, b"4\n").expect("a plain write");
    modified("a write after that");
    assert_eq!(bench.read("vcpus"), "4");
}

#[test]
fn a_temporary_file_has_a_quota_a_limit_and_one_owner() {
    let bench = Bench::new();
    let (owner, member) = (
        support::User { uid: 2001, gid: gid("games"), groups: vec![gid("users")] },
        support::User { uid: 2002, gid: 2002, groups: vec![gid("users"), gid("games")] },
    );
    for (file, value) in [("owner", "2001"), ("project", "games")] {
        bench.daemon.set(format!("instances/{}/{file}", bench.id), value);
    }
    let path = |name: &str| bench.daemon.path(format!("instances/{}/{name}", bench.id));
    let create = |name: &str| fs::OpenOptions::new().read(true).write(true).create_new(true).open(path(name));
    owner.act(|| {
        use std::os::unix::fs::FileExt;
        let file = create(".large").expect("a temporary file");
        file.write_all_at(b"x", (1 << 20) - 1).expect("a mebibyte");
        assert_eq!(errno(file.write_all_at(b"x", 1 << 20)), libc::EFBIG);
        assert_eq!(errno(file.set_len((1 << 20) + 1)), libc::EFBIG);
        assert_eq!(errno(fs::rename(path(".large"), path("description"))), libc::EINVAL, "no value is so long");
        for index in 1..16 {
            create(&format!(".{index}")).expect("within the quota");
        }
        assert_eq!(errno(create(".more")), libc::EDQUOT);
        fs::write(path(".1"), "mine\n").expect("written");
        fs::remove_file(path(".2")).expect("his own");
        create(".more").expect("there is room again");
    });
    member.act(|| {
        let file = create(".other").expect("another user has his own quota");
        drop(file);
        assert_eq!(errno(fs::read(path(".1"))), libc::EACCES);
        assert_eq!(errno(fs::OpenOptions::new().write(true).open(path(".1"))), libc::EACCES);
        assert_eq!(errno(fs::rename(path(".1"), path("description"))), libc::EPERM);
        assert_eq!(errno(fs::remove_file(path(".1"))), libc::EPERM);
        assert_eq!(errno(fs::rename(path(".other"), path(".1"))), libc::EPERM, "it would be lost");
        fs::write(path(".other"), "0\n").expect("written");
        assert_eq!(errno(fs::rename(path(".other"), path("owner"))), libc::EPERM, "only root gives away");
        assert_eq!(errno(fs::rename(path(".other"), path("created_at"))), libc::EACCES);
        assert_eq!(errno(fs::rename(path(".other"), path("sate"))), libc::ENOENT);
        let elsewhere = bench.daemon.path("instances").join(".other");
        assert_eq!(errno(fs::rename(path(".other"), elsewhere)), libc::EPERM, "no other directory");
        fs::rename(path(".other"), path("locked")).expect("what he may write he may replace");
    });
    assert_eq!(bench.read("owner"), "2001");
    owner.act(|| fs::rename(path(".1"), path("description"))).expect("his own");
    assert_eq!(bench.read("description"), "mine");
}
