//! A real libvirtd behind a real mount: stopped, killed, started again, and commanded by virsh.

mod support;

#[allow(dead_code, reason = "each test program uses its own part of this")]
#[path = "libvirt_backend/daemon.rs"]
mod host;

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use host::Daemon as Host;
use support::{Daemon, signal, wait_until};
use uuid::Uuid;

/// Generous on a busy machine; the promise is 2 s.
const RIGHT_AGAIN: Duration = Duration::from_secs(15);
/// Reads in each half of a round of the comparison, and rounds.
const READS: usize = 400;
const ROUNDS: usize = 8;

/// What virsh starts here it also ends.
struct Virsh {
    host: Host,
    domains: Vec<Uuid>,
}

impl Virsh {
    fn new() -> Virsh {
        Virsh { host: Host::start(), domains: Vec::new() }
    }

    fn socket(&self) -> String {
        self.host.directory().join("run/libvirt-sock").display().to_string()
    }

    fn run(&self, arguments: &[&str]) -> std::process::Output {
        let uri = format!("qemu:///system?socket={}", self.socket());
        Command::new("virsh").args(["--quiet", "--connect", &uri]).args(arguments).output().expect("virsh runs")
    }

    fn does(&self, arguments: &[&str]) {
        let output = self.run(arguments);
        assert!(output.status.success(), "virsh {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// A guest without disks: its firmware looks for something to boot for ever.
    fn define(&mut self, name: &str) -> Uuid {
        let id = Uuid::new_v4();
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><uuid>{id}</uuid><memory unit='MiB'>16</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='pc'>hvm</type></os></domain>"
        );
        let file = self.host.directory().join(format!("{id}.xml"));
        fs::write(&file, xml).expect("a definition");
        self.domains.push(id);
        self.does(&["define", &file.display().to_string()]);
        id
    }
}

impl Drop for Virsh {
    fn drop(&mut self) {
        self.host.go_on();
        for id in &self.domains {
            self.run(&["destroy", &id.to_string()]);
        }
    }
}

fn mount(virsh: &Virsh) -> Daemon {
    Daemon::start_with(&virsh.socket(), &["--settle", "1s"])
}

fn appears(daemon: &Daemon, id: Uuid) {
    wait_until("the domain appears", || daemon.path(format!("instances/{id}/state")).exists());
}

/// How long each of many reads took.
fn timed_reads(daemon: &Daemon, id: Uuid, word: &str) -> Vec<Duration> {
    let path = daemon.path(format!("instances/{id}/state"));
    (0..READS)
        .map(|_| {
            let begun = Instant::now();
            let text = fs::read_to_string(&path).expect("readable");
            let took = begun.elapsed();
            assert_eq!(text.trim_end(), word);
            took
        })
        .collect()
}

fn percentile(times: &mut [Duration], percent: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() * percent / 100).min(times.len() - 1)]
}

#[test]
fn a_stopped_libvirtd_delays_no_reader_and_when_it_goes_on_all_is_right() {
    let mut virsh = Virsh::new();
    let id = virsh.define("stopped");
    let daemon = mount(&virsh);
    appears(&daemon, id);
    virsh.does(&["start", &id.to_string()]);
    daemon.wait_state(id, "active");

    let (mut usual, mut stopped) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        usual.extend(timed_reads(&daemon, id, "active"));
        virsh.host.stop();
        stopped.extend(timed_reads(&daemon, id, "active"));
        virsh.host.go_on();
    }
    let median = (percentile(&mut usual, 50), percentile(&mut stopped, 50));
    let most = (percentile(&mut usual, 99), percentile(&mut stopped, 99));
    println!("reads of state, usual and while libvirtd is stopped: median {median:?}, 99 % {most:?}");
    assert!(most.1 < most.0 * 5 + Duration::from_millis(5), "reads wait for libvirtd: {most:?}");

    virsh.host.stop();
    wait_until("health says since when", || daemon.read("health").contains("hypervisor does not answer since 20"));
    daemon.set(format!("instances/{id}/state"), "paused");
    assert_eq!(daemon.read(format!("instances/{id}/state")), "active", "the last known truth");
    assert_eq!(daemon.read(format!("instances/{id}/task")), "pausing");
    virsh.host.go_on();
    let begun = Instant::now();
    daemon.wait_state(id, "paused");
    wait_until("health recovers", || daemon.read("health").contains("hypervisor ok"));
    wait_until("the task ended", || daemon.read(format!("instances/{id}/task")).is_empty());
    println!("all is right {:?} after libvirtd goes on", begun.elapsed());
    assert!(begun.elapsed() < RIGHT_AGAIN);
    let said = virsh.run(&["domstate", &id.to_string()]).stdout;
    assert_eq!(String::from_utf8_lossy(&said).trim(), "paused", "virsh sees the same");
}

/// Longer than a keepalive (30 s) bears: what was asked is neither given up nor done twice, whoever hangs.
#[test]
fn what_was_asked_of_a_libvirtd_that_stopped_for_long_has_a_known_end() {
    if std::env::var_os("INSTANCEFS_LONG").is_none() {
        println!("not run without INSTANCEFS_LONG: it takes a minute");
        return;
    }
    let mut virsh = Virsh::new();
    let id = virsh.define("stopped-for-long");
    let daemon = mount(&virsh);
    appears(&daemon, id);
    virsh.does(&["start", &id.to_string()]);
    daemon.wait_state(id, "active");
    virsh.host.stop();
    let stopped = Instant::now();
    daemon.set(format!("instances/{id}/state"), "paused");
    let mut health = String::new();
    while stopped.elapsed() < Duration::from_secs(50) {
        let now = daemon.read("health").lines().next().unwrap_or_default().to_owned();
        if now != health {
            println!("{:?}: {now}; task {:?}", stopped.elapsed(), daemon.read(format!("instances/{id}/task")));
            health = now;
        }
        assert_eq!(daemon.read(format!("instances/{id}/state")), "active", "the last known truth");
        std::thread::sleep(Duration::from_millis(20));
    }
    virsh.host.go_on();
    let begun = Instant::now();
    wait_until("health recovers", || daemon.read("health").contains("hypervisor ok"));
    println!("health {:?} after", begun.elapsed());
    wait_until("the task ended", || daemon.read(format!("instances/{id}/task")).is_empty());
    println!("task ended {:?} after: {}", begun.elapsed(), daemon.read(format!("instances/{id}/last_task/state")));
    let truth = || match String::from_utf8_lossy(&virsh.run(&["domstate", &id.to_string()]).stdout).trim() {
        "paused" => "paused",
        "running" => "active",
        other => panic!("{other}"),
    };
    wait_until("the truth is shown", || daemon.read(format!("instances/{id}/state")) == truth());
    println!("right {:?} after: {}", begun.elapsed(), truth());
    assert!(begun.elapsed() < RIGHT_AGAIN);
    let other = if truth() == "paused" { "active" } else { "paused" };
    daemon.set(format!("instances/{id}/state"), other);
    wait_until("it obeys again", || truth() == other);
}

#[test]
fn a_libvirtd_that_was_killed_and_is_back_is_used_again_and_what_virsh_did_meanwhile_is_seen() {
    let mut virsh = Virsh::new();
    let (changes, goes) = (virsh.define("changes"), virsh.define("goes"));
    let daemon = mount(&virsh);
    appears(&daemon, changes);
    appears(&daemon, goes);
    daemon.set(format!("instances/{changes}/state"), "active");
    daemon.wait_state(changes, "active");
    daemon.set(format!("instances/{changes}/description"), "kept");

    virsh.host.kill();
    wait_until("health notices", || daemon.read("health").contains("hypervisor down since 20"));
    assert_eq!(daemon.read(format!("instances/{changes}/state")), "active", "the last known truth");
    daemon.set(format!("instances/{changes}/locked"), "1");

    // What virsh does now, the daemon cannot hear.
    signal(daemon.pid(), libc::SIGSTOP);
    virsh.host.restart();
    let connected = Instant::now();
    while !virsh.run(&["list"]).status.success() {
        assert!(connected.elapsed() < support::DEADLINE, "libvirtd does not answer");
    }
    virsh.does(&["suspend", &changes.to_string()]);
    virsh.does(&["undefine", &goes.to_string()]);
    let comes = virsh.define("comes");
    virsh.does(&["start", &comes.to_string()]);
    signal(daemon.pid(), libc::SIGCONT);

    let begun = Instant::now();
    daemon.wait_state(changes, "paused");
    wait_until("one is gone", || !daemon.path(format!("instances/{goes}")).exists());
    appears(&daemon, comes);
    daemon.wait_state(comes, "active");
    wait_until("health recovers", || daemon.read("health").contains("hypervisor ok"));
    println!("all is right {:?} after libvirtd is back", begun.elapsed());
    assert!(begun.elapsed() < RIGHT_AGAIN);
    assert_eq!(daemon.read(format!("instances/{changes}/description")), "kept");
    assert_eq!(daemon.read(format!("instances/{changes}/locked")), "1");

    virsh.does(&["resume", &changes.to_string()]);
    daemon.wait_state(changes, "active");
    daemon.set(format!("instances/{changes}/locked"), "0");
    daemon.set(format!("instances/{changes}/state"), "paused");
    let said = virsh.run(&["domstate", &changes.to_string()]).stdout;
    assert_eq!(String::from_utf8_lossy(&said).trim(), "paused", "it obeys again");
}

#[test]
fn libvirts_own_test_driver_works_for_lifecycle() {
    let daemon = Daemon::start_with("test:///default", &[]);
    wait_until("its domain appears", || daemon.path("by-name/instances/test").exists());
    let state = "by-name/instances/test/state";
    assert_eq!(daemon.read(state), "active");
    for word in ["paused", "active", "stopped", "active"] {
        daemon.set(state, word);
        wait_until(&format!("it is {word}"), || daemon.read(state) == word);
    }
    assert!(daemon.read("health").contains("hypervisor ok"));
}
