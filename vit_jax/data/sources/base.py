"""What the pipeline asks of a data set."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NotRequired, Protocol, TypeAlias, TypedDict

import numpy as np

from vit_jax.errors import UserError
from vit_jax.objectives.labels import NO_LABEL

__all__ = [
    "NO_LABEL",
    "BadRecordError",
    "Example",
    "Extent",
    "MissingDataError",
    "Numbers",
    "Source",
    "fingerprint_of",
    "turns_images",
]

Numbers: TypeAlias = range | np.ndarray  # of examples: a range of step 1, or int64 `[examples]`


class BadRecordError(UserError):
    """An example that cannot be read; the message says which, by `Source.where`."""


class MissingDataError(UserError):
    """A data set that is not there; the message says how to get it."""


class Example(TypedDict):
    """An image with its labels, as a source stores it.

    Attributes:
      image: an encoded file (JPEG, PNG, ...), or decoded, uint8 `[height, width, 3]`.
      label: a class, a sequence of classes, or `NO_LABEL` or an empty sequence where there is none.
      file_name: what the data set calls the image, where it does.
      exif_orientation: whether an encoded image is turned as its EXIF says, unless the user says otherwise. Without it
        not, as in TensorFlow.
    """

    image: bytes | np.ndarray
    label: int | Sequence[int]
    file_name: NotRequired[str]
    exif_orientation: NotRequired[bool]


@dataclasses.dataclass(frozen=True)
class Extent:
    """Examples in one place, such as a file of records or the folder of a class.

    Attributes:
      place: names the place: the same place always has the same name, and another place another name.
      size: number of examples.
      numbers: makes their numbers in that place. The same example has the same number, within this process at least.
    """

    place: str
    size: int
    numbers: Callable[[], Numbers]


class Source(Protocol):
    """One split, or a part of one, of a data set; random access, and nothing decoded.

    For `data.overlap`, a source that consists of others has a method `parts()`, which gives them with the numbers of
    their examples, `[(source, numbers), ...]`; any other has `extents() -> list[Extent]`, all examples in order.
    """

    @property
    def name(self) -> str:
        """Where the data come from, for logs."""

    @property
    def split(self) -> str:
        """What was asked for, e.g. "train" or "train[:90%]"."""

    @property
    def splits(self) -> Sequence[str]:
        """Names of the splits the data set has."""

    @property
    def class_names(self) -> Sequence[str] | None:
        """By label; None where labels are mere numbers."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None if neither the data nor a description beside them say."""

    @property
    def max_labels(self) -> int:
        """The most labels an example may have; 1 for single-label data."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Reads one example. Called from several threads at once.

        Raises:
          BadRecordError: the example cannot be read.
        """
        ...

    def fingerprint(self) -> str:
        """Changes when the list of examples, their order or what labels are made of does.

        So that a run does not go on with other data.
        """
        ...

    def where(self, index: int) -> str:
        """The place of an example, for people: file, and offset or member where a file has several."""
        ...


def turns_images(source: Any) -> bool:
    """Whether examples of a source say `exif_orientation`; of a source that consists of others, of any of them."""
    if hasattr(source, "parts") and not hasattr(source, "exif_orientation"):
        return any(turns_images(part) for part, _ in source.parts())
    return getattr(source, "exif_orientation", False)


def fingerprint_of(parts: Iterable[object]) -> str:
    """A short digest of what identifies a list of examples."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\n".encode(errors="surrogateescape"))  # names of files need not be text
    return digest.hexdigest()[:16]
