"""Volumes as block devices of this host."""

import os
import signal
import subprocess
import time
import uuid
from pathlib import Path

from .files import process, read, wait_for_state, write
from .measurement import Row
from .tree import Tree


class Device:
    """A block device that is written, or read from a cold cache, from end to end."""

    def __init__(self, path: str, mebibytes: int, writes: bool):
        self.path = path
        self.mebibytes = mebibytes
        self.writes = writes

    def prepare(self):
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")

    def __call__(self):
        ends = ["if=/dev/zero", f"of={self.path}", "conv=fsync"] if self.writes else [f"if={self.path}", "of=/dev/null"]
        process(["dd", "bs=1M", f"count={self.mebibytes}", *ends])


class Devices:
    """Volumes as block devices of this host, and what one would make by hand; all gone on leaving."""

    def __init__(self, tree: Tree, mebibytes: int):
        self.tree = tree
        self.mebibytes = mebibytes
        self.volumes: list[Path] = []
        self.loops: list[str] = []
        self.exporter = 0

    def __enter__(self):
        try:
            self.ours = {form: self.attach(form) for form in ("raw", "qcow2")}
            self.theirs = {"raw": self.loop("raw", ["--direct-io=on"]), "qcow2": self.export()}
        except BaseException:
            self.__exit__()
            raise
        return self

    def attach(self, form: str) -> str:
        volume = self.tree.root / "volumes" / str(uuid.uuid4())
        volume.mkdir()
        write(volume / "disk_format", form)
        write(volume / "size_bytes", f"{self.mebibytes}M")
        write(volume / "state", "available")
        wait_for_state(volume, b"available")
        self.volumes.append(volume)
        write(volume / "local_attach", "1")
        wait_for_state(volume, b"in_use")
        return read(volume / "local_device").decode().strip()

    def loop(self, name: str, options: list[str]) -> str:
        file = self.tree.directory / f"by-hand.{name}"
        if name == "raw":
            with open(file, "wb") as opened:
                opened.truncate(self.mebibytes << 20)
        command = ["losetup", "--find", "--show", *options, file]
        self.loops.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
        return self.loops[-1]

    def export(self) -> str:
        """The fastest export that was found by trying: no direct access (which also mixes up writes in QEMU 7.2)."""
        image, shown = self.tree.directory / "by-hand.data", self.tree.directory / "by-hand.qcow2"
        pid = self.tree.directory / "by-hand.pid"
        process(["qemu-img", "create", "-f", "qcow2", image, f"{self.mebibytes}M"])
        shown.touch()
        process(["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=file,filename={image}",
                 "--blockdev", "driver=qcow2,node-name=disk,file=file", "--export",
                 f"type=fuse,id=export,node-name=disk,mountpoint={shown},writable=on,growable=on,allow-other=off",
                 "--pidfile", pid, "--daemonize"])
        self.exporter = int(pid.read_text())
        device = shown.stat().st_dev
        Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").write_text("1024")
        return self.loop("qcow2", [])

    def __exit__(self, *_):
        for volume in self.volumes:
            write(volume / "local_attach", "0")
            wait_for_state(volume, b"available")
        for loop in self.loops:
            process(["losetup", "--detach", loop])
        if self.exporter:
            os.kill(self.exporter, signal.SIGTERM)
            while Path(f"/proc/{self.exporter}").exists():
                time.sleep(0.01)

    def rows(self) -> list[Row]:
        names = {"raw": "losetup", "qcow2": "storage daemon, loop"}
        reach = {"raw": 1 / 0.9, "qcow2": 1 / 0.8}
        return [
            Row(f"{form} device, {'write' if writes else 'read'}",
                Device(self.ours[form], self.mebibytes, writes), names[form],
                Device(self.theirs[form], self.mebibytes, writes), reach=reach[form])
            for form in names for writes in (True, False)
        ]
