//! Real guests of an embedded driver.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::signal;

/// Ends the guests that a test leaves behind, by the pid files of the embedded driver.
pub struct Guests(pub PathBuf);

impl Guests {
    /// Their emulators.
    pub fn pids(&self) -> Vec<u32> {
        let files = fs::read_dir(self.0.join("libvirt/run/qemu")).into_iter().flatten().filter_map(Result::ok);
        files
            .filter(|file| file.path().extension().is_some_and(|extension| extension == "pid"))
            .filter(|file| file.file_name() != "driver.pid")
            .filter_map(|file| fs::read_to_string(file.path()).ok()?.trim().parse().ok())
            .filter(|pid: &u32| Path::new(&format!("/proc/{pid}")).exists())
            .collect()
    }

    /// What they said last: why a test waited in vain.
    fn show_consoles(&self) {
        for entry in fs::read_dir(self.0.join("consoles")).into_iter().flatten().filter_map(Result::ok) {
            let Ok(log) = fs::read(entry.path()) else { continue };
            let log = String::from_utf8_lossy(&log);
            let lines: Vec<&str> = log.lines().collect();
            let last = &lines[lines.len().saturating_sub(30)..];
            eprintln!("{}:\n{}", entry.path().display(), last.join("\n"));
        }
    }
}

impl Drop for Guests {
    fn drop(&mut self) {
        if thread::panicking() {
            self.show_consoles();
        }
        for pid in self.pids() {
            signal(pid, libc::SIGKILL);
        }
    }
}

/// Waits for what an emulated guest does.
pub fn long_wait(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(120);
    while !condition() {
        assert!(Instant::now() < end, "waited in vain for: {what}");
        thread::sleep(Duration::from_millis(50));
    }
}
