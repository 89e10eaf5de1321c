"""Reading and writing attributes."""

import os
from pathlib import Path

from .files import process, read, read_all, write
from .tree import Tree

SIBLING = Path("/sys/class/net/lo/operstate")
VIRSH = ["virsh", "--connect", "test:///default", "domstate", "test"]


class Toggle:
    """Writes 1 and 0 in turn: writing what is already true would measure nothing."""

    def __init__(self, path: Path):
        self.path = path
        self.value = 0

    def __call__(self):
        self.value = 1 - self.value
        write(self.path, str(self.value))


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


def walk(instances: list[Path]):
    """Without summary/: three files of every instance."""
    for instance in instances:
        for name in ("name", "state", "locked"):
            read(instance / name)


def rows(tree: Tree) -> list[tuple]:
    """(what, calls in one measurement, ours, name of the rival, rival)"""
    one = tree.instances[0]
    state = one / "state"
    summary = tree.root / "summary" / "instances"
    return [
        ("read state", 200, lambda: read(state), "sysfs operstate", lambda: read(SIBLING)),
        ("read state, no process", 1, lambda: read(state), "virsh domstate", lambda: process(VIRSH)),
        ("cat state", 1, lambda: process(["cat", state]), "virsh domstate", lambda: process(VIRSH)),
        (f"summary of {len(tree.instances)}", 1, lambda: read_all(summary),
         "three files of each", lambda: walk(tree.instances)),
        ("write locked", 1, Toggle(one / "locked"), "fsync and rename", durable_write(tree.directory / "file")),
    ]
