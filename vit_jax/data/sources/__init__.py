"""Opens data sets as random-access sources of labelled images. `docs/data_sets.md` says which and how."""

import functools
import glob
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from vit_jax.console import show_name, show_names
from vit_jax.data.sources.base import NO_LABEL, BadRecordError, Example, MissingDataError, Source
from vit_jax.data.sources.digits import DigitsSource
from vit_jax.data.sources.folders import ImageFolderSource, list_splits
from vit_jax.data.sources.real_labels import RealLabels, load_real_labels
from vit_jax.data.sources.shards import candidates, find_shards, open_shards, record_format, split_patterns
from vit_jax.data.sources.splits import ALL, classes_without_images, for_testing, open_parts
from vit_jax.data.sources.tfds import find_tfds, not_prepared, open_tfds, prepared_folder
from vit_jax.data.sources.unlabelled_folders import UnlabelledFolderSource
from vit_jax.errors import UserError

__all__ = [
    "NO_LABEL",
    "BadRecordError",
    "Example",
    "ImageFolderSource",
    "MissingDataError",
    "RealLabels",
    "Source",
    "absolute_dataset",
    "find_path",
    "load_real_labels",
    "open_source",
]

logger = logging.getLogger(__name__)

_TFDS = "tfds:"
_VTAB = "vtab:"


def open_source(
    dataset: str,
    split: str,
    how_to_prepare: str = "",
    *,
    image_key: str | None = None,
    label_key: str | None = None,
    num_classes: int | None = None,
    max_labels: int | None = None,
    class_names: Sequence[str] | None = None,
    labelled: bool = True,
) -> Source:
    """Opens a split of a data set. Nothing is downloaded.

    Args:
      dataset: one of
        - "digits", which is embedded;
        - "vtab:<task>", a task of VTAB (docs/vtab.md);
        - "tfds:<name>[/<config>][:<version>]", a data set that TFDS has prepared in one of `tfds.data_folders()`;
        - the path of an image folder or zip file, `<split>/<class>/<image>`, or of a folder that TFDS has prepared;
        - files of examples, tfrecord or array_record, as a pattern: "/data/web/*.array_record*", or several separated
          by commas.
        A relative path that does not exist is also searched for in `$VIT_JAX_DATA`.
      split: name of the split, or slices and sums of splits as in TFDS: "train[:90%]", "train+validation". The only
        split of files of examples is "all".
      how_to_prepare: ends the error's message if the data set is missing.
      image_key: for records, the feature with the encoded image; None: a usual name.
      label_key: for records, the feature with label ids; None: a usual name.
      num_classes: number of classes if the data do not say; at least as many as they say.
      max_labels: for records, the largest number of labels of an image if the data do not say; see `open_shards` and
        `open_tfds`.
      class_names: for folders of images, names by label, such as the classes of the training split. A split may lack
        some of them, but not have others. None: the folders of the split.
      labelled: for folders of images, whether folders are classes; see `UnlabelledFolderSource`.

    Raises:
      MissingDataError: the data set does not exist on this machine.
      UserError: the split does not exist, or the data are damaged or inconsistent.
    """
    options: dict[str, Any] = {
        "image_key": image_key,
        "label_key": label_key,
        "num_classes": num_classes,
        "max_labels": max_labels,
    }
    source: Source
    if dataset.startswith(_TFDS):
        name = dataset.removeprefix(_TFDS)
        folder = find_tfds(name)
        if folder is None:
            raise not_prepared(name, how_to_prepare)
        source = open_tfds(folder, split, **options)
    elif dataset.startswith(_VTAB):
        from vit_jax.data.vtab import open_vtab  # which imports modules of this package

        source = open_vtab(dataset.removeprefix(_VTAB), split)
    elif dataset == "digits":
        source = open_parts(split, DigitsSource, lambda: DigitsSource.SPLITS, data_set=dataset)
    elif path := _existing(dataset):
        source = _open_path(path, dataset, split, class_names, options, labelled=labelled)
    elif shards := find_shards(dataset):
        source = open_shards(shards, split, name=dataset, **options)
    else:
        raise _not_found(dataset, how_to_prepare)
    names = class_names or (source.class_names if for_testing(split) else None) or ()
    labels = getattr(source, "labels", lambda: None)() if names else None
    if labels is not None and (missing := classes_without_images(labels, names)):
        logger.warning(
            "%s, split %r, has no images of %d of %d classes: %s. Results say nothing about them.",
            *(source.name, source.split, len(missing), len(names), show_names(missing)),
        )
    if num_classes is not None and source.num_classes is not None and num_classes < source.num_classes:
        raise UserError(f"{dataset} has {source.num_classes} classes, more than {num_classes}.")
    return source


def _open_path(
    path: pathlib.Path,
    dataset: str,
    split: str,
    class_names: Sequence[str] | None,
    options: dict[str, Any],
    *,
    labelled: bool,
) -> Source:
    if folder := prepared_folder(path):
        return open_tfds(folder, split, **options)
    if path.is_dir():
        _refuse_bare_records(path)
    elif record_format(path):
        return open_shards([os.fspath(path)], split, name=dataset, **options)
    name = show_name(os.fspath(path))
    if not labelled:
        return open_parts(
            split, functools.partial(UnlabelledFolderSource, path), lambda: [ALL], data_set=name, mixed=False
        )
    return open_parts(
        split,
        functools.partial(ImageFolderSource, path, class_names=class_names),
        lambda: list_splits(path, for_all=True),
        data_set=name,
        mixed=False,
        open_term=None if class_names else functools.partial(ImageFolderSource, path, classes_may_be_empty=True),
    )


def find_path(dataset: str) -> pathlib.Path | None:
    """Returns the path of a data set (the first of several files); None if it does not exist or is not a path."""
    if dataset.startswith(_TFDS):
        return find_tfds(dataset.removeprefix(_TFDS))
    if path := _existing(dataset):
        return path
    shards = find_shards(dataset)
    return pathlib.Path(shards[0]) if shards else None


def absolute_dataset(dataset: str) -> str | None:
    """Makes the paths of a data set absolute, for `open_source` in any working folder; None if it has no path.

    Args:
      dataset: as for `open_source`, which must be able to open it from this working folder.
    """
    if dataset == "digits" or dataset.startswith(_VTAB):
        return None
    if dataset.startswith(_TFDS) or _existing(dataset):
        path = find_path(dataset)
        return None if path is None else os.path.abspath(path)
    patterns = []
    for pattern in split_patterns(dataset):
        matching = (path for path in candidates(pattern) if glob.glob(os.fspath(path)))
        patterns.append(os.path.abspath(next(matching, pathlib.Path(pattern))))
    return ",".join(patterns)


def _existing(dataset: str) -> pathlib.Path | None:
    # "" would be the current folder. os.path.exists works for patterns that are too long for pathlib.
    return next((path for path in candidates(dataset) if dataset and os.path.exists(path)), None)


def _refuse_bare_records(folder: pathlib.Path) -> None:
    names = (name for name in os.listdir(folder) if not name.startswith("."))
    if found := sorted(name for name in names if "array_record" in name or "tfrecord" in name):
        word = "array_record" if "array_record" in found[0] else "tfrecord"
        raise UserError(
            f"{folder} has files of examples, such as {found[0]}, but no dataset_info.json that describes them. If "
            f"they are one split, name the files: --config.data.dataset='{folder}/*{word}*'"
        )


def _not_found(dataset: str, how_to_prepare: str) -> MissingDataError:
    if "://" in dataset:
        return MissingDataError(
            f"data set {dataset!r} is an address. Copy the data to this machine, or mount them, and give their path."
        )
    advice = how_to_prepare.strip() or (
        "Set --config.data.dataset to 'digits', to 'tfds:<name>', to a folder or zip file with "
        "<split>/<class>/<image>.jpg, or to files of examples: '<folder>/*.tfrecord*'."
    )
    paths = " or ".join(map(str, candidates(dataset)))
    return MissingDataError(
        f"data set {dataset!r} not found: neither the embedded set 'digits' nor a folder, a zip file or files of "
        f"examples at {paths}.\n{advice}"
    )
