//! Names, links, references and documents follow.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::support::{Daemon, errno, wait_until};

fn bin(daemon: &Daemon, class: &str, id: Uuid) {
    fs::rename(daemon.path(format!("{class}/{id}")), daemon.path(format!("trash/{id}"))).expect("moved");
}

#[test]
fn the_documents_name_every_file_of_an_object_in_the_bin() {
    let daemon = Daemon::start(&[]);
    let (instance, image) = (daemon.domain("web"), daemon.image());
    daemon.set(format!("instances/{instance}/state"), "active");
    wait_until("the definition is there", || daemon.path(format!("instances/{instance}/domain.xml")).exists());
    bin(&daemon, "instances", instance);
    bin(&daemon, "images", image);
    let documents =
        [(include_str!("../../docs/abi/instances.md"), instance), (include_str!("../../docs/abi/images.md"), image)];
    for (document, id) in documents {
        let rows = document.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | ").map(|row| row.0));
        let documented: BTreeSet<_> = rows.filter(|name| !name.contains('/') && *name != "console.log.1").collect();
        let listed: Vec<_> = fs::read_dir(daemon.path(format!("trash/{id}"))).expect("listed").flatten().collect();
        let listed: Vec<String> = listed.iter().map(|entry| entry.file_name().into_string().expect("UTF-8")).collect();
        assert_eq!(listed.iter().map(String::as_str).collect::<BTreeSet<_>>(), documented);
    }
}

#[test]
fn every_link_and_path_leads_to_where_the_object_stands() {
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("web");
    daemon.set(format!("instances/{id}/state"), "active");
    let link = fs::read_link(daemon.path(format!("instances/{id}/last_task"))).expect("a task");
    let task = PathBuf::from("tasks").join(link.file_name().expect("its id"));
    assert_eq!(daemon.read(task.join("object")), format!("instances/{id}"));
    bin(&daemon, "instances", id);
    let home = daemon.path(format!("trash/{id}"));
    wait_until("it is put away", || daemon.read(home.join("task")).is_empty());
    let links = [daemon.path("by-name/trash/web"), daemon.path(format!("by-state/instances/soft_deleted/{id}"))];
    wait_until("the links follow", || links.iter().all(|link| link.is_symlink()));
    for link in &links {
        assert_eq!(fs::canonicalize(link).expect("resolves"), home);
        let target = fs::read_link(link).expect("a link");
        assert_eq!(link.symlink_metadata().expect("stat").len(), target.as_os_str().len() as u64, "{}", link.display());
    }
    assert_eq!(daemon.read(home.join("last_task/state")), "success");
    assert_eq!(daemon.read(task.join("object")), format!("trash/{id}"));
    assert_eq!(fs::metadata(daemon.path(task.join("object"))).expect("stat").len(), 43);
    fs::rename(&home, daemon.path(format!("instances/{id}"))).expect("moved back");
    wait_until("its task says so", || daemon.read(task.join("object")) == format!("instances/{id}"));
}

#[test]
fn a_link_resolves_at_every_moment_of_the_way_into_the_bin_and_back() {
    let daemon = Daemon::start(&[]);
    let id = daemon.domain("web");
    let image = daemon.image();
    daemon.set(format!("images/{image}/name"), "golden");
    let names = |name: &str, class: &str| [class, "trash"].map(|place| daemon.path(format!("by-name/{place}/{name}")));
    let words = ["stopped", "soft_deleting", "soft_deleted", "restoring"];
    let states = words.map(|word| daemon.path(format!("by-state/instances/{word}/{id}")));
    let views: [Vec<PathBuf>; 3] =
        [names("web", "instances").to_vec(), names("golden", "images").to_vec(), states.to_vec()];
    let resolves = |view: &[PathBuf]| {
        // A move between two looks, or within one, is seen by looking again.
        (0..20).any(|_| view.iter().any(|link| fs::metadata(link.join("state")).is_ok()))
    };
    wait_until("everything stands", || views.iter().all(|view| resolves(view)));
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let looks = scope.spawn(|| {
            let mut looks = 0;
            while !done.load(std::sync::atomic::Ordering::Acquire) {
                for view in &views {
                    assert!(resolves(view), "{}", view[0].display());
                    looks += 1;
                }
            }
            looks
        });
        for _ in 0..5 {
            for (class, id) in [("instances", id), ("images", image)] {
                let (home, bin) = (daemon.path(format!("{class}/{id}")), daemon.path(format!("trash/{id}")));
                fs::rename(&home, &bin).expect("moved");
                wait_until("it is put away", || daemon.read(bin.join("task")).is_empty());
                fs::rename(&bin, &home).expect("moved back");
                wait_until("it is back", || daemon.read(home.join("task")).is_empty());
            }
        }
        done.store(true, std::sync::atomic::Ordering::Release);
        assert!(looks.join().expect("always found") > 0);
    });
}

#[test]
fn the_first_of_a_name_bears_it_in_the_bin_whatever_it_is() {
    let daemon = Daemon::start(&[]);
    let instance = daemon.domain("web");
    let images = [daemon.image(), daemon.image()];
    for image in images {
        daemon.set(format!("images/{image}/name"), "web");
    }
    bin(&daemon, "images", images[0]);
    let stands = |name: &str, id: Uuid| {
        let home = daemon.path(format!("trash/{id}"));
        wait_until(name, || fs::canonicalize(daemon.path(format!("by-name/trash/{name}"))).is_ok_and(|at| at == home));
    };
    stands("web", images[0]);
    bin(&daemon, "instances", instance);
    stands(&format!("web.{instance}"), instance);
    bin(&daemon, "images", images[1]);
    stands(&format!("web.{}", images[1]), images[1]);
    wait_until("it is put away", || daemon.read(format!("trash/{instance}/task")).is_empty());
    fs::rename(daemon.path(format!("trash/{instance}")), daemon.path(format!("instances/{instance}"))).expect("back");
    wait_until("its own name again", || daemon.path("by-name/instances/web").exists());
}

#[test]
fn an_image_in_the_bin_is_found_by_its_path_and_refused_for_a_new_draft() {
    let daemon = Daemon::start(&[]);
    let image = daemon.image();
    daemon.set(format!("images/{image}/name"), "golden");
    let (before, draft) = (Uuid::new_v4(), Uuid::new_v4());
    for id in [before, draft] {
        fs::create_dir(daemon.path(format!("instances/{id}"))).expect("a draft");
    }
    daemon.set(format!("instances/{before}/image"), "golden");
    bin(&daemon, "images", image);
    wait_until("its name is there", || daemon.path("by-name/trash/golden").exists());
    let file = format!("instances/{draft}/image");
    let absolute = daemon.path(format!("trash/{image}")).display().to_string();
    for value in [
        image.to_string(),
        format!("trash/{image}"),
        format!("../../trash/{image}"),
        absolute,
        "by-name/trash/golden".to_owned(),
        format!("images/{image}"),
        "golden".to_owned(),
    ] {
        assert_eq!(errno(daemon.write(&file, &value)), libc::EPERM, "{value}");
        let last = daemon.read(format!("instances/{draft}/last_error"));
        assert!(last.contains("in the bin") && last.contains(&format!("mv trash/{image} images/{image}")), "{last}");
    }
    assert_eq!(errno(daemon.write(&file, "by-name/images/golden")), libc::ENOENT);
    assert_eq!(errno(daemon.write(&file, "trash/golden")), libc::EINVAL);
    daemon.set(format!("instances/{before}/image"), &format!("trash/{image}"));
    assert!(daemon.write(format!("instances/{before}/state"), "active").is_err(), "nothing boots from the bin");
    assert_eq!(daemon.read(format!("instances/{before}/state")), "draft");
    // A new one of the same name is what the name means now.
    let newer = daemon.image();
    daemon.set(format!("images/{newer}/name"), "golden");
    daemon.set(&file, "golden");
    assert_eq!(daemon.read(&file), newer.to_string());
    assert!(Path::new(&daemon.path(format!("trash/{image}/data"))).exists());
}
