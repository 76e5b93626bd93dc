"""Opens data sets that TensorFlow Datasets (TFDS) has prepared, tfrecord or array_record, without TensorFlow.

TFDS's own files describe the data set: `dataset_info.json` has the splits and the lengths of their files,
`features.json` the features. `records` reads the examples, because images should stay encoded and `tfds.data_source`
does not read tfrecord.
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
    FORMATS,
    IMAGE_KEYS,
    LABEL_KEYS,
    ExampleKeys,
    Features,
    Range,
    RecordSource,
    read_manifest_facts,
)
from vit_jax.data.sources.splits import resolve, shard_ranges
from vit_jax.errors import UserError, unknown_name
from vit_jax.files import stat_regular

logger = logging.getLogger(__name__)

_DESCRIPTION = "dataset_info.json"
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_MOST_LABELS = 32  # of an image with any number of labels, unless the data set gives another number


def open_tfds(
    folder: pathlib.Path,
    spec: str,
    *,
    image_key: str | None = None,
    label_key: str | Callable[[Features], int] | None = None,
    num_classes: int | None = None,
    max_labels: int | None = None,
    all_labelled: bool = False,
    derive_image: Callable[[bytes], np.ndarray] | None = None,
) -> RecordSource:
    """Opens a split of a prepared data set, its examples in the order of the files.

    Args:
      folder: has `dataset_info.json`: <data folder>/<name>[/<config>]/<version>.
      spec: a split, or slices and sums of splits as in TFDS.
      image_key: feature with the image; None: one of the usual names, otherwise the only feature of images.
      label_key: feature with the classes, or a function that derives the class; see `ExampleKeys`. None: one of the
        usual names, otherwise the only feature with classes.
      num_classes: number of classes if the data set does not say.
      max_labels: the largest number of labels of an image that may have several; None: that of `manifest.json` in the
        folder, otherwise the number of classes, but at most 32.
      all_labelled: see `RecordSource`.
      derive_image: see `RecordSource`.

    Raises:
      UserError: the data set is damaged or of another format, or there is no such split or feature.
    """
    info = _builder(folder).info
    name = f"tfds:{info.full_name.replace('/' + str(info.version), '')}:{info.version}"
    file_format = info.file_format.value if info.file_format else "unknown"
    if file_format not in FORMATS:
        raise UserError(
            f"{folder} is prepared as {file_format}, but only {' and '.join(FORMATS)} are read. Prepare it again: "
            f"python -m vit_jax.data.prepare tfds {info.name}"
        )
    keys, feature, several = _choose_features(info.features, image_key, label_key, name)
    class_names: list[str] | None = None
    if feature is not None and feature.num_classes is not None:
        num_classes = feature.num_classes
        class_names = list(feature.names)
        if class_names == [str(number) for number in range(len(class_names))]:
            class_names = None  # TFDS makes these up for classes without names
    facts = read_manifest_facts(folder)
    if not several:
        max_labels = 1
    elif max_labels is None:
        max_labels = facts.max_labels or min(num_classes or _MOST_LABELS, _MOST_LABELS)

    ranges: list[Range] = []
    lengths: dict[str, int] = {}  # of the files that the split needs
    for part in resolve(spec, list(info.splits), lambda split: info.splits[split].shard_lengths, data_set=name):
        split = info.splits[part.split]
        paths = [os.fspath(path) for path in split.filepaths]
        for shard, first, last in shard_ranges(split.shard_lengths, part.start, part.stop):
            ranges.append((paths[shard], first, last))
            lengths[paths[shard]] = split.shard_lengths[shard]
    return RecordSource(
        FORMATS[file_format](list(lengths), list(lengths.values())),
        ranges,
        keys,
        name=name,
        split=spec,
        splits=list(info.splits),
        class_names=class_names,
        num_classes=num_classes,
        max_labels=max_labels,
        all_labelled=all_labelled,
        derive_image=derive_image,
        exif_orientation=facts.exif_orientation,
    )


def split_sizes(folder: pathlib.Path) -> dict[str, int]:
    """The number of examples of each split of a prepared data set; raises UserError if its description is damaged."""
    return {name: sum(split.shard_lengths) for name, split in _builder(folder).info.splits.items()}


def _builder(folder: pathlib.Path) -> Any:
    import tensorflow_datasets as tfds  # takes a third of a second; without TensorFlow

    try:
        for entry in folder.iterdir():  # TFDS would open them
            if entry.suffix in (".json", ".txt"):
                stat_regular(entry)
        return tfds.builder_from_directory(folder)
    except Exception as error:  # damaged descriptions raise errors of many kinds
        reason = str(error).strip().splitlines()
        raise UserError(
            f"cannot read {folder} as a data set prepared by TFDS: {reason[-1] if reason else type(error).__name__}."
        ) from error


def _choose_features(
    features: Any, image_key: str | None, label_key: str | Callable[[Features], int] | None, name: str
) -> tuple[ExampleKeys, Any, bool]:
    """Chooses the keys; also returns the label's `ClassLabel`, if any, and whether an image may have several labels."""
    from tensorflow_datasets import features as tfds_features

    features = dict(sorted(features.items()))  # their order differs between processes

    images = [key for key, feature in features.items() if isinstance(feature, tfds_features.Image)]
    image = next((key for key in ([image_key] if image_key else IMAGE_KEYS) if key in images), None)
    if image is None and not image_key and len(images) == 1:
        image = images[0]
    if image is None:
        raise unknown_name(f"image feature (data.image_key) of {name}", image_key or "image", images or features)
    file_name = next((key for key in FILE_NAME_KEYS if isinstance(features.get(key), tfds_features.Text)), None)
    if callable(label_key):
        return ExampleKeys(image, label_key, file_name), None, False

    elements = {  # of sequences
        key: feature.feature if isinstance(feature, tfds_features.Sequence) else feature
        for key, feature in features.items()
    }
    classes = {key: element for key, element in elements.items() if isinstance(element, tfds_features.ClassLabel)}
    label = label_key or next((key for key in LABEL_KEYS if key in classes), None)
    if label is None and len(classes) == 1:
        label = next(iter(classes))
    if label is None and classes:
        raise UserError(f"{name} has several features with classes: {', '.join(classes)}. Set data.label_key to one.")
    if label is None:
        logger.warning(
            "%s: no feature has classes, so all images are unlabelled. Features: %s.", name, ", ".join(features)
        )
        return ExampleKeys(image, None, file_name), None, False
    if label not in classes:
        raise unknown_name(f"feature with classes (data.label_key) of {name}", label, classes or features)
    return ExampleKeys(image, label, file_name), classes[label], classes[label] is not features[label]


# ---- Folders of prepared data sets.


def data_folders() -> list[pathlib.Path]:
    """Lists the folders to search for prepared data sets: $TFDS_DATA_DIR, $VIT_JAX_DATA and ~/tensorflow_datasets."""
    given = (os.environ.get("TFDS_DATA_DIR"), os.environ.get("VIT_JAX_DATA"), "~/tensorflow_datasets")
    return list(dict.fromkeys(pathlib.Path(folder).expanduser() for folder in given if folder))


def find_tfds(dataset: str) -> pathlib.Path | None:
    """Finds the folder of a prepared data set, in the newest matching version; None if it is not prepared.

    Args:
      dataset: <name>[/<config>][:<version>], e.g. "imagenet2012", "cifar10:3.0.2", "imagenet2012_subset/10pct:5.1.0".
        A version may have stars, as in TFDS: "cifar10:3.*.*".

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
            return max(wanted, key=lambda path: tuple(map(int, path.name.split("."))))
    return None


def not_prepared(dataset: str, how_to_prepare: str = "", *, suggest: bool = True) -> MissingDataError:
    """Makes the error for a data set that is not prepared.

    Args:
      dataset: as for `find_tfds`.
      how_to_prepare: ends the message; "": the usual command.
      suggest: whether to name prepared data sets, in case the name is wrong.
    """
    name = dataset.partition(":")[0]
    folders = data_folders()
    for folder in folders if name else []:
        if begun := sorted((folder / name).glob("*.incomplete")):
            return MissingDataError(
                f"tfds:{dataset} is not prepared yet: {begun[0]} is unfinished. Rerun the command that prepares it to "
                "resume."
            )
    known = {
        "tfds:" + "/".join(path.relative_to(folder).parts[:-1])
        for folder in folders
        for entry in _folders(folder)
        for path in _versions_below(entry)
    }
    nearest = f"\n{unknown_name('prepared data set', f'tfds:{dataset}', known)}" if known and suggest else ""
    advice = how_to_prepare.strip() or preparation(name)
    return MissingDataError(
        f"tfds:{dataset} is not prepared in any of {', '.join(map(str, folders))}.{nearest}\n{advice}"
    )


def preparation(arguments: str) -> str:
    """Says how to prepare a data set, given its name and perhaps flags."""
    return f"Prepare it, or set TFDS_DATA_DIR to its folder:\n    python -m vit_jax.data.prepare tfds {arguments}"


def prepared_folder(path: pathlib.Path) -> pathlib.Path | None:
    """Finds the data set that TFDS prepared at or below `path`; None if there is none, an error if several."""
    if not path.is_dir():
        return None
    if (path / _DESCRIPTION).is_file():
        return path
    found = sorted(_versions_below(path))
    if len(found) > 1:
        raise UserError(f"{path} has several prepared data sets. Name one of {', '.join(map(str, found))}.")
    return found[0] if found else None


def _versions_below(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Folders <version> and <config>/<version> that have a description."""
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
