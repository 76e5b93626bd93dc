"""A task's examples as a source, from a data set that TFDS has prepared."""

import pathlib

from vit_jax.data.sources.base import MissingDataError, Source
from vit_jax.data.sources.splits import Part, resolve, shard_ranges
from vit_jax.data.sources.tfds import find_tfds, not_prepared, open_tfds, preparation, split_sizes
from vit_jax.data.vtab.tasks import DataSet, Task, get_task
from vit_jax.errors import UserError


def open_vtab(task: str | Task, split: str) -> Source:
    """Opens a split of a task, or slices and sums of its splits as in TFDS: "val200", "test[:1000]".

    Args:
      task: one of `TASKS`, or its id.
      split: "train800", "val200" and "train800val200" are VTAB-1k; "train", "validation" and "test" have all examples.

    Raises:
      MissingDataError: the data set is not prepared; the message says how to prepare it.
      UserError: there is no such task or split, or the data set is not VTAB's.
    """
    task = get_task(task) if isinstance(task, str) else task
    name, data = f"vtab:{task.id}", task.data
    folder = find_data(data)
    if folder is None:
        raise _missing(data)
    sizes = split_sizes(folder)
    for each, expected in data.sizes.items():
        if sizes.get(each) not in expected:
            raise UserError(
                f"{folder} has {sizes.get(each, 0):,} examples in {each!r}, but VTAB's has "
                f"{' or '.join(f'{size:,}' for size in expected)}. Slices of it would be other examples, and results "
                "not comparable. Delete it and prepare it again."
            )
    source = open_tfds(
        folder,
        "+".join(f"{part.split}[{part.start}:{part.stop}]" for part in _resolve(data, split, sizes, name)),
        image_key="image",
        label_key=task.label,
        num_classes=task.num_classes,
        all_labelled=True,
        derive_image=data.pixels,
    )
    if source.num_classes != task.num_classes:
        raise UserError(f"{name} has {task.num_classes} classes, but {folder} has {source.num_classes}.")
    source.name, source.split, source.splits = name, split, list(data.splits)
    return source


def find_data(data: DataSet) -> pathlib.Path | None:
    """The folder of a prepared data set, preferably of the version that VTAB used; None if it is not prepared."""
    return next(filter(None, (find_tfds(f"{data.name}:{version}") for version in data.versions)), None)


def _missing(data: DataSet) -> MissingDataError:
    advice = (
        f"{preparation(data.name + ' --manual_dir=<folder>' * data.manual)}\n"
        "docs/vtab.md lists the data sets that need more than this command."
    )
    if other := find_tfds(data.name):
        return MissingDataError(
            f"VTAB uses version {' or '.join(data.versions)} of tfds:{data.name}, not that of {other}. {advice}"
        )
    return not_prepared(data.name, advice, suggest=False)


def _resolve(data: DataSet, split: str, sizes: dict[str, int], name: str) -> list[Part]:
    """Turns slices of VTAB's splits into slices of TFDS's."""
    parts = {
        key: resolve(spec, list(sizes), lambda each: [sizes[each]], data_set=name) for key, spec in data.splits.items()
    }
    if split == "all":
        raise UserError(f"{name} has no split 'all': its splits overlap. Take one of {', '.join(parts)}.")
    lengths = {key: [part.stop - part.start for part in value] for key, value in parts.items()}
    pieces = []
    for wanted in resolve(split, list(parts), lambda key: [sum(lengths[key])], data_set=name):
        for number, first, last in shard_ranges(lengths[wanted.split], wanted.start, wanted.stop):
            part = parts[wanted.split][number]
            pieces.append(Part(part.split, part.start + first, part.start + last))
    return pieces
