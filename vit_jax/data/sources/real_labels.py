"""ReaL: new labels for ImageNet's validation images (Beyer et al., "Are we done with ImageNet?", 2020).

An image has any number of correct classes. 3,163 of the 50,000 images have none and do not count.
"""

import json
import os
import pathlib
import re
import reprlib

from vit_jax.data.imagenet_test_sets import IMAGENET_TEST_SETS, NUM_CLASSES
from vit_jax.data.sources.base import Example, Numbers, Source, fingerprint_of
from vit_jax.errors import UserError
from vit_jax.json_files import read_json

NUM_IMAGES = IMAGENET_TEST_SETS["real"].num_images

_NUMBER = re.compile(r"val_(\d{8})\b")


def load_real_labels(path: str | os.PathLike[str]) -> list[list[int]]:
    """Reads `real.json`, as its authors publish it: a list of classes for each validation image, by its number.

    Raises:
      UserError: the file cannot be read or is something else.
    """
    place = os.fspath(path)
    try:
        labels = read_json(pathlib.Path(place))
    except UserError as error:
        raise UserError(f"cannot read the ReaL labels in {place}: {error}.") from error
    if not isinstance(labels, list) or len(labels) != NUM_IMAGES:
        raise UserError(f"{place} should be a JSON list of {NUM_IMAGES} lists, one for each validation image.")
    for number, classes in enumerate(labels, 1):
        if not isinstance(classes, list) or not all(type(c) is int and 0 <= c < NUM_CLASSES for c in classes):
            raise UserError(
                f"{place}: entry {number} is {reprlib.repr(classes)}; it should be a list of classes from 0 to "
                f"{NUM_CLASSES - 1}."
            )
    return labels


class RealLabels:
    """The validation split of ImageNet, or a part of it, with ReaL labels.

    The number in an image's name selects its labels: ILSVRC2012_val_00000001.JPEG has the first.
    """

    def __init__(self, source: Source, labels: list[list[int]]):
        """Reads the first example to check its name.

        Args:
          source: its classes are ImageNet's, in the usual order: sorted by WordNet id.
          labels: from `load_real_labels`.

        Raises:
          UserError: the source has no such names, or another number of classes.
        """
        if source.num_classes not in (None, NUM_CLASSES):
            raise UserError(
                f"ReaL labels are for the {NUM_CLASSES} classes of ImageNet; {source.name} has {source.num_classes}."
            )
        self._source, self._labels = source, labels
        self.name, self.split, self.splits = f"{source.name} (ReaL labels)", source.split, source.splits
        self.class_names, self.num_classes = source.class_names, NUM_CLASSES
        self.max_labels = max(map(len, labels))
        self._number(source[0], 0)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        return {**example, "label": self._labels[self._number(example, index) - 1]}

    def parts(self) -> list[tuple[Source, Numbers]]:
        """The labelled images."""
        return [(self._source, range(len(self)))]

    def fingerprint(self) -> str:
        """Changes with the source and with the labels."""
        return fingerprint_of([self._source.fingerprint(), json.dumps(self._labels)])

    def where(self, index: int) -> str:
        """See `Source`."""
        return self._source.where(index)

    def _number(self, example: Example, index: int) -> int:
        name = example.get("file_name")
        match = _NUMBER.search(name or "")
        if not match or not 1 <= int(match[1]) <= len(self._labels):
            given = f"is called {name!r}" if name else "has no file name"
            raise UserError(
                f"{self.where(index)} {given}, so its ReaL label cannot be found. It needs the name it has in "
                f"ImageNet: ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_{len(self._labels):08d}.JPEG."
            )
        return int(match[1])
