"""A volume that is given to a running guest and taken from it: ours, and libvirt's two calls on an open connection."""

import time
import uuid
from pathlib import Path

from .files import read, wait_for_state, write
from .guest import Libvirt
from .measurement import Row
from .tree import Tree

MEBIBYTES = 64
ELEMENT = """<disk type='file' device='disk'><driver name='qemu' type='raw' discard='unmap'/><source file='{file}'/>
<target dev='vdz' bus='virtio'/><serial>by-hand</serial></disk>"""

# What libvirt calls vdz.
ALIAS = "virtio-disk25"


class Change:
    """One of two changes that undo each other; the other one is not counted."""

    def __init__(self, change, before=lambda: None, after=lambda: None):
        self.change, self.prepare, self.finish = change, before, after

    def __call__(self):
        self.change()


class Attachments:
    """A tree on a real libvirt, whose guest has what is attached to it."""

    def __init__(self, libvirt: Libvirt, tree: Tree):
        self.libvirt = libvirt
        instance = tree.root / "instances" / libvirt.guest
        deadline = time.monotonic() + 60
        while not instance.exists() or read(instance / "state") != b"active\n":
            if time.monotonic() > deadline:
                raise SystemExit("bench: the guest does not appear")
            time.sleep(0.01)
        self.volume = self.make_volume(tree.root / "volumes" / str(uuid.uuid4()))
        file = libvirt.directory / "by-hand.raw"
        with open(file, "wb") as opened:
            opened.truncate(MEBIBYTES << 20)
        self.element = ELEMENT.format(file=file)

    @staticmethod
    def make_volume(volume: Path) -> Path:
        volume.mkdir()
        write(volume / "disk_format", "raw")
        write(volume / "size_bytes", f"{MEBIBYTES}M")
        write(volume / "state", "available")
        wait_for_state(volume, b"available")
        return volume

    def attach(self):
        write(self.volume / "attach", f"instances/{self.libvirt.guest}")
        wait_for_state(self.volume, b"in_use")

    def detach(self):
        write(self.volume / "detach", "1")
        wait_for_state(self.volume, b"available")

    def rows(self) -> list[Row]:
        attach, detach = lambda: self.libvirt.attach(self.element), lambda: self.libvirt.detach(self.element, ALIAS)
        return [
            Row("attach, live", Change(self.attach, after=self.detach), "libvirt's call", Change(attach, after=detach),
                most_added=0.05),
            Row("detach, live", Change(self.detach, before=self.attach), "libvirt's call, event",
                Change(detach, before=attach), most_added=0.05),
        ]
