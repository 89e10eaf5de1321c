"""A libvirtd of our own with a running guest, and one open connection to it: libvirt's C functions, called as they are."""

import ctypes
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

LIVE_AND_CONFIG = 1 | 2
DEVICE_REMOVED = 15

# Runs in a mount namespace in which libvirt's directories are ours: $1 is our directory.
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
        for name in ("etc", "lib", "run", "log", "cache"):
            (self.directory / name).mkdir()
        (self.directory / "etc" / "libvirtd.conf").write_text(DAEMON.format(self.directory, uuid.uuid4()))
        (self.directory / "etc" / "qemu.conf").write_text(QEMU)
        self.functions = library()
        self.guest = str(uuid.uuid4())
        self.removed: list[str] = []
        self.domain = None
        self.daemon = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "bash", "-c", START, "bash", self.directory],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    @property
    def host(self) -> str:
        """As --connect names it."""
        return f"unix:{self.directory}/run/libvirt-sock"

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
        path = str(self.directory / "run" / "libvirt-sock")
        deadline = time.monotonic() + 60
        # It is there before it is listened at.
        with socket.socket(socket.AF_UNIX) as tried:
            while tried.connect_ex(path) != 0:
                if self.daemon.poll() is not None or time.monotonic() > deadline:
                    log = self.directory / "log" / "libvirtd.log"
                    raise SystemExit("bench: libvirtd does not start:\n" + (log.read_text() if log.exists() else ""))
                time.sleep(0.02)
        self.functions.virEventRegisterDefaultImpl()
        self.connection = self.expect(
            self.functions.virConnectOpen(f"qemu+unix:///system?socket={path}".encode()))
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
        self.daemon.terminate()
        self.daemon.wait()
        subprocess.run(["rm", "-r", "--one-file-system", self.directory], check=True)
