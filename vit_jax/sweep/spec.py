"""The description of a sweep: candidates, choice and final runs."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax.errors import UserError

ARGUMENT = "argument."  # "argument.rule" is the argument `rule` of a config: what follows the colon of its path


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep over a config.

    Fields are the config's, with dots ("optimizer.learning_rate"), or arguments of the config ("argument.rule"), which
    may change many of its fields at once.

    Attributes:
      choose: the grid: values by field, whose combinations are all tried; or a list of combinations. With several
        values of `seed`, their mean counts. With one combination or none, there is nothing to choose.
      final: fields of the final runs; usually `{"data.train_split": "train", "data.eval_split": "test"}`.
      seeds: number of final runs, with the seeds `config.seed`, `config.seed + 1`, ...; 0: only choose.
      metric: the metric of the choice, at the end of a run: "accuracy" or another metric of the evaluation split, or a
        full name of `metrics.jsonl`. The largest value wins, or the smallest if the name ends in "loss".
      tasks: the argument of the config (what follows the colon) by task; each task has its own choice and final runs.
        Empty: the config itself is the only task.
      groups: names of tasks by group, for means in addition to the mean over all tasks.
      are_alternatives: whether the tasks are alternatives to compare, so that a mean over them has no meaning.
      weights: by task, the task of an earlier sweep whose final run gives the initial weights (`config.weights`). A run
        begins with the final run of its own seed, or with the only final run if the earlier sweep has one seed.
      early_stopping: the metric whose best value picks the step of each run that counts, such as "accuracy" (of the
        evaluation split); all metrics are then those of that step. None: the end of the run counts.
      more_metrics: full names of other metrics of the final runs that the tables show.
    """

    choose: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    final: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: int = 3
    metric: str = "accuracy"
    tasks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    groups: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    are_alternatives: bool = False
    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)
    early_stopping: str | None = None
    more_metrics: Sequence[str] = ()

    def __post_init__(self) -> None:
        for field, values in self.choose.items() if isinstance(self.choose, Mapping) else ():
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise UserError(f"the grid takes a list of values for {field}, got {values!r}.")
            if not values:
                raise UserError(f"the grid has no value for {field}; give at least one, or leave the field out.")
        if self.seeds < 0:
            raise UserError(f"seeds must be 0 (only choose) or more, got {self.seeds}.")
        if not self.metric:
            raise UserError("the metric to choose by is empty; the default is 'accuracy'.")
        if "seed" in self.final:
            raise UserError("the final runs' seeds are config.seed and those that follow it; leave seed out of final.")
        if both := [field for field in self.fields if field in self.final]:
            raise UserError(f"{both[0]} is chosen by the grid, so final cannot set it as well.")
        for group, tasks in self.groups.items():
            if unknown := [task for task in tasks if task not in self.tasks]:
                raise UserError(f"the group {group!r} has {unknown[0]!r}, which is not a task of the sweep.")
        if unknown := [task for task in self.weights if task not in self.tasks]:
            raise UserError(f"weights are given for {unknown[0]!r}, which is not a task of the sweep.")

    @property
    def fields(self) -> list[str]:
        """The fields of the grid."""
        return list(dict.fromkeys(field for combination in self.combinations() for field in combination))

    def combinations(self) -> list[dict[str, Any]]:
        """All combinations of the grid, in its order; the last field changes fastest."""
        if isinstance(self.choose, Mapping):
            return [dict(zip(self.choose, values, strict=True)) for values in itertools.product(*self.choose.values())]
        return [dict(combination) for combination in self.choose] or [{}]


def check_sequence(sweeps: Sequence[Sweep]) -> None:
    """Checks sweeps that run one after the other; raises `UserError` if their tasks do not fit together."""
    earlier: dict[str, Sweep] = {}
    for sweep in sweeps:
        if len(sweeps) > 1 and not sweep.tasks:
            raise UserError("each of several sweeps of a config needs tasks, whose names are those of their folders.")
        if repeated := [task for task in sweep.tasks if task in earlier]:
            raise UserError(f"two sweeps of the config have a task {repeated[0]!r}.")
        for task, before in sweep.weights.items():
            if before not in earlier:
                raise UserError(
                    f"{task!r} begins with the weights of {before!r}, which is not a task of an earlier sweep."
                )
            seeds, needed = earlier[before].seeds, max(sweep.seeds, 1)
            if seeds != 1 and seeds < needed:
                raise UserError(
                    f"{task!r} has {needed} seeds, but {before!r}, whose weights it begins with, has {seeds}. Give it "
                    "as many, or one."
                )
        earlier |= dict.fromkeys(sweep.tasks, sweep)


def split_list(text: str) -> list[str]:
    """Splits at the commas outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part]


def parse_grid(texts: Sequence[str]) -> dict[str, list[str]]:
    """Reads `--grid=field=value,value`, given once for each field."""
    grid: dict[str, list[str]] = {}
    for text in texts:
        field, equals, values = text.partition("=")
        if not equals or not field:
            raise UserError(f"--grid takes field=value,value,..., got {text!r}.")
        if field in grid:
            raise UserError(f"--grid gives {field} twice; put all its values into one.")
        grid[field] = split_list(values)
    return grid


def parse_final(text: str) -> dict[str, str]:
    """Reads `--final=field=value,field=value`."""
    pairs = [re.fullmatch(r"([\w.]+)=(.*)", pair) for pair in split_list(text)]
    if not all(pairs):
        raise UserError(f"--final takes field=value,field=value,..., got {text!r}.")
    return {pair[1]: pair[2] for pair in pairs if pair}
