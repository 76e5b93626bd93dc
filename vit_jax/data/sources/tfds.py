"""Data sets that TensorFlow Datasets (TFDS) has prepared, as tfrecord or array_record; read without TensorFlow.

TFDS's own files say what is there: `dataset_info.json` the splits and the lengths of their files, `features.json` the
features. The examples are read by `records`, because images should stay encoded, and because `tfds.data_source`, whose
reader of array_record that is, does not read tfrecord.
"""

import contextlib
import fnmatch
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from vit_jax.data.sources.base import MissingDataError
from vit_jax.data.sources.records import (
    FILE_NAME_KEYS,
    IMAGE_KEYS,
    LABEL_KEYS,
    ExampleKeys,
    Features,
    RecordSource,
    open_record_files,
    read_manifest_facts,
)
from vit_jax.data.sources.splits import resolve, shard_ranges
from vit_jax.errors import UserError, unknown_name
from vit_jax.files import stat_regular

logger = logging.getLogger(__name__)

_DESCRIPTION = "dataset_info.json"
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_FORMATS = ("tfrecord", "array_record")
_PADDED_LABELS = 32  # of images with any number of labels, where nobody says how many are the most


def open_tfds(
    folder: pathlib.Path,
    spec: str,
    *,
    image_key: str | None = None,
    label_key: str | None = None,
    num_classes: int | None = None,
    max_labels: int | None = None,
    all_labelled: bool = False,
    derive_label: Callable[[Features], int] | None = None,
    derive_image: Callable[[bytes], np.ndarray] | None = None,
) -> RecordSource:
    """Opens a split of a prepared data set, its examples in the order of the files.

    Args:
      folder: has `dataset_info.json`: <data folder>/<name>[/<config>]/<version>.
      spec: a split, with slices and sums as TFDS has them.
      image_key: name of the feature that has the image; None: "image", otherwise the only one of images.
      label_key: name of the feature that has the classes; None: "label", "labels", otherwise the only one of classes.
      num_classes: number of classes, where the data set does not say; no less than it says.
      max_labels: the most labels an image has, if it may have several; None: as `manifest.json` in the folder says,
        otherwise the number of classes, but no more than 32.
      all_labelled: see `RecordSource`.
      derive_label: makes a class from 0 to `num_classes` less one of the features of a record, where no feature of
        classes is the label; see `RecordSource`.
      derive_image: see `RecordSource`.

    Raises:
      UserError: the data set is damaged or of another format, or there is no such split or feature.
    """
    builder = _builder(folder)
    info = builder.info
    name = f"tfds:{info.full_name.replace('/' + str(info.version), '')}:{info.version}"
    file_format = info.file_format.value if info.file_format else "unknown"
    if file_format not in _FORMATS:
        raise UserError(
            f"{folder} is prepared as {file_format}; known are {' and '.join(_FORMATS)}. Prepare it again: "
            f"python -m vit_jax.data.prepare tfds {info.name}"
        )
    keys, feature, many = _choose_features(info.features, image_key, label_key, name, derived=derive_label is not None)
    class_names: list[str] | None = None
    if feature is not None and feature.num_classes is not None:
        if num_classes is not None and num_classes < feature.num_classes:
            raise UserError(f"{name} has {feature.num_classes} classes, more than {num_classes}.")
        num_classes = feature.num_classes
        class_names = list(feature.names)
        if class_names == [str(number) for number in range(len(class_names))]:
            class_names = None  # what TFDS makes up where the data set names none
    facts = read_manifest_facts(folder)
    if not many:
        max_labels = 1
    elif max_labels is None:
        max_labels = facts.max_labels or min(num_classes or _PADDED_LABELS, _PADDED_LABELS)

    splits = list(info.splits)
    parts = resolve(spec, splits, lambda split: info.splits[split].shard_lengths, data_set=name)
    paths: dict[str, int] = {}  # of the files that are read, and their numbers
    lengths: list[int] = []
    ranges: list[tuple[int, int, int]] = []
    for part in parts:
        split = info.splits[part.split]
        files = [os.fspath(path) for path in split.filepaths]
        for shard, first, last in shard_ranges(split.shard_lengths, part.start, part.stop):
            if files[shard] not in paths:
                paths[files[shard]] = len(paths)
                lengths.append(split.shard_lengths[shard])
            ranges.append((paths[files[shard]], first, last))
    return RecordSource(
        open_record_files(list(paths), file_format, lengths),
        ranges,
        keys,
        name=name,
        split=spec,
        splits=splits,
        class_names=class_names,
        num_classes=num_classes,
        max_labels=max_labels,
        all_labelled=all_labelled,
        derive_label=derive_label,
        derive_image=derive_image,
        exif_orientation=facts.exif_orientation,
    )


def split_sizes(folder: pathlib.Path) -> dict[str, int]:
    """How many examples each split of a prepared data set has.

    Raises:
      UserError: its description is damaged.
    """
    return {name: sum(split.shard_lengths) for name, split in _builder(folder).info.splits.items()}


def _builder(folder: pathlib.Path) -> Any:
    import tensorflow_datasets as tfds  # takes a third of a second; without TensorFlow

    try:
        for entry in folder.iterdir():  # TFDS would open them
            if entry.suffix in (".json", ".txt"):
                stat_regular(entry)
        return tfds.builder_from_directory(folder)
    except Exception as error:  # whatever damaged descriptions lead to
        reason = str(error).strip().splitlines()
        raise UserError(
            f"cannot read {folder} as a data set prepared by TFDS: {reason[-1] if reason else type(error).__name__}."
        ) from error


def _choose_features(
    features: Any, image_key: str | None, label_key: str | None, name: str, *, derived: bool
) -> tuple[ExampleKeys, Any, bool]:
    """The keys, the `ClassLabel` of the label if there is one, and whether an image may have several."""
    from tensorflow_datasets import features as tfds_features

    features = dict(sorted(features.items()))  # they come in another order in each process

    images = [key for key, feature in features.items() if isinstance(feature, tfds_features.Image)]
    wanted = [key for key in ([image_key] if image_key else IMAGE_KEYS) if key in images]
    if not wanted and not image_key and len(images) == 1:
        wanted = images
    if not wanted:
        raise unknown_name(f"image feature (data.image_key) of {name}", image_key or "image", images or features)
    file_name = next((key for key in FILE_NAME_KEYS if isinstance(features.get(key), tfds_features.Text)), None)
    if derived:
        return ExampleKeys(wanted[0], None, file_name), None, False

    classes: dict[str, Any] = {}
    several = set()
    for key, feature in features.items():
        inner = feature.feature if isinstance(feature, tfds_features.Sequence) else feature
        if isinstance(inner, tfds_features.ClassLabel):
            classes[key] = inner
            several |= {key} if inner is not feature else set()
    label = label_key or next((key for key in LABEL_KEYS if key in classes), None)
    if label is None and len(classes) == 1:
        label = next(iter(classes))
    if label is None and classes:
        raise UserError(f"{name} has several features with classes: {', '.join(classes)}. Set data.label_key to one.")
    if label is not None and label not in classes:
        raise unknown_name(f"feature with classes (data.label_key) of {name}", label, classes or features)
    if label is None:
        logger.warning(
            "%s: no feature has classes, so all images are without label: %s.", name, ", ".join(sorted(features))
        )
    return ExampleKeys(wanted[0], label, file_name), classes.get(label or ""), label in several


# ---- Where prepared data sets lie.


def data_folders() -> list[pathlib.Path]:
    """Where prepared data sets are looked for: $TFDS_DATA_DIR, $VIT_JAX_DATA and ~/tensorflow_datasets."""
    given = (os.environ.get("TFDS_DATA_DIR"), os.environ.get("VIT_JAX_DATA"), "~/tensorflow_datasets")
    return list(dict.fromkeys(pathlib.Path(folder).expanduser() for folder in given if folder))


def find_tfds(dataset: str) -> pathlib.Path | None:
    """The folder of a prepared data set, of its newest version if none is given; None where there is none.

    Args:
      dataset: <name>[/<config>][:<version>], e.g. "imagenet2012", "cifar10:3.0.2", "imagenet2012_subset/10pct:5.1.0".
        Of a version with stars, "cifar10:3.*.*", it is the newest that fits, as in TFDS.

    Raises:
      UserError: it has several configs, and none is given.
    """
    full, _, version = dataset.partition(":")
    name, _, config = full.partition("/")
    for folder in data_folders() if name else []:
        found = {
            path.relative_to(folder / name): path
            for path in _versions_below(folder / name)
            if fnmatch.fnmatchcase(path.name, version or "*")
        }
        configs = {path.parts[0] if len(path.parts) > 1 else "" for path in found}
        if not config and len(configs) > 1:
            raise UserError(
                f"tfds:{name} has several configs in {folder / name}: {', '.join(sorted(filter(None, configs)))}. "
                f"Write tfds:{name}/<config>."
            )
        wanted = [path for relative, path in found.items() if not config or relative.parts[0] == config]
        if wanted:
            return max(wanted, key=_version_key)
    return None


_PREPARE = "    python -m vit_jax.data.prepare tfds"


def not_prepared(dataset: str, how_to_prepare: str = "", *, suggest: bool = True) -> MissingDataError:
    """The error for a data set that is not prepared: how to prepare it and, if its name may be wrong, what there is."""
    name = dataset.partition(":")[0]
    known = {
        "tfds:" + "/".join(path.relative_to(folder).parts[:-1])
        for folder in data_folders()
        for entry in _folders(folder)
        for path in _versions_below(entry)
    }
    looked = ", ".join(map(str, data_folders()))
    nearest = f"\n{unknown_name('prepared data set', f'tfds:{dataset}', known)}" if known and suggest else ""
    for folder in data_folders():
        if begun := sorted((folder / name).glob("*.incomplete")) if name else []:
            return MissingDataError(
                f"tfds:{dataset} is not prepared yet: {begun[0]} was begun and not finished. Run the command that "
                "prepares it again; it goes on where it was."
            )
    advice = how_to_prepare.strip() or f"Prepare it, or set TFDS_DATA_DIR to where it is:\n{_PREPARE} {name}"
    return MissingDataError(f"tfds:{dataset} is not prepared in any of {looked}.{nearest}\n{advice}")


def prepared_folder(path: pathlib.Path) -> pathlib.Path | None:
    """The folder with the description, if `path` is a data set prepared by TFDS or has exactly one below it.

    Raises:
      UserError: there are several.
    """
    if not path.is_dir():
        return None
    if (path / _DESCRIPTION).is_file():
        return path
    found = sorted(_versions_below(path))
    if len(found) > 1:
        raise UserError(f"{path} has several prepared data sets. Name one of {', '.join(map(str, found))}.")
    return found[0] if found else None


def _versions_below(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Folders <version> and <config>/<version> that have a description. Looks into no other folder of a version."""
    for entry in _folders(folder):
        candidates = [entry] if _VERSION.fullmatch(entry.name) else _folders(entry, _VERSION)
        yield from (path for path in candidates if (path / _DESCRIPTION).is_file())


def _folders(folder: pathlib.Path, names: re.Pattern[str] | None = None) -> Sequence[pathlib.Path]:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return [
            pathlib.Path(entry.path)
            for entry in entries
            if (names.fullmatch(entry.name) if names else not entry.name.startswith(".")) and entry.is_dir()
        ]
    return []


def _version_key(path: pathlib.Path) -> tuple[int, ...]:
    return tuple(map(int, path.name.split(".")))
