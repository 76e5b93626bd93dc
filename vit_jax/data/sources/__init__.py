"""Data sets as random-access sources of labelled images. `docs/data_sets.md` says what can be opened and how."""

import functools
import glob
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_jax.console import show_name, show_names
from vit_jax.data.sources.base import NO_LABEL, BadRecordError, Example, MissingDataError, Source
from vit_jax.data.sources.digits import DigitsSource
from vit_jax.data.sources.folders import ImageFolderSource, list_splits
from vit_jax.data.sources.real_labels import RealLabels, load_real_labels
from vit_jax.data.sources.records import RecordSource, find_shards, is_record_file, is_record_name, open_shards
from vit_jax.data.sources.splits import SlicedSource, for_testing, open_parts
from vit_jax.data.sources.tfds import find_tfds, not_prepared, open_tfds, prepared_folder
from vit_jax.data.sources.trees import IMAGE_SUFFIXES
from vit_jax.errors import UserError
from vit_jax.files import stat_regular

__all__ = [
    "IMAGE_SUFFIXES",
    "NO_LABEL",
    "BadRecordError",
    "DigitsSource",
    "Example",
    "ImageFolderSource",
    "MissingDataError",
    "RealLabels",
    "RecordSource",
    "SlicedSource",
    "Source",
    "absolute_place",
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
) -> Source:
    """Opens a split of a data set. Nothing is downloaded.

    Args:
      dataset: one of
        - "digits", which is embedded;
        - "vtab:<task>", a task of VTAB (docs/vtab.md);
        - "tfds:<name>[/<config>][:<version>]", a data set that TFDS has prepared (see `tfds.data_folders` for where);
        - the path of an image folder or zip file, `<split>/<class>/<image>`, or of a folder that TFDS has prepared;
        - files of examples, tfrecord or array_record, as a pattern: "/data/web/*.array_record*". Several patterns
          have commas between them.
        A relative path that does not exist is looked for in `$VIT_JAX_DATA` too.
      split: name of the split, or slices and sums of splits as TFDS has them: "train[:90%]", "train+validation". Files
        of examples are one split, "all".
      how_to_prepare: told to the user if the data are not there.
      image_key: of examples in records: the feature that has the encoded image; None: as it is usually called.
      label_key: of examples in records: the feature that has label ids; None: as it is usually called.
      num_classes: number of classes, where the data do not say; no less than they say.
      max_labels: of examples in records: the most labels an image has, where the data do not say; see `open_shards`
        and `open_tfds`.
      class_names: of folders of images: what labels count, such as the classes of the training split. A split that
        lacks some of them is fine; one with others is not. None: the folders of the split.

    Raises:
      MissingDataError: there is no such data set here.
      UserError: the split does not exist, or the data are not as they should be.
    """
    options: dict[str, Any] = {
        "image_key": image_key,
        "label_key": label_key,
        "num_classes": num_classes,
        "max_labels": max_labels,
    }
    if dataset.startswith(_TFDS):
        name = dataset.removeprefix(_TFDS)
        if folder := find_tfds(name):
            return open_tfds(folder, split, **options)
        raise not_prepared(name, how_to_prepare)
    source: Source
    if dataset.startswith(_VTAB):
        from vit_jax.data.vtab import open_vtab  # which is made of the sources here

        source = open_vtab(dataset.removeprefix(_VTAB), split)
    elif dataset == "digits":
        source = open_parts(split, DigitsSource, lambda: DigitsSource.SPLITS, data_set=dataset)
    elif path := _existing(dataset):
        if folder := prepared_folder(path):
            return open_tfds(folder, split, **options)
        if not path.is_dir():
            _check_regular(path)
            if is_record_file(path):
                return open_shards([os.fspath(path)], split, name=dataset, **options)
        _refuse_bare_records(path)
        source = open_parts(
            split,
            functools.partial(ImageFolderSource, path, class_names=class_names),
            lambda: list_splits(path, for_all=True),
            data_set=show_name(os.fspath(path)),
            mixed=False,
            open_term=None if class_names else functools.partial(ImageFolderSource, path, classes_may_be_empty=True),
        )
    elif shards := find_shards(dataset, _data_folders()):
        return open_shards(shards, split, name=dataset, **options)
    else:
        raise _not_found(dataset, how_to_prepare)
    names = class_names or (source.class_names if for_testing(split) else None)
    if names is not None and (labels := getattr(source, "labels", lambda: None)()) is not None:
        _tell_missing(source, labels, names)
    if num_classes is not None and source.num_classes is not None and num_classes < source.num_classes:
        raise UserError(f"{dataset} has {source.num_classes} classes, more than {num_classes}.")
    return source


def find_path(dataset: str) -> pathlib.Path | None:
    """The place of a data set on disk (of several files the first), or None where there is none."""
    if dataset.startswith(_TFDS):
        return find_tfds(dataset.removeprefix(_TFDS))
    if path := _existing(dataset):
        return path
    shards = find_shards(dataset, _data_folders())
    return pathlib.Path(shards[0]) if shards else None


def absolute_place(dataset: str) -> str | None:
    """The data set by absolute paths, so that `open_source` finds it from any working folder; None where it has none.

    Args:
      dataset: as `open_source` takes it, and opened it from this working folder.
    """
    if dataset.startswith(_TFDS):
        folder = find_tfds(dataset.removeprefix(_TFDS))
        return None if folder is None else os.path.abspath(folder)
    if dataset == "digits" or dataset.startswith(_VTAB):
        return None
    if path := _existing(dataset):
        return os.path.abspath(path)
    patterns = filter(None, (pattern.strip() for pattern in dataset.split(",")))
    return ",".join(map(_absolute_pattern, patterns))


def _absolute_pattern(pattern: str) -> str:
    found = (folder for folder in _candidates(pattern) if glob.glob(os.fspath(folder)))
    return os.path.abspath(next(found, pathlib.Path(pattern)))


def _existing(dataset: str) -> pathlib.Path | None:
    # "" would be the current folder, and a list of patterns may be longer than a name of a file, where pathlib raises.
    return next((candidate for candidate in _candidates(dataset) if dataset and os.path.exists(candidate)), None)


def _candidates(dataset: str) -> list[pathlib.Path]:
    path = pathlib.Path(os.path.expanduser(dataset))
    return [path] if path.is_absolute() else [path, *(folder / path for folder in _data_folders())]


def _data_folders() -> list[pathlib.Path]:
    folder = os.environ.get("VIT_JAX_DATA")
    return [pathlib.Path(folder).expanduser()] if folder else []


def _tell_missing(source: Source, labels: np.ndarray, class_names: Sequence[str]) -> None:
    counts = np.bincount(labels, minlength=len(class_names))
    if missing := [class_names[label] for label in np.flatnonzero(counts == 0).tolist()]:
        logger.warning(
            "%s, split %r, has no images of %d of %d classes: %s. Results say nothing of them.",
            *(source.name, source.split, len(missing), len(class_names), show_names(missing)),
        )


def _check_regular(path: pathlib.Path) -> None:
    try:
        stat_regular(path)
    except OSError as error:
        raise UserError(
            f"cannot read {show_name(str(path))}: {error.strerror or error}. A data set is a folder, a zip file or "
            "files of examples."
        ) from error


def _refuse_bare_records(path: pathlib.Path) -> None:
    if path.is_dir() and (found := sorted(name for name in os.listdir(path) if is_record_name(name))):
        word = "array_record" if "array_record" in found[0] else "tfrecord"
        raise UserError(
            f"{path} has files of examples, such as {found[0]}, but no dataset_info.json that describes them. If they "
            f"are one split, name the files: --config.data.dataset='{path}/*{word}*'"
        )


def _not_found(dataset: str, how_to_prepare: str) -> MissingDataError:
    if "://" in dataset:
        return MissingDataError(
            f"data set {dataset!r} is an address. Copy the data here, or mount them, and give their path."
        )
    advice = how_to_prepare.strip() or (
        "Set --config.data.dataset to 'digits', to 'tfds:<name>', to a folder or zip file that holds "
        "<split>/<class>/<image>.jpg, or to files of examples: '<folder>/*.tfrecord*'."
    )
    where = " or ".join(map(str, _candidates(dataset)))
    return MissingDataError(
        f"data set {dataset!r} not found: neither the embedded set 'digits' nor a folder, a zip file or files of "
        f"examples at {where}.\n{advice}"
    )
