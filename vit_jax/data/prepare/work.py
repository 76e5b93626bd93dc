"""What long work needs: threads that keep order, and one process at a time."""

import collections
import concurrent.futures
import contextlib
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from vit_jax.files import full_disk_explained, lock

T = TypeVar("T")
R = TypeVar("R")


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


@contextlib.contextmanager
def working_in(folder: pathlib.Path) -> Iterator[None]:
    """Creates a folder to prepare a data set in, and keeps other processes out of it.

    Raises:
      UserError: another process is preparing there, or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock_file = folder.with_name(f".{folder.name}.lock")  # beside it: all that is in it becomes the data set
    busy = f"another process is preparing into {folder}; wait for it or end it."
    with lock(lock_file, busy), full_disk_explained(folder):
        try:
            yield
        finally:
            lock_file.unlink(missing_ok=True)
