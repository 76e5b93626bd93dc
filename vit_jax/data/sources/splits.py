"""One syntax of splits for all sources, that of TFDS: "train[:90%]", "train[25600:51200]", "train[:800]+validation".

Slices are resolved by TFDS itself, so that they hold the same examples here as in any other program that uses it.
"""

import bisect
import dataclasses
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

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
_ALIAS = "_all"  # of a split that is called "all", which to TFDS means the sum of all splits
_EXAMPLES = "Slices are written as in 'train[:90%]', 'train[1000:2000]', 'train[-10%:]', 'train[:800]+validation'"


def split_role(name: str) -> str | None:
    """What a split of this name is usually for, "train", "validation" or "test", in any case; None of other names."""
    return _ROLES.get(name.casefold())


def for_testing(spec: str) -> bool:
    """Whether all splits in a sum of splits and slices are for testing or validation, by their names."""
    return all(split_role(term.split("[")[0].strip()) in ("test", "validation") for term in spec.split("+"))


@dataclasses.dataclass(frozen=True)
class Part:
    """Examples `start` to `stop` (exclusive) of a split."""

    split: str
    start: int
    stop: int


def resolve(
    spec: str, splits: Sequence[str], shard_lengths: Callable[[str], Sequence[int]], *, data_set: str
) -> list[Part]:
    """Turns a split with slices and sums into the examples it stands for.

    Args:
      spec: e.g. "train", "train[:90%]", "train[:2shard]", "train+validation", or "all" for the sum of all splits.
      splits: names of all splits.
      shard_lengths: gives the number of examples in each file of a split; asked only of the splits that `spec` names.
      data_set: for messages.

    Returns:
      the parts, in the order given, none of them empty. Percentages are rounded to the nearest example.

    Raises:
      UserError: unknown split, a slice that is empty or beyond the split, or not a slice at all.
    """
    if spec in splits:
        return [_checked(Part(spec, 0, sum(shard_lengths(spec))), spec, data_set)]
    terms = [term.strip() for term in spec.split("+")]
    if terms == [ALL]:
        terms = list(splits)
    names = [term.split("[")[0] for term in terms]
    for name, term in zip(names, terms, strict=True):
        if name == ALL and name not in splits:
            raise UserError(
                f"cannot take {term!r} of {data_set}: 'all' stands alone. Name the splits: "
                f"{'+'.join(f'{split}[:90%]' for split in splits)}."
            )
        if name not in splits:
            raise unknown_name(f"split of {data_set}", name, splits)
    lengths = {name: shard_lengths(name) for name in dict.fromkeys(names)}
    return [
        _checked(part, term, data_set)
        for name, term in zip(names, terms, strict=True)
        for part in _absolute(name, term, lengths, data_set)
    ]


def _absolute(name: str, term: str, lengths: Mapping[str, Sequence[int]], data_set: str) -> Iterator[Part]:
    if term == name:
        yield Part(name, 0, sum(lengths[name]))
        return
    import tensorflow_datasets as tfds  # takes a third of a second, and most runs need no slices

    alias = _ALIAS if name == ALL else name
    total = sum(lengths[name])
    try:
        info = tfds.core.splits.SplitInfo(name=alias, shard_lengths=list(lengths[name]), num_bytes=0)
        instruction = tfds.core.ReadInstruction.from_spec(alias + term.removeprefix(name))
        for one in instruction.to_absolute({alias: info}):
            yield Part(name, one.from_ or 0, total if one.to is None else one.to)
    except (ValueError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[-1].replace(alias, name).rstrip(".")
        raise UserError(f"cannot take {term!r} of {data_set} ({total} examples): {reason}.\n{_EXAMPLES}.") from error


def _checked(part: Part, term: str, data_set: str) -> Part:
    if part.start >= part.stop:
        raise UserError(f"split {term!r} of {data_set} is empty: it is [{part.start}:{part.stop}] of {part.split}.")
    return part


def shard_ranges(shard_lengths: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Which examples of which files are those from `start` to `stop` of a split: (file, first, last + 1)."""
    first = 0
    for shard, length in enumerate(shard_lengths):
        low, high = max(start - first, 0), min(stop - first, length)
        if low < high:
            yield shard, low, high
        first += length


class SlicedSource:
    """Slices of sources, one after the other, as one source."""

    def __init__(self, parts: Sequence[tuple[Source, Numbers]], split: str):
        """Keeps the sources; reads nothing.

        Args:
          parts: sources of one data set, each with the numbers of the examples that are taken.
          split: what was asked for.

        Raises:
          UserError: the sources do not have the same classes, so that a label would not mean the same in all.
        """
        first = parts[0][0]
        for source, _ in parts:
            if (source.num_classes, source.class_names) != (first.num_classes, first.class_names):
                raise UserError(
                    f"splits {first.split!r} and {source.split!r} of {first.name} have different classes, so they "
                    f"cannot be added up as {split!r}."
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
        """The sources, each with the numbers of the examples that are taken."""
        return self._parts

    def labels(self) -> np.ndarray | None:
        """The labels of all examples, int64 `[examples]`, if the sources know them without reading; otherwise None."""
        parts = []
        for source, examples in self._parts:
            known = source.labels() if hasattr(source, "labels") else None
            if known is None:
                return None
            parts.append(known[np.asarray(examples)])
        return np.concatenate(parts)

    def with_classes(self, class_names: Sequence[str]) -> "SlicedSource":
        """The same examples with labels that count these classes, by name; see `with_classes`."""
        return SlicedSource([(with_classes(source, class_names), taken) for source, taken in self._parts], self.split)

    def fingerprint(self) -> str:
        """Changes with the sources and with the slices."""
        return fingerprint_of(
            f"{source.fingerprint()}[{examples.start}:{examples.stop}]"
            if isinstance(examples, range)
            else f"{source.fingerprint()}{examples.size}:{zlib.crc32(examples.tobytes())}"
            for source, examples in self._parts
        )

    def where(self, index: int) -> str:
        """As the source says that has the example."""
        source, inner = self._locate(index)
        return source.where(inner)

    def _locate(self, index: int) -> tuple[Source, int]:
        index = range(len(self))[index]
        number = bisect.bisect_right(self._ends, index)
        source, examples = self._parts[number]
        return source, int(examples[index - self._ends[number]])  # counted from its end


def with_classes(source: Source, class_names: Sequence[str]) -> Source:
    """The source with labels that count these classes, by name, if it is made of folders of classes.

    Any other source has the classes of its data set in all splits, and is returned as it is.

    Raises:
      UserError: it has images of other classes.
    """
    if list(source.class_names or ()) == list(class_names) or not hasattr(source, "with_classes"):
        return source
    return source.with_classes(class_names)


def open_parts(
    spec: str,
    open_split: Callable[[str], Source],
    splits: Callable[[], Sequence[str]],
    *,
    data_set: str,
    mixed: bool = True,
    open_term: Callable[[str], Source] | None = None,
) -> Source:
    """Opens a split with slices and sums of a data set that can only open whole splits.

    Args:
      spec: see `resolve`.
      open_split: opens the split of that name; the error for an unknown one is its affair.
      splits: lists the splits; called for "all" only.
      data_set: for messages.
      mixed: whether examples lie in no particular order. If not, such as class by class, slices are those of a fixed
        permutation, so that each is a random sample of its split.
      open_term: opens one of several splits that are added up; it may lack classes that another has. None: as
        `open_split`.

    Raises:
      UserError: see `resolve`; an added split has classes that the others do not have.
    """
    if not any(character in spec for character in "[+") and spec != ALL:
        return open_split(spec)
    names = list(dict.fromkeys(term.split("[")[0].strip() for term in spec.split("+")))
    if ALL in names:
        names = list(splits())
    several = len(names) > 1 and open_term is not None
    # Opening says which splits there are, if there is none of that name.
    opened = {name: (open_term if several and open_term else open_split)(name) for name in names}
    if several:
        opened = same_classes(opened, data_set)
    open_once = opened.__getitem__
    parts = resolve(spec, names, lambda name: [len(open_once(name))], data_set=data_set)

    def examples(part: Part) -> Numbers:
        length = len(open_once(part.split))
        if mixed or (part.start, part.stop) == (0, length):
            return range(part.start, part.stop)
        return permutation(length, 0)[part.start : part.stop]

    return SlicedSource([(open_once(part.split), examples(part)) for part in parts], spec)


def same_classes(opened: Mapping[str, Any], data_set: str) -> dict[str, Any]:
    """The same splits with the classes of the one to train on, else of the one that has most.

    Args:
      opened: splits of a data set of folders, by name. They may lack classes, or have empty ones.
      data_set: for messages.

    Raises:
      UserError: a split has a class that the others do not have, or a class has no images in any split.
    """
    first = next((name for name in opened if split_role(name) == "train"), None)
    if first is None:
        first = max(opened, key=lambda name: len(opened[name].class_names or ()))
    class_names = opened[first].class_names or ()
    for source in opened.values():
        if unknown := [name for name in source.class_names or () if name not in class_names]:
            raise UserError(
                f"splits {first!r} and {source.split!r} of {data_set} have different classes, so a label would not "
                f"mean the same in both: {source.split!r} has {show_names(unknown)} alone. Are the names of the class "
                "folders the same?"
            )
    result: dict[str, Any] = {name: with_classes(source, class_names) for name, source in opened.items()}
    counts = [np.bincount(source.labels(), minlength=len(class_names)) for source in result.values()]
    empty = [class_names[label] for label in np.flatnonzero(np.sum(counts, axis=0) == 0).tolist()]
    if empty and not all(map(for_testing, opened)):
        raise UserError(
            f"{data_set} has classes without images: {show_names(empty)}. Add images or remove the folders."
        )
    return result
