"""A libvirtd of our own: in a mount namespace in which libvirt's directories are ours."""

import subprocess
import uuid
from pathlib import Path

# $1 is our directory.
START = """
    for pair in etc:/etc/libvirt lib:/var/lib/libvirt run:/run/libvirt log:/var/log/libvirt cache:/var/cache/libvirt; do
        mkdir -p "${pair#*:}" && mount --bind "$1/${pair%%:*}" "${pair#*:}" || exit 1
    done
    exec libvirtd -f "$1/etc/libvirtd.conf" -p "$1/run/libvirtd.pid"
"""
DAEMON = """
unix_sock_dir = "{0}/run"
auth_unix_rw = "none"
auth_unix_ro = "none"
listen_tls = 0
listen_tcp = 0
host_uuid = "{1}"
log_outputs = "3:file:{0}/log/libvirtd.log"
"""
QEMU = """
user = "root"
group = "root"
security_driver = "none"
stdio_handler = "file"
namespaces = []
cgroup_controllers = []
remember_owner = 0
"""


class Libvirtd:
    """The process, and its directories in one that is given."""

    def __init__(self, directory: Path):
        self.directory = directory
        for name in ("etc", "lib", "run", "log", "cache"):
            (directory / name).mkdir()
        (directory / "etc/libvirtd.conf").write_text(DAEMON.format(directory, uuid.uuid4()))
        (directory / "etc/qemu.conf").write_text(QEMU)
        self.socket = directory / "run/libvirt-sock"
        self.uri = f"qemu+unix:///system?socket={self.socket}"
        self.process: subprocess.Popen | None = None

    def start(self):
        """It listens some time after this."""
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "bash", "-c", START, "bash", self.directory],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def stop(self):
        """Guests go on."""
        if self.process:
            self.process.terminate()
            self.process.wait()
            self.process = None

    def complaints(self) -> str:
        log = self.directory / "log/libvirtd.log"
        return log.read_text() if log.exists() else ""
