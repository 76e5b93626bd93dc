"""Data sets as random-access sources of labelled images."""

import os
import pathlib

from vit_jax.data.sources.base import NO_LABEL, BadRecordError, Example, MissingDataError, Source
from vit_jax.data.sources.digits import DigitsSource
from vit_jax.data.sources.folders import IMAGE_SUFFIXES, ImageFolderSource

__all__ = [
    "IMAGE_SUFFIXES",
    "NO_LABEL",
    "BadRecordError",
    "DigitsSource",
    "Example",
    "ImageFolderSource",
    "MissingDataError",
    "Source",
    "find_path",
    "open_source",
]


def open_source(dataset: str, split: str, how_to_prepare: str = "") -> Source:
    """Opens a split of a data set.

    Args:
      dataset: "digits", which is embedded, or the path of an image folder or zip file: `<split>/<class>/<image>`. A
        relative path that does not exist is looked for in `$VIT_JAX_DATA` too.
      split: name of the split.
      how_to_prepare: told to the user if the data are not there.

    Raises:
      UserError: the data or the split do not exist, or the data are not as they should be.
    """
    if dataset == "digits":
        return DigitsSource(split)
    path = find_path(dataset)
    if path is None:
        where = " or ".join(str(candidate) for candidate in _candidates(dataset))
        advice = how_to_prepare.strip() or (
            "Set --config.data.dataset to 'digits' or to a path that holds <split>/<class>/<image>.jpg."
        )
        raise MissingDataError(
            f"data set {dataset!r} not found: neither the embedded set 'digits' nor a folder or zip file at {where}.\n"
            f"{advice}"
        )
    return ImageFolderSource(path, split)


def find_path(dataset: str) -> pathlib.Path | None:
    """The place of a data set on disk, or None where there is none."""
    return next((candidate for candidate in _candidates(dataset) if candidate.exists()), None)


def _candidates(dataset: str) -> list[pathlib.Path]:
    path = pathlib.Path(dataset).expanduser()
    data_dir = os.environ.get("VIT_JAX_DATA")
    return [path] if path.is_absolute() or not data_dir else [path, pathlib.Path(data_dir, path)]
