"""Runs of one setting together, and which of several settings stands in a table."""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence

from vit_jax.reporting.records import Record


@dataclasses.dataclass(frozen=True)
class Ours:
    """A number of ours.

    Attributes:
      mean: in the unit of its table.
      std: sample standard deviation (n - 1); None for one run.
      seeds: how many runs the mean is over.
      notes: what a reader of the number should know.
      sources: folders it is from.
    """

    mean: float
    std: float | None = None
    seeds: int = 1
    notes: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Result:
    """Runs that differ in nothing but their seeds.

    Attributes:
      records: one for each seed, in their order.
      repeated: how many more there are that repeat one of these seeds.
    """

    records: tuple[Record, ...]
    repeated: int = 0

    @property
    def first(self) -> Record:
        """One of them, for what they have in common."""
        return self.records[0]

    def by_seed(self, name: str) -> dict[tuple[str, str], float]:
        """A measured share for each seed, where all have it; {} where one lacks it."""
        if not all(name in record.values for record in self.records):
            return {}
        return {_seeds(record): record.values[name].value for record in self.records}

    def ours(self, name: str, *, unit: float = 100.0) -> Ours | None:
        """Mean and standard deviation of what was measured; None where a run lacks it.

        Args:
          name: of the measurement, a key of `Record.values`.
          unit: what a share of 1 is shown as: 100 for percent.
        """
        values = [unit * value for value in self.by_seed(name).values()]
        if not values:
            return None
        notes, std = [], statistics.stdev(values) if len(values) > 1 else None
        if len(values) == 1:
            of_draws = self.first.values[name].std
            if of_draws is not None:
                std = unit * of_draws
                notes.append("one model; ± is over draws of few-shot images")
            else:
                notes.append("one seed")
        if self.repeated:
            notes.append(f"runs that repeat a seed, and are not counted: {self.repeated}")
        notes += [note for record in self.records for note in record.values[name].notes]
        sources = tuple(str(record.path) for record in self.records)
        return Ours(statistics.fmean(values), std, len(values), tuple(dict.fromkeys(notes)), sources)


def _seeds(record: Record) -> tuple[str, str]:
    return (str(record.seed), record.origin.seeds)


def group(records: Iterable[Record]) -> list[Result]:
    """Puts runs of one setting together. Of runs with the same seed the first counts: it is one run, made twice."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.setting, []).append(record)
    results = []
    for members in groups.values():
        by_seed: dict[tuple[str, str], Record] = {}
        for record in sorted(members, key=lambda record: str(record.path)):
            by_seed.setdefault(_seeds(record), record)
        ordered = sorted(by_seed.values(), key=lambda record: (record.seed or 0, record.origin.seeds))
        results.append(Result(tuple(ordered), len(members) - len(ordered)))
    return results


def combine(tasks: Sequence[Result], name: str) -> Ours | None:
    """The mean over tasks in percent, and its standard deviation from seed to seed, where all have the same seeds.

    Args:
      tasks: a result for each.
      name: of the measurement, a key of `Record.values`.
    """
    values = [result.by_seed(name) for result in tasks]
    if not values or not all(values):
        return None
    sources = tuple(str(record.path) for result in tasks for record in result.records)
    if all(each.keys() == values[0].keys() for each in values):
        means = [100 * statistics.fmean(each[seed] for each in values) for seed in values[0]]
        std = statistics.stdev(means) if len(means) > 1 else None
        return Ours(statistics.fmean(means), std, len(means), () if len(means) > 1 else ("one seed",), sources)
    mean = 100 * statistics.fmean(statistics.fmean(each.values()) for each in values)
    fewest = min(map(len, values))
    return Ours(mean, None, fewest, ("its tasks have different seeds, so there is no ±",), sources)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How the paper measured what stands in a cell.

    Attributes:
      image_sizes: resolutions that count as the paper's; () for any.
      steps: of fine-tuning; None for any.
      polyak_decay: of the average of the parameters; None for none.
      train_split: all that is there to train on; None for any.
      batch_size: None for any.
    """

    image_sizes: tuple[int, ...] = ()
    steps: int | None = None
    polyak_decay: float | None = None
    train_split: str | None = None
    batch_size: int | None = 512

    def differences(self, record: Record) -> list[str]:
        """What was done in another way, as notes. Of a released checkpoint only the resolution is known."""
        notes = []
        if self.image_sizes and record.image_size not in self.image_sizes:
            notes.append(f"at {record.image_size} pixels, in the paper at {self.image_sizes[0]}")
        if record.steps is None:
            return [*notes, "a released checkpoint as it is: its fine-tuning was not done here"]
        if self.steps is not None and record.steps != self.steps:
            notes.append(f"{record.steps:,} steps, in the paper {self.steps:,}")
        if self.batch_size is not None and record.batch_size != self.batch_size:
            notes.append(f"batch {record.batch_size:,}, in the paper {self.batch_size:,}")
        if self.polyak_decay != record.polyak_decay:
            ours, theirs = (
                "without Polyak averaging" if decay is None else f"with Polyak averaging at {decay}"
                for decay in (record.polyak_decay, self.polyak_decay)
            )
            notes.append(f"{ours}, in the paper {theirs}")
        if self.train_split is not None and record.train_split != self.train_split:
            notes.append(f"trained on {record.train_split}, in the paper on {self.train_split}")
        return notes


def choose(candidates: Sequence[Result], protocol: Protocol) -> tuple[Result, list[str]]:
    """Which of several settings stands in a cell, and notes on it. What they reached plays no part.

    The one that does most things as the paper does is taken, then the one with most seeds, then the first by folder.
    """
    ranked = sorted(
        candidates,
        key=lambda result: (
            len(protocol.differences(result.first)),
            -len(result.records),
            str(result.first.path),
        ),
    )
    notes = protocol.differences(ranked[0].first)
    if len(ranked) > 1:
        notes.append(f"{len(ranked) - 1} more of other settings: see the table of results")
    return ranked[0], notes
