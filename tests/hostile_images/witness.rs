//! Who opens a file, and who runs a program, told by the kernel.

use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use nix::fcntl::AT_FDCWD;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::fanotify::{EventFFlags, Fanotify, FanotifyResponse, InitFlags, MarkFlags, MaskFlags, Response};

/// Watches until it is dropped.
pub struct Witness {
    watched: Arc<Fanotify>,
    seen: Arc<Seen>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Seen {
    /// Path to the processes that opened or read it.
    readers: Mutex<HashMap<PathBuf, Vec<u32>>>,
    /// How often the program was run by the parent.
    runs: AtomicUsize,
    ends: AtomicBool,
}

impl Witness {
    /// Counts how often `parent` runs `program`.
    pub fn new(program: &Path, parent: u32) -> Witness {
        let group = |class| {
            let group = Fanotify::init(class | InitFlags::FAN_CLOEXEC | InitFlags::FAN_NONBLOCK, EventFFlags::O_RDONLY);
            Arc::new(group.expect("root may watch"))
        };
        // Permission is asked before the program runs, so that its parent can still be looked up.
        let run = group(InitFlags::FAN_CLASS_CONTENT);
        mark(&run, MaskFlags::FAN_OPEN_EXEC_PERM, program);
        let watched = group(InitFlags::FAN_CLASS_NOTIF);
        let seen = Arc::new(Seen::default());
        let threads =
            vec![repeat(&seen, &run, move |seen, run| allow(seen, run, parent)), repeat(&seen, &watched, note)];
        Witness { watched, seen, threads }
    }

    /// Watches a file as well.
    pub fn watch(&self, path: &Path) {
        mark(&self.watched, MaskFlags::FAN_OPEN | MaskFlags::FAN_ACCESS, path);
    }

    /// Who opened or read the file so far.
    pub fn readers(&self, path: &Path) -> Vec<u32> {
        self.seen.readers.lock().expect("no panic").get(path).cloned().unwrap_or_default()
    }

    /// Everything watched that was opened or read, and by whom.
    pub fn all(&self) -> HashMap<PathBuf, Vec<u32>> {
        self.seen.readers.lock().expect("no panic").clone()
    }

    /// How often the program was run.
    pub fn runs(&self) -> usize {
        self.seen.runs.load(Ordering::SeqCst)
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.seen.ends.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _already_reported = thread.join();
        }
    }
}

fn mark(group: &Fanotify, mask: MaskFlags, path: &Path) {
    let marked = group.mark(MarkFlags::FAN_MARK_ADD, mask, AT_FDCWD, Some(path));
    marked.unwrap_or_else(|error| panic!("{} cannot be watched: {error}", path.display()));
}

fn repeat(seen: &Arc<Seen>, group: &Arc<Fanotify>, each: impl Fn(&Seen, &Fanotify) + Send + 'static) -> JoinHandle<()> {
    let (seen, group) = (seen.clone(), group.clone());
    thread::spawn(move || {
        while !seen.ends.load(Ordering::SeqCst) {
            // Short, for the end.
            let ready = poll(&mut [PollFd::new(group.as_fd(), PollFlags::POLLIN)], PollTimeout::from(50u8));
            if ready == Ok(1) {
                each(&seen, &group);
            }
        }
    })
}

fn allow(seen: &Seen, group: &Fanotify, parent: u32) {
    for event in group.read_events().unwrap_or_default() {
        let Some(file) = event.fd() else { continue };
        let stat = fs::read_to_string(format!("/proc/{}/stat", event.pid())).unwrap_or_default();
        let its_parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
        if its_parent == Some(parent) {
            seen.runs.fetch_add(1, Ordering::SeqCst);
        }
        group.write_response(FanotifyResponse::new(file, Response::FAN_ALLOW)).expect("answered");
    }
}

fn note(seen: &Seen, group: &Fanotify) {
    for event in group.read_events().unwrap_or_default() {
        let Some(file) = event.fd() else { panic!("the kernel has dropped events") };
        let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("a name");
        let process = u32::try_from(event.pid()).expect("a process");
        seen.readers.lock().expect("no panic").entry(path).or_default().push(process);
    }
}
