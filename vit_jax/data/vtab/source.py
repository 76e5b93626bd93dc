"""A task's examples as a source, from a data set that TFDS has prepared."""

import dataclasses
import pathlib

from vit_jax.data.sources.base import MissingDataError, Source
from vit_jax.data.sources.splits import Part, resolve
from vit_jax.data.sources.tfds import find_tfds, not_prepared, open_tfds, split_sizes
from vit_jax.data.vtab.tasks import DataSet, Task, get_task
from vit_jax.errors import UserError


def open_vtab(task: str | Task, split: str) -> Source:
    """Opens a split of a task, or slices and sums of its splits, as TFDS has them: "val200", "test[:1000]".

    Args:
      task: one of `TASKS`, or its id.
      split: "train800", "val200" and "train800val200" are VTAB-1k; "train", "validation" and "test" have all examples.

    Raises:
      MissingDataError: the data set is not prepared here; says how to.
      UserError: there is no such task or split, or the data set is another than VTAB's.
    """
    task = get_task(task) if isinstance(task, str) else task
    folder = find_data(task.data)
    if folder is None:
        raise _missing(task.data)
    sizes = _checked_sizes(task.data, folder)
    name = f"vtab:{task.id}"
    wanted = _resolve(task.data, split, sizes, name)
    source = open_tfds(
        folder,
        "+".join(f"{part.split}[{part.start}:{part.stop}]" for part in wanted),
        image_key="image",
        num_classes=task.num_classes,
        all_labelled=True,
        **{"label_key": task.label} if isinstance(task.label, str) else {"derive_label": task.label},
        derive_image=task.pixels,
    )
    if source.num_classes != task.num_classes:
        raise UserError(f"{name} has {task.num_classes} classes, but {folder} has {source.num_classes}.")
    source.name, source.split, source.splits = name, split, list(task.data.splits)
    return source


def find_data(data: DataSet) -> pathlib.Path | None:
    """The folder of a prepared data set, of the version that VTAB used if it is there; None where there is none."""
    return next(filter(None, (find_tfds(f"{data.name}:{version}") for version in data.versions)), None)


def how_to_prepare(data: DataSet) -> str:
    """What to type to prepare a data set, for people."""
    command = f"    python -m vit_jax.data.prepare tfds {data.name}{' --manual_dir=<folder>' if data.manual else ''}"
    return f"Prepare it, or set TFDS_DATA_DIR to where it is:\n{command}\n{data.by_hand}".rstrip()


def _missing(data: DataSet) -> MissingDataError:
    if other := find_tfds(data.name):
        return MissingDataError(
            f"VTAB has version {' or '.join(data.versions)} of tfds:{data.name}; {other} is another. "
            f"{how_to_prepare(data)}"
        )
    return not_prepared(data.name, how_to_prepare(data), suggest=False)


def _checked_sizes(data: DataSet, folder: pathlib.Path) -> dict[str, int]:
    sizes = split_sizes(folder)
    for split, expected in data.sizes.items():
        if sizes.get(split) not in expected:
            raise UserError(
                f"{folder} has {sizes.get(split, 0):,} examples in {split!r}, but VTAB's has "
                f"{' or '.join(f'{size:,}' for size in expected)}. Its slices would be other examples, and results not "
                "comparable. Remove it and prepare it again."
            )
    return sizes


def _resolve(data: DataSet, split: str, sizes: dict[str, int], name: str) -> list[Part]:
    """Slices of VTAB's splits as slices of the data set's."""
    parts = {
        key: resolve(spec, list(sizes), lambda key: [sizes[key]], data_set=name) for key, spec in data.splits.items()
    }
    if split == "all":
        raise UserError(f"{name} has no split 'all': its splits overlap. Take one of {', '.join(parts)}.")
    lengths = {key: sum(part.stop - part.start for part in value) for key, value in parts.items()}
    wanted = resolve(split, list(parts), lambda key: [lengths[key]], data_set=name)
    return [piece for part in wanted for piece in _cut(parts[part.split], part.start, part.stop)]


def _cut(parts: list[Part], start: int, stop: int) -> list[Part]:
    """Examples `start` to `stop` of parts that lie one after the other."""
    pieces, first = [], 0
    for part in parts:
        length = part.stop - part.start
        low, high = max(start - first, 0), min(stop - first, length)
        if low < high:
            pieces.append(dataclasses.replace(part, start=part.start + low, stop=part.start + high))
        first += length
    return pieces
