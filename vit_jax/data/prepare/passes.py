"""The two passes that all preparations share.

The first scans: it reads each image once, checks that it decodes, and notes in the index where it lies. The second
writes the examples in their final order, each read again from its place, shard by shard. Both go on where they were
interrupted, and the result is the same to the byte, whatever the machine, the number of threads or of interruptions.
"""

import dataclasses
import errno
import hashlib
import json
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, Protocol

from vit_jax.console import Progress, format_bytes, num_cpus
from vit_jax.data.prepare import tfds_layout
from vit_jax.data.prepare.index import Arrangement, Index, Row, content_hash
from vit_jax.data.prepare.work import ordered_map, working_in
from vit_jax.data.sources.base import BadRecordError
from vit_jax.data.transforms import ImageError, decode
from vit_jax.errors import UserError
from vit_jax.files import check_space, replace_whole

_COMMIT_EVERY = 1000  # images
_MAKE_ROOM = "Make room, or name another disk with --out."
_ROW_BYTES = 400  # of an image in the index and in sorting it; an estimate


@dataclasses.dataclass(frozen=True)
class Found:
    """An image that an origin has.

    Attributes:
      split: that it belongs to.
      file_name: that tells it from others.
      labels: names of its classes.
      place: file, offset and size, as `Origin.read` wants them.
      done: the part of `Origin.extent` that is scanned with it.
      content: the image; None if `Origin.load` must get it.
      mark: JSON-compatible, from where a scan goes on after this image; None if it cannot.
      broken: why it is left out, where that is known already.
    """

    split: str
    file_name: str
    labels: Sequence[str]
    place: tuple[int, int, int]
    done: int
    content: bytes | None = None
    mark: Any = None
    broken: str | None = None


@dataclasses.dataclass(frozen=True)
class Passed:
    """A place between images from where a scan can go on; the attributes are those of `Found`."""

    done: int
    mark: Any


def check_split(name: str, where: str) -> None:
    """Raises `UserError`, which says where the name comes from, unless TFDS can be asked for a split of this name."""
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
        raise UserError(f"{where}: {name!r} is no name for a split. Use letters, digits and _, such as train.")


class Origin(Protocol):
    """Where images come from.

    Attributes:
      description: for people.
      homepage: address.
      arrangement: what becomes an example.
      multi_label: see `records.Description`.
      exif_orientation: whether those who read the result turn images as their EXIF says, if not told otherwise. The
        images stay as they are.
      slices: by split, names of its customary parts with the number of examples where each ends.
    """

    description: str
    homepage: str
    arrangement: Arrangement
    multi_label: bool
    exif_orientation: bool
    slices: dict[str, dict[str, tuple[int | None, int | None]]]

    def settings(self) -> dict[str, Any]:
        """What decides the result, JSON-compatible; a run goes on only with the same."""
        ...

    def facts(self) -> dict[str, Any]:
        """What the manifest tells of the source: the same on every machine."""
        ...

    def extent(self) -> int:
        """All the work of a scan, in any unit."""
        ...

    def least_bytes(self) -> int:
        """Bytes that will surely be written, as far as is known before the scan."""
        ...

    def scan(self, mark: Any) -> Iterator[Found | Passed]:
        """Finds images, in any order, from a mark on (None: from the start)."""
        ...

    def load(self, found: Found) -> Found:
        """Reads an image that `scan` found but did not read. Called from several threads at once."""
        ...

    def read(self, row: Row) -> bytes:
        """Reads an image again from its place. Called from several threads at once."""
        ...

    def place(self, row: Row) -> str:
        """Where an image lies, for people."""
        ...

    def classes(self, names: Sequence[str]) -> tuple[dict[str, int], Sequence[str] | int]:
        """The label of each name that images have, and the list of classes (or their number)."""
        ...


@dataclasses.dataclass(frozen=True)
class Options:
    """What all preparations can be told.

    Attributes:
      data_dir: folder of data sets.
      name: of the data set.
      version: of the data set.
      num_shards: files of each split; None: as TFDS would cut it.
      verify: whether each image is decoded, and left out if it is broken.
      max_broken: more broken images than that are an error.
      threads: None: one for each core.
    """

    data_dir: pathlib.Path
    name: str
    version: str = "1.0.0"
    num_shards: int | None = None
    verify: bool = True
    max_broken: int = 100
    threads: int | None = None

    def __post_init__(self):
        tfds_layout.check_name(self.name, self.version)
        if self.num_shards is not None and self.num_shards < 1:
            raise UserError(f"--num_shards must be at least 1, got {self.num_shards}.")

    @property
    def folder(self) -> pathlib.Path:
        """Where the finished data set will be."""
        return self.data_dir / self.name / self.version


def prepare(origin: Origin, options: Options) -> dict[str, Any]:
    """Prepares a data set, or goes on doing so.

    Args:
      origin: where the images come from.
      options: where they go.

    Returns:
      the manifest.

    Raises:
      UserError: the data set exists, was begun with other settings, has too many broken images, or does not fit.
    """
    settings = json.loads(json.dumps({**origin.settings(), "num_shards": options.num_shards, "verify": options.verify}))
    if options.folder.exists():
        done = tfds_layout.read_manifest(options.folder)
        print(f"{options.folder} is there already, with {done['counts']['examples']:,} examples.", file=sys.stderr)
        _refuse_other(done, origin, options.folder, settings)
        return done
    folder = options.folder.with_name(options.folder.name + tfds_layout.UNFINISHED)
    with working_in(folder):
        if not (folder / tfds_layout.MANIFEST).exists():  # else a kill came just before the end
            _prepare(origin, options, folder, settings)
        manifest = tfds_layout.read_manifest(folder)
        _refuse_other(manifest, origin, folder, settings)
        for leftover in folder.glob("index.sqlite*"):
            leftover.unlink()
        replace_whole(folder, options.folder)
    return manifest


def _refuse_other(manifest: dict[str, Any], origin: Origin, folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """Raises `UserError` if a data set is not what preparing would make, as far as its manifest tells."""
    made = {"settings": manifest["settings"], "source": {**manifest["source"]}}
    made["source"].pop("examples_sha256", None)
    wanted = {"settings": _public(settings), "source": json.loads(json.dumps(origin.facts()))}
    if made != wanted:
        name = "settings" if made["settings"] != wanted["settings"] else "source"
        raise UserError(
            f"{folder} was made with other {name if name == 'settings' else 'files'} "
            f"({_difference(made[name], wanted[name])}). Remove it, or choose another --name or --version."
        )


def _prepare(origin: Origin, options: Options, folder: pathlib.Path, settings: dict[str, Any]) -> None:
    index = Index(folder)
    try:
        # With no mark nothing was kept yet: a mistake can be mended and the same name be used again.
        begun = index.fact("mark") is not None or index.fact("scanned")
        if begun and index.fact("settings") != settings:
            raise UserError(
                f"{folder} was begun with other settings ({_difference(index.fact('settings'), settings)}). Run with "
                "the same to go on, or remove the folder to begin anew."
            )
        index.commit(settings=settings)
        if not index.fact("scanned"):
            check_space(folder, origin.least_bytes() if index.fact("mark") is None else 0, _MAKE_ROOM)
            _scan(origin, options, index)
        if not index.fact("arranged"):
            _arrange(origin, index)
        shards = _write(origin, options, index, folder)
        _finish(origin, options, index, folder, shards, settings)
    finally:
        index.close()


def _public(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without what differs from machine to machine."""
    return {name: value for name, value in settings.items() if name != "files"}


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return "; ".join(
        "the source files are not the same, or have changed"
        if name in ("files", "archives")  # of which there may be thousands
        else f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in names
    )


# What is wrong with a file itself. Anything else, such as a network disk that does not answer, may pass.
_OF_THE_FILE = frozenset(
    {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}
)


def _scan(origin: Origin, options: Options, index: Index) -> None:
    mark = index.fact("mark")
    if mark is not None:
        print(f"scan: goes on after {index.count('image'):,} images", file=sys.stderr)

    def check(found: Found | Passed) -> tuple[Found | Passed, bytes, int, str | None]:
        if isinstance(found, Passed):
            return found, b"", 0, None
        if found.broken:
            return found, b"", 0, found.broken
        try:
            found = origin.load(found) if found.content is None else found
            if options.verify:
                decode(found.content or b"")
        except (ImageError, BadRecordError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _OF_THE_FILE:
                place = origin.place(_row(found))
                raise UserError(
                    f"cannot read {place}: {error.strerror or error}. The image may be whole: see to the disk and run "
                    "the same command again; it goes on from here."
                ) from error
            return dataclasses.replace(found, content=None), b"", 0, getattr(error, "strerror", None) or str(error)
        content = found.content or b""
        # The content is let go of here, or all images ahead of the slowest would be kept.
        return dataclasses.replace(found, content=None), content_hash(content), len(content), None

    pending, broken = 0, index.count("broken")
    with Progress("scan", origin.extent(), done=index.fact("done") or 0) as progress:
        for found, content, size, reason in ordered_map(check, origin.scan(mark), options.threads or num_cpus()):
            if isinstance(found, Found):
                pending += 1
                progress.add(1, found.done)
                if reason is not None:
                    place = origin.place(_row(found))
                    broken += 1
                    print(f"broken, left out: {place}: {reason}", file=sys.stderr)
                    index.add_broken(found.split, found.file_name, pathlib.PurePath(place).name, reason)
                    if broken > options.max_broken:
                        _too_many(broken, options)
                else:
                    file, offset, _ = found.place
                    index.add(found.split, found.file_name, found.labels, content, (file, offset, size))
            if pending >= _COMMIT_EVERY and found.mark is not None:
                index.commit(mark=found.mark, done=found.done)
                pending = 0
        progress.finish()
    if not index.count("image"):  # not committed: the next start looks again
        raise UserError(f"there are no images: {broken:,} are broken or not where they should be.")
    index.commit(scanned=True)


def _too_many(broken: int, options: Options) -> NoReturn:
    raise UserError(
        f"{broken} images are broken, more than --max_broken={options.max_broken}: is the source damaged? If it is as "
        "it should be, run again with a greater --max_broken; it goes on from here."
    )


def _row(found: Found) -> Row:
    return Row(found.split, found.file_name, (), b"", *found.place)


def _arrange(origin: Origin, index: Index) -> None:
    numbers, classes = origin.classes(index.label_names())
    print(f"sorting {index.count('image'):,} images", file=sys.stderr)
    index.arrange(origin.arrangement, numbers)
    # Names of what the data set is made of, and who has it all in the same order has the same digest.
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
    origin: Origin, options: Options, index: Index, folder: pathlib.Path
) -> dict[str, dict[str, tfds_layout.Shard]]:
    """Writes what is not written yet; returns the shards by split and name."""
    serialize = tfds_layout.Serializer(multi_label=origin.multi_label)
    finished = {name: tfds_layout.Shard(**facts) for name, facts in index.shards().items()}
    finished = {
        name: shard
        for name, shard in finished.items()
        if (folder / name).is_file() and (folder / name).stat().st_size == shard.bytes
    }
    splits = index.splits()
    total = sum(count for _, count, _ in splits.values())
    done = sum(shard.examples for shard in finished.values())
    left = sum(size for _, _, size in splits.values()) - sum(shard.record_bytes for shard in finished.values())
    # Some more for the fields around the images and for what the file format adds.
    check_space(folder, max(left, 0) * 101 // 100 + (total - done) * 200, _MAKE_ROOM)
    if finished:
        print(f"write: goes on after {done:,} of {total:,} examples", file=sys.stderr)

    def record(row: Row) -> bytes:
        content = origin.read(row)
        if content_hash(content) != row.content:
            raise UserError(f"{origin.place(row)} has changed since it was scanned. Bring back what it was.")
        return serialize(content, row.file_name, row.labels)

    shards: dict[str, dict[str, tfds_layout.Shard]] = {}
    with Progress("write", total, done=done) as progress:
        for split, (start, count, size) in splits.items():
            shards[split], first = {}, start
            lengths = tfds_layout.shard_lengths(count, size, options.num_shards)
            for number, length in enumerate(lengths):
                name = tfds_layout.shard_name(options.name, split, number, len(lengths))
                if name not in finished:
                    made = ordered_map(record, index.examples(first, length), options.threads or num_cpus())
                    finished[name] = tfds_layout.write_shard(folder / name, _counted(made, progress, done))
                    index.finish_shard(name, dataclasses.asdict(finished[name]))
                    done += length
                shards[split][name] = finished[name]
                first += length
        progress.finish()
    return shards


def _counted(made: Iterator[bytes], progress: Progress, done: int) -> Iterator[bytes]:
    for number, record in enumerate(made, start=1):
        yield record
        progress.add(1, done + number)


def _finish(
    origin: Origin,
    options: Options,
    index: Index,
    folder: pathlib.Path,
    shards: dict[str, dict[str, tfds_layout.Shard]],
    settings: dict[str, Any],
) -> None:
    for leftover in folder.glob(f"*{tfds_layout.UNFINISHED}"):
        leftover.unlink()
    classes = index.fact("classes")
    description = tfds_layout.Description(
        options.name, options.version, origin.description, origin.homepage, classes, origin.multi_label
    )
    tfds_layout.write_description(folder, description, {name: list(files.values()) for name, files in shards.items()})
    used = set(index.fact("used_classes"))
    names = [str(number) for number in range(classes)] if isinstance(classes, int) else classes
    examples = sum(shard.examples for files in shards.values() for shard in files.values())
    facts = {
        "name": options.name,
        "version": options.version,
        "format": "array_record",
        "max_labels": index.fact("max_labels"),
        **({"exif_orientation": True} if origin.exif_orientation else {}),
        "source": {**origin.facts(), "examples_sha256": index.fact("digest")},
        "settings": _public(settings),
        "counts": {
            "images": index.count("image"),
            "broken": index.count("broken"),
            "merged": index.count("image") - examples,
            "examples": examples,
            "classes": len(names),
        },
        "splits": {split: _split_facts(files, origin.slices.get(split, {})) for split, files in shards.items()},
        "broken": index.broken(),
        "classes_without_images": [name for number, name in enumerate(names) if number not in used],
    }
    known = {name: shard for files in shards.values() for name, shard in files.items()}
    tfds_layout.write_manifest(folder, facts, known)


def _split_facts(
    files: dict[str, tfds_layout.Shard], slices: dict[str, tuple[int | None, int | None]]
) -> dict[str, Any]:
    examples = sum(shard.examples for shard in files.values())
    facts: dict[str, Any] = {
        "examples": examples,
        "record_bytes": sum(shard.record_bytes for shard in files.values()),
        "shards": len(files),
    }
    if slices:
        facts["slices"] = {
            name: f"[{'' if start is None else start}:{'' if stop is None else stop}]"
            for name, (start, stop) in slices.items()
            if (start or 0) < examples
        }
    return facts


def summary(manifest: dict[str, Any], folder: pathlib.Path) -> str:
    """A few lines that say what was made and how to read it."""
    counts = manifest["counts"]
    size = sum(facts["bytes"] for facts in manifest["files"].values())
    lines = [
        f"{folder}: {counts['examples']:,} examples of {counts['classes']:,} classes, {format_bytes(size)}",
        f"  images found {counts['images']:,}, merged {counts['merged']:,}, broken and left out {counts['broken']:,}",
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
