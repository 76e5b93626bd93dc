"""Data sets as random-access sources of labelled images."""

import hashlib
import os
import pathlib
import threading
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypedDict

import numpy as np

from vit_jax.data import images
from vit_jax.errors import UserError, unknown_name

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Example(TypedDict):
    """An image, uint8 `[height, width, 3]`, and its class."""

    image: np.ndarray
    label: int


class Source(Protocol):
    """One split of a data set.

    Attributes:
      name: where the data come from, for logs.
      split: e.g. "train".
      class_names: by label.
    """

    name: str
    split: str
    class_names: Sequence[str]

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """Changes when the list of examples or their order does, so that a run does not go on with other data."""
        ...

    def __getitem__(self, index: int) -> Example:
        """Reads and decodes one example. Called from several threads at once."""
        ...


class DigitsSource:
    """8x8 grey images of handwritten digits that come with scikit-learn: 1,437 to train on, 360 to test on.

    Every fifth image is a test image, so the same writers are in both splits.
    """

    SPLITS = ("train", "test")

    def __init__(self, split: str):
        """Loads the split.

        Raises:
          UserError: unknown split.
        """
        from sklearn.datasets import load_digits  # takes most of a second

        if split not in self.SPLITS:
            raise unknown_name("split of digits", split, self.SPLITS)
        digits = load_digits()
        chosen = (np.arange(len(digits.target)) % 5 == 0) == (split == "test")
        grey = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        self._images = np.repeat(grey[..., None], 3, axis=-1)
        self._labels = digits.target[chosen].tolist()
        self.name, self.split = "digits", split
        self.class_names: Sequence[str] = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return {"image": self._images[index], "label": self._labels[index]}

    def fingerprint(self) -> str:
        """The images never change."""
        return f"digits/{self.split}"


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
        self._files = [file for name in self.class_names for file in sorted(by_class[name])]
        counts = [len(by_class[name]) for name in self.class_names]
        self._labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        try:
            image = images.decode(self._read(self._files[index]))
        except Exception as error:  # whatever a damaged file does to zip, zlib, JPEG or OpenCV
            raise UserError(
                f"cannot read image {self._files[index]!r} in {self.name}: {error}. Replace the file, or remove it and "
                "train in a new workdir (the order of the data depends on the list of files)."
            ) from error
        return {"image": image, "label": int(self._labels[index])}

    def fingerprint(self) -> str:
        """Changes when the list of files does."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(f"{file}\n".encode())
        return digest.hexdigest()[:16]

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


def open_source(dataset: str, split: str, how_to_prepare: str = "") -> Source:
    """Opens a split of a data set.

    Args:
      dataset: "digits", which is embedded, or the path of an image folder or zip file: `<split>/<class>/<image>`. A
        relative path that does not exist is looked for in `$VIT_JAX_DATA` too.
      split: name of the split.
      how_to_prepare: told to the user if the data are not there.

    Raises:
      UserError: the data or the split do not exist, or the data are not as they should be.
    """
    if dataset == "digits":
        return DigitsSource(split)
    path = find_path(dataset)
    if path is None:
        where = " or ".join(str(candidate) for candidate in _candidates(dataset))
        advice = how_to_prepare.strip() or (
            "Set --config.data.dataset to 'digits' or to a path that holds <split>/<class>/<image>.jpg."
        )
        raise UserError(
            f"data set {dataset!r} not found: neither the embedded set 'digits' nor a folder or zip file at {where}.\n"
            f"{advice}"
        )
    return ImageFolderSource(path, split)


def find_path(dataset: str) -> pathlib.Path | None:
    """The place of a data set on disk, or None where there is none."""
    return next((candidate for candidate in _candidates(dataset) if candidate.exists()), None)


def _candidates(dataset: str) -> list[pathlib.Path]:
    path = pathlib.Path(dataset).expanduser()
    data_dir = os.environ.get("VIT_JAX_DATA")
    return [path] if path.is_absolute() or not data_dir else [path, pathlib.Path(data_dir, path)]
