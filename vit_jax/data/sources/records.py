"""Reads records of `tf.train.Example` as a source of labelled images, without TensorFlow."""

import bisect
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from vit_jax.data.sources.array_record import ArrayRecordFiles
from vit_jax.data.sources.base import NO_LABEL, BadRecordError, Example, Extent, fingerprint_of, reason_of
from vit_jax.data.sources.tfrecord import TFRecordFiles
from vit_jax.errors import UserError
from vit_jax.json_files import Fields, read_object

IMAGE_KEYS = ("image", "image/encoded", "jpg", "jpeg", "png", "image_bytes", "encoded")
LABEL_KEYS = ("label", "labels", "image/class/label", "cls", "class", "label_ids")
FILE_NAME_KEYS = ("file_name", "filename", "image/filename", "image/file_name", "__key__", "key")

RecordFiles: TypeAlias = TFRecordFiles | ArrayRecordFiles
FORMATS: dict[str, type[TFRecordFiles] | type[ArrayRecordFiles]] = {
    "array_record": ArrayRecordFiles,
    "tfrecord": TFRecordFiles,
}

Features: TypeAlias = Mapping[str, Sequence[Any]]
"""The values of a record's features by name, flat."""

Range: TypeAlias = tuple[str, int, int]
"""A range of records of a file: its path, the first record, the last plus one."""


class ExampleKeys(NamedTuple):
    """The features of an example's parts.

    Attributes:
      image: the feature with the encoded image.
      label: the feature with one or more label ids, or a function that derives the label from the features and raises
        KeyError or ValueError if it cannot. None: no labels.
      file_name: the feature with the data set's name for the image, if any.
    """

    image: str
    label: str | Callable[[Features], int] | None
    file_name: str | None


class RecordSource:
    """Records of `tf.train.Example`: an encoded image and its labels."""

    def __init__(
        self,
        files: RecordFiles,
        ranges: Sequence[Range],
        keys: ExampleKeys,
        *,
        name: str,
        split: str,
        splits: Sequence[str],
        class_names: Sequence[str] | None,
        num_classes: int | None,
        max_labels: int,
        all_labelled: bool = False,
        derive_image: Callable[[bytes], np.ndarray] | None = None,
        exif_orientation: bool = False,
    ):
        """Reads nothing.

        Args:
          files: the files.
          ranges: the records, in order.
          keys: the features of image and labels. Functions must be a module's, so that they can be pickled.
          name: see `Source`, as for `split`, `splits` and `class_names`.
          split: as `name`.
          splits: as `name`.
          class_names: as `name`.
          num_classes: labels must be less; None: unknown.
          max_labels: the largest number of labels of an example. If 1, labels are numbers, otherwise lists.
          all_labelled: whether an unlabelled example is an error.
          derive_image: makes pixels, uint8 `[height, width, 3]`, from an encoded image that needs more than decoding.
          exif_orientation: see `Example`.
        """
        self._files, self._ranges, self._keys = files, list(ranges), keys
        self._ends = list(itertools.accumulate(last - first for _, first, last in ranges))
        self._sizes = [os.path.getsize(path) for path, _, _ in ranges]
        self.name, self.split, self.splits = name, split, list(splits)
        self.class_names, self.num_classes, self.max_labels = class_names, num_classes, max_labels
        self.exif_orientation = exif_orientation
        self._all_labelled, self._derive_image = all_labelled, derive_image

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        """See `Source`. A label that breaks a rule of the data set is a UserError, not a BadRecordError."""
        path, record = self._locate(index)
        try:
            features = parse_example(self._files.read(path, record))
            image = _first_bytes(features, self._keys.image)
        except UserError:
            raise
        except Exception as error:  # readers raise many kinds of errors for damaged files
            raise BadRecordError(f"cannot read {self.where(index)}: {reason_of(error)}.") from error
        labels = self._labels(features, index)
        example: Example = {"image": image, "label": labels}
        if self.exif_orientation:
            example["exif_orientation"] = True
        if self._derive_image is not None:
            try:
                example["image"] = self._derive_image(image)
            except UserError as error:
                raise BadRecordError(f"cannot read {self.where(index)}: {reason_of(error)}.") from error
        if self.max_labels == 1:
            example["label"] = labels[0] if labels else NO_LABEL
        if self._keys.file_name and self._keys.file_name in features:
            example["file_name"] = _first_bytes(features, self._keys.file_name).decode(errors="replace")
        return example

    def fingerprint(self) -> str:
        """Changes with names and sizes of the files, the ranges, and the origin of image and label.

        It does not change with the folder.
        """
        label = self._keys.label
        rules = [getattr(rule, "__qualname__", None) for rule in (label, self._derive_image)]
        files = (
            f"{pathlib.PurePath(path).name} {size} [{first}:{last}]"
            for (path, first, last), size in zip(self._ranges, self._sizes, strict=True)
        )
        return fingerprint_of([*files, self._keys.image, None if callable(label) else label, *rules])

    def extents(self) -> list[Extent]:
        """The ranges of records of each file."""
        paths = {path: os.path.realpath(path) for path, _, _ in self._ranges}
        return [
            Extent(paths[path], last - first, functools.partial(range, first, last))
            for path, first, last in self._ranges
        ]

    def where(self, index: int) -> str:
        """Describes the record and its file, with the offset if the format has one."""
        return self._files.where(*self._locate(index))

    def _locate(self, index: int) -> tuple[str, int]:
        index = range(len(self))[index]
        number = bisect.bisect_right(self._ends, index)
        path, _, last = self._ranges[number]
        return path, last + index - self._ends[number]

    def _labels(self, features: Mapping[str, Any], index: int) -> list[int]:
        key = self._keys.label
        if callable(key):
            labels = [self._derive_label(key, features, index)]
        else:
            values = features[key].int64_list.value if key is not None and key in features else ()
            labels = [label for label in dict.fromkeys(values) if label != NO_LABEL]
        if self._all_labelled and not labels:
            raise UserError(
                f"{self.where(index)} has no label: its {key!r} is missing, empty or {NO_LABEL}, but all images of "
                "this data set should have one. Copy or prepare it again."
            )
        if len(labels) > self.max_labels:
            raise UserError(
                f"{self.where(index)} has {len(labels)} labels, but data.max_labels is {self.max_labels}. Set it to "
                "the largest number of labels of an image in this data set."
            )
        for label in labels:
            if label < 0 or (self.num_classes is not None and label >= self.num_classes):
                count = f" of {self.num_classes} classes" if self.num_classes is not None else ""
                raise UserError(
                    f"{self.where(index)} has label {label}, but labels{count} count from 0 to the number of classes "
                    "less one. Correct the data or the number of classes."
                )
        return labels

    def _derive_label(self, derive: Callable[[Features], int], features: Mapping[str, Any], index: int) -> int:
        values = {name: _values(feature) for name, feature in features.items()}
        try:
            return derive(values)
        except KeyError as error:
            raise UserError(
                f"{self.where(index)} lacks the feature {error} that its label is derived from. It has "
                f"{', '.join(sorted(values)) or 'no features'}: this is another data set, or another version of it."
            ) from error
        except ValueError as error:
            raise UserError(f"cannot derive a label for {self.where(index)}: {reason_of(error)}.") from error


def parse_example(serialized: bytes) -> Mapping[str, Any]:
    """The features of a serialized `tf.train.Example` by name; raises google.protobuf's DecodeError."""
    from tensorflow_datasets.proto import tf_example_pb2  # without TensorFlow, in a third of a second

    return tf_example_pb2.Example.FromString(serialized).features.feature


def _values(feature: Any) -> Sequence[Any]:
    kind = feature.WhichOneof("kind")
    return getattr(feature, kind).value if kind else ()


def _first_bytes(features: Mapping[str, Any], key: str) -> bytes:
    if key not in features or not (values := features[key].bytes_list.value):
        raise KeyError(f"it has no bytes under {key!r}; its features are {', '.join(sorted(features)) or 'none'}")
    return values[0]


class ManifestFacts(NamedTuple):
    """Facts from the `manifest.json` that `vit_jax.data.prepare` writes beside records."""

    max_labels: int | None = None  # the largest number of an image; None if unknown
    exif_orientation: bool = False  # whether to apply it


def read_manifest_facts(folder: pathlib.Path) -> ManifestFacts:
    """Reads `manifest.json` in a folder, if it exists; raises UserError if it is damaged."""
    path = folder / "manifest.json"
    if not path.exists():
        return ManifestFacts()
    fields = Fields(read_object(path), str(path))
    return ManifestFacts(fields.integer("max_labels", None, at_least=1), fields.flag("exif_orientation", False))
