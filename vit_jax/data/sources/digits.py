"""The embedded data set."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_jax.data.sources.base import Example, Extent
from vit_jax.errors import unknown_name


class DigitsSource:
    """8x8 grey images of handwritten digits that come with scikit-learn: 1,437 for training, 360 for testing.

    Every fifth image is a test image, so both splits have the same writers.
    """

    SPLITS = ("train", "test")

    def __init__(self, split: str):
        """Loads the split; raises UserError if there is no such split."""
        if split not in self.SPLITS:
            raise unknown_name("split of digits", split, self.SPLITS)
        digits = _load()
        chosen = (np.arange(len(digits.target)) % 5 == 0) == (split == "test")
        grey = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        self._numbers = np.flatnonzero(chosen)
        self._images = np.repeat(grey[..., None], 3, axis=-1)
        self._labels = digits.target[chosen].tolist()
        self.name, self.split, self.splits = "digits", split, self.SPLITS
        self.class_names: Sequence[str] = [str(digit) for digit in range(10)]
        self.num_classes, self.max_labels = 10, 1

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return {"image": self._images[index], "label": self._labels[index]}

    def extents(self) -> list[Extent]:
        """Numbers the images in the list that both splits come from."""
        return [Extent("digits", len(self), lambda: self._numbers)]

    def fingerprint(self) -> str:
        """The images never change."""
        return f"digits/{self.split}"

    def where(self, index: int) -> str:
        """The number of the image."""
        return f"image {index} of digits/{self.split}"


@functools.cache
def _load() -> Any:
    from sklearn.datasets import load_digits  # takes most of a second

    return load_digits()
