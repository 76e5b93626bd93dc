"""The interface of evaluators, and their arguments."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax.console import Tracked
from vit_jax.data.pipeline import EvalBatches
from vit_jax.data.sources.base import Source
from vit_jax.data.transforms import EvalTransform
from vit_jax.objectives import Objective
from vit_jax.objectives.losses import Loss
from vit_jax.sharding import DATA_AXIS, batch_sharding
from vit_jax.train_step import TrainState


@dataclasses.dataclass(frozen=True)
class EvalData:
    """The examples of one evaluation."""

    test: Source | None = None  # the examples that are measured; None: the evaluator reads none
    classes: tuple[int, ...] | None = None  # the model's classes to choose among; None: all
    pool: Source | None = None  # in a few-shot evaluation, the examples to draw from
    validation: Source | None = None  # in a few-shot evaluation, the examples to choose l2 on

    @property
    def sources(self) -> tuple[Source, ...]:
        """All data sets that it reads."""
        return tuple(source for source in (self.pool, self.test, self.validation) if source is not None)


Openable: TypeAlias = Iterator[tuple[str, Callable[[], EvalData]]]


@dataclasses.dataclass(frozen=True)
class RunData:
    """Opens data for evaluators."""

    dataset: str  # `data.dataset` of the config
    eval_split: str | None  # `data.eval_split`
    eval_source: Source | None  # that split, opened; None if there is none
    open: Callable[[str, str], Source]  # opens a split of a data set that has the model's classes
    labelled: bool = True  # whether the run learns from labels


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts that all evaluators of a run share."""

    model: nn.Module  # images -> (logits, intermediates)
    mesh: Mesh  # the devices
    loss_fn: Loss  # a `losses.Loss`
    transform: EvalTransform  # from an encoded image to the model's input
    class_names: Sequence[str] | None = None  # names of the logits, if known
    objective: Objective | None = None  # what the run learns, for evaluators of type "objective"
    shardings: Any = None  # shardings of the parameters; None: replicated
    batch_size: int = 512  # images per batch, over all devices
    num_threads: int | None = None  # threads that decode; None: one for each core
    max_bad_records: int = 0  # number of unreadable examples to skip; more are an error
    before_each_batch: Callable[[], None] = lambda: None  # called between batches; may raise to end an evaluation

    @property
    def images_per_batch(self) -> int:
        """`batch_size`, rounded up so that the devices can split a batch evenly."""
        parts = self.mesh.shape[DATA_AXIS]
        return -(-self.batch_size // parts) * parts

    def batches(
        self, source: Source, what: str = "evaluation", *, classifies: bool = True
    ) -> Iterable[dict[str, jax.Array]]:
        """The examples of a source, each once.

        Args:
          source: the examples.
          what: for progress.
          classifies: whether labels are checked to be the model's classes.
        """
        batches = EvalBatches(
            source,
            self.transform,
            batch_sharding(self.mesh),
            batch_size=self.images_per_batch,
            num_classes=self.model.num_classes if classifies else None,
            num_threads=self.num_threads,
            max_bad_records=self.max_bad_records,
        )
        return Tracked(
            batches,
            f"{what} on {source.split} of {source.name}",
            self.images_per_batch,
            before_each=self.before_each_batch,
        )


class EvaluatorType:
    """An evaluator type, registered by `registry.register`. Subclasses override the methods that differ.

    `open` and `check` are called before an instance is made, so that errors come before a run begins.
    """

    def __init__(self, entry: ConfigDict, data: EvalData, setup: Setup):
        """Makes the evaluator of one set of data; compiles at the first run.

        Args:
          entry: all fields of the config's entry.
          data: from `open`.
          setup: what all evaluators share.
        """

    def run(self, state: TrainState) -> Iterable[tuple[str, float]]:
        """Yields names and values of metrics of `state.evaluated`. All processes call it and get the same values."""
        raise NotImplementedError

    @staticmethod
    def open(name: str, entry: ConfigDict, data: RunData) -> Openable:
        """Yields the data sets to evaluate, each with its own evaluator; none if the entry is off.

        Args:
          name: of the entry.
          entry: all its fields.
          data: opens data sets.

        Yields:
          The prefix of the metrics' names, and a function that opens the examples. It raises `MissingDataError` if they
          are missing, and `UserError` if they are unusable.
        """
        yield name, EvalData

    @staticmethod
    def check(name: str, entry: ConfigDict, setup: Setup) -> None:
        """Checks the fields against each other and against the model. Reads no data.

        Raises:
          UserError: they do not fit together.
        """

    @staticmethod
    def describe(entry: ConfigDict, data: EvalData) -> str:
        """Describes the evaluation for --dry_run."""
        return entry.type
