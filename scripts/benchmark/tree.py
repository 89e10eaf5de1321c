"""The tree that is measured."""

import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path


class Tree:
    """A tree in a directory of its own; unmounted and removed on leaving."""

    def __init__(self, program: Path, host: str = "simulated:{}/simulated", place: Path = Path("/var/tmp")):
        """A host as --connect names it; {} stands for the tree's directory, which is made in a place."""
        self.directory = Path(tempfile.mkdtemp(prefix="instancefs-bench.", dir=place))
        self.directory.chmod(0o711)
        self.root = self.directory / "tree"
        self.root.mkdir()
        self.log = open(self.directory / "daemon.log", "wb")
        self.daemon = subprocess.Popen(
            [program, "mount", "--connect", host.format(self.directory), "--state-dir", self.directory / "state",
             self.root],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)

    def __enter__(self):
        try:
            self._wait_until_mounted()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait_until_mounted(self):
        deadline = time.monotonic() + 30
        while not self.root.is_mount():
            if self.daemon.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("bench: the tree was not mounted:\n" + (self.directory / "daemon.log").read_text())
            time.sleep(0.05)

    def __exit__(self, *_):
        self.daemon.send_signal(signal.SIGTERM)
        try:
            self.daemon.wait(30)
        except subprocess.TimeoutExpired:
            self.daemon.kill()
            self.daemon.wait()
        self.log.close()
        if self.root.is_mount():
            subprocess.run(["umount", "-l", self.root], check=False)
        # Never through a mount: only what this run made in its own directory.
        if not self.root.is_mount():
            shutil.rmtree(self.directory)
