//! Console logs: a thread that notices by inotify when one grows, and keeps ours from filling the disk.
//!
//! It watches the directories of the logs, so that a log may come later or be rotated, and opens none but ours. It alone
//! touches paths that a domain's definition names; one that leads into our own mount is never touched, because a
//! thread of the daemon that waits there could not be killed.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use parking_lot::Mutex;
use uuid::Uuid;

use crate::inventory::{Growth, Inventory, Update};
use crate::workflow::console_log;

/// At most one announcement of one log in this time.
const QUIET: Duration = Duration::from_millis(100);

/// A console log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Log {
    pub(super) path: PathBuf,
    /// We had it made: what is no longer read of it may be taken off the disk.
    pub(super) is_ours: bool,
}

/// What others tell the watching thread.
#[derive(Default)]
struct Orders {
    /// The log of each of these instances from now on, if it has one to watch.
    targets: HashMap<Uuid, Option<Log>>,
    mount_device: Option<u64>,
    stopping: bool,
}

/// The way to the watching thread.
pub(super) struct Console {
    orders: Mutex<Orders>,
    wake: EventFd,
}

impl Console {
    pub(super) fn new() -> io::Result<Console> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Console { orders: Mutex::default(), wake })
    }

    fn order(&self, change: impl FnOnce(&mut Orders)) {
        change(&mut self.orders.lock());
        // A counter that is full wakes as well.
        let _counted = self.wake.write(1);
    }

    pub(super) fn watch(&self, id: Uuid, log: Option<Log>) {
        self.order(|orders| drop(orders.targets.insert(id, log)));
    }

    pub(super) fn set_mount_device(&self, device: u64) {
        self.order(|orders| orders.mount_device = Some(device));
    }

    pub(super) fn stop(&self) {
        self.order(|orders| orders.stopping = true);
    }

    /// The watching thread. Logs below `state_directory` are ours; others are looked at before they are watched, and
    /// again each `interval` while they cannot be.
    pub(super) fn run(&self, inventory: Arc<Inventory>, state_directory: PathBuf, interval: Duration) {
        let inotify = match Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK) {
            Ok(inotify) => inotify,
            Err(error) => {
                log::error!("console logs are not watched, their growth is not announced: {error}");
                return;
            }
        };
        let mut watcher = Watcher {
            inotify,
            inventory,
            state_directory,
            mount_device: None,
            targets: HashMap::new(),
            files: HashMap::new(),
            next_look: Instant::now() + interval,
        };
        loop {
            if let Err(error) = watcher.wait(&self.wake) {
                log::error!("console logs are no longer watched, their growth is not announced: {error}");
                return;
            }
            // What a guest printed before it went off is noted before its log is given up.
            watcher.note_growth();
            let orders = std::mem::take(&mut *self.orders.lock());
            if orders.stopping {
                return;
            }
            watcher.obey(orders);
            if watcher.next_look <= Instant::now() {
                watcher.look_again(|target| target.place.is_none());
                watcher.next_look = Instant::now() + interval;
            }
            watcher.announce();
        }
    }
}

/// Where a log is: its directory's watch, and its name there.
type Place = (WatchDescriptor, OsString);

struct Target {
    log: Log,
    /// `None` while it cannot be watched.
    place: Option<Place>,
    /// When its growth may be announced again.
    due: Instant,
    /// It grew and that was not announced.
    grown: bool,
    /// The piece that was announced last.
    announced: Option<u32>,
    /// So much of its beginning is off the disk; `None` if that cannot be done here.
    punched: Option<u64>,
}

impl Target {
    fn growth(&mut self) -> Growth {
        let current = console_log::pieces(&self.log.path).0.number;
        let former = self.announced.replace(current).filter(|announced| *announced != current);
        Growth { current: current.into(), former: former.map(u64::from) }
    }

    fn punch(&mut self) {
        let Some(done) = self.punched.filter(|_| self.log.is_ours) else { return };
        self.punched = match console_log::punch(&self.log.path, done) {
            Ok(done) => Some(done),
            Err(error) => {
                log::warn!(
                    "what is no longer read of the console log {} stays on the disk: {error}",
                    self.log.path.display()
                );
                None
            }
        };
    }
}

struct Watcher {
    inotify: Inotify,
    inventory: Arc<Inventory>,
    state_directory: PathBuf,
    mount_device: Option<u64>,
    targets: HashMap<Uuid, Target>,
    files: HashMap<WatchDescriptor, HashMap<OsString, Uuid>>,
    next_look: Instant,
}

impl Watcher {
    fn wait(&self, wake: &EventFd) -> Result<(), Errno> {
        let due = self.targets.values().filter(|target| target.grown).map(|target| target.due).min();
        let until = due.map_or(self.next_look, |due| due.min(self.next_look));
        // Rounded up, so that it is due then.
        let wait = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX);
        // A guest may print without end: between two announcements nobody is woken by it.
        let growth = if due.is_some() { PollFlags::empty() } else { PollFlags::POLLIN };
        let mut sources = [PollFd::new(self.inotify.as_fd(), growth), PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
        match poll(&mut sources, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
        match wake.read() {
            Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn note_growth(&mut self) {
        loop {
            match self.inotify.read_events() {
                Ok(events) => events.into_iter().for_each(|event| self.note(event)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                Err(error) => {
                    log::warn!("the watch of console logs cannot be read: {error}");
                    return;
                }
            }
        }
    }

    fn note(&mut self, event: InotifyEvent) {
        if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            // Which logs grew was lost; all may have.
            self.targets.values_mut().for_each(|target| target.grown = true);
        } else if event.mask.contains(AddWatchFlags::IN_IGNORED) {
            // The directory is gone; it may come again.
            for id in self.files.remove(&event.wd).into_iter().flat_map(HashMap::into_values) {
                if let Some(target) = self.targets.get_mut(&id) {
                    target.place = None;
                }
            }
        } else if let Some(name) = event.name
            && let Some(id) = self.files.get(&event.wd).and_then(|names| names.get(&name))
            && let Some(target) = self.targets.get_mut(id)
        {
            target.grown = true;
        }
    }

    fn obey(&mut self, orders: Orders) {
        if orders.mount_device.is_some() && orders.mount_device != self.mount_device {
            self.mount_device = orders.mount_device;
            self.look_again(|_| true);
        }
        for (id, log) in orders.targets {
            if self.targets.get(&id).map(|target| &target.log) == log.as_ref() {
                continue;
            }
            if let Some(mut target) = self.targets.remove(&id) {
                self.give_up(target.place.take());
                if target.grown {
                    self.inventory.apply(vec![Update::Console(id, target.growth())]);
                    target.punch();
                }
            }
            if let Some(log) = log {
                let place = self.place(id, &log.path);
                let mut target =
                    Target { log, place, due: Instant::now(), grown: false, announced: None, punched: Some(0) };
                if target.place.is_some() {
                    // What it printed while nobody watched is on the disk.
                    target.growth();
                    target.punch();
                }
                self.targets.insert(id, target);
            }
        }
    }

    fn look_again(&mut self, which: impl Fn(&Target) -> bool) {
        let ids: Vec<Uuid> = self.targets.iter().filter(|(_, target)| which(target)).map(|(id, _)| *id).collect();
        for id in ids {
            let Some(mut target) = self.targets.remove(&id) else { continue };
            let watched = target.place.is_some();
            self.give_up(target.place.take());
            target.place = self.place(id, &target.log.path);
            // It may have grown before it was watched.
            target.grown |= !watched && target.place.is_some();
            self.targets.insert(id, target);
        }
    }

    /// Watches a log, if it may be touched and its directory exists.
    fn place(&mut self, id: Uuid, log: &Path) -> Option<Place> {
        let (directory, name) = (log.parent()?, log.file_name()?);
        // With `..` in it a path may lead elsewhere than it begins.
        let plain = log.is_absolute() && log.components().all(|component| component != Component::ParentDir);
        if !plain || !(log.starts_with(&self.state_directory) || self.may_touch(log)) {
            return None;
        }
        let flags = AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_ONLYDIR;
        match self.inotify.add_watch(directory, flags) {
            Ok(watch) => {
                self.files.entry(watch).or_default().insert(name.to_owned(), id);
                Some((watch, name.to_owned()))
            }
            Err(Errno::ENOENT) => None,
            Err(error) => {
                log::warn!("the console log {} is not watched: {error}", log.display());
                None
            }
        }
    }

    /// A foreign log has to be a regular file on another device than our mount.
    fn may_touch(&self, log: &Path) -> bool {
        if let Some(device) = self.mount_device
            && mount_points(device).iter().any(|mount_point| log.starts_with(mount_point))
        {
            return false;
        }
        log.symlink_metadata().is_ok_and(|metadata| metadata.is_file() && Some(metadata.dev()) != self.mount_device)
    }

    fn give_up(&mut self, place: Option<Place>) {
        let Some((watch, name)) = place else { return };
        let Some(names) = self.files.get_mut(&watch) else { return };
        names.remove(&name);
        if names.is_empty() {
            self.files.remove(&watch);
            // Its directory may be gone, and the watch with it.
            let _removed = self.inotify.rm_watch(watch);
        }
    }

    fn announce(&mut self) {
        let now = Instant::now();
        let mut updates = Vec::new();
        for (id, target) in &mut self.targets {
            if target.grown && target.due <= now {
                target.grown = false;
                target.due = now + QUIET;
                updates.push(Update::Console(*id, target.growth()));
                target.punch();
            }
        }
        if !updates.is_empty() {
            self.inventory.apply(updates);
        }
    }
}

/// Where a device is mounted, without touching it.
pub(super) fn mount_points(device: u64) -> Vec<PathBuf> {
    let id = format!("{}:{}", nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(2);
            let matches = fields.next() == Some(&id);
            let mount_point = fields.nth(1)?;
            matches.then(|| unescape(mount_point))
        })
        .collect()
}

/// The kernel writes blanks and backslashes in a path as `\040`.
fn unescape(field: &str) -> PathBuf {
    let bytes = field.as_bytes();
    let mut path = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = (bytes[at] == b'\\').then(|| field.get(at + 1..at + 4)).flatten();
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                path.push(byte);
                at += 4;
            }
            None => {
                path.push(bytes[at]);
                at += 1;
            }
        }
    }
    PathBuf::from(OsString::from_vec(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blanks_in_mount_points_are_read() {
        assert_eq!(unescape("/mnt/a\\040b\\134c"), PathBuf::from("/mnt/a b\\c"));
        assert_eq!(unescape("/odd\\"), PathBuf::from("/odd\\"));
    }

    #[test]
    fn the_device_of_proc_is_mounted_at_proc() {
        let device = Path::new("/proc").metadata().unwrap().dev();
        assert!(mount_points(device).contains(&PathBuf::from("/proc")));
    }
}
