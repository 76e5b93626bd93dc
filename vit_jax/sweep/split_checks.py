"""Checks that a sweep trains on, chooses by and reports different examples."""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
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
_FIELDS = ("dataset", "train_split", "eval_split", "eval_labels", "mixture", "image_key", "label_key", "max_labels")
_SUPPOSED_LENGTHS = (10**6, 10**9)  # of a split that is not here


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples that have a use in a run.

    Attributes:
      dataset: as the config names it.
      split: likewise.
      source: the examples; None where the data set is not here.
    """

    dataset: str
    split: str
    source: Source | None


class Splits:
    """Opens the examples of a sweep's runs, each set once, and compares them. Reads no image."""

    def __init__(self) -> None:
        self._opened: dict[str, Any] = {}
        self._compared: set[tuple[int, int]] = set()

    def trained_on(self, config: ConfigDict) -> list[Examples]:
        """What a run trains on: the parts of a mixture one by one."""
        data = config.data

        def open_one(dataset: str) -> Examples:
            return self._open(dataset, data.train_split, lambda: open_data(data, dataset, data.train_split))

        return self._once(
            "trained on", config, lambda: [open_one(dataset) for dataset, _ in training_data_sets(config.data)]
        )

    def behind(self, config: ConfigDict) -> list[Examples]:
        """What the weights that a run begins with were trained on, as far as that is known."""
        weights = config.weights
        return self._once(
            f"weights {weights}", None, lambda: [Examples(s.name, s.split, s) for s in sources_behind(weights)]
        )

    def measured(self, config: ConfigDict, metric: str) -> Examples | None:
        """What a metric is measured on; None if that is what is trained on.

        Args:
          config: of the run.
          metric: its full name in `metrics.jsonl`.
        """
        data = config.data
        if data.eval_split is not None and metric.startswith(f"{data.eval_split}/"):
            return self._once(
                "evaluation split",
                config,
                lambda: self._open(data.dataset, data.eval_split, lambda: open_eval_source(data)),
            )

        def find() -> Examples | None:
            tested = tested_sources(open_evaluations(config, None))
            found = [source for name, source in tested.items() if metric.startswith(f"{name}/")]
            return Examples(found[0].name, found[0].split, found[0]) if found else None

        return self._once(metric, config, find)

    def check(self, tested: Examples, its_role: str, other: Examples, other_role: str) -> None:
        """Checks that two sets of examples have none in common.

        Raises:
          UserError: they have some.
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

    def _open(self, dataset: str, split: str, open_it: Callable[[], Source]) -> Examples:
        try:
            return Examples(dataset, split, open_it())
        except MissingDataError:
            logger.warning(
                "%s is not here, so %s of it can be compared with other splits by name only. Each run compares what it "
                "trains on with what it evaluates, and says so.",
                *(dataset, split),
            )
            return Examples(dataset, split, None)

    def _once(self, use: str, config: ConfigDict | None, make: Callable[[], T]) -> T:
        key = use if config is None else json.dumps([use, *_fields_of(config)], default=str)
        if key not in self._opened:
            self._opened[key] = make()
        return self._opened[key]


def _fields_of(config: ConfigDict) -> Iterator[Any]:
    """The fields that say which examples a run uses."""
    yield from (config.data[name] for name in _FIELDS)
    yield config.evals.to_dict()


def is_same(one: Examples, other: Examples) -> bool:
    """Whether two sets of examples are the same, as far as they are here."""
    if one is other or one.source is None or other.source is None:
        return True
    return len(one.source) == len(other.source) == count_shared(one.source, other.source)


def _surely_share(one: str, other: str) -> bool:
    """Whether two splits of a data set have examples in common, whatever the length of its splits."""
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


def part_of_split(config: ConfigDict, examples: Examples) -> str | None:
    """A line for a reader of the numbers, if they are measured on a part of a split only; otherwise None."""
    source = examples.source
    if source is None or "[" not in examples.split:
        return None
    names = dict.fromkeys(term.split("[")[0].strip() for term in examples.split.split("+"))
    try:
        whole = sum(len(open_data(config.data, examples.dataset, name)) for name in names)
    except UserError:
        return None
    if len(source) == whole:
        return None
    return (
        f"{examples.split} has {len(source):,} of the {whole:,} examples of {' and '.join(names)}; numbers of the "
        "whole split cannot be compared with it."
    )
