"""Builds evaluators from `config.evals`, for training and for evaluation alone."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax.data.sources import MissingDataError, Source
from vit_jax.errors import UserError, unknown_name
from vit_jax.evaluators import registry
from vit_jax.evaluators.evaluator_type import EvalData, EvaluatorType, RunData, Setup
from vit_jax.experiment.data import eval_transform, open_data
from vit_jax.experiment.objective import needs_labels
from vit_jax.objectives import Objective
from vit_jax.objectives.losses import Loss
from vit_jax.train_step import TrainState
from vit_jax.weights import Preprocessing

logger = logging.getLogger(__name__)

OnMissing = Callable[[str, MissingDataError], None]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation: an entry of `config.evals` on one data set."""

    name: str  # prefix of its metrics
    type: type[EvaluatorType]  # the evaluator's type
    entry: ConfigDict  # all fields of the config's entry
    data: EvalData  # the examples that it reads
    evaluator: Any = None  # made for a model; None from `open_evaluations`
    # Name of the metric that selects the best parameters; None if it belongs to another evaluation.
    best_metric: str | None = None

    @property
    def every_steps(self) -> int | None:
        """Steps between two evaluations; None: only at the end."""
        return self.entry.every_steps

    def describe(self) -> str:
        """Describes the evaluation in words."""
        return self.type.describe(self.entry, self.data)

    def run(self, state: TrainState) -> dict[str, float]:
        """Returns the metrics of parameters, by name without the prefix.

        Raises:
          UserError: they cannot be measured, or `best_metric` is not among them.
        """
        metrics = dict(self.evaluator.run(state))
        if self.best_metric is not None and self.best_metric not in metrics:
            raise unknown_name(f"metric of {self.name} in checkpoint.best_metric:", self.best_metric, metrics)
        return metrics


def open_evaluations(
    config: ConfigDict, eval_source: Source | None, on_missing: OnMissing | None = None
) -> list[Evaluation]:
    """Opens the data of all entries that are on.

    `on_missing` is called with the name and the error of each evaluation whose data are missing, which is then left
    out; None: raises the error.

    Raises:
      UserError: data are missing or unusable, or two evaluations would give their metrics the same names.
    """
    class_names = eval_source.class_names if eval_source else None
    labelled = needs_labels(config.objective)
    data = RunData(
        config.data.dataset,
        config.data.eval_split,
        eval_source,
        lambda dataset, split: open_data(config.data, dataset, split, class_names, labelled=labelled),
        labelled,
    )
    evaluations: dict[str, Evaluation | None] = {}
    for entry_name, entry, type_ in _entries(config):
        for name, open_it in type_.open(entry_name, entry, data):
            if name in evaluations:
                raise UserError(
                    f"two evaluations would be called {name} in metrics. Evaluate one after the other, with a "
                    "--workdir each."
                )
            evaluations[name] = None
            try:
                evaluations[name] = Evaluation(name, type_, entry, open_it())
            except MissingDataError as error:
                if on_missing is None:
                    raise
                on_missing(name, error)
    return [each for each in evaluations.values() if each is not None]


def _entries(config: ConfigDict) -> Iterator[tuple[str, ConfigDict, type[EvaluatorType]]]:
    """Returns the config's entries with all their fields."""
    for name, given in config.evals.items():
        entry = registry.complete(given, f"evals.{name}")
        yield name, entry, registry.TYPES[entry.type].load()


def make_evaluations(
    config: ConfigDict, setup: Setup, eval_source: Source | None, on_missing: OnMissing | None = None
) -> list[Evaluation]:
    """Makes the evaluators of all entries that are on; see `open_evaluations`.

    Raises:
      UserError: data are missing or unusable, or no evaluation has the metric that selects the best parameters.
    """
    opened = open_evaluations(config, eval_source, on_missing)
    best = _best_metric(config, opened)
    return [
        dataclasses.replace(
            each,
            evaluator=each.type(each.entry, each.data, setup),
            best_metric=best.removeprefix(f"{each.name}/") if best.startswith(f"{each.name}/") else None,
        )
        for each in opened
    ]


def make_setup(
    config: ConfigDict,
    model: nn.Module,
    objective: Objective,
    mesh: Mesh,
    class_names: Sequence[str] | None = None,
    shardings: Any = None,
    before_each_batch: Callable[[], None] = lambda: None,
) -> Setup:
    """Makes what all evaluators share, and checks the entries against it.

    Raises:
      UserError: an entry does not fit the model.
    """
    setup = Setup(
        model,
        mesh,
        Loss(config.loss),
        eval_transform(config.data),
        class_names=class_names,
        objective=objective,
        shardings=shardings,
        batch_size=config.eval_batch_size or config.batch_size,
        num_threads=config.data.num_threads,
        max_bad_records=config.data.max_bad_records,
        before_each_batch=before_each_batch,
    )
    for name, entry, type_ in _entries(config):
        type_.check(name, entry, setup)
    return setup


def _best_metric(config: ConfigDict, evaluations: Sequence[Evaluation]) -> str:
    """The full name of the metric that selects the best parameters; "" if there is none."""
    best, names = config.checkpoint.best_metric, [each.name for each in evaluations]
    if not config.checkpoint.keep_best or (best is None and config.data.eval_split not in names):
        return ""
    if best is None:
        return f"{config.data.eval_split}/accuracy"
    if not any(best.startswith(f"{name}/") for name in names):
        raise unknown_name("evaluation in checkpoint.best_metric:", best, [f"{name}/<metric>" for name in names])
    return best


def tested_sources(evaluations: Iterable[Evaluation]) -> dict[str, Source]:
    """The examples that each evaluation measures, by its name."""
    return {each.name: each.data.test for each in evaluations if each.data.test is not None}


def describe_data(train_source: Source | None, evaluations: Iterable[Evaluation]) -> str:
    """A line for each data set. All processes must have the same lines."""
    sources = [] if train_source is None else [("training", train_source)]
    sources += [(each.name, source) for each in evaluations for source in each.data.sources]
    return "\n".join(f"{name}: {len(source):,} images, {source.fingerprint()}" for name, source in sources)


def preprocessing_of(data: ConfigDict) -> Preprocessing:
    """The preprocessing of evaluation images; `data` is the config's section `data`."""
    return Preprocessing.of_evaluation(data.image_size, data.eval_resize_small, data.eval_resize, data.exif_orientation)
