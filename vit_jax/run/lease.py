"""A lock for folders in a bucket, which has no file locks: an object that its holder rewrites every 15 seconds.

Every write names the version of the object that it replaces, and fails if the version has changed (GCS:
`ifGenerationMatch`). So one of two processes wins, independent of their clocks. A lock that is not rewritten for a
minute belongs to a dead process and is taken over; that of a dead process on this machine is taken over at once.
"""

import contextlib
import datetime
import json
import logging
import os
import pathlib
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from vit_jax.errors import UserError

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_HEARTBEAT_SECONDS = 15.0
_LEASE_SECONDS = 60.0  # without a heartbeat


class LockLostError(UserError):
    """Another process may have taken over the workdir; nothing more may be written there."""


@contextlib.contextmanager
def lease(url: str, on_lost: Callable[[LockLostError], None]) -> Iterator[None]:
    """Keeps other processes out of a folder, whose URL for TensorStore ends in a slash.

    `on_lost` is called from another thread when another process has taken the lock over.

    Raises:
      UserError: the store cannot be reached, or the lock's holder lives.
    """
    import tensorstore

    ours = uuid.uuid4().hex

    def beat() -> bytes:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        holder = {"id": ours, "host": platform.node(), "pid": os.getpid(), "pids_of": _pid_namespace(), "time": now}
        return json.dumps(holder).encode()

    try:
        store = tensorstore.KvStore.open(url).result(timeout=_LEASE_SECONDS)
        version = _acquire(store, url, beat)
    except UserError:
        raise
    except Exception as error:  # TensorStore raises ValueError for nearly everything
        reason = f"no answer within {_LEASE_SECONDS:.0f} s" if isinstance(error, TimeoutError) else error
        raise UserError(f"cannot write to the workdir {url}: {reason}. Choose another --workdir.") from error
    ended = threading.Event()

    def renew() -> None:
        nonlocal version
        while not ended.wait(_HEARTBEAT_SECONDS):
            try:
                if written := store.write(_LOCK, beat(), if_equal=version).result().generation:
                    version = written
                    continue
                found = store.read(_LOCK).result()
            except Exception:  # the network is down; the next heartbeat shows whether the lock is lost
                logger.warning("could not renew the lock of %s", url, exc_info=True)
                continue
            # An earlier heartbeat may have arrived although it seemed to have failed.
            if found.value and json.loads(found.value)["id"] == ours:
                version = found.stamp.generation
                continue
            on_lost(LockLostError(f"the lock of {url} was taken over while this process could not renew it; ending."))
            return

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(Exception):  # it expires by itself
            store.write(_LOCK, None, if_equal=version).result()


def _acquire(store: Any, url: str, beat: Callable[[], bytes]) -> bytes:
    """Waits while the lock's holder may be dead; returns the version of our lock object."""
    seen, since = b"", 0.0
    while True:
        found = store.read(_LOCK).result(timeout=_LEASE_SECONDS)
        stands_still = found.value == seen and time.monotonic() - since > _LEASE_SECONDS
        if not found.value or stands_still or _is_dead(found.value):
            written = store.write(_LOCK, beat(), if_equal=found.stamp.generation).result(timeout=_LEASE_SECONDS)
            if written.generation:
                return written.generation
            continue
        lock = json.loads(found.value)
        holder = f"process {lock['pid']} on {lock['host']}, last seen at {lock['time']}"
        if not seen:
            seen, since = found.value, time.monotonic()
            logger.info("%s is locked by %s; waiting up to a minute to see whether it still lives", url, holder)
        elif found.value != seen:
            raise UserError(
                f"another process is training in the workdir {url}: {holder}. Wait for it, end it, or choose another "
                "--workdir."
            )
        time.sleep(1)


def _pid_namespace() -> str:
    """Identifies the boot and the container in which a process id is unique; "" if unknown."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _is_dead(lock: bytes) -> bool:
    """Whether the holder ran on this machine and no longer does."""
    holder = json.loads(lock)
    if not holder["pids_of"] or holder["pids_of"] != _pid_namespace():
        return False
    try:
        os.kill(holder["pid"], 0)
    except OSError as error:  # or it is another user's
        return isinstance(error, ProcessLookupError)
    return False
