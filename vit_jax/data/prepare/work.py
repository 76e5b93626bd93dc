"""What long work needs: progress, threads that keep order, one process at a time, disks that fill up."""

import collections
import concurrent.futures
import contextlib
import errno
import fcntl
import os
import pathlib
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from vit_jax.console import format_seconds
from vit_jax.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def ordered_map(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Maps on a pool of threads, gives the results in the order of the items, and takes only a few items ahead."""
    window: collections.deque[concurrent.futures.Future[R]] = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="prepare")
    try:
        for item in items:
            window.append(pool.submit(function, item))
            if len(window) > 2 * threads:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Progress:
    """A line on stderr now and then: images, images a second, share done and time left."""

    def __init__(self, what: str, total: float, done: float = 0.0):
        """Starts the clock.

        Args:
          what: is being done, such as "scan".
          total: amount of work, in any unit.
          done: the part of it that an earlier start did.
        """
        self._what, self._total, self._first, self._done = what, max(total, 1e-9), done, done
        self._images, self._start, self._shown = 0, time.monotonic(), 0.0

    def add(self, images: int, done: float) -> None:
        """Counts images; `done` is the amount of work done by now, of the total."""
        self._images, self._done = self._images + images, done
        elapsed = time.monotonic() - self._start
        if elapsed - self._shown >= (1.0 if sys.stderr.isatty() else 30.0):
            self._shown = elapsed
            self._print(elapsed)

    def finish(self) -> None:
        """Prints what the whole took."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = f"{self._images / elapsed:,.0f} images/s"
        print(f"{self._what}: {self._images:,} images in {format_seconds(elapsed)}, {rate}", file=sys.stderr)

    def _print(self, elapsed: float) -> None:
        left = elapsed * (self._total - self._done) / max(self._done - self._first, 1e-9)
        print(
            f"{self._what}: {self._images:,} images, {self._images / elapsed:,.0f} images/s, "
            f"{100 * self._done / self._total:.1f} % done, {format_seconds(left)} left",
            file=sys.stderr,
        )


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other processes from preparing into the same folder at the same time.

    Raises:
      UserError: another process is at it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is preparing into {folder}; wait for it or end it.") from error
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def full_disk_explained(folder: pathlib.Path) -> Iterator[None]:
    """Turns the many ways in which libraries say that a disk is full into one message.

    Raises:
      UserError: the disk or the quota is full.
    """
    try:
        yield
    except (OSError, RuntimeError, sqlite3.Error) as error:
        # array_record has the system's words in a RuntimeError; SQLite takes a quota for a failed write.
        words = [os.strerror(number) for number in _FULL]
        full = getattr(error, "errno", None) in _FULL or any(word in str(error) for word in words)
        if full or getattr(error, "sqlite_errorname", None) in ("SQLITE_FULL", "SQLITE_IOERR_WRITE"):
            raise UserError(
                f"the disk is full, or a quota is used up, at {folder} ({error}). What is finished stays. Make room "
                "and run the same command again: it goes on from there."
            ) from error
        raise


def check_space(folder: pathlib.Path, needed: int) -> None:
    """Refuses to begin what will not fit.

    Args:
      folder: where it will be written.
      needed: bytes.

    Raises:
      UserError: there are fewer free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {format_bytes(free)} free, but {format_bytes(needed)} are still to be written. Make room, "
            "or name another disk with --out."
        )


def format_bytes(count: float) -> str:
    """Formats a size as 1.3 TB or 512 bytes."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def sync(path: pathlib.Path) -> None:
    """Waits until a file, or what a folder lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_whole(temporary: pathlib.Path, path: pathlib.Path) -> None:
    """Gives a finished file or folder its name, so that under this name there is a whole one or none."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)
