//! Images, as people make them: with cp, dd, rsync and qemu-img.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use uuid::Uuid;

use crate::support::{Daemon, User, errno, gid, wait_until};

pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A qcow2 file with a mebibyte of data in 8 MiB.
fn qcow2(daemon: &Daemon) -> PathBuf {
    let path = daemon.scratch().join("source.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&path), "8M"]);
    run("qemu-io", &["-c", "write -P 5 0 1M", text(&path)]);
    path
}

pub fn draft(daemon: &Daemon) -> Uuid {
    let id = Uuid::new_v4();
    fs::create_dir(daemon.path(format!("images/{id}"))).expect("a draft");
    id
}

/// Commits a draft, and returns when that has ended, also when it was answered before.
fn commit(daemon: &Daemon, id: Uuid) -> i32 {
    let answer = errno(daemon.write(format!("images/{id}/state"), "active"));
    wait_until("it has ended", || daemon.read(format!("images/{id}/task")).is_empty());
    answer
}

#[test]
fn every_copying_tool_fills_a_draft_and_the_active_image_is_the_same_bytes_for_ever() {
    let daemon = Daemon::start(&[]);
    let source = qcow2(&daemon);
    let bytes = fs::read(&source).expect("a file");
    let sum = run("sha512sum", &[text(&source)]);
    let tools: [&dyn Fn(&str); 5] = [
        &|data| drop(run("cp", &["--sparse=always", text(&source), data])),
        &|data| drop(run("cp", &["--sparse=never", text(&source), data])),
        &|data| drop(run("rsync", &["--inplace", text(&source), data])),
        &|data| {
            let (from, to) = (format!("if={}", text(&source)), format!("of={data}"));
            drop(run("dd", &[&from, &to, "bs=64k", "conv=notrunc,fsync", "status=none"]));
        },
        &|data| {
            drop(run(
                "bash",
                &["-c", &format!("head -c 100000 {0} > {data}; tail -c +100001 {0} >> {data}", text(&source))],
            ))
        },
    ];
    for (index, tool) in tools.iter().enumerate() {
        let id = draft(&daemon);
        let data = daemon.path(format!("images/{id}/data"));
        tool(text(&data));
        assert!(fs::read(&data).expect("a draft is readable") == bytes, "tool {index}");
        assert_eq!(commit(&daemon, id), 0, "tool {index}");
        assert_eq!(daemon.read(format!("images/{id}/state")), "active");
        assert_eq!(daemon.read(format!("images/{id}/disk_format")), "qcow2");
        assert_eq!(daemon.read(format!("images/{id}/virtual_size_bytes")), (8 << 20).to_string());
        assert_eq!(daemon.read(format!("images/{id}/size_bytes")), bytes.len().to_string());
        assert!(sum.starts_with(&format!("{} ", daemon.read(format!("images/{id}/sha512")))), "tool {index}");
        assert!(fs::read(&data).expect("readable") == bytes, "tool {index}");
        wait_until("the kernel knows", || fs::metadata(&data).expect("attributes").mode() & 0o7777 == 0o440);
        let metadata = fs::metadata(&data).expect("attributes");
        assert_eq!((metadata.mode() & 0o7777, metadata.len()), (0o440, bytes.len() as u64));
        assert_eq!(errno(OpenOptions::new().write(true).open(&data)), libc::EACCES);
        assert_eq!(errno(OpenOptions::new().append(true).open(&data)), libc::EACCES);
        assert_eq!(errno(nix_truncate(&data)), libc::EACCES);
        assert_eq!(errno(fs::remove_file(&data)), libc::EPERM);
        let writable = std::os::unix::fs::PermissionsExt::from_mode(0o660);
        assert_eq!(errno(fs::set_permissions(&data, writable)), libc::EPERM);
        assert_eq!(errno(daemon.write(format!("images/{id}/disk_format"), "raw")), libc::EINVAL, "frozen");
        assert_eq!(errno(daemon.write(format!("images/{id}/state"), "deleted")), libc::EPERM);
        assert!(fs::read(&data).expect("readable") == bytes, "tool {index}");
    }
}

fn nix_truncate(path: &Path) -> std::io::Result<()> {
    nix::unistd::truncate(path, 0).map_err(std::io::Error::from)
}

#[test]
fn qemu_img_writes_into_a_draft_as_into_any_file() {
    let daemon = Daemon::start(&[]);
    let source = qcow2(&daemon);
    let id = draft(&daemon);
    let data = daemon.path(format!("images/{id}/data"));
    run("qemu-img", &["convert", "-O", "qcow2", text(&source), text(&data)]);
    assert_eq!(commit(&daemon, id), 0);
    run("qemu-img", &["compare", text(&source), text(&data)]);
    let id = draft(&daemon);
    let data = daemon.path(format!("images/{id}/data"));
    run("truncate", &["-s", "8M", text(&data)]);
    run("qemu-img", &["convert", "-n", "-O", "raw", text(&source), text(&data)]);
    assert_eq!(commit(&daemon, id), 0);
    assert_eq!(daemon.read(format!("images/{id}/disk_format")), "raw");
    run("qemu-img", &["compare", "-F", "raw", text(&source), text(&data)]);
}

/// Bytes that a file takes on its disk.
fn allocated(path: &Path) -> u64 {
    fs::metadata(path).expect("attributes").blocks() * 512
}

/// 64 MiB with a mebibyte of data at the beginning, in the middle and at the end.
fn sparse(directory: &Path) -> PathBuf {
    let path = directory.join("sparse");
    let file = File::create(&path).expect("made");
    file.set_len(64 << 20).expect("extended");
    for at in [0, 31 << 20, 63 << 20] {
        file.write_all_at(&[9; 1 << 20], at).expect("written");
    }
    path
}

#[test]
fn a_sparse_image_is_sparse_on_the_way_in_on_the_disk_and_on_the_way_out() {
    // On a disk: memory may know no holes.
    let directory = tempfile::tempdir_in("/var/tmp").expect("a directory");
    let state = directory.path().join("state");
    let daemon = Daemon::start_in(text(&state), &[]);
    let source = sparse(directory.path());
    let (from, sum) = (text(&source), run("sha512sum", &[text(&source)]));
    let tools: [&dyn Fn(&str); 7] = [
        &|data| drop(run("cp", &[from, data])),
        &|data| drop(run("cp", &["--sparse=always", from, data])),
        &|data| drop(run("rsync", &["--inplace", "--sparse", from, data])),
        &|data| drop(run("dd", &[&format!("if={from}"), &format!("of={data}"), "bs=1M", "conv=sparse", "status=none"])),
        &|data| drop(run("qemu-img", &["convert", "-O", "raw", from, data])),
        &|data| {
            run("truncate", &["-s", "64M", data]);
            run("qemu-img", &["convert", "-n", "-W", "-f", "raw", "-O", "raw", from, data]);
        },
        &|data| {
            run("cp", &["--sparse=never", from, data]);
            run("fallocate", &["--dig-holes", data]);
        },
    ];
    for (index, tool) in tools.iter().enumerate() {
        let id = draft(&daemon);
        let data = daemon.path(format!("images/{id}/data"));
        tool(text(&data));
        run("cmp", &[from, text(&data)]);
        let copy = directory.path().join("copy");
        run("cp", &[text(&data), text(&copy)]);
        assert!(allocated(&copy) < 16 << 20, "tool {index}: a copy of the draft takes {}", allocated(&copy));
        daemon.set(format!("images/{id}/disk_format"), "raw");
        assert_eq!(commit(&daemon, id), 0, "tool {index}");
        assert!(sum.starts_with(&daemon.read(format!("images/{id}/sha512"))), "tool {index}");
        let stored = state.join("images").join(id.to_string()).join("data");
        assert!(allocated(&stored) < 16 << 20, "tool {index}: {} on the disk", allocated(&stored));
        wait_until("stat says so", || allocated(&data) == allocated(&stored));
        fs::remove_file(&copy).expect("removed");
        run("cp", &[text(&data), text(&copy)]);
        run("cmp", &[from, text(&copy)]);
        assert!(allocated(&copy) < 16 << 20, "tool {index}: a copy of the image takes {}", allocated(&copy));
        let map = run("qemu-img", &["map", "-f", "raw", "--output=json", text(&data)]);
        assert!(map.contains("\"data\": false"), "tool {index}: {map}");
        fs::remove_file(&copy).expect("removed");
    }
}

#[test]
fn a_draft_takes_what_a_file_takes() {
    let directory = tempfile::tempdir_in("/var/tmp").expect("a directory");
    let daemon = Daemon::start_in(text(&directory.path().join("state")), &[]);
    let id = draft(&daemon);
    let data = daemon.path(format!("images/{id}/data"));
    let path = text(&data);
    run("truncate", &["-s", "10G", path]);
    let length = |path| fs::metadata(path).expect("attributes").len();
    assert_eq!((length(path), allocated(&data)), (10 << 30, 0));
    run("truncate", &["-s", "1M", path]);
    run("fallocate", &["--keep-size", "--length", "2M", path]);
    assert_eq!((length(path), allocated(&data)), (1 << 20, 2 << 20));
    run("fallocate", &["--length", "3M", path]);
    assert_eq!(length(path), 3 << 20);
    run("dd", &["if=/dev/urandom", &format!("of={path}"), "bs=1M", "count=4", "seek=4", "conv=notrunc", "status=none"]);
    assert_eq!(length(path), 8 << 20);
    run("fallocate", &["--punch-hole", "--offset", "4M", "--length", "1M", path]);
    run("fallocate", &["--zero-range", "--offset", "5M", "--length", "1M", path]);
    let bytes = fs::read(&data).expect("readable");
    assert!(bytes[4 << 20..6 << 20].iter().all(|byte| *byte == 0) && bytes[6 << 20..].iter().any(|byte| *byte != 0));
    let collapse = Command::new("fallocate").args(["--collapse-range", "--length", "1M", path]).output().expect("runs");
    assert!(!collapse.status.success());
    assert_eq!(daemon.read(format!("images/{id}/last_error")), "ok", "a tool that tries is no failure");
    let other = draft(&daemon);
    let copy = daemon.path(format!("images/{other}/data"));
    run("cp", &["--sparse=never", path, text(&copy)]);
    run("cmp", &[path, text(&copy)]);
    let qcow2 = draft(&daemon);
    let made = daemon.path(format!("images/{qcow2}/data"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&made), "64M"]);
    run("qemu-io", &["-c", "write -P 7 0 40M", "-c", "discard 0 20M", "-c", "write -z 30M 5M", text(&made)]);
    for id in [other, qcow2] {
        assert_eq!(commit(&daemon, id), 0);
        let data = daemon.path(format!("images/{id}/data"));
        let sum = run("sha512sum", &[text(&data)]);
        assert!(sum.starts_with(&daemon.read(format!("images/{id}/sha512"))));
    }
    run("qemu-img", &["check", "-q", text(&made)]);
    assert!(run("qemu-img", &["info", text(&made)]).contains("file format: qcow2"));
}

#[test]
fn nothing_changes_bytes_while_and_after_they_are_committed() {
    let daemon = Daemon::start(&["-o", "settle=0s"]);
    let id = draft(&daemon);
    let data = daemon.path(format!("images/{id}/data"));
    fs::write(&data, vec![3; 96 << 20]).expect("written");
    let first = OpenOptions::new().read(true).write(true).open(&data).expect("opened");
    let second = first.try_clone().expect("duplicated");
    // A private mapping brings bytes of the draft into the page cache.
    let read = || {
        run(
            "python3",
            &[
                "-c",
                "import mmap, sys; f = open(sys.argv[1], 'rb'); print(mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)[5])",
                text(&data),
            ],
        )
    };
    assert_eq!(read().trim(), "3");
    drop(first);
    daemon.set(format!("images/{id}/disk_format"), "raw");
    daemon.set(format!("images/{id}/state"), "active");
    wait_until("it is refused", || daemon.read(format!("images/{id}/last_error")).contains("open for writing"));
    assert_eq!(daemon.read(format!("images/{id}/state")), "draft");
    second.write_all_at(&[4; 16], 0).expect("the duplicate still writes");
    drop(second);
    daemon.set(format!("images/{id}/state"), "active");
    let mut refused = 0;
    while daemon.read(format!("images/{id}/task")) == "saving" {
        let cut = errno(nix_truncate(&data));
        let opened = errno(OpenOptions::new().write(true).open(&data));
        // The task may have ended since it was looked at.
        for error in [cut, opened] {
            assert!(matches!(error, libc::EBUSY | libc::EACCES | libc::ESTALE), "{error}");
            refused += u32::from(error == libc::EBUSY);
        }
    }
    assert!(refused > 0, "the commit was over too soon");
    assert_eq!(daemon.read(format!("images/{id}/state")), "active");
    wait_until("it is frozen", || fs::metadata(&data).expect("attributes").mode() & 0o777 == 0o440);
    assert_eq!(errno(nix_truncate(&data)), libc::EACCES);
    assert_eq!(read().trim(), "4", "active data can be mapped, and is what was written last");
    let bytes = fs::read(&data).expect("readable");
    assert!(bytes.len() == 96 << 20 && bytes[..16] == [4; 16] && bytes[16..].iter().all(|byte| *byte == 3));
    let sum = run("sha512sum", &[text(&data)]);
    assert!(sum.starts_with(&daemon.read(format!("images/{id}/sha512"))));
}

#[test]
fn several_writers_in_any_order_give_one_image() {
    let daemon = Daemon::start(&[]);
    let id = draft(&daemon);
    let data = daemon.path(format!("images/{id}/data"));
    let part = |index: u64| vec![index as u8 + 1; 300_000];
    thread::scope(|scope| {
        for writer in 0..4u64 {
            let (data, part) = (&data, &part);
            scope.spawn(move || {
                let file = OpenOptions::new().write(true).open(data).expect("opened");
                for index in (0..100).filter(|index| index % 4 == writer) {
                    file.write_all_at(&part(index), index * 300_000).expect("written");
                }
            });
        }
    });
    let expected: Vec<u8> = (0..100).flat_map(part).collect();
    assert!(fs::read(&data).expect("a draft is readable") == expected);
    daemon.set(format!("images/{id}/disk_format"), "raw");
    assert_eq!(commit(&daemon, id), 0);
    let sum = run("sha512sum", &[text(&data)]);
    assert!(sum.starts_with(&daemon.read(format!("images/{id}/sha512"))));
}

#[test]
fn a_hostile_or_broken_draft_is_refused_with_a_reason_and_stays_a_draft() {
    let daemon = Daemon::start(&[]);
    let source = qcow2(&daemon);
    let at = |name: &str| daemon.scratch().join(name);
    let secret = at("secret");
    fs::write(&secret, vec![b's'; 1 << 20]).expect("a secret");
    let (backing, external, vmdk) = (at("backing.qcow2"), at("external.qcow2"), at("image.vmdk"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", text(&secret), "-F", "raw", text(&backing)]);
    let option = format!("data_file={},data_file_raw=on", text(&at("external.raw")));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &option, text(&external), "8M"]);
    run("qemu-img", &["convert", "-O", "vmdk", text(&source), text(&vmdk)]);
    let whole = fs::read(&source).expect("a file");
    let plain = vec![7; 100_000];
    let cases = [
        (fs::read(&backing).expect("a file"), None, "backing file"),
        (fs::read(&external).expect("a file"), None, "external file"),
        (fs::read(&vmdk).expect("a file"), None, "VMDK"),
        (fs::read(&backing).expect("a file"), Some("raw"), "qcow2 header"),
        (plain, Some("qcow2"), "not qcow2"),
        (whole.clone(), Some("raw"), "qcow2 header"),
        (whole[..100_000].to_vec(), None, "past the end"),
        (whole[..whole.len() / 2].to_vec(), None, "cut short"),
        (whole[..100].to_vec(), None, ""),
        (Vec::new(), None, "empty"),
    ];
    for (bytes, format, reason) in cases {
        let id = draft(&daemon);
        let data = daemon.path(format!("images/{id}/data"));
        fs::write(&data, &bytes).expect("written");
        if let Some(format) = format {
            daemon.set(format!("images/{id}/disk_format"), format);
        }
        assert_eq!(commit(&daemon, id), libc::EINVAL, "{reason}");
        let last = daemon.read(format!("images/{id}/last_error"));
        assert!(last.contains(" state: EINVAL: ") && last.contains(reason), "{reason}: {last}");
        assert_eq!(daemon.read(format!("images/{id}/state")), "draft", "{reason}");
        assert!(fs::read(&data).expect("readable") == bytes, "{reason}: the data is kept");
        fs::write(&data, &whole).expect("written again");
        daemon.set(format!("images/{id}/disk_format"), "qcow2");
        assert_eq!(commit(&daemon, id), 0, "{reason}: mended");
        assert_eq!(daemon.read(format!("images/{id}/last_error")), "ok");
    }
}

#[test]
fn a_draft_that_somebody_still_writes_is_busy_and_can_be_committed_after_the_close() {
    let daemon = Daemon::start(&[]);
    let bytes = fs::read(qcow2(&daemon)).expect("a file");
    let id = draft(&daemon);
    let data = daemon.path(format!("images/{id}/data"));
    let mut file = File::create(&data).expect("opened");
    file.write_all(&bytes).expect("written");
    assert_eq!(commit(&daemon, id), libc::EBUSY);
    let last = daemon.read(format!("images/{id}/last_error"));
    assert!(last.contains("open for writing"), "{last}");
    assert_eq!(daemon.read(format!("images/{id}/state")), "draft");
    file.write_all_at(&bytes, 0).expect("it can still be written");
    drop(file);
    assert_eq!(commit(&daemon, id), 0);
    assert!(fs::read(&data).expect("readable") == bytes);
}

#[test]
fn a_draft_survives_the_end_of_the_daemon_in_the_middle_of_writing() {
    let mut daemon = Daemon::start(&[]);
    let bytes = fs::read(qcow2(&daemon)).expect("a file");
    let half = bytes.len() / 2;
    let id = draft(&daemon);
    let data = daemon.path(format!("images/{id}/data"));
    {
        let mut file = File::create(&data).expect("opened");
        file.write_all(&bytes[..half]).expect("written");
        file.sync_all().expect("synced");
        daemon.kill();
        assert_ne!(errno(file.write_all(&bytes[half..])), 0, "nobody is there");
    }
    daemon.spawn();
    assert_eq!(daemon.read(format!("images/{id}/state")), "draft");
    assert!(fs::read(&data).expect("readable") == bytes[..half], "what was written is there");
    assert_eq!(commit(&daemon, id), libc::EINVAL, "half an image is none");
    let mut file = OpenOptions::new().append(true).open(&data).expect("opened");
    file.write_all(&bytes[half..]).expect("completed");
    drop(file);
    assert_eq!(commit(&daemon, id), 0);
    assert!(fs::read(&data).expect("readable") == bytes);
    let sum = run("sha512sum", &[text(&data)]);
    assert!(sum.starts_with(&daemon.read(format!("images/{id}/sha512"))));
}

#[test]
fn a_daemon_that_ends_during_a_commit_leaves_a_draft_or_an_active_image_never_half() {
    let mut daemon = Daemon::start(&["-o", "settle=0s"]);
    let size: usize = 48 << 20;
    let words = (0..size as u64 / 8).map(|word| word.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let bytes = words.flat_map(u64::to_le_bytes).collect::<Vec<_>>();
    let sum = {
        let path = daemon.scratch().join("large");
        fs::write(&path, &bytes).expect("written");
        run("sha512sum", &[text(&path)])
    };
    let mut in_time = 0;
    for round in 0..4 {
        let id = draft(&daemon);
        let data = daemon.path(format!("images/{id}/data"));
        run("cp", &[text(&daemon.scratch().join("large")), text(&data)]);
        daemon.set(format!("images/{id}/disk_format"), "raw");
        daemon.set(format!("images/{id}/state"), "active");
        let during = daemon.read(format!("images/{id}/task")) == "saving";
        if round > 0 {
            wait_until("some progress", || {
                let progress = daemon.read(format!("images/{id}/progress"));
                progress.is_empty() || progress.parse::<u32>().expect("a number") >= round * 25
            });
        }
        daemon.kill();
        in_time += u32::from(during);
        daemon.spawn();
        wait_until("recovery ends", || daemon.read(format!("images/{id}/task")).is_empty());
        let state = daemon.read(format!("images/{id}/state"));
        assert!(matches!(state.as_str(), "draft" | "active"), "{state}");
        assert!(fs::read(&data).expect("readable") == bytes, "round {round}, {state}");
        if state == "draft" {
            daemon.set(format!("images/{id}/state"), "active");
            wait_until("it is active", || daemon.read(format!("images/{id}/state")) == "active");
        }
        assert!(sum.starts_with(&daemon.read(format!("images/{id}/sha512"))));
        wait_until("it is frozen", || fs::metadata(&data).expect("attributes").mode() & 0o777 == 0o440);
    }
    assert!(in_time > 0, "no commit was interrupted");
}

#[test]
fn one_user_has_a_hundred_drafts_and_another_his_own() {
    let daemon = Daemon::start(&["-o", "access_group=users"]);
    let user = User { uid: 2001, gid: 2001, groups: vec![gid("users")] };
    let make = |class: &str| {
        let id = Uuid::new_v4();
        fs::create_dir(daemon.path(format!("{class}/{id}"))).map(|()| id)
    };
    let last = user.act(|| {
        let mut last = None;
        for index in 0..100 {
            last = Some(make(["images", "instances"][index % 2]).expect("within the quota"));
        }
        assert_eq!(errno(make("images")), libc::EDQUOT);
        assert_eq!(errno(make("instances")), libc::EDQUOT);
        last.expect("one")
    });
    let other = User { uid: 2002, ..user.clone() };
    other.act(|| make("images").expect("another user"));
    make("images").expect("root");
    user.act(|| {
        let said = fs::read_to_string(daemon.path("last_error")).expect("readable");
        assert!(said.contains("EDQUOT"), "{said}");
        fs::remove_dir(daemon.path(format!("instances/{last}"))).expect("discarded");
        make("images").expect("there is room again");
    });
}

#[test]
fn a_large_image_is_read_by_many_at_once() {
    let daemon = Daemon::start(&[]);
    let source = qcow2(&daemon);
    let bytes = fs::read(&source).expect("a file");
    let id = draft(&daemon);
    let data = daemon.path(format!("images/{id}/data"));
    run("cp", &[text(&source), text(&data)]);
    assert_eq!(commit(&daemon, id), 0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut read = Vec::new();
                File::open(&data).expect("opened").read_to_end(&mut read).expect("read");
                assert!(read == bytes);
            });
        }
    });
}
