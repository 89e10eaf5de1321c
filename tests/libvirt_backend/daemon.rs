//! A libvirtd of our own: in a mount namespace in which libvirt's directories are ours.

use std::cell::RefCell;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use uuid::Uuid;

pub struct Daemon {
    directory: tempfile::TempDir,
    host_uuid: Uuid,
    process: RefCell<Option<Child>>,
}

/// Runs in the namespace: `$1` is our directory.
const START: &str = r#"
    for pair in etc:/etc/libvirt lib:/var/lib/libvirt run:/run/libvirt log:/var/log/libvirt cache:/var/cache/libvirt; do
        mkdir -p "${pair#*:}" && mount --bind "$1/${pair%%:*}" "${pair#*:}" || exit 1
    done
    exec libvirtd -f "$1/etc/libvirtd.conf" -p "$1/run/libvirtd.pid"
"#;

impl Daemon {
    pub fn start() -> Self {
        let daemon = Self::prepare();
        daemon.restart();
        daemon
    }

    /// Everything but the process.
    pub fn prepare() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        for name in ["etc", "lib", "run", "log", "cache"] {
            fs::create_dir(at.join(name)).unwrap();
        }
        let host_uuid = Uuid::new_v4();
        let libvirtd = format!(
            "unix_sock_dir = \"{0}/run\"\nauth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\nlisten_tls = 0\n\
             listen_tcp = 0\nhost_uuid = \"{host_uuid}\"\nlog_outputs = \"2:file:{0}/log/libvirtd.log\"\n",
            at.display()
        );
        fs::write(at.join("etc/libvirtd.conf"), libvirtd).unwrap();
        let qemu = "user = \"root\"\ngroup = \"root\"\nsecurity_driver = \"none\"\nstdio_handler = \"file\"\n\
                    namespaces = []\ncgroup_controllers = []\nremember_owner = 0\n";
        fs::write(at.join("etc/qemu.conf"), qemu).unwrap();
        Self { directory, host_uuid, process: RefCell::new(None) }
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn host_uuid(&self) -> Uuid {
        self.host_uuid
    }

    fn socket_path(&self) -> PathBuf {
        self.directory().join("run/libvirt-sock")
    }

    pub fn socket(&self) -> String {
        format!("unix:{}", self.socket_path().display())
    }

    pub fn definition(&self, uuid: Uuid) -> String {
        format!(
            "<domain type='qemu'><name>daemon</name><uuid>{uuid}</uuid><memory>8192</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='pc'>hvm</type></os></domain>"
        )
    }

    /// Starts the process and waits until it listens, which is later than that its socket is there.
    pub fn restart(&self) {
        let _ = fs::remove_file(self.socket_path());
        let child = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "bash", "-c", START, "bash"])
            .arg(self.directory())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        *self.process.borrow_mut() = Some(child);
        let deadline = Instant::now() + Duration::from_secs(20);
        while UnixStream::connect(self.socket_path()).is_err() {
            assert!(Instant::now() < deadline, "libvirtd does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// `unshare` and `bash` each become the next program, so the child is the daemon itself.
    fn signal(&self, signal: Signal) {
        if let Some(child) = self.process.borrow().as_ref() {
            kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        }
    }

    pub fn stop(&self) {
        self.signal(Signal::SIGSTOP);
    }

    pub fn go_on(&self) {
        self.signal(Signal::SIGCONT);
    }

    pub fn kill(&self) {
        if let Some(mut child) = self.process.borrow_mut().take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}
