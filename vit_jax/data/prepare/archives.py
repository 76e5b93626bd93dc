"""Finds images in tar archives, including nested ones, without unpacking them.

Members of a tar are contiguous and uncompressed, so an offset in the outer file is enough to read an image again.
"""

import dataclasses
import io
import os
import pathlib
import struct
import tarfile
from collections.abc import Iterator, Sequence

from vit_jax.console import show_name
from vit_jax.data.sources.tfrecord import PositionedFile
from vit_jax.data.sources.trees import is_litter, is_unsafe
from vit_jax.errors import UserError
from vit_jax.files import read_regular

_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip --keep"),
    b"BZh": ("bzip2", "bunzip2 --keep"),
    b"\xfd7zXZ\x00": ("xz", "unxz --keep"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
_LARGEST = 2**28  # bytes of an image; larger files are not read into memory
_LARGEST_HEADER = 2**20  # bytes of a header, with long names and attributes
_DEEPEST = 8  # nested tars


@dataclasses.dataclass(frozen=True)
class Member:
    """A file in an archive.

    Attributes:
      archive: number of the archive.
      path: of the file, after those of the inner archives that hold it: ("n01440764.tar", "n01440764_1.JPEG").
      offset: of the content, in bytes from the start of the outer archive.
      size: of the content, in bytes.
      content: the file; None if it is larger than any image.
    """

    archive: int
    path: tuple[str, ...]
    offset: int
    size: int
    content: bytes | None


@dataclasses.dataclass(frozen=True)
class Mark:
    """A position to resume a scan from.

    Attributes:
      archive: number of the archive.
      offset: of the next header in it, in bytes.
    """

    archive: int
    offset: int


def find_archives(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Lists archives, and all tars in folders, sorted by name.

    Raises:
      UserError: a path does not exist or is not a regular file, a folder has no tars, or a file is compressed.
    """
    found: list[pathlib.Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix == ".tar" and not is_litter(p.name))
            if not inside:
                raise UserError(f"there are no .tar files in {path}.")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"there is no archive {path}.")
    # Sorted, so that a restart gives each archive the same number. The result does not depend on the order.
    found = sorted(set(found))
    for path in found:
        try:
            _refuse_compressed(read_regular(path, 0, start=8), str(path))
        except OSError as error:
            raise UserError(f"cannot read {path} as a tar file: {error.strerror or error}.") from error
    return found


def scan(archives: Sequence[pathlib.Path], start: Mark | None = None) -> Iterator[Member | Mark]:
    """Reads the archives from start to end.

    Args:
      archives: from `find_archives`.
      start: a mark from an earlier scan.

    Yields:
      each file, and a mark after each member of an outer archive.

    Raises:
      UserError: an archive is truncated, damaged or compressed, or has an unsafe path.
    """
    start = start or Mark(0, 0)
    for number in range(start.archive, len(archives)):
        path = archives[number]
        first = start.offset if number == start.archive else 0
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), first, 0, os.POSIX_FADV_SEQUENTIAL)
            for member, content, after in _members(file, str(path), first, strict=True):
                found = Member(number, (member.name,), member.offset_data, member.size, content)
                yield from _inside(file, str(path), found)
                yield Mark(number, after)
        yield Mark(number + 1, 0)


def _inside(file: io.BufferedReader, archive: str, found: Member) -> Iterator[Member]:
    """Yields a file, or the files inside if it is an archive."""
    if found.content is not None or not found.path[-1].endswith(".tar"):
        yield found
        return
    inner = _Window(file, found.offset, found.size)
    where = show_name(":".join((archive, *found.path)))
    if len(found.path) >= _DEEPEST:
        raise UserError(f"{where}: more than {_DEEPEST} nested tars. Refused.")
    _refuse_compressed(inner.read(8), where)
    for inside, content, _ in _members(inner, where, 0, strict=False):
        path, offset = (*found.path, inside.name), found.offset + inside.offset_data
        yield from _inside(file, archive, Member(found.archive, path, offset, inside.size, content))


class _Window(io.RawIOBase):
    """A part of a file as a file, so that a damaged inner archive cannot continue into the outer one.

    Reads of more than `largest` bytes are errors, which bounds the headers that tarfile reads.
    """

    def __init__(self, file: "io.BufferedReader | _Window", offset: int, size: int, largest: int | None = None):
        self._file, self._offset, self._size, self._position = file, offset, size, 0
        self._largest = largest

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(self._size - self._position, 0)
        if self._largest is not None and not 0 <= (-1 if size is None else size) <= self._largest:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        self._file.seek(self._offset + self._position)
        content = self._file.read(left if size is None or size < 0 else min(size, left))
        self._position += len(content)
        return content


def _members(
    file: io.BufferedReader | _Window, where: str, first: int, *, strict: bool
) -> Iterator[tuple[tarfile.TarInfo, bytes | None, int]]:
    """Yields regular files, their contents (None for inner tars) and the offset of the next header."""
    size = file.seek(0, os.SEEK_END)
    if not strict and not size:
        return  # an empty inner archive is a class without images
    headers = _Window(file, 0, size, largest=_LARGEST_HEADER)
    headers.seek(first)
    try:
        archive, before = tarfile.open(fileobj=headers, mode="r:"), first - 1  # noqa: SIM115
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep millions of them
            _refuse_unsafe(member, where)
            after = archive.offset
            if member.size < 0 or after <= before:
                raise tarfile.ReadError("a file of negative size")
            before = after
            if member.isreg() and not pathlib.PurePath(member.name).name.startswith("."):
                content = None
                if not member.name.endswith(".tar") and member.size <= _LARGEST:
                    file.seek(member.offset_data)
                    content = file.read(member.size)
                    if len(content) < member.size:
                        raise tarfile.ReadError("unexpected end of data")
                yield member, content, after
        file.seek(archive.offset)
        end = file.read(tarfile.BLOCKSIZE)
    except UserError:
        raise
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError, struct.error) as error:
        raise _damaged(where, headers.tell(), str(error) or type(error).__name__) from error
    # tarfile takes any invalid header for the end. Only a block of zeros is one; some tools omit it in small archives.
    if end != tarfile.NUL * tarfile.BLOCKSIZE and (strict or end):
        raise _damaged(where, archive.offset, "no end mark")


def _damaged(where: str, offset: int, reason: str) -> UserError:
    return UserError(
        f"{where} is truncated or damaged near byte {offset:,} ({reason}). Download it again and compare its size and "
        "hash with the published ones."
    )


def _refuse_unsafe(member: tarfile.TarInfo, where: str) -> None:
    if is_unsafe(member.name) or "\0" in member.name:
        raise UserError(f"{where} has a path that would leave the folder it is unpacked in: {member.name!a}. Refused.")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise UserError(f"{where} has a link, device or sparse file: {member.name!a}. Refused: only files are read.")


def _refuse_compressed(start: bytes, where: str) -> None:
    for magic, (name, command) in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"{where} is compressed with {name}, so images cannot be read from its middle. Uncompress it first "
                f"({command}) and pass the result."
            )


def read_at(path: pathlib.Path, offset: int, size: int) -> bytes:
    """Reads a part of a file. Thread-safe.

    Raises:
      UserError: the file has become shorter.
    """
    try:
        return PositionedFile(path).read(offset, size)
    except EOFError as error:
        raise UserError(f"{path} has become shorter since it was scanned. Restore it and rerun the command.") from error
