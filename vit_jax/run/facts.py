"""Facts needed to use the parameters of a run, in its workdir as `facts.json`.

A run is used long after training, when its data set may have been renamed, reordered or deleted. So every start records
the class names, the loss, the preprocessing, and the training and evaluation examples. Code that uses a finished run
reads these facts, not the current data.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vit_jax.console import show_name, show_names
from vit_jax.data.sources import Example, MissingDataError, Source, absolute_dataset
from vit_jax.data.sources.base import NO_LABEL, fingerprint_of
from vit_jax.data.sources.splits import SlicedSource
from vit_jax.errors import UserError
from vit_jax.files import AnyPath, parse_path, write_atomically
from vit_jax.json_files import Fields, JsonError, read_object

logger = logging.getLogger(__name__)

FILE = "facts.json"
VERSION = 1
_SHOWN = 5  # classes in a message


@dataclasses.dataclass(frozen=True)
class SplitFacts:
    """The examples of a split, as they were when the run began.

    Attributes:
      dataset: its name in the config.
      place: absolute path of the data, valid in any working folder; None if they have no path.
      split: its name in the config.
      labels: file that replaces the data set's own labels (`data.eval_labels`), or None.
      num_images: number of examples.
      fingerprint: see `Source.fingerprint`.
      class_counts: examples of each class; None if that requires reading the data.
    """

    dataset: str
    place: str | None
    split: str
    labels: str | None
    num_images: int
    fingerprint: str
    class_counts: tuple[int, ...] | None = None

    @classmethod
    def of(cls, source: Source, dataset: str, split: str, labels: str | None = None) -> "SplitFacts":
        """Makes the facts of a split that was opened with these names."""
        place = absolute_dataset(dataset)
        return cls(dataset, place, split, labels, len(source), source.fingerprint(), _class_counts(source))

    def find(self) -> str:
        """The data set to open, from any working folder: its recorded path, or its name in the config."""
        return self.place if self.place and os.path.exists(self.place) else self.dataset

    def is_of(self, dataset: str, split: str, labels: str | None = None) -> bool:
        """Whether these names denote this split, even if its examples have changed."""
        same_place = self.place is not None and absolute_dataset(dataset) == self.place
        return (split, labels) == (self.split, self.labels) and (dataset in (self.dataset, self.place) or same_place)


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """The facts needed to use the parameters of a run without its data set.

    Attributes:
      num_classes: width of the logits.
      class_names: names of the logits, or of the first ones if the head has more; None if the data have no names.
      max_labels: the largest number of labels of an image.
      loss: "softmax" or "sigmoid".
      preprocessing: from an image to the model's input, as `Preprocessing.to_json` writes it.
      train: the training split.
      eval: the evaluation split, or None.
      eval_since: first step that was evaluated on `eval`; earlier accuracies were measured on other examples.
      version: version of the file's format.
    """

    num_classes: int
    class_names: tuple[str, ...] | None
    max_labels: int
    loss: str
    preprocessing: dict[str, Any]
    train: SplitFacts
    eval: SplitFacts | None
    eval_since: int = 0
    version: int = VERSION


def write_facts(workdir: AnyPath | str, facts: RunFacts) -> None:
    """Writes `facts.json` atomically."""
    write_atomically(parse_path(workdir) / FILE, json.dumps(dataclasses.asdict(facts)) + "\n")


def read_facts(workdir: AnyPath | str) -> RunFacts | None:
    """Reads `facts.json`; None if the run is older than that file.

    Raises:
      UserError: the file is damaged, or a newer version of this code wrote it.
    """
    path = parse_path(workdir) / FILE
    if not path.exists():
        return None
    try:
        return _parse(Fields(read_object(path), str(path)))
    except JsonError as error:
        raise UserError(f"{error} Or delete it, to use the run like one of an older version.") from error


def _parse(fields: Fields) -> RunFacts:
    if (version := fields.integer("version", at_least=1)) > VERSION:
        raise UserError(f"{fields.where} has version {version}; this code reads up to {VERSION}. Update vit_jax.")
    num_classes = fields.integer("num_classes", at_least=1)
    class_names = fields.texts("class_names", None)
    if class_names is not None and len(class_names) > num_classes:
        raise fields.error("class_names", f"at most {num_classes} names")
    return RunFacts(
        num_classes=num_classes,
        class_names=class_names,
        max_labels=fields.integer("max_labels", at_least=1),
        loss=fields.text("loss", choices=("softmax", "sigmoid")),
        preprocessing=fields.fields("preprocessing").values,
        train=_read_split(fields.fields("train")),
        eval=_read_split(fields.fields("eval")) if "eval" in fields else None,
        eval_since=fields.integer("eval_since", 0, at_least=0),
        version=version,
    )


def _read_split(fields: Fields) -> SplitFacts:
    return SplitFacts(
        dataset=fields.text("dataset"),
        place=fields.text("place", None),
        split=fields.text("split"),
        labels=fields.text("labels", None),
        num_images=fields.integer("num_images", at_least=0),
        fingerprint=fields.text("fingerprint"),
        class_counts=fields.integers("class_counts", None, at_least=0),
    )


def _class_counts(source: Source) -> tuple[int, ...] | None:
    labels = source.labels() if hasattr(source, "labels") else None
    if labels is None or source.num_classes is None:
        return None
    return tuple(np.bincount(labels[labels >= 0], minlength=source.num_classes).tolist())


def describe_class_changes(before: Sequence[str] | None, now: Sequence[str] | None) -> str | None:
    """Describes how the current classes differ from a run's; None if they are the same, or if one side has no names."""
    if before is None or now is None or list(before) == list(now):
        return None
    gone, new = sorted(set(before) - set(now)), sorted(set(now) - set(before))
    if not gone and not new:
        return f"the same {len(before)} classes in another order: {show_names(now, _SHOWN)}"
    parts = [f"{len(before)} classes then, {len(now)} now"] if len(before) != len(now) else []
    parts += [f"no longer there: {show_names(gone, _SHOWN)}"] if gone else []
    parts += [f"new: {show_names(new, _SHOWN)}"] if new else []
    return "; ".join(parts)


def describe_split_changes(before: SplitFacts, source: Source, class_names: Sequence[str] | None) -> str | None:
    """Describes how the current examples of a split differ from a run's, whose classes had `class_names`."""
    if source.fingerprint() == before.fingerprint:
        return None
    counts, counts_now, num_images = "", _class_counts(source), len(source)
    if before.class_counts and counts_now and class_names and source.class_names:
        then = dict(zip(class_names, before.class_counts, strict=False))
        today = dict(zip(source.class_names, counts_now, strict=False))
        differing = [name for name in then if name in today and then[name] != today[name]]
        shown = [f"{show_name(name)} had {then[name]} and has {today[name]}" for name in differing[:_SHOWN]]
        counts = f" ({', '.join(shown)})" if shown else ""
    if num_images != before.num_images:
        return f"{before.num_images:,} images then, {num_images:,} now{counts}"
    return f"{before.num_images:,} images, but others or of other names{counts}"


def open_as_trained(
    open_with: Callable[[Sequence[str] | None], Source],
    class_names: Sequence[str] | None,
    kept: SplitFacts | None,
    *,
    what: str,
    allow_change: bool = False,
) -> Source:
    """Opens examples with a head's labels; refuses data that have changed since the head was trained.

    Args:
      open_with: opens the current examples, given the class names in label order (see `open_source`).
      class_names: class names of the head; None if unknown.
      kept: the run's facts about the split, or None.
      what: the run, for messages.
      allow_change: use the current examples, and match labels by class name.

    Raises:
      UserError: as in `open_with`; classes or examples have changed, and `allow_change` is False; or they have no class
        in common.
    """
    try:
        source = open_with(class_names)
    except MissingDataError:
        raise
    except UserError:
        if class_names is None:
            raise
        source = open_with(None)  # if there are other classes, they are compared below
        if describe_class_changes(class_names, source.class_names) is None:
            raise
    changes = []
    classes = describe_class_changes(class_names, source.class_names)
    if classes:
        changes.append(f"  classes: {classes}")
    if kept and (examples := describe_split_changes(kept, source, class_names)):
        part = ". Images that were trained on may be among them" if "[" in kept.split else ""
        changes.append(f"  {kept.split}: {examples}{part}")
    if not changes:
        return source
    found = f"{source.name} has changed since {what} was trained:\n" + "\n".join(changes)
    if not allow_change:
        raise UserError(
            f"{found}\nRestore the data, or pass --allow_data_change to use the current data (labels are then matched "
            "by class name)."
        )
    logger.warning("%s", found)
    if not classes or class_names is None:
        return source
    matched = MatchedByName(source, class_names)
    if matched.unknown:
        count = matched.count_unknown()
        logger.warning(
            "%s of classes that the head does not know are left out: %s",
            "images" if count is None else f"{count:,} images",
            show_names(matched.unknown, _SHOWN),
        )
    return matched


class MatchedByName(SlicedSource):
    """A source whose labels are mapped to a head's by class name.

    Images of classes that the head does not know have no label.
    """

    def __init__(self, source: Source, class_names: Sequence[str]):
        """Matches the source's classes with those of the head; raises `UserError` if they have none in common."""
        super().__init__([(source, range(len(source)))], source.split)
        own = list(source.class_names or ())
        labels = {name: label for label, name in enumerate(class_names)}
        self._labels = np.array([labels.get(name, NO_LABEL) for name in own])
        self.unknown = tuple(name for name in own if name not in labels)
        if len(self.unknown) == len(own):
            raise UserError(
                f"no class of {source.name} ({show_names(own, _SHOWN)}) is among those that the head was trained on "
                f"({show_names(class_names, _SHOWN)}). Restore the names of the folders, or evaluate other data."
            )
        self._source = source
        self.class_names, self.num_classes = list(class_names), len(class_names)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        given = example["label"]
        if isinstance(given, int | np.integer):
            return {**example, "label": self._match(int(given))}
        matched = (self._match(int(label)) for label in given)
        return {**example, "label": [label for label in matched if label != NO_LABEL]}

    def _match(self, label: int) -> int:
        return NO_LABEL if label < 0 else int(self._labels[label])

    def labels(self) -> np.ndarray | None:
        """The labels of all examples, int64 `[examples]`; None if that requires reading them."""
        known = super().labels()
        return None if known is None else np.where(known < 0, NO_LABEL, self._labels[known])

    def count_unknown(self) -> int | None:
        """Number of examples of classes that the head does not know; None if that requires reading them."""
        known = self.labels()
        return None if known is None else int(np.sum(known == NO_LABEL))

    def fingerprint(self) -> str:
        """Changes with the source and with the mapping of labels."""
        return fingerprint_of([self._source.fingerprint(), *self._labels.tolist()])
