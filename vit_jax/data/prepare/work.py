"""A thread pool that keeps order, and a working folder for one process at a time."""

import collections
import concurrent.futures
import contextlib
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from vit_jax.files import full_disk_explained, lock

MAKE_ROOM = "Free some space, or choose another disk with --out."

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Maps on a thread pool; yields results in the order of the items and reads only a few items ahead."""
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


@contextlib.contextmanager
def working_in(folder: pathlib.Path) -> Iterator[None]:
    """Creates a folder to prepare a data set in, and locks it against other processes.

    Raises:
      UserError: another process has locked it, or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock_file = folder.with_name(f".{folder.name}.lock")  # beside it: everything inside becomes the data set
    busy = f"another process is writing {folder}. Wait for it, or stop it."
    with lock(lock_file, busy), full_disk_explained(folder):
        try:
            yield
        finally:
            lock_file.unlink(missing_ok=True)
