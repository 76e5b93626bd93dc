"""Folders and zip files as trees of folders and files, with one interface for both."""

import enum
import heapq
import os
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import numpy as np

from vit_jax.console import show_name
from vit_jax.data.image_headers import looks_like_image
from vit_jax.data.sources.tfrecord import PositionedFile
from vit_jax.errors import UserError
from vit_jax.files import read_regular, stat_regular

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".png", ".webp", ".bmp", ".gif")
MAX_FILE_BYTES = 2**28
"""Of an encoded image: enough for `image_headers.MAX_PIXELS` without any compression."""

# Files that Windows, macOS, Linux and network storage create, besides hidden ones. Lower case.
_LITTER = frozenset(
    {
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$recycle.bin", "recycler"),
        *("system volume information", "__macosx", "icon\r", "@eadir", "#recycle", "#snapshot", "@recycle"),
        *("@__thumb", "lost+found", "__pycache__"),
    }
)
_DEEPEST = 8  # nested folders; deeper ones count as empty
_START_BYTES = 32  # enough to recognise an image
_PEEKED = 4  # files of unknown suffix to read to find out whether a folder has images
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # before a member of a zip file: magic, lengths of name and extra field
_MEMBER = np.dtype(
    [("offset", np.int64), ("packed", np.uint32), ("size", np.uint32), ("crc", np.uint32), ("deflated", np.bool_)]
)
# zipfile checks few of the numbers it reads, so damage causes any of these.
_ZIP_ERRORS = (
    *(OSError, EOFError, ValueError, ArithmeticError, MemoryError, RuntimeError),
    *(zipfile.BadZipFile, struct.error),
)


class Kind(enum.Enum):
    """The kind of an entry of a folder."""

    FOLDER = "folder"
    FILE = "file"
    LINK = "link to a file"
    SPECIAL = "FIFO, socket or device"

    @property
    def is_file(self) -> bool:
        """Whether it can be opened and read."""
        return self is Kind.FILE or self is Kind.LINK


def is_litter(name: str) -> bool:
    """Whether a file or folder is hidden, or has a name that an operating system or network storage gives."""
    return name.startswith(".") or name.lower() in _LITTER


class FolderTree:
    """A folder on disk as a tree. Links are followed.

    Paths are relative to the root; those of folders are "" or end with "/".
    """

    def __init__(self, root: pathlib.Path):
        self._root = root

    def entries(self, folder: str) -> Iterator[tuple[str, Kind]]:
        """Yields the names in a folder with their kinds, in any order, without litter. Raises OSError."""
        with os.scandir(f"{self._root}/{folder}") as entries:
            for entry in entries:
                if not is_litter(entry.name):
                    yield entry.name, _kind(entry)

    def start(self, path: str) -> bytes:
        """The first bytes of a file; empty if it cannot be read."""
        try:
            return read_regular(f"{self._root}/{path}", MAX_FILE_BYTES, start=_START_BYTES)
        except OSError:
            return b""


def _kind(entry: os.DirEntry[str]) -> Kind:
    try:
        if entry.is_file(follow_symlinks=False):  # true of nearly all, and needs no further system call
            return Kind.FILE
        if entry.is_dir():
            return Kind.FOLDER
        if not entry.is_file() and os.path.exists(entry.path):
            return Kind.SPECIAL
        return Kind.LINK if entry.is_symlink() else Kind.FILE  # reading reports a broken link
    except OSError:  # a loop of links, which reading reports
        return Kind.LINK


class ZipTree:
    """A zip file as a tree. Backslashes in names, as some Windows programs write them, count as slashes."""

    def __init__(self, path: pathlib.Path):
        """Reads the table of contents.

        Raises:
          UserError: it is not a zip file, is damaged, or has a path outside the folder it would be unpacked in.
        """
        self._path = path
        try:
            self._bytes = stat_regular(path).st_size
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
            self._file = PositionedFile(path)
        except _ZIP_ERRORS as error:
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
            if not parts or any(map(is_litter, parts)):
                continue
            is_folder = name.endswith("/") or len(parts) > _DEEPEST
            parent = self._add_folders(parts[:_DEEPEST] if is_folder else parts[:-1])
            if not is_folder:
                self._folders[parent].setdefault(parts[-1], Kind.FILE)
                self._members[parent + parts[-1]] = member

    def _add_folders(self, parts: list[str]) -> str:
        folder = ""
        for part in parts:
            self._folders[folder][part] = Kind.FOLDER
            folder += f"{part}/"
            self._folders.setdefault(folder, {})
        return folder

    def entries(self, folder: str) -> Iterator[tuple[str, Kind]]:
        """See `FolderTree`."""
        return iter(self._folders.get(folder, {}).items())

    def start(self, path: str) -> bytes:
        """See `FolderTree`."""
        member = self._members[path]
        try:
            begin = _begin_of(self._file, member.header_offset)
            packed = self._file.read(begin, min(member.compress_size, 4 * _START_BYTES))
            if member.compress_type == zipfile.ZIP_DEFLATED:
                return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, _START_BYTES)
        except (*_ZIP_ERRORS, zlib.error):
            return b""
        return packed[:_START_BYTES]

    def pack(self, paths: list[str]) -> "ZipMembers":
        """Collects what is needed to read these files.

        Raises:
          UserError: one is encrypted, compressed by another method than "deflate", or larger than an image can be; or
            the zip file is truncated.
        """
        rows = []
        for path in paths:
            member = self._members[path]
            where = f"'{show_name(member.filename)}' in {show_name(str(self._path))}"
            if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(
                    f"{where} is encrypted, or not compressed by 'deflate'. Zip the images again, best "
                    "without compression: zip -0 -r <name>.zip <folder>"
                )
            if not 0 <= max(member.file_size, member.compress_size) <= MAX_FILE_BYTES:
                raise UserError(
                    f"{where} says that it has {member.file_size:,} bytes; an image has at most {MAX_FILE_BYTES:,}. "
                    "Remove it, or get the zip file again."
                )
            if member.header_offset < 0 or member.header_offset + member.compress_size > self._bytes:
                raise UserError(f"{where} is beyond the end of the file: it is truncated or damaged. Get it again.")
            deflated = member.compress_type == zipfile.ZIP_DEFLATED
            rows.append((member.header_offset, member.compress_size, member.file_size, member.CRC, deflated))
        return ZipMembers(self._file, np.array(rows, _MEMBER))


class ZipMembers:
    """Files in a zip file, each read at its own position, so that threads do not wait for each other."""

    def __init__(self, file: PositionedFile, table: np.ndarray):
        self._file, self._table = file, table

    @property
    def offsets(self) -> np.ndarray:
        """Offsets of the members, int64 `[members]`."""
        return self._table["offset"]

    def read(self, index: int) -> bytes:
        """Reads a file; damage raises errors of many kinds."""
        offset, packed, size, crc, deflated = self._table[index].item()
        content = self._file.read(_begin_of(self._file, offset), packed)
        if deflated:
            # One byte more than expected, to notice a member that inflates without end.
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        if len(content) != size:
            raise ValueError(f"it does not have the {size:,} bytes that the table of contents says")
        if zlib.crc32(content) != crc:
            raise ValueError("its checksum does not match: the file was damaged")
        return content


def _begin_of(file: PositionedFile, offset: int) -> int:
    """The offset of a member's content; its local header is at `offset`."""
    magic, *lengths = _LOCAL_HEADER.unpack(file.read(offset, _LOCAL_HEADER.size))
    if magic != b"PK\3\4":
        raise ValueError("it is not at the position given in the table of contents")
    return offset + _LOCAL_HEADER.size + sum(lengths)


Tree: TypeAlias = FolderTree | ZipTree


def is_unsafe(name: str) -> bool:
    """Whether a path in an archive leads out of the folder that the archive is unpacked in."""
    parts = name.replace("\\", "/").split("/")
    return name.startswith(("/", "\\")) or ".." in parts or parts[0][1:2] == ":"


def is_image(tree: Tree, path: str) -> bool:
    """Whether a file is an image: by its suffix, else by its first bytes."""
    return _has_image_suffix(path) or looks_like_image(tree.start(path))


def _has_image_suffix(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def folders_in(tree: Tree, folder: str) -> list[str]:
    """Names of the folders in a folder, sorted."""
    return sorted(name for name, kind in tree.entries(folder) if kind is Kind.FOLDER)


def holds_images(tree: Tree, folder: str) -> bool:
    """Whether a folder directly contains images. False if it cannot be read."""
    others = []
    try:
        for name, kind in tree.entries(folder):
            if kind.is_file:
                if _has_image_suffix(name):
                    return True
                others.append(name)
    except OSError:
        return False
    return any(looks_like_image(tree.start(folder + name)) for name in heapq.nsmallest(_PEEKED, others))


class FoundFiles(NamedTuple):
    """Paths of files in a folder and its subfolders, sorted, without litter. Links to folders are not followed."""

    images: list[str]
    others: list[str]
    errors: list[str]  # paths of subfolders that cannot be listed, each with the reason


def find_files(folder: pathlib.Path) -> FoundFiles:
    """Lists all files in a folder and its subfolders."""
    found = FoundFiles([], [], [])
    walk = os.walk(folder, onerror=lambda error: found.errors.append(f"{error.filename}: {error.strerror or error}"))
    for path, folders, _ in walk:
        folders[:] = [name for name in folders if not is_litter(name)]
        tree = FolderTree(pathlib.Path(path))
        for name, kind in tree.entries(""):
            if kind.is_file:
                (found.images if is_image(tree, name) else found.others).append(f"{path}/{name}")
    for paths in (found.images, found.others):
        paths.sort(key=lambda path: path.split("/"))
    return found


def open_tree(path: pathlib.Path) -> Tree:
    """Opens a folder or zip file; raises UserError if it is neither."""
    return FolderTree(path) if path.is_dir() else ZipTree(path)


def unreadable(path: pathlib.Path, error: Exception) -> UserError:
    """Makes the error for a folder or zip file that cannot be read."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error or type(error).__name__
    return UserError(f"cannot read {show_name(str(path))} as a folder or zip file of images: {reason}.")
