"""The interface between data sets and the input pipeline."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NotRequired, Protocol, TypeAlias, TypedDict

import numpy as np

from vit_jax.errors import UserError
from vit_jax.objectives import labels

NO_LABEL = labels.NO_LABEL
Numbers: TypeAlias = range | np.ndarray  # of examples: a range of step 1, or int64 `[examples]`


class BadRecordError(UserError):
    """An example cannot be read; the message locates it as `Source.where` does."""


class MissingDataError(UserError):
    """A data set does not exist on this machine; the message says how to get it."""


class Example(TypedDict):
    """An image with its labels, as stored.

    Attributes:
      image: an encoded file (JPEG, PNG, ...), or pixels, uint8 `[height, width, 3]`.
      label: a class, or a sequence of classes; `NO_LABEL` or an empty sequence for an unlabelled image.
      file_name: the data set's name for the image, if it has one.
      exif_orientation: whether to apply the EXIF orientation by default. Absent: no, as in TensorFlow.
    """

    image: bytes | np.ndarray
    label: int | Sequence[int]
    file_name: NotRequired[str]
    exif_orientation: NotRequired[bool]


class Extent(NamedTuple):
    """Examples in one place, such as a file of records or the folder of a class.

    Attributes:
      place: identifies the place: equal for the same place, different for others.
      size: number of examples.
      numbers: returns the examples' numbers in that place, which do not change within a process.
    """

    place: str
    size: int
    numbers: Callable[[], Numbers]


class Source(Protocol):
    """A split of a data set, or a part of one, with random access. Images are not decoded.

    For `data.overlap`, a source made of others has a method `parts()` that returns them with the numbers of their
    examples, `[(source, numbers), ...]`. Any other source has `extents() -> list[Extent]`, with all examples in order.
    """

    @property
    def name(self) -> str:
        """The name of the data set, for messages."""

    @property
    def split(self) -> str:
        """The split as requested, e.g. "train" or "train[:90%]"."""

    @property
    def splits(self) -> Sequence[str]:
        """Names of the data set's splits."""

    @property
    def class_names(self) -> Sequence[str] | None:
        """Names by label; None if classes have numbers only."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None if neither the data nor a description beside them say."""

    @property
    def max_labels(self) -> int:
        """The largest number of labels of an example; 1 for single-label data."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Reads one example. Thread-safe.

        Raises:
          BadRecordError: the example cannot be read.
        """
        ...

    def fingerprint(self) -> str:
        """Changes with the list of examples, their order and the rule for labels, so that a run notices other data."""
        ...

    def where(self, index: int) -> str:
        """Locates an example for messages: the file, and the offset or member in it."""
        ...


def turns_images(source: Any) -> bool:
    """Whether any example of a source may set `exif_orientation`."""
    if hasattr(source, "parts") and not hasattr(source, "exif_orientation"):
        return any(turns_images(part) for part, _ in source.parts())
    return getattr(source, "exif_orientation", False)


def fingerprint_of(parts: Iterable[object]) -> str:
    """A short digest of what identifies a list of examples."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\n".encode(errors="surrogateescape"))  # file names need not be text
    return digest.hexdigest()[:16]


def reason_of(error: Exception) -> str:
    """The first line of an error's message, without the full stop."""
    text = error.args[0] if isinstance(error, KeyError) else error
    return (str(text).strip() or type(error).__name__).splitlines()[0].rstrip(".")
