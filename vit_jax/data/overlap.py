"""Counts the examples that two sources have in common, without reading any.

An example is identified by its place: a file of records and a number in it, a folder and a file name, or a zip file and
an offset. This resolves links, relative paths, slices, sums and mixtures. It does not notice copies of images in
another file, folder or zip file.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from vit_jax.data.sources.base import Extent, Numbers, Source
from vit_jax.errors import UserError


class Places:
    """The places of the examples of some sources, to search for the examples of others."""

    def __init__(self, *sources: Source):
        """Reads no example."""
        self._extents: dict[str, list[Extent]] = defaultdict(list)
        for source in sources:
            for extent in _extents(source, range(len(source))):
                self._extents[extent.place].append(extent)

    def count(self, tested: Source) -> int:
        """Counts the examples of a source that are in these places, each as often as it occurs."""
        return sum(
            _count_members(extent.numbers(), [each.numbers() for each in self._extents[extent.place]])
            for extent in _extents(tested, range(len(tested)))
            if extent.place in self._extents
        )


def count_shared(tested: Source, *others: Source) -> int:
    """Counts the examples that a source shares with others; see `Places.count`."""
    return Places(*others).count(tested)


def check_disjoint(tested: Source, its_role: str, other: Source, other_role: str, advice: str) -> None:
    """Checks that two sources have no example in common.

    Args:
      tested: a source.
      its_role: the purpose of its examples, such as "to test on", for the message.
      other: another source.
      other_role: the purpose of its examples.
      advice: ends the message.

    Raises:
      UserError: they have examples in common; says how many.
    """
    if shared := count_shared(tested, other):
        raise UserError(
            f"{shown(tested)}, {its_role}, shares {shared:,} of its {len(tested):,} examples with {shown(other)}, "
            f"{other_role}. {advice}"
        )


def shown(source: Source) -> str:
    """A source in messages: its split and its data set."""
    return f"{source.split!r} of {source.name}"


def _extents(source: Source, examples: Numbers) -> Iterator[Extent]:
    """The places of the examples with these numbers, in any order."""
    if hasattr(source, "parts"):
        parts = source.parts()
        for number, inside in _split(examples, [len(numbers) for _, numbers in parts]):
            inner, numbers = parts[number]
            yield from _extents(inner, _take(numbers, inside))
    elif hasattr(source, "extents"):
        extents = source.extents()
        for number, inside in _split(examples, [extent.size for extent in extents]):
            yield _part_of(extents[number], inside)
    else:  # a source of another class, which is compared as a whole
        yield Extent(f"{source.name} {source.fingerprint()}", len(examples), lambda: examples)


def _split(examples: Numbers, sizes: list[int]) -> Iterator[tuple[int, Numbers]]:
    """Distributes numbers of examples over consecutive parts: yields each part's number, and the numbers within it."""
    starts = np.array([0, *itertools.accumulate(sizes)])
    if isinstance(examples, range):
        for number, (start, stop) in enumerate(itertools.pairwise(starts.tolist())):
            low, high = max(start, examples.start), min(stop, examples.stop)
            if low < high:
                yield number, range(low - start, high - start)
        return
    owners = np.searchsorted(starts, examples, side="right") - 1
    order = np.argsort(owners, kind="stable")
    found, firsts = np.unique(owners[order], return_index=True)
    for number, mine in zip(found.tolist(), np.split(order, firsts[1:]), strict=True):
        yield number, examples[mine] - starts[number]


def _take(numbers: Numbers, inside: Numbers) -> Numbers:
    if isinstance(inside, range):
        return numbers[inside.start : inside.stop]
    return numbers.start + inside if isinstance(numbers, range) else numbers[inside]


def _part_of(extent: Extent, inside: Numbers) -> Extent:
    return Extent(extent.place, len(inside), lambda: _take(extent.numbers(), inside))


def _count_members(numbers: Numbers, others: list[Numbers]) -> int:
    """Counts the numbers that are in any of `others`."""
    wanted = np.asarray(numbers)
    is_member = np.zeros(len(wanted), bool)
    for other in others:
        if isinstance(other, range):  # not made an array: training data may have hundreds of millions of examples
            is_member |= (wanted >= other.start) & (wanted < other.stop)
        else:
            is_member |= np.isin(wanted, other)
    return int(is_member.sum())
