"""Folders and zip files of images."""

import bisect
import functools
import itertools
import os
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from vit_jax.data.sources.base import BadRecordError, Example, Extent, fingerprint_of
from vit_jax.data.sources.records import PositionedFile
from vit_jax.data.sources.splits import ALL
from vit_jax.errors import UserError, unknown_name

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")

_USUAL_SPLITS = {"train", "training", "val", "valid", "validation", "test"}
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # before a member of a zip file: magic, lengths of name and extra field
_MEMBER = np.dtype([("offset", np.int64), ("size", np.int64), ("crc", np.uint32), ("deflated", np.bool_)])


class ImageFolderSource:
    """`<split>/<class>/<image>` in a folder or in a zip file, which need not be unpacked.

    Without splits, `<class>/<image>`, all is one split, "all". Classes and images are sorted by name, so labels and
    order are the same everywhere. A single folder around the splits is looked through. An image takes the bytes of its
    name and 5 more of memory, and 21 more in a zip file.
    """

    def __init__(self, path: str | os.PathLike[str], split: str):
        """Lists the files of the split; reads none.

        Raises:
          UserError: unknown split, an empty class, a file that is not an image, or a zip file that is encrypted or
            compressed otherwise than by "deflate".
        """
        self._root = pathlib.Path(path)
        self.name, self.split = str(path), split
        self._base = f"{split}/"  # between the root and the classes
        self._zip: PositionedFile | None = None
        self._names: list[str] = []  # by class, joined: names of files have no "/" in them
        self._with_links: set[str] = set()  # classes with files that are links
        try:
            if self._root.is_dir():
                self._list_folder()
            else:
                self._list_zip()
        except (OSError, zipfile.BadZipFile) as error:
            raise _unreadable(self._root, error) from error
        self.num_classes, self.max_labels = len(self.class_names), 1

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        label, name = self._locate(index)
        try:
            if self._zip is None:
                with open(f"{self._root}/{self._file(label, name)}", "rb", buffering=0) as file:
                    content = file.readall()
            else:
                content = _read_member(self._zip, *self._members[index].item())
        except Exception as error:  # whatever a damaged file does to zlib
            raise BadRecordError(f"cannot read {self.where(index)}: {error}.") from error
        return {"image": content, "label": label, "file_name": name}

    def labels(self) -> np.ndarray:
        """The labels of all examples, int64 `[examples]`; reads none."""
        return np.repeat(np.arange(len(self._ends)), np.diff(self._ends, prepend=0))

    def extents(self) -> list[Extent]:
        """The folders of the classes, where a file is known by its name; links are followed. Or the zip file."""
        if self._zip is not None:
            return [Extent(os.path.realpath(self._root), len(self), lambda: self._members["offset"])]
        extents = []
        for label, name in enumerate(self.class_names):
            folder = os.path.realpath(self._root / os.path.dirname(self._file(label, "image")))
            if name in self._with_links:
                paths = (os.path.realpath(f"{folder}/{file}") for file in self._names[label].split("/"))
                for place, group in itertools.groupby(map(os.path.split, paths), key=lambda path: path[0]):
                    numbers = np.array([hash(file) for _, file in group])
                    extents.append(Extent(place, len(numbers), functools.partial(np.asarray, numbers)))
            else:
                size = self._ends[label] - (self._ends[label - 1] if label else 0)
                extents.append(Extent(folder, size, functools.partial(self._hashes, label)))
        return extents

    def _hashes(self, label: int) -> np.ndarray:
        names = self._names[label].split("/")
        return np.fromiter(map(hash, names), np.int64, len(names))

    def fingerprint(self) -> str:
        """Changes when the list of files does."""
        folders = [f"{self._base}{name}/" for name in self.class_names]
        return fingerprint_of(
            folder + names.replace("/", f"\n{folder}") for folder, names in zip(folders, self._names, strict=True)
        )

    def where(self, index: int) -> str:
        """The path of the image; from the splits on if it is in a zip file."""
        file = self._file(*self._locate(range(len(self))[index]))
        return str(self._root / file) if self._zip is None else f"{file!r} in {self.name}"

    def _locate(self, index: int) -> tuple[int, str]:
        """Label and name of an image."""
        label = bisect.bisect_right(self._ends, index)
        names, start = self._names[label], int(self._starts[index])
        end = names.find("/", start)
        return label, names[start:] if end < 0 else names[start:end]

    def _file(self, label: int, name: str) -> str:
        return f"{self._base}{self.class_names[label]}/{name}"

    def _list_folder(self) -> None:
        splits = _folders(self._root)
        if self.split not in splits and len(splits) == 1:
            inner = _folders(self._root / splits[0])
            if self._are_splits(inner):
                self._root, splits = self._root / splits[0], inner
        self._check_splits(splits, self._root)
        misplaced = []

        def files_of(name: str) -> list[str]:
            files = []
            for entry in os.scandir(self._root / self._base / name):
                if entry.is_dir() and _is_visible(entry.name):
                    misplaced.append(f"{self._base}{name}/{entry.name}/")
                elif _is_visible(entry.name):
                    files.append(entry.name)
                    if entry.is_symlink():
                        self._with_links.add(name)
            return sorted(files)

        classes = []
        for entry in os.scandir(self._root / self._base):
            if entry.is_dir() and _is_visible(entry.name):
                classes.append(entry.name)
            elif _is_visible(entry.name) and self._base:  # beside folders of classes a README may lie
                misplaced.append(f"{self._base}{entry.name}")
        self._keep(((name, files_of(name)) for name in sorted(classes)), misplaced)

    def _list_zip(self) -> None:
        with zipfile.ZipFile(self._root) as archive:
            members = {
                member.filename: member
                for member in archive.infolist()
                if all(map(_is_visible, member.filename.rstrip("/").split("/")))
            }
        top = {path.split("/")[0] for path in members}
        inner = {path.split("/")[1] for path in members if "/" in path}
        around = f"{top.pop()}/" if self.split not in top and len(top) == 1 and self._are_splits(inner) else ""
        members = {path.removeprefix(around): member for path, member in members.items()}
        names = {path.split("/")[0] for path in members if "/" in path}
        self._check_splits(names, zipfile.Path(self._root))
        classes: dict[str, list[str]] = {}
        misplaced = []
        for path in members:
            if not path.startswith(self._base) or not (inside := path.removeprefix(self._base)):
                continue
            rest = inside.rstrip("/").split("/")
            if len(rest) == 1 and not self._base and not path.endswith("/"):
                continue  # beside folders of classes a README may lie
            if len(rest) == 1 and path.endswith("/"):
                classes.setdefault(rest[0], [])
            elif len(rest) == 2 and not path.endswith("/"):
                classes.setdefault(rest[0], []).append(rest[1])
            else:
                misplaced.append(path)
        self._keep(((name, sorted(classes[name])) for name in sorted(classes)), misplaced)

        kept = [members[self._file(*self._locate(index))] for index in range(len(self))]
        for member in kept:
            if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(
                    f"{member.filename!r} in {self.name} is encrypted, or compressed otherwise than by 'deflate'. Zip "
                    "the images again, best without compression: zip -0 -r <name>.zip <folder>"
                )
        self._members = np.array(
            [(m.header_offset, m.compress_size, m.CRC, m.compress_type == zipfile.ZIP_DEFLATED) for m in kept], _MEMBER
        )
        self._zip = PositionedFile(self._root)

    def _are_splits(self, names: Iterable[str]) -> bool:
        """Whether folders within a single folder look like splits; otherwise they are the classes of the only one."""
        return bool({self.split, *_USUAL_SPLITS}.intersection(names))

    def _check_splits(self, splits: Iterable[str], tree: pathlib.Path | zipfile.Path) -> None:
        self.splits: Sequence[str] = sorted(splits)
        if not self.splits:
            raise UserError(f"{self.name} is empty; images should lie in <split>/<class>/, e.g. train/cat/1.jpg.")
        if self.split not in self.splits and _are_classes(tree, self.splits):
            if self.split != ALL:
                raise UserError(
                    f"{self.name} has no split {self.split!r}: it has folders of classes "
                    f"({_shorten(list(self.splits))}) and no splits. Take {ALL!r}, or parts of it such as 'all[:90%]' "
                    "and 'all[90%:]'."
                )
            self.splits, self._base = [ALL], ""
        if self.split not in self.splits:
            raise unknown_name(f"split of {self.name}", self.split, self.splits)

    def _keep(self, classes: Iterable[tuple[str, list[str]]], misplaced: list[str]) -> None:
        """Keeps the names of classes and of their files, both sorted, and checks that they are as they should be.

        Each class is joined to one string at once: lists of tens of millions of strings would take gigabytes.
        """
        self.class_names: Sequence[str] = []
        counts, starts, empty, strangers = [], [np.zeros(0, np.uint32)], [], []
        for name, files in classes:
            self.class_names.append(name)
            self._names.append("/".join(files))
            counts.append(len(files))
            lengths = np.fromiter(map(len, files), np.uint32, len(files)) + 1  # with the "/"
            starts.append(np.cumsum(lengths, dtype=np.uint32) - lengths)
            if not files:
                empty.append(name)
            strangers += [f"{self._base}{name}/{file}" for file in files if not file.lower().endswith(IMAGE_SUFFIXES)]
        self._starts = np.concatenate(starts)
        self._ends = list(itertools.accumulate(counts))

        where = f"{self.name}, split {self.split!r},"
        if misplaced:
            raise UserError(
                f"{where} should hold a folder per class with the images right in it ({self._base}<class>/<image>), "
                f"but has {_shorten(sorted(misplaced))}."
            )
        if strangers:
            raise UserError(
                f"{where} has files that are not images: {_shorten(strangers)}. Remove them; known images are "
                f"{', '.join(IMAGE_SUFFIXES)}."
            )
        if not self.class_names:
            raise UserError(f"{where} is empty; it should hold a folder per class.")
        if empty:
            raise UserError(f"{where} has classes without images: {_shorten(empty)}. Add images or remove the folders.")


def list_splits(path: str | os.PathLike[str]) -> list[str]:
    """The splits of a folder or zip file of images, where no name of a split says what is one.

    A single folder is one around the splits if it has one with a usual name, such as "train". If there are folders of
    classes instead of splits, "all" is the only split.

    Raises:
      UserError: the folder or zip file cannot be read.
    """
    root = pathlib.Path(path)
    try:
        tree = root if root.is_dir() else zipfile.Path(root)
        splits = _folders(tree)
        inner = _folders(tree / splits[0]) if len(splits) == 1 else []
        if _are_classes(tree, splits):
            return [ALL]
    except (OSError, zipfile.BadZipFile) as error:
        raise _unreadable(root, error) from error
    return inner if _USUAL_SPLITS.intersection(inner) else splits


def _are_classes(tree: pathlib.Path | zipfile.Path, names: Sequence[str]) -> bool:
    """Whether images lie right in the folders of these names, which then are classes rather than splits."""
    if _USUAL_SPLITS.intersection(names):
        return False
    for name in names:
        for entry in (tree / name).iterdir():
            if _is_visible(entry.name):
                return not entry.is_dir() and entry.name.lower().endswith(IMAGE_SUFFIXES)
    return False


def _unreadable(path: pathlib.Path, error: Exception) -> UserError:
    return UserError(f"cannot read {path} as a folder or zip file of images: {error}.")


def _folders(tree: pathlib.Path | zipfile.Path) -> list[str]:
    return sorted(entry.name for entry in tree.iterdir() if _is_visible(entry.name) and entry.is_dir())


def _read_member(file: PositionedFile, offset: int, size: int, crc: int, deflated: bool) -> bytes:
    """Reads a member of a zip file at its place, so that threads need not wait for each other."""
    magic, *lengths = _LOCAL_HEADER.unpack(file.read(offset, _LOCAL_HEADER.size))
    if magic != b"PK\3\4":
        raise ValueError("it is not where the table of contents says")
    content = file.read(offset + _LOCAL_HEADER.size + sum(lengths), size)
    if deflated:
        content = zlib.decompress(content, -zlib.MAX_WBITS)
    if zlib.crc32(content) != crc:
        raise ValueError("its checksum is another, so the file was damaged")
    return content


def _is_visible(name: str) -> bool:
    """Whether a file is more than what an operating system leaves lying about."""
    return not name.startswith((".", "__MACOSX")) and name != "Thumbs.db"


def _shorten(names: list[str], limit: int = 5) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + rest
