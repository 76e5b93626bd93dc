"""Accuracy and loss on a labelled split, every example that has a label counted exactly once."""

import collections
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax.console import show_names
from vit_jax.data.class_names import class_names, moved_names, wordnet_ids
from vit_jax.data.imagenet_test_sets import NUM_CLASSES
from vit_jax.data.sources.base import Source
from vit_jax.data.sources.imagenet_variants import open_variant
from vit_jax.errors import UserError
from vit_jax.evaluators.evaluator_type import EvaluatorType, Openable, RunData, Setup, TestData
from vit_jax.models.layers import normalize_images
from vit_jax.objectives.losses import Loss, is_correct, is_labelled
from vit_jax.sharding import batch_sharding, replicated, within
from vit_jax.train_step import TrainState

logger = logging.getLogger(__name__)

_BATCHES_AHEAD = 4
_NEVER = -1e30  # a logit that never wins; minus infinity would make the loss of it not a number


class ClassificationEvaluator:
    """Top-1 and top-5 accuracy, and mean loss.

    Where images have several labels, any of them is right: precision@1 of multi-label data, and ReaL accuracy.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, jax.Array]],
        loss_fn: Loss,
        mesh: Mesh,
        shardings: Any = None,
        classes: Sequence[int] | None = None,
    ):
        """Makes the evaluator; compiles at the first run.

        Args:
          model: images -> (logits, intermediates).
          batches: as from `data.pipeline.EvalBatches`; `mask` says which examples count.
          loss_fn: a `losses.Loss`.
          mesh: the devices.
          shardings: of the parameters; None: replicated.
          classes: the logits that compete, for test sets of some of the model's classes; None: all.
        """
        self._batches = batches
        self._num_competing = len(classes) if classes is not None else model.num_classes
        everywhere = replicated(mesh)
        self._totals = jax.jit(
            lambda: {
                **{name: jnp.int32(0) for name in ("examples", "correct", "top5_correct", "not_finite")},
                "loss": jnp.float32(0),
            },
            out_shardings=everywhere,
        )

        def add(params, batch, totals):
            logits, _ = model.apply({"params": params}, normalize_images(batch["image"]), train=False)
            if classes is not None:
                competes = jnp.zeros(logits.shape[-1], bool).at[jnp.array(classes)].set(True)
                logits = jnp.where(competes, logits, _NEVER)
            mask = batch["mask"] * is_labelled(batch["label"])
            is_broken = ~jnp.isfinite(logits).all(axis=-1)
            right = {"correct": 1, "top5_correct": 5}
            return {
                "examples": totals["examples"] + mask.sum().astype(jnp.int32),
                **{
                    name: totals[name] + (is_correct(logits, batch["label"], top) * mask).sum().astype(jnp.int32)
                    for name, top in right.items()
                },
                "not_finite": totals["not_finite"] + (mask * is_broken).sum().astype(jnp.int32),
                "loss": totals["loss"] + jnp.where(mask > 0, loss_fn(logits, batch["label"]), 0).sum(),
            }

        self._add = jax.jit(
            within(mesh, add),
            in_shardings=(shardings or everywhere, batch_sharding(mesh), everywhere),
            out_shardings=everywhere,
        )

    def run(self, state: TrainState) -> Iterator[tuple[str, float]]:
        """Yields `accuracy`, `top5_accuracy` (where there are more than five classes), `loss` and `examples`.

        Logits that are not finite predict no class: the accuracies are NaN then, and a warning says of how many images.

        Raises:
          UserError: no example has a label.
        """
        totals = self._totals()
        dispatched: collections.deque[jax.Array] = collections.deque()
        for batch in self._batches:
            totals = self._add(state.evaluated, batch, totals)
            # Keeps the host, and the batches it has handed over, from running far ahead of the devices.
            dispatched.append(totals["loss"])
            if len(dispatched) > _BATCHES_AHEAD:
                jax.block_until_ready(dispatched.popleft())
        totals = jax.device_get(totals)
        examples = int(totals["examples"])
        if not examples:
            raise UserError("none of the images to evaluate has a label; see to the data, or set data.eval_split=None.")
        if not_finite := int(totals["not_finite"]):
            logger.warning(
                "%s of %s images have logits that are not finite, so there is no accuracy. Check the parameters and "
                "model.dtype.",
                *(f"{not_finite:,}", f"{examples:,}"),
            )
        yield "accuracy", math.nan if not_finite else float(totals["correct"]) / examples
        if self._num_competing > 5:
            yield "top5_accuracy", math.nan if not_finite else float(totals["top5_correct"]) / examples
        yield "loss", float(totals["loss"]) / examples
        yield "examples", examples


class Classification(ClassificationEvaluator, EvaluatorType):
    """A split of a data set with the model's classes."""

    def __init__(self, entry: ConfigDict, data: TestData, setup: Setup):
        """See `EvaluatorType`."""
        batches = setup.batches(cast(Source, data.test))
        super().__init__(setup.model, batches, setup.loss_fn, setup.mesh, setup.shardings, data.classes)

    @staticmethod
    def open(name: str, entry: ConfigDict, data: RunData) -> Openable:
        """The evaluation split, whose name metrics begin with, or another split or data set."""
        split = entry.split or data.eval_split
        if split is None:
            return
        if entry.split is None and entry.dataset is None:
            if data.eval_source is not None:
                yield split, lambda: TestData(data.eval_source)
        else:
            yield name, lambda: TestData(data.open(entry.dataset or data.dataset, split))

    @staticmethod
    def describe(entry: ConfigDict, data: TestData) -> str:
        """See `EvaluatorType`."""
        return "classification" + (f" among {len(data.classes):,} classes" if data.classes else "")


class ImageNetVariant(Classification):
    """One of ImageNet's other test sets, for models with ImageNet's 1,000 classes."""

    @staticmethod
    def open(name: str, entry: ConfigDict, data: RunData) -> Openable:
        """The test set, with its labels as ImageNet's."""

        def open_it() -> TestData:
            images = {"validation": data.dataset, "validation_split": data.eval_split or "validation"}
            variant = open_variant(entry.variant or name, entry.dataset, **images)
            return TestData(variant.source, variant.classes)

        if entry.dataset:
            yield name, open_it

    @staticmethod
    def check(name: str, entry: ConfigDict, setup: Setup) -> None:
        """The head's classes must be ImageNet's, in their usual order as far as their names are known."""
        num_classes, names = setup.model.num_classes, setup.class_names
        if not entry.dataset:
            return
        if num_classes != NUM_CLASSES:
            raise UserError(
                f"evals.{name} is for models with ImageNet's {NUM_CLASSES:,} classes; this one has {num_classes:,}. "
                f"Leave it out: --config.evals.{name}.dataset=None."
            )
        ids, words = wordnet_ids("imagenet2012"), class_names("imagenet2012")
        if names is not None and (
            moved_names(names, ids) or moved_names(names, words) or not {*ids, *words} & {*names}
        ):
            raise UserError(
                f"evals.{name} is for models with ImageNet's classes in the order of their WordNet ids; this one has "
                f"{show_names(names, 3)}. Leave it out: --config.evals.{name}.dataset=None."
            )
