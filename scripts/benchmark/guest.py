"""A libvirtd of our own with a running guest, and one open connection to it: libvirt's C functions, called as they are."""

import ctypes
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

from .libvirtd import Libvirtd

LIVE_AND_CONFIG = 1 | 2
DEVICE_REMOVED = 15

# Lets go of each PCI device at once when it is asked to, a thousand times a second: no time of a guest's system is in what
# is measured. It is asked through the registers of the machine type pc (QEMU's docs/specs/acpi_pci_hotplug).
GUEST = bytes.fromhex(
    "fa 31c0 8ed8"        # cli; xor ax, ax; mov ds, ax
    "b034 e643"           # the timer's channel 0, as a rate of
    "b0e8 e640 b003 e640" # 1193182 Hz / 1000
    "fb f4"               # tick: sti; hlt
    "ba10ae 6631c0 66ef"  # bus 0
    "ba04ae 66ed"         # in eax: the slots that are to be let go
    "6685c0 74ec"         # none: tick
    "ba08ae 66ef ebe5"    # eject; tick
)
DOMAIN = """<domain type='qemu'><name>bench</name><uuid>{uuid}</uuid><memory unit='MiB'>32</memory><vcpu>1</vcpu>
<os><type machine='pc'>hvm</type></os><features><acpi/></features><on_reboot>destroy</on_reboot>
<devices><disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{disk}'/>
<target dev='vda' bus='virtio'/></disk></devices></domain>"""


def library() -> ctypes.CDLL:
    functions = ctypes.CDLL("libvirt.so.0")
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint
    for name, result, arguments in [
            ("virConnectOpen", pointer, [text]), ("virConnectClose", ctypes.c_int, [pointer]),
            ("virDomainDefineXML", pointer, [pointer, text]), ("virDomainCreate", ctypes.c_int, [pointer]),
            ("virDomainDestroy", ctypes.c_int, [pointer]), ("virDomainUndefine", ctypes.c_int, [pointer]),
            ("virDomainAttachDeviceFlags", ctypes.c_int, [pointer, text, number]),
            ("virDomainDetachDeviceFlags", ctypes.c_int, [pointer, text, number]),
            ("virConnectDomainEventRegisterAny", ctypes.c_int, [pointer, pointer, ctypes.c_int] + 3 * [pointer]),
            ("virGetLastErrorMessage", text, [])]:
        function = getattr(functions, name)
        function.restype, function.argtypes = result, arguments
    return functions


class Libvirt:
    """The daemon, its guest, and the connection; all gone on leaving."""

    def __init__(self):
        self.directory = Path(tempfile.mkdtemp(prefix="instancefs-bench-libvirt.", dir="/var/tmp"))
        self.libvirtd = Libvirtd(self.directory)
        self.functions = library()
        self.guest = str(uuid.uuid4())
        self.removed: list[str] = []
        self.domain = None
        self.libvirtd.start()

    @property
    def host(self) -> str:
        """As --connect names it."""
        return f"unix:{self.libvirtd.socket}"

    def __enter__(self):
        try:
            self.connect()
            disk = self.directory / "guest.raw"
            disk.write_bytes(GUEST.ljust(510, b"\0") + b"\x55\xaa" + bytes((1 << 20) - 512))
            xml = DOMAIN.format(uuid=self.guest, disk=disk)
            self.domain = self.expect(self.functions.virDomainDefineXML(self.connection, xml.encode()))
            self.expect(self.functions.virDomainCreate(self.domain) == 0)
        except BaseException:
            self.__exit__()
            raise
        return self

    def connect(self):
        deadline = time.monotonic() + 60
        # It is there before it is listened at.
        with socket.socket(socket.AF_UNIX) as tried:
            while tried.connect_ex(str(self.libvirtd.socket)) != 0:
                if self.libvirtd.process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("bench: libvirtd does not start:\n" + self.libvirtd.complaints())
                time.sleep(0.02)
        self.functions.virEventRegisterDefaultImpl()
        self.connection = self.expect(
            self.functions.virConnectOpen(self.libvirtd.uri.encode()))
        prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        # Kept, since libvirt calls it as long as the connection lives.
        self.heard = prototype(lambda _connection, _domain, alias, _opaque: self.removed.append(alias.decode()))
        registered = self.functions.virConnectDomainEventRegisterAny(
            self.connection, None, DEVICE_REMOVED, ctypes.cast(self.heard, ctypes.c_void_p), None, None)
        self.expect(registered >= 0)

    def expect(self, result):
        if not result:
            raise SystemExit(f"bench: libvirt: {self.functions.virGetLastErrorMessage().decode()}")
        return result

    def attach(self, element: str):
        result = self.functions.virDomainAttachDeviceFlags(self.domain, element.encode(), LIVE_AND_CONFIG)
        self.expect(result == 0)

    def detach(self, element: str, alias: str):
        """Returns when the guest has let go. One thread calls and hears: two on one connection crash some versions."""
        result = self.functions.virDomainDetachDeviceFlags(self.domain, element.encode(), LIVE_AND_CONFIG)
        self.expect(result == 0)
        while alias not in self.removed:
            self.expect(self.functions.virEventRunDefaultImpl() == 0)
        self.removed.clear()

    def __exit__(self, *_):
        if self.domain is not None:
            self.functions.virDomainDestroy(self.domain)
            self.functions.virDomainUndefine(self.domain)
        self.libvirtd.stop()
        subprocess.run(["rm", "-r", "--one-file-system", self.directory], check=True)
