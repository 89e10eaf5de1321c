//! The directory backend's volumes, with real files and qemu-img.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use instancefs::block::directory::{DirectoryBackend, takes_marks};
use instancefs::block::{BlockBackend, BlockError, DataRecord, DiskSource, Format, NewData, Source, VolumeData, Watch};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;
use uuid::Uuid;

const MEBIBYTE: u64 = 1 << 20;
const FORMATS: [Format; 2] = [Format::Raw, Format::Qcow2];

struct Bed {
    directory: TempDir,
    backend: DirectoryBackend,
}

fn bed() -> Bed {
    let directory = TempDir::new().unwrap();
    let managed = directory.path().join("managed");
    fs::create_dir(&managed).unwrap();
    let backend = DirectoryBackend::new(directory.path().join("volumes"), None).managing(vec![managed]);
    Bed { directory, backend }
}

fn uninterrupted(_percent: u8) -> Result<(), BlockError> {
    Ok(())
}

const ON: Watch<'static> = &uninterrupted;

fn new(format: Format, size_bytes: u64, source: Source<'_>) -> NewData<'_> {
    NewData {
        volume: Uuid::new_v4(),
        snapshot: None,
        operation: Uuid::new_v4(),
        size_bytes,
        format: Some(format),
        source,
    }
}

impl Bed {
    fn path(&self, record: &DataRecord) -> PathBuf {
        self.directory.path().join("volumes").join(&record.reference)
    }

    /// A volume with content in its second half.
    fn written(&self, format: Format) -> DataRecord {
        let new = new(format, 4 * MEBIBYTE, Source::Empty);
        self.backend.volumes().create_data(&new, ON).unwrap();
        let record = self.backend.volumes().plan_data(&new);
        write_pattern(&self.path(&record), format);
        record
    }

    /// What lies below the volumes' directory.
    fn files(&self) -> Vec<PathBuf> {
        let list = |path: &Path| fs::read_dir(path).into_iter().flatten().map(|entry| entry.unwrap().path());
        let owners: Vec<_> = list(&self.directory.path().join("volumes")).collect();
        owners.iter().flat_map(|owner| list(owner)).chain(owners.clone()).collect()
    }
}

fn write_pattern(path: &Path, format: Format) {
    let write = ["-c", "write -P 0x5a 2M 1M"];
    let output = Command::new("qemu-io").args(["-f", format.word()]).args(write).arg(path).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

fn compare(one: (&Path, Format), other: (&Path, Format)) -> bool {
    let formats = ["-f", one.1.word(), "-F", other.1.word()];
    // Trailing zeros of a larger one do not count.
    let status = Command::new("qemu-img").args(["compare", "-q"]).args(formats).args([one.0, other.0]).status();
    status.unwrap().success()
}

#[test]
fn an_empty_volume_has_its_size_its_mark_and_no_room_on_the_disk() {
    let bed = bed();
    for format in FORMATS {
        let new = new(format, 1 << 40, Source::Empty);
        let made = bed.backend.volumes().create_data(&new, ON).unwrap();
        assert_eq!((made.size_bytes, made.format), (1 << 40, format));
        let record = bed.backend.volumes().plan_data(&new);
        let path = bed.path(&record);
        assert!(path.metadata().unwrap().blocks() * 512 < MEBIBYTE);
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(path.parent().unwrap().metadata().unwrap().permissions().mode() & 0o7777, 0o711);
        assert_eq!(bed.backend.volumes().create_data(&new, ON).unwrap(), made, "the same operation finds what it made");
        let data = VolumeData::Ours(record);
        assert_eq!(bed.backend.volumes().examine(&data).unwrap(), made);
        assert_eq!(bed.backend.volumes().source(&data), DiskSource::File(path));
    }
    let odd = new(Format::Raw, 1000, Source::Empty);
    assert_eq!(bed.backend.volumes().create_data(&odd, ON).unwrap().size_bytes, 1024, "whole sectors");
}

#[test]
fn copies_hold_the_same_bytes_in_every_format_and_grow() {
    let bed = bed();
    let image = bed.directory.path().join("image");
    for from in FORMATS {
        let source = bed.written(from);
        let status = Command::new("cp").arg("--sparse=always").args([&bed.path(&source), &image]).status();
        assert!(status.unwrap().success());
        let data = VolumeData::Ours(source.clone());
        let elsewhere = DiskSource::File(image.clone());
        for to in FORMATS {
            let origins = [
                Source::Image(&image, from),
                Source::Volume(&data),
                Source::Snapshot(&source),
                Source::Elsewhere(&elsewhere, from),
            ];
            for origin in origins {
                let new = new(to, 9 * MEBIBYTE, origin);
                assert_eq!(bed.backend.volumes().create_data(&new, ON).unwrap().size_bytes, 9 * MEBIBYTE);
                let record = bed.backend.volumes().plan_data(&new);
                let copy = bed.path(&record);
                assert!(compare((&copy, to), (&bed.path(&source), from)), "{origin:?} to {to:?}");
                assert!(copy.metadata().unwrap().blocks() * 512 < 2 * MEBIBYTE, "{origin:?} to {to:?} is sparse");
                bed.backend.volumes().remove_data(&record).unwrap();
            }
        }
    }
}

#[test]
fn a_snapshot_lies_beside_its_volume_and_outlives_what_is_written_then() {
    let bed = bed();
    let volume = bed.written(Format::Qcow2);
    let owner: Uuid = volume.reference.split('/').next().unwrap().parse().unwrap();
    let data = VolumeData::Ours(volume.clone());
    let source = Source::Volume(&data);
    let new = NewData { volume: owner, snapshot: Some(Uuid::new_v4()), ..new(Format::Qcow2, 4 * MEBIBYTE, source) };
    bed.backend.volumes().create_data(&new, ON).unwrap();
    let snapshot = bed.backend.volumes().plan_data(&new);
    assert_eq!(bed.path(&snapshot).parent(), bed.path(&volume).parent());
    let before = fs::read(bed.path(&snapshot)).unwrap();
    let output = Command::new("qemu-io").args(["-c", "write 0 1M"]).arg(bed.path(&volume)).output().unwrap();
    assert!(output.status.success());
    assert!(!compare((&bed.path(&snapshot), Format::Qcow2), (&bed.path(&volume), Format::Qcow2)));
    assert_eq!(fs::read(bed.path(&snapshot)).unwrap(), before);
    bed.backend.volumes().remove_data(&snapshot).unwrap();
    assert!(bed.path(&volume).exists());
    bed.backend.volumes().remove_data(&volume).unwrap();
    bed.backend.volumes().remove_data(&volume).unwrap();
    assert_eq!(bed.files(), Vec::<PathBuf>::new());
}

#[test]
fn what_somebody_writes_to_is_not_copied() {
    let bed = bed();
    let source = bed.written(Format::Raw);
    let data = VolumeData::Ours(source.clone());
    let open = |writes: bool| {
        let file = OpenOptions::new().read(true).write(writes).open(bed.path(&source)).unwrap();
        Command::new("sleep").arg("60").stdin(Stdio::from(file)).spawn().unwrap()
    };
    for (writes, to) in [(true, Format::Raw), (true, Format::Qcow2), (false, Format::Raw)] {
        let mut child = open(writes);
        let result = bed.backend.volumes().create_data(&new(to, 4 * MEBIBYTE, Source::Volume(&data)), ON);
        child.kill().unwrap();
        child.wait().unwrap();
        match (writes, result) {
            (true, Err(BlockError::InUse(words))) => assert!(words.contains("sleep"), "{words}"),
            (false, Ok(_)) => {}
            (_, other) => panic!("{writes} {to:?}: {other:?}"),
        }
    }
    let own = File::options().write(true).open(bed.path(&source)).unwrap();
    let meanwhile = AtomicU8::new(0);
    let watch = |_percent: u8| {
        meanwhile.fetch_add(1, Ordering::Relaxed);
        // Reads as zeros where there were zeros, so that only the time tells.
        own.write_all_at(&[0], 0).map_err(|error| BlockError::Failed(error.to_string()))
    };
    let refused = bed.backend.volumes().create_data(&new(Format::Qcow2, 4 * MEBIBYTE, Source::Volume(&data)), &watch);
    assert!(meanwhile.load(Ordering::Relaxed) > 0 && matches!(refused, Err(BlockError::InUse(_))), "{refused:?}");
}

#[test]
fn a_copy_is_given_up_when_it_is_asked_to_and_leaves_nothing() {
    let bed = bed();
    let source = bed.written(Format::Raw);
    let data = VolumeData::Ours(source);
    let before = bed.files();
    for to in FORMATS {
        let given_up = bed
            .backend
            .volumes()
            .create_data(&new(to, 4 * MEBIBYTE, Source::Volume(&data)), &|_percent| Err(BlockError::Cancelled));
        assert!(matches!(given_up, Err(BlockError::Cancelled)), "{given_up:?}");
        assert_eq!(bed.files(), before);
    }
}

#[test]
fn what_a_crash_left_of_the_same_operation_is_replaced_and_what_others_left_is_not() {
    let bed = bed();
    let new = new(Format::Raw, MEBIBYTE, Source::Empty);
    let record = bed.backend.volumes().plan_data(&new);
    let place = bed.path(&record).parent().unwrap().to_owned();
    fs::create_dir_all(&place).unwrap();
    let partial = place.join(format!(".data.{}.partial", new.operation));
    fs::write(&partial, "").unwrap();
    bed.backend.volumes().create_data(&new, ON).unwrap();
    assert!(!partial.exists());

    let foreign = NewData { volume: Uuid::new_v4(), ..new };
    let path = bed.path(&bed.backend.volumes().plan_data(&foreign));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    for put in [
        (|path: &Path| fs::write(path, "somebody's").unwrap()) as fn(&Path),
        |path| symlink("/etc/hostname", path).unwrap(),
        |path| fs::create_dir(path).unwrap(),
        |path| takes_marks(&File::create(path).unwrap()).unwrap(),
    ] {
        put(&path);
        let kind = fs::symlink_metadata(&path).unwrap().file_type();
        assert!(matches!(bed.backend.volumes().create_data(&foreign, ON), Err(BlockError::Exists(_))));
        let record = bed.backend.volumes().plan_data(&foreign);
        assert!(matches!(bed.backend.volumes().remove_data(&record), Err(BlockError::NotOurs(_))));
        assert!(matches!(bed.backend.volumes().examine(&VolumeData::Ours(record)), Err(BlockError::NotOurs(_))));
        assert_eq!(fs::symlink_metadata(&path).unwrap().file_type(), kind);
        if kind.is_dir() { fs::remove_dir(&path).unwrap() } else { fs::remove_file(&path).unwrap() }
    }
    fs::remove_dir(path.parent().unwrap()).unwrap();
    symlink("/etc", path.parent().unwrap()).unwrap();
    assert!(bed.backend.volumes().create_data(&foreign, ON).is_err());
}

#[test]
fn records_that_lead_elsewhere_are_refused() {
    let bed = bed();
    let outside = bed.directory.path().join("data");
    fs::write(&outside, "somebody's").unwrap();
    let id = Uuid::new_v4();
    for reference in ["../data", "data", &format!("{id}/../../data"), &format!("{id}/other"), &format!("{id}/")] {
        let record = DataRecord {
            backend: "directory".to_owned(),
            reference: reference.to_owned(),
            operation: Uuid::nil(),
            format: Format::Raw,
        };
        assert!(matches!(bed.backend.volumes().remove_data(&record), Err(BlockError::NotOurs(_))), "{reference}");
        let data = VolumeData::Ours(record);
        assert!(matches!(bed.backend.volumes().examine(&data), Err(BlockError::NotOurs(_))), "{reference}");
        let DiskSource::File(path) = bed.backend.volumes().source(&data) else { panic!("a file") };
        assert!(!path.exists(), "{reference}");
    }
    assert!(outside.exists());
}

#[test]
fn volumes_grow_and_never_shrink_and_qcow2_not_under_who_has_it_open() {
    let bed = bed();
    for format in FORMATS {
        let record = bed.written(format);
        let data = VolumeData::Ours(record.clone());
        let grow = |size, in_use| bed.backend.volumes().grow_data(&data, size, in_use);
        assert_eq!(grow(6 * MEBIBYTE, false).unwrap(), 6 * MEBIBYTE);
        assert_eq!(grow(MEBIBYTE, false).unwrap(), 6 * MEBIBYTE);
        let file = OpenOptions::new().read(true).write(true).open(bed.path(&record)).unwrap();
        let mut child = Command::new("sleep").arg("60").stdin(Stdio::from(file)).spawn().unwrap();
        let refused = grow(7 * MEBIBYTE, false);
        let told = grow(8 * MEBIBYTE, true);
        child.kill().unwrap();
        child.wait().unwrap();
        match format {
            Format::Raw => assert_eq!((refused.unwrap(), told.unwrap()), (7 * MEBIBYTE, 8 * MEBIBYTE)),
            Format::Qcow2 => {
                assert!(matches!(refused, Err(BlockError::InUse(_))));
                assert_eq!(told.unwrap(), 6 * MEBIBYTE, "left to who has it open");
            }
        }
    }
}

#[test]
fn what_is_wrong_with_the_data_is_found() {
    let bed = bed();
    let record = bed.written(Format::Qcow2);
    let data = VolumeData::Ours(record.clone());
    let path = bed.path(&record);
    File::options().write(true).open(&path).unwrap().write_all_at(b"nothing", 0).unwrap();
    assert!(matches!(bed.backend.volumes().examine(&data), Err(BlockError::Damaged(_))));
    fs::remove_file(&path).unwrap();
    assert!(matches!(bed.backend.volumes().examine(&data), Err(BlockError::Missing(_))));
    // Of a guest's raw disk nothing is believed.
    let record = bed.written(Format::Raw);
    File::options().write(true).open(bed.path(&record)).unwrap().write_all_at(b"QFI\xfb", 0).unwrap();
    let examined = bed.backend.volumes().examine(&VolumeData::Ours(record)).unwrap();
    assert_eq!((examined.size_bytes, examined.format), (4 * MEBIBYTE, Format::Raw));
}

#[test]
fn a_full_disk_is_said_and_nothing_is_left_on_it() {
    struct Mounted(TempDir);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
        }
    }
    let small = Mounted(TempDir::new().unwrap());
    mount(Some("tmpfs"), small.0.path(), Some("tmpfs"), MsFlags::empty(), Some("size=4m")).unwrap();
    let backend = DirectoryBackend::new(small.0.path().join("volumes"), None);
    let image = TempDir::new().unwrap();
    let image = image.path().join("image");
    fs::write(&image, vec![0x5a; 8 * MEBIBYTE as usize]).unwrap();
    for to in FORMATS {
        let full = backend.volumes().create_data(&new(to, 8 * MEBIBYTE, Source::Image(&image, Format::Raw)), ON);
        assert!(matches!(full, Err(BlockError::NoSpace(_))), "{full:?}");
        assert_eq!(fs::read_dir(small.0.path().join("volumes")).unwrap().count(), 0);
    }
    // A child that another test starts holds the files of all until it is another program.
    let end = Instant::now() + Duration::from_secs(20);
    while backend.volumes().capacity().unwrap().1 <= 3 * MEBIBYTE {
        assert!(Instant::now() < end, "{:?}", backend.volumes().capacity());
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(backend.volumes().capacity().unwrap().0, 4 * MEBIBYTE);
}

#[test]
fn data_that_is_there_is_taken_over_as_it_lies() {
    let bed = bed();
    for format in FORMATS {
        let path = bed.directory.path().join("managed").join(format.word());
        let status = Command::new("qemu-img").args(["create", "-q", "-f", format.word()]).arg(&path).arg("3M").status();
        assert!(status.unwrap().success());
        let state = || (fs::read(&path).unwrap(), path.metadata().unwrap().mtime(), path.metadata().unwrap().ino());
        let before = state();
        let (existing, examined) = bed.backend.volumes().adopt(path.to_str().unwrap(), None).unwrap();
        assert_eq!((examined.size_bytes, examined.format), (3 * MEBIBYTE, format));
        assert_eq!(state(), before);
        let data = VolumeData::Existing(existing);
        assert_eq!(bed.backend.volumes().examine(&data).unwrap(), examined);
        assert_eq!(bed.backend.volumes().source(&data), DiskSource::File(path.clone()));
        assert_eq!(bed.backend.volumes().grow_data(&data, 5 * MEBIBYTE, false).unwrap(), 5 * MEBIBYTE);
        fs::copy(&path, path.with_extension("copy")).unwrap();
        fs::rename(path.with_extension("copy"), &path).unwrap();
        let replaced = bed.backend.volumes().examine(&data);
        assert!(matches!(&replaced, Err(BlockError::Damaged(words)) if words.contains("another")), "{replaced:?}");
    }
}

#[test]
fn what_is_not_taken_over_is_refused_with_the_reason() {
    let bed = bed();
    let managed = bed.directory.path().join("managed");
    let disk = |name: &str| {
        let path = managed.join(name);
        fs::write(&path, vec![1; 4096]).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let refused = |reference: &str, claimed: Option<Format>, words: &str| {
        let error = bed.backend.volumes().adopt(reference, claimed).unwrap_err().to_string();
        assert!(error.contains(words), "{reference}: {error}");
    };
    let outside = bed.directory.path().join("outside");
    fs::write(&outside, vec![1; 4096]).unwrap();
    refused(outside.to_str().unwrap(), None, "no directory that root named");
    refused("managed/disk", None, "absolute");
    refused(&format!("{}/../outside", managed.display()), None, "without ..");
    refused(managed.join("nothing").to_str().unwrap(), None, "there is no file");
    symlink(&outside, managed.join("link")).unwrap();
    refused(managed.join("link").to_str().unwrap(), None, "symlink");
    symlink(bed.directory.path(), managed.join("way")).unwrap();
    refused(managed.join("way/outside").to_str().unwrap(), None, "symlink");
    fs::create_dir(managed.join("directory")).unwrap();
    refused(managed.join("directory").to_str().unwrap(), None, "not a regular file");
    let twice = disk("twice");
    fs::hard_link(&twice, managed.join("again")).unwrap();
    refused(&twice, None, "other names");
    let writable = disk("writable");
    fs::set_permissions(&writable, fs::Permissions::from_mode(0o666)).unwrap();
    refused(&writable, None, "everybody may write");
    let plain = disk("plain");
    refused(&plain, Some(Format::Qcow2), "not qcow2");
    let mut child = Command::new("sleep").arg("60").stdin(File::open(&plain).unwrap()).spawn().unwrap();
    let open = bed.backend.volumes().adopt(&plain, None);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(matches!(&open, Err(BlockError::InUse(words)) if words.contains("sleep")), "{open:?}");
    let packed = disk("packed");
    File::options().write(true).open(&packed).unwrap().write_all(b"\x1f\x8b\x08").unwrap();
    refused(&packed, None, "gzip");
    let backed = managed.join("backed");
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
    let status = Command::new("qemu-img").args(create).args([outside.as_path(), &backed]).status();
    assert!(status.unwrap().success());
    refused(backed.to_str().unwrap(), None, "backing file");
    let named = bed.directory.path().join("other");
    let status = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&named).arg("1M").status();
    assert!(status.unwrap().success());
    fs::rename(&named, managed.join("claimed")).unwrap();
    refused(managed.join("claimed").to_str().unwrap(), Some(Format::Raw), "qcow2 header");
}
