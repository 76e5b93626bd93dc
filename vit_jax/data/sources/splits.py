"""The syntax of splits for all sources, which is TFDS's: "train[:90%]", "train[25600:51200]", "train[:800]+validation".

TFDS itself resolves slices, so they have the same examples as in any other program that uses it.
"""

import bisect
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vit_jax.console import show_names
from vit_jax.data.permutation import permutation
from vit_jax.data.sources.base import Example, Numbers, Source, fingerprint_of
from vit_jax.errors import UserError, unknown_name

ALL = "all"
_ROLES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_ALIAS = "_all"  # for a split called "all", which in TFDS is the sum of all splits
_EXAMPLES = "Slices are written as in 'train[:90%]', 'train[1000:2000]', 'train[-10%:]', 'train[:800]+validation'"


def split_role(name: str) -> str | None:
    """The usual role of a split by its name: "train", "validation" or "test"; None for other names."""
    return _ROLES.get(name.casefold())


def for_testing(spec: str) -> bool:
    """Whether all splits in a sum of splits and slices are for testing or validation, by their names."""
    return all(split_role(term.split("[")[0].strip()) in ("test", "validation") for term in spec.split("+"))


class Part(NamedTuple):
    """Examples `start` to `stop` (exclusive) of a split."""

    split: str
    start: int
    stop: int


def resolve(
    spec: str, splits: Sequence[str], shard_lengths: Callable[[str], Sequence[int]], *, data_set: str
) -> list[Part]:
    """Resolves slices and sums of splits.

    Args:
      spec: e.g. "train", "train[:90%]", "train[:2shard]", "train+validation", or "all" for the sum of all splits.
      splits: names of all splits.
      shard_lengths: returns the number of examples in each file of a split; called only for splits that `spec` names.
      data_set: for messages.

    Returns:
      the parts, in the order given, none of them empty. Percentages are rounded to the nearest example.

    Raises:
      UserError: unknown split, a slice that is empty or exceeds the split, or wrong syntax.
    """
    terms = [spec] if spec in splits else [term.strip() for term in spec.split("+")]
    if terms == [ALL] and ALL not in splits:
        terms = list(splits)
    names = [term if term in splits else term.split("[")[0] for term in terms]
    for name, term in zip(names, terms, strict=True):
        if name == ALL and name not in splits:
            raise UserError(
                f"cannot take {term!r} of {data_set}: 'all' cannot be sliced or added. Name the splits: "
                f"{'+'.join(f'{split}[:90%]' for split in splits)}."
            )
        if name not in splits:
            raise unknown_name(f"split of {data_set}", name, splits)
    lengths = {name: shard_lengths(name) for name in names}
    parts = []
    for name, term in zip(names, terms, strict=True):
        for part in _resolve_term(name, term, lengths[name], data_set):
            if part.start >= part.stop:
                raise UserError(
                    f"split {term!r} of {data_set} is empty: it is [{part.start}:{part.stop}] of {part.split}."
                )
            parts.append(part)
    return parts


def _resolve_term(name: str, term: str, lengths: Sequence[int], data_set: str) -> Iterator[Part]:
    total = sum(lengths)
    if term == name:
        yield Part(name, 0, total)
        return
    import tensorflow_datasets as tfds  # takes a third of a second, and most runs need no slices

    alias = _ALIAS if name == ALL else name
    try:
        info = tfds.core.splits.SplitInfo(name=alias, shard_lengths=list(lengths), num_bytes=0)
        instruction = tfds.core.ReadInstruction.from_spec(alias + term.removeprefix(name))
        for one in instruction.to_absolute({alias: info}):
            yield Part(name, one.from_ or 0, total if one.to is None else one.to)
    except (ValueError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[-1].replace(alias, name).rstrip(".")
        raise UserError(f"cannot take {term!r} of {data_set} ({total} examples): {reason}.\n{_EXAMPLES}.") from error


def shard_ranges(lengths: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Cuts examples `start` to `stop` of consecutive files into pieces: (file, first example, last + 1)."""
    first = 0
    for shard, length in enumerate(lengths):
        low, high = max(start - first, 0), min(stop - first, length)
        if low < high:
            yield shard, low, high
        first += length


class SlicedSource:
    """A source made of slices of sources, one after the other."""

    def __init__(self, parts: Sequence[tuple[Source, Numbers]], split: str):
        """Keeps the sources; reads nothing.

        Args:
          parts: sources of one data set, each with the numbers of the examples to take.
          split: the split as requested.

        Raises:
          UserError: the sources have different classes, so that a label would not mean the same in all.
        """
        first = parts[0][0]
        for source, _ in parts:
            if (source.num_classes, list(source.class_names or ())) != (
                first.num_classes,
                list(first.class_names or ()),
            ):
                raise UserError(
                    f"{first.split!r} of {first.name} and {source.split!r} of {source.name} have different classes "
                    f"({first.num_classes} and {source.num_classes}), so labels would not mean the same. Prepare both "
                    "with one list of classes."
                )
        self._parts = list(parts)
        self._ends = list(itertools.accumulate(len(examples) for _, examples in parts))
        self.name, self.split, self.splits = first.name, split, first.splits
        self.class_names, self.num_classes = first.class_names, first.num_classes
        self.max_labels = max(source.max_labels for source, _ in parts)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        source, inner = self._locate(index)
        return source[inner]

    def parts(self) -> list[tuple[Source, Numbers]]:
        """The sources, each with the numbers of the examples taken from it."""
        return self._parts

    def labels(self) -> np.ndarray | None:
        """The labels of all examples, int64 `[examples]`; None if they would have to be read."""
        parts = []
        for source, examples in self._parts:
            known = source.labels() if hasattr(source, "labels") else None
            if known is None:
                return None
            parts.append(known[np.asarray(examples)])
        return np.concatenate(parts)

    def fingerprint(self) -> str:
        """Changes with the sources and with the slices."""
        return fingerprint_of(
            f"{source.fingerprint()}[{examples.start}:{examples.stop}]"
            if isinstance(examples, range)
            else f"{source.fingerprint()}{examples.size}:{zlib.crc32(examples.tobytes())}"
            for source, examples in self._parts
        )

    def where(self, index: int) -> str:
        """See `Source`."""
        source, inner = self._locate(index)
        return source.where(inner)

    def _locate(self, index: int) -> tuple[Source, int]:
        index = range(len(self))[index]
        number = bisect.bisect_right(self._ends, index)
        source, examples = self._parts[number]
        return source, int(examples[index - self._ends[number]])  # counted from the end of the part


def open_parts(
    spec: str,
    open_split: Callable[[str], Source],
    splits: Callable[[], Sequence[str]],
    *,
    data_set: str,
    mixed: bool = True,
    open_term: Callable[[str], Source] | None = None,
) -> Source:
    """Opens slices and sums of splits, with a function that opens whole splits.

    Args:
      spec: see `resolve`.
      open_split: opens a split by name, and raises the error for an unknown name.
      splits: lists the splits; called only for "all".
      data_set: for messages.
      mixed: whether examples of different classes are mixed. If they are sorted by class, slices are taken from a fixed
        permutation, so that each is a random sample of its split.
      open_term: opens one of several splits that are added, which may lack classes of another. None: `open_split`.

    Raises:
      UserError: see `resolve`; or an added split has classes that the others lack.
    """
    if not any(character in spec for character in "[+") and spec != ALL:
        return open_split(spec)
    names = list(dict.fromkeys(term.split("[")[0].strip() for term in spec.split("+")))
    if ALL in names:
        names = list(splits())
    if len(names) > 1 and open_term is not None:
        opened = same_classes({name: open_term(name) for name in names}, data_set)
    else:
        opened = {name: open_split(name) for name in names}

    def examples(part: Part) -> Numbers:
        length = len(opened[part.split])
        if mixed or (part.start, part.stop) == (0, length):
            return range(part.start, part.stop)
        return permutation(length, 0)[part.start : part.stop]

    parts = resolve(spec, names, lambda name: [len(opened[name])], data_set=data_set)
    return SlicedSource([(opened[part.split], examples(part)) for part in parts], spec)


def same_classes(opened: Mapping[str, Any], data_set: str) -> dict[str, Any]:
    """Gives all splits of class folders the classes of the training split, or else of the split with the most classes.

    Args:
      opened: an `ImageFolderSource` for each split by name. They may lack classes, or have empty ones.
      data_set: for messages.

    Raises:
      UserError: a split has a class that the chosen one lacks, or a class has no images in any split.
    """
    first = next((name for name in opened if split_role(name) == "train"), None)
    if first is None:
        first = max(opened, key=lambda name: len(opened[name].class_names or ()))
    class_names = opened[first].class_names or ()
    for source in opened.values():
        if unknown := [name for name in source.class_names or () if name not in class_names]:
            raise UserError(
                f"splits {first!r} and {source.split!r} of {data_set} have different classes, so a label would not "
                f"mean the same in both: {source.split!r} has {show_names(unknown)}, {first!r} does not. Are the class "
                "folders named alike?"
            )
    result = {name: source.with_classes(class_names) for name, source in opened.items()}
    if not all(map(for_testing, opened)):
        check_no_class_is_empty(np.concatenate([source.labels() for source in result.values()]), class_names, data_set)
    return result


def classes_without_images(labels: np.ndarray, class_names: Sequence[str]) -> list[str]:
    """Names of the classes that are not among the labels."""
    counts = np.bincount(labels, minlength=len(class_names))
    return [class_names[label] for label in np.flatnonzero(counts == 0).tolist()]


def check_no_class_is_empty(labels: np.ndarray, class_names: Sequence[str], where: str) -> None:
    """Raises UserError if a class has no images."""
    if empty := classes_without_images(labels, class_names):
        raise UserError(f"{where} has classes without images: {show_names(empty)}. Add images or remove the folders.")
