"""The two passes of every preparation.

The first pass scans: it reads each image once, checks that it decodes, and records its location in the index. The
second reads the images again in their final order and writes the shards. Both resume after an interruption. The bytes
of the result do not depend on the machine, the number of threads or interruptions.
"""

import abc
import dataclasses
import errno
import functools
import hashlib
import pathlib
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vit_jax.console import Progress, format_bytes, num_cpus
from vit_jax.data.prepare import tfds_layout
from vit_jax.data.prepare.index import Arrangement, Index, Row, content_hash
from vit_jax.data.prepare.work import MAKE_ROOM, build, ordered_map, write_shards
from vit_jax.data.sources.base import BadRecordError
from vit_jax.data.transforms import ImageError, decode
from vit_jax.errors import UserError
from vit_jax.files import check_space

_COMMIT_EVERY = 1000  # images


@dataclasses.dataclass(frozen=True)
class Found:
    """An image found by a scan.

    Attributes:
      split: its split.
      file_name: its unique name.
      labels: names of its classes.
      file: number of the file that holds it; the origin numbers them.
      offset: in that file, in bytes or the origin's unit.
      done: the part of `Origin.extent` scanned so far.
      size: in bytes, if known.
      content: the encoded image; None if `Origin.read` must read it.
      mark: JSON-compatible position to resume the scan after this image; None if there is none.
      broken: why to skip the image, if known already.
    """

    split: str
    file_name: str
    labels: Sequence[str]
    file: int
    offset: int
    done: int
    size: int = 0
    content: bytes | None = None
    mark: Any = None
    broken: str | None = None


@dataclasses.dataclass(frozen=True)
class Passed:
    """A position between images to resume a scan from, with the attributes of `Found`."""

    done: int
    mark: Any


def check_split(name: str, where: str) -> None:
    """Raises `UserError` unless TFDS accepts the name of a split; the message says `where` it comes from."""
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
        raise UserError(f"{where}: invalid split name {name!r}. Use letters, digits and _, such as train.")


class Origin(abc.ABC):
    """A source of images to prepare.

    Attributes:
      description: free text.
      settings: everything that decides the result, JSON-compatible; see `work.build`.
      facts: the manifest's facts about the source, the same on every machine.
      extent: the total work of a scan, in any unit.
      class_names: in the order of the labels; None: those that occur, sorted.
      least_bytes: a lower bound on the bytes to write, known before the scan.
      homepage: address.
      arrangement: what becomes an example.
      multi_label: as in `tfds_layout.features_of`.
      exif_orientation: whether readers of the result apply the EXIF orientation by default. The stored images do not
        change.
      slices: start and stop of the customary parts of its only split, by name.
    """

    description: str
    settings: dict[str, Any]
    facts: dict[str, Any]
    extent: int
    class_names: Sequence[str] | None = None
    least_bytes: int = 0
    homepage: str = ""
    arrangement: Arrangement = "each"
    multi_label: bool = False
    exif_orientation: bool = True
    slices: Mapping[str, tuple[int | None, int | None]] = types.MappingProxyType({})

    @abc.abstractmethod
    def scan(self, mark: Any) -> Iterator[Found | Passed]:
        """Finds images in any order, from a mark on (None: from the start)."""

    @abc.abstractmethod
    def read(self, row: Row | Found) -> bytes:
        """Reads an image from its place. Thread-safe."""

    @abc.abstractmethod
    def place(self, row: Row | Found) -> str:
        """Describes the location of an image for messages."""

    def classes(self, names: Sequence[str]) -> tuple[dict[str, int], Sequence[str] | int]:
        """Returns the label of each class name that occurs, and the list of classes or their number."""
        classes = self.class_names or sorted(names)
        return {name: number for number, name in enumerate(classes)}, classes


def prepare(
    origin: Origin,
    data_dir: pathlib.Path,
    name: str,
    *,
    version: str = "1.0.0",
    num_shards: int | None = None,
    verify: bool = True,
    max_broken: int = 100,
    threads: int | None = None,
) -> tuple[dict[str, Any], pathlib.Path]:
    """Prepares a data set, or resumes doing so.

    Args:
      origin: source of the images.
      data_dir: folder of data sets.
      name: of the data set.
      version: of the data set.
      num_shards: files per split; None: TFDS's choice.
      verify: whether to decode each image and skip broken ones.
      max_broken: most broken images to skip before it is an error.
      threads: None: one per core.

    Returns:
      the manifest and the folder.

    Raises:
      UserError: the data set exists or was begun with other settings, has too many broken images, or does not fit on
        the disk.
    """
    tfds_layout.check_name(name, version)
    if num_shards is not None and num_shards < 1:
        raise UserError(f"--num_shards must be at least 1, got {num_shards}.")
    threads = threads or num_cpus()

    def write(folder: pathlib.Path, index: Index, public_settings: dict[str, Any]) -> None:
        if not index.fact("scanned"):
            check_space(folder, origin.least_bytes if index.fact("mark") is None else 0, MAKE_ROOM)
            _scan(origin, index, threads, verify=verify, max_broken=max_broken)
        if not index.fact("arranged"):
            _arrange(origin, index)
        shards = _write(origin, index, threads, folder, name, num_shards)
        _describe(origin, index, folder, shards, name=name, version=version, settings=public_settings)

    target = data_dir / name / version
    settings = {**origin.settings, "num_shards": num_shards, "verify": verify}
    return build(target, settings, origin.facts, write), target


# Errors of the file itself. Others, such as a network disk that does not answer, may be temporary.
_OF_THE_FILE = frozenset(
    {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}
)


def _scan(origin: Origin, index: Index, threads: int, *, verify: bool, max_broken: int) -> None:
    mark = index.fact("mark")
    if mark is not None:
        print(f"scan: resumes after {index.count('image'):,} images", file=sys.stderr)

    def check(found: Found | Passed) -> tuple[Found | Passed, bytes, int, str | None]:
        """Returns the image without its content, which would fill the memory behind a slow one; hash, size, damage."""
        if isinstance(found, Passed) or found.broken:
            return found, b"", 0, getattr(found, "broken", None)
        try:
            content = origin.read(found) if found.content is None else found.content
            if verify:
                decode(content)
        except (ImageError, BadRecordError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _OF_THE_FILE:
                raise UserError(
                    f"cannot read {origin.place(found)}: {error.strerror or error}. The image may be whole: check the "
                    "disk, then rerun the same command to resume."
                ) from error
            return dataclasses.replace(found, content=None), b"", 0, getattr(error, "strerror", None) or str(error)
        return dataclasses.replace(found, content=None), content_hash(content), len(content), None

    pending, broken = 0, index.count("broken")
    with Progress("scan", origin.extent, done=index.fact("done") or 0) as progress:
        for found, content, size, reason in ordered_map(check, origin.scan(mark), threads):
            if isinstance(found, Found):
                pending += 1
                progress.add(1, found.done)
                if reason is not None:
                    place = origin.place(found)
                    broken += 1
                    print(f"broken, skipped: {place}: {reason}", file=sys.stderr)
                    index.add_broken(found.split, found.file_name, pathlib.PurePath(place).name, reason)
                    if broken > max_broken:
                        raise UserError(
                            f"{broken} images are broken, more than --max_broken={max_broken}. Is the source "
                            "damaged? If not, rerun with a larger --max_broken to resume."
                        )
                else:
                    index.add(found.split, found.file_name, found.labels, content, (found.file, found.offset, size))
            if pending >= _COMMIT_EVERY and found.mark is not None:
                index.commit(mark=found.mark, done=found.done)
                pending = 0
        progress.finish()
    if not index.count("image"):  # not committed, so the next start scans again
        raise UserError(f"there are no images; {broken:,} are broken or in the wrong place.")
    index.commit(scanned=True)


def _arrange(origin: Origin, index: Index) -> None:
    numbers, classes = origin.classes(index.label_names())
    print(f"sorting {index.count('image'):,} images", file=sys.stderr)
    index.arrange(origin.arrangement, numbers)
    # The digest of names, labels and contents in order identifies the examples on any machine.
    used: set[int] = set()
    digest, most = hashlib.sha256(), 1
    for row in index.examples(1, sys.maxsize // 2):
        used.update(row.labels)
        most = max(most, len(row.labels))
        digest.update(f"{row.split}\0{row.file_name}\0{row.labels}\0{row.content.hex()}\n".encode())
    index.commit(
        arranged=True, classes=classes if isinstance(classes, int) else list(classes), digest=digest.hexdigest(),
        used_classes=sorted(used), max_labels=most,
    )  # fmt: skip


def _write(
    origin: Origin, index: Index, threads: int, folder: pathlib.Path, name: str, num_shards: int | None
) -> dict[str, dict[str, tfds_layout.Shard]]:
    """Writes the missing shards; returns all shards by split and name."""
    serialize = tfds_layout.make_serializer(multi_label=origin.multi_label)

    def record(row: Row) -> bytes:
        try:
            content = origin.read(row)
        except (BadRecordError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot read {origin.place(row)}: {reason}. Restore it and rerun the command.") from error
        if content_hash(content) != row.content:
            raise UserError(f"{origin.place(row)} has changed since it was scanned. Restore the old file.")
        return serialize(content, row.file_name, row.labels)

    def records(first: int, length: int) -> Iterator[bytes]:
        return ordered_map(record, index.examples(first, length), threads)

    plan, total, needed = [], 0, 0
    for split, (start, count, size) in index.splits().items():
        # Fields other than images, and the file format's own bytes, add a little.
        total, needed = total + count, needed + size * 101 // 100 + count * 200
        lengths, first = tfds_layout.shard_lengths(count, size, num_shards), start
        for number, length in enumerate(lengths):
            file_name = tfds_layout.shard_name(name, split, number, len(lengths))
            plan.append((split, file_name, functools.partial(records, first, length)))
            first += length
    return write_shards(folder, index, plan, total=total, needed=needed)


def _describe(
    origin: Origin, index: Index, folder: pathlib.Path, shards: dict[str, dict[str, tfds_layout.Shard]], **facts: Any
) -> None:
    classes = index.fact("classes")
    used = set(index.fact("used_classes"))
    names = [str(number) for number in range(classes)] if isinstance(classes, int) else classes
    images, examples = index.count("image"), index.count("example")
    slices = {
        name: f"[{start or ''}:{stop or ''}]"
        for name, (start, stop) in origin.slices.items()
        if (start or 0) < examples
    }
    tfds_layout.describe(
        folder,
        shards,
        tfds_layout.features_of(classes, multi_label=origin.multi_label),
        description=origin.description,
        homepage=origin.homepage,
        num_classes=len(names),
        source={**origin.facts, "examples_sha256": index.fact("digest")},
        counts={"images": images, "broken": index.count("broken"), "merged": images - examples},
        slices=slices,
        max_labels=index.fact("max_labels"),
        exif_orientation=origin.exif_orientation or None,
        broken=index.broken(),
        classes_without_images=[name for number, name in enumerate(names) if number not in used],
        **facts,
    )


def summary(manifest: dict[str, Any], folder: pathlib.Path) -> str:
    """Describes a finished data set and how to read it, in a few lines."""
    counts = manifest["counts"]
    size = sum(facts["bytes"] for facts in manifest["files"].values())
    lines = [
        f"{folder}: {counts['examples']:,} examples of {counts['classes']:,} classes, {format_bytes(size)}",
        f"  images found {counts['images']:,}, merged {counts['merged']:,}, broken and skipped {counts['broken']:,}",
    ]
    for split, facts in manifest["splits"].items():
        shards = "1 shard" if facts["shards"] == 1 else f"{facts['shards']:,} shards"
        lines.append(f"  split {split}: {facts['examples']:,} examples in {shards}")
        lines += [f"    {name}: {split}{part}" for name, part in facts.get("slices", {}).items()]
    split = next(iter(manifest["splits"]))
    lines += [
        f"  to train on it: --config.data.dataset={folder}",
        f"  to read it: tfds.builder_from_directory({str(folder)!r}).as_data_source({split!r})",
    ]
    return "\n".join(lines)
