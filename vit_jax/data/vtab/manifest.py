"""Digests of a task's thousand examples, so that two people can know whether they have the same.

An example's digest is that of its decoded pixels; its label stands beside it. How the data set was prepared does not
matter, as array_record or tfrecord, in how many files. A JPEG's pixels depend on who decodes it, so a manifest says who
did.
"""

import collections
import concurrent.futures
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import cv2

from vit_jax.console import num_cpus
from vit_jax.data.sources.base import NO_LABEL, Source
from vit_jax.data.transforms import decode
from vit_jax.data.vtab.source import find_data, open_vtab
from vit_jax.data.vtab.tasks import Task
from vit_jax.errors import UserError
from vit_jax.files import write_atomically
from vit_jax.json_files import JsonError, read_object

SPLIT = "train800val200"
_FORMAT = 1
_NAMED = 5  # examples that differ


def make_manifest(tasks: Iterable[Task]) -> dict[str, Any]:
    """Reads and decodes the thousand examples of each task.

    Returns:
      What a manifest's file has: `decoder`, and for each task by its id `data`, the name and version of the data set,
      `digest`, of all, and by example, in the order of the split, `pixels`, a digest, and `labels`.

    Raises:
      MissingDataError: a data set is not prepared here.
      UserError: an example cannot be read.
    """
    return {"format": _FORMAT, "decoder": decoder(), "tasks": {task.id: _entry(task) for task in tasks}}


def decoder() -> str:
    """What decodes images here: a JPEG's pixels may change with it."""
    return f"simplejpeg {version('simplejpeg')}, OpenCV {cv2.__version__}"


def write_manifest(manifest: Mapping[str, Any], path: pathlib.Path) -> None:
    """Writes a manifest as JSON."""
    write_atomically(path, json.dumps(manifest, indent=1) + "\n")


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """Reads a manifest.

    Raises:
      UserError: the file is missing, or is something else, or its digests are not those of its examples.
    """
    try:
        manifest = read_object(path)
        known = manifest["format"] == _FORMAT
        for task, entry in manifest["tasks"].items() if known else []:
            if entry["digest"] != _digest_of(entry["pixels"], entry["labels"]):
                raise UserError(f"{path} was changed: the digest of {task} is not that of its examples.")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError) and not isinstance(error, JsonError):
            raise
        raise UserError(f"cannot read {path} as a manifest of VTAB's examples: {error}.") from error
    if not known:
        raise UserError(f"{path} is of format {manifest['format']}; this version reads {_FORMAT}.")
    return manifest


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], task: str) -> Iterator[str]:
    """Tells how a task's entry in one manifest differs from that in another; the first examples that do by name."""
    if ours["digest"] == theirs["digest"]:
        return
    mine, its = (list(zip(entry["pixels"], entry["labels"], strict=True)) for entry in (ours, theirs))
    if sorted(mine) == sorted(its):
        yield f"{task}: the same examples in another order"
        return
    if len(mine) != len(its):
        yield f"{task}: {len(mine):,} examples here, {len(its):,} there"
        return
    differing = [i for i in range(len(mine)) if mine[i] != its[i]]
    absent = sum((collections.Counter(mine) - collections.Counter(its)).values())
    yield (
        f"{task}: {len(differing):,} of {len(mine):,} examples differ, {absent:,} are not there at all "
        f"({ours['data']} here, {theirs['data']} there)"
    )
    for i in differing[:_NAMED]:
        (pixels, label), (other_pixels, other_label) = mine[i], its[i]
        what = [f"label {label} here, {other_label} there"] if label != other_label else []
        what += ["other pixels"] if pixels != other_pixels else []
        yield f"  {_name(i)}: {', '.join(what)}"


def _name(index: int) -> str:
    return f"train800[{index}]" if index < 800 else f"val200[{index - 800}]"


def _entry(task: Task) -> dict[str, Any]:
    source = open_vtab(task, SPLIT)
    with concurrent.futures.ThreadPoolExecutor(num_cpus()) as pool:
        examples = list(pool.map(lambda index: _digest_example(source, index), range(len(source))))
    pixels, labels = [pixels for pixels, _ in examples], [label for _, label in examples]
    version_folder = find_data(task.data)
    data = f"{task.data.name}:{version_folder.name if version_folder else ''}"
    return {"data": data, "digest": _digest_of(pixels, labels), "pixels": pixels, "labels": labels}


def _digest_example(source: Source, index: int) -> tuple[str, int]:
    """A digest of the pixels, and the label."""
    example = source[index]
    image, label = example["image"], example["label"]
    try:
        pixels = decode(image) if isinstance(image, bytes) else image
    except UserError as error:
        raise UserError(f"cannot read {source.where(index)}: {error}") from error
    digest = hashlib.sha256(f"{pixels.shape} ".encode())
    digest.update(pixels.tobytes())
    return digest.hexdigest()[:16], label if isinstance(label, int) else NO_LABEL


def _digest_of(pixels: list[str], labels: list[int]) -> str:
    lines = (f"{digest} {label}\n" for digest, label in zip(pixels, labels, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
