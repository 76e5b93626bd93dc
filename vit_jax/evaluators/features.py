"""Representations of all images of a source: a model's named intermediates, as arrays on the host."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.data.sources.base import Source
from vit_jax.errors import UserError, unknown_name
from vit_jax.evaluators.evaluator_type import Setup
from vit_jax.models.layers import normalize_images
from vit_jax.sharding import batch_sharding, replicated, within

_BATCHES_AHEAD = 4
_ATTENTION = "attention_"  # weights between tokens, which are not about an image's content


@dataclasses.dataclass(frozen=True)
class Features:
    """A model's representations of a source's examples, in the order of the source."""

    arrays: dict[str, np.ndarray]  # by representation, float32 `[examples, dim]`
    # int32 `[examples]`, or `[examples, max_labels]` if the source has several; `NO_LABEL` if an example has none, or
    # its image could not be read.
    labels: np.ndarray


def representation_shapes(model: nn.Module, image_size: int) -> dict[str, tuple[int, ...]]:
    """Names of a model's intermediates that can be extracted, and their shapes for one image. Computes nothing.

    Args:
      model: images -> (logits, intermediates).
      image_size: side of the images, in pixels.
    """
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    (_, out), _ = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, train=False), images)
    return {name: tuple(array.shape[1:]) for name, array in out.items() if not name.startswith(_ATTENTION)}


class FeatureExtractor:
    """Extracts representations; compiled once for all sources.

    Averages over positions: tokens `[batch, tokens, dim]` (including the class token) and feature maps
    `[batch, rows, columns, dim]`.
    """

    def __init__(self, setup: Setup, representations: Sequence[str]):
        """Compiles at the first call.

        Args:
          setup: model, devices, transform and batch size.
          representations: names of intermediates, such as "pre_logits", "encoded" or "block_5".

        Raises:
          UserError: the model has no such intermediate, the list is empty, or a name occurs twice.
        """
        if isinstance(representations, str) or not representations or len({*representations}) < len(representations):
            raise UserError(
                f"representations are one or more different names, such as ('pre_logits',); got {representations!r}."
            )
        known = representation_shapes(setup.model, setup.transform.image_size)
        for name in representations:
            if name not in known:
                raise unknown_name("representation", name, known)
        self._dims = {name: known[name][-1] for name in representations}
        self._setup = setup

        def extract(params: Any, batch: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
            _, out = setup.model.apply({"params": params}, normalize_images(batch["image"]), train=False)
            pooled = {
                name: out[name].astype(jnp.float32).mean(axis=tuple(range(1, out[name].ndim - 1)))
                for name in self._dims
            }
            return pooled, batch["label"]

        everywhere = replicated(setup.mesh)
        self._extract = jax.jit(
            within(setup.mesh, extract),
            in_shardings=(setup.shardings or everywhere, batch_sharding(setup.mesh)),
            out_shardings=everywhere,  # each process can read only what its own devices hold
        )

    def __call__(self, params: Any, source: Source) -> Features:
        """Runs the model on each example of a source once. All processes must call it, and each gets all features.

        The host dispatches the next batches without waiting for the last one.

        Args:
          params: the model's parameters.
          source: the images, the same in all processes; each process decodes those of its own devices.

        Raises:
          UserError: the parameters are not for images of this size, or too many examples cannot be read.
        """
        arrays = {name: np.empty((len(source), dim), np.float32) for name, dim in self._dims.items()}
        labels = np.empty((len(source), source.max_labels) if source.max_labels > 1 else len(source), np.int32)
        batch_size, dispatched = self._setup.images_per_batch, collections.deque[tuple[int, Any]]()

        def keep(start: int, results: tuple[dict[str, jax.Array], jax.Array]) -> None:
            outputs, given = jax.device_get(results)
            stop = min(start + batch_size, len(source))  # the last batch is padded
            labels[start:stop] = given[: stop - start]
            for name, output in outputs.items():
                arrays[name][start:stop] = output[: stop - start]

        for number, batch in enumerate(self._setup.batches(source, "features", classifies=False)):
            try:
                results = self._extract(params, {"image": batch["image"], "label": batch["label"]})
            except flax.errors.ScopeParamShapeError as error:
                size = self._setup.transform.image_size
                raise UserError(
                    f"the parameters are not for images of {size} x {size} pixels: {error}\n"
                    "Use the size of training, or weights whose position embeddings were interpolated to this one."
                ) from error
            for array in jax.tree.leaves(results):
                array.copy_to_host_async()
            dispatched.append((number * batch_size, results))
            if len(dispatched) > _BATCHES_AHEAD:
                keep(*dispatched.popleft())
        for each in dispatched:
            keep(*each)
        return Features(arrays, labels)
