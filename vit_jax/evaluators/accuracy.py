"""Accuracy and loss on a labelled split, every example that has a label counted exactly once."""

import collections
import logging
import math
from collections.abc import Iterable, Iterator
from typing import cast

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vit_jax.console import show_names
from vit_jax.data.class_names import class_names, moved_names, wordnet_ids
from vit_jax.data.imagenet_test_sets import NUM_CLASSES
from vit_jax.data.sources.base import Source
from vit_jax.data.sources.imagenet_variants import open_variant
from vit_jax.errors import UserError
from vit_jax.evaluators.evaluator_type import EvalData, EvaluatorType, Openable, RunData, Setup
from vit_jax.models.layers import normalize_images
from vit_jax.objectives.losses import is_correct, is_labelled
from vit_jax.sharding import batch_sharding, replicated, within
from vit_jax.train_step import TrainState

logger = logging.getLogger(__name__)

_BATCHES_AHEAD = 4
_NEVER = -1e30  # a logit that never wins; minus infinity would make its loss NaN


class Accuracy(EvaluatorType):
    """Top-1 and top-5 accuracy, and mean loss, on a split of a data set with the model's classes.

    If images have several labels, any of them is right: precision@1 of multi-label data, and ReaL accuracy.
    """

    def __init__(self, entry: ConfigDict, data: EvalData, setup: Setup):
        """See `EvaluatorType`. `data.classes` are the logits to choose among; None: all."""
        classes = data.classes
        self._batches = setup.batches(cast(Source, data.test))
        self._num_competing = len(classes) if classes is not None else setup.model.num_classes

        def sums(params, batch):
            logits, _ = setup.model.apply({"params": params}, normalize_images(batch["image"]), train=False)
            if classes is not None:
                competes = jnp.zeros(logits.shape[-1], bool).at[jnp.array(classes)].set(True)
                logits = jnp.where(competes, logits, _NEVER)
            mask = batch["mask"] * is_labelled(batch["label"])
            right = {"correct": 1, "top5_correct": 5}
            return {
                "examples": mask.sum(),
                **{name: (is_correct(logits, batch["label"], top) * mask).sum() for name, top in right.items()},
                "not_finite": (mask * ~jnp.isfinite(logits).all(axis=-1)).sum(),
                "loss": jnp.where(mask > 0, setup.loss_fn(logits, batch["label"]), 0).sum(),
            }

        everywhere = replicated(setup.mesh)
        self._sums = jax.jit(
            within(setup.mesh, sums),
            in_shardings=(setup.shardings or everywhere, batch_sharding(setup.mesh)),
            out_shardings=everywhere,
        )

    def run(self, state: TrainState) -> Iterator[tuple[str, float]]:
        """Yields `accuracy`, `top5_accuracy` (with more than five classes), `loss` and `examples`.

        If logits are not finite, the accuracies are NaN, and a warning gives the number of such images.

        Raises:
          UserError: no example has a label.
        """
        totals = add_up(self._sums(state.evaluated, batch) for batch in self._batches)
        examples, not_finite = totals["examples"], totals["not_finite"]
        if not examples:
            raise UserError("none of the images to evaluate has a label. Check the data, or set data.eval_split=None.")
        if not_finite:
            logger.warning(
                "%s of %s images have logits that are not finite, so there is no accuracy. Check the parameters and "
                "model.dtype.",
                *(f"{not_finite:,.0f}", f"{examples:,.0f}"),
            )
        yield "accuracy", math.nan if not_finite else totals["correct"] / examples
        if self._num_competing > 5:
            yield "top5_accuracy", math.nan if not_finite else totals["top5_correct"] / examples
        yield "loss", totals["loss"] / examples
        yield "examples", int(examples)

    @staticmethod
    def open(name: str, entry: ConfigDict, data: RunData) -> Openable:
        """Opens the evaluation split, whose name is then the metrics' prefix, or another split or data set."""
        if not data.labelled and (entry.split or data.eval_split):
            raise UserError(
                f"evals.{name} measures how well images are classified, and the objective learns no classes. Set "
                f"--config.evals.{name}.type=objective, or --config.data.eval_split=None."
            )
        yield from open_split(name, entry, data)

    @staticmethod
    def describe(entry: ConfigDict, data: EvalData) -> str:
        """See `EvaluatorType`."""
        return "classification" + (f" among {len(data.classes):,} classes" if data.classes else "")


def open_split(name: str, entry: ConfigDict, data: RunData) -> Openable:
    """Opens the evaluation split, whose name is then the metrics' prefix, or another split or data set."""
    split = entry.split or data.eval_split
    if split is None:
        return
    if entry.split is not None or entry.dataset is not None:
        yield name, lambda: EvalData(data.open(entry.dataset or data.dataset, split))
    elif data.eval_source is not None:
        yield split, lambda: EvalData(data.eval_source)


def add_up(batches: Iterable[dict[str, jax.Array]]) -> dict[str, float]:
    """Adds up what is computed for each batch, by name; 0 if there are none."""
    totals = collections.defaultdict[str, float](float)
    dispatched = collections.deque[dict[str, jax.Array]]()

    def add(sums: dict[str, jax.Array]) -> None:
        for name, value in jax.device_get(sums).items():
            totals[name] += float(value)

    for sums in batches:
        dispatched.append(sums)
        # Keeps the host from dispatching batches far ahead of the devices.
        if len(dispatched) > _BATCHES_AHEAD:
            add(dispatched.popleft())
    for sums in dispatched:
        add(sums)
    return totals


class ImageNetVariant(Accuracy):
    """One of ImageNet's other test sets, for models with ImageNet's 1,000 classes."""

    @staticmethod
    def open(name: str, entry: ConfigDict, data: RunData) -> Openable:
        """Opens the test set, with ImageNet's labels."""

        def open_it() -> EvalData:
            images = {"validation": data.dataset, "validation_split": data.eval_split or "validation"}
            variant = open_variant(entry.variant or name, entry.dataset, **images)
            return EvalData(variant.source, variant.classes)

        if entry.dataset:
            yield name, open_it

    @staticmethod
    def check(name: str, entry: ConfigDict, setup: Setup) -> None:
        """Checks that the head's classes are ImageNet's and, if they have names, in the usual order."""
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
