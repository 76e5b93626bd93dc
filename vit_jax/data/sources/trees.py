"""A folder or a zip file as a tree of folders and files, so that both are judged and read by the same code."""

import dataclasses
import enum
import heapq
import os
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from vit_jax.console import show_name
from vit_jax.data.sources.records import PositionedFile
from vit_jax.data.transforms import looks_like_image
from vit_jax.errors import UserError
from vit_jax.files import read_regular, stat_regular

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".png", ".webp", ".bmp", ".gif")
MAX_FILE_BYTES = 2**28
"""Of an encoded image. As many as `transforms.MAX_PIXELS` has without any compression."""

# What Windows, macOS, Linux and network storages leave lying about, besides names that begin with a dot. Lower case.
_LITTER = frozenset(
    {
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$recycle.bin", "recycler"),
        *("system volume information", "__macosx", "icon\r", "@eadir", "#recycle", "#snapshot", "@recycle"),
        *("@__thumb", "lost+found", "__pycache__"),
    }
)
_ZIP_ERRORS = (zipfile.BadZipFile, struct.error)
_DEEPEST = 8  # folders in each other; deeper ones count as empty
_START_BYTES = 32  # enough to recognise an image
_PEEKED = 4  # files of unknown suffix in a folder that are looked into, to find out whether it holds images
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # before a member of a zip file: magic, lengths of name and extra field
_MEMBER = np.dtype(
    [("offset", np.int64), ("packed", np.uint32), ("size", np.uint32), ("crc", np.uint32), ("deflated", np.bool_)]
)


class Kind(enum.Enum):
    """What an entry of a folder is."""

    FOLDER = "folder"
    FILE = "file"
    LINK = "link to a file"
    SPECIAL = "FIFO, socket or device"

    @property
    def is_file(self) -> bool:
        """Whether it can be opened and read."""
        return self is Kind.FILE or self is Kind.LINK


class Tree(Protocol):
    """Folders and files below a root. Places are relative to it; those of folders are "" or end with "/"."""

    def entries(self, place: str) -> Iterator[tuple[str, Kind]]:
        """Names in a folder and what they are, in any order, without litter. Raises OSError."""
        ...

    def start(self, place: str) -> bytes:
        """The first bytes of a file; none if it cannot be read."""
        ...


def is_litter(name: str) -> bool:
    """Whether an operating system or a network storage left a file or folder of this name, which nobody means."""
    return name.startswith(".") or name.lower() in _LITTER


def has_image_suffix(name: str) -> bool:
    """Whether a file is an image by its name."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_image(tree: Tree, place: str) -> bool:
    """Whether a file is an image: by its name, else by its first bytes."""
    return has_image_suffix(place) or looks_like_image(tree.start(place))


def folders_in(tree: Tree, place: str) -> list[str]:
    """Names of the folders in a folder, sorted."""
    return sorted(name for name, kind in tree.entries(place) if kind is Kind.FOLDER)


def holds_images(tree: Tree, place: str) -> bool:
    """Whether images lie right in a folder, whatever else does. False if it cannot be read."""
    others = []
    try:
        for name, kind in tree.entries(place):
            if kind.is_file:
                if has_image_suffix(name):
                    return True
                others.append(name)
    except OSError:
        return False
    return any(looks_like_image(tree.start(place + name)) for name in heapq.nsmallest(_PEEKED, others))


@dataclasses.dataclass(frozen=True)
class Found:
    """What is in a folder and the folders in it, sorted, without litter. Links to folders are not followed.

    Attributes:
      images: paths of images.
      others: paths of other files.
      errors: why folders in it cannot be listed, with their paths.
    """

    images: list[str]
    others: list[str]
    errors: list[str]


def find_files(folder: pathlib.Path) -> Found:
    """Lists all files in a folder and the folders in it."""
    images: list[str] = []
    others: list[str] = []
    errors: list[str] = []

    def fail(error: OSError) -> None:
        errors.append(f"{error.filename}: {error.strerror or error}")

    for place, folders, _ in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not is_litter(name)]
        tree = FolderTree(pathlib.Path(place))
        for name, kind in tree.entries(""):
            if kind.is_file:
                (images if is_image(tree, name) else others).append(f"{place}/{name}")
    return Found(sorted(images, key=_by_parts), sorted(others, key=_by_parts), errors)


def _by_parts(path: str) -> list[str]:
    return path.split("/")


class FolderTree:
    """A folder on disk. Links are followed."""

    def __init__(self, root: pathlib.Path):
        self._root = root

    def entries(self, place: str) -> Iterator[tuple[str, Kind]]:
        """See `Tree`."""
        with os.scandir(f"{self._root}/{place}") as entries:
            for entry in entries:
                if not is_litter(entry.name):
                    yield entry.name, _kind(entry)

    def start(self, place: str) -> bytes:
        """See `Tree`."""
        try:
            return read_regular(f"{self._root}/{place}", MAX_FILE_BYTES, start=_START_BYTES)
        except OSError:
            return b""


def _kind(entry: os.DirEntry[str]) -> Kind:
    try:
        if entry.is_file(follow_symlinks=False):  # nearly all are; one question suffices for them
            return Kind.FILE
        if entry.is_dir():
            return Kind.FOLDER
        if not entry.is_file() and os.path.exists(entry.path):
            return Kind.SPECIAL
        return Kind.LINK if entry.is_symlink() else Kind.FILE  # if it leads nowhere, reading tells
    except OSError:  # a loop of links: reading tells
        return Kind.LINK


class ZipTree:
    """A zip file. Backslashes in names that Windows programs wrote are taken for slashes."""

    def __init__(self, path: pathlib.Path):
        """Reads the table of contents.

        Raises:
          UserError: it is no zip file, damaged, or has a path that would leave the folder it were unpacked in.
        """
        self._path = path
        try:
            self._bytes = stat_regular(path).st_size
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
            self._file = PositionedFile(path)
        # zipfile checks few of the numbers it reads, so that damage shows itself as any of these.
        except (OSError, EOFError, ValueError, ArithmeticError, MemoryError, RuntimeError, *_ZIP_ERRORS) as error:
            raise unreadable(path, error) from error
        self._members: dict[str, zipfile.ZipInfo] = {}
        self._folders: dict[str, dict[str, Kind]] = {"": {}}
        for member in members:
            name = member.filename if "/" in member.filename else member.filename.replace("\\", "/")
            if is_unsafe(name):
                raise UserError(
                    f"{path} has a path that would leave the folder it is unpacked in: '{show_name(member.filename)}'. "
                    "Refused."
                )
            parts = [part for part in name.split("/") if part not in ("", ".")]
            if not any(map(is_litter, parts)):
                whole = not name.endswith("/") and len(parts) <= _DEEPEST
                self._add(parts[:_DEEPEST], member if whole else None)

    def _add(self, parts: list[str], member: zipfile.ZipInfo | None) -> None:
        place = ""
        for number, part in enumerate(parts, 1):
            is_file = member is not None and number == len(parts)
            inside = self._folders[place]
            if is_file:
                inside.setdefault(part, Kind.FILE)
                self._members[place + part] = member  # type: ignore[assignment]
                return
            inside[part] = Kind.FOLDER
            place += f"{part}/"
            self._folders.setdefault(place, {})

    def entries(self, place: str) -> Iterator[tuple[str, Kind]]:
        """See `Tree`."""
        return iter(self._folders.get(place, {}).items())

    def start(self, place: str) -> bytes:
        """See `Tree`."""
        member = self._members[place]
        try:
            content = self._file.read(member.header_offset, _LOCAL_HEADER.size)
            at = member.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(content)[1:])
            packed = self._file.read(at, min(member.compress_size, 4 * _START_BYTES))
            if member.compress_type == zipfile.ZIP_DEFLATED:
                return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, _START_BYTES)
        except (OSError, EOFError, OverflowError, zlib.error, struct.error):
            return b""
        return packed[:_START_BYTES]

    def pack(self, places: list[str]) -> "ZipMembers":
        """What is needed to read these files.

        Raises:
          UserError: one is encrypted, compressed otherwise than by "deflate", or larger than an image can be; or the
            zip file is truncated.
        """
        rows = []
        for place in places:
            member = self._members[place]
            where = f"'{show_name(member.filename)}' in {show_name(str(self._path))}"
            if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(
                    f"{where} is encrypted, or compressed otherwise than by 'deflate'. Zip the images again, best "
                    "without compression: zip -0 -r <name>.zip <folder>"
                )
            if not 0 <= max(member.file_size, member.compress_size) <= MAX_FILE_BYTES:
                raise UserError(
                    f"{where} says that it has {member.file_size:,} bytes; an image has at most {MAX_FILE_BYTES:,}. "
                    "Remove it, or get the zip file again."
                )
            if member.header_offset < 0 or member.header_offset + member.compress_size > self._bytes:
                raise UserError(f"{where} lies behind the end of the file: it is truncated or damaged. Get it again.")
            deflated = member.compress_type == zipfile.ZIP_DEFLATED
            rows.append((member.header_offset, member.compress_size, member.file_size, member.CRC, deflated))
        return ZipMembers(self._file, np.array(rows, _MEMBER))


class ZipMembers:
    """Files in a zip file, read at their places, so that threads need not wait for each other."""

    def __init__(self, file: PositionedFile, table: np.ndarray):
        self._file, self._table = file, table

    @property
    def offsets(self) -> np.ndarray:
        """Where the members begin, int64 `[members]`."""
        return self._table["offset"]

    def read(self, index: int) -> bytes:
        """Reads a file; raises whatever damage leads to."""
        offset, packed, size, crc, deflated = self._table[index].item()
        magic, *lengths = _LOCAL_HEADER.unpack(self._file.read(offset, _LOCAL_HEADER.size))
        if magic != b"PK\3\4":
            raise ValueError("it is not where the table of contents says")
        content = self._file.read(offset + _LOCAL_HEADER.size + sum(lengths), packed)
        if deflated:
            # One byte more than there should be, so that a member which inflates without end is noticed.
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        if len(content) != size:
            raise ValueError(f"it does not have the {size:,} bytes that the table of contents says")
        if zlib.crc32(content) != crc:
            raise ValueError("its checksum is another, so the file was damaged")
        return content


def is_unsafe(name: str) -> bool:
    """Whether a path in an archive would leave the folder that the archive is unpacked in."""
    parts = name.replace("\\", "/").split("/")
    return name.startswith(("/", "\\")) or ".." in parts or parts[0][1:2] == ":"


def open_tree(path: pathlib.Path) -> FolderTree | ZipTree:
    """Opens a folder or zip file.

    Raises:
      UserError: it is neither.
    """
    return FolderTree(path) if path.is_dir() else ZipTree(path)


def unreadable(path: pathlib.Path, error: Exception) -> UserError:
    """The error for what is no folder and no zip file."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error or type(error).__name__
    return UserError(f"cannot read {show_name(str(path))} as a folder or zip file of images: {reason}.")
