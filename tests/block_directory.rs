//! The directory backend with real qemu-img and real file systems; runs as root.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use instancefs::block::copy::Watch;
use instancefs::block::directory::DirectoryBackend;
use instancefs::block::shelf::Shelf;
use instancefs::block::{BlockBackend, BlockError, DiskRecord, NewDisk, NewSeed};
use instancefs::image::Format;
use instancefs::model::record::Copied;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use uuid::Uuid;

struct Bed {
    _directory: tempfile::TempDir,
    image: PathBuf,
    disks: PathBuf,
    backend: DirectoryBackend,
}

impl Bed {
    fn new() -> Bed {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        let disks = directory.path().join("disks");
        let made =
            Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("1G").status().unwrap();
        assert!(made.success());
        let backend = DirectoryBackend::new(disks.clone(), None);
        Bed { _directory: directory, image, disks, backend }
    }

    fn disk(&self, instance: Uuid, operation: Uuid) -> NewDisk<'_> {
        NewDisk { instance, operation, image: &self.image, image_format: Format::Qcow2, size_bytes: 2 << 30 }
    }

    /// A disk of a new instance by a new operation.
    fn made(&self) -> DiskRecord {
        self.backend.create(&self.disk(Uuid::new_v4(), Uuid::new_v4())).unwrap()
    }

    fn temporary(&self, instance: Uuid, operation: Uuid) -> PathBuf {
        self.disks.join(format!("{instance}/.root.qcow2.{operation}.partial"))
    }
}

fn info(path: &Path) -> serde_json::Value {
    let output = Command::new("qemu-img").args(["info", "--output=json", "-f", "qcow2"]).arg(path).output().unwrap();
    assert!(output.status.success());
    serde_json::from_slice(&output.stdout).unwrap()
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn bear_operation(path: &Path, operation: Uuid) {
    let path = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    let text = operation.to_string();
    // SAFETY: both strings end with NUL, the value is valid for its length.
    let result = unsafe {
        libc::setxattr(path.as_ptr(), c"user.instancefs.operation".as_ptr(), text.as_ptr().cast(), text.len(), 0)
    };
    assert_eq!(result, 0);
}

#[test]
fn a_new_disk_is_an_overlay_as_planned_that_qemu_can_reach_and_others_cannot_read() {
    let bed = Bed::new();
    let disk = bed.disk(Uuid::new_v4(), Uuid::new_v4());
    let planned = bed.backend.plan(&disk);
    assert_eq!(bed.backend.create(&disk).unwrap(), planned);
    assert_eq!(planned.backend, bed.backend.name());
    let path = bed.backend.path(&planned);
    assert_eq!(path, bed.disks.join(disk.instance.to_string()).join("root.qcow2"));
    let info = info(&path);
    assert_eq!(info["virtual-size"], 2u64 << 30);
    assert_eq!(info["full-backing-filename"], bed.image.to_str().unwrap());
    assert_eq!(info["backing-filename-format"], "qcow2");
    assert_eq!((mode(&path), mode(path.parent().unwrap()), mode(&bed.disks)), (0o600, 0o711, 0o711));
    assert_eq!(names(path.parent().unwrap()), ["root.qcow2"]);
}

#[test]
fn with_a_guest_group_only_that_group_passes() {
    let bed = Bed::new();
    let backend = DirectoryBackend::new(bed.disks.clone(), Some(65534));
    let path = backend.path(&backend.create(&bed.disk(Uuid::new_v4(), Uuid::new_v4())).unwrap());
    for directory in [path.parent().unwrap(), &bed.disks] {
        assert_eq!((mode(directory), fs::metadata(directory).unwrap().gid()), (0o710, 65534));
    }
    assert_eq!(mode(&path), 0o600);
}

#[test]
fn a_seed_is_a_labelled_disk_with_the_documents_that_only_its_owner_reads() {
    let bed = Bed::new();
    let disk = bed.disk(Uuid::new_v4(), Uuid::new_v4());
    let root = bed.backend.create(&disk).unwrap();
    let documents = [("user-data", "#cloud-config\n".as_bytes()), ("meta-data", b"instance-id: x\n")];
    let new = NewSeed { instance: disk.instance, operation: disk.operation, documents: &documents };
    let seed = bed.backend.create_seed(&new).unwrap();
    assert_eq!(bed.backend.create_seed(&new).unwrap(), seed);
    let path = bed.backend.path(&seed);
    assert_eq!((mode(&path), names(path.parent().unwrap())), (0o600, vec!["root.qcow2".into(), "seed.iso".into()]));
    // ECMA-119: the primary volume descriptor is sector 16, the label is at byte 40 of it.
    let image = fs::read(&path).unwrap();
    assert_eq!(&image[16 * 2048 + 40..][..7], b"cidata ");
    let copied = bed.disks.join("user-data");
    let extract = Command::new("xorriso")
        .args(["-osirrox", "on", "-indev"])
        .arg(&path)
        .args(["-extract", "/user-data"])
        .arg(&copied)
        .output()
        .unwrap();
    assert!(extract.status.success());
    assert_eq!(fs::read_to_string(&copied).unwrap(), "#cloud-config\n");
    fs::remove_file(copied).unwrap();

    let other = DiskRecord { operation: Uuid::new_v4(), ..seed.clone() };
    assert!(matches!(bed.backend.remove(&other), Err(BlockError::NotOurs(_))));
    bed.backend.remove(&seed).unwrap();
    assert_eq!(names(bed.backend.path(&root).parent().unwrap()), ["root.qcow2"]);
    bed.backend.remove(&root).unwrap();
    assert!(names(&bed.disks).is_empty());
}

#[test]
fn documents_that_a_crash_left_go_with_the_seed() {
    let bed = Bed::new();
    let documents = [("user-data", b"secret".as_slice())];
    let new = NewSeed { instance: Uuid::new_v4(), operation: Uuid::new_v4(), documents: &documents };
    let planned = bed.backend.plan_seed(&new);
    let directory = bed.disks.join(new.instance.to_string());
    let left = directory.join(format!(".seed.iso.{}.documents", new.operation));
    for finish in [true, false] {
        fs::create_dir_all(&left).unwrap();
        fs::write(left.join("user-data"), "secret").unwrap();
        if finish {
            bed.backend.create_seed(&new).unwrap();
            assert_eq!(names(&directory), ["seed.iso"]);
        } else {
            bed.backend.remove(&planned).unwrap();
            assert!(names(&bed.disks).is_empty());
        }
    }
}

#[test]
fn a_disk_grows_and_never_shrinks() {
    let bed = Bed::new();
    let record = bed.made();
    let path = bed.backend.path(&record);
    for (wanted, size) in [(3u64 << 30, 3u64 << 30), (1 << 30, 3 << 30), (3 << 30, 3 << 30)] {
        bed.backend.grow(&record, wanted).unwrap();
        assert_eq!(info(&path)["virtual-size"], size);
    }
    let other = DiskRecord { operation: Uuid::new_v4(), ..record.clone() };
    assert!(matches!(bed.backend.grow(&other, 4 << 30), Err(BlockError::NotOurs(_))));
    fs::remove_file(&path).unwrap();
    assert!(bed.backend.grow(&record, 4 << 30).is_err());
}

#[test]
fn the_same_operation_creates_once() {
    let bed = Bed::new();
    let disk = bed.disk(Uuid::new_v4(), Uuid::new_v4());
    let record = bed.backend.create(&disk).unwrap();
    let before = fs::metadata(bed.backend.path(&record)).unwrap();
    assert_eq!(bed.backend.create(&disk).unwrap(), record);
    let after = fs::metadata(bed.backend.path(&record)).unwrap();
    assert_eq!((before.ino(), before.mtime_nsec()), (after.ino(), after.mtime_nsec()));
}

#[test]
fn another_operations_disk_is_neither_taken_nor_changed_nor_removed() {
    let bed = Bed::new();
    let record = bed.made();
    let path = bed.backend.path(&record);
    let content = fs::read(&path).unwrap();
    let instance = Uuid::parse_str(record.reference.split('/').next().unwrap()).unwrap();
    let other = bed.disk(instance, Uuid::new_v4());
    assert!(matches!(bed.backend.create(&other), Err(BlockError::Exists(_))));
    assert!(matches!(bed.backend.remove(&bed.backend.plan(&other)), Err(BlockError::NotOurs(_))));
    assert_eq!(fs::read(&path).unwrap(), content);
    assert_eq!(names(path.parent().unwrap()), ["root.qcow2"]);
}

#[test]
fn a_crash_in_the_middle_is_finished_by_the_same_operation() {
    let bed = Bed::new();
    for half_made in [b"".as_slice(), b"half a disk"] {
        let (instance, operation) = (Uuid::new_v4(), Uuid::new_v4());
        let temporary = bed.temporary(instance, operation);
        fs::create_dir_all(temporary.parent().unwrap()).unwrap();
        fs::write(&temporary, half_made).unwrap();
        if !half_made.is_empty() {
            bear_operation(&temporary, operation);
        }
        let record = bed.backend.create(&bed.disk(instance, operation)).unwrap();
        assert_eq!(names(temporary.parent().unwrap()), ["root.qcow2"]);
        assert_eq!(info(&bed.backend.path(&record))["virtual-size"], 2u64 << 30);
    }
}

#[test]
fn a_crash_in_the_middle_is_undone_by_the_same_operation_only() {
    let bed = Bed::new();
    let (instance, operation) = (Uuid::new_v4(), Uuid::new_v4());
    let temporary = bed.temporary(instance, operation);
    fs::create_dir_all(temporary.parent().unwrap()).unwrap();
    fs::write(&temporary, b"half a disk").unwrap();
    bear_operation(&temporary, operation);
    bed.backend.remove(&bed.backend.plan(&bed.disk(instance, Uuid::new_v4()))).unwrap();
    assert!(temporary.exists());
    bed.backend.remove(&bed.backend.plan(&bed.disk(instance, operation))).unwrap();
    assert!(!temporary.parent().unwrap().exists());
}

#[test]
fn a_file_that_took_the_temporary_name_is_left_alone() {
    let bed = Bed::new();
    let (instance, operation) = (Uuid::new_v4(), Uuid::new_v4());
    let temporary = bed.temporary(instance, operation);
    fs::create_dir_all(temporary.parent().unwrap()).unwrap();
    fs::write(&temporary, b"somebody's").unwrap();
    assert!(matches!(bed.backend.create(&bed.disk(instance, operation)), Err(BlockError::Failed(_))));
    bed.backend.remove(&bed.backend.plan(&bed.disk(instance, operation))).unwrap();
    assert_eq!(fs::read(&temporary).unwrap(), b"somebody's");
}

#[test]
fn removing_takes_the_disk_and_its_empty_directory_and_can_be_repeated() {
    let bed = Bed::new();
    let (record, neighbour) = (bed.made(), bed.made());
    for _ in 0..2 {
        bed.backend.remove(&record).unwrap();
        assert!(!bed.backend.path(&record).parent().unwrap().exists());
    }
    assert!(bed.backend.path(&neighbour).is_file());
    assert!(bed.image.is_file());
}

#[test]
fn an_unknown_file_beside_the_disk_stays() {
    let bed = Bed::new();
    let record = bed.made();
    let note = bed.backend.path(&record).with_file_name("data.qcow2");
    fs::write(&note, b"somebody's").unwrap();
    bed.backend.remove(&record).unwrap();
    assert_eq!(names(note.parent().unwrap()), ["data.qcow2"]);
    assert_eq!(fs::read(&note).unwrap(), b"somebody's");
}

#[test]
fn a_file_put_in_the_disks_place_is_not_removed() {
    let bed = Bed::new();
    let record = bed.made();
    let path = bed.backend.path(&record);
    fs::rename(&path, path.with_extension("old")).unwrap();
    fs::write(&path, b"somebody's").unwrap();
    assert!(matches!(bed.backend.remove(&record), Err(BlockError::NotOurs(_))));
    assert_eq!(fs::read(&path).unwrap(), b"somebody's");
    assert!(path.with_extension("old").exists());
}

#[test]
fn symlinks_are_never_followed() {
    let bed = Bed::new();
    let (record, victim) = (bed.made(), bed.made());
    let (path, target) = (bed.backend.path(&record), bed.backend.path(&victim));

    // In the place of the disk, to a disk that even bears the right operation.
    fs::remove_file(&path).unwrap();
    bear_operation(&target, record.operation);
    symlink(&target, &path).unwrap();
    assert!(matches!(bed.backend.remove(&record), Err(BlockError::NotOurs(_))));
    let instance = Uuid::parse_str(record.reference.split('/').next().unwrap()).unwrap();
    assert!(matches!(bed.backend.create(&bed.disk(instance, record.operation)), Err(BlockError::Exists(_))));
    assert!(target.is_file() && path.is_symlink());

    // In the place of the instance's directory.
    fs::remove_file(&path).unwrap();
    fs::remove_dir(path.parent().unwrap()).unwrap();
    symlink(target.parent().unwrap(), path.parent().unwrap()).unwrap();
    assert!(matches!(bed.backend.remove(&record), Err(BlockError::NotOurs(_))));
    assert!(bed.backend.create(&bed.disk(instance, record.operation)).is_err());
    assert!(target.is_file() && path.parent().unwrap().is_symlink());
}

#[test]
fn a_record_that_leads_elsewhere_is_not_ours() {
    let bed = Bed::new();
    let record = bed.made();
    let outside = bed.image.with_file_name("root.qcow2");
    fs::write(&outside, b"somebody's").unwrap();
    bear_operation(&outside, record.operation);
    let upper = record.reference.to_uppercase().replace("ROOT.QCOW2", "root.qcow2");
    let elsewhere =
        ["../root.qcow2", "/etc/passwd", "", "root.qcow2", "./x/root.qcow2", outside.to_str().unwrap(), &upper]
            .map(str::to_owned)
            .into_iter()
            .chain([format!("{}/../root.qcow2", record.reference), format!("../disks/{}", record.reference)]);
    for reference in elsewhere {
        let forged = DiskRecord { reference, ..record.clone() };
        assert!(matches!(bed.backend.remove(&forged), Err(BlockError::NotOurs(_))), "{forged:?}");
        let path = bed.backend.path(&forged);
        assert!(path.parent() == Some(&bed.disks) && !path.exists(), "{forged:?}");
    }
    let other_backend = DiskRecord { backend: "lvm".to_owned(), ..record.clone() };
    assert!(matches!(bed.backend.remove(&other_backend), Err(BlockError::NotOurs(_))));
    assert!(outside.is_file() && bed.backend.path(&record).is_file());
}

#[test]
fn a_missing_image_leaves_nothing_behind() {
    let bed = Bed::new();
    let disk = NewDisk { image: Path::new("/nonexistent/image"), ..bed.disk(Uuid::new_v4(), Uuid::new_v4()) };
    assert!(matches!(bed.backend.create(&disk), Err(BlockError::Failed(_))));
    assert!(names(&bed.disks).is_empty());
}

/// A small file system in memory, unmounted with the test.
struct Tiny(PathBuf);

impl Tiny {
    fn mount(at: &Path) -> Tiny {
        fs::create_dir(at).unwrap();
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some("size=128k,mode=0711")).unwrap();
        Tiny(at.to_owned())
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

#[test]
fn a_full_disk_is_said_leaves_nothing_behind_and_works_after_space_is_made() {
    let bed = Bed::new();
    let tiny = Tiny::mount(&bed.disks);
    assert_eq!(bed.backend.volumes().capacity().unwrap(), (128 << 10, 128 << 10));
    let disk = bed.disk(Uuid::new_v4(), Uuid::new_v4());
    assert!(matches!(bed.backend.create(&disk), Err(BlockError::NoSpace(_))));
    assert!(names(&bed.disks).is_empty());
    mount(None::<&str>, &tiny.0, None::<&str>, MsFlags::MS_REMOUNT, Some("size=8m")).unwrap();
    bed.backend.create(&disk).unwrap();
    let (total, free) = bed.backend.volumes().capacity().unwrap();
    assert!(total == 8 << 20 && free < total);
}

/// Writes `bytes` into a new disk.
fn filled<'a>(bytes: &'a [u8]) -> impl Fn(&fs::File) -> Result<(), BlockError> + 'a {
    |file| file.write_all_at(bytes, 0).map_err(|error| BlockError::Failed(error.to_string()))
}

#[test]
fn a_disk_is_made_again_at_its_place_by_one_operation_only() {
    let bed = Bed::new();
    let first = bed.made();
    let path = bed.backend.path(&first);
    let again = DiskRecord { operation: Uuid::new_v4(), ..first.clone() };
    assert!(matches!(bed.backend.create_again(&again, &filled(b"new")), Err(BlockError::Exists(_))));
    assert!(bed.backend.open(&first).is_ok());
    assert!(matches!(bed.backend.open(&again), Err(BlockError::NotOurs(_))));
    bed.backend.remove(&first).unwrap();
    assert!(matches!(bed.backend.open(&first), Err(BlockError::Missing(_))));

    let refused = bed.backend.create_again(&again, &|_| Err(BlockError::Cancelled));
    assert!(matches!(refused, Err(BlockError::Cancelled)) && !path.exists() && !path.parent().unwrap().exists());
    bed.backend.create_again(&again, &filled(b"new")).unwrap();
    bed.backend.create_again(&again, &filled(b"once more")).unwrap();
    assert_eq!((fs::read(&path).unwrap(), mode(&path)), (b"new".to_vec(), 0o600));
    assert!(matches!(bed.backend.remove(&first), Err(BlockError::NotOurs(_))), "the former record is of another disk");
    bed.backend.remove(&again).unwrap();
}

#[test]
fn a_shelf_that_is_full_says_so_and_keeps_nothing_of_the_copy() {
    let bed = Bed::new();
    let disk = bed.made();
    let place = bed.disks.with_file_name("shelf");
    let tiny = Tiny::mount(&place);
    let shelf = Shelf::new(place.clone());
    let instance = Uuid::new_v4();
    let copy = Copied { operation: Uuid::new_v4(), disk: disk.clone() };
    let watch = Watch { cancelled: &|| false, progress: &|_| {} };
    let file = bed.backend.open(&disk).unwrap();
    let store = || shelf.store(instance, &copy, &file, Format::Qcow2, &watch);
    assert!(matches!(store(), Err(BlockError::NoSpace(_))));
    assert!(names(&place.join(instance.to_string())).is_empty());
    mount(None::<&str>, &tiny.0, None::<&str>, MsFlags::MS_REMOUNT, Some("size=8m")).unwrap();
    let content = store().unwrap();
    assert_eq!(content.size_bytes, file.metadata().unwrap().len());
    assert_eq!(fs::read(shelf.path(instance, &copy)).unwrap(), fs::read(bed.backend.path(&disk)).unwrap());

    let other = Copied { operation: Uuid::new_v4(), disk };
    assert!(matches!(shelf.open(instance, &other), Err(BlockError::Missing(_))));
    fs::rename(shelf.path(instance, &copy), shelf.path(instance, &other)).unwrap();
    assert!(matches!(shelf.open(instance, &other), Err(BlockError::NotOurs(_))));
    assert!(matches!(shelf.remove(instance, &other), Err(BlockError::NotOurs(_))));
    fs::rename(shelf.path(instance, &other), shelf.path(instance, &copy)).unwrap();
    shelf.remove(instance, &copy).unwrap();
    shelf.remove(instance, &copy).unwrap();
    assert!(names(&place).is_empty());
}

#[test]
fn a_damaged_disk_is_not_taken_to_the_shelf() {
    let bed = Bed::new();
    let disk = bed.made();
    let path = bed.backend.path(&disk);
    let write = Command::new("qemu-io").args(["-f", "qcow2", "-c", "write 0 1M"]).arg(&path).output().unwrap();
    assert!(write.status.success());
    // The level 1 table's first entry leads beyond the end of the file.
    let file = fs::File::options().read(true).write(true).open(&path).unwrap();
    let mut offset = [0; 8];
    file.read_exact_at(&mut offset, 40).unwrap();
    file.write_all_at(&(0x8000_0000_0000_0000_u64 | 1 << 40).to_be_bytes(), u64::from_be_bytes(offset)).unwrap();
    let shelf = Shelf::new(bed.disks.with_file_name("shelf"));
    let (instance, copy) = (Uuid::new_v4(), Copied { operation: Uuid::new_v4(), disk });
    let watch = Watch { cancelled: &|| false, progress: &|_| {} };
    let refused = shelf.store(instance, &copy, &file, Format::Qcow2, &watch);
    assert!(matches!(&refused, Err(BlockError::Damaged(words)) if words.contains("qemu-img")), "{refused:?}");
}
