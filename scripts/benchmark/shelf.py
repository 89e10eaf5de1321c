"""Shelving."""

import uuid
from pathlib import Path

from .files import process, rehearse, wait_for_state, write
from .measurement import Row, measure
from .tree import Tree


class Shelf:
    """A stopped instance whose disk holds random data, to be shelved again and again."""

    def __init__(self, tree: Tree, mebibytes: int):
        self.tree = tree
        image = tree.root / "images" / str(uuid.uuid4())
        empty = tree.directory / "empty"
        process(["qemu-img", "create", "-f", "qcow2", empty, f"{mebibytes + 64}M"])
        image.mkdir()
        process(["cp", empty, image / "data"])
        write(image / "state", "active")
        wait_for_state(image, b"active")
        self.instance = tree.root / "instances" / str(uuid.uuid4())
        self.instance.mkdir()
        write(self.instance / "image", f"images/{image.name}")
        write(self.instance / "state", "stopped")
        wait_for_state(self.instance, b"stopped")
        state = tree.directory / "state"
        self.disk = state / "disks" / self.instance.name / "root.qcow2"
        self.copies = state / "shelf" / self.instance.name
        process(["qemu-io", "-f", "qcow2", "-c", f"write -s {tree.directory / 'source'} 0 {mebibytes}M", self.disk])
        self.copying_seconds = 0.0
        self.allocated = 0.0

    def prepare(self):
        write(self.instance / "state", "stopped")
        wait_for_state(self.instance, b"stopped")
        # Else the next shelving would remove it, which is not copying.
        for copy in self.copies.glob("*") if self.copies.exists() else []:
            copy.unlink()
        rehearsal = self.tree.directory / "rehearsal"
        # As the daemon copies; shelving itself would also read what it has written from the disk again.
        rehearse(lambda: process(["dd", "bs=256K", f"if={self.disk}", f"of={rehearsal}"]), rehearsal.unlink)

    def __call__(self):
        write(self.instance / "state", "shelved")
        wait_for_state(self.instance, b"shelved")
        [copy] = self.copies.iterdir()
        self.allocated = max(self.allocated, copy.stat().st_blocks / self.disk.stat().st_blocks)
        self.tree.log.flush()
        said = [line for line in (self.tree.directory / "daemon.log").read_text().splitlines() if "were copied in" in line]
        self.copying_seconds = float(said[-1].split("were copied in ")[1].split(" s")[0])


class ShelfCopying:
    """What of that moved the data, as the daemon's log says: until the last byte is written, as for its rivals."""

    def __init__(self, shelf: Shelf):
        self.shelf, self.prepare = shelf, shelf.prepare

    def __call__(self) -> float:
        self.shelf()
        return self.shelf.copying_seconds


class BestCopy:
    """The faster of two tools that copy a disk with its holes."""

    def __init__(self, shelf: Shelf, target: Path):
        self.tools = [["cp", "--sparse=always", shelf.disk, target],
                      ["qemu-img", "convert", "-W", "-f", "qcow2", "-O", "qcow2", shelf.disk, target]]
        self.target = target

    def __call__(self) -> float:
        times = []
        for tool in self.tools:
            rehearse(lambda: process(tool), self.target.unlink)
            times.append(measure(lambda: process(tool)))
            self.target.unlink()
        return min(times)


class ProvenCopy:
    """What one would do by hand to be as sure of a copy."""

    def __init__(self, shelf: Shelf, target: Path):
        self.disk, self.target = shelf.disk, target

    def prepare(self):
        rehearse(self.copy, self.target.unlink)

    def finish(self):
        self.target.unlink()

    def copy(self):
        process(["cp", "--sparse=always", self.disk, self.target])

    def __call__(self):
        self.copy()
        process(["sync", self.target])
        process(["sha512sum", self.target])
        process(["cmp", self.disk, self.target])
        process(["qemu-img", "check", "-f", "qcow2", self.target])


def shelf_rows(tree: Tree, shelf: Shelf, mebibytes: int) -> list[Row]:
    best = BestCopy(shelf, tree.directory / "shelf-copy")
    return [
        Row(f"shelve {mebibytes} MiB, copying", ShelfCopying(shelf), "best of cp, convert", best, reach=1 / 0.9),
        Row("shelve, durable, proven", shelf, "best of cp, convert", best),
        Row("shelve, durable, proven", shelf, "cp, sync, sha, cmp", ProvenCopy(shelf, tree.directory / "proven-copy")),
    ]
