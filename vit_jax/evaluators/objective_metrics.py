"""The loss and the metrics of a run's objective on images that it is not trained on."""

from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vit_jax.data.sources.base import Source
from vit_jax.errors import UserError
from vit_jax.evaluators.accuracy import add_up, open_split
from vit_jax.evaluators.evaluator_type import EvalData, EvaluatorType, Openable, RunData, Setup
from vit_jax.models.layers import normalize_images
from vit_jax.objectives import Objective
from vit_jax.sharding import batch_sharding, replicated, within
from vit_jax.train_step import TrainState


class ObjectiveMetrics(EvaluatorType):
    """What the training step reports, without dropout and without augmentation of the images.

    The objective's random choices are the same at each evaluation. They depend on the batch size.
    """

    def __init__(self, entry: ConfigDict, data: EvalData, setup: Setup):
        """See `EvaluatorType`."""
        objective = cast(Objective, setup.objective)
        self._batches = setup.batches(cast(Source, data.test), classifies=objective.needs_labels)

        def sums(params: Any, batch: dict[str, jax.Array], number: jax.Array) -> dict[str, jax.Array]:
            def apply(images: jax.Array, **inputs: Any) -> Any:
                return setup.model.apply({"params": params}, normalize_images(images), train=False, **inputs)

            given = {name: array for name, array in batch.items() if name != "mask"}
            examples = objective.prepare(given, jax.random.fold_in(jax.random.key(0), number))
            losses, metrics = objective.losses(apply, examples)
            weight = examples.weight * batch["mask"]
            totals = {name: jnp.where(weight > 0, values * weight, 0).sum() for name, values in metrics.items()}
            return totals | {"loss": jnp.where(weight > 0, losses * weight, 0).sum(), "examples": weight.sum()}

        everywhere = replicated(setup.mesh)
        self._sums = jax.jit(
            within(setup.mesh, sums),
            in_shardings=(setup.shardings or everywhere, batch_sharding(setup.mesh), None),
            out_shardings=everywhere,
        )

    def run(self, state: TrainState) -> Iterator[tuple[str, float]]:
        """Yields the objective's metrics, `loss` and `examples`.

        Raises:
          UserError: no example counts.
        """
        totals = add_up(self._sums(state.evaluated, batch, number) for number, batch in enumerate(self._batches))
        examples = totals.pop("examples", 0.0)
        if not examples:
            raise UserError("none of the images to evaluate counts. Check the data, or set data.eval_split=None.")
        for name, total in totals.items():
            yield name, total / examples
        yield "examples", int(examples)

    @staticmethod
    def open(name: str, entry: ConfigDict, data: RunData) -> Openable:
        """Opens the evaluation split, whose name is then the metrics' prefix, or another split or data set."""
        yield from open_split(name, entry, data)
