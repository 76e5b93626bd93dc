"""Checks that a sweep uses different examples for training, choosing and reporting."""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ml_collections import ConfigDict

from vit_jax.data.overlap import check_disjoint, count_shared
from vit_jax.data.sources import MissingDataError, Source
from vit_jax.data.sources.splits import resolve
from vit_jax.errors import UserError
from vit_jax.experiment.data import open_data, open_eval_source, training_data_sets
from vit_jax.experiment.evaluations import open_evaluations, tested_sources
from vit_jax.experiment.leakage import sources_behind

logger = logging.getLogger(__name__)

T = TypeVar("T")

TRAINED_ON = "what is trained on"
WEIGHTS = "what the weights were trained on"
CHOSEN_BY = "what the values are chosen by"
REPORTED = "what the final runs are evaluated on"

_ADVICE = (
    "Choose on a held-out part of the training data, and report on the test split, for example with "
    "--config.data.train_split='train[:90%]' --config.data.eval_split='train[90%:]' "
    "--final=data.train_split=train,data.eval_split=test; or only choose, with --seeds=0."
)
_DATA = ("dataset", "train_split", "eval_split", "eval_labels", "mixture", "image_key", "label_key", "max_labels")
_SUPPOSED_LENGTHS = (10**6, 10**9)  # of a split that is missing


@dataclasses.dataclass(frozen=True)
class UsedExamples:
    """Examples that a run uses.

    Attributes:
      dataset: its name in the config.
      split: its name in the config.
      source: the examples; None if the data set is missing.
    """

    dataset: str
    split: str
    source: Source | None


class Splits:
    """Opens the examples of a sweep's runs, each set once, and compares them. Reads no image."""

    def __init__(self) -> None:
        self._opened: dict[str, Any] = {}
        self._compared: set[tuple[int, int]] = set()

    def trained_on(self, config: ConfigDict) -> list[UsedExamples]:
        """The training data of a run; each part of a mixture separately."""
        data, split = config.data, config.data.train_split
        datasets = [dataset for dataset, _ in training_data_sets(data)]
        return self._once(
            "trained on",
            config,
            lambda: [_open(each, split, functools.partial(open_data, data, each, split)) for each in datasets],
        )

    def behind(self, config: ConfigDict) -> list[UsedExamples]:
        """The training data of a run's initial weights, as far as known."""
        return self._once(
            f"weights {config.weights}",
            None,
            lambda: [UsedExamples(source.name, source.split, source) for source in sources_behind(config.weights)],
        )

    def measured(self, config: ConfigDict, metric: str) -> UsedExamples | None:
        """The examples of a metric, by its full name in `metrics.jsonl`; None for a training metric."""
        data = config.data
        if data.eval_split is not None and metric.startswith(f"{data.eval_split}/"):
            open_it = functools.partial(open_eval_source, data)
            return self._once("evaluation split", config, lambda: _open(data.dataset, data.eval_split, open_it))

        def find() -> UsedExamples | None:
            tested = tested_sources(open_evaluations(config, None))
            found = [source for name, source in tested.items() if metric.startswith(f"{name}/")]
            return UsedExamples(found[0].name, found[0].split, found[0]) if found else None

        return self._once(metric, config, find)

    def check(self, tested: UsedExamples, its_role: str, other: UsedExamples, other_role: str) -> None:
        """Checks that two sets of examples have none in common.

        Raises:
          UserError: they share examples.
        """
        if (id(tested), id(other)) in self._compared:
            return
        self._compared.add((id(tested), id(other)))
        if tested.source is not None and other.source is not None:
            check_disjoint(tested.source, its_role, other.source, other_role, _ADVICE)
        elif tested.dataset == other.dataset and _surely_share(tested.split, other.split):
            raise UserError(
                f"{tested.split!r} of {tested.dataset}, {its_role}, shares examples with {other.split!r}, "
                f"{other_role}. {_ADVICE}"
            )

    def _once(self, use: str, config: ConfigDict | None, make: Callable[[], T]) -> T:
        key = use if config is None else json.dumps([use, *_fields_of(config)], default=str)
        if key not in self._opened:
            self._opened[key] = make()
        return self._opened[key]


def _open(dataset: str, split: str, open_it: Callable[[], Source]) -> UsedExamples:
    try:
        return UsedExamples(dataset, split, open_it())
    except MissingDataError:
        logger.warning(
            "%s is missing, so %s of it can be compared with other splits by name only. Each run compares its training "
            "data with what it evaluates, and says so.",
            *(dataset, split),
        )
        return UsedExamples(dataset, split, None)


def _fields_of(config: ConfigDict) -> Iterator[Any]:
    """The fields that determine a run's examples."""
    yield from (config.data[name] for name in _DATA)
    yield config.evals.to_dict()


def compare_examples(
    trials: Sequence[tuple[ConfigDict, str]], finals: Sequence[tuple[ConfigDict, str]], splits: Splits
) -> tuple[str, ...]:
    """Compares the examples that a task's runs use for training, choosing and reporting.

    Args:
      trials: config and metric of each candidate's run.
      finals: the same for one final run of each candidate.
      splits: opens the examples.

    Returns:
      Notes on the numbers.

    Raises:
      UserError: two uses share examples, or candidates are compared on different examples.
    """
    chosen_by: list[UsedExamples] = []
    for config, metric in trials:
        if (measured := splits.measured(config, metric)) is not None:
            chosen_by.append(measured)
            for trained_on in splits.trained_on(config):
                splits.check(measured, CHOSEN_BY, trained_on, TRAINED_ON)
    notes = []
    for config, metric in finals:
        if (measured := splits.measured(config, metric)) is None:
            continue
        for trained_on in splits.trained_on(config):
            splits.check(measured, REPORTED, trained_on, TRAINED_ON)
        for behind in splits.behind(config):
            splits.check(measured, REPORTED, behind, WEIGHTS)
        for examples in chosen_by if len(finals) > 1 else ():
            splits.check(measured, REPORTED, examples, CHOSEN_BY)
        notes += _part_of_split(config, measured)
    for examples in chosen_by[1:]:
        if not _is_same(chosen_by[0], examples):
            raise UserError(
                f"the values would be compared on different examples, {chosen_by[0].split!r} of {chosen_by[0].dataset} "
                f"and {examples.split!r} of {examples.dataset}. Evaluate all on the same, or make a sweep of each."
            )
    return tuple(dict.fromkeys(notes))


def _is_same(one: UsedExamples, other: UsedExamples) -> bool:
    """Whether two sets of examples are the same, or may be if they are missing."""
    if one is other or one.source is None or other.source is None:
        return True
    return len(one.source) == len(other.source) == count_shared(one.source, other.source)


def _surely_share(one: str, other: str) -> bool:
    """Whether two splits of a data set share examples for any lengths of its splits."""
    names = sorted({term.split("[")[0].strip() for split in (one, other) for term in split.split("+")})

    def share(length: int) -> bool:
        try:
            first, second = (resolve(split, names, lambda _: [length], data_set="") for split in (one, other))
        except UserError:  # such as slices by files
            return one == other
        return any(
            each.split == its.split and max(each.start, its.start) < min(each.stop, its.stop)
            for each in first
            for its in second
        )

    return all(map(share, _SUPPOSED_LENGTHS))


def _part_of_split(config: ConfigDict, examples: UsedExamples) -> list[str]:
    """A note if numbers are measured on a part of a split."""
    source = examples.source
    if source is None or "[" not in examples.split:
        return []
    names = dict.fromkeys(term.split("[")[0].strip() for term in examples.split.split("+"))
    try:
        whole = sum(len(open_data(config.data, examples.dataset, name)) for name in names)
    except UserError:
        return []
    if len(source) == whole:
        return []
    return [
        f"{examples.split} has {len(source):,} of the {whole:,} examples of {' and '.join(names)}; numbers of the "
        "whole split cannot be compared with it."
    ]
