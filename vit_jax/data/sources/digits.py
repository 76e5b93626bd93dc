"""The embedded data set."""

import functools
import importlib.metadata
from collections.abc import Sequence

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
        images, labels = _load()
        chosen = (np.arange(len(labels)) % 5 == 0) == (split == "test")
        grey = np.round(images[chosen] * (255 / 16)).astype(np.uint8)
        self._numbers = np.flatnonzero(chosen)
        self._images = np.repeat(grey[..., None], 3, axis=-1)
        self._labels = labels[chosen].tolist()
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
def _load() -> tuple[np.ndarray, np.ndarray]:
    """Images [1797, 8, 8] with values from 0 to 16, and their labels.

    Reads the file that `sklearn.datasets.load_digits` reads, without the seconds that importing scikit-learn takes.
    """
    path = importlib.metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = np.loadtxt(str(path), delimiter=",", dtype=np.int64)
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1]
