"""Lets a process seem to run on another host.

JAX knows a host by its boot id, so the process gets a mount namespace with a boot id of its own.
"""

import ctypes
import os
import pathlib
import subprocess
import sys
import uuid

ROOT = pathlib.Path(__file__).parent.parent
BOOT_ID = pathlib.Path("/proc/sys/kernel/random/boot_id")
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000


def new_boot_id(folder):
    """A file for `move_to`, or None where the system does not permit that."""
    path = folder / "boot_id"
    path.write_text(f"{uuid.uuid4()}\n")
    command = [sys.executable, "-m", "tests.another_host", str(path)]
    seen = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    return path if seen == path.read_text() else None


def move_to(boot_id):
    """Gives this process, which must not have started threads yet, the boot id in a file."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNS):
        _check(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))
        pathlib.Path("/proc/self/setgroups").write_text("deny")
        pathlib.Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        pathlib.Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _check(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
    _check(libc.mount(os.fsencode(boot_id), os.fsencode(BOOT_ID), None, MS_BIND, None))


def _check(failed):
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    move_to(sys.argv[1])
    print(BOOT_ID.read_text(), end="")
