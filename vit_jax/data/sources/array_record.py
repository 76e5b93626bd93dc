"""Reads array_record files at random, with the reader that `tfds.data_source` uses."""

import concurrent.futures
import itertools
import os
import resource
import types
from collections.abc import Sequence
from typing import Any

from vit_jax.data.sources.base import reason_of
from vit_jax.errors import UserError
from vit_jax.files import stat_regular

_THREADS = 16  # threads wait for a disk or a network
_OTHER_FILES = 256  # other files that a process has open


class ArrayRecordFiles:
    """array_record files. The reader keeps each file open after its first read.

    Attributes:
      lengths: number of records in each file, by path.
    """

    def __init__(self, paths: Sequence[str], lengths: Sequence[int] | None = None):
        """Reads the files' lengths, unless given, and nothing else.

        Raises:
          UserError: a file is missing or not an array_record file, or the system does not allow so many open files.
        """
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        _allow_open_files(len(paths))
        for path in paths:
            try:
                stat_regular(path)
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror or error}. Copy or prepare it again.") from error
        if lengths is None:
            with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
                lengths = list(pool.map(_count_records, paths))
        self.lengths = dict(zip(paths, lengths, strict=True))
        self._first = dict(zip(paths, itertools.accumulate(lengths, initial=0), strict=False))
        # With the FileInstruction of array_record, the library need not open the files to count their records.
        files = [
            types.SimpleNamespace(filename=path, skip=0, take=size, examples_in_shard=size)
            for path, size in self.lengths.items()
        ]
        self._records = ArrayRecordDataSource(files)
        self._process = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrayRecordFiles, (list(self.lengths), list(self.lengths.values()))

    def read(self, path: str, record: int) -> bytes:
        """Reads a record; the library verifies its checksum. Thread-safe."""
        if self._process != os.getpid():  # without the reader's threads it would crash
            raise UserError(
                "array_record files cannot be read in a forked process. Start worker processes with the method 'spawn' "
                "or 'forkserver', or read tfrecord files."
            )
        return self._records[self._first[path] + record]

    def where(self, path: str, record: int) -> str:
        """Describes a record by number and file, for messages."""
        return f"record {record} of {path}"


def _count_records(path: str) -> int:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(path)
        count = reader.num_records()
        reader.close()
    except Exception as error:  # the C++ library does not document its errors
        raise UserError(f"cannot read {path} as array_record: {reason_of(error)}.") from error
    return count


def _allow_open_files(count: int) -> None:
    """Raises this process's limit of open files if necessary."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _OTHER_FILES
    if soft >= needed or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"{count} array_record files are read at once, but this system allows only {hard} open files. Raise the "
            f"limit (ulimit -n {needed}), or write the data set into fewer files."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
