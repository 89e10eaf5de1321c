"""What every measurement does with files and processes."""

import os
import subprocess
import time
from pathlib import Path

# PAGE_REPORTING_DELAY of the kernel's mm/page_reporting.c is 2 s; the rest is for its work.
FREE_PAGE_REPORTING_SECONDS = 2.5


def read(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, 65536)
    finally:
        os.close(descriptor)


def write(path: Path, value: str):
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, value.encode() + b"\n")
    finally:
        os.close(descriptor)


def process(command: list):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def rehearse(write, remove):
    """The last thing before each timed copy, of either side: nothing is left to be written, and what the copy reads and
    what it will be kept in are in memory.

    In a virtual machine, free memory may not be there: the host takes it away, and every first touch then waits for the
    host. That costs up to three seconds for a GiB which a copy otherwise takes 0.4 s for, and hits whoever happens to get
    such memory. So each copy is rehearsed by the program that is measured: what it writes and removes again leaves just
    the pages free that it takes next. They are freed when the host has taken what was free before: the kernel reports
    free pages to it two seconds after the first of them was freed, and with them all that were freed meanwhile.
    Those bytes never reach the disk."""
    os.sync()
    write()
    time.sleep(FREE_PAGE_REPORTING_SECONDS)
    remove()


def wait_for_state(thing: Path, state: bytes):
    """Returns when an object is in this state and nothing is under way on it."""
    deadline = time.monotonic() + 600
    while read(thing / "state") != state + b"\n" or read(thing / "task").strip():
        if read(thing / "last_error") != b"ok\n" or time.monotonic() > deadline:
            raise SystemExit(f"bench: not {state.decode()}: {read(thing / 'last_error').decode()}")
        time.sleep(0.002)
