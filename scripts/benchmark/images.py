"""Copying an image in."""

import os
import time
import uuid
from pathlib import Path

from .files import process, rehearse, wait_for_state, write
from .measurement import Row
from .tree import Tree


class PlainCopy:
    """cp of an image into a new file on the disk that also holds the tree's images, and what else one does to know what
    it is."""

    def __init__(self, source: Path, target: Path, verify: bool):
        self.source, self.target, self.verify = source, target, verify

    def prepare(self):
        rehearse(self.copy, self.finish)

    def finish(self):
        self.target.unlink()

    def copy(self):
        process(["cp", self.source, self.target])

    def __call__(self):
        self.copy()
        if self.verify:
            process(["sha512sum", self.target])
            process(["qemu-img", "info", "-f", "raw", self.target])


class DraftCopy:
    """The same into a new draft; committing it inspects and hashes."""

    def __init__(self, tree: Tree, source: Path, verify: bool):
        self.tree, self.source, self.verify = tree, source, verify
        self.draft = Path()
        self.next = Path()

    def prepare(self):
        self.draft, self.next = self.make_draft(), self.make_draft()
        rehearse(self.copy, self.delete)
        self.draft = self.next

    def make_draft(self) -> Path:
        draft = self.tree.root / "images" / str(uuid.uuid4())
        draft.mkdir()
        return draft

    def finish(self):
        """Ends what the daemon still does for this draft: the rival is measured next."""
        if self.verify:
            # An active image stays: its bytes are taken from below, so that many rounds fit on a small disk.
            os.truncate(self.tree.directory / "state" / "images" / self.draft.name / "data", 0)
            return
        self.delete()

    def delete(self):
        write(self.draft / "state", "deleted")
        while self.draft.exists():
            time.sleep(0.005)

    def copy(self):
        process(["cp", self.source, self.draft / "data"])

    def __call__(self):
        self.copy()
        if self.verify:
            write(self.draft / "disk_format", "raw")
            write(self.draft / "state", "active")
            wait_for_state(self.draft, b"active")


def make_source(tree: Tree, mebibytes: int):
    """Random data, for images and disks."""
    with open(tree.directory / "source", "wb") as file:
        for _ in range(mebibytes):
            file.write(os.urandom(1 << 20))


def image_rows(tree: Tree, mebibytes: int) -> list[Row]:
    source = tree.directory / "source"
    return [
        Row(f"cp {mebibytes} MiB into data", DraftCopy(tree, source, False), "cp",
            PlainCopy(source, tree.directory / "copy", False), reach=1 / 0.9),
        Row("the same, and commit", DraftCopy(tree, source, True), "cp, sha512sum, info",
            PlainCopy(source, tree.directory / "verified", True), reach=0.75),
    ]
