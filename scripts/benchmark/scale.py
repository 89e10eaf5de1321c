"""Hosts of one, a thousand and ten thousand machines, against what one uses there today."""

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from .files import process, write
from .host import Host, resident_kib
from .measurement import Row, spread

VIRSH = ["virsh", "--connect"]
SYSFS = "/sys/class/net/lo/operstate"


class Toggle:
    """Writes 1 and 0 in turn: writing what is already true would measure nothing."""

    def __init__(self, path: Path):
        self.path = path
        self.value = 0

    def next(self) -> str:
        self.value = 1 - self.value
        return str(self.value)

    def __call__(self):
        write(self.path, self.next())


class ShellToggle(Toggle):
    """The same in a shell, as a user does it."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.shell = subprocess.Popen(["sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self):
        self.shell.stdin.write(f"echo {self.next()} > {self.path} && echo done\n")
        self.shell.stdin.flush()
        if self.shell.stdout.readline() != "done\n":
            raise SystemExit(f"bench: {self.path} was not written")


def durable_write(path: Path):
    """What any program pays that changes a small file durably: write a new one, fsync, rename."""
    def once():
        temporary = path.with_suffix(".new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.write(descriptor, b"1\n")
        os.fsync(descriptor)
        os.close(descriptor)
        os.rename(temporary, path)
    return once


@contextmanager
def on_tmpfs(names: list[str]):
    """As many directories as there are instances, in memory."""
    directory = Path(tempfile.mkdtemp(prefix="instancefs-bench.", dir="/dev/shm"))
    try:
        for name in names:
            (directory / name).mkdir()
        yield directory
    finally:
        shutil.rmtree(directory)


@contextmanager
def on_one_processor(host: Host):
    """Caller, daemon and libvirtd on one: the nearest to each other that they can be."""
    pids = [host.daemon.pid, host.libvirtd.process.pid]
    threads = [int(thread) for pid in pids for thread in os.listdir(f"/proc/{pid}/task")]
    everywhere = os.sched_getaffinity(0)
    host.probe.ask("pin", 0)
    for thread in threads:
        os.sched_setaffinity(thread, {0})
    try:
        yield
    finally:
        host.probe.ask("pin", -1)
        for thread in threads:
            os.sched_setaffinity(thread, everywhere)


def read_rows(host: Host, where: str) -> list[Row]:
    """One state, by whoever has a program running already."""
    state = host.root / "instances" / host.any / "state"
    read = host.probe.timed("read", 500, state)
    return [
        Row(f"read state{where}", read, "libvirt call", host.probe.timed("state", 200, host.any), reach=1 / 1.7, aim=1 / 4),
        Row(f"read state{where}", read, "sysfs attribute", host.probe.timed("read", 500, SYSFS), reach=8, aim=3.5),
    ]


def rows(host: Host, memory: Path) -> list[Row]:
    """What one asks of one machine, and of all."""
    probe, instances, virsh = host.probe, host.root / "instances", [*VIRSH, host.uri]
    one = instances / host.any
    domstate = lambda: process([*virsh, "domstate", host.any])
    list_all = lambda: process([*virsh, "list", "--all"])
    summary = probe.timed("slurp", host.root / "summary/instances")
    states = probe.timed("states", instances, "state")
    metadata = [*virsh, "metadata", host.any, "--uri", "http://example.org/bench", "--key", "bench", "--config"]
    many = host.count >= 10_000
    return [
        *read_rows(host, ""),
        Row("read state", probe.timed("read", 500, one / "state"), "virsh domstate", domstate, reach=1 / 500, aim=1 / 1000),
        Row("cat state", lambda: process(["cat", one / "state"]), "virsh domstate", domstate, reach=1 / 7, aim=1 / 9),
        Row("all by summary", summary, "virsh list --all", list_all, **goal(many, 1 / 200, 1 / 800)),
        Row("all by summary", summary, "one call for all", probe.timed("stats"), **goal(many, 1 / 12, 1 / 50)),
        Row("all state files", states, "virsh list --all", list_all, **goal(many, 1 / 4, 1 / 10)),
        Row("ls", lambda: process(["ls", instances]), "ls on tmpfs", lambda: process(["ls", memory]), **goal(many, 2, 1.2)),
        Row("ls -l", lambda: process(["ls", "-l", instances]), "ls -l on tmpfs", lambda: process(["ls", "-l", memory]),
            **goal(many, 2.5, 1.5)),
        Row("echo 1 > locked", ShellToggle(one / "locked"), "virsh metadata --set",
            lambda: process([*metadata, "--set", "<locked/>"]), reach=1 / 30, aim=1 / 50),
        Row("write a flag", Toggle(instances / host.running / "disable_terminate"), "fsync and rename", durable_write(host.directory / "file")),
        Row("suspend or resume", probe.timed("write", 4, instances / host.running / "state", "paused", "active"),
            "libvirt call", probe.timed("power", 4, host.running)),
    ]


def goal(applies: bool, reach: float, aim: float) -> dict:
    """A goal that is set for one size of host only."""
    return {"reach": reach, "aim": aim} if applies else {}


class Start:
    """From the first instruction until all domains are there."""

    def __init__(self, stop, start):
        self.prepare, self.start = stop, start

    def __call__(self) -> float:
        return self.start()


def start_row(host: Host) -> Row:
    """The daemon with all its instances, and libvirtd with all its domains."""
    def restart_libvirtd() -> float:
        host.stop_daemon()
        host.libvirtd.stop()
        seconds = host.start_libvirtd()
        host.start_daemon()
        return seconds
    return Row("start", Start(host.stop_daemon, host.start_daemon), "libvirtd's start", restart_libvirtd,
               **goal(host.count >= 10_000, 1 / 2, 1 / 10))


def commit_seconds(host: Host) -> tuple[float, int]:
    """How long the store's commits took in all, and how many there were."""
    text = (host.root / "metrics").read_text()
    value = lambda name: next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))
    return value("instancefs_store_commit_duration_seconds_sum"), int(value("instancefs_store_commit_duration_seconds_count"))


def suspending(host: Host, rounds: int) -> dict:
    """What a write adds to the bare call, beside the commits."""
    path = host.root / "instances" / host.running / "state"
    ours, bare = [], []
    before = commit_seconds(host)
    for _ in range(rounds):
        ours += host.probe.ask("write", 4, path, "paused", "active")
        bare += host.probe.ask("power", 4, host.running)
    after = commit_seconds(host)
    commits = (after[1] - before[1]) / len(ours)
    commit = (after[0] - before[0]) / max(1, after[1] - before[1])
    added = (statistics.median(ours) - statistics.median(bare)) / 1e9
    return {"added_seconds": added, "commits": commits, "commit_seconds": commit,
            "beside_commits_seconds": added - commits * commit}


def waking(host: Host, changes: int) -> dict:
    """From libvirt's event in a bare client to an awake inotify watcher in the same program."""
    path = host.root / "instances" / host.running / "state"
    host.probe.ask("wake", 4, host.running, path)
    times = sorted(time / 1e9 for time in host.probe.ask("wake", changes, host.running, path))
    return {"median_seconds": statistics.median(times), "percent_99_seconds": times[int(len(times) * 0.99) - 1],
            "spread": spread(times)}


def settled_kib(pid: int) -> int:
    """What a process has in memory when it has nothing left to do."""
    before = 0
    while abs(resident_kib(pid) - before) > 64:
        before = resident_kib(pid)
        time.sleep(2)
    return resident_kib(pid)


def resident(host: Host) -> tuple[int, int]:
    """KiB of the daemon and of libvirtd after a start of each, and after all was listed once."""
    host.stop_daemon()
    host.libvirtd.stop()
    host.start_libvirtd()
    host.start_daemon()
    process([*VIRSH, host.uri, "list", "--all"])
    host.probe.ask("states", host.root / "instances", "state")
    return settled_kib(host.daemon.pid), settled_kib(host.libvirtd.process.pid)


def memory(kib: tuple[int, int], baseline: tuple[int, int], machines: int) -> dict:
    """KiB for each machine more, ours and libvirtd's."""
    return {"ours_kib": (kib[0] - baseline[0]) / machines, "rival_kib": (kib[1] - baseline[1]) / machines}
