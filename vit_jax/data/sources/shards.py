"""Opens sharded files of examples without a description, such as a web-scale data set."""

import glob
import logging
import os
import pathlib
import re
from collections.abc import Sequence

from vit_jax.data.sources.base import BadRecordError, reason_of
from vit_jax.data.sources.records import (
    FILE_NAME_KEYS,
    FORMATS,
    IMAGE_KEYS,
    LABEL_KEYS,
    ExampleKeys,
    Range,
    RecordFiles,
    RecordSource,
    parse_example,
    read_manifest_facts,
)
from vit_jax.data.sources.splits import ALL, resolve, shard_ranges
from vit_jax.data.sources.tfrecord import HEADER, masked_checksum
from vit_jax.errors import UserError, unknown_name
from vit_jax.files import read_regular, read_text_lines

logger = logging.getLogger(__name__)

_ARRAY_RECORD_START = bytes.fromhex("83af70d10d884a3f000000000000000040000000")  # of Riegeli, which it builds on
_FIRST_RECORDS = 64  # to search for the names of features


def find_shards(pattern: str) -> list[str]:
    """Finds the files that match patterns.

    Args:
      pattern: one pattern, or several separated by commas: "/data/web/*.array_record*", "web/a-?????-of-00100,web/b-*".
        Relative ones that match nothing in the current folder are searched for in `$VIT_JAX_DATA`.

    Returns:
      distinct paths, sorted; hidden files only for a pattern that begins with a dot. Empty if nothing matches.

    Raises:
      UserError: by their names, some of the files are missing, or one of several patterns matches nothing.
    """
    found: set[str] = set()
    unmatched = []
    for item in split_patterns(pattern):
        files = [path for path in _match(item) if os.path.isfile(path)]
        found.update(files)
        if not files:
            unmatched.append(item)
        if not re.search(r"[\]\d]-of", item):  # otherwise the pattern chooses among the shards
            _check_complete(files)
    if found and unmatched:
        raise UserError(f"no file matches {unmatched[0]!r} of {pattern!r}. Correct it or leave it out.")
    return sorted(found)


def split_patterns(pattern: str) -> list[str]:
    """Splits patterns at commas, unless the whole text matches a file: a comma may be part of a folder's name."""
    patterns = [pattern] if _match(pattern.strip()) else pattern.split(",")
    return list(filter(None, map(str.strip, patterns)))


def candidates(path: str) -> list[pathlib.Path]:
    """Lists where a path or pattern may be: in the current folder, then in `$VIT_JAX_DATA`."""
    expanded, folder = pathlib.Path(os.path.expanduser(path)), os.environ.get("VIT_JAX_DATA")
    if expanded.is_absolute() or not folder:
        return [expanded]
    return [expanded, pathlib.Path(folder).expanduser() / expanded]


def _match(pattern: str) -> list[str]:
    found = (glob.glob(os.fspath(path)) for path in candidates(pattern) if pattern)
    return next(filter(None, found), [])


def _check_complete(paths: Sequence[str]) -> None:
    existing: dict[tuple[str, str, str], set[int]] = {}
    for path in paths:
        if match := re.fullmatch(r"(.*-)(\d{5,})-of-(\d{5,})(.*)", path):
            existing.setdefault((match[1], match[3], match[4]), set()).add(int(match[2]))
    for (before, total, behind), numbers in existing.items():
        if missing := sorted(set(range(int(total))) - numbers):
            first = f"{before}{missing[0]:0{len(total)}d}-of-{total}{behind}"
            raise UserError(
                f"{len(missing)} of {int(total)} files are missing; the first is {first}. Copy them, or choose the "
                "files to read: with a pattern such as 'name-0000[0-4]-of-00100', or several separated by commas."
            )


def record_format(path: str | os.PathLike[str]) -> str | None:
    """Finds the format of a file by its name, or else its first bytes; None for files without records."""
    name = pathlib.PurePath(path).name
    for each in FORMATS:
        if each in name:
            return each
    try:
        start = read_regular(path, 0, start=len(_ARRAY_RECORD_START))
    except OSError:
        return None
    if start == _ARRAY_RECORD_START:
        return "array_record"
    header = start[: HEADER.size]
    is_tfrecord = len(header) == HEADER.size and masked_checksum(header[:8]) == HEADER.unpack(header)[1]
    return "tfrecord" if is_tfrecord else None


def open_shards(
    paths: Sequence[str],
    split: str,
    *,
    name: str,
    image_key: str | None = None,
    label_key: str | None = None,
    num_classes: int | None = None,
    max_labels: int | None = None,
) -> RecordSource:
    """Opens files of examples. Their only split is "all".

    Two files beside them are read if they exist: `classes.txt`, with one class name per line in the order of the
    labels, and `manifest.json`, whose "max_labels" is used unless one is given.

    Args:
      paths: of files of one format, tfrecord (not compressed) or array_record.
      split: "all" or slices of it.
      name: see `Source`.
      image_key: feature with the image; None: one of the usual names.
      label_key: feature with label ids; None: one of the usual names.
      num_classes: number of classes if there is no `classes.txt`. Labels must be less.
      max_labels: the largest number of labels of an image; None: that of `manifest.json`, otherwise 1.

    Raises:
      UserError: files are missing, damaged or of an unknown format, or a feature does not exist.
    """
    formats = {record_format(path): path for path in paths}
    if None in formats:
        raise UserError(
            f"{formats[None]} is neither a tfrecord nor an array_record file, or it is compressed or damaged."
        )
    if len(formats) > 1:
        raise UserError(f"{name} has tfrecord and array_record mixed. Name files of one format.")
    files = FORMATS[next(filter(None, formats))](paths)
    lengths = list(files.lengths.values())
    parts = resolve(split, [ALL], lambda _: lengths, data_set=name)
    ranges = [
        (paths[shard], first, last)
        for part in parts
        for shard, first, last in shard_ranges(lengths, part.start, part.stop)
    ]
    folder = pathlib.Path(paths[0]).parent
    facts = read_manifest_facts(folder)
    class_names = _class_names(folder / "classes.txt")
    return RecordSource(
        files,
        ranges,
        _find_keys(files, ranges[0], image_key, label_key, name),
        name=name,
        split=split,
        splits=[ALL],
        class_names=class_names,
        num_classes=len(class_names) if class_names else num_classes,
        max_labels=max_labels or facts.max_labels or 1,
        exif_orientation=facts.exif_orientation,
    )


def _class_names(path: pathlib.Path) -> list[str] | None:
    try:
        names = read_text_lines(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}.") from error
    if not all(map(str.strip, names)):
        raise UserError(f"{path} has an empty line; each line should be the name of a class.")
    return names


def _find_keys(
    files: RecordFiles, first_range: Range, image_key: str | None, label_key: str | None, name: str
) -> ExampleKeys:
    """Finds the names of the features in the first records. Unlabelled images may lack the label's feature."""
    kinds: dict[str, str] = {}  # of features by name

    def choose(wanted: Sequence[str], kind: str) -> str | None:
        return next((key for key in wanted if kinds.get(key) == kind), None)

    def unknown(what: str, given: str, kind: str) -> UserError:
        return unknown_name(f"{what} of {name}", given, [key for key in kinds if kinds[key] == kind] or kinds)

    path, first, last = first_range
    image = label = damage = None
    for record in range(first, min(last, first + _FIRST_RECORDS)):
        try:
            features = parse_example(files.read(path, record))
        except Exception as error:  # one damaged record must not make the rest unreadable
            damage = damage or BadRecordError(
                f"cannot read {files.where(path, record)} as tf.train.Example: {reason_of(error)}."
            )
            continue
        kinds.update({key: feature.WhichOneof("kind") or kinds.get(key, "") for key, feature in features.items()})
        image = choose([image_key] if image_key else IMAGE_KEYS, "bytes_list")
        label = choose([label_key] if label_key else LABEL_KEYS, "int64_list")
        if image and label:
            break
    if damage and not kinds:
        raise damage
    if image is None:
        raise unknown("feature with encoded images (data.image_key)", image_key or "image", "bytes_list")
    if label is None and label_key:
        raise unknown("feature with label ids (data.label_key)", label_key, "int64_list")
    if label is None:
        logger.warning(
            "%s: found no labels, so all images are unlabelled. Features: %s. If one of them has label ids, set "
            "data.label_key to it.",
            name,
            ", ".join(sorted(kinds)),
        )
    return ExampleKeys(image, label, choose(FILE_NAME_KEYS, "bytes_list"))
