"""Prepares a list of images with labels, the format of web-scale data sets: JSON lines or parquet.

A row is `{"image": "shard17/0001.jpg", "label": 5}`. The label, also spelled `labels`, is a number, a name, or a list
of either. Paths are relative to the list.
"""

import os
import pathlib
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from vit_jax.console import show_name
from vit_jax.data.prepare.index import Row
from vit_jax.data.prepare.passes import Found, Origin, Passed, check_split
from vit_jax.data.sources.base import BadRecordError, fingerprint_of, reason_of
from vit_jax.data.sources.folders import composed
from vit_jax.data.sources.trees import MAX_FILE_BYTES
from vit_jax.errors import UserError
from vit_jax.files import read_regular, read_text_lines
from vit_jax.json_files import parse_json

_ROWS_AT_ONCE = 4096  # of a parquet file
_LONGEST_LINE = 2**22  # bytes
_MOST_CLASSES = 2**24  # larger labels are probably ids, and a list of so many classes would take all memory


class ImageList(Origin):
    """The images of a list, all in one split."""

    def __init__(
        self,
        path: pathlib.Path,
        *,
        images_root: pathlib.Path | None = None,
        class_names: pathlib.Path | None = None,
        num_classes: int | None = None,
        single_label: bool = False,
        merge: bool = False,
        split: str = "train",
    ):
        """Opens the list without reading its rows.

        Args:
          path: of the list, `.jsonl` or `.parquet`.
          images_root: folder that paths are relative to and must not leave; None: the list's.
          class_names: text file with one name per line, in the order of the labels; None: the names that occur, sorted.
          num_classes: number of classes if labels are numbers; None: the largest label plus one.
          single_label: whether examples have one `label` instead of `labels`.
          merge: whether copies of an image become one example with the labels of all.
          split: name of the split.

        Raises:
          UserError: a file does not exist or has an unknown format, single_label and merge are both set, or the split
            or number of classes is invalid.
        """
        if path.suffix not in (".jsonl", ".parquet"):
            raise UserError(f"{path} is neither a .jsonl nor a .parquet file.")
        if not path.is_file():
            raise UserError(f"there is no list {path}.")
        if single_label and merge:
            raise UserError("--merge and --single_label exclude each other. Set one.")
        check_split(split, "--split")
        if num_classes is not None and not 1 <= num_classes <= _MOST_CLASSES:
            raise UserError(f"--num_classes must be from 1 to {_MOST_CLASSES:,}, got {num_classes}.")
        self._path, self._root = path, (images_root or path.parent).absolute()
        self._real_root = os.path.realpath(self._root)
        if not self._root.is_dir():
            raise UserError(f"there is no folder {self._root} (--images_root).")
        self._num_classes, self._split = num_classes, split
        self._names = _read_names(class_names) if class_names else None
        self._known = {name: number for number, name in enumerate(self._names or ())}
        self.multi_label = not single_label
        self.arrangement = "merged" if merge else "each"
        self.description = f"Images listed in {show_name(path.name)}, as they were."
        stat = path.stat()
        self.settings = {
            "command": "manifest",
            "split": split,
            "classes": fingerprint_of(self._names) if self._names else None,
            "num_classes": num_classes,
            "multi_label": self.multi_label,
            "arrangement": self.arrangement,
            "files": [path.name, stat.st_size, stat.st_mtime_ns],
        }
        self.facts = {"list": show_name(path.name), "bytes": stat.st_size}
        is_json = path.suffix == ".jsonl"
        self._rows = self._read_json if is_json else self._read_parquet
        self.extent = stat.st_size if is_json else _open_parquet(path).metadata.num_rows

    def scan(self, mark: Any) -> Iterator[Found | Passed]:
        """Reads rows from a mark on.

        Raises:
          UserError: a row lacks an image or label, has an unknown label, or has a path that leaves the folder.
        """
        for where, row, after in self._rows(mark or 0):
            given, labels = _parse(row, where)
            image = self._local_path(given, where)
            tokens = [self._token(label, where) for label in labels]
            if not self.multi_label and len(tokens) != 1:
                raise UserError(f"{where} has {len(tokens)} labels; --single_label requires exactly one.")
            yield Found(self._split, image, tokens, 0, 0, after, mark=after)

    def read(self, row: Row | Found) -> bytes:
        """Reads one image."""
        try:
            return read_regular(self._root / row.file_name, MAX_FILE_BYTES)
        except OSError as error:
            if error.errno is not None:
                raise
            raise BadRecordError(f"cannot be read: {error}") from error

    def place(self, row: Row | Found) -> str:
        """Returns the path of the image."""
        return str(self._root / row.file_name)

    def classes(self, names: Sequence[str]) -> tuple[dict[str, int], Sequence[str] | int]:
        """Returns names in the order of the file of names, or else sorted; or the number of classes for numbers.

        Raises:
          UserError: some labels are numbers and others names.
        """
        if self._names is not None:
            numbers = {token: i for name, i in self._known.items() for token in (f"={name}", f"#{i}")}
            return numbers, self._names
        numbered = [name for name in names if name.startswith("#")]
        if not numbered:
            in_order = sorted(names)
            return {name: number for number, name in enumerate(in_order)}, [name[1:] for name in in_order]
        if len(numbered) < len(names):
            other = next(name for name in names if not name.startswith("#"))
            raise UserError(f"some labels are numbers ({numbered[0][1:]}), others names ({other[1:]!r}). Use one kind.")
        largest = max(int(name[1:]) for name in numbered)
        return {name: int(name[1:]) for name in numbered}, self._num_classes or largest + 1

    def _token(self, label: int | str, where: str) -> str:
        """Encodes a label for the index: "#5" for a number, "=cat" for a name in Unicode's composed form."""
        if isinstance(label, int):
            limit = len(self._names) if self._names is not None else self._num_classes
            if limit is None and label >= _MOST_CLASSES:
                raise UserError(
                    f"{where} has label {label}, but a number must be less than {_MOST_CLASSES:,}. If it is a name, "
                    f'write it in quotes: "label": "{label}".'
                )
            if label < 0 or (limit is not None and label >= limit):
                raise UserError(f"{where} has label {label}; labels of {limit or 'numbered'} classes count from 0.")
            return f"#{label}"
        label = composed(label)
        if self._names is not None and label not in self._known:
            raise UserError(f"{where} has label {label!r}, which is not one of {len(self._names)} class names.")
        return f"={label}"

    def _local_path(self, image: str, where: str) -> str:
        """Checks a path, and converts one from another system: to slashes, and to the Unicode form on this disk.

        Raises:
          UserError: the path leaves the folder, by its parts or through a link, or is an absolute one of Windows.
        """
        if not image.isascii() or "\\" in image:
            forward = image.replace("\\", "/")
            candidates = (image, *(unicodedata.normalize(form, forward) for form in ("NFC", "NFD")))
            existing = (each for each in candidates if os.path.lexists(self._root / each.replace("\0", "")))
            found = next(existing, forward)
            if found is forward and "\\" in image and (forward.startswith("/") or forward[1:2] == ":"):
                raise UserError(
                    f"{where} has the Windows path {image!r}. Write paths relative to the list or to --images_root, "
                    f"such as {forward.rpartition('/')[2]!r}."
                )
            image = found
        pure = pathlib.PurePath(image)
        inside = not pure.is_absolute() and ".." not in pure.parts
        if inside:
            try:
                real = os.path.realpath(self._root / image)
            except ValueError as error:  # a zero byte
                raise UserError(f"{where} has the invalid path {image!r}: {error}.") from error
            inside = os.path.commonpath([real, self._real_root]) == self._real_root
        if not inside:
            raise UserError(
                f"{where} has the path {image!r}, which is not in {self._root}. Refused; set --images_root to a folder "
                "above all images, and write paths relative to it."
            )
        return image

    def _read_json(self, offset: int) -> Iterator[tuple[str, Any, int]]:
        with self._path.open("rb") as file:
            file.seek(offset)
            while line := file.readline(_LONGEST_LINE):
                where = f"{self._path.name}, line at byte {offset:,}"
                offset = file.tell()
                if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise UserError(f"{self._path} is UTF-16. Save it as UTF-8.")
                if len(line) >= _LONGEST_LINE and not line.endswith(b"\n"):
                    raise UserError(f"{where} has more than {_LONGEST_LINE:,} bytes. Write one row per line.")
                if line.strip():
                    yield where, parse_json(line, where), offset

    def _read_parquet(self, first: int) -> Iterator[tuple[str, Any, int]]:
        file = _open_parquet(self._path)
        columns = [name for name in ("image", "label", "labels") if name in file.schema_arrow.names]
        batches, number = file.iter_batches(_ROWS_AT_ONCE, columns=columns), 0
        while True:
            try:
                batch = next(batches, None)
                rows = [] if batch is None else batch.to_pylist()
            except (OSError, ValueError, MemoryError) as error:  # as pyarrow's own errors are
                raise UserError(
                    f"cannot read {self._path} as parquet after row {number:,}: {reason_of(error)}."
                ) from error
            if batch is None:
                return
            for row in rows:
                number += 1
                if number > first:
                    yield f"{self._path.name}, row {number:,}", row, number


def _open_parquet(path: pathlib.Path) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError, MemoryError) as error:  # as pyarrow's own errors are
        raise UserError(f"cannot read {path} as parquet: {reason_of(error)}.") from error


def _parse(row: Any, where: str) -> tuple[str, list[int | str]]:
    if not isinstance(row, dict) or not isinstance(row.get("image"), str) or not row["image"]:
        raise UserError(f'{where} has no image. Write rows such as {{"image": "a/1.jpg", "label": 5}}.')
    label = row["label"] if row.get("label") is not None else row.get("labels")
    labels: list[Any] = label if isinstance(label, list) else [label]
    wrong = next((one for one in labels if isinstance(one, bool) or not isinstance(one, int | str)), None)
    if wrong is not None or label is None or "" in labels or any("\n" in str(one) for one in labels):
        raise UserError(f"{where} has no label that is a number or a name: {label!r}.")
    try:
        "".join([row["image"], *map(str, labels)]).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} has half a Unicode character: {row!r}.") from error
    return row["image"], labels


def _read_names(path: pathlib.Path) -> list[str]:
    try:
        names = [composed(line.strip()) for line in read_text_lines(path)]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read class names from {path}: {error}.") from error
    if not names or "" in names or len(set(names)) < len(names):
        raise UserError(f"{path} must have one name per line, none empty or repeated.")
    return names
