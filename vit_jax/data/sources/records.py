"""Records in files: tfrecord and array_record, read at random, and examples in them as TensorFlow writes them.

A tfrecord file has no table of contents, so one is made when the file is first used: where each record begins, 8 bytes
a record, found by reading the records' headers alone. It is kept beside the file as `.<file>.index`, or, where that
folder cannot be written, in `indices/` of the cache (`vit_jax.files`).
"""

import bisect
import concurrent.futures
import dataclasses
import functools
import glob
import hashlib
import io
import itertools
import logging
import os
import pathlib
import re
import resource
import struct
import time
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from vit_jax.data.sources.base import NO_LABEL, BadRecordError, Example, Extent, fingerprint_of
from vit_jax.data.sources.splits import ALL, resolve, shard_ranges
from vit_jax.errors import UserError, unknown_name
from vit_jax.files import cache_folder, open_regular, read_regular, read_text_lines, replacing, stat_regular
from vit_jax.json_files import Fields, read_object

logger = logging.getLogger(__name__)

IMAGE_KEYS = ("image", "image/encoded", "jpg", "jpeg", "png", "image_bytes", "encoded")
LABEL_KEYS = ("label", "labels", "image/class/label", "cls", "class", "label_ids")
FILE_NAME_KEYS = ("file_name", "filename", "image/filename", "image/file_name", "__key__", "key")

_FORMATS = ("array_record", "tfrecord")

_HEADER = struct.Struct("<QI")  # length of the record, and checksum of the length
_CHECKSUM = struct.Struct("<I")
_FRAME = _HEADER.size + _CHECKSUM.size  # bytes around a record
_RIEGELI_START = bytes.fromhex("83af70d10d884a3f000000000000000040000000")  # of files of the format below array_record
_INDEX_VERSION = 1
_MOST_INDEX_BYTES = 2**16  # more than the file, as an index takes 8 bytes for a record of at least 16
_MOST_RECORD_BYTES = 2**30
_THREADS = 16  # what waits for a disk or a network needs more than there are cores
_PROGRESS_SECONDS = 10
_FIRST_RECORDS = 64  # where the names of features are looked for


class PositionedFile:
    """A file that several threads read at once, each at its own place. Pickled, it is opened anew where it arrives."""

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


class RecordFiles(Protocol):
    """Files of records, read at random.

    Attributes:
      paths: of the files.
      lengths: number of records in each.
    """

    paths: Sequence[str]
    lengths: Sequence[int]

    def read(self, file: int, record: int) -> bytes:
        """Reads one record. Called from several threads at once; raises whatever a damaged file leads to."""
        ...

    def where(self, file: int, record: int) -> str:
        """The place of a record, for people."""
        ...


class TFRecordFiles:
    """tfrecord files with an index of their records. Checksums are compared with every read."""

    def __init__(self, paths: Sequence[str]):
        """Indexes the files that have no index yet.

        Raises:
          UserError: a file is missing, truncated, damaged, or no tfrecord file.
        """
        self.paths: Sequence[str] = list(paths)
        self._offsets = _index_all(self.paths)
        self.lengths: Sequence[int] = [len(offsets) - 1 for offsets in self._offsets]
        # A file whose place in the cache is taken closes when the last thread that reads it is done with it.
        most = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._file = functools.lru_cache(maxsize=min(most, 4096))(PositionedFile)

    def read(self, file: int, record: int) -> bytes:
        """Reads a record and compares its checksum."""
        begin, end = self._offsets[file][record : record + 2].tolist()
        opened = self._file(self.paths[file])
        begin, size = begin + _HEADER.size, end - begin - _FRAME
        if size > _MOST_RECORD_BYTES:
            raise ValueError(f"it has {size:,} bytes, more than the {_MOST_RECORD_BYTES:,} that are read")
        content = opened.read(begin, size)
        if _checksum(content) != _CHECKSUM.unpack(opened.read(begin + size, _CHECKSUM.size))[0]:
            raise ValueError("its checksum is another, so the file was damaged or changed")
        return content

    def where(self, file: int, record: int) -> str:
        """File, number and offset of a record."""
        return f"record {record} (byte {self._offsets[file][record]}) of {self.paths[file]}"

    def __reduce__(self) -> tuple[Any, ...]:
        return TFRecordFiles, (self.paths,)  # the indices are on disk; of tens of millions of records they are large


class ArrayRecordFiles:
    """array_record files, by the reader that `tfds.data_source` uses too; it keeps all files open.

    Pickled, it can be read in another process, but not in a forked one.
    """

    def __init__(self, paths: Sequence[str], lengths: Sequence[int] | None = None):
        """Asks the files for their lengths where they are not given; reads nothing more.

        Raises:
          UserError: a file is missing or no array_record file, or the system does not allow so many open files.
        """
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        _allow_open_files(len(paths))
        for path in paths:
            _stat(path)
        self.paths: Sequence[str] = list(paths)
        if lengths is None:
            with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
                lengths = list(pool.map(_array_record_length, paths))
        self.lengths: Sequence[int] = list(lengths)
        self._first = [0, *itertools.accumulate(self.lengths)]
        wanted = zip(self.paths, self.lengths, strict=True)
        self._records = ArrayRecordDataSource([_WholeFile(path, 0, length, length) for path, length in wanted])
        self._process = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrayRecordFiles, (self.paths, self.lengths)

    def read(self, file: int, record: int) -> bytes:
        """Reads a record; the format has checksums of its own."""
        if self._process != os.getpid():  # the reader's threads are not there, and it would crash
            raise UserError(
                "array_record files cannot be read in a forked process. Start worker processes with the method 'spawn' "
                "or 'forkserver', or read tfrecord files."
            )
        return self._records[self._first[file] + record]

    def where(self, file: int, record: int) -> str:
        """File and number of a record."""
        return f"record {record} of {self.paths[file]}"


@dataclasses.dataclass(frozen=True)
class _WholeFile:
    """What array_record calls a FileInstruction."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def open_record_files(paths: Sequence[str], file_format: str, lengths: Sequence[int] | None = None) -> RecordFiles:
    """Opens files of one format.

    Args:
      paths: of the files.
      file_format: "tfrecord" or "array_record".
      lengths: number of records in each file, where that is known.

    Raises:
      UserError: a file is missing or damaged, or has another number of records than it should.
    """
    if file_format == "array_record":
        return ArrayRecordFiles(paths, lengths)
    files = TFRecordFiles(paths)
    for path, found, expected in zip(paths, files.lengths, lengths or files.lengths, strict=True):
        if found != expected:
            raise UserError(
                f"{path} has {found} records, but the description of the data set says {expected}. Copy or prepare "
                "the file again."
            )
    return files


@dataclasses.dataclass(frozen=True)
class ExampleKeys:
    """Names of features in `tf.train.Example`.

    Attributes:
      image: the encoded image.
      label: one or many label ids; None where the data have no labels.
      file_name: what the data set calls the image; None where it does not say.
    """

    image: str
    label: str | None
    file_name: str | None


# What a label may be made of: the values of each feature of a record by its name, flat, whatever their shape was.
Features = Mapping[str, Sequence[Any]]


class RecordSource:
    """Records that are `tf.train.Example`: an encoded image and one or many label ids, or what a label follows from."""

    def __init__(
        self,
        files: RecordFiles,
        ranges: Sequence[tuple[int, int, int]],
        keys: ExampleKeys,
        *,
        name: str,
        split: str,
        splits: Sequence[str],
        class_names: Sequence[str] | None,
        num_classes: int | None,
        max_labels: int,
        all_labelled: bool = False,
        derive_label: Callable[[Features], int] | None = None,
        derive_image: Callable[[bytes], np.ndarray] | None = None,
        exif_orientation: bool = False,
    ):
        """Reads nothing.

        Args:
          files: the files.
          ranges: which records, in order: (file, first, last + 1).
          keys: what the features are called.
          name: see `Source`, as the others.
          split: what was asked for.
          splits: all there are.
          class_names: by label.
          num_classes: labels must be less, where it is known.
          max_labels: an example must not have more. If it is 1, labels are numbers, otherwise lists.
          all_labelled: an example without label is an error, not left without.
          derive_label: makes the label of the features of a record, instead of reading it under `keys.label`; raises
            KeyError or ValueError where that cannot be. A function of a module, as the next, so that it can be pickled
            and has a name.
          derive_image: makes the pixels of the encoded image, uint8 `[height, width, 3]`, where they are not as they
            should be.
          exif_orientation: see `Example`.
        """
        self._files, self._keys = files, keys
        self._ranges = list(ranges)
        self._ends = list(itertools.accumulate(last - first for _, first, last in ranges))
        self._sizes = [os.path.getsize(files.paths[file]) for file, _, _ in ranges]
        self.name, self.split, self.splits = name, split, list(splits)
        self.class_names, self.num_classes, self.max_labels = class_names, num_classes, max_labels
        self.exif_orientation = exif_orientation
        self._all_labelled, self._derive_label, self._derive_image = all_labelled, derive_label, derive_image

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        file, record = self._locate(index)
        try:
            features = parse_example(self._files.read(file, record))
            image = _first_bytes(features, self._keys.image)
        except UserError:
            raise
        except Exception as error:  # whatever a damaged file does to the readers
            raise BadRecordError(f"cannot read {self.where(index)}: {_reason(error)}.") from error
        labels = self._labels(features, index)
        example: Example = {"image": image, "label": labels}
        if self.exif_orientation:
            example["exif_orientation"] = True
        if self._derive_image is not None:
            example["image"] = self._pixels(self._derive_image, image, index)
        if self.max_labels == 1:
            example["label"] = labels[0] if labels else NO_LABEL
        if self._keys.file_name and self._keys.file_name in features:
            example["file_name"] = _first_bytes(features, self._keys.file_name).decode(errors="replace")
        return example

    def fingerprint(self) -> str:
        """Changes with names and sizes of the files, what is taken of each, and what image and label are made of.

        It does not change with the folder.
        """
        derived = (rule.__qualname__ if rule else None for rule in (self._derive_label, self._derive_image))
        files = (
            f"{pathlib.PurePath(self._files.paths[file]).name} {size} [{first}:{last}]"
            for (file, first, last), size in zip(self._ranges, self._sizes, strict=True)
        )
        return fingerprint_of([*files, self._keys.image, self._keys.label, *derived])

    def extents(self) -> list[Extent]:
        """The ranges of records that are taken of each file."""
        paths = {file: os.path.realpath(self._files.paths[file]) for file, _, _ in self._ranges}
        return [
            Extent(paths[file], last - first, functools.partial(range, first, last))
            for file, first, last in self._ranges
        ]

    def where(self, index: int) -> str:
        """File and record, and the offset where the format has one."""
        return self._files.where(*self._locate(index))

    def _locate(self, index: int) -> tuple[int, int]:
        index = range(len(self))[index]
        number = bisect.bisect_right(self._ends, index)
        file, _, last = self._ranges[number]
        return file, last + index - self._ends[number]

    def _labels(self, features: Mapping[str, Any], index: int) -> list[int]:
        if self._derive_label is not None:
            labels = [self._derived(self._derive_label, features, index)]
        else:
            key = self._keys.label
            values = features[key].int64_list.value if key is not None and key in features else ()
            labels = [label for label in dict.fromkeys(values) if label != NO_LABEL]
        if self._all_labelled and not labels:
            raise UserError(
                f"{self.where(index)} has no label: its {self._keys.label!r} is missing, empty or {NO_LABEL}, but all "
                "images of this data set should have one. Copy or prepare it again."
            )
        if len(labels) > self.max_labels:
            raise UserError(
                f"{self.where(index)} has {len(labels)} labels, but data.max_labels is {self.max_labels}. Set it to "
                "the most labels that an image of this data set has."
            )
        for label in labels:
            if label < 0 or (self.num_classes is not None and label >= self.num_classes):
                count = f" of {self.num_classes} classes" if self.num_classes is not None else ""
                raise UserError(
                    f"{self.where(index)} has label {label}, but labels{count} count from 0 to the number of classes "
                    "less one. Mend the data, or the number of classes."
                )
        return labels

    def _pixels(self, derive: Callable[[bytes], np.ndarray], encoded: bytes, index: int) -> np.ndarray:
        try:
            return derive(encoded)
        except UserError as error:
            raise BadRecordError(f"cannot read {self.where(index)}: {_reason(error)}.") from error

    def _derived(self, derive: Callable[[Features], int], features: Mapping[str, Any], index: int) -> int:
        values = {
            name: getattr(feature, kind).value if (kind := feature.WhichOneof("kind")) else ()
            for name, feature in features.items()
        }
        try:
            return derive(values)
        except KeyError as error:
            raise UserError(
                f"{self.where(index)} has no feature {error}, which its label follows from, but "
                f"{', '.join(sorted(values)) or 'nothing'}. It is another data set, or another version of it."
            ) from error
        except ValueError as error:
            raise UserError(f"{self.where(index)} can have no label: {_reason(error)}.") from error


@functools.cache
def _example_class() -> Any:
    from tensorflow_datasets.proto import tf_example_pb2  # without TensorFlow, in a third of a second

    return tf_example_pb2.Example


def parse_example(serialized: bytes) -> Mapping[str, Any]:
    """The features of a serialized `tf.train.Example` by name; raises google.protobuf's DecodeError."""
    return _example_class().FromString(serialized).features.feature


def _first_bytes(features: Mapping[str, Any], key: str) -> bytes:
    if key not in features or not (values := features[key].bytes_list.value):
        raise KeyError(f"it has no bytes under {key!r}, but {', '.join(sorted(features)) or 'nothing'}")
    return values[0]


def _reason(error: Exception) -> str:
    text = error.args[0] if isinstance(error, KeyError) else error
    return (str(text).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# ---- Sharded sets without a description: nothing but files.


def find_shards(pattern: str, folders: Sequence[str | os.PathLike[str]] = ()) -> list[str]:
    """Files that patterns stand for.

    Args:
      pattern: one or several with commas between them: "/data/web/*.array_record*", "web/a-?????-of-00100,web/b-*".
      folders: where relative patterns are looked for, besides the current folder.

    Returns:
      paths, sorted, none twice; hidden files only if asked for. Empty where there are none.

    Raises:
      UserError: the names of the files say that there should be more of them, or one of several patterns has none.
    """
    found: set[str] = set()
    without = []
    # A comma may belong to the name of a folder.
    whole = [pattern] if _matches(pattern.strip(), folders) else pattern.split(",")
    for item in filter(None, (item.strip() for item in whole)):
        files = [path for path in _matches(item, folders) if os.path.isfile(path)]
        found.update(files)
        without += [] if files else [item]
        if not re.search(r"[\]\d]-of", item):  # otherwise someone has chosen among the shards
            _check_complete(files)
    if found and without:
        raise UserError(f"no file matches {without[0]!r} of {pattern!r}. Correct it or leave it out.")
    return sorted(found)


def _matches(pattern: str, folders: Sequence[str | os.PathLike[str]]) -> list[str]:
    """What a pattern matches in the current folder, or else in the first of the others where it matches anything."""
    expanded = os.path.expanduser(pattern)
    roots = [pathlib.Path()] if os.path.isabs(expanded) else [pathlib.Path(), *map(pathlib.Path, folders)]
    return next(filter(None, (glob.glob(os.fspath(root / expanded)) for root in roots)), []) if pattern else []


def _check_complete(paths: Sequence[str]) -> None:
    there: dict[tuple[str, str, str], set[int]] = {}
    for path in paths:
        if match := re.fullmatch(r"(.*-)(\d{5,})-of-(\d{5,})(.*)", path):
            there.setdefault((match[1], match[3], match[4]), set()).add(int(match[2]))
    for (before, total, behind), numbers in there.items():
        if missing := sorted(set(range(int(total))) - numbers):
            first = f"{before}{missing[0]:0{len(total)}d}-of-{total}{behind}"
            raise UserError(
                f"{len(missing)} of {int(total)} files are missing, the first of them {first}. Bring them, or, to go "
                "without them, name those that should be used (a pattern such as 'name-0000[0-4]-of-00100', or "
                "several with commas between them)."
            )


def open_shards(
    paths: Sequence[str],
    spec: str,
    *,
    name: str,
    image_key: str | None = None,
    label_key: str | None = None,
    num_classes: int | None = None,
    max_labels: int | None = None,
) -> RecordSource:
    """Opens files of examples that no description goes with, such as a web-scale set. Their only split is "all".

    Beside the files may lie `classes.txt`, one name a line in the order of labels, and `manifest.json`, whose
    "max_labels" is used if none is given.

    Args:
      paths: all of one format, tfrecord (not compressed) or array_record.
      spec: "all" or slices of it.
      name: see `Source`.
      image_key: name of the feature that has the image; None: a usual name.
      label_key: name of the feature that has label ids; None: a usual name.
      num_classes: number of classes, where there is no `classes.txt`; no less than it names. Labels must be less.
      max_labels: the most labels an image has; None: as `manifest.json` says, otherwise 1.

    Raises:
      UserError: files are missing, damaged or not of a known format, or features are not there.
    """
    files = open_record_files(paths, detect_format(paths))
    parts = resolve(spec, [ALL], lambda _: files.lengths, data_set=name)
    ranges = [piece for part in parts for piece in shard_ranges(files.lengths, part.start, part.stop)]
    folder = pathlib.Path(paths[0]).parent
    facts = read_manifest_facts(folder)
    class_names = _class_names(folder / "classes.txt")
    if class_names is not None:
        if num_classes is not None and num_classes < len(class_names):
            raise UserError(f"{folder / 'classes.txt'} names {len(class_names)} classes, more than {num_classes}.")
        num_classes = len(class_names)
    return RecordSource(
        files,
        ranges,
        _find_keys(files, ranges, image_key, label_key, name),
        name=name,
        split=spec,
        splits=[ALL],
        class_names=class_names,
        num_classes=num_classes,
        max_labels=max_labels or facts.max_labels or 1,
        exif_orientation=facts.exif_orientation,
    )


def detect_format(paths: Sequence[str]) -> str:
    """The format of files, by their names, otherwise by the content of the first.

    Returns:
      "tfrecord" or "array_record".

    Raises:
      UserError: the names speak of both, or the file is of neither format.
    """
    names = {word for path in paths for word in _FORMATS if word in pathlib.PurePath(path).name}
    if len(names) > 1:
        raise UserError(f"{paths[0]} and others are tfrecord and array_record mixed. Name files of one format.")
    if names:
        return names.pop()
    if _is_tfrecord(paths[0]):
        return "tfrecord"
    if _is_array_record(paths[0]):
        return "array_record"
    raise UserError(f"{paths[0]} is neither a tfrecord nor an array_record file, or it is compressed or damaged.")


def is_record_name(name: str) -> bool:
    """Whether a file says by its name that it has records."""
    return not name.startswith(".") and any(word in name for word in _FORMATS)


def is_record_file(path: pathlib.Path) -> bool:
    """Whether a file has records, by its name or by its content."""
    return is_record_name(path.name) or _is_tfrecord(path) or _is_array_record(path)


def _is_tfrecord(path: str | os.PathLike[str]) -> bool:
    header = _beginning(path, _HEADER.size)
    return len(header) == _HEADER.size and _checksum(header[:8]) == _HEADER.unpack(header)[1]


def _is_array_record(path: str | os.PathLike[str]) -> bool:
    return _beginning(path, len(_RIEGELI_START)) == _RIEGELI_START


def _beginning(path: str | os.PathLike[str], size: int) -> bytes:
    """The first bytes of a file; none if it cannot be read, which whoever reads on will find out."""
    try:
        return read_regular(path, 0, start=size)
    except OSError:
        return b""


@dataclasses.dataclass(frozen=True)
class ManifestFacts:
    """What `manifest.json`, which `vit_jax.data.prepare` writes beside records, says of them.

    Attributes:
      max_labels: the most labels an image has; None where it does not say.
      exif_orientation: whether images are turned as their EXIF says.
    """

    max_labels: int | None = None
    exif_orientation: bool = False


def read_manifest_facts(folder: pathlib.Path) -> ManifestFacts:
    """Reads `manifest.json` in a folder, if there is one.

    Raises:
      UserError: the file cannot be understood.
    """
    path = folder / "manifest.json"
    if not path.exists():
        return ManifestFacts()
    fields = Fields(read_object(path), str(path))
    return ManifestFacts(fields.integer("max_labels", None, at_least=1), fields.flag("exif_orientation", False))


def _class_names(path: pathlib.Path) -> list[str] | None:
    try:
        names = read_text_lines(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}.") from error
    if not all(name.strip() for name in names):
        raise UserError(f"{path} has an empty line; it should have the name of a class in each.")
    return names


def _find_keys(
    files: RecordFiles,
    ranges: Sequence[tuple[int, int, int]],
    image_key: str | None,
    label_key: str | None,
    name: str,
) -> ExampleKeys:
    """Finds out what the features are called from the first records. An image without labels may lack the feature."""
    kinds: dict[str, str | None] = {}  # of the features in all records so far

    def choose(wanted: Sequence[str], kind: str) -> str | None:
        return next((key for key in wanted if kinds.get(key) == kind), None)

    def unknown(what: str, given: str, kind: str) -> UserError:
        return unknown_name(f"{what} of {name}", given, [key for key, found in kinds.items() if found == kind] or kinds)

    file, first, last = ranges[0]
    image = label = damage = None
    for record in range(first, min(last, first + _FIRST_RECORDS)):
        try:
            features = parse_example(files.read(file, record))
        except Exception as error:  # one damaged record does not make the whole unreadable
            damage = damage or BadRecordError(
                f"cannot read {files.where(file, record)} as tf.train.Example: {_reason(error)}."
            )
            continue
        kinds.update({key: feature.WhichOneof("kind") or kinds.get(key) for key, feature in features.items()})
        image = choose([image_key] if image_key else IMAGE_KEYS, "bytes_list")
        label = choose([label_key] if label_key else LABEL_KEYS, "int64_list")
        if image and label:
            break
    if image is None and damage and not kinds:
        raise damage
    if image is None:
        raise unknown("feature with encoded images (data.image_key)", image_key or "image", "bytes_list")
    if label is None and label_key:
        raise unknown("feature with label ids (data.label_key)", label_key, "int64_list")
    if label is None:
        logger.warning(
            "%s: no labels found, so all images are without. Features are %s; if one of them has label ids, name it in "
            "data.label_key.",
            name,
            ", ".join(sorted(kinds)),
        )
    return ExampleKeys(image, label, choose(FILE_NAME_KEYS, "bytes_list"))


# ---- The index of a tfrecord file.


def _index_all(paths: Sequence[str]) -> list[np.ndarray]:
    """Where the records of each file begin, int64 `[records + 1]`, the last being the file's size."""
    told = time.monotonic()
    indices = []
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for number, index in enumerate(pool.map(tfrecord_index, paths), 1):
            indices.append(index)
            if time.monotonic() - told > _PROGRESS_SECONDS:
                told = time.monotonic()
                records = sum(map(len, indices))
                logger.info("Indexing tfrecord files: %d of %d, %d records so far.", number, len(paths), records)
    return indices


def tfrecord_index(path: str) -> np.ndarray:
    """Where the records of a tfrecord file begin; from its index if it has one, otherwise one is made and kept.

    Returns:
      int64 `[records + 1]`: the offset of each record's header in bytes; at last the file's size.

    Raises:
      UserError: the file is missing, truncated, damaged, or no tfrecord file.
    """
    stat = _stat(path)
    places = _index_places(path)
    for place in places:
        if (offsets := _load_index(place, stat)) is not None:
            return offsets
    try:
        offsets = _scan(path, stat.st_size)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}. Copy or prepare it again.") from error
    for place in places:
        try:
            _save_index(place, offsets, stat)
            return offsets
        except UserError:
            continue  # the next place, if this one cannot be written
    logger.warning("%s: the index could not be kept, so it is made anew at each start.", path)
    return offsets


def _index_places(path: str) -> list[pathlib.Path]:
    full = pathlib.Path(path).resolve()
    digest = hashlib.sha256(os.fsencode(full)).hexdigest()[:16]
    # Hidden, so that no pattern of shards finds it.
    return [full.with_name(f".{full.name}.index"), cache_folder("indices") / f"{full.name}-{digest}.index"]


def _identity(offsets: np.ndarray, stat: os.stat_result) -> list[int]:
    """What the index of an unchanged file begins with."""
    return [_INDEX_VERSION, stat.st_size, stat.st_mtime_ns, zlib.crc32(offsets.tobytes())]


def _load_index(place: pathlib.Path, stat: os.stat_result) -> np.ndarray | None:
    """The index, or None if there is none, it is damaged, or the file it is of has changed."""
    try:
        file = io.BytesIO(read_regular(place, _MOST_INDEX_BYTES + stat.st_size))
        if np.lib.format.read_magic(file) != (1, 0):
            return None
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except (OSError, ValueError, EOFError):
        return None
    # Compared before anything is allocated: the header may claim any shape.
    left = len(file.getbuffer()) - file.tell()
    if dtype != np.int64 or len(shape) != 1 or shape[0] < 5 or 8 * shape[0] != left:
        return None
    content = np.frombuffer(file.getbuffer(), np.int64, offset=file.tell())
    offsets = content[4:]
    return offsets if content[:4].tolist() == _identity(offsets, stat) else None


def _save_index(place: pathlib.Path, offsets: np.ndarray, stat: os.stat_result) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate([np.array(_identity(offsets, stat), np.int64), offsets]), allow_pickle=False)
    with replacing(place) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def _scan(path: str, size: int) -> np.ndarray:
    """Reads all headers of a file of `size` bytes."""
    offsets, offset = [], 0
    file = PositionedFile(path)
    while offset < size:
        offsets.append(offset)
        try:
            header = file.read(offset, _HEADER.size)
            length, checksum = _HEADER.unpack(header)
        except EOFError:
            raise _truncated(path, offsets) from None
        if _checksum(header[:8]) != checksum:
            raise _no_tfrecord(path, offsets, header)
        offset += length + _FRAME
    if offset != size:
        raise _truncated(path, offsets)
    return np.array([*offsets, size], np.int64)


def _truncated(path: str, offsets: Sequence[int]) -> UserError:
    return UserError(
        f"{path} is truncated: it ends within record {len(offsets) - 1}, which begins at byte {offsets[-1]}. Copy or "
        "prepare it again."
    )


def _no_tfrecord(path: str, offsets: Sequence[int], header: bytes) -> UserError:
    if len(offsets) > 1:
        return UserError(
            f"{path} is damaged at byte {offsets[-1]}, where record {len(offsets) - 1} should begin. Copy or prepare "
            "it again."
        )
    if header.startswith((b"\x1f\x8b", b"\x78")):
        return UserError(f"{path} is compressed, so it cannot be read at random. Write it without compression.")
    return UserError(f"{path} is not a tfrecord file, or its first bytes are damaged.")


def _checksum(content: bytes) -> int:
    """The masked CRC-32C of the tfrecord format."""
    import google_crc32c

    crc = google_crc32c.value(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _array_record_length(path: str) -> int:
    from array_record.python import array_record_module

    try:
        reader = array_record_module.ArrayRecordReader(path)
        length = reader.num_records()
        reader.close()
    except Exception as error:  # what the C++ library raises is not documented
        raise UserError(f"cannot read {path} as array_record: {_reason(error)}.") from error
    return length


def _stat(path: str) -> os.stat_result:
    try:
        return stat_regular(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}. Copy or prepare it again.") from error


def _allow_open_files(count: int) -> None:
    """Raises this process's limit of open files, if it must."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 256  # for everything else
    if soft >= needed or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"{count} array_record files are read at once, but this system allows only {hard} open files. Raise the "
            f"limit (ulimit -n {needed}), or write the data set into fewer files."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
