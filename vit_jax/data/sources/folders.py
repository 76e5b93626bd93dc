"""Folders and zip files of images."""

import os
import pathlib
import threading
import zipfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from vit_jax.data.sources.base import BadRecordError, Example, fingerprint_of
from vit_jax.errors import UserError, unknown_name

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class ImageFolderSource:
    """`<split>/<class>/<image>` in a folder or in a zip file, which need not be unpacked.

    Classes and images are sorted by name, so labels and order are the same everywhere. A single folder around the
    splits is looked through.
    """

    def __init__(self, path: str | os.PathLike[str], split: str):
        """Lists the files of the split; reads none.

        Raises:
          UserError: unknown split, an empty class, or a file that is not an image.
        """
        self._root = pathlib.Path(path)
        self.name, self.split = str(path), split
        try:
            self._zip = None if self._root.is_dir() else zipfile.ZipFile(self._root)
            by_class = self._by_class(self._list_zip(self._zip) if self._zip else self._list_folder())
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot read {self.name} as a folder or zip file of images: {error}.") from error
        self._zip_lock = threading.Lock()
        self.class_names: Sequence[str] = sorted(by_class)
        self.num_classes, self.max_labels = len(self.class_names), 1
        self._files = [file for name in self.class_names for file in sorted(by_class[name])]
        counts = [len(by_class[name]) for name in self.class_names]
        self._labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        file = self._files[index]
        try:
            content = self._read(file)
        except Exception as error:  # whatever a damaged file does to zip and zlib
            raise BadRecordError(f"cannot read {self.where(index)}: {error}") from error
        return {"image": content, "label": int(self._labels[index]), "file_name": pathlib.PurePath(file).name}

    def fingerprint(self) -> str:
        """Changes when the list of files does."""
        return fingerprint_of(self._files)

    def where(self, index: int) -> str:
        """The path of the image; from the splits on if it is in a zip file."""
        return str(self._root / self._files[index]) if self._zip is None else f"{self._files[index]!r} in {self.name}"

    def _read(self, file: str) -> bytes:
        if self._zip is None:
            return (self._root / file).read_bytes()
        with self._zip_lock:  # one file position for all threads
            return self._zip.read(self._zip_prefix + file)

    def _list_zip(self, archive: zipfile.ZipFile) -> Iterator[str]:
        """Paths from the splits on; folders end with "/"."""
        paths = [path for path in archive.namelist() if all(map(_is_visible, path.rstrip("/").split("/")))]
        top = {path.split("/")[0] for path in paths}
        self._zip_prefix = "" if self.split in top or len(top) != 1 else f"{top.pop()}/"
        paths = [path.removeprefix(self._zip_prefix) for path in paths]
        self._check_split({path.split("/")[0] for path in paths if "/" in path})
        return (path for path in paths if path.startswith(f"{self.split}/"))

    def _list_folder(self) -> Iterator[str]:
        """Paths from the splits on; folders end with "/"."""

        def folders(path: pathlib.Path) -> list[str]:
            return [entry.name for entry in os.scandir(path) if _is_visible(entry.name) and entry.is_dir()]

        splits = folders(self._root)
        if self.split not in splits and len(splits) == 1:
            self._root /= splits[0]
            splits = folders(self._root)
        self._check_split(set(splits))

        def walk(path: str) -> Iterator[str]:
            for entry in os.scandir(self._root / path):
                if not _is_visible(entry.name):
                    continue
                if entry.is_dir():
                    yield f"{path}{entry.name}/"
                    if path == f"{self.split}/":
                        yield from walk(f"{path}{entry.name}/")
                else:
                    yield f"{path}{entry.name}"

        return walk(f"{self.split}/")

    def _check_split(self, splits: set[str]) -> None:
        if not splits:
            raise UserError(f"{self.name} is empty; images should lie in <split>/<class>/, e.g. train/cat/1.jpg.")
        if self.split not in splits:
            raise unknown_name(f"split of {self.name}", self.split, splits)

    def _by_class(self, paths: Iterable[str]) -> dict[str, list[str]]:
        by_class: dict[str, list[str]] = {}
        misplaced, strangers = [], []
        for path in paths:
            _, *rest = path.rstrip("/").split("/")
            is_folder = path.endswith("/")
            if len(rest) == 1 and is_folder:
                by_class.setdefault(rest[0], [])
            elif len(rest) == 2 and not is_folder:
                by_class.setdefault(rest[0], []).append(path)
                if not path.lower().endswith(IMAGE_SUFFIXES):
                    strangers.append(path)
            elif rest:
                misplaced.append(path)

        where = f"{self.name}, split {self.split!r},"
        if misplaced:
            raise UserError(
                f"{where} should hold a folder per class with the images right in it ({self.split}/<class>/<image>), "
                f"but has {_shorten(sorted(misplaced))}."
            )
        if strangers:
            raise UserError(
                f"{where} has files that are not images: {_shorten(sorted(strangers))}. Remove them; known images are "
                f"{', '.join(IMAGE_SUFFIXES)}."
            )
        if not by_class:
            raise UserError(f"{where} is empty; it should hold a folder per class.")
        if empty := sorted(name for name, files in by_class.items() if not files):
            raise UserError(f"{where} has classes without images: {_shorten(empty)}. Add images or remove the folders.")
        return by_class


def _is_visible(name: str) -> bool:
    """Whether a file is more than what an operating system leaves lying about."""
    return not name.startswith((".", "__MACOSX")) and name != "Thumbs.db"


def _shorten(names: list[str], limit: int = 5) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + rest
