"""Reads tfrecord files at random.

A tfrecord file has no table of contents, so its first use makes an index of its records, 8 bytes per record, by reading
only the records' headers. The index is kept beside the file as `.<file>.index`, or, if that folder cannot be written,
in the cache (`vit_jax.files`).
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import resource
import struct
import weakref
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_jax.console import Progress
from vit_jax.errors import UserError
from vit_jax.files import cache_folder, open_regular, read_regular, stat_regular, write_atomically

logger = logging.getLogger(__name__)

HEADER = struct.Struct("<QI")  # length of the record, and checksum of the length
_CHECKSUM = struct.Struct("<I")
_FRAME_BYTES = HEADER.size + _CHECKSUM.size  # around a record
_INDEX_VERSION = 2
_MOST_RECORD_BYTES = 2**30
_THREADS = 16  # threads wait for a disk or a network


class PositionedFile:
    """A file that several threads can read at once, each at its own position. Unpickling reopens the file."""

    def __init__(self, path: str | os.PathLike[str]):
        """Opens the file; raises OSError."""
        self._path = os.fspath(path)
        self._descriptor = open_regular(self._path)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Reads exactly `size` bytes; raises EOFError if the file ends before."""
        content = os.pread(self._descriptor, size, offset)
        if len(content) != size:
            raise EOFError(f"the file ends at byte {offset + len(content)}, {size - len(content)} bytes too early")
        return content

    def __reduce__(self) -> tuple[Any, ...]:
        return PositionedFile, (self._path,)


class TFRecordFiles:
    """tfrecord files. Each read verifies the record's checksum.

    Attributes:
      lengths: number of records in each file, by path.
    """

    def __init__(self, paths: Sequence[str], lengths: Sequence[int] | None = None):
        """Indexes the files that have no index yet.

        Args:
          paths: of the files.
          lengths: expected number of records in each file, if known.

        Raises:
          UserError: a file is missing, truncated, damaged, not a tfrecord file, or not of the expected length.
        """
        self._offsets: dict[str, np.ndarray] = {}
        progress = Progress("index tfrecord files", len(paths), unit="files", bar=False, report=logger.info)
        with progress, concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            for path, offsets in zip(paths, pool.map(tfrecord_index, paths), strict=True):
                self._offsets[path] = offsets
                progress.add()
        self.lengths = {path: len(offsets) - 1 for path, offsets in self._offsets.items()}
        for path, expected in zip(paths, lengths or self.lengths.values(), strict=True):
            if self.lengths[path] != expected:
                raise UserError(
                    f"{path} has {self.lengths[path]} records, but the description of the data set says {expected}. "
                    "Copy or prepare the file again."
                )
        # A file that the cache drops is closed when the last thread has finished reading it.
        most = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._open = functools.lru_cache(maxsize=min(most, 4096))(PositionedFile)

    def read(self, path: str, record: int) -> bytes:
        """Reads a record; damaged files raise errors of many kinds. Thread-safe."""
        begin, end = self._offsets[path][record : record + 2].tolist()
        begin, size = begin + HEADER.size, end - begin - _FRAME_BYTES
        if size > _MOST_RECORD_BYTES:
            raise ValueError(f"it has {size:,} bytes, more than the limit of {_MOST_RECORD_BYTES:,}")
        file = self._open(path)
        content = file.read(begin, size)
        if masked_checksum(content) != _CHECKSUM.unpack(file.read(begin + size, _CHECKSUM.size))[0]:
            raise ValueError("its checksum does not match: the file was damaged or changed")
        return content

    def where(self, path: str, record: int) -> str:
        """Describes a record by number, offset and file, for messages."""
        return f"record {record} (byte {self._offsets[path][record]}) of {path}"

    def __reduce__(self) -> tuple[Any, ...]:
        return TFRecordFiles, (list(self._offsets),)  # without the offsets: they are on disk, and may be large


def masked_checksum(content: bytes) -> int:
    """The masked CRC-32C of the tfrecord format."""
    import google_crc32c

    crc = google_crc32c.value(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def tfrecord_index(path: str) -> np.ndarray:
    """Reads the index of a tfrecord file; makes it if there is none, or if the file has changed since.

    Returns:
      int64 `[records + 1]`: the offset of each record's header in bytes, then the file's size.

    Raises:
      UserError: the file is missing, truncated, damaged, or not a tfrecord file.
    """
    try:
        status = stat_regular(path)
        indices = _index_paths(path)
        for index in indices:
            if (offsets := _load_index(index, status)) is not None:
                return offsets
        offsets = _scan(path, status.st_size)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}. Copy or prepare it again.") from error
    content = np.concatenate([_identity(offsets, status), offsets]).tobytes()
    for index in indices:
        with contextlib.suppress(UserError):
            write_atomically(index, content)
            return offsets
    logger.warning("%s: no folder for its index can be written, so each start makes the index again.", path)
    return offsets


def _index_paths(path: str) -> list[pathlib.Path]:
    full = pathlib.Path(path).resolve()
    digest = hashlib.sha256(os.fsencode(full)).hexdigest()[:16]
    # Hidden, so that no pattern of shards matches it.
    return [full.with_name(f".{full.name}.index"), cache_folder("indices") / f"{full.name}-{digest}.index"]


def _identity(offsets: np.ndarray, status: os.stat_result) -> np.ndarray:
    """The first numbers of an index, which change with the file and with the index."""
    checksum = zlib.crc32(offsets.tobytes())
    return np.array([_INDEX_VERSION, status.st_size, status.st_mtime_ns, checksum], np.int64)


def _load_index(path: pathlib.Path, status: os.stat_result) -> np.ndarray | None:
    try:
        # An index has 8 bytes for each record of at least 16.
        content = np.frombuffer(read_regular(path, status.st_size + 64), np.int64)
    except (OSError, ValueError):  # absent, or cut within a number
        return None
    identity, offsets = content[:4], content[4:]
    return offsets if np.array_equal(identity, _identity(offsets, status)) else None


def _scan(path: str, size: int) -> np.ndarray:
    """Reads the headers of all records in a file of `size` bytes."""
    file, offsets = PositionedFile(path), [0]
    with contextlib.suppress(EOFError):
        while offsets[-1] < size:
            header = file.read(offsets[-1], HEADER.size)
            length, checksum = HEADER.unpack(header)
            if masked_checksum(header[:8]) != checksum:
                raise _not_tfrecord(path, offsets, header)
            offsets.append(offsets[-1] + length + _FRAME_BYTES)
    if offsets[-1] > size:
        offsets.pop()
    if offsets[-1] < size:
        raise UserError(
            f"{path} is truncated: it ends within record {len(offsets) - 1}, which begins at byte {offsets[-1]}. Copy "
            "or prepare it again."
        )
    return np.array(offsets, np.int64)


def _not_tfrecord(path: str, offsets: Sequence[int], header: bytes) -> UserError:
    if len(offsets) > 1:
        return UserError(
            f"{path} is damaged at byte {offsets[-1]}, where record {len(offsets) - 1} should begin. Copy or prepare "
            "it again."
        )
    if header.startswith((b"\x1f\x8b", b"\x78")):
        return UserError(f"{path} is compressed, so it cannot be read at random. Write it without compression.")
    return UserError(f"{path} is not a tfrecord file, or its first bytes are damaged.")
