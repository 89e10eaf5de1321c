"""A host of many machines: a private libvirtd, and the tree on it."""

import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

from .libvirtd import Libvirtd

# Firmware that finds nothing to boot and halts.
DEFINITION = """<domain type='qemu'>
  <name>{name}</name><uuid>{identity}</uuid>
  <memory unit='MiB'>16</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
</domain>
"""


class Probe:
    """A compiled program that does what it is told; see probe.c."""

    def __init__(self, directory: Path):
        program = directory / "probe"
        source = Path(__file__).with_name("probe.c")
        subprocess.run(["cc", "-O2", "-Wall", "-o", program, source, "-lvirt", "-pthread"], check=True)
        self.process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, *words) -> list[int]:
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("bench: the probe ended")
        return [int(number) for number in answer.split()]

    def timed(self, *words):
        """The median of one order's times in seconds, each time that this is called."""
        only_first = words[0] in ("states", "slurp", "stats")
        return lambda: statistics.median(self.ask(*words)[: 1 if only_first else None]) / 1e9

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def resident_kib(pid: int) -> int:
    """What a process has in memory."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1])


class Host:
    """A libvirtd in directories of its own, with stopped domains and one that runs; all gone on leaving."""

    def __init__(self, program: Path, count: int):
        self.program = program
        self.directory = Path(tempfile.mkdtemp(prefix="instancefs-bench.", dir="/var/tmp"))
        self.directory.chmod(0o711)
        self.libvirtd = Libvirtd(self.directory)
        self.uri = self.libvirtd.uri
        self.root = self.directory / "tree"
        self.count = count + 1
        self.root.mkdir()
        (self.directory / "etc/qemu").mkdir()
        self.daemon = None
        self.running = self._define("bench-running")
        self.stopped = [self._define(f"bench-{number}") for number in range(count)]
        self.any = self.stopped[0]
        self.probe = Probe(self.directory)

    def _define(self, name: str) -> str:
        identity = str(uuid.uuid4())
        (self.directory / "etc/qemu" / f"{name}.xml").write_text(DEFINITION.format(name=name, identity=identity))
        return identity

    def __enter__(self):
        try:
            self.start_libvirtd()
            self.virsh("start", self.running)
            self.start_daemon()
        except BaseException:
            self.__exit__()
            raise
        return self

    def virsh(self, *words):
        subprocess.run(["virsh", "--quiet", "--connect", self.uri, *words], check=True, stdout=subprocess.DEVNULL)

    def start_libvirtd(self) -> float:
        """Returns after how many seconds it has told of all domains."""
        begun = time.perf_counter()
        self.libvirtd.start()
        return self._until(begun, lambda: self.libvirtd.socket.exists()
                           and self.probe.ask("connect", self.uri)[1] >= self.count, self.libvirtd.process)

    def start_daemon(self) -> float:
        """Returns after how many seconds it tells the states of all instances."""
        summary = self.root / "summary/instances"
        begun = time.perf_counter()
        with open(self.directory / "daemon.log", "ab") as log:
            self.daemon = subprocess.Popen(
                [self.program, "mount", "--connect", self.uri, "--state-dir", self.directory / "state", self.root],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return self._until(begun, lambda: self.root.is_mount()
                           and summary.read_bytes().count(b"\n") >= self.count, self.daemon)

    def stop_daemon(self):
        self.daemon.terminate()
        self.daemon.wait()

    def _until(self, begun: float, holds, process: subprocess.Popen) -> float:
        while not holds():
            if process.poll() is not None or time.perf_counter() - begun > 120:
                raise SystemExit(f"bench: {process.args[0]} did not start; see {self.directory}")
            time.sleep(0.002)
        return time.perf_counter() - begun

    def __exit__(self, *_):
        if self.daemon:
            self.stop_daemon()
        self.libvirtd.stop()
        # Guests outlive their libvirtd.
        guest = self.directory / "run/qemu/bench-running.pid"
        if guest.exists():
            os.kill(int(guest.read_text()), signal.SIGKILL)
        self.probe.end()
        if self.root.is_mount():
            subprocess.run(["umount", "-l", self.root], check=False)
        # Never through a mount: only what this run made in its own directory.
        if not self.root.is_mount():
            shutil.rmtree(self.directory)
