"""Writes data sets in TFDS's layout: array_record shards, their description, and a manifest to verify them.

`<data_dir>/<name>/<version>/` holds `<name>-<split>.array_record-00000-of-00064` and so on, `dataset_info.json`,
`features.json`, the class names and `manifest.json`. `tfds.builder_from_directory` reads it without TensorFlow.
"""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import dataset_info, example_serializer, file_adapters, naming, splits
from tensorflow_datasets.core.utils import shard_utils

import vit_jax
from vit_jax.errors import UserError
from vit_jax.files import replace_whole, sync
from vit_jax.json_files import read_object

MANIFEST = "manifest.json"
UNFINISHED = ".incomplete"

# One record per group, for random access. Compression does not shrink encoded images, and its bytes may change with the
# version of the library.
_OPTIONS = "group_size:1,uncompressed"
_READ_AT_ONCE = 64  # records


def features_of(classes: Sequence[str] | int, *, multi_label: bool) -> tfds.features.FeaturesDict:
    """Makes the names and types of an example's fields.

    Args:
      classes: names in the order of the labels, or the number of classes if they have no names.
      multi_label: whether an example has a list of `labels` instead of one `label`.
    """
    label = tfds.features.ClassLabel(**{"num_classes" if isinstance(classes, int) else "names": classes})
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "file_name": tfds.features.Text(),
            **({"labels": tfds.features.Sequence(label)} if multi_label else {"label": label}),
        }
    )


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished file of records.

    Attributes:
      examples: number of records.
      record_bytes: their size, in bytes.
      bytes: size of the file.
      sha256: of the file.
    """

    examples: int
    record_bytes: int
    bytes: int
    sha256: str


def make_serializer(*, multi_label: bool) -> Callable[[bytes, str, Sequence[int]], bytes]:
    """Makes the function from encoded image, unique name and labels (one unless `multi_label`) to a record."""
    serializer = example_serializer.ExampleSerializer(features_of(1, multi_label=multi_label).get_serialized_info())

    def serialize(image: bytes, file_name: str, labels: Sequence[int]) -> bytes:
        label = {"labels": list(labels)} if multi_label else {"label": labels[0]}
        example = serializer.get_tf_example({"image": image, "file_name": file_name.encode(), **label})
        return example.SerializeToString(deterministic=True)  # fixes the order of the fields

    return serialize


def check_name(name: str, version: str) -> None:
    """Raises `UserError` unless TFDS accepts this name and version."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"invalid data set name {name!r}. Use lower case letters, digits and _, such as my_birds.")
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise UserError(f"invalid version {version!r}. Write three numbers, such as 1.0.0.")


def shard_lengths(num_examples: int, total_bytes: int, num_shards: int | None) -> list[int]:
    """Returns the number of examples in each shard of a split. `num_shards=None`: TFDS's choice."""
    wanted = num_shards or shard_utils.ShardConfig.calculate_number_shards(total_bytes, num_examples)
    bounds = [0, *shard_utils.get_shard_boundaries(num_examples, min(wanted, num_examples))]
    return [stop - start for start, stop in itertools.pairwise(bounds)]


def shard_name(dataset: str, split: str, number: int, of: int) -> str:
    """Returns the file name of a shard."""
    return f"{dataset}-{split}.array_record-{number:05d}-of-{of:05d}"


def write_shard(path: pathlib.Path, records: Iterable[bytes]) -> Shard:
    """Writes records to a file, which gets its name once it is complete and on disk.

    Raises:
      RuntimeError: from array_record, with the system's message, such as that the disk is full.
    """
    temporary = path.with_name(path.name + UNFINISHED)
    writer = array_record_module.ArrayRecordWriter(str(temporary), _OPTIONS)
    examples = record_bytes = 0
    try:
        for record in records:
            writer.write(record)
            examples, record_bytes = examples + 1, record_bytes + len(record)
    finally:
        writer.close()
    reader = array_record_module.ArrayRecordReader(str(temporary))
    found = reader.num_records()
    reader.close()
    if found != examples:
        raise RuntimeError(f"{temporary} holds {found} records where {examples} were written.")
    shard = Shard(examples, record_bytes, temporary.stat().st_size, file_sha256(temporary))
    replace_whole(temporary, path)
    return shard


def read_shard(path: pathlib.Path) -> Iterator[bytes]:
    """Yields the records of a file in order, reading a few at a time."""
    reader = array_record_module.ArrayRecordReader(str(path))
    try:
        for start in range(0, reader.num_records(), _READ_AT_ONCE):
            yield from reader.read(start, min(start + _READ_AT_ONCE, reader.num_records()))
    finally:
        reader.close()


def file_sha256(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(
    folder: pathlib.Path,
    shards: Mapping[str, Mapping[str, Shard]],
    features: Any,
    *,
    name: str,
    version: str,
    description: str = "",
    homepage: str = "",
    slices: Mapping[str, str] | None = None,
    **facts: Any,
) -> None:
    """Writes the files beside the shards: those that TFDS needs to read them, and the manifest.

    Args:
      folder: with the shards.
      shards: in order, by split and file name.
      features: TFDS's features of the records.
      name: of the data set, in lower case.
      version: such as "1.0.0".
      description: free text.
      homepage: address of the data's origin.
      slices: customary parts of each split by name, such as "[:25600]".
      **facts: further arguments of `write_manifest`.
    """
    for leftover in folder.glob(f"*{UNFINISHED}"):
        leftover.unlink()
    info = dataset_info.DatasetInfo(
        builder=dataset_info.DatasetIdentity(
            name=name, version=tfds.core.Version(version), data_dir=str(folder), module_name="vit_jax.data.prepare"
        ),
        description=description,
        features=features,
        homepage=homepage,
    )
    info.set_file_format(file_adapters.FileFormat.ARRAY_RECORD)
    infos = []
    split_facts: dict[str, dict[str, Any]] = {}
    known: dict[str, Shard] = {}
    for split, files in shards.items():
        template = naming.ShardedFileTemplate(
            data_dir=folder, dataset_name=name, split=split, filetype_suffix="array_record"
        )
        lengths = [shard.examples for shard in files.values()]
        size = sum(shard.record_bytes for shard in files.values())
        infos.append(splits.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template))
        split_facts[split] = {"examples": sum(lengths), "record_bytes": size, "shards": len(files)}
        if slices:
            split_facts[split]["slices"] = slices
        known.update(files)
    info.set_splits(splits.SplitDict(infos))
    info.write_to_directory(folder)
    write_manifest(folder, split_facts, name=name, version=version, known=known, **facts)


def write_manifest(
    folder: pathlib.Path,
    split_facts: Mapping[str, Mapping[str, Any]],
    *,
    name: str,
    version: str,
    num_classes: int,
    source: Mapping[str, Any],
    settings: Mapping[str, Any],
    counts: Mapping[str, int] | None = None,
    known: Mapping[str, Shard] | None = None,
    **more: Any,
) -> None:
    """Writes `manifest.json`: facts, and size and hash of every other file of the data set.

    The preparation's own files (the index, hashes of images) are left out.

    Args:
      folder: of the data set.
      split_facts: numbers of `examples`, `record_bytes` and `shards` by split.
      name: of the data set.
      version: of the data set.
      num_classes: number of classes.
      source: facts about the source.
      settings: that decided the result.
      counts: numbers of images that differ from that of the examples, or from 0: "images", "broken", "merged", ...
      known: shards by file name, whose hashes are known.
      **more: further facts, JSON-compatible; None is left out.
    """
    libraries = ("array_record", "tensorflow-datasets")
    made_with = {"vit_jax": vit_jax.__version__, **{name: importlib.metadata.version(name) for name in libraries}}
    examples = sum(split["examples"] for split in split_facts.values())
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != MANIFEST and not path.match("index.sqlite*") and path.suffix != ".npy":
            if shard := (known or {}).get(path.name):
                files[path.name] = {"examples": shard.examples, "bytes": shard.bytes, "sha256": shard.sha256}
            else:
                sync(path)
                files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    manifest = {
        **{"name": name, "version": version, "format": "array_record", "source": source, "settings": settings},
        "counts": {
            **{"images": examples, "broken": 0, "merged": 0},
            **(counts or {}),
            **{"examples": examples, "classes": num_classes},
        },
        "splits": split_facts,
        **{fact: value for fact, value in more.items() if value is not None},
        **{"made_with": made_with, "files": files},
    }
    temporary = folder / (MANIFEST + UNFINISHED)
    temporary.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    replace_whole(temporary, folder / MANIFEST)


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Reads the manifest of a finished data set.

    Raises:
      UserError: there is none.
    """
    try:
        return read_object(folder / MANIFEST)
    except UserError as error:
        raise UserError(
            f"{folder} has no readable {MANIFEST}: this command did not prepare it, or has not finished."
        ) from error


def check(folder: pathlib.Path) -> Iterator[str]:
    """Compares a data set with its manifest, reading every byte.

    Yields:
      a line for each file that is missing, unexpected or changed.
    """
    expected = read_manifest(folder)["files"]
    for name, facts in expected.items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != facts["bytes"]:
            yield f"{name} has {path.stat().st_size:,} bytes, not {facts['bytes']:,}"
        elif file_sha256(path) != facts["sha256"]:
            yield f"{name} has changed"
    for name in sorted(set(os.listdir(folder)) - set(expected) - {MANIFEST}):
        yield f"{name} is not in the manifest"
