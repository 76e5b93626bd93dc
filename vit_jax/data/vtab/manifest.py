"""Digests of a task's thousand examples, with which two people can check that theirs are the same.

A manifest has a digest of each example's decoded pixels, and its label. It does not depend on the format or the number
of files in which TFDS prepared the data set. The pixels of a JPEG depend on the decoder, so a manifest names it.
"""

import collections
import concurrent.futures
import functools
import hashlib
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import cv2

from vit_jax.console import num_cpus
from vit_jax.data.sources.base import Source
from vit_jax.data.transforms import decode
from vit_jax.data.vtab.source import find_data, open_vtab
from vit_jax.data.vtab.tasks import Task
from vit_jax.errors import UserError
from vit_jax.json_files import read_object

_FORMAT = 1
_SHOWN = 5  # examples that differ


def make_manifest(tasks: Iterable[Task]) -> dict[str, Any]:
    """Reads and decodes the thousand examples of each task.

    Returns:
      the manifest as JSON: `decoder`, and for each task by its id `data`, the name and version of the data set;
      `digest`, of all examples; and `pixels` and `labels`, of each example in the order of train800val200.

    Raises:
      MissingDataError: a data set is not prepared.
      UserError: an example cannot be read.
    """
    entries = {}
    for task in tasks:
        source = open_vtab(task, "train800val200")
        with concurrent.futures.ThreadPoolExecutor(num_cpus()) as pool:
            examples = pool.map(functools.partial(_digest_example, source), range(len(source)))
            pixels, labels = map(list, zip(*examples, strict=True))
        folder = find_data(task.data)
        data = f"{task.data.name}:{folder.name if folder else ''}"
        entries[task.id] = {"data": data, "digest": _digest_of(pixels, labels), "pixels": pixels, "labels": labels}
    decoder = f"simplejpeg {version('simplejpeg')}, OpenCV {cv2.__version__}"
    return {"format": _FORMAT, "decoder": decoder, "tasks": entries}


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """Reads a manifest; raises UserError if the file is missing, is something else, or was edited."""
    try:
        manifest = read_object(path)
        is_current = manifest["format"] == _FORMAT
        changed = [
            task
            for task, entry in (manifest["tasks"].items() if is_current else ())
            if entry["digest"] != _digest_of(entry["pixels"], entry["labels"])
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {path} as a manifest of VTAB's examples: {error}.") from error
    if not is_current:
        raise UserError(f"{path} is of format {manifest['format']}; this version reads {_FORMAT}.")
    if changed:
        raise UserError(f"{path} was changed: the digest of {changed[0]} does not match its examples.")
    return manifest


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], task: str) -> Iterator[str]:
    """Describes how a task's entries in two manifests differ, with the first examples that do; nothing if equal."""
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
        f"{task}: {len(differing):,} of {len(mine):,} examples differ, {absent:,} do not exist there "
        f"({ours['data']} here, {theirs['data']} there)"
    )
    for i in differing[:_SHOWN]:
        (pixels, label), (other_pixels, other_label) = mine[i], its[i]
        reasons = [f"label {label} here, {other_label} there"] if label != other_label else []
        reasons += ["other pixels"] if pixels != other_pixels else []
        name = f"train800[{i}]" if i < 800 else f"val200[{i - 800}]"
        yield f"  {name}: {', '.join(reasons)}"


def _digest_example(source: Source, index: int) -> tuple[str, Any]:
    """A digest of the pixels, and the label."""
    example = source[index]
    image = example["image"]
    try:
        pixels = decode(image) if isinstance(image, bytes) else image
    except UserError as error:
        raise UserError(f"cannot read {source.where(index)}: {error}") from error
    return hashlib.sha256(f"{pixels.shape} ".encode() + pixels.tobytes()).hexdigest()[:16], example["label"]


def _digest_of(pixels: list[str], labels: list[int]) -> str:
    lines = (f"{digest} {label}\n" for digest, label in zip(pixels, labels, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
